"""A corpus of bad and odd input: what is bad ends in one line, what is only odd is used as a person would expect.

`CASES` has them all, by name.
"""

import contextlib
import io
import itertools
import json
import math
import os
import pickle
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from harness import COLOSSALAI, ROOT, TRADITIONAL, Run, scalars, train
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from dreambooth.command_line.console import UserError
from dreambooth.data.images import find_images, load_image
from dreambooth.data.samples import build_loader
from dreambooth.data.schedule import Schedule
from dreambooth.processes.ranks import Ranks

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
NAMES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}


@dataclass(frozen=True)
class Case:
    """Flags that differ from those of a good run, and how the run ends.

    Args:
        flags: the flags that differ; or what makes them from an empty folder and the good flags.
        error: part of the error line; None where the run succeeds.
        warning: part of a warning.
    """

    flags: dict | Callable[[Path, dict], dict]
    error: str | None = None
    warning: str | None = None


# Images -------------------------------------------------------------------------------------------------------------


def picture(width: int = 48, height: int = 32) -> Image.Image:
    """Blocks of 16 px, which JPEG keeps, no two alike."""
    y, x = np.mgrid[:height, :width] // 16
    return Image.fromarray(np.stack([x * 80 % 256, y * 90 % 256, (x + y) * 50 % 256], axis=-1).astype(np.uint8))


FINE = {"quality": 95, "subsampling": 0}


def content(format: str = "PNG", image: Image.Image | None = None, **options) -> bytes:
    """Returns the bytes of an image file."""
    stream = io.BytesIO()
    (image or picture()).save(stream, format, **options)
    return stream.getvalue()


def half(format: str) -> bytes:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = content(format, noise)
    return whole[: len(whole) // 2]


def png_of_size(width: int, height: int) -> bytes:
    """Returns a PNG with a valid header and nearly no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def damaged_png() -> bytes:
    whole = bytearray(content())
    whole[len(whole) // 2] ^= 0xFF
    return bytes(whole)


def float_tiff() -> bytes:
    return content("TIFF", Image.fromarray(np.ones((8, 8), np.float32)))


UNKNOWN = "it is none of PNG, JPEG, WebP, BMP and GIF, or torn"
# Name of the file, its bytes, and what the line says besides the name.
BAD_IMAGES = {
    "truncated png": ("x.png", half("PNG"), "truncated"),
    "truncated jpeg": ("x.jpg", half("JPEG"), "truncated"),
    "truncated webp": ("x.webp", half("WEBP"), "cannot read the image"),
    "truncated bmp": ("x.bmp", half("BMP"), "truncated"),
    "truncated gif named png": ("x.png", half("GIF"), "cannot read the image"),
    "flipped bits": ("x.png", damaged_png(), "cannot read the image"),
    "empty": ("x.png", b"", UNKNOWN),
    "one byte": ("x.jpg", b"\xff", UNKNOWN),
    "png signature only": ("x.png", b"\x89PNG\r\n\x1a\n", "cannot read the image"),
    "jpeg without its last byte": ("x.jpg", content("JPEG")[:-1], "truncated"),
    "jpeg header only": ("x.jpg", content("JPEG")[:200], "cannot read the image"),
    "zeros": ("x.png", bytes(4096), UNKNOWN),
    "text named png": ("x.png", b"this is no picture\n", UNKNOWN),
    "web page named jpg": ("x.jpg", b"<!DOCTYPE html><html>not found</html>", UNKNOWN),
    "svg named png": ("x.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", UNKNOWN),
    "postscript named png": ("x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", UNKNOWN),
    "pdf named png": ("x.png", b"%PDF-1.4\n%%EOF\n", UNKNOWN),
    "zip named png": ("x.png", b"PK\x03\x04" + bytes(100), UNKNOWN),
    "heic named jpg": ("x.jpg", b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100), UNKNOWN),
    "float tiff named png": ("x.png", float_tiff(), UNKNOWN),
    "decompression bomb": ("x.png", png_of_size(60_000, 60_000), "more than 178 megapixels; scale it down"),
    "largest size of a png": ("x.png", png_of_size(2**31 - 1, 2**31 - 1), "more than 178 megapixels"),
    "no width": ("x.png", png_of_size(0, 10), "cannot read the image"),
    "broken, newline in the name": ("a\nb.png", b"", r"a\nb.png"),
    "broken, terminal codes in the name": ("\x1b[31mred\x07.png", b"", r"\x1b[31mred\x07.png"),
    "broken, bytes that are no text in the name": (os.fsdecode(b"\xff.png"), b"", r"\udcff.png"),
    "broken, line separator in the name": ("a\u2028b.png", b"", r"a\u2028b.png"),
    "broken, capital suffix": ("X.JPG", b"", "X.JPG"),
}


def no_data_set(name: str) -> Callable[[Path, dict], dict]:
    """Returns what makes a file of that name that is no data set."""

    def make(folder: Path, flags: dict) -> dict:
        (folder / name).write_bytes(b"hello")
        return {"dataset_name": folder / name, "instance_data_dir": None}

    return make


def with_images(files: dict[str, bytes]) -> Callable[[Path, dict], dict]:
    """Returns what makes a folder of good photos and `files`."""

    def make(folder: Path, flags: dict) -> dict:
        images = folder / "images"
        shutil.copytree(flags["instance_data_dir"], images)
        for name, body in files.items():
            (images / name).write_bytes(body)
        return {"instance_data_dir": images}

    return make


def with_link(target: str) -> Callable[[Path, dict], dict]:
    """Returns what makes a folder of good photos and a link."""

    def make(folder: Path, flags: dict) -> dict:
        changed = with_images({})(folder, flags)
        (changed["instance_data_dir"] / "link.png").symlink_to(target)
        return changed

    return make


def orientation(number: int) -> bytes:
    """Returns a JPEG that is stored turned and says so."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = number
    stored = picture().transpose(undo[number]) if number in undo else picture()
    return content("JPEG", stored, exif=exif, **FINE)


def exif_with_a_wrong_type(number: int) -> bytes:
    """Returns EXIF data with an orientation and a resolution that is text, which Pillow reads and cannot write."""
    tags = struct.pack(">HHIHH", 0x0112, 3, 1, number, 0) + struct.pack(">HHI4s", 0x011A, 2, 4, b"abc")
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + tags + bytes(4)


def animation(format: str) -> bytes:
    frames = [Image.new("RGB", picture().size, color) for color in ("red", "blue")]
    return content(format, picture(), save_all=True, append_images=frames, lossless=True)


def over_white(alpha: int, color: tuple[int, int, int]) -> np.ndarray:
    return np.array([round((alpha * c + (255 - alpha) * 255) / 255) for c in color])


def gray_ramp() -> np.ndarray:
    """All tones from black to white, in 16 bits."""
    return np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)


