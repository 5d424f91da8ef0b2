"""From folders of photos to the samples of each step."""

import argparse
import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F

from dreambooth.console import UserError, warn
from dreambooth.randomness import Stream, generator
from dreambooth.ranks import Ranks
from dreambooth.schedule import Schedule
from dreambooth.signals import SIGNALS

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# What those files may contain, whatever their suffix says.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".tif", ".tiff", ".gif", ".jfif", ".jxl", ".dng", ".cr2", ".nef", ".arw")
TEST_RUN_IMAGES = 10

ORIENTATION = 0x0112  # of EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def list_images(folder: str | os.PathLike) -> list[Path]:
    """Returns the image files directly in `folder`, sorted by name; hidden files are passed over.

    A link to nothing counts: it stands for an image that is missing.
    """
    return sorted(
        path
        for path in Path(folder).iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and (path.is_file() or (path.is_symlink() and not path.exists()))
    )


def load_image(path: Path) -> Image.Image:
    """Returns an image as RGB, turned the way its EXIF orientation says, transparency laid over white.

    Raises:
        UserError: if the file is not a whole image.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image = _upright(image)
            if image.mode.startswith("I"):
                # 16 bits per pixel, which `convert` would clip at 255.
                gray = np.asarray(image).astype(np.float64) / 257
                image = Image.fromarray(gray.round().clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise UserError(
            f"cannot read the image {path}: it is none of PNG, JPEG, WebP, BMP and GIF, or torn; convert or remove it"
        ) from error
    except Image.DecompressionBombError as error:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise UserError(f"cannot read the image {path}: it has more than {limit} megapixels; scale it down") from error
    except Exception as error:  # Decoders raise whatever a damaged file leads them to.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"cannot read the image {path}: {reason}; replace or remove it") from error


def _upright(image: Image.Image) -> Image.Image:
    """Returns an image turned the way its EXIF orientation says, as it is where that cannot be read."""
    image.load()
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # What Pillow raises for bytes that are no EXIF data has no limit; the pixels are whole.
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def images_to_use(args: argparse.Namespace, wanted: int | None = None) -> int | None:
    """Returns how many images of a folder a run uses: `wanted` (None: all), but 10 at most in a --test_run."""
    if not args.test_run:
        return wanted
    return TEST_RUN_IMAGES if wanted is None else min(wanted, TEST_RUN_IMAGES)


def find_images(folder: str, flag: str, limit: int | None = None) -> list[Path]:
    """Returns the first `limit` images of `folder` (all if None), each decoded once to see that it can be.

    Raises:
        UserError: if there is none, or one that cannot be read.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder} is not a folder")
    kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
    try:
        paths = list_images(folder)[:limit]
        entries = sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be read: {error.strerror}") from error
    others = [path.name for path in entries if path.suffix.lower() in OTHER_SUFFIXES]
    if not paths:
        inside = next((path.name for path in entries if os.path.isdir(path)), None)
        hint = ""
        if others:
            hint = f": convert {others[0]} and such"
        elif inside is not None:
            hint = f"; folders in it, such as {inside}, are not looked into"
        raise UserError(f"{flag} {folder} has no image ({kinds}){hint}")
    if others:
        warn(f"{flag} {folder}: {others[0]} is passed over ({len(others)} such), images are {kinds}")
    for path in paths:
        load_image(path)
    return paths


def is_square(path: Path) -> bool:
    """Returns whether an image is as wide as it is high."""
    with Image.open(path, formats=FORMATS) as image:
        return image.width == image.height


def check_crops(args: argparse.Namespace, paths: list[Path]) -> None:
    """Finds images that --cache_latents on cannot cache.

    Raises:
        UserError: if each step crops one of them elsewhere.
    """
    if args.cache_latents != "on" or args.center_crop:
        return
    for path in paths:
        if not is_square(path):
            raise UserError(
                f"--cache_latents on: {path} is not square, so each step crops it elsewhere: "
                "add --center_crop, or use --cache_latents auto"
            )


