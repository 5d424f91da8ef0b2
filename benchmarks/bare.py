"""How long a step takes that does nothing else: a trainer's plugin and UNet, without data, logging and checkpoints.

    python -m benchmarks.bare train_dreambooth.py --max_train_steps 30 ...

runs a trainer with its flags up to its first step, takes the steps on one batch at hand, and prints the seconds of
each as JSON. `benchmarks.speed --bare` calls it to tell what all the rest of a trainer costs.
"""

from dreambooth.command_line.console import before_imports

before_imports(__name__)

import functools
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from dreambooth.command_line.console import UserError, is_rank_0, run_program
from dreambooth.processes.ranks import leave


class Stopwatch:
    """Stands where a trainer has its callbacks: notes when steps end, and ends the training after so many."""

    def __init__(self, steps: int):
        self.steps = steps
        self.on_gpu = torch.cuda.is_available()
        self.marks = [self._mark()]

    def _mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def on_step_end(self, step: int, **figures) -> bool:
        self.marks.append(self._mark())
        return step == self.steps

    def seconds(self) -> list[float]:
        """Returns the time of each step."""
        if not self.on_gpu:
            return [end - start for start, end in itertools.pairwise(self.marks)]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(self.marks)]


def bare_loss(inputs: tuple, model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Returns the squared error of a prediction of noise from `inputs`, which are the denoiser's."""
    return F.mse_loss(model(*inputs).float(), batch["noise"])


def train_bare(train: Callable, max_steps: int, *positional) -> None:
    """Stands where a trainer calls its `train`: the same loop, on one batch, with a loss that is one line."""
    *first, steps, loss_of, _, _ = positional
    batch = next(iter(steps))[0]
    known = loss_of.keywords
    inputs = batch["noise"].to(known["dtype"]), batch["timesteps"], batch["conditioning"]
    stopwatch = Stopwatch(max_steps)
    train(*first, itertools.repeat([batch]), functools.partial(bare_loss, inputs), stopwatch, 0)
    seconds = stopwatch.seconds()
    if is_rank_0():
        print(json.dumps(seconds), flush=True)
    leave()
    os._exit(0)  # nothing of this is to be saved


def main() -> None:
    script, *flags = sys.argv[1:] or [""]
    if not script.endswith(".py") or "--max_train_steps" not in flags:
        raise UserError("python -m benchmarks.bare SCRIPT FLAGS, as in train_dreambooth.py --max_train_steps 30 ...")
    trainer = importlib.import_module(Path(script).stem)
    max_steps = int(flags[flags.index("--max_train_steps") + 1])
    trainer.train = functools.partial(train_bare, trainer.train, max_steps)
    trainer.main(flags)


if __name__ == "__main__":
    run_program(main, os.path.basename(__file__))
