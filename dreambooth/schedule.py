"""Integer arithmetic of samples, steps and epochs.

A step takes `total_batch` consecutive samples of one endless stream; each rank takes `batch` of them, in order.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """How many samples a run takes, and which rank takes which.

    Args:
        batch: samples per rank and step.
        world_size: number of ranks.
        steps: optimizer steps of the whole run.
    """

    batch: int
    world_size: int
    steps: int

    def __str__(self) -> str:
        return f"{self.steps} steps of {self.total_batch} samples ({self.world_size} ranks x {self.batch})"

    @property
    def total_batch(self) -> int:
        """Samples per step, over all ranks."""
        return self.batch * self.world_size

    def batches(self, rank: int, first_step: int = 0) -> Iterator[list[int]]:
        """Yields the sample numbers of each step for `rank`, from step `first_step` (counted from 0) on."""
        for step in range(first_step, self.steps):
            first = step * self.total_batch + rank * self.batch
            yield list(range(first, first + self.batch))


def plan(args: argparse.Namespace, world_size: int, images_per_epoch: int) -> Schedule:
    """Returns the schedule of a run; an epoch is one pass over the larger of the two sets of images."""
    steps = args.max_train_steps
    if steps is None:
        steps_per_epoch = -(-images_per_epoch // (args.train_batch_size * world_size))
        steps = args.num_train_epochs * steps_per_epoch
    return Schedule(batch=args.train_batch_size, world_size=world_size, steps=steps)
