"""Runs the trainers with every plugin, placement and precision on the GPUs of this machine, and compares them.

    python -m benchmarks.strategies --nproc 2 --train_batch_size 8 --json strategies.json

The model has the shape of Stable Diffusion 1.4 and random weights. Every run takes the same steps on the same samples;
the table tells how far its losses are from those of fp32, how long a step takes and how much memory it needs. Each
trained pipeline is loaded once.

Without a GPU the model is a tiny one. Strategies that the trainer refuses on this machine are listed as skipped, with
its reason; any other failure is the exit status.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from dreambooth.console import quiet_libraries

quiet_libraries()  # before the imports that warn

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import random_model

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Strategy:
    """One way to run a trainer."""

    plugin: str
    placement: str
    precision: str

    @property
    def script(self) -> str:
        return "train_dreambooth.py" if self.plugin == "traditional" else "train_dreambooth_colossalai.py"

    @property
    def may_be_refused(self) -> bool:
        """Whether this machine may lack what it needs; any other refusal is a failure."""
        if not torch.cuda.is_available():
            return self.plugin not in ("torch_ddp", "traditional") or self.precision == "fp16"
        compiles = self.plugin == "gemini" or self.placement == "cpu"
        return compiles or (self.precision == "bf16" and torch.cuda.get_device_capability()[0] < 8)

    @property
    def name(self) -> str:
        return f"{self.plugin}-{self.placement}-{self.precision}"


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
    if strategy.plugin == "traditional":
        return {"mixed_precision": strategy.precision}
    return {"plugin": strategy.plugin, "placement": strategy.placement, "mixed_precision": strategy.precision}


def make_photos(folder: Path, resolution: int) -> None:
    """Draws five pictures; a random model has no use for more."""
    folder.mkdir()
    pixels = np.random.default_rng(0)
    for number in range(5):
        coarse = Image.fromarray(pixels.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((resolution, resolution), Image.Resampling.BICUBIC).save(folder / f"{number}.png")


def run_strategy(strategy: Strategy, nproc: int, flags: dict, limit_s: float) -> dict:
    """Trains once and returns the figures of the run, or what went wrong."""
    output_dir = Path(flags["output_dir"])
    words = [word for name, value in (flags | strategy_flags(strategy)).items() for word in (f"--{name}", str(value))]
    launcher = [sys.executable]
    if nproc > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    figures = asdict(strategy) | {"gpus": nproc, "batch": flags["train_batch_size"]}
    try:
        done = subprocess.run(
            [*launcher, strategy.script, *words], cwd=ROOT, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return figures | {"failed": f"not finished after {limit_s:.0f} s"}
    refusal = [line for line in done.stderr.splitlines() if f"{strategy.script}: error: " in line]
    if done.returncode and refusal and strategy.may_be_refused:
        return figures | {"skipped": refusal[0].partition(": error: ")[2]}
    if done.returncode:
        return figures | {"failed": f"exit status {done.returncode}", "log": done.stdout + done.stderr}

    events = EventAccumulator(str(output_dir / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    losses = [point.value for point in events.Scalars("loss")]
    images_per_step = flags["train_batch_size"] * nproc
    seconds = [images_per_step / point.value for point in events.Scalars("images_per_second")]
    StableDiffusionPipeline.from_pretrained(output_dir)
    return figures | {
        "losses": losses,
        "seconds_per_step": seconds,
        "median_seconds_per_step": statistics.median(seconds[len(seconds) // 2 :]),
        "peak_memory_gib": events.Scalars("peak_memory_gib")[-1].value,
    }


def table(rows: list[dict]) -> str:
    """Returns the figures as Markdown; the first row is the one that losses are compared with."""
    lines = [
        "| plugin | placement | precision | GPUs | batch per GPU | largest loss difference | s per step | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['plugin']} | {row['placement']} | {row['precision']} | {row['gpus']} | {row['batch']} |"
        if "losses" not in row:
            lines.append(f"{start} – | – | – |")
            continue
        difference = "–"
        if "losses" in rows[0]:
            pairs = zip(row["losses"], rows[0]["losses"], strict=True)
            difference = f"{max(abs(loss - reference) for loss, reference in pairs):.1e}"
        lines.append(f"{start} {difference} | {row['median_seconds_per_step']:.3f} | {row['peak_memory_gib']:.1f} |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    shape, resolution, batch = ("stable-diffusion-v1-4", 512, 8) if on_gpu else ("tiny", 32, 2)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=max(torch.cuda.device_count(), 1), help="GPUs (default: all)")
    parser.add_argument("--shape", choices=tuple(random_model.SHAPES), default=shape, help=f"(default: {shape})")
    parser.add_argument("--model", help="folder of a model to train instead (default: a random one of --shape)")
    parser.add_argument("--resolution", type=int, default=resolution, help=f"in pixels (default: {resolution})")
    parser.add_argument("--train_batch_size", type=int, default=batch, help=f"per GPU (default: {batch})")
    parser.add_argument("--steps", type=int, default=10, help="of each run; the second half is timed (default: 10)")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="high enough to move a loss (default: 1e-4)")
    parser.add_argument("--only", nargs="*", help="names of strategies, such as gemini-cuda-bf16 (default: all)")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a run may take (default: 300)")
    parser.add_argument("--json", help="file for all the figures (default: none)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model, photos, output_dir = Path(folder, "model"), Path(folder, "photos"), Path(folder, "out")
        if args.model:
            model = Path(args.model)
        else:
            random_model.build(model, args.shape)
        make_photos(photos, args.resolution)
        flags = {
            "pretrained_model_name_or_path": model,
            "instance_data_dir": photos,
            "instance_prompt": "a photo of sks dog",
            "resolution": args.resolution,
            "train_batch_size": args.train_batch_size,
            "max_train_steps": args.steps,
            "learning_rate": args.learning_rate,
            "seed": 1,
            "output_dir": output_dir,
        }
        for strategy in STRATEGIES:
            if args.only and strategy.name not in args.only:
                continue
            row = run_strategy(strategy, args.nproc, flags, args.limit)
            shutil.rmtree(output_dir, ignore_errors=True)
            rows.append(row)
            outcome = next((f"{key}: {row[key]}" for key in ("skipped", "failed") if key in row), "ran, output loads")
            print(f"{strategy.name}: {outcome}", row.get("log", ""), flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(rows, indent=1))
    print(table(rows))
    if any("failed" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
