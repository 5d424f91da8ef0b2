"""Integer arithmetic of samples, steps and epochs.

A step takes `total_batch` consecutive samples of one endless stream; each rank takes an equal share of them, in order,
in `accumulation` batches, between which no weight changes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dreambooth.command_line.console import counted
from dreambooth.command_line.flags import TrainingFlags


@dataclass(frozen=True)
class Schedule:
    """How many samples a run takes, and which rank takes which.

    Args:
        batch: samples that a rank takes at a time.
        world_size: number of ranks.
        steps: optimizer steps of the whole run.
        accumulation: batches of a rank in each step.
    """

    batch: int
    world_size: int
    steps: int
    accumulation: int = 1

    def __str__(self) -> str:
        times = f" x {self.accumulation}" if self.accumulation > 1 else ""
        steps, samples = counted(self.steps, "step"), counted(self.total_batch, "sample")
        return f"{steps} of {samples} ({counted(self.world_size, 'rank')} x {self.batch}{times})"

    @property
    def total_batch(self) -> int:
        """Samples per step, over all ranks."""
        return self.batch * self.accumulation * self.world_size

    def samples(self, first_step: int = 0) -> range:
        """Returns the numbers of all ranks' samples, from step `first_step` (counted from 0) on."""
        return range(first_step * self.total_batch, self.steps * self.total_batch)

    def batches(self, rank: int, first_step: int = 0) -> Iterator[list[int]]:
        """Yields the sample numbers of each of `rank`'s batches, from step `first_step` (counted from 0) on."""
        share = self.total_batch // self.world_size
        for step in range(first_step, self.steps):
            first = step * self.total_batch + rank * share
            for start in range(first, first + share, self.batch):
                yield list(range(start, start + self.batch))


def plan(flags: TrainingFlags, world_size: int, images_per_epoch: int) -> Schedule:
    """Returns the schedule of a run; an epoch is one pass over the larger of the two sets of images."""
    steps = flags.max_train_steps
    if steps is None:
        samples_per_step = flags.train_batch_size * flags.gradient_accumulation_steps * world_size
        steps = flags.num_train_epochs * -(-images_per_epoch // samples_per_step)
    return Schedule(flags.train_batch_size, world_size, steps, flags.gradient_accumulation_steps)
