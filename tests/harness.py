"""Running the real scripts as a user does, and reading what they leave behind."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
COLOSSALAI = "train_dreambooth_colossalai.py"
TRADITIONAL = "train_dreambooth.py"
SHARED_DATA = ROOT.parent / "shared" / "data"


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
    if check and returncode:
        raise AssertionError(f"exit status {returncode}\n{stdout}\n{stderr}")
    return Run(returncode, stdout, stderr, time.monotonic() - started)


@functools.cache
def zygote() -> subprocess.Popen:
    """Returns the process that runs scripts without importing the libraries anew (zygote.py); on the CPU."""
    return subprocess.Popen(
        [sys.executable, "tests/zygote.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TQDM_MININTERVAL": "0.1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


class Running:
    """A run of `python script argv` in a fork of the zygote, or several processes of it as torchrun would start them.

    One at a time; one that a failed test has left is ended.
    """

    unfinished: list["Running"] = []

    def __init__(self, script: str, argv: list[str], nproc: int = 1, env: dict | None = None):
        for left in list(self.unfinished):
            left.send(signal.SIGKILL)
            left.wait(check=False)
        self.started = time.monotonic()
        self.folder = tempfile.TemporaryDirectory()
        self.stdout, self.stderr = Path(self.folder.name, "stdout"), Path(self.folder.name, "stderr")
        self.stderr.touch()
        order = {"script": script, "argv": argv, "env": env or {}, "nproc": nproc}
        order |= {"stdout": str(self.stdout), "stderr": str(self.stderr)}
        print(json.dumps(order), file=zygote().stdin, flush=True)
        self.pids = json.loads(zygote().stdout.readline())
        self.unfinished.append(self)

    def send(self, number: int, rank: int | None = None) -> None:
        """Sends a signal to a rank, or to all."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, *, check: bool = True, timeout: float = 300) -> Run:
        killer = threading.Timer(timeout, self.send, [signal.SIGKILL])
        killer.start()
        returncode = int(zygote().stdout.readline())
        self.unfinished.remove(self)
        killer.cancel()
        with self.folder:
            return finish(returncode, self.stdout.read_text(), self.stderr.read_text(), self.started, check)


def train(script: str, flags: dict, *, nproc: int = 1, torchrun: bool = False, on_gpu: bool = False, **options) -> Run:
    """Runs a trainer, on the CPU unless `on_gpu`; several processes through torchrun itself there, or if asked to."""
    # huggingface_hub reads its variables when it is imported; scripts of a test's own may be about torchrun's.
    ours = script in (COLOSSALAI, TRADITIONAL)
    fresh = "env" in options and not (ours and not any(name.startswith("HF_") for name in options["env"]))
    if not (torchrun or on_gpu or fresh):
        return Running(script, command_line(flags), nproc, options.pop("env", None)).wait(**options)
    launcher = [sys.executable]
    if nproc > 1 or torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", nproc]
    env = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return run([*launcher, script, *command_line(flags)], env=env | options.pop("env", {}), **options)


def start_torchrun(
    script: str, flags: dict, log: Path, *options: str, on_gpu: bool = False, before: tuple[str, ...] = ()
) -> subprocess.Popen:
    """Starts two processes of a trainer with torchrun and further options of it; the output goes to `log`.

    `before` are words that go before the command.
    """
    command = [
        *before,
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *options,
    ]
    return subprocess.Popen(
        [*command, script, *command_line(flags)],
        cwd=ROOT,
        env=os.environ | {"TQDM_MININTERVAL": "0.1"} | ({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}),
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
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
    events = EventAccumulator(str(Path(output_dir) / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars(name)
    assert [point.step for point in points] == list(range(first, first + len(points)))
    return [point.value for point in points]


def unet_weights(folder: Path) -> dict:
    """Returns the tensors of a saved UNet."""
    return load_file(Path(folder) / "diffusion_pytorch_model.safetensors")
