"""Settings of AdamW and of the learning rate, the same in both trainers."""

import argparse

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dreambooth.schedule import Schedule


def adamw_settings(args: argparse.Namespace, schedule: Schedule) -> dict:
    """Returns the settings of AdamW, as keyword arguments of torch's."""
    return {
        "lr": args.learning_rate * (schedule.total_batch if args.scale_lr else 1),
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.adam_weight_decay,
    }


def build_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, schedule: Schedule) -> LambdaLR:
    """Returns the scheduler of --lr_scheduler; to be stepped once per optimizer step, on any number of ranks."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=schedule.steps,
    )


def resume_lr_scheduler(lr_scheduler: LRScheduler, state: dict) -> None:
    """Puts a new scheduler where another one was, and the learning rate too, which torch leaves as it is."""
    lr_scheduler.load_state_dict(state)
    for group, lr in zip(lr_scheduler.optimizer.param_groups, lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
