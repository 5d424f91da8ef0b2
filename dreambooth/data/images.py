"""Images: finding, reading, cropping and writing them."""

import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torchvision.transforms import functional as F

from dreambooth.command_line.console import UserError, counted, warn
from dreambooth.command_line.flags import PriorFlags
from dreambooth.command_line.paths import partial_name, write_through
from dreambooth.processes.environment import Place
from dreambooth.processes.ranks import from_all_ranks
from dreambooth.processes.threads import cores_of, in_threads

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# What those files may contain, whatever their suffix says.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".tif", ".tiff", ".gif", ".jfif", ".jxl", ".dng", ".cr2", ".nef", ".arw")
TEST_RUN_IMAGES = 10
# Of the images that this process has decoded last, scaled; 250 of them at 512 pixels.
CACHE_BYTES = 2**28
# Of a PNG file: what it was generated from.
ORIGIN = "dreambooth"
ALONE = Place()

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
class Facts:
    """What a look at an image file has shown.

    Args:
        digest: SHA-256 of the file.
        size: (width, height) in pixels, as it is looked at.
        is_flat: whether all pixels are of one colour.
        origin: what the file says of how it was generated; empty where it says nothing.
    """

    digest: bytes
    size: tuple[int, int]
    is_flat: bool
    origin: str


@dataclass(frozen=True)
class Photo:
    """An image to train on, and what it shows.

    Args:
        name: by which messages call it.
        prompt: that describes it.
        read: returns the bytes of the image file.
        facts: None until somebody has looked.
    """

    name: str
    prompt: str
    read: Callable[[], bytes]
    facts: Facts | None = None


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


def load_image(photo: Photo, resolution: int | None = None) -> Image.Image:
    """Returns an image as RGB, turned the way its EXIF orientation says, transparency laid over white.

    Args:
        photo: that may have been looked at.
        resolution: its shorter side is scaled down to this; None leaves the size as it is.

    Raises:
        UserError: if it is not a whole image, or not the one that was looked at.
    """
    image, facts = _decode(photo, resolution)
    if photo.facts is not None and photo.facts.digest != facts.digest:
        raise UserError(
            f"the image {photo.name} is not the one that was there when the run began: leave images as they are while "
            "a run reads them, and give all its processes folders of one file system"
        )
    return image


def look_at(photo: Photo, resolution: int | None = None) -> Photo:
    """Returns a photo with its facts, having decoded it once; at a `resolution` it is kept for `scaled_image`.

    Raises:
        UserError: if it is not a whole image.
    """
    image, facts = _decode(photo, resolution)
    if resolution is not None:
        _scaled.keep((facts.digest, resolution), image)
    return dataclasses.replace(photo, facts=facts)


def _decode(photo: Photo, resolution: int | None) -> tuple[Image.Image, Facts]:
    try:
        content = photo.read()
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            stored = image.size
            if resolution is not None:
                # A JPEG is decoded to a half, a quarter or an eighth in a third of the time. Twice the pixels that are
                # wanted are left for the filter, whose result is the same to the eye.
                image.draft(None, tuple(2 * side for side in scaled_size(stored, resolution)))
            origin = image.info.get(ORIGIN)
            upright, turned = _upright(image)
            size = stored[::-1] if turned else stored
            pixels = _resized(_as_rgb(upright), size if resolution is None else scaled_size(size, resolution))
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
        if (file := getattr(error, "filename", None)) and str(file) != photo.name:  # that a data set's row names
            reason += f": {file}"
        raise UserError(f"cannot read the image {photo.name}: {reason}; replace or remove it") from error
    return pixels, Facts(
        digest=hashlib.sha256(content).digest(),
        size=size,
        is_flat=all(low == high for low, high in pixels.getextrema()),
        origin=origin if isinstance(origin, str) else "",
    )


