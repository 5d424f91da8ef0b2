"""The images of the subject and their prompts: a folder, with captions or without, or a data set."""

import collections
import dataclasses
import functools
import json
import logging
import os
import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from dreambooth.command_line.console import UserError, first_line, is_blank, is_utf_8, say, warn
from dreambooth.command_line.flags import InstanceFlags
from dreambooth.data.images import IMAGE_SUFFIXES, Photo, find_images, images_to_use, list_images, look_at
from dreambooth.model.hub import HUB_TIMEOUT_S, can_be_hub_id, hub_reason
from dreambooth.processes.environment import Place
from dreambooth.processes.threads import cores_of, in_threads

METADATA = "metadata.jsonl"
# Files of --dataset_name by their endings, and what the library calls them.
KINDS_OF_FILES = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}
CAPTION_SUFFIXES = (".txt", ".caption")
# Files that other tools keep captions in.
LOOK_LIKE_CAPTIONS = (*CAPTION_SUFFIXES, ".captions", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
# Folders as kohya's trainers have them, such as "10_sks dog".
REPEATS_AND_PROMPT = re.compile(r"\d+_(.*\S.*)")


def find_instance_images(flags: InstanceFlags, place: Place, resolution: int | None = None) -> list[Photo]:
    """Returns the images of --instance_data_dir or --dataset_name, this process's share of them looked at.

    An image's caption is its prompt; --instance_prompt serves where it has none.

    Args:
        flags: name them.
        place: of this process.
        resolution: at which the images are going to be used; None where that is not known yet.

    Raises:
        UserError: if an image or a caption cannot be used, or an image has no prompt.
    """
    found = _of_folder if flags.dataset_name is None else _of_dataset
    photos, looks_captioned = found(flags, place, resolution)
    captioned = sum(photo.prompt != "" for photo in photos)
    if captioned or looks_captioned:
        say(f"captions: {captioned} of {len(photos)} images have one")
    if captioned == len(photos) and flags.instance_prompt is not None:
        warn("--instance_prompt: no effect, as every image has a caption")
    if captioned < len(photos) and flags.instance_prompt is None:
        bare = next(photo.name for photo in photos if not photo.prompt)
        raise UserError(f"{bare} has no caption: give it one, or all without one an --instance_prompt")
    return [dataclasses.replace(photo, prompt=photo.prompt or flags.instance_prompt) for photo in photos]


def _of_folder(flags: InstanceFlags, place: Place, resolution: int | None) -> tuple[list[Photo], bool]:
    """Returns the images of --instance_data_dir with their captions, empty where there is none.

    And whether there are files that look as if they had captions, read or not.
    """
    folder = Path(flags.instance_data_dir)
    photos = find_images(
        folder, "--instance_data_dir", images_to_use(None, flags.test_run), resolution=resolution, place=place
    )
    of_folder = _read_metadata(folder, flags.caption_column)
    if flags.caption_column != "text" and not Path(folder, METADATA).exists():
        warn(f"--caption_column: no effect, {folder} has no {METADATA}")
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and path.is_file()]
    beside = _captions_beside(files)
    read = in_threads(
        lambda image: _caption_of(image, of_folder, beside[image]),
        [Path(photo.name) for photo in photos],
        threads=cores_of(place),
        desc="reading captions",
    )
    photos = [dataclasses.replace(photo, prompt=caption) for photo, caption in zip(photos, read, strict=True)]
    known = {file for of_image in beside.values() for file in of_image} | {folder / METADATA}
    like_captions = [file for file in files if file.suffix.lower() in LOOK_LIKE_CAPTIONS]
    _warn_of_what_is_not_read(folder, [file.name for file in like_captions if file not in known])
    return photos, bool(like_captions)