def palette(transparency: int | bytes) -> bytes:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return content("PNG", image, transparency=transparency)


def text_chunk() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 100_000)
    return info


UPRIGHT = np.array(picture())
EIGHT_BITS = np.repeat((gray_ramp() / 257).round().astype(np.uint8)[..., None], 3, axis=-1)
BITS = np.kron(np.eye(4, dtype=np.uint8), np.full((8, 8), 255, np.uint8))
# Name of the file, its bytes, the pixels that are used, and by how much they may be off.
ODD_IMAGES = {
    "jpeg named png": ("x.png", content("JPEG", **FINE), UPRIGHT, 6),
    "png named jpg": ("x.jpg", content("PNG"), UPRIGHT, 0),
    "webp named bmp": ("x.bmp", content("WEBP", lossless=True), UPRIGHT, 0),
    "capital suffix": ("X.PNG", content(), UPRIGHT, 0),
    "capital suffix of a jpeg": ("X.JPG", content("JPEG", **FINE), UPRIGHT, 6),
    "spaces in the name": (" my  photo .png", content(), UPRIGHT, 0),
    "quotes in the name": ('it\'s "mine".png', content(), UPRIGHT, 0),
    "newline in the name": ("a\nb.png", content(), UPRIGHT, 0),
    "letters of other scripts in the name": ("фото 写真 كلب 🐶.png", content(), UPRIGHT, 0),
    "decomposed letters in the name": ("u\u0308.png", content(), UPRIGHT, 0),
    "bytes that are no text in the name": (os.fsdecode(b"\xff\xfe.png"), content(), UPRIGHT, 0),
    "leading dash in the name": ("-x.png", content(), UPRIGHT, 0),
    "flag for a name": ("--seed.png", content(), UPRIGHT, 0),
    "format codes in the name": ("{0}%s%n$HOME.png", content(), UPRIGHT, 0),
    "backslash in the name": ("a\\b.png", content(), UPRIGHT, 0),
    "long name": ("x" * 251 + ".png", content(), UPRIGHT, 0),
    "two suffixes": ("x.txt.png", content(), UPRIGHT, 0),
    "cmyk jpeg": ("x.jpg", content("JPEG", picture().convert("CMYK"), **FINE), UPRIGHT, 12),
    "jpeg with a second picture": (
        "x.jpg",
        content("MPO", save_all=True, append_images=[picture()], **FINE),
        UPRIGHT,
        6,
    ),
    "progressive jpeg": ("x.jpg", content("JPEG", progressive=True, **FINE), UPRIGHT, 6),
    "gray jpeg": ("x.jpg", content("JPEG", Image.new("L", (16, 16), 77)), np.full((16, 16, 3), 77), 1),
    "gray with 16 bits": ("x.png", content("PNG", Image.fromarray(gray_ramp())), EIGHT_BITS, 0),
    "palette with a transparent color": ("x.png", palette(1), np.full((20, 20, 3), 255), 0),
    "palette with alpha": (
        "x.png",
        palette(bytes([255, 102])),
        np.broadcast_to(over_white(102, (200, 100, 50)), (20, 20, 3)),
        1,
    ),
    "gray with alpha": (
        "x.png",
        content("PNG", Image.new("LA", (9, 9), (40, 51))),
        np.broadcast_to(over_white(51, (40, 40, 40)), (9, 9, 3)),
        1,
    ),
    "color with alpha": (
        "x.webp",
        content("WEBP", Image.new("RGBA", (9, 9), (200, 100, 50, 153)), lossless=True),
        np.broadcast_to(over_white(153, (200, 100, 50)), (9, 9, 3)),
        1,
    ),
    "one bit": ("x.png", content("PNG", Image.fromarray(BITS).convert("1")), np.stack([BITS] * 3, axis=-1), 0),
    "animated gif named png": ("x.png", animation("GIF"), UPRIGHT, 0),
    "animated webp": ("x.webp", animation("WEBP"), UPRIGHT, 0),
    "animated png": ("x.png", animation("PNG"), UPRIGHT, 0),
    "orientation that does not exist": ("x.jpg", orientation(9), UPRIGHT, 6),
    "damaged exif": ("x.jpg", content("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", **FINE), UPRIGHT, 6),
    "orientation beside a tag of another type": (
        "x.jpg",
        content("JPEG", picture().transpose(Image.Transpose.ROTATE_90), exif=exif_with_a_wrong_type(6), **FINE),
        UPRIGHT,
        6,
    ),
    "exif that is none": ("x.jpg", content("JPEG", exif=b"Exif\0\0nonsense", **FINE), UPRIGHT, 6),
    "color profile that is none": ("x.jpg", content("JPEG", icc_profile=b"nonsense", **FINE), UPRIGHT, 6),
    "bytes after the end": ("x.png", content() + b"and more", UPRIGHT, 0),
    "long comment": ("x.png", content(pnginfo=text_chunk()), UPRIGHT, 0),
    "one pixel": ("x.png", content("PNG", picture(1, 1)), np.array(picture(1, 1)), 0),
    "one pixel wide": ("x.png", content("PNG", picture(1, 900)), np.array(picture(1, 900)), 0),
    "30,000 by 1": ("x.png", content("PNG", picture(30_000, 1)), np.array(picture(30_000, 1)), 0),
    "30,000 by 4": ("x.png", content("PNG", picture(30_000, 4)), np.array(picture(30_000, 4)), 0),
    "1 by 30,000": ("x.bmp", content("BMP", picture(1, 30_000)), np.array(picture(1, 30_000)), 0),
    **{f"orientation {n}": (f"{n}.jpg", orientation(n), UPRIGHT, 6) for n in range(1, 9)},
}

