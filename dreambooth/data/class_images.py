"""Class images: those that are there, and generating those that are missing.

An image that is generated says in its file what it was made from: the model, the prompt and the seed. What a run finds
in its folder it uses if that agrees with its own flags, or if nothing is known of it, as of a user's own photos.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError, safe_open

from dreambooth.command_line.console import (
    RunError,
    UserError,
    counted,
    doing,
    first_line,
    one_line,
    progress,
    say,
    warn,
)
from dreambooth.command_line.flags import InstanceFlags, ModelFlags, PriorFlags
from dreambooth.command_line.paths import PARTIAL, unwritable
from dreambooth.data.images import (
    NotFinite,
    Photo,
    facts_of_all,
    find_images,
    images_to_use,
    list_images,
    look_at,
    photo_of,
    pictures_of,
    png_of,
    save_new,
)
from dreambooth.data.randomness import Stream, starting_points
from dreambooth.model.components import choose
from dreambooth.model.drawing import DrawingDevice
from dreambooth.model.folder import family_of
from dreambooth.model.precision import name_of
from dreambooth.model.weights import weight_files
from dreambooth.processes.environment import Place, find_place
from dreambooth.processes.ranks import APPEARS_WITHIN_S, Ranks, from_all_ranks, from_rank_0, in_turns
from dreambooth.processes.threads import MAX_THREADS, cores_of

# Writing an image takes a second; a file that is still not whole so long after is of a run that was killed.
STALE_AFTER_S = 3600
WORTH_RECORDING = 5  # batches, from which on the UNet is recorded; fewer do not take long
STAND_IN = "~ a class image to be generated"  # behind those that there are, by its name
PARTIAL_IMAGE = re.compile(rf"\.\d{{5,}}\.png(\.\d+-[0-9a-f]+)?{re.escape(PARTIAL)}")
VALUES_OF_A_WEIGHT = 64


@dataclass(frozen=True)
class Origin:
    """What a class image was generated from.

    Args:
        model: by the name that the run knew it by, for messages.
        weights: digest of the model's weights (`digest_of_weights`), by which models are compared.
        prompt: --class_prompt.
        seed: of the run.
    """

    model: str
    weights: str
    prompt: str
    seed: int


def origin_of(photo: Photo) -> Origin | None:
    """Returns what an image says of its origin; None if it says nothing, as a user's own and those of old versions."""
    try:
        origin = Origin(**json.loads(photo.facts.origin))
    except (ValueError, TypeError):
        return None
    expected = {"model": str, "weights": str, "prompt": str, "seed": int}
    return origin if all(isinstance(getattr(origin, name), kind) for name, kind in expected.items()) else None


def digest_of_weights(model: Path, elsewhere: Mapping[str, Path], variant: str | None) -> str:
    """Returns a digest of the weights that class images are drawn with; empty where they cannot be read.

    It is of the name, the shape and the first values of each tensor, rounded to fp16, whatever the folder is called
    and however its files are cut: a training moves all values of a part, so that the model has another one then; its
    copy in fp16 has the same.

    Args:
        model: folder of it.
        elsewhere: folders of parts that come from somewhere else.
        variant: of the weights, as of the flag.
    """
    digest = hashlib.sha256()
    try:
        family = family_of(model)
        for part in ("unet", *family.text_encoders, "vae"):
            folder = elsewhere.get(part, model / part)
            files = weight_files(folder, choose(family.components[part], os.listdir(folder), variant))
            for line in sorted(line for file in files for line in _values_in(file)):
                digest.update(line)
    except (OSError, ValueError, SafetensorError):
        return ""  # loading it will say what is wrong
    return digest.hexdigest()[:16]


def _values_in(file: Path) -> Iterator[bytes]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118, it is no dictionary
            part = tensors.get_slice(name)
            shape = part.get_shape()
            values = part[:1] if shape else tensors.get_tensor(name)
            yield f"{name} {shape}".encode() + values.flatten()[:VALUES_OF_A_WEIGHT].half().numpy().tobytes()


