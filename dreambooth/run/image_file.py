"""Files that show images to a person: written whole, and never over one that another program has made.

    python -m dreambooth.run.image_file comparison.png

checks that images can be written to a file, as the launchers do before they train.
"""

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dreambooth.command_line.console import RunError, UserError, first_line, run_program, warn
from dreambooth.command_line.paths import partial_name, path, unwritable, write_through

SOFTWARE = 0x0131  # the EXIF tag that names the program that made an image


def format_of(path: Path) -> str:
    """Returns Pillow's name of the format that a file's name ends with."""
    return Image.registered_extensions()[path.suffix.lower()]


def encoded(image: Image.Image, format: str) -> bytes:
    """Returns an image file with a mark of this program, and of the pixels that a reader sees in it."""
    plain = _encode(image, format, "")
    with _of_any_size(), Image.open(io.BytesIO(plain)) as seen:
        return _encode(image, format, _mark(seen))


@contextlib.contextmanager
def _of_any_size() -> Iterator[None]:
    """Within it Pillow opens images of any size; a sheet may be larger than it takes for good, from somebody else."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _encode(image: Image.Image, format: str, software: str) -> bytes:
    exif = Image.Exif()
    exif[SOFTWARE] = software
    file = io.BytesIO()
    image.save(file, format, exif=exif)
    return file.getvalue()


def _mark(image: Image.Image) -> str:
    return f"dreambooth {hashlib.sha256(image.convert('RGB').tobytes()).hexdigest()[:16]}"


def is_ours(file: Path | io.BytesIO) -> bool:
    """Whether an image file is as `save_image` has written it: not another's, and not edited since."""
    try:
        with _of_any_size(), Image.open(file) as image:
            software = image.getexif().get(SOFTWARE)
            return software is not None and software == _mark(image)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, OverflowError, MemoryError):
        return False


def check_image_file(path: Path, flag: str) -> None:
    """Finds what would keep images from being written to a file.

    Raises:
        UserError: if the name is not that of an image which can be marked, or is that of something else, or nothing
            can be written there.
    """
    try:
        can_be_marked = is_ours(io.BytesIO(encoded(Image.new("RGB", (16, 16)), format_of(path))))
    except (KeyError, OSError, ValueError):
        can_be_marked = False
    if not can_be_marked:
        raise UserError(f"{flag} {path}: the name has to end in .png, .jpg, .jpeg, .webp or .tiff")
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; name a file")
    file = Path(os.path.realpath(path))  # where a link leads, as it stays one
    problems = unwritable(flag, str(file.parent))
    if problems:
        raise UserError(problems[0])
    try:
        partial_name(file).lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be made: {error.strerror}") from error
    if path.exists() and not is_ours(path):
        raise UserError(
            f"{flag} {path} is there, and is not as this program makes them: move it away, or name another place"
        )


def save_image(image: Image.Image, path: Path) -> None:
    """Writes an image under another name and renames it: it is a whole file, or what was there before.

    Raises:
        RunError: if it cannot be written; the message says where it is then, if it could be written as a PNG.
    """
    file = Path(os.path.realpath(path))  # a link stays one
    partial = partial_name(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_through(partial, encoded(image, format_of(path)))
        os.replace(partial, file)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if format_of(path) == "PNG":
            raise RunError(f"cannot write {path}: {first_line(error)}") from error
        other = free_name(path)  # which may be larger than a JPEG or WebP
        save_image(image, other)
        raise RunError(f"cannot write {path}: {first_line(error)}; the images are in {other}") from error


def still_ours(path: Path) -> Path:
    """Returns a path; or, if somebody has put another file there since it was looked at, the name of a free one."""
    if not path.exists() or is_ours(path):
        return path
    other = free_name(path)
    warn(f"{path} has come to be there, and is not as this program makes them: the images go to {other}")
    return other


def free_name(path: Path) -> Path:
    """Returns the name of a PNG beside `path` that is not there, or is of this program."""
    names = (path.with_name(f"{path.name}{number or ''}.png") for number in range(sys.maxsize))
    return next(name for name in names if not name.exists() or is_ours(name))


def main(argv: Sequence[str] | None = None) -> None:
    (file,) = sys.argv[1:] if argv is None else argv
    check_image_file(Path(path(file)), "COMPARISON")


if __name__ == "__main__":
    run_program(main, "comparison")