IMAGES = {name: Case(with_images({file: body}), error) for name, (file, body, error) in BAD_IMAGES.items()} | {
    "link to nothing": Case(with_link("/nowhere/photo.png"), "link.png: No such file or directory"),
    "link to itself": Case(with_link("link.png"), "link.png: Too many levels of symbolic links"),
    "100 megapixels": Case(
        with_images({"x.png": content("PNG", Image.new("1", (9500, 9500)), compress_level=1)}),
    ),
}


# Folders ------------------------------------------------------------------------------------------------------------


def entries(*names: str, photos: bool = False) -> Callable[[Path, dict], dict]:
    """Returns what makes a folder of these files, each a good image whatever its name; with `photos` beside others."""

    def make(folder: Path, flags: dict) -> dict:
        images = folder / "images"
        if photos:
            shutil.copytree(flags["instance_data_dir"], images)
        images.mkdir(exist_ok=True)
        for name in names:
            (images / name).parent.mkdir(exist_ok=True)
            (images / name).write_bytes(content())
        return {"instance_data_dir": images}

    return make


def file_for(flag: str, *inside: str) -> Callable[[Path, dict], dict]:
    """Returns what makes a file and names it, or a folder inside it, in a flag."""

    def make(folder: Path, flags: dict) -> dict:
        (folder / "file").write_text("mine")
        return {flag: folder.joinpath("file", *inside)}

    return make


def prior(folder: Path, **changed) -> dict:
    """Returns the flags of prior preservation with two class images."""
    return {
        "with_prior_preservation": True,
        "class_data_dir": folder / "class_images",
        "class_prompt": "a photo of dog",
        "num_class_images": 2,
    } | changed


def with_class_images(*bodies: bytes, **changed) -> Callable[[Path, dict], dict]:
    """Returns what makes a folder of class images, of which others are still to be generated."""

    def make(folder: Path, flags: dict) -> dict:
        (folder / "class_images").mkdir()
        for number, body in enumerate(bodies):
            (folder / "class_images" / f"mine{number}.png").write_bytes(body)
        return prior(folder) | {"num_class_images": len(bodies) + 1} | changed

    return make


def pipe_beside_photos(folder: Path, flags: dict) -> dict:
    changed = with_images({})(folder, flags)
    os.mkfifo(changed["instance_data_dir"] / "pipe.png")
    return changed


def many_files(folder: Path, flags: dict) -> dict:
    (folder / "images").mkdir()
    body = content("PNG", picture(20, 20))
    for number in range(2000):
        (folder / "images" / f"{number}.png").write_bytes(body)
    return {"instance_data_dir": folder / "images"}


def linked(flag: str) -> Callable[[Path, dict], dict]:
    """Returns what names a folder by a link to it."""

    def make(folder: Path, flags: dict) -> dict:
        (folder / "link").symlink_to(Path(flags[flag]).resolve())
        return {flag: folder / "link"}

    return make


def same_folder_by_a_link(folder: Path, flags: dict) -> dict:
    (folder / "class_images").symlink_to(flags["instance_data_dir"])
    return prior(folder)


def output_beside_photos(*inside: str) -> Callable[[Path, dict], dict]:
    def make(folder: Path, flags: dict) -> dict:
        changed = with_images({})(folder, flags)
        return changed | {"output_dir": changed["instance_data_dir"].joinpath(*inside)}

    return make


def log_folder_that_is_a_file(folder: Path, flags: dict) -> dict:
    (folder / "used").mkdir()
    (folder / "used" / "logs").write_text("mine")
    return {"output_dir": folder / "used"}


KINDS = "has no image (png, jpg, jpeg, webp, bmp)"
FOLDERS = {
    "photos missing": Case({"instance_data_dir": "nowhere"}, "--instance_data_dir nowhere is not a folder"),
    "photos missing, newline in the name": Case({"instance_data_dir": "no\nwhere"}, r"no\nwhere is not a folder"),
    "photos, endless name": Case({"instance_data_dir": "x" * 5000}, "is not a folder"),
    "photos are a file": Case(file_for("instance_data_dir"), "file is not a folder"),
    "photos inside a file": Case(file_for("instance_data_dir", "x"), "x is not a folder"),
    "photos empty": Case(entries(), KINDS),
    "photos nested": Case(entries("dogs/1.png", "dogs/2.png"), f"{KINDS}; folders in it, such as dogs, are not"),
    "photos hidden": Case(entries(".1.png", "._2.jpg"), KINDS),
    "photos of a kind that is not read": Case(entries("1.heic", "2.HEIC"), f"{KINDS}: convert 1.heic"),
    "no photo among files": Case(entries("notes.txt", ".DS_Store", "Thumbs.db"), KINDS),
    "system files beside photos": Case(entries(".DS_Store", "Thumbs.db", "._0.png", "desktop.ini", photos=True)),
    "another kind beside photos": Case(entries("1.heic", photos=True), warning="1.heic is passed over (1 such)"),
    "folder named as an image": Case(entries("x.png/y.png", photos=True)),
    "pipe named as an image": Case(pipe_beside_photos),
    "thousands of photos": Case(many_files),
    "photos behind a link": Case(linked("instance_data_dir")),
    "one photo": Case(entries("1.png")),
    "output folder is the model": Case(
        lambda folder, flags: {"output_dir": flags["pretrained_model_name_or_path"]},
        "--output_dir is the folder of --pretrained_model_name_or_path",
    ),
    "class images among the photos": Case(
        lambda folder, flags: prior(folder, class_data_dir=flags["instance_data_dir"]),
        "--class_data_dir is the folder of --instance_data_dir",
    ),
    "class images in the folder of a data set": Case(
        lambda folder, flags: (
            prior(folder, class_data_dir=flags["instance_data_dir"])
            | {"dataset_name": flags["instance_data_dir"], "instance_data_dir": None}
        ),
        "--class_data_dir is the folder of --dataset_name",
    ),
    "class images among the photos, by a link": Case(same_folder_by_a_link, "is the folder of --instance_data_dir"),
    "class folder is a file": Case(
        lambda folder, flags: prior(folder, **file_for("class_data_dir")(folder, flags)),
        "file is a file; name a folder",
    ),
    "class folder inside a file": Case(
        lambda folder, flags: prior(folder, **file_for("class_data_dir", "x")(folder, flags)),
        "x cannot be made: Not a directory",
    ),
    "class image broken": Case(with_class_images(content(), b""), "mine1.png: it is none of PNG"),
    "class image not square, cached": Case(with_class_images(content(), cache_latents="on")),
    "class images of one's own": Case(with_class_images(content(), content("JPEG"), num_class_images=2)),
    "output is a file": Case(file_for("output_dir"), "file is a file; name a folder"),
    "output inside a file": Case(file_for("output_dir", "x", "y"), "y cannot be made: Not a directory"),
    "output, endless name": Case({"output_dir": "x" * 300}, "cannot be made: File name too long"),
    "output inside the photos": Case(output_beside_photos("out")),
    "output among the photos": Case(output_beside_photos()),
    "output with a file for a part": Case(
        lambda folder, flags: {"output_dir": [(folder / "unet").touch(), folder][1]},
        "unet that this program did not write",
    ),
    "output is empty": Case({"output_dir": ""}, "--output_dir '' is blank"),
    "output, newline in the name": Case(lambda folder, flags: {"output_dir": folder / "a\nb é"}),
    "logs are a file": Case(log_folder_that_is_a_file, "logs is a file; name a folder"),
    "output with another program's part": Case(
        lambda folder, flags: {"output_dir": entries("unet/mine.png")(folder, flags)["instance_data_dir"]},
        "unet that this program did not write",
    ),
}


