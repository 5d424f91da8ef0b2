"""Trains on GPUs that are held to the size of smaller ones, with the strategies that the README names for them.

    python -m benchmarks.cards --output cards

writes a table to cards.md and all figures to cards.json. Each run is a whole command of a few steps, from loading to
the saved model, of a model of Stable Diffusion XL's shape with random weights at 1024 px. There is one for the
strategy that `benchmarks.memory` finds the fastest for each card, and a few others, some of them on two GPUs. Beside
what was taken of the card and of the host is what the estimate of a dry run has. A run that fails is told in its row,
and is the exit status.

Without a GPU the model is a tiny one and nothing is held, which shows that the benchmark works.
"""

from dreambooth.command_line.console import before_imports, run_program

before_imports(__name__)

import argparse
import functools
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import memory
from benchmarks.card_memory import CardMemory
from benchmarks.report import Report
from benchmarks.runs import (
    Strategy,
    base_flags,
    build_parser,
    figures_of,
    in_a_folder,
    launch,
    output_dir_of_its_own,
    side_by_side_flag,
    strategy_flags,
)
from benchmarks.shares import Job, Share, carry_out, shares
from dreambooth.command_line.console import UserError
from dreambooth.command_line.flags import LoraFlags
from dreambooth.command_line.limits import RANK_OF_ADAPTERS
from dreambooth.engine import strategy as engine
from dreambooth.model.outline import Outline
from dreambooth.model.precision import DTYPES
from dreambooth.run.estimate import GIB, Setup
from dreambooth.run.memory import CARDS, FITS, SEEN_OF_A_CARD, Machine, estimate_of

CHECKPOINTING, ADAPTERS = "gradient_checkpointing", f"lora_rank={RANK_OF_ADAPTERS}"
LOG_KEPT = 6000  # characters of what a failed run said
COLUMNS = (
    "strategy",
    "GPUs",
    "card GB",
    "s per step",
    "first step s",
    "whole command s",
    "reserved of the card GiB",
    "of it in tensors",
    "estimate",
    "reserved before the steps",
    "host GiB",
    "of its own",
    "estimate",
)


@dataclass(frozen=True)
class Run:
    """A run of the benchmark.

    Args:
        strategy: of the trainer.
        card: in GB, to which each GPU is held; 0 for the GPU as it is.
        gpus: how many.
        on_disk: whether it has --offload_dir.
    """

    strategy: Strategy
    card: int = 0
    gpus: int = 1
    on_disk: bool = False

    @property
    def name(self) -> str:
        """For --only."""
        parts = [self.strategy.name + "+offload_dir" * self.on_disk]
        return "-".join(parts + [f"{self.card}GB"] * (self.card > 0) + [f"x{self.gpus}"] * (self.gpus > 1))

    def setup(self, images: int) -> Setup:
        """Returns what the estimate goes by, of so many images a step."""
        how, switches = self.strategy, self.strategy.switches
        folder = "FOLDER" if self.on_disk else None
        strategy = engine.Strategy(how.plugin, how.placement, how.precision, float(how.placement != "cuda"), folder)
        held_to = int(self.card * GIB * SEEN_OF_A_CARD)
        return Setup(
            strategy,
            DTYPES[how.precision],
            batch=images,
            ranks=self.gpus,
            card=(held_to or torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else None,
            recomputes=CHECKPOINTING in switches,
            use_8bit_adam="use_8bit_adam" in switches,
            lora=LoraFlags(lora_rank=RANK_OF_ADAPTERS if ADAPTERS in switches else None),
        )


# What the table of cards does not have: everything on large cards, two GPUs, a disk in place of the host's memory, and
# adapters.
OTHERS = (
    Run(Strategy("torch_ddp", "cuda", "bf16", (CHECKPOINTING,))),
    Run(Strategy("low_level_zero", "cuda", "bf16", (CHECKPOINTING,))),
    Run(Strategy("low_level_zero", "cuda", "bf16", (CHECKPOINTING,)), gpus=2),
    Run(Strategy("gemini", "cuda", "bf16", (CHECKPOINTING,)), gpus=2),
    Run(Strategy("gemini", "cuda", "bf16", (CHECKPOINTING,)), card=24, gpus=2),
    Run(Strategy("gemini", "auto", "bf16", (CHECKPOINTING,)), card=16),
    Run(Strategy("gemini", "cpu", "bf16", (CHECKPOINTING,)), card=8, on_disk=True),
    Run(Strategy("low_level_zero", "cpu", "fp16", (CHECKPOINTING,)), card=16, gpus=2),  # as two T4
    Run(Strategy("torch_ddp", "cuda", "bf16", (CHECKPOINTING, ADAPTERS))),
)


def named_for_cards(outline: Outline, images: int) -> Iterator[Run]:
    """Yields the strategy that is the fastest on each card, as the README's table of cards has it."""
    for card in CARDS:
        machine = Machine(card=int(card * GIB * SEEN_OF_A_CARD))
        for setup, estimate in memory.rows(outline, images, card):
            if machine.verdict(estimate) == FITS:
                switches = [CHECKPOINTING] * setup.recomputes + ["use_8bit_adam"] * setup.use_8bit_adam
                yield Run(Strategy(setup.strategy.plugin, setup.strategy.placement, "bf16", tuple(switches)), card)
                break


def measure(report: Report, run: Run, outline: Outline, flags: dict, args: argparse.Namespace, share: Share) -> None:
    """Adds a run to the report."""
    estimate = estimate_of(outline, run.setup(flags["train_batch_size"]))
    row = asdict(run.strategy) | {"name": run.name, "card": run.card, "gpus": run.gpus, "on_disk": run.on_disk}
    row |= {"machine": platform.node(), "estimate_host_gib": estimate.host.bytes / GIB}
    row |= {"estimate_gib": estimate.card and estimate.card.bytes / GIB}
    if run.on_disk:
        flags = flags | {"offload_dir": args.offload_dir or flags["output_dir"].parent}
    with output_dir_of_its_own(flags) as flags:
        row |= _measured(run, flags, args.limit, share)
    report.note(
        row, f"{run.name}: {row.get('failed') or row.get('skipped') or 'trained and saved'}{row.get('log', '')}"
    )


def _measured(run: Run, flags: dict, limit_s: float, share: Share) -> dict:
    program = ["-m", "benchmarks.held", str(run.card), run.strategy.script]
    started = time.perf_counter()
    try:
        with CardMemory(share.gpus) as used:
            done = launch(program, run.gpus, share, flags | strategy_flags(run.strategy), limit_s)
            whole_s = time.perf_counter() - started
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished after {limit_s:.0f} s"}
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if ": error: " in line]
        reason = errors[0].partition(": error: ")[2] if errors else f"exit status {done.returncode}"
        if errors and run.strategy.may_be_refused:
            return {"skipped": reason}
        return {"failed": reason, "log": "\n" + (done.stdout + done.stderr)[-LOG_KEPT:]}
    told = json.loads(done.stdout.splitlines()[-1])
    figures = figures_of(flags["output_dir"], flags["train_batch_size"] * run.gpus)
    return figures | told | {"whole_s": whole_s, "peak_gib": used.peak_gib}


