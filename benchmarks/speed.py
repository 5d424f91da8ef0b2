"""Measures how fast the trainers are and how much memory they take, on the GPUs of this machine.

    python -m benchmarks.speed --output speed

writes a table to speed.md, all figures to speed.json and a bar chart to speed.png. The real trainers run, on a model
of Stable Diffusion 1.4's shape with random weights at 512 px. Each row is compared with the traditional process on one
GPU in fp32, without the latent cache and CUDA graphs, with the same batch, measured in the same run, or in the one
that it resumes.

Without a GPU the model is a tiny one, which shows that the benchmark works, and nothing about speed.
"""

from dreambooth.command_line.console import before_imports, run_program

before_imports(__name__)

import argparse
import functools
import itertools
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import matplotlib
import torch
from diffusers import UNet2DConditionModel
from matplotlib import pyplot
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import Report
from benchmarks.runs import (
    STRATEGIES,
    Strategy,
    base_flags,
    build_parser,
    in_a_folder,
    outcome,
    run_bare,
    run_strategy,
    side_by_side_flag,
)
from benchmarks.shares import Job, Share, carry_out, shares
from dreambooth.model.stable_diffusion_xl import TIME_IDS

BASELINE = Strategy("traditional", "cuda", "no")
# What runs unless --strategies says otherwise.
DEFAULT = (
    "traditional-cuda-bf16",
    "torch_ddp-cuda-bf16",
    "low_level_zero-cuda-bf16",
    "gemini-cuda-bf16",
    "gemini-auto-bf16",
    "low_level_zero-cpu-bf16",
    "gemini-cpu-bf16",
)
COLUMNS = (
    "strategy",
    "GPUs",
    "batch per GPU",
    "peak GPU GiB",
    "peak host GiB",
    "s per step",
    "spread",
    "images/s per GPU",
    "speed-up",
    "of matrix rate",
    "over bare step",
)


def strategy_named(wanted: str, parser: argparse.ArgumentParser) -> Strategy:
    """Returns the strategy of a name such as torch_ddp-cuda-bf16+compile+gradient_checkpointing."""
    first, *switches = wanted.split("+")
    by_name = {strategy.name: strategy for strategy in STRATEGIES}
    if first not in by_name:
        parser.error(f"unknown strategy {first!r}; there are {', '.join(by_name)}")
    return replace(by_name[first], switches=tuple(switches))


def plan(strategies: list[Strategy], gpus: list[int], batches: list[int]) -> Iterator[tuple[Strategy, int, int, bool]]:
    """Yields the strategy, GPUs and batch of each row, and whether others are compared with it; those come first."""
    yield from ((BASELINE, 1, batch, True) for batch in batches)
    for batch, strategy in itertools.product(batches, strategies):
        for count in [1] if strategy.plugin == "traditional" else gpus:
            yield strategy, count, batch, False