# Models -------------------------------------------------------------------------------------------------------------


def changed_model(change: Callable[[Path], object]) -> Callable[[Path, dict], dict]:
    """Returns what makes a copy of the model and changes it."""

    def make(folder: Path, flags: dict) -> dict:
        model = folder / "model"
        shutil.copytree(flags["pretrained_model_name_or_path"], model)
        change(model)
        return {"pretrained_model_name_or_path": model}

    return make


def changed_vocabulary(change: Callable[[Path], object]) -> Callable[[Path, dict], dict]:
    """Returns what makes a copy of the model with the files of a vocabulary alone, and changes them."""

    def without_the_other(model: Path) -> None:
        (model / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)  # where the library writes both
        change(model / "tokenizer")

    return changed_model(without_the_other)


def change_json(file: str, **changed) -> Callable[[Path, dict], dict]:
    def change(model: Path) -> None:
        (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | changed))

    return changed_model(change)


def change_file(file: str, body: bytes) -> Callable[[Path, dict], dict]:
    return changed_model(lambda model: (model / file).write_bytes(body))


def weights_of(model: Path, part: str) -> Path:
    return model / part / f"{WEIGHTS[part]}.safetensors"


def truncated(part: str, size: int) -> Callable[[Path, dict], dict]:
    return changed_model(lambda model: os.truncate(weights_of(model, part), size))


def change_weights(part: str, change: Callable[[dict], None]) -> Callable[[Path, dict], dict]:
    """Returns what makes a model of which a part's tensors, by name, have been changed."""

    def change_file(model: Path) -> None:
        tensors = load_file(weights_of(model, part))
        change(tensors)
        save_file(tensors, weights_of(model, part), metadata={"format": "pt"})

    return changed_model(change_file)


def first_is(value: float) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[0] = value

    return change


def last_is_missing(tensors: dict) -> None:
    del tensors[max(tensors)]


def all_are_longer(tensors: dict) -> None:
    for name, tensor in tensors.items():
        tensors[name] = torch.cat([tensor, tensor])


def all_are_half(tensors: dict) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.half() if tensor.is_floating_point() else tensor


class Malice:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def mark_in(model: Path) -> Path:
    return model.parent / "code has run"


def pickled(part: str) -> Callable[[Path, dict], dict]:
    """Returns what makes a model of which a part has its weights in the usual pickle file, which also runs code."""

    def change(model: Path) -> None:
        file = model / part / ("pytorch_model.bin" if part == "text_encoder" else f"{WEIGHTS[part]}.bin")
        torch.save(load_file(weights_of(model, part)) | {"more": Malice(mark_in(model))}, file)
        weights_of(model, part).unlink()

    return changed_model(change)


def pickle_named_safetensors(model: Path) -> None:
    weights_of(model, "unet").write_bytes(pickle.dumps(Malice(mark_in(model))))


def pickled_shards(part: str) -> Callable[[Path, dict], dict]:
    """Returns what makes a model of which a part's index of safetensors leads to a pickle file."""

    def change(model: Path) -> None:
        names = list(load_file(weights_of(model, part)))
        weights_of(model, part).unlink()
        torch.save({"more": Malice(mark_in(model))}, model / part / "shard.bin")
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "shard.bin")}
        (model / part / f"{WEIGHTS[part]}.safetensors.index.json").write_text(json.dumps(index))

    return changed_model(change)


def other_unet(**config) -> Callable[[Path, dict], dict]:
    """Returns what makes a model with a whole UNet that has another configuration."""

    def change(model: Path) -> None:
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(model / "unet") | config)
        unet.save_pretrained(model / "unet")

    return changed_model(change)


def other_vae(**config) -> Callable[[Path, dict], dict]:
    def change(model: Path) -> None:
        AutoencoderKL.from_config(AutoencoderKL.load_config(model / "vae") | config).save_pretrained(model / "vae")

    return changed_model(change)


def external_unet(folder: Path, flags: dict) -> dict:
    other = other_unet(cross_attention_dim=48)(folder, flags)["pretrained_model_name_or_path"]
    return {"external_unet_path": other / "unet"}