def check_class_images(
    prior: PriorFlags, instance: InstanceFlags, place: Place, resolution: int | None = None
) -> list[Photo]:
    """Returns those of the images in --class_data_dir that a run uses, this process's share of them looked at.

    Args:
        prior, instance: the flags.
        place: of this process.
        resolution: at which the images are going to be used; None where that is not known yet.

    Raises:
        UserError: if one cannot be used, or was generated for another prompt, or some are missing and the folder takes
            none.
    """
    if not prior.with_prior_preservation:
        return []
    folder, wanted = prior.class_data_dir, images_to_use(prior.num_class_images, instance.test_run)
    present = list_images(folder)[:wanted] if os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK) else []
    problems = unwritable("--class_data_dir", folder)
    if problems and len(present) < wanted:
        raise UserError(problems[0])
    if not present:
        return []
    photos = find_images(folder, "--class_data_dir", wanted, resolution=resolution, place=place)
    _refuse_others(folder, photos, prompt=prior.class_prompt)
    return photos


def check_origins(
    prior: PriorFlags, model: ModelFlags, photos: list[Photo], folder: Path, elsewhere: Mapping[str, Path]
) -> None:
    """Finds class images that another model than this run's, which is in `folder` and `elsewhere`, has generated.

    Raises:
        UserError: if there is one.
    """
    if any(photo.facts and origin_of(photo) for photo in photos):
        weights = digest_of_weights(folder, elsewhere, model.variant)
        _refuse_others(prior.class_data_dir, photos, weights=weights, model=model_name(model))


def _refuse_others(folder: str, photos: list[Photo], *, prompt: str = "", weights: str = "", model: str = "") -> None:
    """Compares what class images say of their origin with what this run would generate them from, where it is told.

    `model` is how messages call the one of these `weights`.
    """
    for photo in photos:
        origin = photo.facts and origin_of(photo)
        if origin is None:
            continue
        if prompt and origin.prompt != prompt:
            differs = f"was generated for {origin.prompt!r}, and --class_prompt is {prompt!r}"
        elif weights and origin.weights != weights:
            differs = f"was generated by {origin.model}, whose weights are not those of {model}"
        else:
            continue
        raise UserError(
            f"--class_data_dir {folder}: {Path(photo.name).name} {differs}: name another folder, which will be filled"
        )


def model_name(flags: ModelFlags) -> str:
    """Returns how messages call the model that generates: a Hub id, or a folder's name without where it is."""
    parts = {
        "": flags.pretrained_model_name_or_path,
        " with the UNet of ": flags.external_unet_path,
        " with the VAE of ": flags.pretrained_vae_model_name_or_path,
    }
    short = {word: Path(name).resolve().name if os.path.isdir(name) else name for word, name in parts.items() if name}
    return "".join(word + name for word, name in short.items())


