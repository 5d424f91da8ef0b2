"""Images to train on: finding, reading and cropping them."""

import argparse
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import functional as F

from dreambooth.console import UserError, warn

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


@dataclass(frozen=True)
class Photo:
    """An image to train on, and what it shows.

    Args:
        name: by which messages call it.
        prompt: that describes it.
        read: returns the bytes of the image file.
    """

    name: str
    prompt: str
    read: Callable[[], bytes]


def photo_of(path: Path, prompt: str = "") -> Photo:
    """Returns the photo of an image file."""
    return Photo(str(path), prompt, path.read_bytes)


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


def load_image(photo: Photo) -> Image.Image:
    """Returns an image as RGB, turned the way its EXIF orientation says, transparency laid over white.

    Raises:
        UserError: if it is not a whole image.
    """
    try:
        with Image.open(io.BytesIO(photo.read()), formats=FORMATS) as image:
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
            f"cannot read the image {photo.name}: "
            "it is none of PNG, JPEG, WebP, BMP and GIF, or torn; convert or remove it"
        ) from error
    except Image.DecompressionBombError as error:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise UserError(
            f"cannot read the image {photo.name}: it has more than {limit} megapixels; scale it down"
        ) from error
    except Exception as error:  # Decoders raise whatever a damaged file leads them to.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"cannot read the image {photo.name}: {reason}; replace or remove it") from error


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


def images_per_epoch(args: argparse.Namespace, instance_images: list[Photo]) -> int:
    """Returns the size of the larger of the two sets of images, of which those of the class may not be there yet."""
    class_images = images_to_use(args, args.num_class_images) if args.with_prior_preservation else 0
    return max(len(instance_images), class_images)


def find_images(folder: str, flag: str, limit: int | None = None) -> list[Photo]:
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
    photos = [photo_of(path) for path in paths]
    for photo in photos:
        load_image(photo)
    return photos


def is_square(photo: Photo) -> bool:
    """Returns whether an image is as wide as it is high."""
    with Image.open(io.BytesIO(photo.read()), formats=FORMATS) as image:
        return image.width == image.height


def check_crops(args: argparse.Namespace, photos: list[Photo]) -> None:
    """Finds images that --cache_latents on cannot cache.

    Raises:
        UserError: if each step crops one of them elsewhere.
    """
    if args.cache_latents != "on" or args.center_crop:
        return
    for photo in photos:
        if not is_square(photo):
            raise UserError(
                f"--cache_latents on: {photo.name} is not square, so each step crops it elsewhere: "
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


def pictures_of(images: np.ndarray) -> list[Image.Image]:
    """Returns images as a pipeline draws them, as pictures.

    Args:
        images: (number, height, width, 3), float, in [0, 1].

    Raises:
        ValueError: naming the first one that has a value that is no finite number, and would come out black.
    """
    for index, image in enumerate(images):
        if not np.isfinite(image).all():
            raise ValueError(f"image {index} is not finite everywhere")
    return [Image.fromarray(image) for image in (images * 255).round().astype(np.uint8)]


def save_whole(image: Image.Image, path: Path) -> None:
    """Writes a PNG under another name and renames it: `path` is a whole file or does not exist."""
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, format="PNG")
    os.replace(partial, path)
