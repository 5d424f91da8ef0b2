"""Generating the class images that are missing, each rank its share."""

import argparse
import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm

from dreambooth.console import doing, is_rank_0, say
from dreambooth.images import Photo, check_crops, find_images, images_to_use, list_images, photo_of, save_whole
from dreambooth.ranks import Ranks


def check_class_images(args: argparse.Namespace) -> None:
    """Decodes the images that are in --class_data_dir already, as far as a run uses them.

    Raises:
        UserError: if one cannot be used.
    """
    if not args.with_prior_preservation or not os.path.isdir(args.class_data_dir):
        return
    wanted = images_to_use(args, args.num_class_images)
    if list_images(args.class_data_dir):
        check_crops(args, find_images(args.class_data_dir, "--class_data_dir", wanted))


def missing_numbers(folder: Path, wanted: int) -> list[int]:
    """Returns the numbers of the images to generate so that `folder` has `wanted` images, its own counted in."""
    present = list_images(folder)
    names = {path.name for path in present}
    free = (number for number in range(wanted) if image_name(number) not in names)
    return [number for number, _ in zip(free, range(wanted - len(present)), strict=False)]


def image_name(number: int) -> str:
    """Returns the file name of generated image `number`."""
    return f"{number:05d}.png"


@contextlib.contextmanager
def one_cpu_thread() -> Iterator[None]:
    """Computes with one thread: on the CPU the last bits of a matrix product depend on how many share it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def generate_class_images(
    args: argparse.Namespace, load: Callable[[], StableDiffusionPipeline], *, seed: int, ranks: Ranks
) -> list[Photo]:
    """Brings --class_data_dir to --num_class_images images, and returns them on all ranks once they are there.

    Image number n starts from latents that follow from `seed` + n. Ranks take whole batches in turn, so that the
    make-up of a batch, and with it every rounding, is the same on any number of ranks. Images that were there before
    have been through `check_class_images`.

    Args:
        args: the flags.
        load: returns the pipeline that generates; called only where there is something to generate.
        seed: of the run.
        ranks: which share is this process's.
    """
    folder = Path(args.class_data_dir)
    wanted = images_to_use(args, args.num_class_images)
    if args.dry_run:
        return _stand_ins(args, folder, wanted)
    folder.mkdir(parents=True, exist_ok=True)
    # Listed once, before any rank writes.
    missing = [missing_numbers(folder, wanted)]
    if dist.is_initialized():
        dist.broadcast_object_list(missing, src=0)
    numbers, size = missing[0], args.sample_batch_size
    batches = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    share = batches[ranks.rank :: ranks.world_size]
    started = time.monotonic()
    if share:
        pipeline = load().to(ranks.device)
        with one_cpu_thread(), doing("generating class images", takes_less="a smaller --sample_batch_size"):
            _generate(pipeline, args.class_prompt, share, folder, seed)
        del pipeline
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    if dist.is_initialized():
        dist.barrier()
    if numbers:
        seconds = time.monotonic() - started
        say(f"{len(numbers)} class images generated in {seconds:.1f} s, {len(numbers) / seconds:.1f} images/s")
    return [photo_of(path, args.class_prompt) for path in list_images(folder)[:wanted]]


def _stand_ins(args: argparse.Namespace, folder: Path, wanted: int) -> list[Photo]:
    """Returns the class images that there are, and gray ones in place of those that a run would generate."""
    present = list_images(folder)[:wanted] if folder.is_dir() else []
    gray = io.BytesIO()
    Image.new("RGB", (args.resolution, args.resolution), "gray").save(gray, format="PNG")
    stand_in = Photo("a class image to be generated", args.class_prompt, gray.getvalue)
    if len(present) < wanted:
        say(f"class images: {wanted - len(present)} of {wanted} would be generated first")
    return [photo_of(path, args.class_prompt) for path in present] + [stand_in] * (wanted - len(present))


def _generate(
    pipeline: StableDiffusionPipeline, prompt: str, batches: list[list[int]], folder: Path, seed: int
) -> None:
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=sum(map(len, batches)), desc="class images", unit="image", disable=not is_rank_0()) as progress:
        for numbers in batches:
            generators = [torch.Generator().manual_seed((seed + number) % 2**32) for number in numbers]
            images = pipeline([prompt] * len(numbers), generator=generators).images
            for number, image in zip(numbers, images, strict=True):
                save_whole(image, folder / image_name(number))
            progress.update(len(numbers))
