"""What a process has around it: a launcher's environment, signals, other ranks, a log, limits of memory."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from harness import (
    COLOSSALAI,
    ROOT,
    TRADITIONAL,
    Running,
    command_line,
    run,
    small_disk,
    train,
    unet_weights,
    wait_for,
)
from test_hub import Hub

from benchmarks import random_model
from dreambooth.command_line.console import UserError, progress
from dreambooth.processes.environment import Place, find_place
from dreambooth.processes.signals import SIGNALS, StopRequest

BOTH = pytest.mark.parametrize("script", [COLOSSALAI, TRADITIONAL])
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """Returns a function that sets these variables of a launcher, and no others."""
    for name in (*VARIABLES, "ACCELERATE_USE_DEEPSPEED", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def put(words: str) -> None:
        for pair in words.split():
            monkeypatch.setenv(*pair.split("="))

    return put


@pytest.mark.parametrize(
    "words, place",
    [
        ("", Place()),
        ("MASTER_ADDR=host MASTER_PORT=1", Place()),  # left over, and of no meaning alone
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=host MASTER_PORT=1", Place(1, 2, 0, 1)),  # as Kubeflow sets them
        ("RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=host MASTER_PORT=1", Place(5, 8, 1, 4)),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=host MASTER_PORT=1", Place()),
    ],
)
def test_the_place_of_a_process(environment, words, place):
    environment(words)
    assert find_place() == place


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_keep_no_run_from_its_end(closed, tiny_model, photos, tmp_path):
    """As under some daemons."""
    flags = {"pretrained_model_name_or_path": tiny_model, "instance_data_dir": photos, "instance_prompt": "a dog"}
    flags |= {"resolution": 32, "max_train_steps": 1, "output_dir": tmp_path / "out"}
    command = ["bash", "-c", f'exec "$0" "$@" {closed}', sys.executable, COLOSSALAI, *command_line(flags)]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("script", [COLOSSALAI, TRADITIONAL, "inference.py"])
def test_an_interrupt_during_the_imports_is_quiet(script, photos):
    """They take seconds, in which many a person thinks better of it."""
    words = {"pretrained_model_name_or_path": "m", "instance_data_dir": photos, "instance_prompt": "a dog"}
    words = {"prompt": "a dog"} if script == "inference.py" else words
    command = [sys.executable, script, *command_line(words)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        wait_for(lambda: "libtorch" in maps.read_text())
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == -signal.SIGINT and not out and not err


@pytest.mark.parametrize(
    "words, expected",
    [
        ("WORLD_SIZE=2", "has WORLD_SIZE of a launcher, but not RANK, MASTER_ADDR, MASTER_PORT"),
        ("LOCAL_RANK=3", "has LOCAL_RANK of a launcher, but not RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ("OMPI_COMM_WORLD_SIZE=2", "has OMPI_COMM_WORLD_SIZE of a launcher"),
        # How many there are on a machine, all ranks have to know alike.
        (
            "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=h MASTER_PORT=1",
            "LOCAL_RANK of a launcher, but not LOCAL_WORLD",
        ),
        ("RANK=0 WORLD_SIZE=two MASTER_ADDR=h MASTER_PORT=1", "WORLD_SIZE=two, which is not a whole number"),
        ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=1", "RANK=2, of 2 processes, which are counted from 0"),
        ("ACCELERATE_USE_DEEPSPEED=true", "asks for DeepSpeed, which this project does not use"),
    ],
)
def test_an_environment_that_is_not_whole_is_told(environment, words, expected):
    environment(words)
    with pytest.raises(UserError, match=re.escape(expected)):
        find_place()


@BOTH
def test_both_scripts_read_the_environment_alike(script, flags):
    """What is left over is refused, and what a platform sets for one process per machine is enough to train."""
    done = train(script, flags, env={"WORLD_SIZE": "2"}, check=False)
    assert done.returncode == 2 and "has WORLD_SIZE of a launcher" in done.error_lines[0]
    whole = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    train(script, flags | {"max_train_steps": 1}, env=whole)


@BOTH
def test_what_accelerate_launch_asks_for_acts_or_is_told(script, flags):
    asked = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    done = train(script, flags | {"max_train_steps": 1}, env=asked)
    assert "precision bf16" in done.stdout and "1 step of 2 samples" in done.stdout
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4: no effect" in done.stderr
    done = train(script, flags | {"max_train_steps": 1, "mixed_precision": "no"}, env=asked)
    assert "precision no" in done.stdout
    done = train(script, flags, env={"ACCELERATE_MIXED_PRECISION": "fp16"}, check=False)
    assert "accelerate's mixed precision fp16 needs a CUDA GPU" in done.error_lines[0]


def test_no_variable_of_accelerate_compiles_a_run(flags):
    """--compile does, and what accelerate would compile is the whole denoiser, adapters too."""
    asked = {"ACCELERATE_DYNAMO_BACKEND": "EAGER", "ACCELERATE_USE_CPU": "true"}
    counts = "import torch\ntorch.compile = lambda *args, **how: print('COMPILED') or args[0]"
    done = train(TRADITIONAL, flags | {"max_train_steps": 1}, env=asked, before=counts)
    assert "COMPILED" not in done.stdout
    for name, value in asked.items():
        assert f"{name}={value}: no effect" in done.stderr


SEVERAL_RUNS = """
import importlib, sys
main = importlib.import_module(sys.argv[1].removesuffix(".py")).main
for name in ("out", "out", "other"):
    main([*sys.argv[2:], "--output_dir", name])
    print(name, "is there")
