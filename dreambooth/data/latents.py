"""The VAE's work, done once for each crop that the steps take more than once."""

import math
import time

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL

from dreambooth.command_line.console import counted, doing, progress, say
from dreambooth.data.samples import Crop, DreamBoothDataset, Examples
from dreambooth.data.schedule import Schedule
from dreambooth.model.loss import images_at_a_time
from dreambooth.processes.environment import find_place
from dreambooth.processes.ranks import Ranks
from dreambooth.processes.threads import cores_of, in_threads

SHOWN_FROM = 500  # crops
# Of what `auto` keeps in each process: 16,384 crops at 512 pixels.
CACHE_BYTES = 2**31


@torch.no_grad()
def cache_latents(
    dataset: DreamBoothDataset,
    vae: AutoencoderKL,
    ranks: Ranks,
    schedule: Schedule,
    first_step: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    which: str = "auto",
) -> bool:
    """Encodes the crops that the steps will take, each once; the VAE ends where the steps want it.

    What is kept is mean and standard deviation of the VAE's posterior, in fp32 in host memory; every step draws its
    own sample. They are computed in fp32, since it happens once: half a precision's rounding would be in every step,
    and is more than the noise that is drawn. Ranks take whole batches of crops and then share them, so that the result
    does not depend on their number.

    Args:
        dataset: its examples take their latents from the cache afterwards.
        vae: frozen, fp32. It is on the CPU afterwards if all is cached, else on this rank's device in `dtype`.
        ranks: which share is this process's.
        schedule: of the run.
        first_step: steps that are passed over.
        dtype: in which steps encode what is not cached.
        which: "on" caches the crops of all images, "off" none, "auto" those of the images that `_worth_caching` names.

    Returns:
        Whether the steps find all that they take in the cache.
    """
    images = [(one, place) for one in dataset.sets for place in range(len(one.photos))]
    # A run that goes on caches what the one before it did, if it is as long.
    cached = _worth_caching(dataset, len(schedule.samples()), dtype) if which == "auto" else images * (which == "on")
    started = time.monotonic()
    batches = _batches(dataset, cached, schedule, first_step)
    if batches:
        with doing("caching latents", takes_less="--cache_latents off, or a lower --resolution"):
            torch.cuda.empty_cache()  # of text encoders: the VAE's tensors are larger, and fit into nothing of theirs
            vae.to(ranks.device)
            size = _cache(batches, vae, ranks)
        seconds = time.monotonic() - started
        say(
            f"latents of {len(cached)} of {len(images)} images cached in {seconds:.1f} s, "
            f"{counted(sum(map(len, batches)), 'crop')}, {size / 2**20:.1f} MiB"
        )
    if len(cached) == len(images):
        vae.to("cpu")
    else:
        vae.to(ranks.device, dtype)
    torch.cuda.empty_cache()
    return len(cached) == len(images)


def _worth_caching(dataset: DreamBoothDataset, samples: int, dtype: torch.dtype) -> list[tuple[Examples, int]]:
    """Returns the images whose crops `auto` caches in a run of so many samples, as (examples, place).

    They are all, where steps would encode in fp32 as the cache does. Where they do so in half precision, which is
    faster, those with one crop, and those of which the steps take each crop at least twice on average: caching at
    least halves the VAE's work. The first of them, as far as CACHE_BYTES go.
    """
    found, room = [], CACHE_BYTES
    least = 1 if dtype == torch.float32 else 2
    for examples in dataset.sets:
        taken = samples / len(examples.photos)
        for place in range(len(examples.photos)):
            possible = len(examples.offsets(place))
            # How many different ones are among so many that are drawn, on average.
            crops = min(taken, possible * (1 - (1 - 1 / possible) ** taken))
            size = crops * 2 * 4 * math.prod(examples.latent_shape)
            if (possible == 1 or taken >= least * crops) and size <= room:
                found.append((examples, place))
                room -= size
    return found


def _batches(
    dataset: DreamBoothDataset, images: list[tuple[Examples, int]], schedule: Schedule, first_step: int
) -> list[list[tuple[Examples, Crop]]]:
    """Returns the crops that the steps from `first_step` on take of images, in batches in which to encode them.

    The batches are those of the whole run: the last bits of a result may depend on what is encoded with it, and a run
    that goes on has to equal one that never stopped. So it encodes some crops besides those that it takes.
    """

    def taken_from(step: int) -> list[tuple[Examples, Crop]]:
        places = [(one, {place for examples, place in images if examples is one}) for one in dataset.sets]
        return [(one, crop) for one, of_set in places for crop in one.crops(schedule.samples(step), of_set)]

    of_run = taken_from(0)
    to_come = set(taken_from(first_step) if first_step else of_run)
    size = images_at_a_time(dataset.sets[0].resolution)
    batches = [of_run[first : first + size] for first in range(0, len(of_run), size)]
    return [batch for batch in batches if not to_come.isdisjoint(batch)]


def _cache(batches: list[list[tuple[Examples, Crop]]], vae: AutoencoderKL, ranks: Ranks) -> int:
    """Encodes batches of crops and keeps what they become; returns the bytes of it."""
    total, count, size = 0, sum(map(len, batches)), max(map(len, batches))
    shape = batches[0][0][0].latent_shape
    # A rank's batches follow each other, so that an image is decoded on as few ranks as can be.
    each = -(-len(batches) // ranks.world_size)
    share = [crop for batch in batches[ranks.rank * each : (ranks.rank + 1) * each] for crop in batch]
    pixel_values = in_threads(lambda one: one[0].pixel_values(one[1]), share, threads=cores_of(find_place()))
    with progress(count, desc="latents", unit="crop", shown=ranks.rank == 0 and count >= SHOWN_FROM) as bar:
        for first in range(each):
            # A batch of each rank: no GPU ever holds more of them.
            turn = batches[first::each]
            moments = torch.zeros(len(turn), size, 2, *shape, device=ranks.device)
            if ranks.rank < len(turn):
                mine = turn[ranks.rank]
                moments[ranks.rank, : len(mine)] = _encode(vae, [next(pixel_values) for _ in mine])
            if ranks.world_size > 1:
                dist.all_reduce(moments)  # the sum of one share and zeros
            for batch, of_batch in zip(turn, moments.cpu(), strict=True):
                for (examples, crop), of_crop in zip(batch, of_batch, strict=False):
                    examples.moments[crop] = of_crop
                    total += of_crop.nbytes
            bar.update(sum(map(len, turn)))
    return total


def _encode(vae: AutoencoderKL, images: list[torch.Tensor]) -> torch.Tensor:
    """Returns (images, 2, channels, height, width), fp32: mean and deviation, times the scaling factor."""
    posterior = vae.encode(torch.stack(images).to(vae.device, vae.dtype)).latent_dist
    return torch.stack([posterior.mean, posterior.std], dim=1) * vae.config.scaling_factor
