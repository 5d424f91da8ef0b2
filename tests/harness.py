"""Running the real scripts as a user does, and reading what they leave behind."""

import os
import subprocess
import sys
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
    result = Run(done.returncode, done.stdout, done.stderr, time.monotonic() - started)
    if check and done.returncode:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return result


def train(script: str, flags: dict, *, nproc: int = 1, on_gpu: bool = False, **options) -> Run:
    """Runs a trainer: plain python for one process, torchrun for more; on the CPU unless `on_gpu`."""
    launcher = [sys.executable]
    if nproc > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", nproc]
    env = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return run([*launcher, script, *command_line(flags)], env=env | options.pop("env", {}), **options)


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