def table(rows: list[dict]) -> str:
    """Returns the rows as Markdown; the time of a step is the median of the second half."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        words = [f"`{row['plugin']} {row['placement']}`", *(f"`--{one}`" for one in row["switches"])]
        words += ["`--offload_dir`"] * row["on_disk"] + ["fp16"] * (row["precision"] == "fp16")
        cells = [", ".join(words), str(row["gpus"]), str(row["card"] or "whole")]
        if why := row.get("failed") or row.get("skipped"):
            cells += [f"{'failed' if 'failed' in row else 'skipped'}: {why}".replace("|", "/")]
            cells += ["–"] * (len(COLUMNS) - len(cells))
        else:
            steps = row["seconds_per_step"]
            seconds = [f"{statistics.median(steps[len(steps) // 2 :]):.3f}", f"{steps[0]:.1f}"]
            names = ("whole_s", "reserved_gib", "in_tensors_gib", "estimate_gib", "before_steps_gib")
            names += ("peak_host_memory_gib", "own_host_gib", "estimate_host_gib")
            cells += seconds + [f"{row[name]:.1f}" if row.get(name) else "–" for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parsed() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Returns what was typed, and the parser, for what is wrong with it only later."""
    parser = build_parser(__doc__, steps=5, limit=600)
    on_gpu = torch.cuda.is_available()
    parser.set_defaults(shape="stable-diffusion-xl" if on_gpu else "tiny-xl", resolution=1024 if on_gpu else 32)
    parser.add_argument("--batch", type=int, default=1, help="images of each GPU in a step (default: 1)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of runs; `list` prints them (default: all)")
    parser.add_argument(
        "--offload_dir", help="where runs with files on a disk have them (default: a temporary folder)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the runs of an earlier OUTPUT.json and add those that it lacks (default: off)",
    )
    side_by_side_flag(parser)
    parser.add_argument("--output", type=in_a_folder, default=Path("cards"), help="files to write, without suffix")
    args = parser.parse_args()
    if args.model:
        parser.error("--model: the runs are those that suit a --shape")
    return args, parser


def main() -> None:
    args, parser = parsed()
    outline = memory.outline(args.shape, args.resolution)
    runs = {run.name: run for run in (*named_for_cards(outline, args.batch), *OTHERS)}
    if args.only == ["list"]:
        print("\n".join(runs))
        return
    unknown = [name for name in args.only or () if name not in runs]
    if unknown:
        parser.error(f"--only: there is no {unknown[0]}, but {', '.join(runs)}")
    parts = shares()
    chosen = [runs[name] for name in args.only or runs]
    possible = [run for run in chosen if run.gpus <= len(parts) or not parts[0].gpus]
    if not possible:
        raise UserError(f"--only: {', '.join(run.name for run in chosen)} want more GPUs than there are")
    device = torch.cuda.get_device_name() if parts[0].gpus else platform.processor() or platform.machine()
    facts = {
        "title": f"{device}, torch {torch.__version__}, {args.resolution} px",
        "settings": {name: getattr(args, name) for name in ("shape", "batch", "steps")},
        "command": shlex.join(sys.orig_argv[1:]),
        "rows": [],
    }
    report = Report(args.output, facts, [{"name": run.name} for run in possible], lambda found: table(found["rows"]))
    report.begin(parser, resume=args.resume)
    with base_flags(args) as flags:
        flags["train_batch_size"] = args.batch
        jobs = [
            Job(run.gpus, functools.partial(measure, report, run, outline, flags, args))
            for run in possible
            if not report.find({"name": run.name})
        ]
        carry_out(jobs, parts, side_by_side=args.side_by_side)
    print(table(report.rows))
    for run in chosen:
        if run not in possible:
            print(f"{run.name} needs {run.gpus} GPUs")
    if any("failed" in row for row in report.rows):
        sys.exit(1)


if __name__ == "__main__":
    run_program(main, Path(__file__).name)  # which cleans up after Ctrl-C
