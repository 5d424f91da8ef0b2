"""What happens after a step besides the next one: figures, checkpoints, validation images, an early end."""

import functools
import time
from collections.abc import Callable

import torch

from dreambooth.command_line.flags import OutputFlags, ValidationFlags
from dreambooth.engine.state import Training
from dreambooth.processes.ranks import Ranks, from_rank_0, meet, stop_early
from dreambooth.run.checkpoint import save_checkpoint
from dreambooth.run.room import Sizes, has_room_to_spare
from dreambooth.run.tracker import Tracker
from dreambooth.run.validation import is_due

DRY_RUN_STEPS = 2  # the first one warms up


class Callbacks:
    """Does what is due after a step: checkpoint, validation images, an early end.

    Args:
        output, validation: the flags, which say what is due when.
        settings: of the run, for its checkpoints.
        training: what checkpoints are made of.
        ranks: of the run.
        tracker: that shows the figures, and knows when to stop.
        validate: draws the validation images after `step`, its one argument.
        sizes: of what the run writes.
        dry_run: whether nothing is written, and the run is at its end after a few steps.
    """

    def __init__(
        self,
        output: OutputFlags,
        validation: ValidationFlags,
        settings: dict,
        training: Training,
        ranks: Ranks,
        tracker: Tracker,
        validate: Callable[..., None],
        *,
        sizes: Sizes,
        dry_run: bool,
    ):
        self.output = output
        self.validation = validation
        self.settings = settings
        self.training = training
        self.ranks = ranks
        self.tracker = tracker
        self.validate = validate
        self.sizes = sizes
        self.dry_run = dry_run
        self.steps_seen = 0

    def on_step_end(self, step: int, *, loss: torch.Tensor, lr: float, grad_norm: torch.Tensor | float | None) -> bool:
        """Does what is due after `step`, whose figures are those of `Tracker.step`; to be called on every rank.

        Returns:
            Whether a dry run is at its end.

        Raises:
            RunError: if figures are not finite, or something cannot be written.
            Stopped: after a checkpoint, if a signal has asked for it.
        """
        steps = self.tracker.schedule.steps
        stop, save = self.tracker.step(step, loss=loss, lr=lr, grad_norm=grad_norm)
        self.steps_seen += 1
        if self.dry_run:
            return stop or self.steps_seen == DRY_RUN_STEPS
        asked = step % self.output.save_steps == 0  # by a flag, so that it is kept
        saves = asked or stop or (save and step < steps)
        validates = not stop and is_due(self.validation, step, steps)
        if saves or validates:
            self.tracker.settle()
            with self.tracker.request.unhurried():
                if saves:
                    self._save(step, interim=not (asked or stop))
                if validates:
                    self.validate(step=step)
                meet()
            self.tracker.restart_clock()
        if stop:
            stop_early(self.tracker.request.name, step, steps)
        return False

    def _save(self, step: int, *, interim: bool) -> None:
        """Writes a checkpoint; an interim one, which no flag asks for, only where the disk has room to spare."""
        started = time.monotonic()
        has_room = functools.partial(has_room_to_spare, self.output, self.tracker.schedule, self.sizes, step=step)
        if not interim or from_rank_0(has_room):
            save_checkpoint(self.output, self.settings, self.training, self.ranks, step, interim=interim)
        self.tracker.saved(time.monotonic() - started)