def _captions_beside(files: list[Path]) -> dict[Path, list[Path]]:
    """Returns by each image the files that have captions of it: NAME.txt, NAME.png.txt, or .caption, in any case.

    Of images whose names differ by nothing but the case of letters, each has those of its very name.
    """
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    called = collections.defaultdict(list)  # by the names that their captions may have
    for image in images:
        for name in (image.with_suffix("").name, image.name):
            called[name.lower()].append((name, image))
    beside = collections.defaultdict(list)
    for file in files:
        name = file.with_suffix("").name
        if file.suffix.lower() not in CAPTION_SUFFIXES:
            continue
        found = called[name.lower()]
        for image in {image for of_name, image in found if of_name == name or len(found) == 1}:
            beside[image].append(file)
    return beside


def _warn_of_what_is_not_read(folder: Path, files: list[str]) -> None:
    """Tells in one line which files and folders look meant for a training, and what to do about them."""
    flag = f"--instance_data_dir {folder}"
    if files:
        warn(
            f"{flag}: {files[0]} is not read ({len(files)} such), captions are in NAME.txt or NAME.caption beside "
            f"NAME.png, or in a {METADATA}"
        )
    inside = [path.name for path in sorted(folder.iterdir()) if _has_images(path)]
    if inside:
        hint = ""
        if of_kohya := REPEATS_AND_PROMPT.fullmatch(inside[0]):
            hint = f': give "{of_kohya[1]}" as --instance_prompt, and the folder itself as --instance_data_dir'
        warn(f"{flag}: the images in {inside[0]} are not looked at ({len(inside)} such folders){hint}")


def _has_images(folder: Path) -> bool:
    try:
        return folder.is_dir() and not folder.name.startswith(".") and bool(list_images(folder))
    except OSError:
        return False


def _caption_of(image: Path, of_folder: dict[str, str], beside: list[Path]) -> str:
    """Returns the caption of an image; empty where there is none.

    Args:
        image: has at most one.
        of_folder: captions by file name, of the folder's metadata.jsonl.
        beside: the files that have one each.
    """
    places = [METADATA] * (image.name in of_folder) + [file.name for file in beside]
    if len(places) > 1:
        raise UserError(f"{image} has two captions, in {places[0]} and in {places[1]}: remove one")
    if not beside:
        return of_folder.get(image.name, "")
    try:
        return _checked(beside[0].read_text(encoding="utf-8-sig"), str(beside[0]))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the caption {beside[0]}: {_reason(error)}") from error


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
        name = os.path.normpath(name) if isinstance(name, str) and name else name  # such as ./photo.png
        if not isinstance(name, str) or os.path.dirname(name) or not (folder / name).is_file():
            raise UserError(f"{where}: there is no image {name!r} in the folder")
        if name in captions:
            raise UserError(f"{where}: a second caption of {name}")
        if column not in row:
            raise UserError(f"{where} has no {column!r}; --caption_column names the field of the captions")
        if row[column] is not None:
            captions[name] = _checked(row[column], where)
    return captions


def _of_dataset(flags: InstanceFlags, place: Place, resolution: int | None) -> tuple[list[Photo], bool]:
    """Returns the images of --dataset_name's train split with their captions, empty where there is none.

    And whether it has a column of captions.
    """
    rows = _load_dataset(flags)
    flag = f"--dataset_name {flags.dataset_name}"
    columns = rows.column_names
    if flags.image_column not in columns:
        raise UserError(f"{flag} has no column {flags.image_column!r} but {', '.join(columns)}: see --image_column")
    has_captions = flags.caption_column in columns
    if not has_captions and (flags.instance_prompt is None or flags.caption_column != InstanceFlags.caption_column):
        raise UserError(
            f"{flag} has no column {flags.caption_column!r} but {', '.join(columns)}: "
            "see --caption_column, or leave it out and give all images an --instance_prompt"
        )
    wanted = images_to_use(len(rows), flags.test_run)
    if not wanted:
        raise UserError(f"{flag} has no rows")
    images = rows.select_columns([flags.image_column])
    captions = rows.select_columns([flags.caption_column]) if has_captions else None
    folder = Path(flags.dataset_name).parent if os.path.isfile(flags.dataset_name) else None

    def photo(number: int) -> Photo:
        name = f"{flags.dataset_name} row {number}"
        caption = None if captions is None else captions[number][flags.caption_column]
        prompt = "" if caption is None else _checked(caption, name)
        found = Photo(name, prompt, functools.partial(_file_in, images, number, flags.image_column, folder))
        return look_at(found, resolution) if number % place.world_size == place.rank else found

    _warn_of_captions_beside(Path(flags.dataset_name), flag)
    return list(in_threads(photo, range(wanted), threads=cores_of(place), desc="checking images")), has_captions


