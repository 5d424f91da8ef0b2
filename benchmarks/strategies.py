"""Runs the trainers with every plugin, placement and precision on the GPUs of this machine, and compares them.

    python -m benchmarks.strategies --nproc 2 --train_batch_size 8 --json strategies.json

The model has the shape of Stable Diffusion 1.4 and random weights. Every run takes the same steps on the same samples;
the table tells how far its losses are from those of fp32, how long a step takes and how much memory it needs. Each
trained pipeline is loaded once.

Without a GPU the model is a tiny one. Strategies that the trainer refuses on this machine are listed as skipped, with
its reason; any other failure is the exit status.
"""

import json
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.runs import STRATEGIES, base_flags, build_parser, outcome, run_strategy
from benchmarks.shares import joined, shares


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
        seconds = statistics.median(row["seconds_per_step"][len(row["seconds_per_step"]) // 2 :])
        lines.append(f"{start} {difference} | {seconds:.3f} | {row['peak_memory_gib']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    batch = 8 if torch.cuda.is_available() else 2
    parser = build_parser(__doc__, steps=10)
    parser.add_argument("--nproc", type=int, default=max(torch.cuda.device_count(), 1), help="GPUs (default: all)")
    parser.add_argument("--train_batch_size", type=int, default=batch, help=f"per GPU (default: {batch})")
    parser.add_argument("--only", nargs="*", help="names of strategies, such as gemini-cuda-bf16 (default: all)")
    parser.add_argument("--json", help="file for all the figures (default: none)")
    args = parser.parse_args()
    known = [strategy.name for strategy in STRATEGIES]
    if unknown := [name for name in args.only or () if name not in known]:
        parser.error(f"--only: there is no {unknown[0]}, but {', '.join(known)}")
    if args.json and Path(args.json).exists():
        parser.error(f"--json: {args.json} is there: name another file")
    rows, share = [], joined(shares()[: args.nproc])
    with base_flags(args) as flags:
        for strategy in STRATEGIES:
            if args.only and strategy.name not in args.only:
                continue
            flags["train_batch_size"] = args.train_batch_size
            rows.append(run_strategy(strategy, share, args.nproc, flags, args.limit, load=True))
            print(outcome(rows[-1]), flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(rows, indent=1))
    print(table(rows))
    if any("failed" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