def external_unet_that_predicts_v(folder: Path, flags: dict) -> dict:
    """A whole model, whose scheduler says so."""
    other = folder / "other"
    shutil.copytree(flags["pretrained_model_name_or_path"], other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    return {"external_unet_path": other}


MODELS = {
    **{
        f"no {part}": Case(changed_model(lambda model, part=part: shutil.rmtree(model / part)), f"model has no {part}")
        for part in ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
    },
    "model missing": Case({"pretrained_model_name_or_path": "./nowhere"}, "./nowhere is not a folder"),
    "a model of one file missing": Case(
        {"pretrained_model_name_or_path": "models/nowhere.safetensors"}, "nowhere.safetensors is not a folder"
    ),
    "model is a file": Case(file_for("pretrained_model_name_or_path"), "file is not a folder"),
    "model folder empty": Case(lambda folder, flags: {"pretrained_model_name_or_path": folder}, "input has no"),
    "model, endless name": Case({"pretrained_model_name_or_path": "/" + "x" * 5000}, "is not a folder"),
    "model behind a link": Case(linked("pretrained_model_name_or_path")),
    "no index": Case(changed_model(lambda model: (model / "model_index.json").unlink()), "cannot read"),
    "index broken": Case(change_file("model_index.json", b"{"), "model_index.json is not that of a Stable Diffusion"),
    "index is a list": Case(change_file("model_index.json", b"[]"), "model_index.json is not that of a Stable"),
    "index is no text": Case(change_file("model_index.json", b"\xff\xfe"), "model_index.json is not that of a Stable"),
    "of a later family": Case(
        change_json(
            "model_index.json",
            _class_name="StableDiffusion3Pipeline",
            text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
        ),
        "is a StableDiffusion3Pipeline, which this project does not train",
    ),
    "another text encoder": Case(
        change_json("model_index.json", _class_name="IFPipeline", text_encoder=["transformers", "T5EncoderModel"]),
        "is a IFPipeline, which this project does not train",
    ),
    "scheduler that does not exist": Case(
        change_json("model_index.json", scheduler=["diffusers", "MagicScheduler"]), "does not have: MagicScheduler"
    ),
    "scheduler that wants a library": Case(
        change_json("model_index.json", scheduler=["diffusers", "DPMSolverSDEScheduler"]), "requires the torchsde"
    ),
    "scheduler that would load others": Case(
        change_json("model_index.json", scheduler=["diffusers", "DiffusionPipeline"]), "not have: DiffusionPipeline"
    ),
    **{
        f"config of the {part} broken": Case(change_file(file, b'{"sample_size": '), f"cannot load the {name} of")
        for part, file, name in (
            ("unet", "unet/config.json", "UNet"),
            ("vae", "vae/config.json", "VAE"),
            ("text encoder", "text_encoder/config.json", "text encoder"),
            ("scheduler", "scheduler/scheduler_config.json", "scheduler"),
            ("tokenizer", "tokenizer/tokenizer_config.json", "tokenizer"),
        )
    },
    "config of the unet is a list": Case(change_file("unet/config.json", b"[]"), "cannot load the UNet of"),
    "config of the unet empty": Case(change_file("unet/config.json", b""), "cannot load the UNet of"),
    "unet without blocks": Case(change_json("unet/config.json", block_out_channels=[]), "cannot load the UNet of"),
    "unet of unknown blocks": Case(
        change_json("unet/config.json", down_block_types=["MagicBlock", "DownBlock2D"]), "cannot load the UNet of"
    ),
    "unet of another size than its config": Case(
        change_json("unet/config.json", block_out_channels=[32, 64]), "cannot load the UNet of"
    ),
    "tokenizer of no length": Case(
        change_json("tokenizer/tokenizer_config.json", model_max_length=-1), "its model_max_length is -1"
    ),
    "vocabulary broken": Case(
        changed_vocabulary(lambda folder: (folder / "vocab.json").write_bytes(b'{"a": ')),
        "cannot load the tokenizer of",
    ),
    "merges of the tokenizer missing": Case(
        changed_vocabulary(lambda folder: (folder / "merges.txt").unlink()), "cannot load the tokenizer of"
    ),
    **{f"{part} truncated": Case(truncated(part, 5000), f"cannot load the {NAMES[part]} of") for part in WEIGHTS},
    **{f"{part} empty": Case(truncated(part, 0), f"cannot load the {NAMES[part]} of") for part in WEIGHTS},
    "unet without a tensor": Case(change_weights("unet", last_is_missing), "input/model/unet"),
    "text encoder without a tensor": Case(change_weights("text_encoder", last_is_missing), "has no weights for "),
    "unet of other shapes": Case(change_weights("unet", all_are_longer), "cannot load the UNet of"),
    "text encoder of other shapes": Case(change_weights("text_encoder", all_are_longer), "cannot load the text enc"),
    **{
        f"NaN in the {part}": Case(change_weights(part, first_is(math.nan)), f"{part} are damaged") for part in WEIGHTS
    },
    "infinity in the unet": Case(change_weights("unet", first_is(math.inf)), "unet are damaged"),
    "half precision": Case(change_weights("unet", all_are_half)),
    **{f"{part} in a pickle": Case(pickled(part), "pickle file (.bin), which may run code") for part in WEIGHTS},
    "pickle named safetensors": Case(changed_model(pickle_named_safetensors), "cannot load the UNet of"),
    "pickle as a shard of the unet": Case(pickled_shards("unet"), "cannot load the UNet of"),
    "pickle as a shard of the text encoder": Case(pickled_shards("text_encoder"), "cannot load the text encoder of"),
    "inpainting": Case(other_unet(in_channels=9), "it is an inpainting model, which cannot be trained here"),
    "unet for other latents": Case(other_unet(in_channels=8, out_channels=8), "the VAE's latents have 4"),
    "unet that returns the variance too": Case(other_unet(out_channels=8), "takes 4 channels and returns 8"),
    "vae of other latents": Case(other_vae(latent_channels=16), "the VAE's latents have 16"),
    "unet for another text encoder": Case(other_unet(cross_attention_dim=48), "prompts of width 48, and this model"),
    "unet of labels": Case(other_unet(num_class_embeds=10), "the UNet wants more than an image and a prompt"),
    "external unet for another text encoder": Case(external_unet, "the UNet reads prompts of width 48"),
    "external unet that predicts something else": Case(
        external_unet_that_predicts_v,
        "is of a model that predicts v_prediction, and the scheduler of --pretrained_model",
    ),
    "external unet is a VAE": Case(
        lambda folder, flags: {"external_unet_path": flags["pretrained_model_name_or_path"] / "vae"},
        "vae is of class AutoencoderKL: name one of UNet2DConditionModel",
    ),
    "external unet is a LoRA": Case(
        lambda folder, flags: (
            Path(folder, "pytorch_lora_weights.safetensors").touch() or {"external_unet_path": folder}
        ),
        "has a LoRA, and no UNet that could be trained",
    ),
    "external unet empty": Case(lambda folder, flags: {"external_unet_path": folder}, "cannot load the UNet of"),
    "external unet is a file": Case(file_for("external_unet_path"), "file is not a folder"),
    "tokenizer of another model": Case(
        {"tokenizer_name": ROOT / "assets/tiny-stable-diffusion/tokenizer"},
        "917 tokens, of which the text encoder knows",
    ),
    "tokenizer missing": Case({"tokenizer_name": "./nowhere"}, "--tokenizer_name ./nowhere is not a folder"),
    "prediction of the sample": Case(
        change_json("scheduler/scheduler_config.json", prediction_type="sample"), "prediction_type 'sample'"
    ),
    "no timesteps": Case(
        change_json("scheduler/scheduler_config.json", num_train_timesteps=0), "cannot load the scheduler of"
    ),
    "noise schedule of NaN": Case(
        change_json("scheduler/scheduler_config.json", trained_betas=[math.nan] * 1000), "cannot load the scheduler of"
    ),
    "unknown noise schedule": Case(
        change_json("scheduler/scheduler_config.json", beta_schedule="magic"), "cannot load the scheduler of"
    ),
}


# Flags --------------------------------------------------------------------------------------------------------------

BILLIONS = str(10**18)
VALUES = ("0", "-1", "1e30", BILLIONS, "nan", "inf", "", "12 apples", "9" * 5000)
# Which of these values each flag takes.
NUMBERS = {
    "resolution": (),
    "num_class_images": (),
    "sample_batch_size": (),
    "prior_loss_weight": ("0",),
    "train_batch_size": (),
    "gradient_accumulation_steps": (),
    "num_train_epochs": (),
    "max_train_steps": (),
    "seed": ("0",),
    "local_rank": ("0", "-1", BILLIONS),
    "learning_rate": ("0",),
    "lr_warmup_steps": ("0", BILLIONS),
    "max_grad_norm": ("0", "1e30", BILLIONS),
    "snr_gamma": (),
    "noise_offset": ("0",),
    "num_validation_images": (),
    "validation_steps": (BILLIONS,),
    "adam_beta1": ("0",),
    "adam_beta2": ("0",),
    "adam_weight_decay": ("0",),
    "adam_epsilon": (),
    "save_steps": (BILLIONS,),
    "checkpoints_total_limit": (BILLIONS,),
    "offload_optim_frac": (),
    "dataloader_num_workers": ("0",),
    "lr_num_cycles": (BILLIONS,),
    "lr_power": ("0",),
}


def zeros_and_billions(value: str) -> dict:
    """Returns all flags that take a value, with it."""
    return {flag: value for flag, taken in NUMBERS.items() if value in taken}


FLAGS = {
    f"{flag} {value[:20]!r}": Case({flag: value}, f"--{flag}")
    for flag, taken in NUMBERS.items()
    for value in VALUES
    if value not in taken
} | {
    "all that may be 0": Case(zeros_and_billions("0")),
    "all that may be huge": Case(zeros_and_billions(BILLIONS)),
    "an epoch of a billion steps": Case(
        {"num_train_epochs": 10**9, "max_train_steps": 1}, warning="--num_train_epochs: no effect"
    ),
    "epsilon that float32 does not have": Case({"adam_epsilon": "1e-60"}, "--adam_epsilon: '1e-60' is not a number"),
    "large rate and epsilon": Case({"learning_rate": 1e3, "adam_epsilon": 1e3}),
    "zero without half precision": Case(
        {"plugin": "low_level_zero", "mixed_precision": "no"}, "--plugin low_level_zero needs a CUDA GPU"
    ),
    "ddp on auto": Case({"plugin": "torch_ddp", "placement": "auto"}, "--plugin torch_ddp goes with --placement cuda"),
    "ddp on cpu": Case({"plugin": "torch_ddp", "placement": "cpu"}, "--plugin torch_ddp goes with --placement cuda"),
    "ddp offloaded": Case({"plugin": "torch_ddp", "offload_optim_frac": 0.5}, "--offload_optim_frac goes with"),
    "ddp on a disk": Case(
        {"plugin": "torch_ddp", "offload_dir": "."}, "--offload_dir goes with --plugin low_level_zero"
    ),
    "plugin empty": Case({"plugin": ""}, "--plugin: invalid choice: ''"),
    "plugin of two lines": Case({"plugin": "a\nb"}, r"invalid choice: 'a\nb'"),
    "unknown flag of two lines": Case({"no\nflag": True}, r"unrecognized arguments: --no\nflag"),
    "stray word": Case({"center_crop": "yes"}, "unrecognized arguments: yes"),
    "abbreviated flag": Case({"instance_data": "x"}, "unrecognized arguments: --instance_data x"),
    "value for a switch": Case({"center_crop=yes": True}, "--center_crop: ignored explicit argument 'yes'"),
    "polynomial schedule from below its end": Case(
        {"lr_scheduler": "polynomial", "learning_rate": 1e-7},
        "polynomial falls to 1e-07: give a --learning_rate above",
    ),
    "polynomial schedule of no step": Case(
        {"lr_scheduler": "polynomial", "lr_warmup_steps": 1}, "--lr_warmup_steps 1 leaves no step in which"
    ),
    "unknown schedule": Case({"lr_scheduler": "magic"}, "--lr_scheduler: invalid choice: 'magic'"),
    "class images in what no CPU draws in": Case(
        lambda folder, flags: prior(folder, prior_generation_precision="fp16"), "fp16 needs a CUDA GPU"
    ),
    "prior without a prompt": Case(
        lambda folder, flags: prior(folder, class_prompt=None), "--with_prior_preservation also needs --class_prompt"
    ),
    "prior without a folder": Case(
        {"with_prior_preservation": True, "class_prompt": "a dog"}, "also needs --class_data_dir"
    ),
    "prior with an empty folder name": Case(
        lambda folder, flags: prior(folder, class_data_dir=""), "--class_data_dir '' is blank"
    ),
    "checkpoint missing": Case(
        {"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint: nowhere is not a whole"
    ),
    "checkpoint is a file": Case(file_for("resume_from_checkpoint"), "file is not a whole checkpoint"),
    "checkpoint empty": Case(lambda folder, flags: {"resume_from_checkpoint": folder}, "is not a whole checkpoint"),
    "latest of none": Case(
        {"resume_from_checkpoint": "latest"}, warning="has no checkpoint, starting from the beginning"
    ),
    "cache of crops that move": Case({"cache_latents": "on"}),
    "cache of crops at the centre": Case({"cache_latents": "on", "center_crop": True}),
    "resolution between": Case(
        {"resolution": 33}, "is not a multiple of 2, the factor of this model's VAE: use 32 or 34"
    ),
    "resolution below the factor": Case({"resolution": 1}, "--resolution 1 is not a multiple of 2"),
    "photos that are enlarged": Case(
        {"resolution": 64}, warning="have a side of less than 64 pixels, and are enlarged"
    ),
    "class images that are enlarged": Case(
        lambda folder, flags: with_class_images(content(), num_class_images=1)(folder, flags) | {"resolution": 64},
        warning="1 of 1 image of the class has a side of less than 64 pixels, and is enlarged",
    ),
    "a long validation prompt": Case(
        {"validation_prompt": "dog " * 100, "num_validation_images": 1},
        warning="is longer than the 75 tokens that fit",
    ),
    "nothing said of steps": Case(
        {"max_train_steps": None, "train_batch_size": 5},
        warning="one pass over the images is 1 step: --max_train_steps",
    ),
    "more samples than images": Case({"train_batch_size": 12}),
    "more test images than there are": Case({"test_run": "TRUE"}),
}


# Prompts ------------------------------------------------------------------------------------------------------------


def same_prompts(folder: Path, flags: dict) -> dict:
    changed = with_class_images(content(), num_class_images=1)(folder, flags)
    return changed | {"class_prompt": f" {flags['instance_prompt']}"}


NOTHING = "is blank"
PROMPTS = {
    "prompt empty": Case({"instance_prompt": ""}, f"--instance_prompt '' {NOTHING}"),
    "prompt of spaces": Case({"instance_prompt": "  \t "}, NOTHING),
    "prompt of line ends": Case({"instance_prompt": "\n\r\n"}, rf"--instance_prompt '\n\r\n' {NOTHING}"),
    "prompt of control characters": Case({"instance_prompt": "\x01\x1b\x7f"}, NOTHING),
    "prompt of no width": Case({"instance_prompt": "\u200b\ufeff"}, NOTHING),
    "output folder that is no text": Case({"output_dir": os.fsdecode(b"out\xff")}, "is not valid UTF-8: name another"),
    "prompt that is no text": Case({"instance_prompt": os.fsdecode(b"a \xff dog")}, "is not valid UTF-8"),
    "prompt that looks like a flag": Case({"instance_prompt": "-dog"}, "--instance_prompt: expected one argument"),
    "class prompt of spaces": Case(
        lambda folder, flags: prior(folder, class_prompt=" "), f"--class_prompt ' ' {NOTHING}"
    ),
    "class prompt that is no text": Case(
        lambda folder, flags: prior(folder, class_prompt=os.fsdecode(b"\xff")), NOTHING
    ),
    "prompt without end": Case({"instance_prompt": "very " * 20_000}, warning="this part is cut"),
    "long prompt of terminal codes": Case({"instance_prompt": "\x1b[31mred " * 40}, warning="this part is cut"),
    "prompt of emoji": Case({"instance_prompt": "🐶👩‍👩‍👧‍👦"}),
    "prompt of two lines": Case({"instance_prompt": "a photo\nof sks dog"}),
    "prompt with control characters": Case({"instance_prompt": "a \x07\x1b[0m sks dog"}),
    "prompt of other scripts": Case({"instance_prompt": "صورة كلب sks 犬の写真"}),
    "prompt of the tokenizer's marks": Case({"instance_prompt": "<|endoftext|> sks <|startoftext|>"}),
    "one prompt for both": Case(same_prompts, warning="--class_prompt is --instance_prompt: give the subject"),
}


# Captions -----------------------------------------------------------------------------------------------------------


def metadata(*lines: object) -> Callable[[Path, dict], dict]:
    """Returns what makes a folder of good photos with a metadata.jsonl of JSON values, or of bytes as they are."""
    rows = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return with_images({"metadata.jsonl": b"\n".join(rows)})


def caption_for(text: object, *, file_name: str = "0.png") -> dict:
    return {"file_name": file_name, "text": text}


CAPTIONS = {
    "caption of one image": Case(with_images({"0.txt": b"a sks dog"})),
    "caption with byte order mark and line ends": Case(with_images({"0.txt": b"\xef\xbb\xbfa sks\r\n dog\r\n"})),
    "caption without end": Case(with_images({"0.txt": b"very " * 20_000}), warning="this part is cut"),
    "caption empty": Case(with_images({"0.txt": b""}), "0.txt: the caption is blank; write one, or remove it"),
    "caption of control characters": Case(with_images({"0.txt": b"\x01\x1b\n"}), "0.txt: the caption is blank"),
    "caption that is no text": Case(with_images({"0.txt": b"a \xff dog"}), "cannot read the caption"),
    "caption of no image": Case(with_images({"notes.txt": b""})),
    "metadata empty": Case(metadata(b"")),
    "metadata of one image": Case(metadata(caption_for("a sks dog"), b"", b"  ")),
    "metadata of a file in this folder": Case(metadata(caption_for("a sks dog", file_name="./0.png"))),
    "metadata with other fields": Case(metadata(caption_for("a sks dog") | {"age": 3, "tags": ["x"]})),
    "metadata without a caption": Case(metadata({"file_name": "0.png", "text": None})),
    "metadata with line separators": Case(metadata(caption_for("a\u2028sks\x85dog"))),
    "metadata of other scripts": Case(metadata(caption_for("sks 犬の写真 🐶"))),
    "metadata with the fields of others": Case(
        metadata({"file_name": "0.png", "caption": "a dog"}), "has no 'text'; --caption_column names the field"
    ),
    "metadata broken": Case(
        metadata(b'{"file_name": "0.png"'), "metadata.jsonl, line 1 is not a JSON object with a f"
    ),
    "metadata of numbers": Case(metadata(caption_for("a dog"), 7), "metadata.jsonl, line 2 is not a JSON object"),
    "metadata of lists": Case(metadata([]), "metadata.jsonl, line 1 is not a JSON object with a file_name"),
    "metadata of nested lists": Case(metadata(b"[" * 100_000), "metadata.jsonl, line 1 is not a JSON object"),
    "metadata that is no text": Case(metadata(b"\xff\xfe"), "cannot read"),
    "metadata of a missing image": Case(metadata(caption_for("x", file_name="9.png")), "there is no image '9.png'"),
    "metadata of an image elsewhere": Case(
        metadata(caption_for("x", file_name="../0.png")), "there is no image '../0.png' in the folder"
    ),
    "metadata of a number for a name": Case(
        metadata({"file_name": 0, "text": "x"}), "there is no image 0 in the folder"
    ),
    "metadata of one image twice": Case(metadata(*[caption_for("a dog")] * 2), "line 2: a second caption of 0.png"),
    "metadata of a number for a caption": Case(metadata(caption_for(5)), "line 1: the caption is no text"),
    "metadata of a blank caption": Case(metadata(caption_for(" \u200b")), "line 1: the caption is blank"),
    "metadata of half a letter": Case(metadata(caption_for("a \ud83d dog")), "the caption is not valid UTF-8"),
    "data set that is none": Case(no_data_set("x.parquet"), "x.parquet cannot be loaded: "),
    "data set of another ending": Case(no_data_set("x.pq"), "x.pq: files of data sets end in .parquet, .arrow, .json"),
    "two captions": Case(
        with_images({"0.txt": b"a dog", "metadata.jsonl": json.dumps(caption_for("a cat")).encode()}),
        "0.png has two captions, in metadata.jsonl and in 0.txt: remove one",
    ),
}

GROUPS = (IMAGES, FOLDERS, MODELS, FLAGS, PROMPTS, CAPTIONS)
# Everything that is tested here, by name: a Case, or an odd image's file, bytes, pixels and tolerance.
CASES = {name: case for group in (*GROUPS, ODD_IMAGES) for name, case in group.items()}
assert len(CASES) == sum(map(len, GROUPS)) + len(ODD_IMAGES), "two cases have the same name"
RUNS = {name: case for name, case in CASES.items() if isinstance(case, Case)}
# Cases with flags that the traditional process does not have.
COLOSSALAI_ONLY = {"plugin", "placement", "offload_optim_frac", "offload_dir"}


def assert_refused(done: Run, script: str, expected: str) -> None:
    assert done.returncode == 2, done.stderr
    *others, last = done.stderr.split("\n")[:-1]
    assert last.startswith(f"{script}: error: ") and expected in last, done.stderr
    assert last.isprintable()
    assert all(line.startswith("warning: ") for line in others), done.stderr


@pytest.mark.parametrize("name", RUNS)
def test_run(name, flags, tmp_path):
    case = RUNS[name]
    folder = tmp_path / "input"
    folder.mkdir()
    flags |= {"max_train_steps": 1}
    changed = case.flags if isinstance(case.flags, dict) else case.flags(folder, flags)
    flags |= changed
    script = (COLOSSALAI, TRADITIONAL)[list(RUNS).index(name) % 2]
    if COLOSSALAI_ONLY & changed.keys() or "all that" in name:
        script = COLOSSALAI
    before = sorted(tmp_path.rglob("*"))
    done = train(script, flags, check=False, timeout=60)
    assert not (folder / "code has run").exists()
    assert "Traceback" not in done.stderr
    if case.error is not None:
        assert_refused(done, script, case.error)
        assert sorted(tmp_path.rglob("*")) == before, "nothing has been written"
        return
    assert done.returncode == 0, done.stderr
    assert (Path(flags["output_dir"]) / "model_index.json").is_file()
    (loss,) = scalars(flags["output_dir"], "loss")
    assert math.isfinite(loss)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert case.warning is None or sum(case.warning in line for line in warnings) == 1, done.stderr
    assert "Warning" not in done.stderr and "\x1b[31m" not in "".join(warnings)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, as the scripts have it
@pytest.mark.parametrize("name", ODD_IMAGES)
def test_odd_image(name, tmp_path):
    file, body, expected, tolerance = ODD_IMAGES[name]
    (tmp_path / file).write_bytes(body)
    (photo,) = find_images(tmp_path, "--instance_data_dir")
    image = load_image(photo)
    assert image.mode == "RGB"
    pixels = np.array(image).astype(int)
    assert pixels.shape == expected.shape
    assert abs(pixels - expected).max() <= tolerance


def test_a_folder_of_all_odd_images_trains(flags, tmp_path):
    for number, (file, body, _, _) in enumerate(ODD_IMAGES.values()):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / file).write_bytes(body)
    images = tmp_path / "images"
    images.mkdir()
    for path in list(tmp_path.glob("*/*")):
        name = path.name if not (images / path.name).exists() else f"{path.parent.name}{path.name}"
        path.rename(images / name)
    count = len(list(images.iterdir()))
    assert count == len(ODD_IMAGES)
    flags |= {"instance_data_dir": images, "train_batch_size": count, "max_train_steps": 1}
    done = train(COLOSSALAI, flags)
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines() if "Warn" in line or "warn" in line)
    assert all(map(math.isfinite, scalars(flags["output_dir"], "loss")))


