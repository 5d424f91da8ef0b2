"""Images of --validation_prompt while the training goes on."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from dreambooth.checkpoint import Training
from dreambooth.class_images import one_cpu_thread
from dreambooth.console import RunError, doing, is_rank_0, say
from dreambooth.grid import captioned_grid
from dreambooth.images import save_whole
from dreambooth.models import first_line
from dreambooth.ranks import Ranks
from dreambooth.tracker import Tracker

INFERENCE_STEPS = 25


def validate(
    args: argparse.Namespace,
    training: Training,
    load_pipeline: Callable[..., StableDiffusionPipeline],
    tracker: Tracker,
    *,
    seed: int,
    dtype: torch.dtype,
    ranks: Ranks,
    step: int,
) -> None:
    """Draws --num_validation_images from the weights after `step`; to be called on every rank, rank 0 draws.

    Image i starts from the latents of `seed` + i, whatever the step. They go to output_dir/validation/step-N.png and
    to TensorBoard. No random generator of the training is touched.

    Args:
        args: the flags.
        training: whose weights are gathered.
        load_pipeline: returns a pipeline of a dtype with some of its parts replaced.
        tracker: that logs.
        seed: of the run.
        dtype: to draw in.
        ranks: whose device rank 0 draws on.
        step: optimizer steps done.

    Raises:
        RunError: if the images cannot be written.
    """
    weights = training.weights()
    if not is_rank_0():
        return
    parts = training.denoiser.parts_with(weights)
    pipeline = load_pipeline(dtype=dtype, sampler=args.validation_scheduler, **parts).to(ranks.device)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    with one_cpu_thread(), doing("drawing validation images"):
        for number in range(args.num_validation_images):
            generator = torch.Generator().manual_seed((seed + number) % 2**32)
            made = pipeline(args.validation_prompt, num_inference_steps=INFERENCE_STEPS, generator=generator)
            images += made.images
    path = Path(args.output_dir, "validation", f"step-{step}.png")
    try:
        path.parent.mkdir(exist_ok=True)
        save_whole(captioned_grid([images], [args.validation_prompt], []), path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {first_line(error)}") from error
    tracker.show_images("validation", np.stack([np.asarray(image) for image in images]), step)
    say(f"validation: {path}")
    del pipeline
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