def matrix_rate() -> float | None:
    """Returns the floating-point operations per second of a large bf16 matrix product on the GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    started, times = time.perf_counter(), 20
    for _ in range(times):
        a @ b
    torch.cuda.synchronize()
    return times * 2 * 8192**3 / (time.perf_counter() - started)


def operations_per_image(model: Path, resolution: int) -> int:
    """Returns the floating-point operations of the UNet's matrix products, forward and backward, for one image."""
    config = UNet2DConditionModel.load_config(model / "unet")
    vae = json.loads((model / "vae" / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer" / "tokenizer_config.json").read_text())
    side = resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet = UNet2DConditionModel.from_config(config)
        latents = torch.empty(1, unet.config.in_channels, side, side)
        text = torch.empty(1, tokenizer["model_max_length"], unet.config.cross_attention_dim)
        added = None
        if unet.config.addition_embed_type == "text_time":  # of Stable Diffusion XL
            numbers = TIME_IDS * unet.config.addition_time_embed_dim
            pooled = torch.empty(1, unet.config.projection_class_embeddings_input_dim - numbers)
            added = {"text_embeds": pooled, "time_ids": torch.empty(1, TIME_IDS)}
        unet(latents, torch.empty(1), text, added_cond_kwargs=added).sample.sum().backward()
    return counter.get_total_flops()


def summarize(rows: list[dict], warm_up: int, operations: int, rate: float | None) -> None:
    """Adds the columns of the table to the rows that have figures."""
    measured = [row for row in rows if "seconds_per_step" in row]
    baseline = {
        row["batch"]: statistics.median(row["seconds_per_step"][warm_up:]) for row in measured if row["baseline"]
    }
    for row in measured:
        seconds = row["seconds_per_step"][warm_up:]
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        row["median_seconds_per_step"] = median
        row["quartiles"] = [low, high]
        row["images_per_second_per_gpu"] = row["batch"] / median
        row["speed_up"] = baseline[row["batch"]] / median if row["batch"] in baseline else None
        row["of_matrix_rate"] = operations * row["batch"] / median / rate if rate else None
        bare = row.get("bare_seconds_per_step", [])[warm_up:]
        row["over_bare_step"] = median / statistics.median(bare) - 1 if bare else None


def name(row: dict) -> str:
    """Returns what the table calls a strategy."""
    if row["baseline"]:
        return "traditional, fp32, no cache"
    where = [] if row["plugin"] == "traditional" else [row["placement"]]
    return ", ".join([row["plugin"], *where, row["precision"], *row["switches"]])


def table(rows: list[dict], rate: float | None) -> str:
    """Returns the rows as Markdown; the spread is that between the quartiles, `rate` None where there is no GPU."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [name(row), str(row["gpus"]), str(row["batch"])]
        if "median_seconds_per_step" in row:
            low, high = row["quartiles"]
            cells += [
                f"{row['peak_memory_gib']:.1f}" if rate else "–",
                f"{row['peak_host_memory_gib']:.1f}",
                f"{row['median_seconds_per_step']:.3f}",
                f"{low:.3f}–{high:.3f}",
                f"{row['images_per_second_per_gpu']:.1f}",
                f"{row['speed_up']:.2f}" if row["speed_up"] else "–",
                f"{row['of_matrix_rate']:.0%}" if row["of_matrix_rate"] else "–",
                f"{row['over_bare_step']:+.1%}" if row["over_bare_step"] is not None else "–",
            ]
        else:
            cells += ["skipped" if "skipped" in row else "failed"] + ["–"] * (len(COLUMNS) - 4)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], title: str, path: Path, *, on_gpus: bool) -> None:
    """Writes a bar chart of images per second and of memory."""
    shown = [row for row in rows if "median_seconds_per_step" in row][::-1]
    labels = [f"{name(row)}\n{row['gpus']} x batch {row['batch']}" for row in shown]
    matplotlib.use("Agg")
    figure, (speed, memory) = pyplot.subplots(1, 2, sharey=True, figsize=(11, 1.2 + 0.5 * len(shown)))
    for axes, key, label in (
        (speed, "images_per_second_per_gpu", "images per second and GPU"),
        (memory, "peak_memory_gib", f"peak {'GPU' if on_gpus else 'host'} memory, GiB"),
    ):
        colours = ["tab:gray" if row["plugin"] == "traditional" else "tab:blue" for row in shown]
        bars = axes.barh(labels, [row[key] for row in shown], color=colours)
        axes.bar_label(bars, fmt="%.1f", padding=2)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12, y=0.02)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parsed() -> tuple[argparse.Namespace, list[Strategy], argparse.ArgumentParser]:
    """Returns what was typed, the strategies that it names, and the parser, for what is wrong with it only later."""
    found = torch.cuda.device_count()
    batches = [8, 16] if found else [2]
    parser = build_parser(__doc__, steps=30)
    # torch's DDP waits for the GPU in its first ten steps, to take the times of its communication.
    parser.add_argument("--warm_up", type=int, default=12, help="steps that are not timed (default: 12)")
    parser.add_argument("--batches", type=int, nargs="+", default=batches, help=f"per GPU (default: {batches})")
    parser.add_argument(
        "--gpus",
        type=int,
        nargs="+",
        default=sorted({1, found or 1}),
        help="numbers of GPUs to run on; the traditional process runs on one (default: 1 and all)",
    )
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=DEFAULT,
        help="with switches of the trainers after a +, as in torch_ddp-cuda-bf16+compile "
        f"(default: {' '.join(DEFAULT)})",
    )
    parser.add_argument(
        "--bare",
        action="store_true",
        help="also take the same steps in a bare loop: what do logging and reading the cache cost? (default: off)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows of an earlier run's OUTPUT.json and add those that it lacks (default: off)",
    )
    side_by_side_flag(parser)
    parser.add_argument("--output", type=in_a_folder, default=Path("speed"), help="files to write, without suffix")
    args = parser.parse_args()
    strategies = [strategy_named(wanted, parser) for wanted in args.strategies]
    if found and max(args.gpus) > found:
        parser.error(f"--gpus {max(args.gpus)} is more than the {found} that are here")
    if args.steps < args.warm_up + 2:
        parser.error(f"--steps {args.steps} leaves less than two steps after --warm_up {args.warm_up}")
    return args, strategies, parser


def main() -> None:
    args, strategies, parser = parsed()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    facts = {
        "title": f"{device}, torch {torch.__version__}, {args.resolution} px",
        "settings": {name: getattr(args, name) for name in ("steps", "warm_up", "learning_rate")}
        | {"model": Path(args.model or args.shape).name},
        "matrix_rate": matrix_rate(),
        "rows": [],
    }
    planned = [
        asdict(strategy) | {"gpus": gpus, "batch": batch, "baseline": is_baseline}
        for strategy, gpus, batch, is_baseline in plan(strategies, args.gpus, args.batches)
    ]

    def summarized(facts: dict) -> str:
        summarize(facts["rows"], args.warm_up, facts["operations_per_image"], facts["matrix_rate"])
        return table(facts["rows"], facts["matrix_rate"])

    report = Report(args.output, facts, planned, summarized, chart=args.output.with_suffix(".png"))
    report.begin(parser, resume=args.resume)
    with base_flags(args) as flags:
        facts["operations_per_image"] = operations_per_image(flags["pretrained_model_name_or_path"], args.resolution)
        jobs = [Job(one["gpus"], functools.partial(measure, report, one, flags, args)) for one in planned]
        carry_out(jobs, shares(), side_by_side=args.side_by_side)
    draw(report.rows, facts["title"], report.chart, on_gpus=facts["matrix_rate"] is not None)
    print(summarized(facts))
    if any("failed" in row or "bare_failed" in row for row in report.rows):
        sys.exit(1)


def measure(report: Report, known_by: dict, flags: dict, args: argparse.Namespace, share: Share) -> None:
    """Adds a row of the plan to the report, or what it lacks."""
    strategy = Strategy(**{one.name: known_by[one.name] for one in fields(Strategy)})
    gpus, batch, is_baseline = (known_by[name] for name in ("gpus", "batch", "baseline"))
    flags = flags | {"train_batch_size": batch, "cache_latents": "on"}
    if is_baseline:
        flags |= {"cache_latents": "off", "cuda_graphs": "off"}
    row = report.find(known_by)
    if row is None:
        row = run_strategy(strategy, share, gpus, flags, args.limit, load=False) | {"baseline": is_baseline}
        # A file that --resume goes on with may have rows of several commands and machines.
        row |= {"machine": platform.node(), "command": shlex.join(sys.orig_argv[1:])}
    if args.bare and "losses" in row and not is_baseline and "bare_seconds_per_step" not in row:
        row |= run_bare(strategy, share, gpus, flags, args.limit)
    report.note(row, f"{gpus} x {batch}: {outcome(row)}")


if __name__ == "__main__":
    run_program(main, Path(__file__).name)  # which cleans up after Ctrl-C