@contextlib.contextmanager
def ordinary_user():
    """Gives up root's right to read every file, for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("locked", ["file", "folder"])
def test_no_permission(locked):
    with tempfile.TemporaryDirectory() as name:  # an ordinary user may enter it, unlike pytest's own
        folder = Path(name, "photos")
        folder.mkdir()
        (folder / "x.png").write_bytes(content())
        Path(name).chmod(0o755)
        (folder if locked == "folder" else folder / "x.png").chmod(0)
        with ordinary_user(), pytest.raises(UserError, match=r"(x\.png|photos).*: Permission denied"):
            find_images(folder, "--instance_data_dir")
        folder.chmod(0o755)


def test_a_run_of_any_length_starts_at_once():
    """The samples of all steps, which may be a billion, are not listed before the first."""

    class Numbers(torch.utils.data.Dataset):
        def __getitem__(self, n: int) -> list[dict]:
            return [{"number": torch.tensor(n), "weights": torch.tensor(1.0), "of_view": {}}]

    listed = []

    class Watched(Schedule):
        def batches(self, rank: int, first_step: int = 0) -> Iterator[list[int]]:
            for batch in super().batches(rank, first_step):
                listed.append(batch)
                yield batch

    schedule = Watched(batch=2, world_size=3, steps=100_000)
    loader = build_loader(Numbers(), schedule, Ranks(1, 3, torch.device("cpu")))
    numbers = [batch["number"].tolist() for (batch,) in itertools.islice(loader, 2)]
    assert numbers == listed == [[2, 3], [8, 9]]
