"""Runs that are killed, stopped, run out of disk or of numbers; each fault really happens."""

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from harness import (
    COLOSSALAI,
    STANDALONE,
    TRADITIONAL,
    Running,
    children_of,
    command_line,
    scalars,
    small_disk,
    train,
    unet_weights,
    wait_for,
)
from PIL import Image
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter

from dreambooth.run.tracker import Tracker

BOTH = pytest.mark.parametrize("script", [COLOSSALAI, TRADITIONAL])
KILLS = int(os.environ.get("KILLS", 4))  # benchmarks/reliability.py wants more
STEPS = 5 * (KILLS + 2)
STEPS_ALONE = 25  # of one process, which is stopped once
ENDS_WITHIN_S = 300  # on a busy machine; a collective would wait for half an hour


@pytest.fixture
def report(record_property):
    """Counts a fault that a test has survived, for benchmarks/reliability.py."""

    def count(fault: str, *, injected: int = 1, resumed: int = 0, equal: int = 0) -> None:
        record_property("fault", json.dumps([fault, injected, resumed, equal]))

    return count


def steps_shown(run: Running) -> int:
    """Returns how many steps a run has shown so far."""
    return max(map(int, re.findall(r"(\d+)/\d+ \[", run.stderr.read_text())), default=0)


def steps_shown_by(run: Running, at_least: int):
    return lambda: steps_shown(run) >= at_least


def assert_same(one: Path, other: Path, checkpoint: str) -> None:
    """Weights, and the optimizer's state in a checkpoint, to the bit."""
    for of in (
        lambda folder: unet_weights(folder / "unet"),
        lambda folder: load_file(folder / checkpoint / "optimizer.safetensors"),
    ):
        here, there = of(one), of(other)
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


@pytest.fixture
def long_run(flags, prior):
    """Flags of a run with everything that has a state, and many checkpoints."""
    more = {"train_batch_size": 1, "max_train_steps": STEPS, "save_steps": 5, "lr_scheduler": "cosine"}
    return flags | prior | more


@pytest.fixture
def long_run_alone(long_run):
    """The same for one process."""
    return long_run | {"max_train_steps": STEPS_ALONE}


@pytest.fixture
def uninterrupted(once, long_run, long_run_alone):
    """Returns a function that makes the long run once for all tests: out/ and class_images/ in the folder returned."""

    def of(script: str, nproc: int) -> Path:
        def make(folder):
            own = {"output_dir": folder / "out", "class_data_dir": folder / "class_images"}
            train(script, (long_run_alone if nproc == 1 else long_run) | own, nproc=nproc)

        return once(f"uninterrupted-{script}-{nproc}", make)

    return of


@BOTH
def test_killed_again_and_again_a_run_ends_as_if_nothing_had_been(script, long_run, uninterrupted, tmp_path, report):
    """One rank or all of them, at random moments between steps and, every other time, in the middle of a save."""
    whole, killed = uninterrupted(script, 2) / "out", tmp_path / "killed"
    chance = random.Random(script)
    argv = command_line(long_run | {"output_dir": killed, "resume_from_checkpoint": "latest"})
    half_written = 0
    for number in range(KILLS):
        run = Running(script, argv, nproc=2)
        if number % 2:
            wait_for(lambda: any(killed.glob(".checkpoint-*.partial")))
        else:
            wait_for(steps_shown_by(run, at_least=1))
            wait_for(steps_shown_by(run, at_least=steps_shown(run) + chance.randint(0, 8)))
        run.send(signal.SIGKILL, rank=None if number % 4 < 2 else 0)
        assert run.wait(check=False).returncode != 0
        half_written += any(killed.glob(".checkpoint-*.partial"))
    Running(script, argv, nproc=2).wait()
    assert_same(whole, killed, f"checkpoint-{STEPS}")
    assert half_written, "no kill met a save"
    assert not list(killed.glob(".*")), "what was half-written is gone"
    assert scalars(killed, "loss") == scalars(whole, "loss")
    for fault, times in {"between steps": KILLS - half_written, "in the middle of a save": half_written}.items():
        report(f"killed {fault}", injected=times, resumed=times, equal=times)


