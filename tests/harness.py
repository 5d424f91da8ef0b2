"""Running the real scripts as a user does, and reading what they leave behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

# Nothing that takes long is imported here: pytest's own process, which hands the tests out, needs this too.

ROOT = Path(__file__).resolve().parent.parent
COLOSSALAI = "train_dreambooth_colossalai.py"
TRADITIONAL = "train_dreambooth.py"
SHARED_DATA = ROOT.parent / "shared" / "data"
STANDALONE = ("--standalone",)  # of torchrun: on this machine, at a free port


@dataclass
class Run:
    """A finished process."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def error_lines(self) -> list[str]:
        """The lines that tell the user what is wrong."""
        return [line for line in self.stderr.splitlines() if ": error: " in line]


def command_line(flags: dict) -> list[str]:
    """Turns {"seed": 1, "center_crop": True, "revision": None} into ["--seed", "1", "--center_crop"]."""
    words = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words.append(str(value))
    return words


def run(command: list, *, env: dict | None = None, check: bool = True, timeout: float = 300) -> Run:
    """Runs a command in the project's folder; with `check`, fails loudly if it does."""
    started = time.monotonic()
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return finish(done.returncode, done.stdout, done.stderr, started, check)


def finish(returncode: int, stdout: str, stderr: str, started: float, check: bool) -> Run:
    assert returncode != os.EX_IOERR, f"what it said could not be written: is {tempfile.gettempdir()} full?"
    if check and returncode:
        raise AssertionError(f"exit status {returncode}\n{stdout}\n{stderr}")
    return Run(returncode, stdout, stderr, time.monotonic() - started)


@contextlib.contextmanager
def zygote_for_all() -> Iterator[None]:
    """Within it this process and those that it starts share a zygote (zygote.py), which ends with it."""
    with tempfile.TemporaryDirectory(prefix="zygote-") as folder:
        os.environ["ZYGOTE"] = folder
        os.mkfifo(Path(folder, "alive"))
        alive = os.open(Path(folder, "alive"), os.O_RDWR)  # the zygotes read from it
        yield
        os.close(alive)


def connect(name: str) -> socket.socket:
    """Returns a connection to the zygote's socket of that name; it is started when it is first wanted."""
    folder = Path(os.environ["ZYGOTE"])
    alive = folder / "alive"
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {"PYTHONPATH": paths, "TQDM_MININTERVAL": "0.1", "CUDA_VISIBLE_DEVICES": ""}
    env["TORCH_WARM_POOL"] = "0"  # or torch's compiler starts threads when it is imported
    with FileLock(folder / "lock"):
        if not (folder / "log").exists():
            with alive.open() as stdin, (folder / "log").open("w") as log:
                subprocess.Popen(
                    [sys.executable, "tests/zygote.py", folder],
                    cwd=ROOT,
                    env=os.environ | env,
                    stdin=stdin,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for pytest
                )

    def connected() -> socket.socket | None:
        log = (folder / "log").read_text()
        assert "Traceback" not in log, log
        connection = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            connection.connect(str(folder / name))
            return connection

    return wait_for(connected, timeout=300)