def _warn_of_captions_beside(folder: Path, flag: str) -> None:
    """Tells of files beside a data set's images that would be their captions in a folder of --instance_data_dir."""
    beside = _captions_beside([path for path in sorted(folder.rglob("*")) if path.is_file()])
    files = [file for of_image in beside.values() for file in of_image]
    if files:
        warn(
            f"{flag}: {files[0].relative_to(folder)} is not read ({len(files)} such): --instance_data_dir reads such "
            f"captions, the datasets library those of a {METADATA}"
        )


def _load_dataset(flags: InstanceFlags):
    """Returns the rows of the train split, their images as they are stored."""
    import datasets  # takes seconds, which only those who need it should pay

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it cannot read is told below
    name, config = flags.dataset_name, flags.dataset_config_name
    flag = f"--dataset_name {name}"
    saved = any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json"))
    kind = KINDS_OF_FILES.get(Path(name).suffix.lower()) if os.path.isfile(name) else None
    if not os.path.exists(name):
        if not can_be_hub_id(name):
            raise UserError(f"{flag} is neither a folder nor a file")
        _ask_the_hub(name, flag)
    elif os.path.isfile(name) and not kind:  # the library would ask the Hub for a data set named like the ending
        raise UserError(f"{flag}: files of data sets end in {', '.join(KINDS_OF_FILES)}")
    if config and (saved or kind):
        warn(f"--dataset_config_name {config}: no effect, {name} has no configurations")
    try:
        if saved:
            splits = datasets.load_from_disk(name)
        elif kind:
            splits = datasets.load_dataset(kind, data_files=name)
        else:
            splits = datasets.load_dataset(name, config)
    except Exception as error:  # The library raises whatever its readers and the network lead it to.
        raise UserError(f"{flag} cannot be loaded: {first_line(error.__cause__ or error)}") from error
    if isinstance(splits, datasets.Dataset):
        rows = splits
    elif "train" in splits:
        rows = splits["train"]
    else:
        raise UserError(f"{flag} has no split named train but {', '.join(splits)}")
    if isinstance(rows.features.get(flags.image_column), datasets.Image):
        rows = rows.cast_column(flags.image_column, datasets.Image(decode=False))
    return rows


def _ask_the_hub(name: str, flag: str) -> None:
    """Finds out at once whether the Hub has a data set, which the library asks it for half a minute.

    Raises:
        UserError: if not, or nobody answers; where HF_HUB_OFFLINE is set, it is left to the library's cache.
    """
    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except OfflineModeIsEnabled:
        return
    except Exception as error:  # whatever the network and the Hub can answer
        raise UserError(
            f"{flag} is neither a folder nor a file, and cannot be had from the Hub: {hub_reason(error)}"
        ) from error


def _file_in(rows, number: int, column: str, folder: Path | None) -> bytes:
    """Returns the image file in a row: its bytes, or those of the path that stands for them.

    Where the rows are in a file, such as a .csv, the path may be a plain word, and begins at the file's `folder`.
    """
    image = rows[number][column]
    if folder and isinstance(image, str):
        return Path(folder, image).read_bytes()
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
    if not is_utf_8(caption):
        raise UserError(f"{where}: the caption is not valid UTF-8")
    if is_blank(caption):
        raise UserError(f"{where}: the caption is blank; write one, or remove it")
    return caption


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8, which every editor can save it as"
    return getattr(error, "strerror", None) or first_line(error)