def crop_to_square(image: Image.Image, resolution: int, position: float) -> torch.Tensor:
    """Returns the square of the image's shorter side, scaled to `resolution`.

    Args:
        image: RGB image of any size.
        resolution: side of the result, in pixels.
        position: where along the longer side the square lies, from 0 (left or top) to 1; 0.5 is the centre.

    Returns:
        Tensor of shape (3, resolution, resolution), float32, in [-1, 1].
    """
    width, height = image.size
    side = min(width, height)
    left, top = round(position * (width - side)), round(position * (height - side))
    image = F.resized_crop(image, top, left, side, side, [resolution, resolution], antialias=True)
    return F.normalize(F.to_tensor(image), [0.5], [0.5])


@functools.lru_cache(maxsize=8)
def shuffled(seed: int, order: Stream, pass_number: int, length: int) -> np.ndarray:
    """Returns the order in which pass `pass_number` takes `length` images, as indices."""
    return generator(seed, order, pass_number).permutation(length)


class Examples:
    """One folder's images as an endless, reshuffled sequence of training examples.

    Args:
        paths: image files.
        prompt_index: which of the run's prompts describes them.
        seed: of the run.
        order: stream of the shuffling; pass p over the images has an order of its own.
        draws: stream of the examples' own draws.
        resolution: side of the images, in pixels.
        center_crop: whether images that are not square are cropped at the centre.
        latent_shape: (channels, height, width) of the latents.
        num_timesteps: timesteps of the noise schedule.
    """

    def __init__(
        self,
        paths: list[Path],
        *,
        prompt_index: int,
        seed: int,
        order: Stream,
        draws: Stream,
        resolution: int,
        center_crop: bool,
        latent_shape: tuple[int, int, int],
        num_timesteps: int,
    ):
        self.paths = paths
        self.prompt_index = prompt_index
        self.seed = seed
        self.order = order
        self.draws = draws
        self.resolution = resolution
        self.center_crop = center_crop
        self.latent_shape = latent_shape
        self.num_timesteps = num_timesteps
        # By path: mean and deviation of the VAE's posterior, times its scaling factor; (2, *latent_shape), float32.
        self.moments: dict[Path, torch.Tensor] = {}

    def has_fixed_crop(self, path: Path) -> bool:
        """Returns whether every example of an image shows the same pixels."""
        return self.center_crop or is_square(path)

    def pixel_values(self, path: Path, position: float = 0.5) -> torch.Tensor:
        """Returns an image as `crop_to_square` does."""
        return crop_to_square(load_image(path), self.resolution, 0.5 if self.center_crop else position)

    def path_of(self, n: int) -> Path:
        """Returns the image of example `n`: every pass takes each image once."""
        pass_number, place = divmod(n, len(self.paths))
        return self.paths[shuffled(self.seed, self.order, pass_number, len(self.paths))[place]]

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        """Returns example `n`, a function of the seed and `n` alone.

        Returns:
            latents: `latent_shape`, float32, a sample of the VAE's posterior times its scaling factor; or, of an image
                that is not in the cache, what makes one:
            pixel_values: (3, resolution, resolution), float32, in [-1, 1].
            posterior_noise: `latent_shape`, float32, standard normal.

            noise: `latent_shape`, float32, standard normal; what the UNet has to find.
            timesteps: (), int64, from 0 to num_timesteps - 1.
            prompt_indices: (), int64.
        """
        draw = generator(self.seed, self.draws, n)
        # Drawn in any case, so that the draws after it do not depend on the crop.
        position = draw.random()
        posterior_noise = torch.from_numpy(draw.standard_normal(self.latent_shape, dtype=np.float32))
        path = self.path_of(n)
        if path in self.moments:
            mean, deviation = self.moments[path]
            image = {"latents": mean + deviation * posterior_noise}
        else:
            image = {"pixel_values": self.pixel_values(path, position), "posterior_noise": posterior_noise}
        return image | {
            "noise": torch.from_numpy(draw.standard_normal(self.latent_shape, dtype=np.float32)),
            "timesteps": torch.tensor(int(draw.integers(self.num_timesteps))),
            "prompt_indices": torch.tensor(self.prompt_index),
        }


