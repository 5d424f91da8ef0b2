"""One run of a trainer with one strategy, as a subprocess, and its figures."""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dreambooth.command_line.console import before_imports

before_imports(__name__)

import numpy as np
import torch
import transformers.utils.logging
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import random_model
from benchmarks.shares import Share


@dataclass(frozen=True)
class Strategy:
    """One way to run a trainer."""

    plugin: str
    placement: str
    precision: str
    switches: tuple[str, ...] = ()  # further flags, without the dashes; those with a value have it after a "="

    @property
    def script(self) -> str:
        return "train_dreambooth.py" if self.plugin == "traditional" else "train_dreambooth_colossalai.py"

    @property
    def may_be_refused(self) -> bool:
        """Whether this machine may lack what it needs; any other refusal is a failure."""
        if not torch.cuda.is_available():
            return self.plugin not in ("torch_ddp", "traditional") or self.precision == "fp16"
        return self.precision == "bf16" and torch.cuda.get_device_capability()[0] < 8

    @property
    def name(self) -> str:
        return "+".join([f"{self.plugin}-{self.placement}-{self.precision}", *self.switches])


# The first is what the others are compared with.
STRATEGIES = (
    Strategy("torch_ddp", "cuda", "no"),
    Strategy("torch_ddp", "cuda", "bf16"),
    Strategy("torch_ddp_fp16", "cuda", "fp16"),
    Strategy("low_level_zero", "cuda", "bf16"),
    Strategy("low_level_zero", "cuda", "fp16"),
    Strategy("low_level_zero", "cpu", "bf16"),
    Strategy("low_level_zero", "cpu", "fp16"),
    Strategy("gemini", "cuda", "bf16"),
    Strategy("gemini", "cuda", "fp16"),
    Strategy("gemini", "cpu", "bf16"),
    Strategy("gemini", "cpu", "fp16"),
    Strategy("gemini", "auto", "bf16"),
    Strategy("gemini", "auto", "fp16"),
    Strategy("traditional", "cuda", "no"),
    Strategy("traditional", "cuda", "bf16"),
    Strategy("traditional", "cuda", "fp16"),
)


def strategy_flags(strategy: Strategy) -> dict:
    """Returns the flags that choose a strategy."""
    flags = {"mixed_precision": strategy.precision} | dict.fromkeys(strategy.switches, True)
    if strategy.plugin != "traditional":
        flags |= {"plugin": strategy.plugin, "placement": strategy.placement}
    return flags


def make_photos(folder: Path, resolution: int) -> None:
    """Draws five pictures; a random model has no use for more."""
    folder.mkdir()
    pixels = np.random.default_rng(0)
    for number in range(5):
        coarse = Image.fromarray(pixels.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((resolution, resolution), Image.Resampling.BICUBIC).save(folder / f"{number}.png")


def build_parser(
    description: str, *, steps: int | None, learning_rate: float = 1e-4, limit: float = 300
) -> argparse.ArgumentParser:
    """Returns a parser with the flags that all benchmarks share, and these defaults; `steps` None is a run's own."""
    on_gpu = torch.cuda.is_available()
    shape, resolution = ("stable-diffusion-v1-4", 512) if on_gpu else ("tiny", 32)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(random_model.SHAPES), default=shape, help=f"(default: {shape})")
    parser.add_argument("--model", help="folder of a model to train instead (default: a random one of --shape)")
    parser.add_argument("--resolution", type=int, default=resolution, help=f"in pixels (default: {resolution})")
    parser.add_argument("--steps", type=int, default=steps, help=f"of each run (default: {steps or 'its own'})")
    parser.add_argument("--learning_rate", type=float, default=learning_rate, help=f"(default: {learning_rate:g})")
    parser.add_argument("--limit", type=float, default=limit, help=f"seconds that a run may take (default: {limit:g})")
    return parser


def side_by_side_flag(parser: argparse.ArgumentParser) -> None:
    """Adds a flag to the parser of a benchmark whose runs have few GPUs."""
    parser.add_argument(
        "--side_by_side",
        action="store_true",
        help="runs that leave GPUs of this machine free have others beside them, each with its part of the cores "
        "(default: one after another)",
    )