def missing_numbers(present: Collection[str], wanted: int) -> list[int]:
    """Returns the numbers of the images to generate so that there are `wanted`, those `present` by name counted in."""
    free = (number for number in range(wanted) if image_name(number) not in present)
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
    prior: PriorFlags,
    instance: InstanceFlags,
    model: ModelFlags,
    found: list[Photo],
    load: Callable[[], DiffusionPipeline],
    model_folder: Path,
    elsewhere: Mapping[str, Path],
    *,
    resolution: int,
    seed: int,
    ranks: Ranks,
    replays: bool = False,
    dry_run: bool = False,
) -> list[Photo]:
    """Brings --class_data_dir to --num_class_images images, and returns the same ones on all ranks, with their facts.

    Image number n starts from latents that follow from the seed and n alone. A rank that is free takes the next batch;
    which numbers are in a batch, and with it every rounding, is the same on any number of ranks.

    Args:
        prior, instance, model: the flags.
        found: what `check_class_images` has returned; what rank 0 has found counts.
        load: returns the pipeline that generates; called only where there is something to generate.
        model_folder: of its weights.
        elsewhere: folders of parts that come from somewhere else.
        resolution: of the images that a dry run has in the place of those that are missing, in pixels.
        seed: of the run.
        ranks: of the run.
        replays: whether the UNet's passes may be recorded: they are if that is so on all ranks, in a folder of several
            batches, however many of them are missing, so that a run that goes on draws the same.
        dry_run: whether gray images stand in for those that are missing, and none is made.

    Raises:
        RunError: if an image cannot be written, or has pixels that are not finite; or does not appear on a rank.
        UserError: if another run has put an image of another origin into the folder meanwhile.
    """
    folder, prompt = Path(prior.class_data_dir), prior.class_prompt
    wanted = images_to_use(prior.num_class_images, instance.test_run)
    looked = facts_of_all(found, resolution)
    found = from_rank_0(lambda: looked)
    numbers = missing_numbers({Path(photo.name).name for photo in found}, wanted)
    told = f"{len(numbers)} of {wanted} {'would be' if dry_run else 'are'} generated first" if numbers else ""
    _tell_found(prior.class_data_dir, found, told, seed=seed)
    if dry_run or not numbers:
        return _as_examples(prompt, found + _stand_ins(prompt, resolution, len(numbers)))
    _prepare(folder)
    origin = Origin(model_name(model), digest_of_weights(model_folder, elsewhere, model.variant), prompt, seed)
    size = prior.sample_batch_size
    batches = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    replays = all(from_all_ranks(replays and wanted > size * (WORTH_RECORDING - 1)))
    started = time.monotonic()
    with doing("generating class images", takes_less="a smaller --sample_batch_size"):
        device = DrawingDevice(ranks.device, "class images", replays=replays)
        share = _generate(batches, origin, load, folder, ranks, device)
    made = [photo for of_rank in from_all_ranks(share) for photo in of_rank]
    seconds = time.monotonic() - started
    say(f"{counted(len(made), 'class image')} generated in {seconds:.1f} s, {len(made) / seconds:.1f} images/s")
    # Another run may have been faster with some.
    names = {str(folder / image_name(number)) for number in numbers} - {photo.name for photo in made}
    others = [photo_of(Path(name)) for name in sorted(names)]
    _wait_for([*found, *made, *others], prior.class_data_dir, ranks)
    others = [look_at(photo, resolution) for photo in others]
    _refuse_others(prior.class_data_dir, others, prompt=prompt, weights=origin.weights, model=origin.model)
    return _as_examples(prompt, [*found, *made, *others])


def _as_examples(prompt: str, photos: list[Photo]) -> list[Photo]:
    """Returns photos in the order of their names, with the prompt of the class."""
    return [replace(photo, prompt=prompt) for photo in sorted(photos, key=lambda photo: photo.name)]


def _tell_found(folder: str, found: list[Photo], missing: str, *, seed: int) -> None:
    """Prints how many class images there are, what is known of them, and what is said of those that are `missing`."""
    told = []
    if found:
        origins = [origin for origin in map(origin_of, found) if origin is not None]
        seeds = sorted({origin.seed for origin in origins} - {seed})
        from_seeds = f", from seed {', '.join(map(str, seeds))}" if seeds else ""
        known = [f"{len(origins)} generated by an earlier run{from_seeds}"] if origins else []
        unknown = len(found) - len(origins)
        known += [f"{unknown} of unknown origin"] if unknown else []
        told.append(f"{len(found)} found in {one_line(folder)} ({'; '.join(known)})")
    if missing:
        told.append(missing)
    say(f"class images: {', '.join(told)}")
    flat = [Path(photo.name).name for photo in found if photo.facts.is_flat]
    if flat:
        warn(
            f"--class_data_dir {folder}: {flat[0]} is of one colour ({len(flat)} such), as is what "
            "earlier versions made of pixels that are not finite: remove it if a run has made it, and it is made anew"
        )


def _stand_ins(prompt: str, resolution: int, count: int) -> list[Photo]:
    """Returns gray images in place of those that a run would generate."""
    gray = png_of(Image.new("RGB", (resolution, resolution), "gray"), "")
    return [look_at(Photo(STAND_IN, prompt, lambda: gray), resolution)] * count if count else []