class DreamBoothDataset(Dataset):
    """Sample n is instance example n and, with prior preservation, class example n."""

    def __init__(self, instance: Examples, prior: Examples | None = None):
        self.parts = [instance] if prior is None else [instance, prior]

    @property
    def examples_per_sample(self) -> int:
        """2 with prior preservation, else 1."""
        return len(self.parts)

    @property
    def images_per_epoch(self) -> int:
        """Size of the larger of the two sets of images."""
        return max(len(part.paths) for part in self.parts)

    def __getitem__(self, n: int) -> list[dict[str, torch.Tensor]]:
        return [part[n] for part in self.parts]


def build_dataset(
    args: argparse.Namespace,
    instance_images: list[Path],
    class_images: list[Path],
    *,
    seed: int,
    latent_shape: tuple[int, int, int],
    num_timesteps: int,
) -> DreamBoothDataset:
    """Returns the run's samples; prompt 0 is the instance prompt, prompt 1 the class prompt.

    Args:
        instance_images: at least one.
        class_images: none where there is no prior preservation.
        seed, latent_shape, num_timesteps: as of `Examples`.
    """
    settings = {
        "seed": seed,
        "resolution": args.resolution,
        "center_crop": args.center_crop,
        "latent_shape": latent_shape,
        "num_timesteps": num_timesteps,
    }
    instance = Examples(
        instance_images, prompt_index=0, order=Stream.INSTANCE_ORDER, draws=Stream.INSTANCE_SAMPLE, **settings
    )
    if not class_images:
        return DreamBoothDataset(instance)
    prior = Examples(class_images, prompt_index=1, order=Stream.CLASS_ORDER, draws=Stream.CLASS_SAMPLE, **settings)
    return DreamBoothDataset(instance, prior)


def collate(samples: list[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Stacks samples: first all instance examples, then all class examples, ready for one forward pass.

    Examples with and without latents may meet in a batch: `latents` has those of the first kind, `pixel_values` and
    `posterior_noise` those of the second, and `rows`, (batch,), int64, where in both together each example is.
    """
    examples = [sample[part] for part in range(len(samples[0])) for sample in samples]
    keys = dict.fromkeys(key for example in examples for key in example)
    batch = {key: torch.stack([example[key] for example in examples if key in example]) for key in keys}
    latents_first = sorted(range(len(examples)), key=lambda row: "latents" not in examples[row])
    return batch | {"rows": torch.tensor(latents_first).argsort()}


def _leave_signals_to_the_trainer(worker: int) -> None:
    """In a worker process: a signal to the whole process group is the trainer's to answer."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def build_loader(
    dataset: DreamBoothDataset, schedule: Schedule, ranks: Ranks, first_step: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields this rank's batch of each step of the schedule from `first_step` (counted from 0) on, on its device."""
    on_gpu = ranks.device.type == "cuda"
    loader = DataLoader(
        dataset,
        batch_sampler=schedule.batches(ranks.rank, first_step),
        collate_fn=collate,
        # On a GPU machine, worker processes decode while the GPU computes; on the CPU they would only take its cores.
        num_workers=min(4, os.cpu_count() or 1) if on_gpu else 0,
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=on_gpu,
    )
    try:
        for batch in loader:
            yield {key: value.to(ranks.device, non_blocking=True) for key, value in batch.items()}
    except UserError as error:
        # A worker process sends its traceback too, with the line last.
        raise UserError(error.args[0].rpartition("UserError: ")[2].removesuffix(r"\n")) from error