def in_a_folder(text: str) -> Path:
    """Returns the path of a file to write, as argparse's `type`; what is measured should not be lost at the end."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


@contextlib.contextmanager
def base_flags(args: argparse.Namespace) -> Iterator[dict]:
    """Builds the model and the photos in a temporary folder, and yields the flags that every run has."""
    disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model, photos = Path(args.model or Path(folder, "model")), Path(folder, "photos")
        if not args.model:
            random_model.build(model, args.shape)
        make_photos(photos, args.resolution)
        yield {
            "pretrained_model_name_or_path": model,
            "instance_data_dir": photos,
            "instance_prompt": "a photo of sks dog",
            "resolution": args.resolution,
            "max_train_steps": args.steps,
            "learning_rate": args.learning_rate,
            "seed": 1,
            "output_dir": Path(folder, "out"),
        }


def run_strategy(strategy: Strategy, share: Share, nproc: int, flags: dict, limit_s: float, *, load: bool) -> dict:
    """Trains once and removes the trained pipeline, which it has loaded before if `load` is true.

    Returns:
        The strategy, and with each step's figures "losses" and "seconds_per_step", and "peak_memory_gib" and
        "peak_host_memory_gib" of the first process; or "skipped" or "failed", with the reason.
    """
    figures = asdict(strategy) | {"gpus": nproc, "batch": flags["train_batch_size"]}
    with output_dir_of_its_own(flags) as flags:
        try:
            done = launch([strategy.script], nproc, share, flags | strategy_flags(strategy), limit_s)
        except subprocess.TimeoutExpired:
            return figures | {"failed": f"not finished after {limit_s:.0f} s"}
        refusal = [line for line in done.stderr.splitlines() if f"{strategy.script}: error: " in line]
        if done.returncode and refusal and strategy.may_be_refused:
            return figures | {"skipped": refusal[0].partition(": error: ")[2]}
        if done.returncode:
            return figures | {"failed": f"exit status {done.returncode}", "log": done.stdout + done.stderr}
        if load:
            DiffusionPipeline.from_pretrained(flags["output_dir"])
        return figures | figures_of(flags["output_dir"], flags["train_batch_size"] * nproc) | {"loaded": load}


def run_bare(strategy: Strategy, share: Share, nproc: int, flags: dict, limit_s: float) -> dict:
    """Takes steps that do nothing else, with benchmarks/bare.py.

    Returns:
        "bare_seconds_per_step" of the first process; or "bare_failed", with all that the run said.
    """
    with output_dir_of_its_own(flags) as flags:
        try:
            program = ["-m", "benchmarks.bare", strategy.script]
            done = launch(program, nproc, share, flags | strategy_flags(strategy), limit_s)
        except subprocess.TimeoutExpired:
            return {"bare_failed": f"not finished after {limit_s:.0f} s"}
        if done.returncode:
            return {"bare_failed": f"exit status {done.returncode}\n{done.stdout}{done.stderr}"}
        return {"bare_seconds_per_step": json.loads(done.stdout.splitlines()[-1])}


@contextlib.contextmanager
def output_dir_of_its_own(flags: dict) -> Iterator[dict]:
    """Yields flags with another output folder, beside theirs, which is removed afterwards."""
    with tempfile.TemporaryDirectory(dir=flags["output_dir"].parent) as folder:
        yield flags | {"output_dir": Path(folder, flags["output_dir"].name)}


def launch(program: list[str], nproc: int, share: Share, flags: dict, limit_s: float) -> subprocess.CompletedProcess:
    """Runs a program in so many processes, and returns what it said."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    launcher = [sys.executable]
    if nproc > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    return share.run([*launcher, *program, *words], limit_s)


def figures_of(output_dir: Path, images_per_step: int) -> dict:
    """Returns what a run has logged: each step's "losses" and "seconds_per_step", and its peaks of memory."""
    events = EventAccumulator(str(output_dir / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        "losses": [point.value for point in events.Scalars("loss")],
        "seconds_per_step": [images_per_step / point.value for point in events.Scalars("images_per_second")],
        "peak_memory_gib": events.Scalars("peak_memory_gib")[-1].value,
        "peak_host_memory_gib": events.Scalars("peak_host_memory_gib")[-1].value,
    }


def outcome(row: dict) -> str:
    """Returns what became of a run, in a line; with all that it said if it failed."""
    ran = "ran, output loads" if row.get("loaded") else "ran"
    found = next((f"{key}: {row[key]}" for key in ("skipped", "failed") if key in row), ran)
    if "bare_failed" in row:
        found += f"; its bare step failed: {row['bare_failed']}"
    return f"{row['plugin']}-{row['placement']}-{row['precision']}: {found}{row.get('log', '')}"