def test_torchrun_starts_again_by_itself_after_a_rank_has_died(long_run, uninterrupted, tmp_path, report):
    whole, killed = uninterrupted(COLOSSALAI, 2) / "out", tmp_path / "killed"
    more = {"output_dir": killed, "resume_from_checkpoint": "latest"}
    run = Running(COLOSSALAI, command_line(long_run | more), nproc=2, torchrun=[*STANDALONE, "--max_restarts=1"])
    wait_for((killed / "checkpoint-10").is_dir)
    os.kill(children_of(run.pids[0])[1], signal.SIGKILL)
    run.wait()
    assert_same(whole, killed, f"checkpoint-{STEPS}")
    report("killed, and started again by torchrun", resumed=1, equal=1)


# What tells signals apart (processes/signals.py) is the same code for both scripts.
@pytest.mark.parametrize(
    ("script", "number"),
    [
        (COLOSSALAI, signal.SIGTERM),
        (COLOSSALAI, signal.SIGHUP),
        (TRADITIONAL, signal.SIGTERM),
        (TRADITIONAL, signal.SIGINT),
    ],
)
def test_a_signal_ends_the_step_and_saves(script, number, long_run_alone, uninterrupted, tmp_path, report):
    """Ctrl-C, a closed terminal, and the end of a job's time, for which no picture is drawn any more."""
    whole, stopped = uninterrupted(script, 1) / "out", tmp_path / "stopped"
    flags = long_run_alone | {"class_data_dir": whole.parent / "class_images", "output_dir": stopped}
    draws = {"validation_prompt": "a dog", "num_validation_images": 1, "validation_steps": 1}
    draws = draws if number == signal.SIGTERM else {}
    run = Running(script, command_line(flags | draws))
    wait_for(steps_shown_by(run, at_least=2 if draws else 7))  # pictures take longer than steps
    run.send(number)
    done = run.wait(check=False)
    assert done.returncode == 75
    assert done.stderr.count(f"{number.name}: ending and saving the step in hand; again to end at once") == 1
    last = done.stderr.splitlines()[-1]
    step = int(re.search(rf"stopped by {number.name} after step (\d+) of {STEPS_ALONE}", last)[1])
    assert "--resume_from_checkpoint latest" in last and (stopped / f"checkpoint-{step}").is_dir()
    if draws:
        assert not (stopped / "validation" / f"step-{step}.png").exists()
        assert (stopped / "validation" / f"step-{step - 1}.png").exists()
    train(script, flags | {"resume_from_checkpoint": "latest"})
    assert_same(whole, stopped, f"checkpoint-{STEPS_ALONE}")
    report("SIGTERM, Ctrl-C or a closed terminal", resumed=1, equal=1)


def test_a_signal_to_torchrun_stops_all_ranks_with_a_checkpoint(long_run, uninterrupted, tmp_path, report):
    """That of a closed terminal, which torchrun hands on also where nohup has it ignored."""
    whole, stopped = uninterrupted(COLOSSALAI, 2) / "out", tmp_path / "stopped"
    long_run |= {"class_data_dir": whole.parent / "class_images"}
    argv = command_line(long_run | {"output_dir": stopped})
    nohup = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    run = Running(COLOSSALAI, argv, nproc=2, torchrun=STANDALONE, before=nohup)
    wait_for(steps_shown_by(run, at_least=2))
    run.send(signal.SIGHUP)
    done = run.wait(check=False, timeout=60)
    step = int(re.search(rf"stopped by SIGHUP after step (\d+) of {STEPS}", done.stderr)[1])
    assert json.loads((stopped / f"checkpoint-{step}" / "state.json").read_text())["step"] == step
    train(COLOSSALAI, long_run | {"output_dir": stopped, "resume_from_checkpoint": "latest"}, nproc=2)
    assert_same(whole, stopped, f"checkpoint-{STEPS}")
    report("SIGTERM, Ctrl-C or a closed terminal", resumed=1, equal=1)