"""


@BOTH
def test_one_process_makes_several_runs(script, flags, tmp_path):
    """As a notebook does: into the same folder again, and into another one."""
    del flags["output_dir"]
    (tmp_path / "notebook.py").write_text(SEVERAL_RUNS)
    argv = [script, *command_line(flags | {"max_train_steps": 1})]
    done = Running("notebook.py", argv, cwd=tmp_path).wait()
    assert done.stdout.count("is there") == 3, done.stderr
    assert unet_weights(tmp_path / "out" / "unet").keys() == unet_weights(tmp_path / "other" / "unet").keys()


def test_a_log_has_lines(capfd):
    """With their ends, and few of them."""
    with progress(1000, desc="training", unit="step") as bar:
        for _ in range(1000):
            bar.update()
    lines = capfd.readouterr().err
    assert "\r" not in lines and lines.endswith("\n") and lines.count("\n") == 2
    assert re.search(r"training: 100% 1000/1000 \[", lines)


# Signals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_that_end_a_process_ask_it_to_stop(number):
    before = signal.signal(number, signal.SIG_DFL)  # a shell that started the tests in its background has it ignored
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), number)
            assert request.name == signal.Signals(number).name
    finally:
        signal.signal(number, before)


def test_every_signal_that_ends_a_process_in_good_health_is_among_them():
    """By trying each one on a process of its own."""
    of_no_concern = {signal.SIGKILL, signal.SIGPIPE, signal.SIGXFSZ}  # the last two are errors in Python
    faults = {
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGSEGV,
        signal.SIGSYS,
        signal.SIGTRAP,
    }
    valid = signal.valid_signals()
    of_no_name = {one for one in valid if not isinstance(one, signal.Signals) or one >= signal.SIGRTMIN}
    for number in valid - of_no_concern - faults - of_no_name - set(SIGNALS):
        process = subprocess.Popen(["sleep", "60"])
        process.send_signal(number)
        time.sleep(0.05)
        ended = process.poll() is not None
        process.kill()
        process.wait()
        assert not ended, signal.Signals(number).name


def test_signals_that_are_ignored_stay_so():
    """As that of a closed terminal is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request
    finally:
        signal.signal(signal.SIGHUP, before)


