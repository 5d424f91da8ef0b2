"""The VAE's work, done once for the images whose crop is the same in every step."""

import argparse
import time

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL

from dreambooth.console import say
from dreambooth.data import DreamBoothDataset, Examples
from dreambooth.ranks import Ranks

ENCODED_AT_A_TIME = 4


@torch.no_grad()
def cache_latents(args: argparse.Namespace, dataset: DreamBoothDataset, vae: AutoencoderKL, ranks: Ranks) -> None:
    """Encodes the images of `dataset` whose crop never changes, and moves the VAE to the CPU if that is all of them.

    What is kept is mean and standard deviation of the VAE's posterior, in fp32 in host memory; every step draws its
    own sample, so that training is the same with and without, to rounding. Ranks take whole batches of images in turn
    and then share them, so that the result does not depend on their number.

    Args:
        args: with --cache_latents off nothing is done; `check_crops` has seen to it that on can cache all images.
        dataset: its examples take their latents from the cache afterwards.
        vae: frozen, on this rank's device, in the run's precision.
        ranks: which share is this process's.
    """
    if args.cache_latents == "off":
        return
    started = time.monotonic()
    examples = [(part, place) for part in dataset.parts for place in range(len(part.photos))]
    fixed = [(part, place) for part, place in examples if part.has_fixed_crop(place)]
    if not fixed:
        return
    shape = (len(fixed), 2, *dataset.parts[0].latent_shape)
    moments = torch.zeros(shape, device=ranks.device)  # each rank fills its share
    for first in range(0, len(fixed), ENCODED_AT_A_TIME):
        if first // ENCODED_AT_A_TIME % ranks.world_size == ranks.rank:
            batch = slice(first, first + ENCODED_AT_A_TIME)
            moments[batch] = _encode(vae, fixed[batch], ranks.device)
    if ranks.world_size > 1:
        dist.all_reduce(moments)  # the sum of one share and zeros
    for (part, place), of_image in zip(fixed, moments.cpu(), strict=True):
        part.moments[place] = of_image
    if len(fixed) == len(examples):
        vae.to("cpu")
    size, seconds = moments.nbytes / 2**20, time.monotonic() - started
    say(f"latents of {len(fixed)} of {len(examples)} images cached in {seconds:.1f} s, {size:.1f} MiB")


def _encode(vae: AutoencoderKL, examples: list[tuple[Examples, int]], device: torch.device) -> torch.Tensor:
    """Returns (examples, 2, channels, height, width), fp32: mean and deviation, times the scaling factor."""
    pixel_values = torch.stack([part.pixel_values(place) for part, place in examples])
    posterior = vae.encode(pixel_values.to(device, vae.dtype)).latent_dist
    return torch.stack([posterior.mean.float(), posterior.std.float()], dim=1) * vae.config.scaling_factor
