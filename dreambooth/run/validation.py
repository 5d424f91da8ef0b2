"""Images of --validation_prompt while the training goes on."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from dreambooth.command_line.console import UserError, doing, first_line, is_rank_0, say, warn
from dreambooth.command_line.flags import ValidationFlags
from dreambooth.command_line.limits import explain
from dreambooth.data.class_images import one_cpu_thread
from dreambooth.data.images import NotFinite, pictures_of
from dreambooth.data.randomness import Stream, starting_points
from dreambooth.engine.state import Training
from dreambooth.model.drawing import DrawingDevice
from dreambooth.model.precision import name_of
from dreambooth.processes.ranks import Ranks
from dreambooth.run.grid import captioned_grid
from dreambooth.run.image_file import check_image_file, save_image
from dreambooth.run.tracker import Tracker
from dreambooth.run.trained import gather_for_pipeline

INFERENCE_STEPS = 25


def check_validation_images(flags: ValidationFlags, folder: Path, *, first_step: int, steps: int) -> None:
    """Finds files of somebody else's where the validation images of a run of `steps` steps go; on rank 0.

    Args:
        flags: say whether and when there are images.
        folder: that they go to.
        first_step: steps that an earlier run has done.
        steps: optimizer steps of the whole run.

    Raises:
        UserError: naming one.
    """
    if not flags.validation_prompt or not is_rank_0():
        return
    for file in sorted(folder.glob("step-*.png")):
        step = int(number[1]) if (number := re.fullmatch(r"step-([1-9]\d*)\.png", file.name)) else 0
        if first_step < step <= steps and is_due(flags, step, steps):
            check_image_file(file, "--validation_prompt:")


def is_due(flags: ValidationFlags, step: int, steps: int) -> bool:
    """Whether images are drawn after `step` of `steps`."""
    return bool(flags.validation_prompt) and (step % flags.validation_steps == 0 or step == steps)


def validate(
    flags: ValidationFlags,
    folder: Path,
    training: Training,
    load_pipeline: Callable[..., DiffusionPipeline],
    tracker: Tracker,
    *,
    seed: int,
    dtype: torch.dtype,
    ranks: Ranks,
    device: DrawingDevice,
    step: int,
) -> None:
    """Draws --num_validation_images from the weights after `step`; to be called on every rank, rank 0 draws.

    Image i starts from latents that follow from the seed and i alone, whatever the step. They go to step-N.png in
    `folder`, and to TensorBoard. No random generator of the training is touched. Images that
    cannot be had, or be written, are told and end nothing: they are not what the training is for.

    Args:
        flags: say what is drawn.
        folder: see above.
        training: whose weights are gathered.
        load_pipeline: returns a pipeline of a dtype with some of its parts replaced.
        tracker: that logs.
        seed: of the run.
        dtype: to draw in.
        ranks: of the run.
        device: that rank 0 draws on.
        step: optimizer steps done.
    """
    trained = gather_for_pipeline(training, ranks, dtype)
    if not is_rank_0():
        return
    pictures, reason = [], None
    try:
        with doing("drawing validation images", takes_less="no --validation_prompt"):
            device.put(load_pipeline(dtype=dtype, sampler=flags.validation_scheduler, **trained))
            pictures = pictures_of(_draw(device, flags.validation_prompt, flags.num_validation_images, seed))
    except NotFinite as error:
        reason = f"{error}, drawn in {name_of(dtype)}; where that is fp16, --mixed_precision bf16 or no helps"
    except UserError as error:  # the rest of the pipeline is not there any more
        reason = first_line(error)
    except Exception as error:  # the training needs none of it
        reason = explain(error) or f"{type(error).__name__}: {first_line(error)}"
    trained.clear()  # of what is referred to, the device could let go of nothing
    device.clear()
    if reason:
        warn(f"no validation images of step {step}: {reason}")
        return
    path = folder / f"step-{step}.png"
    try:
        check_image_file(path, "validation images:")
        save_image(captioned_grid([pictures], [flags.validation_prompt], []), path)
    except UserError as error:
        warn(str(error))
    else:
        say(f"validation: {path}")
    tracker.show_images("validation", np.stack([np.asarray(picture) for picture in pictures]), step)


def _draw(device: DrawingDevice, prompt: str, count: int, seed: int) -> np.ndarray:
    """Returns images of a prompt, drawn one at a time: (images, height, width, 3), floats in [0, 1]."""

    def image(pipeline: DiffusionPipeline, number: int) -> np.ndarray:
        points = starting_points(pipeline, seed, Stream.VALIDATION, [number])
        return pipeline(prompt, num_inference_steps=INFERENCE_STEPS, output_type="np", **points).images

    device.pipeline.set_progress_bar_config(disable=True)
    with one_cpu_thread():
        return np.concatenate([device.draw(functools.partial(image, number=number)) for number in range(count)])
