"""Random draws that are a function of the seed, of what they are for, and of a number.

Nothing here has a state that advances: any process can make the draws of any sample, so that a run does not depend
on the number of ranks or of worker processes, and nothing has to be stored to go on with it.
"""

import secrets
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline


class Stream(IntEnum):
    """What a random draw is for; each has numbers of its own."""

    INSTANCE_ORDER = 1
    CLASS_ORDER = 2
    INSTANCE_SAMPLE = 3
    CLASS_SAMPLE = 4
    CLASS_IMAGE = 5
    VALIDATION = 6


def generator(seed: int, stream: Stream, number: int) -> np.random.Generator:
    """Returns the generator of (seed, stream, number).

    Philox is counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): seed and stream
    are its key, the number is the upper half of its counter, so no two generators ever overlap.
    """
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, number, 0]))


def starting_points(pipeline: DiffusionPipeline, seed: int, stream: Stream, numbers: Sequence[int]) -> dict:
    """Returns what to call a pipeline with, so that each image `n` of `numbers` follows from (seed, stream, n) alone.

    Returns:
        latents: (images, channels, height, width) at the model's own size, of its UNet's dtype, standard normal.
        height, width: of the images, in pixels.
        generator: of each image, on the CPU, for samplers that draw on the way.
    """
    size = pipeline.unet.config.sample_size or pipeline.vae.config.sample_size // pipeline.vae_scale_factor
    height, width = (size, size) if isinstance(size, int) else size
    draws = [generator(seed, stream, number) for number in numbers]
    shape = pipeline.unet.config.in_channels, height, width
    latents = [torch.from_numpy(draw.standard_normal(shape, dtype=np.float32)) for draw in draws]
    return {
        "latents": torch.stack(latents).to(pipeline.unet.dtype),
        "height": height * pipeline.vae_scale_factor,
        "width": width * pipeline.vae_scale_factor,
        "generator": [torch.Generator().manual_seed(int(draw.integers(2**63))) for draw in draws],
    }


def shared_seed(seed: int | None) -> int:
    """Returns `seed`, or one that is drawn on rank 0 and the same on all ranks."""
    if seed is not None:
        return seed
    drawn = [secrets.randbits(32)]
    if dist.is_initialized():
        dist.broadcast_object_list(drawn, src=0)
    return drawn[0]