def test_a_run_without_checkpoints_leaves_one_every_few_minutes(long_run_alone, uninterrupted, tmp_path, report):
    """Killed, it goes on from there; at its end the pipeline takes the place of what no flag has asked for."""
    whole, killed = uninterrupted(COLOSSALAI, 1) / "out", tmp_path / "killed"
    long_run_alone |= {"class_data_dir": whole.parent / "class_images", "output_dir": killed}
    argv = command_line(
        long_run_alone | {"save_steps": 500, "save_minutes": 0.001, "resume_from_checkpoint": "latest"}
    )
    run = Running(COLOSSALAI, argv)
    wait_for(lambda: list(killed.glob("checkpoint-*")))
    run.send(signal.SIGKILL)
    run.wait(check=False)
    newest = max(killed.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    done = Running(COLOSSALAI, argv).wait()
    assert f"{newest.name.split('-')[1]}/{STEPS_ALONE} [" in done.stderr
    here, there = unet_weights(whole / "unet"), unet_weights(killed / "unet")
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert not list(killed.glob("checkpoint-*"))
    report("killed where no checkpoint was asked for", resumed=1, equal=1)


def test_an_interim_checkpoint_takes_the_place_of_none_that_was_asked_for(flags):
    """There is one after every few steps here, and the limit is for the others."""
    flags |= {"save_steps": 12, "save_minutes": 1e-5, "checkpoints_total_limit": 1, "max_train_steps": 23}
    done = train(TRADITIONAL, flags, before="from dreambooth.run import tracker\ntracker.SHARE_OF_SAVING = 1e9")
    assert max(int(step) for step in re.findall(r"checkpoint-(\d+) saved", done.stdout)) > 12
    assert [folder.name for folder in flags["output_dir"].glob("checkpoint-*")] == ["checkpoint-12"]


@BOTH
def test_a_loss_that_is_no_number_ends_the_run(script, flags, photos, report):
    """Step 2 starts from weights that step 1, with an absurd learning rate, has blown up."""
    flags |= {"learning_rate": 1e6, "save_steps": 1, "adam_weight_decay": 0}
    done = train(script, flags, check=False)
    assert done.returncode == 1 and len(done.error_lines) == 1
    error = re.search(r"step (\d+) is not finite \(samples (\d+) to (\d+): (.*)\)", done.error_lines[0])
    step, first, last = map(int, error.groups()[:3])
    assert (step, first, last) == (2, 2, 3)
    assert set(error[4].split(", ")) <= {path.name for path in photos.iterdir()}
    saved = list(flags["output_dir"].glob("checkpoint-*"))
    assert len(saved) == 1 and not (flags["output_dir"] / "model_index.json").exists()
    for folder in saved:
        assert all(tensor.isfinite().all() for tensor in unet_weights(folder / "unet").values())
    report("loss or gradient that is no number")


@BOTH
def test_a_full_disk_costs_no_earlier_checkpoint(script, flags, report):
    """Files of more than 1 MiB cannot be written: the UNet has 0.8 MiB, the optimizer's state twice that."""
    flags |= {"max_train_steps": 4, "save_steps": 2}
    train(script, flags | {"max_train_steps": 2})
    earlier = {path: path.read_bytes() for path in (flags["output_dir"] / "checkpoint-2").rglob("*.*")}
    assert len(earlier) == 4
    more = {"resume_from_checkpoint": "latest", "resume_anyway": True}
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"
    done = train(script, flags | more, before=limited, check=False)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "cannot write" in error and "checkpoint-4, which needs 2.3 MiB" in error
    assert "File too large" in error
    assert {path: path.read_bytes() for path in earlier} == earlier
    assert not list(flags["output_dir"].glob(".*")), "what was half-written is gone"
    train(script, flags | more)
    report("disk full")


# Prints what is in a folder when the process is over, as long as it can be seen.
LIST_AT_THE_END = """
import os
if process := os.fork():
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(os.listdir({folder!r}), flush=True)
    os._exit(status)
"""


@BOTH
def test_a_disk_too_small_is_known_before_any_time_is_spent(script, flags, prior, report):
    """Five checkpoints do not fit on 8 MiB beside the pipeline; no class image has been generated then."""
    flags["output_dir"].mkdir()
    shutil.rmtree(prior["class_data_dir"])
    before = small_disk(flags["output_dir"], "8m") + LIST_AT_THE_END.format(folder=str(flags["output_dir"]))
    done = train(script, flags | prior | {"save_steps": 2}, before=before, check=False)
    assert done.returncode == 2 and done.stdout.split() == ["[]"]
    (error,) = (line for line in done.stderr.splitlines() if ": error: " in line)
    for words in ("5 checkpoints of 2.3 MiB and the pipeline of ", "8.0 MiB are free", "--checkpoints_total_limit"):
        assert words in error
    assert not prior["class_data_dir"].exists()
    report("disk full")


def test_a_disk_that_fills_up_loses_no_trained_pipeline(flags, tmp_path, report):
    """All of it is taken by somebody else once the run has begun; the pipeline is written elsewhere."""
    output_dir, elsewhere = flags["output_dir"], tmp_path / "temporary"
    output_dir.mkdir()
    elsewhere.mkdir()
    fill = f"until [ -d {output_dir}/logs ]; do sleep 0.01; done; exec 2>&-; cat /dev/zero > {output_dir}/grows"
    before = small_disk(output_dir, "16m") + f"subprocess.Popen(['bash', '-c', {fill!r}])"
    done = train(TRADITIONAL, flags, before=before, env={"TMPDIR": str(elsewhere)}, check=False)
    error = done.stderr.splitlines()[-1]
    (saved,) = elsewhere.glob("dreambooth-pipeline-step-10-*")
    assert done.returncode == 1 and f"the trained pipeline is whole in {saved} instead" in error
    assert StableDiffusionPipeline.from_pretrained(saved).unet.num_parameters() > 0
    report("disk full")


# The model's folder is gone when the training begins.
LOSES_ITS_MODEL = """
import shutil
from dreambooth.run import stages
found = stages.loss_by
def loss_by(run, *others):
    shutil.rmtree(run.flags.model.pretrained_model_name_or_path, ignore_errors=True)
    return found(run, *others)
stages.loss_by = loss_by
"""


@pytest.mark.parametrize(("script", "nproc"), [(COLOSSALAI, 2), (TRADITIONAL, 1)])
def test_what_was_trained_is_kept_where_the_rest_cannot_be_read_any_more(
    script, nproc, flags, tiny_model, tmp_path, report
):
    """Validation images that cannot be had end nothing, and at the end the trained UNet is in a folder that stays."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    flags |= {"pretrained_model_name_or_path": model, "train_batch_size": 2 // nproc, "max_train_steps": 4}
    flags |= {"validation_prompt": "a dog", "validation_steps": 2}
    done = train(script, flags, nproc=nproc, before=LOSES_ITS_MODEL, check=False)
    kept = flags["output_dir"] / "pipeline-step-4"
    (error,) = done.error_lines
    assert done.returncode == 1 and "model_index.json" in error and error.endswith(f"what was trained is in {kept}")
    assert done.stderr.count("warning: no validation images of step 2: ") == 1 and "Traceback" not in done.stderr
    assert not list(flags["output_dir"].glob(".*"))
    again = flags | {"pretrained_model_name_or_path": tiny_model, "validation_prompt": None, "max_train_steps": 1}
    train(script, again | {"external_unet_path": kept / "unet", "learning_rate": 0})
    trained, begun = (unet_weights(folder / "unet") for folder in (kept, flags["output_dir"]))
    assert trained.keys() == begun.keys() and all(torch.equal(trained[name], begun[name]) for name in begun)
    report("model folder gone at the end")


def test_figures_that_cannot_be_written_end_nothing(tmp_path, capsys):
    """As when others fill the disk during a run: TensorBoard's error does not even say which file it was about."""

    def write(writer):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tracker = object.__new__(Tracker)
    tracker.writer = SummaryWriter(tmp_path)
    tracker._log(write)
    tracker._log(lambda writer: pytest.fail("it is written to again"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no figures go to TensorBoard from here on: ") and "No space left" in line


def test_an_output_folder_that_takes_nothing_any_more(flags, tmp_path, report):
    """By the second checkpoint its name leads into a folder of the kernel, where not even root creates files."""
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    run = Running(COLOSSALAI, command_line(flags | {"output_dir": link, "max_train_steps": 2000, "save_steps": 20}))
    wait_for((real / "checkpoint-20").is_dir)
    link.unlink()
    link.symlink_to("/proc")
    done = run.wait(check=False)
    assert done.returncode == 1 and len(done.error_lines) == 1 and "Traceback" not in done.stderr
    assert re.search(f"cannot (read or )?write {link}", done.error_lines[0])
    assert unet_weights(real / "checkpoint-20" / "unet")
    report("output folder that takes no files any more")


def test_a_second_run_keeps_out_of_the_folder_of_the_first(flags, report):
    argv = command_line(flags | {"max_train_steps": 2000})
    first = Running(TRADITIONAL, argv)
    wait_for(lambda: steps_shown(first))
    second = Running(COLOSSALAI, argv).wait(check=False)
    first.send(signal.SIGTERM)
    assert first.wait(check=False).returncode == 75
    assert second.returncode == 2
    assert f"--output_dir {flags['output_dir']}: another run writes into it" in second.stderr.splitlines()[-1]
    report("two runs, one output folder")


def assert_ends_with_first_cause(run: Running, cause: str) -> None:
    """All ranks end; torchrun's last words, and the one error line, name the first cause."""
    done = run.wait(timeout=ENDS_WITHIN_S, check=False)
    assert done.returncode == 1
    text = done.stderr
    last_words = text[text.rindex("Root Cause") :].split("traceback : ")[1].strip("=\n ")
    assert cause in last_words and "\n" not in last_words
    errors = [line for line in text.splitlines() if ": error: " in line]
    assert errors[0].endswith(last_words) and text.count("Traceback") == 1, "torchrun's own"


def test_a_rank_that_hangs_does_not_hold_the_others(flags, report):
    """Rank 0 waits in a collective for rank 1, which is stopped: a signal ends it nevertheless."""
    impatient = "from dreambooth.processes import signals; signals.PATIENCE_S = 1"
    run = Running(COLOSSALAI, command_line(flags | {"max_train_steps": 10**5}), nproc=2, before=impatient)
    wait_for(lambda: steps_shown(run))
    run.send(signal.SIGSTOP, rank=1)
    time.sleep(1)
    run.send(signal.SIGTERM, rank=0)
    wait_for(lambda: not Path(f"/proc/{run.pids[0]}").exists(), timeout=ENDS_WITHIN_S)
    run.send(signal.SIGKILL, rank=1)
    assert run.wait(check=False).returncode == 1
    report("one rank hangs")


def test_a_rank_that_fails_in_the_data(flags, tmp_path, report):
    """Photos are damaged while the run goes on; which rank first meets one that it has not in memory is chance."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(60):
        Image.new("RGB", (48, 32), (number, 0, 0)).save(folder / f"{number}.png")
    more = {"instance_data_dir": folder, "max_train_steps": 2000, "save_steps": 20, "train_batch_size": 1}
    more |= {"cache_latents": "off"}  # or all photos are read before the first step
    run = Running(COLOSSALAI, command_line(flags | more), nproc=2, torchrun=STANDALONE)
    wait_for((flags["output_dir"] / "checkpoint-20").is_dir)
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    assert_ends_with_first_cause(run, "cannot read the image")
    report("one rank fails: in the data")


def test_a_rank_that_fails_in_generating_class_images(flags, prior, report):
    """An image of the second batch cannot be written, whichever rank takes it: a folder has its name."""
    shutil.rmtree(prior["class_data_dir"])
    (prior["class_data_dir"] / "00002.png").mkdir(parents=True)
    run = Running(TRADITIONAL, command_line(flags | prior), nproc=2, torchrun=STANDALONE)
    assert_ends_with_first_cause(run, "00002.png")
    report("one rank fails: in generating class images")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_alone_with_an_error_in_saving(rank, flags, report):
    """As when it has no memory for a copy: the others are not kept waiting."""
    before = (
        "from dreambooth.model import slices\n"
        "import os\n"
        "def fails(path, *others, write=slices._write):\n"
        f"    if 'pipeline-step' in str(path) and os.environ['RANK'] == '{rank}':\n"
        "        raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')\n"
        "    return write(path, *others)\n"
        "slices._write = fails"
    )
    run = Running(
        COLOSSALAI, command_line(flags | {"max_train_steps": 2, "train_batch_size": 1}), nproc=2, before=before
    )
    done = run.wait(check=False, timeout=ENDS_WITHIN_S)
    assert done.returncode == 1, "it was killed, having waited for the other"
    assert any("out of host memory" in line for line in done.error_lines), done.stderr
    report("one rank fails: in saving")


def test_a_rank_that_fails_in_saving(flags, report):
    """Something else has got the name of the next checkpoint."""
    argv = command_line(flags | {"max_train_steps": 2000, "save_steps": 20})
    run = Running(COLOSSALAI, argv, nproc=2, torchrun=STANDALONE)
    wait_for((flags["output_dir"] / "checkpoint-20").is_dir)
    (flags["output_dir"] / "checkpoint-60").touch()
    cause = f"cannot write {flags['output_dir']}/checkpoint-60: checkpoint-60 was not written by this program"
    assert_ends_with_first_cause(run, cause)
    assert unet_weights(flags["output_dir"] / "checkpoint-40" / "unet")
    report("one rank fails: in saving")
