"""The VAE's work, done once for the images whose crop is the same in every step."""

import time

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL

from dreambooth.command_line.console import doing, progress, say
from dreambooth.data.samples import DreamBoothDataset, Examples
from dreambooth.processes.environment import find_place
from dreambooth.processes.ranks import Ranks
from dreambooth.processes.threads import cores_of, in_threads

MAX_ENCODED_AT_A_TIME, MAX_PIXELS_AT_A_TIME = 4, 2**20  # for an encoder in fp32 in a few GiB
SHOWN_FROM = 500  # images


@torch.no_grad()
def cache_latents(
    dataset: DreamBoothDataset,
    vae: AutoencoderKL,
    ranks: Ranks,
    *,
    dtype: torch.dtype = torch.float32,
    enabled: bool = True,
) -> None:
    """Encodes the images of `dataset` whose crop never changes; the VAE ends where the steps want it.

    What is kept is mean and standard deviation of the VAE's posterior, in fp32 in host memory; every step draws its
    own sample. They are computed in fp32, since it happens once: half a precision's rounding would be in every step,
    and is more than the noise that is drawn. Ranks take whole batches of images in turn and then share them, so that
    the result does not depend on their number.

    Args:
        dataset: its examples take their latents from the cache afterwards.
        vae: frozen, fp32. It is on the CPU afterwards if all images are cached, else on this rank's device in `dtype`.
        ranks: which share is this process's.
        dtype: in which steps encode what is not cached.
        enabled: whether anything is cached.
    """
    examples = [(one, place) for one in dataset.sets for place in range(len(one.photos))]
    fixed = [one for one in examples if enabled and one[0].has_fixed_crop(one[1])]
    if fixed:
        started = time.monotonic()
        with doing("caching latents", takes_less="--cache_latents off, or a lower --resolution"):
            vae.to(ranks.device)
            size = _cache(fixed, vae, ranks)
        seconds = time.monotonic() - started
        say(f"latents of {len(fixed)} of {len(examples)} images cached in {seconds:.1f} s, {size / 2**20:.1f} MiB")
    if len(fixed) == len(examples):
        vae.to("cpu")
    else:
        vae.to(ranks.device, dtype)


def _cache(fixed: list[tuple[Examples, int]], vae: AutoencoderKL, ranks: Ranks) -> int:
    """Encodes examples and keeps what they become; returns the bytes of it."""
    size = min(MAX_ENCODED_AT_A_TIME, max(1, MAX_PIXELS_AT_A_TIME // fixed[0][0].resolution ** 2))
    batches = [fixed[first : first + size] for first in range(0, len(fixed), size)]
    share = [example for batch in batches[ranks.rank :: ranks.world_size] for example in batch]
    pixel_values = in_threads(lambda one: one[0].pixel_values(one[1]), share, threads=cores_of(find_place()))
    total = 0
    with progress(len(fixed), desc="latents", unit="image", shown=ranks.rank == 0 and len(fixed) >= SHOWN_FROM) as bar:
        for first in range(0, len(batches), ranks.world_size):
            # A batch of each rank: no GPU ever holds more of them.
            turn = batches[first : first + ranks.world_size]
            moments = torch.zeros(len(turn), size, 2, *fixed[0][0].latent_shape, device=ranks.device)
            if ranks.rank < len(turn):
                mine = turn[ranks.rank]
                moments[ranks.rank, : len(mine)] = _encode(vae, [next(pixel_values) for _ in mine])
            if ranks.world_size > 1:
                dist.all_reduce(moments)  # the sum of one share and zeros
            for batch, of_batch in zip(turn, moments.cpu(), strict=True):
                for (examples, place), of_image in zip(batch, of_batch, strict=False):
                    examples.moments[place] = of_image
                    total += of_image.nbytes
            bar.update(sum(map(len, turn)))
    return total


def _encode(vae: AutoencoderKL, images: list[torch.Tensor]) -> torch.Tensor:
    """Returns (images, 2, channels, height, width), fp32: mean and deviation, times the scaling factor."""
    posterior = vae.encode(torch.stack(images).to(vae.device, vae.dtype)).latent_dist
    return torch.stack([posterior.mean, posterior.std], dim=1) * vae.config.scaling_factor