def asked_to_stop(lines: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs lines within a StopRequest named `request`, with a function `send` for signals to the process itself."""
    code = (
        "import os, signal, time\n"
        "from dreambooth.processes import signals\n"
        "send = lambda name: os.kill(os.getpid(), getattr(signal, name))\n"
        "signals.PATIENCE_S = 1\n"
        "with signals.StopRequest() as request:\n"
    ) + "".join(f"    {line}\n" for line in [*lines.split("; "), "print('alive')"])
    env = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "lines, environment, status",
    [
        ("send('SIGINT'); send('SIGINT')", {}, 0),  # torchrun, `timeout` and others repeat it
        ("send('SIGTERM'); send('SIGHUP')", {}, 0),  # as at the end of a session
        ("signals.REPEATED_S = 0.1; send('SIGINT'); time.sleep(0.2); send('SIGINT')", {}, -signal.SIGINT),
        ("signals.REPEATED_S = 0.1; send('SIGINT'); time.sleep(0.2); send('SIGTERM')", {}, -signal.SIGTERM),
    ],
)
def test_a_second_signal_ends_the_process_at_once(lines, environment, status):
    done = asked_to_stop(lines, **environment)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("again to end at once") == 1


@pytest.mark.parametrize(
    "lines, status",
    [
        # A step that takes long is not taken for a rank that is dead: the one before took as long.
        ("request.get_on(); time.sleep(2); request.get_on(); send('SIGTERM'); time.sleep(4)", 0),
        ("send('SIGTERM'); time.sleep(4)", 0),  # the first step
        ("request.get_on(); send('SIGTERM'); request.heed(); time.sleep(4)", 0),
        ("request.get_on(); send('SIGTERM')\n    with request.unhurried(): time.sleep(4)", 0),
        ("request.get_on(); send('SIGTERM'); time.sleep(60)", 1),
    ],
)
def test_a_rank_that_does_not_get_on_leaves(lines, status):
    assert asked_to_stop(lines, WORLD_SIZE="2").returncode == status


def test_a_port_that_is_taken_is_one_line(flags):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        done = train(COLOSSALAI, flags, nproc=2, check=False, env={"MASTER_PORT": str(port)})
    assert done.returncode == 2 and len(done.error_lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"port {port} of this machine, at which the processes are to meet, is another" in done.error_lines[0]


# Other ranks --------------------------------------------------------------------------------------------------------

# The real trainer; no rank waits for another in a step for more than 5 s.
SHORT_OF_TIME = f"""
import datetime, os, runpy, sys, time
from dreambooth.processes import ranks
from dreambooth.run import checkpoint
ranks.IN_A_STEP = datetime.timedelta(seconds=5)
write_state = checkpoint._write_state
def write_slowly(*args):
    time.sleep(10)
    write_state(*args)
checkpoint._write_state = write_slowly
runpy.run_path({COLOSSALAI!r}, run_name="__main__")
"""


def test_what_rank_0_does_alone_may_take_longer_than_a_step(tiny_model, flags, tmp_path):
    """A checkpoint, and the upload."""
    launcher = tmp_path / "launch.py"
    launcher.write_text(SHORT_OF_TIME)
    hub = Hub(tiny_model)
    hub.slow_s = 10
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    more = {
        "max_train_steps": 3,
        "save_steps": 2,
        "train_batch_size": 1,
        "push_to_hub": True,
        "hub_token": "hf_secret",
    }
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    train(launcher, flags | more, nproc=2, env=env)
    hub.shutdown()
    assert (flags["output_dir"] / "checkpoint-2").is_dir() and "model_index.json" in hub.uploaded


HANG = """
from dreambooth.processes import signals
from dreambooth.run.tracker import Tracker
signals.PATIENCE_S = 1
step = Tracker.step
def hang(self, number, **figures):
    if number == 5 and os.environ["RANK"] == "1":
        time.sleep(10**5)
    return step(self, number, **figures)
Tracker.step = hang
"""


def test_a_rank_that_hangs_in_a_step_is_waited_for_no_longer_than_a_step_may_take(flags, tmp_path):
    """Without any signal."""
    launcher = tmp_path / "launch.py"
    launcher.write_text(
        SHORT_OF_TIME.replace("    time.sleep(10)\n", "").replace("runpy.run_path", f"{HANG}runpy.run_path")
    )
    done = train(str(launcher), flags | {"max_train_steps": 10**5}, nproc=2, check=False)
    assert done.returncode == 1 and "rank 0" in done.stderr


# Two ranks, of which the second may be told something else: "one|other" is one on rank 0 and other on rank 1. Its
# listing of checkpoints is stale, as network file systems have it.
APART = """
import os, sys
from dreambooth.run import checkpoint
rank = int(os.environ["RANK"])
listed = checkpoint.list_checkpoints
checkpoint.list_checkpoints = lambda folder: listed(folder)[: -1 if rank else None]
sys.argv[1:] = [word.split("|")[rank if "|" in word else 0] for word in sys.argv[1:]]
exec(compile(open("{script}").read(), "{script}", "exec"))
"""


@pytest.fixture
def apart(tmp_path):
    """Returns a function that runs a script on two ranks so."""

    def run_apart(script: str, flags: dict, **options):
        launcher = tmp_path / f"apart_{script}"
        launcher.write_text(APART.format(script=script))
        return train(str(launcher), flags, nproc=2, **options)

    return run_apart


@BOTH
def test_ranks_that_find_different_things_do_not_train(script, flags, prior, tiny_model, photos, apart, tmp_path):
    """Other flags, another model, other images; a list of checkpoints that is late does not matter."""
    random_model.build(tmp_path / "model", "tiny", seed=7)
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "3.png").write_bytes((photos / "2.png").read_bytes())
    flags |= {"max_train_steps": 4, "save_steps": 2, "train_batch_size": 1}
    for changed, expected in (
        ({"learning_rate": "1e-4|1e-3"}, "rank 1 found other settings than rank 0"),
        (
            {"pretrained_model_name_or_path": f"{tiny_model}|{tmp_path / 'model'}"},
            "rank 1 found other model weights than rank 0",
        ),
        ({"instance_data_dir": f"{photos}|{tmp_path / 'photos'}"}, "rank 1 found other images than rank 0"),
    ):
        done = apart(script, flags | changed, check=False)
        assert done.returncode == 2 and len(done.error_lines) == 1 and expected in done.error_lines[0], done.stderr
    apart(script, flags)
    done = apart(script, flags | {"max_train_steps": 6, "resume_from_checkpoint": "latest"})
    assert "4/6 [" in done.stderr


@BOTH
def test_ranks_of_which_one_cannot_record_go_on_without(script, flags):
    """As a machine without a C compiler, among others that have one."""
    one_can = """
import os
import dreambooth.model.recording as recording
from dreambooth.model.kernels_ahead import KernelsAhead
recording.records = lambda *args, **more: os.environ["RANK"] == "0"
KernelsAhead.compile = lambda *args, **more: None  # which would ask for the GPU
"""
    done = train(script, flags | {"max_train_steps": 1}, nproc=2, before=one_can)
    assert "rank 1 cannot record steps, so no rank does" in done.stderr and "1 step of 4 samples" in done.stdout


# Start and end ------------------------------------------------------------------------------------------------------

PUT_OFF = """
import atexit, gc, importlib.util, sys
from dreambooth.command_line.console import before_imports, run_program
usual = gc.get_threshold()
atexit.register(print, "what comes after the exit handlers of all that is imported")
before_imports(__name__)
import torch
compiled = []

def backend(graph, inputs):
    compiled.append(graph)
    return graph

@torch.compile(backend=backend)
def double(x):
    return x + x

import colossalai.booster
import diffusers.optimization
print("sklearn is", "there" if importlib.util.find_spec("sklearn") else "not there")
for module in ("torch._inductor.compile_fx", "torch._inductor.select_algorithm"):
    print(module, module in sys.modules)

def main():
    assert gc.get_threshold() == usual and gc.get_freeze_count() > 100_000
    assert torch.compile.__module__ == "torch" and not hasattr(torch.compile, "__wrapped__")
    print(len(compiled), double(torch.ones(())).item(), double(torch.ones(())).item(), len(compiled))

atexit.register(print, "an exit handler")
run_program(main, "put_off")
print("after it, sklearn is", "there" if importlib.util.find_spec("sklearn") else "not there")
"""


def test_a_program_neither_imports_what_it_does_not_use_nor_is_taken_apart(tmp_path):
    """What libraries compile is compiled all the same, when it is called; exit handlers run, and output is written."""
    (tmp_path / "put_off.py").write_text(PUT_OFF)
    (tmp_path / "sklearn.py").touch()  # which transformers imports where it finds it
    done = run([sys.executable, tmp_path / "put_off.py"], env={"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""})
    assert done.stdout.splitlines() == [
        "sklearn is not there",
        "torch._inductor.compile_fx False",
        "torch._inductor.select_algorithm False",
        "0 2.0 2.0 1",
        "after it, sklearn is there",
        "an exit handler",
    ], done.stderr


# Memory -------------------------------------------------------------------------------------------------------------

LITTLE_MEMORY = """
import resource, sys
import train_dreambooth
from dreambooth.command_line.console import run_program
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1000 << 20),) * 2)
run_program(lambda: train_dreambooth.main(sys.argv[1:]), "train_dreambooth.py")
"""


def test_too_little_memory_is_one_line(flags, tmp_path):
    """With what takes less, but for what the run has already."""
    more = {"train_batch_size": 2048, "gradient_checkpointing": True, "center_crop": True}
    (tmp_path / "little_memory.py").write_text(LITTLE_MEMORY)
    done = train(tmp_path / "little_memory.py", flags | more, check=False)
    assert done.returncode == 1 and len(done.error_lines) == 1 and "Traceback" not in done.stderr
    assert re.search(r"out of host memory while training: this process held \d+\.\d GiB", done.error_lines[0])
    assert "a smaller --train_batch_size" in done.error_lines[0]
    assert "--gradient_checkpointing," not in done.error_lines[0]


def test_too_little_shared_memory_is_one_line(flags):
    """As in a container."""
    more = {"train_batch_size": 64, "cache_latents": "off", "dataloader_num_workers": 2}
    done = train(COLOSSALAI, flags | more, before=small_disk("/dev/shm", "256k"), check=False)
    assert done.returncode == 1 and len(done.error_lines) == 1 and "Traceback" not in done.stderr
    assert "/dev/shm has 0.2 MiB. Start the container with a larger --shm-size" in done.error_lines[0]


NCCL_FAILED = """\
NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, unhandled system error (run with NCCL_DEBUG=INFO
for details), NCCL version 2.28.9
{kind}: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
nvmlInit_v2() failed: GPU access blocked by the operating system
"""


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            "ncclSystemError",
            "x: error: NCCL, which connects the GPUs, says: nvmlInit_v2() failed: GPU access blocked by ",
        ),
        ("ncclRemoteError", "x: rank 0 ends, because another rank has"),
    ],
)
def test_what_nccl_says_is_told_unless_another_rank_has_ended(kind, told, tmp_path):
    said = said_of(f"torch.distributed.DistBackendError({NCCL_FAILED.format(kind=kind)!r})", tmp_path)
    assert said.startswith(told) and len(said.splitlines()) == 1


def test_a_failure_of_the_compiler_is_one_line(tmp_path):
    said = said_of("torch._inductor.exc.CppCompileError(['g++', 'x.cpp'], 'x.cpp:1: error: what')", tmp_path)
    assert said.startswith("x: error: torch's compiler has failed: C++ compile error. --compile asks for it, and ")
    assert len(said.splitlines()) == 1


def said_of(error: str, tmp_path) -> str:
    """Returns what a program says that an error has ended, a Python expression."""
    (tmp_path / "x.py").write_text(
        f"import torch._inductor.exc\nfrom dreambooth.command_line.console import run_program\n"
        f"def main():\n    raise {error}\nrun_program(main, 'x')\n"
    )
    done = run([sys.executable, tmp_path / "x.py"], env={"PYTHONPATH": str(ROOT), "RANK": "0"}, check=False)
    assert done.returncode == 1
    return done.stderr


# Standard output and error of a run that nobody reads any more.
GONE = {
    "terminal": "import pty\nmaster, gone = pty.openpty()\nos.close(master)",
    "pipe": "read, gone = os.pipe()\nos.close(read)",
    "log on a full disk": "gone = os.open('/dev/full', os.O_WRONLY)",
}


@pytest.mark.parametrize("gone", GONE)
def test_where_nobody_listens_a_run_ends_as_it_would_have(gone, flags):
    before = f"{GONE[gone]}\nos.dup2(gone, 1), os.dup2(gone, 2)"
    flags |= {"save_steps": 5, "checkpoints_total_limit": 1}
    train(TRADITIONAL, flags, before=before, env={"TQDM_MININTERVAL": "0"})
    assert (flags["output_dir"] / "model_index.json").is_file()
    assert [path.name for path in flags["output_dir"].glob("checkpoint-*")] == ["checkpoint-10"]
    refused = train(TRADITIONAL, flags | {"resume_from_checkpoint": "none"}, before=before, check=False)
    assert refused.returncode == 2


def test_any_name_of_a_file_can_be_printed():
    program = (
        "from dreambooth.command_line.console import before_imports, say\n"
        "before_imports('__main__')\n"
        "say('caf\\udce9')"
    )
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "caf\\udce9\n"), done.stderr


def test_an_error_is_told_though_torchrun_cannot_have_it(flags):
    """Its file may be on a disk that is full."""
    flags |= {"resume_from_checkpoint": "none"}
    done = train(TRADITIONAL, flags, env={"TORCHELASTIC_ERROR_FILE": "/dev/full"}, check=False)
    assert done.returncode == 2 and len(done.error_lines) == 1 and "Traceback" not in done.stderr