class Running:
    """A run of `python script argv` in a fork of the zygote, or several processes of it as torchrun would start them.

    Args:
        script: its path; or "-m" for a module, which is the first word of argv.
        argv: the words after it.
        nproc: the number of processes.
        env: is added to the environment.
        torchrun: options of torchrun, which then is the one process started here, and starts the others.
        anew: whether the project's modules are imported anew, and those that import huggingface_hub; as they are with
            variables of huggingface_hub in `env`, which it reads when it is imported.
        before: lines of Python that each process, or torchrun, executes first.
        cwd: the working directory.
        on_gpu: whether it sees the GPUs of this machine; its processes are no forks then, and `before` is passed over.
    """

    unfinished: list["Running"] = []

    def __init__(
        self,
        script: str | Path,
        argv: list,
        nproc: int = 1,
        *,
        env: dict | None = None,
        torchrun: Sequence[str] | None = None,
        anew: bool = False,
        before: str = "",
        cwd: Path = ROOT,
        on_gpu: bool = False,
    ):
        self.started = time.monotonic()
        self.folder = tempfile.TemporaryDirectory()
        self.stdout, self.stderr = Path(self.folder.name, "stdout"), Path(self.folder.name, "stderr")
        self.stderr.touch()
        program = [str(word) for word in (script, *argv)]
        if torchrun is not None:
            program, nproc = ["torchrun", f"--nproc_per_node={nproc}", *torchrun, *program], 1
        order = {"program": program, "nproc": nproc, "env": env or {}, "cwd": str(cwd), "before": before}
        order |= {"stdout": str(self.stdout), "stderr": str(self.stderr), "as_new": on_gpu}
        if on_gpu:
            order["env"] = order["env"] | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES")}
        anew = anew or any(name.startswith("HF_") for name in order["env"])
        with connect("anew" if anew else "socket") as connection:
            connection.sendall(f"{json.dumps(order)}\n".encode())
            self.answers = connection.makefile()
        self.pids = json.loads(self.answers.readline())
        self.unfinished.append(self)

    def send(self, number: int, rank: int | None = None) -> None:
        """Sends a signal to a rank, or to all; to torchrun, where it has started them."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Ends all its processes, also those that torchrun has started."""
        for pid in self.pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for one in (pid, *children_of(pid)):
                    os.kill(one, signal.SIGKILL)

    def wait(self, *, check: bool = True, timeout: float = 300) -> Run:
        killer = threading.Timer(timeout, self.kill)
        killer.start()
        returncode = int(self.answers.readline())
        self.unfinished.remove(self)
        killer.cancel()
        with self.folder, self.answers:
            return finish(returncode, self.stdout.read_text(), self.stderr.read_text(), self.started, check)


def train(script: str | Path, flags: dict, *, nproc: int = 1, **options) -> Run:
    """Runs a trainer to its end in a fork of the zygote (see Running), on the CPU unless `on_gpu`."""
    ending = {name: options.pop(name) for name in ("check", "timeout") if name in options}
    return Running(script, command_line(flags), nproc, **options).wait(**ending)


def start_torchrun(script: str, flags: dict, log: Path) -> subprocess.Popen:
    """Starts two processes of a trainer on GPUs with torchrun, as a user does; the output goes to `log`."""
    command = [sys.executable, "-m", "torch.distributed.run", *STANDALONE, "--nproc_per_node=2"]
    return subprocess.Popen(
        [*command, script, *command_line(flags)],
        cwd=ROOT,
        env=os.environ | {"TQDM_MININTERVAL": "0.1"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )


def small_disk(folder: Path | str, size: str) -> str:
    """Returns lines that give a process, and no other, a file system of `size` at `folder`: `before` of Running.

    Skips the test where that cannot be.
    """
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(["unshare", "--mount", *mount], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    return (
        "import ctypes, subprocess\n"
        "assert ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS\n"
        "subprocess.run(['mount', '--make-rprivate', '/'], check=True)\n"
        f"subprocess.run({mount}, check=True)\n"
    )


def children_of(process: int) -> list[int]:
    """Returns the ids of the processes that the one with the id `process` has started."""
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_for(what, timeout: float = 120):
    """Returns what `what()` does as soon as that is true."""
    limit = time.monotonic() + timeout
    while not (found := what()):
        assert time.monotonic() < limit, "it did not come"
        time.sleep(0.001)
    return found


def scalars(output_dir: Path, name: str, first: int = 1) -> list[float]:
    """Returns a TensorBoard scalar of every step from `first` on, in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(output_dir) / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars(name)
    assert [point.step for point in points] == list(range(first, first + len(points)))
    return [point.value for point in points]


def unet_weights(folder: Path) -> dict:
    """Returns the tensors of a saved UNet."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "diffusion_pytorch_model.safetensors")