def _upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """Returns an image turned the way its EXIF orientation says, and whether width and height have changed places.

    Where the orientation cannot be read the image is as it was.
    """
    image.load()
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # What Pillow raises for bytes that are no EXIF data has no limit; the pixels are whole.
        return image, False
    return (image.transpose(TURNS[orientation]), orientation >= 5) if orientation in TURNS else (image, False)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits per pixel, which `convert` would clip at 255.
        gray = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(gray.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def scaled_size(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Returns the size of an image whose shorter side is scaled down to `resolution`, if it is longer."""
    shorter = min(size)
    if shorter <= resolution:
        return size
    width, height = (max(resolution, round(side * resolution / shorter)) for side in size)
    return width, height


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)  # which Pillow antialiases


class _RecentlyUsed:
    """Images by key, those used last, of so many bytes in all."""

    def __init__(self, limit: int):
        self.limit = limit
        self.images: collections.OrderedDict[tuple, Image.Image] = collections.OrderedDict()
        self.bytes = 0
        self.lock = threading.Lock()
        self.being_made: dict[tuple, threading.Lock] = collections.defaultdict(threading.Lock)

    def find_or_make(self, key: tuple, make: Callable[[], Image.Image]) -> Image.Image:
        """Returns the image of a key; threads that ask for one that is not there wait for the first to make it."""
        with self.lock:
            being_made = self.being_made[key]
        with being_made:
            image = self.find(key)
            if image is None:
                image = make()
                self.keep(key, image)
        return image

    def find(self, key: tuple) -> Image.Image | None:
        """Returns the image of a key, None where it is not there."""
        with self.lock:
            if key in self.images:
                self.images.move_to_end(key)
            return self.images.get(key)

    def keep(self, key: tuple, image: Image.Image) -> None:
        """Adds an image, and lets go of those that nobody has used for the longest time."""
        with self.lock:
            if key not in self.images:
                self.images[key] = image
                self.bytes += _bytes_of(image)
            while self.bytes > self.limit:
                self.bytes -= _bytes_of(self.images.popitem(last=False)[1])


def _bytes_of(image: Image.Image) -> int:
    return image.width * image.height * 3


# Worker processes start with what the trainer's own has decoded, and share its memory.
_scaled = _RecentlyUsed(CACHE_BYTES)


def scaled_image(photo: Photo, resolution: int) -> Image.Image:
    """Returns `load_image` of a photo, decoded once as long as the memory for such images lasts.

    Raises:
        UserError: as `load_image` does.
    """
    if photo.facts is None:
        return load_image(photo, resolution)
    return _scaled.find_or_make((photo.facts.digest, resolution), lambda: load_image(photo, resolution))


def images_to_use(wanted: int | None, test_run: bool) -> int | None:
    """Returns how many images of a folder a run uses: `wanted` (None: all), but 10 at most in a --test_run."""
    if not test_run:
        return wanted
    return TEST_RUN_IMAGES if wanted is None else min(wanted, TEST_RUN_IMAGES)


def images_per_epoch(prior: PriorFlags, instance_images: list[Photo], test_run: bool) -> int:
    """Returns the size of the larger of the two sets of images, of which those of the class may not be there yet."""
    class_images = images_to_use(prior.num_class_images, test_run) if prior.with_prior_preservation else 0
    return max(len(instance_images), class_images)


def find_images(
    folder: str, flag: str, limit: int | None = None, *, resolution: int | None = None, place: Place = ALONE
) -> list[Photo]:
    """Returns the first `limit` images of `folder` (all if None), each decoded once to see that it can be.

    Args:
        folder: is not looked into further.
        flag: that names it.
        limit: see above.
        resolution: at which the images are going to be used.
        place: of this process, which looks at its share; `facts_of_all` brings those of all shares together.

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
    return look_at_share([photo_of(path) for path in paths], resolution, place)


def look_at_share(photos: list[Photo], resolution: int | None, place: Place) -> list[Photo]:
    """Returns photos, those of this process's share with their facts.

    Raises:
        UserError: for the first of them that is not a whole image.
    """
    share = photos[place.rank :: place.world_size]
    looked = list(photos)
    look = functools.partial(look_at, resolution=resolution)
    looked[place.rank :: place.world_size] = in_threads(look, share, threads=cores_of(place), desc="checking images")
    return looked


def facts_of_all(photos: list[Photo], resolution: int | None = None) -> list[Photo]:
    """Returns photos with all their facts, brought together from all ranks' shares; to be called on every rank.

    One that only this rank has found is looked at here. Whoever reads an image later than that compares it with what
    another rank has seen (`load_image`).

    Raises:
        UserError: as `look_at` does.
    """
    seen: dict[str, Facts] = {}
    for facts in from_all_ranks({photo.name: photo.facts for photo in photos if photo.facts is not None}):
        seen |= facts
    return [
        dataclasses.replace(photo, facts=seen[photo.name]) if photo.name in seen else look_at(photo, resolution)
        for photo in photos
    ]


def square_in(size: tuple[int, int], offset: int) -> tuple[int, int, int]:
    """Returns (left, top, side) of a square of an image's shorter side, in pixels.

    Args:
        size: (width, height) of the image.
        offset: pixels of the longer side, left of the square or above it.
    """
    width, height = size
    return (offset, 0, height) if width > height else (0, offset, width)


def crop_to_square(image: Image.Image, resolution: int, offset: int) -> torch.Tensor:
    """Returns the square of the image's shorter side, scaled to `resolution` if that side is another.

    Args:
        image: RGB image of any size.
        resolution: side of the result, in pixels.
        offset: as of `square_in`.

    Returns:
        Tensor of shape (3, resolution, resolution), float32, in [-1, 1].
    """
    left, top, side = square_in(image.size, offset)
    image = F.resized_crop(image, top, left, side, side, [resolution, resolution], antialias=True)
    return F.normalize(F.to_tensor(image), [0.5], [0.5])


class NotFinite(ValueError):
    """Image `index` of several, counted from 0, has pixels that are not finite."""

    def __init__(self, index: int):
        super().__init__(f"image {index} has pixels that are not finite")
        self.index = index


def warn_of_small_images(photos: list[Photo], resolution: int, what: str = "subject") -> None:
    """Tells of images that are enlarged: a photo in the wrong place, or a preview, is one.

    Args:
        photos: with their facts.
        resolution: of the training images, in pixels.
        what: they are of, for what is told.
    """
    small = [photo for photo in photos if min(photo.facts.size) < resolution]
    if small:
        smallest = min(small, key=lambda photo: min(photo.facts.size))
        width, height = smallest.facts.size
        has, are = ("has", "is") if len(small) == 1 else ("have", "are")
        warn(
            f"{len(small)} of {counted(len(photos), 'image')} of the {what} {has} a side of less than {resolution} "
            f"pixels, and {are} enlarged: {smallest.name} has {width} x {height}"
        )


def pictures_of(images: np.ndarray) -> list[Image.Image]:
    """Returns images as diffusers converts them, which makes black of what is no number.

    Args:
        images: (images, height, width, 3), floats in [0, 1].

    Raises:
        NotFinite: naming the first image that is not finite.
    """
    finite = np.isfinite(images).all(axis=(1, 2, 3))
    if not finite.all():
        raise NotFinite(int(finite.argmin()))
    return [Image.fromarray(image) for image in (images * 255).round().astype(np.uint8)]


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """Yields a hidden name beside `path`; a file of that name is gone afterwards."""
    partial = partial_name(path)
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def save_new(content: bytes, path: Path) -> bool:
    """Writes a file under another name and renames it, but where one is there by now: that is kept.

    Returns:
        Whether it was written.
    """
    with _partial(path) as partial:
        write_through(partial, content)
        try:
            os.link(partial, path)
        except FileExistsError:
            if path.is_file():
                return False
            raise
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            # A file system without hard links, such as exFAT.
            if path.is_file():
                return False
            os.replace(partial, path)
        return True


def png_of(image: Image.Image, origin: str) -> bytes:
    """Returns a PNG file that says what it was generated from, as ASCII text."""
    text = PngImagePlugin.PngInfo()
    text.add_text(ORIGIN, origin)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=text)
    return file.getvalue()