def _prepare(folder: Path) -> None:
    """Makes the folder, and removes from it what runs that were killed have left half-written.

    Raises:
        RunError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--class_data_dir {folder} cannot be made: {first_line(error)}") from error
    for path in folder.glob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError):
            if PARTIAL_IMAGE.fullmatch(path.name) and time.time() - path.stat().st_mtime > STALE_AFTER_S:
                path.unlink()


def _generate(
    batches: list[list[int]],
    origin: Origin,
    load: Callable[[], DiffusionPipeline],
    folder: Path,
    ranks: Ranks,
    device: DrawingDevice,
) -> list[Photo]:
    """Draws batches of images, of which this rank takes some, and returns those that it has written.

    A batch is written while the next is drawn, and whatever happens then.
    """
    written: list[Photo] = []
    being_written: list[Future] = []
    total = sum(map(len, batches))
    with (
        ThreadPoolExecutor(min(cores_of(find_place()), MAX_THREADS)) as pool,
        progress(total, desc="class images", unit="image", shown=ranks.rank == 0) as bar,
    ):
        for turn in in_turns(len(batches)):
            numbers = batches[turn]
            if not all((folder / image_name(number)).is_file() for number in numbers):
                if device.pipeline is None:
                    device.put(load())
                with one_cpu_thread():
                    pictures = _draw(device, numbers, origin)
                written += _results(being_written)
                being_written = [
                    pool.submit(_write, folder / image_name(number), picture, origin)
                    for number, picture in zip(numbers, pictures, strict=True)
                ]
            bar.update(sum(map(len, batches[: turn + 1])) - bar.n)
        written += _results(being_written)
        bar.update(total - bar.n)
    device.clear()
    return written


def _results(being_written: list[Future]) -> list[Photo]:
    """Waits for images to be written, and returns those that were."""
    return [photo for future in being_written if (photo := future.result()) is not None]


def _draw(device: DrawingDevice, numbers: list[int], origin: Origin) -> list[Image.Image]:
    """Draws a batch.

    Raises:
        RunError: if an image is not finite.
    """

    def images(pipeline: DiffusionPipeline) -> np.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        points = starting_points(pipeline, origin.seed, Stream.CLASS_IMAGE, numbers)
        return pipeline([origin.prompt] * len(numbers), output_type="np", **points).images

    try:
        return pictures_of(device.draw(images))
    except NotFinite as error:
        drawn = f"{image_name(numbers[error.index])}, drawn in {name_of(device.pipeline.unet.dtype)},"
        raise RunError(
            f"class image {drawn} has pixels that are not finite: try --mixed_precision no or bf16; where that is so "
            "already, the model itself makes them"
        ) from error


def _write(path: Path, picture: Image.Image, origin: Origin) -> Photo | None:
    """Writes an image and returns it with its facts; None if there is one by now.

    Raises:
        RunError: if it cannot be written.
    """
    content = png_of(picture, json.dumps(asdict(origin)))
    try:
        if not save_new(content, path):
            return None
        seen = look_at(Photo(path.name, origin.prompt, lambda: content))
        return replace(photo_of(path), facts=seen.facts)
    except OSError as error:
        raise RunError(f"cannot write {path}: {first_line(error)}") from error


def _wait_for(photos: list[Photo], folder: str, ranks: Ranks) -> None:
    """Waits until this rank finds the images that another one has written, which a network file system may delay.

    Raises:
        RunError: if it does not find one of them.
    """
    limit = time.monotonic() + APPEARS_WITHIN_S
    while missing := [photo.name for photo in photos if not os.path.isfile(photo.name)]:
        if time.monotonic() > limit or ranks.world_size == 1:
            raise RunError(
                f"--class_data_dir {folder}: rank {ranks.rank} does not find {Path(missing[0]).name} "
                f"({len(missing)} such), which another rank has: give all processes a folder of one file system"
            )
        time.sleep(1)
        os.listdir(folder)
