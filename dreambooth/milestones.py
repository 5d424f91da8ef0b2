"""What happens after a step besides the next one: figures, checkpoints, validation images, an early end."""

import argparse
from collections.abc import Callable

import torch

from dreambooth.checkpoint import Training, save_checkpoint
from dreambooth.ranks import stop_early
from dreambooth.tracker import Tracker

DRY_RUN_STEPS = 2  # the first one warms up


class Milestones:
    """Keeps to the flags' intervals; to be told of every step, on every rank.

    Args:
        args: the flags.
        settings: of the run, for its checkpoints.
        training: what checkpoints are made of.
        tracker: that shows the figures, and knows when to stop.
        validate: draws the validation images after `step`, its one argument.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        settings: dict,
        training: Training,
        tracker: Tracker,
        validate: Callable[..., None],
    ):
        self.args = args
        self.settings = settings
        self.training = training
        self.tracker = tracker
        self.validate = validate
        self.steps_seen = 0

    def after(self, step: int, *, loss: torch.Tensor, lr: float, grad_norm: torch.Tensor | float | None) -> bool:
        """Does what is due after `step`, whose figures are those of `Tracker.step`.

        Returns:
            Whether a dry run is at its end.

        Raises:
            RunError: if figures are not finite, or something cannot be written.
            Stopped: after a checkpoint, if a signal has asked for it.
        """
        args, steps = self.args, self.tracker.schedule.steps
        stop = self.tracker.step(step, loss=loss, lr=lr, grad_norm=grad_norm)
        self.steps_seen += 1
        if args.dry_run:
            return stop or self.steps_seen == DRY_RUN_STEPS
        saves = stop or step % args.save_steps == 0
        validates = args.validation_prompt and (step % args.validation_steps == 0 or step == steps)
        if saves or validates:
            self.tracker.settle()
            if saves:
                save_checkpoint(args, self.settings, self.training, step)
            if validates:
                self.validate(step=step)
            self.tracker.restart_clock()
        if stop:
            stop_early(self.tracker.request.name, step, steps)
        return False
