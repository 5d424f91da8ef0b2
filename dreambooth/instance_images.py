"""The images of the subject and their prompts: a folder, with captions or without, or a data set."""

import argparse
import functools
import json
import os
import re
from pathlib import Path

from dreambooth.console import UserError, say, warn
from dreambooth.images import Photo, find_images, images_to_use, load_image, photo_of
from dreambooth.models import first_line

METADATA = "metadata.jsonl"


def find_instance_images(args: argparse.Namespace) -> list[Photo]:
    """Returns the images of --instance_data_dir or --dataset_name, each decoded once to see that it can be.

    An image's caption is its prompt; --instance_prompt serves where it has none.

    Raises:
        UserError: if an image or a caption cannot be used, or an image has no prompt.
    """
    photos = _of_folder(args) if args.dataset_name is None else _of_dataset(args)
    captioned = sum(photo.prompt != "" for photo in photos)
    if captioned:
        say(f"captions: {captioned} of {len(photos)} images have one")
    if captioned == len(photos) and args.instance_prompt is not None:
        warn("--instance_prompt: no effect, as every image has a caption")
    if captioned < len(photos) and args.instance_prompt is None:
        bare = next(photo.name for photo in photos if not photo.prompt)
        raise UserError(f"{bare} has no caption: give it one, or all without one an --instance_prompt")
    return [Photo(photo.name, photo.prompt or args.instance_prompt, photo.read) for photo in photos]


def _of_folder(args: argparse.Namespace) -> list[Photo]:
    """Returns the images of --instance_data_dir with their captions, empty where there is none."""
    folder = args.instance_data_dir
    photos = find_images(folder, "--instance_data_dir", images_to_use(args))
    captions = _read_metadata(Path(folder), args.caption_column)
    if args.caption_column != "text" and not Path(folder, METADATA).exists():
        warn(f"--caption_column: no effect, {folder} has no {METADATA}")
    return [photo_of(Path(photo.name), _caption_of(Path(photo.name), captions)) for photo in photos]


def _caption_of(image: Path, captions: dict[str, str]) -> str:
    """Returns the caption of an image in `captions` or in the text file beside it; empty where there is none."""
    beside = image.with_suffix(".txt")
    if not beside.is_file():
        return captions.get(image.name, "")
    if image.name in captions:
        raise UserError(f"{image} has two captions, in {METADATA} and in {beside.name}: remove one")
    try:
        return _checked(beside.read_text(encoding="utf-8-sig"), str(beside))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the caption {beside}: {_reason(error)}") from error


def _read_metadata(folder: Path, column: str) -> dict[str, str]:
    """Returns the captions of a folder's metadata.jsonl by file name; its other fields are passed over.

    The layout is that of the `datasets` library's imagefolder: a JSON object a line, `file_name` and a caption.
    """
    path = folder / METADATA
    captions: dict[str, str] = {}
    if not path.exists():
        return captions
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            name = row["file_name"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{where} is not a JSON object with a file_name") from error
        if not isinstance(name, str) or os.path.dirname(name) or not (folder / name).is_file():
            raise UserError(f"{where}: there is no image {name!r} in the folder")
        if name in captions:
            raise UserError(f"{where}: a second caption of {name}")
        if column not in row:
            raise UserError(f"{where} has no {column!r}; --caption_column names the field of the captions")
        if row[column] is not None:
            captions[name] = _checked(row[column], where)
    return captions


def _of_dataset(args: argparse.Namespace) -> list[Photo]:
    """Returns the images of --dataset_name's train split with their captions, empty where there is none."""
    rows = _load_dataset(args)
    flag = f"--dataset_name {args.dataset_name}"
    columns = rows.column_names
    if args.image_column not in columns:
        raise UserError(f"{flag} has no column {args.image_column!r} but {', '.join(columns)}: see --image_column")
    if args.caption_column not in columns and args.instance_prompt is None:
        raise UserError(
            f"{flag} has no column {args.caption_column!r} but {', '.join(columns)}: "
            "see --caption_column, or give all images an --instance_prompt"
        )
    wanted = images_to_use(args, len(rows))
    if not wanted:
        raise UserError(f"{flag} has no rows")
    photos = []
    for number in range(wanted):
        name = f"{args.dataset_name} row {number}"
        caption = rows[number].get(args.caption_column)
        prompt = "" if caption is None else _checked(caption, name)
        photos.append(Photo(name, prompt, functools.partial(_bytes_of, rows, number, args.image_column)))
        load_image(photos[-1])
    return photos


def _load_dataset(args: argparse.Namespace):
    """Returns the rows of the train split, their images as they are stored."""
    import datasets  # takes seconds, which only those who need it should pay

    datasets.disable_progress_bars()
    name, config = args.dataset_name, args.dataset_config_name
    flag = f"--dataset_name {name}"
    if not os.path.exists(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{flag} is neither a folder nor a file")
    try:
        if os.path.isfile(os.path.join(name, "dataset_dict.json")) or os.path.isfile(os.path.join(name, "state.json")):
            splits = datasets.load_from_disk(name)
        elif os.path.isfile(name):
            splits = datasets.load_dataset(Path(name).suffix[1:], config, data_files=name)
        else:
            splits = datasets.load_dataset(name, config)
    except Exception as error:  # The library raises whatever its readers and the network lead it to.
        raise UserError(f"{flag} cannot be loaded: {first_line(error)}") from error
    if isinstance(splits, datasets.Dataset):
        rows = splits
    elif "train" in splits:
        rows = splits["train"]
    else:
        raise UserError(f"{flag} has no split named train but {', '.join(splits)}")
    if isinstance(rows.features.get(args.image_column), datasets.Image):
        rows = rows.cast_column(args.image_column, datasets.Image(decode=False))
    return rows


def _bytes_of(rows, number: int, column: str) -> bytes:
    """Returns the image file in a row: its bytes, or those of the path that stands for them."""
    image = rows[number][column]
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
        return image["bytes"]
    if isinstance(image, dict) and isinstance(image.get("path"), str):
        return Path(image["path"]).read_bytes()
    raise ValueError(f"the column {column!r} holds no image")


def _checked(caption: object, where: str) -> str:
    """Returns a caption on one line.

    Raises:
        UserError: if it is no text, or blank.
    """
    if not isinstance(caption, str):
        raise UserError(f"{where}: the caption is no text")
    caption = " ".join(caption.split())
    if re.search("[\ud800-\udfff]", caption):
        raise UserError(f"{where}: the caption is not valid UTF-8")
    if not any(c.isprintable() and not c.isspace() for c in caption):
        raise UserError(f"{where}: the caption is blank; write one, or remove it")
    return caption


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)
