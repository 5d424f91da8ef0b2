"""Makes images with a trained pipeline.

    python inference.py --prompt "a sks dog in a bucket" --output dog.png

Without MODEL it is the folder that the trainers write to by default. Several prompts, or several images of each, are
laid out on a sheet: a row per prompt with the prompt under it, a column per seed. With --compare_with, the images of
another model stand beside them, from the same seeds; with --instance_data_dir, the subject stands below. --lora draws
with adapters that a run with --lora_rank has left:

    python inference.py --compare_with CompVis/stable-diffusion-v1-4 --instance_data_dir photos \\
        --prompt "a photo of sks dog on the beach" "a photo of dog" --output comparison.png
    python inference.py CompVis/stable-diffusion-v1-4 --lora dreambooth-lora --prompt "a photo of sks dog"
"""

from dreambooth.command_line.console import UserError, before_imports, run_program
from dreambooth.command_line.inference_flags import inference_parser

before_imports(__name__, lambda: inference_parser(__doc__).parse_args())

import argparse
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from dreambooth.command_line.console import RunError, counted, first_line, is_utf_8, progress, say, warn
from dreambooth.command_line.flags import LORA_OUTPUT_DIR, MAX_SEED, OUTPUT_DIR
from dreambooth.command_line.paths import is_model_file, kind_on_disk
from dreambooth.data.images import NotFinite, find_images, load_image, pictures_of
from dreambooth.model.drawing import DrawingDevice
from dreambooth.model.family import readers_of
from dreambooth.model.folder import INDEX, family_of, find_folder, load_sampler
from dreambooth.model.lora import WEIGHTS, Lora, read_lora
from dreambooth.model.pipeline import load_pipeline
from dreambooth.model.precision import DTYPES
from dreambooth.model.prompts import warn_of_cut_prompts
from dreambooth.run.grid import captioned_grid
from dreambooth.run.image_file import check_image_file, save_image, still_ours

SIDES = 8  # of which diffusers' pipelines want multiples, in pixels
# What may help where images are not finite.
HINTS = {
    "fp16": "try --dtype bf16 or fp32",
    "bf16": "try --dtype fp32",
    "fp32": "no --dtype helps, its weights or its noise schedule make them so",
}


@dataclass
class Model:
    """A model, and the images that it has drawn.

    Args:
        name: by which the flags call it.
        folder: where it is.
        variant: of its weights, None for the plain ones.
        lora: adapters that it draws with, None for none.
        pictures: those of the first prompt, then those of the next.
    """

    name: str
    folder: Path
    variant: str | None
    lora: Lora | None = None
    pictures: list[Image.Image] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What every model draws, and how; each value is that of its flag."""

    prompts: Sequence[str]
    device: str
    dtype: str
    negative_prompt: str | None = None
    num_images: int = 1
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None
    seed: int = 0

    @property
    def total(self) -> int:
        """Images of a model."""
        return len(self.prompts) * self.num_images


def find_models(
    name: str, compare_with: str | None, chosen: dict[str, str | None], lora: Lora | None = None
) -> list[Model]:
    """Returns the model, and the one to show beside if there is one; nothing of them is loaded yet.

    Args:
        name, compare_with: of the models.
        chosen: further arguments of `find_folder`, for the last of them, and the first where they are the same.
        lora: adapters that the first draws with.
    """
    variant, shown = chosen["variant"], f"{name} with {lora.name}" if lora else name
    if not compare_with:
        return [Model(shown, find_folder(name, "MODEL", **chosen), variant, lora)]
    own = chosen if name == compare_with else {}
    return [
        Model(shown, find_folder(name, "MODEL", **own), own.get("variant"), lora),
        Model(compare_with, find_folder(compare_with, "--compare_with", **chosen), variant),
    ]


def find_lora(name: str | None, scale: float | None) -> Lora | None:
    """Returns the adapters of --lora, None without; what they add is multiplied by `scale`, 1 by default."""
    if name is None:
        if scale is not None:
            warn("--lora_scale: no effect without --lora")
        return None
    return read_lora(name, "--lora", scale=1.0 if scale is None else scale)


def check_flags(args: argparse.Namespace, name: str) -> None:
    """Finds flags that cannot be, and tells of those that have no effect.

    Args:
        args: the flags.
        name: of the model that --revision and --single_file_config are of.

    Raises:
        UserError: if --single_file_config has nothing that it could be of, the images cannot be of the size wanted, or
            a prompt is no text.
    """
    for flag, texts in (("prompt", args.prompt), ("negative_prompt", [args.negative_prompt or ""])):
        if not all(map(is_utf_8, texts)):
            raise UserError(f"--{flag} is not valid UTF-8")
    for side in ("height", "width"):
        if (getattr(args, side) or 0) % SIDES:
            raise UserError(f"--{side} {getattr(args, side)} is no multiple of {SIDES}, as the sides of images are")
    if args.single_file_config and not is_model_file(name):
        raise UserError(f"--single_file_config is of a model that is one file, and {name} is none")
    if args.revision and (kind := kind_on_disk(name)):
        warn(f"--revision: no effect on a local {kind}")
    if args.negative_prompt is not None and args.guidance_scale <= 1:
        warn(f"--negative_prompt: no effect without guidance, which a --guidance_scale of {args.guidance_scale:g} is")


def check_steps(wanted: int, models: list[Model]) -> None:
    """Compares --num_inference_steps with the timesteps that the models were trained with.

    Raises:
        UserError: if they are not fewer, which some samplers cannot do, or the model's own cannot take so many.
    """
    for model in models:
        sampler = load_sampler(model.folder)
        trained = sampler.config.get("num_train_timesteps", wanted + 1)
        if wanted >= trained:
            raise UserError(
                f"--num_inference_steps {wanted}: {model.name} was trained with {trained} timesteps; give fewer"
            )
        try:
            sampler.set_timesteps(wanted)
        except ValueError as error:  # each sampler has limits of its own
            raise UserError(f"--num_inference_steps {wanted}: {first_line(error)}") from error


def draw(model: Model, drawing: Drawing) -> Iterator[Image.Image]:
    """Yields the images of each prompt, one at a time, each from a seed of its own.

    Raises:
        UserError: if the model cannot be loaded.
        RunError: if an image is not finite.
    """
    dtype, total = drawing.dtype, drawing.total
    how = {"variant": model.variant, "lora": model.lora}
    device = DrawingDevice(drawing.device, model.name)
    device.put(load_pipeline(model.folder, DTYPES["no" if dtype == "fp32" else dtype], **how))
    prompts = [*drawing.prompts, *filter(None, [drawing.negative_prompt])]
    family = family_of(model.folder)
    warn_of_cut_prompts(prompts, readers_of(family, device.pipeline.components))
    side = None if has_size(device.pipeline) else family.resolution
    device.pipeline.set_progress_bar_config(disable=total > 1 or not sys.stderr.isatty())
    with progress(total, desc=model.name, unit="image", shown=total > 1) as bar:
        for prompt in drawing.prompts:
            for number in range(drawing.num_images):
                try:
                    (picture,) = pictures_of(device.draw(functools.partial(_image, prompt, number, drawing, side)))
                except NotFinite as error:
                    raise RunError(
                        f"{model.name}: image {number + 1} of the prompt {prompt!r} has pixels that are not finite in "
                        f"{dtype}: {HINTS[dtype]}"
                    ) from error
                bar.update()
                yield picture
    device.clear()


def has_size(pipeline: DiffusionPipeline) -> bool:
    """Whether a model's configuration tells the size of its images; it need not."""
    told = pipeline.unet.config.sample_size
    sides = told if isinstance(told, list | tuple) else [told]
    return all(isinstance(side, int) and side > 0 for side in sides)


def _image(prompt: str, number: int, drawing: Drawing, side: int | None, pipeline: DiffusionPipeline) -> np.ndarray:
    """Returns image `number` of a prompt: (1, height, width, 3), floats in [0, 1].

    Where neither a flag nor the model tells its height or width, `side` is it.
    """
    return pipeline(
        prompt,
        negative_prompt=drawing.negative_prompt,
        num_inference_steps=drawing.num_inference_steps,
        guidance_scale=drawing.guidance_scale,
        height=drawing.height or side,
        width=drawing.width or side,
        generator=torch.Generator().manual_seed((drawing.seed + number) % (MAX_SEED + 1)),
        output_type="np",
    ).images


def sheet(drawing: Drawing, models: list[Model], photos: list[Image.Image]) -> Image.Image:
    """Returns the images that were drawn, with the photos below; white where a row is not full.

    All are of the size of the first; those of a model that draws in another are scaled to fit, on white.
    """
    shown = [model for model in models if model.pictures]
    size = shown[0].pictures[0].size
    drawn, of_prompt = max(len(model.pictures) for model in shown), drawing.num_images
    if len(shown) == drawing.total == 1 and not photos:
        return shown[0].pictures[0]
    white = Image.new("RGB", size, "white")
    fit = functools.partial(ImageOps.pad, size=size, color="white")
    columns = [[*map(fit, model.pictures), *[white] * drawing.total] for model in reversed(shown)]
    rows = [
        [picture for pictures in columns for picture in pictures[first : first + min(of_prompt, drawn)]]
        for first in range(0, drawn, of_prompt)
    ]
    captions = drawing.prompts[: len(rows)]
    if photos:
        rows = [*rows, [ImageOps.fit(photo, size) for photo in photos[: len(rows[0])]]]
        captions = [*captions, "instance images"]
    return captioned_grid(rows, captions, ["before", "after"] if len(shown) == 2 else [])


def main(argv: Sequence[str] | None = None) -> None:
    args = inference_parser(__doc__).parse_args(argv)
    output = Path(args.output)
    check_image_file(output, "--output")
    written = next((folder for folder in (OUTPUT_DIR, LORA_OUTPUT_DIR) if Path(folder).is_dir()), OUTPUT_DIR)
    lora, name = find_lora(args.lora, args.lora_scale), args.model or written
    if lora and not args.model:
        if not lora.base:
            raise UserError(f"--lora {args.lora} does not tell the model that it was trained with: name it")
        name = lora.base
    if not lora and Path(name, WEIGHTS).is_file() and not Path(name, INDEX).exists():
        raise UserError(f"{name} has a LoRA, which goes with the model that it was trained with: MODEL --lora {name}")
    if name == OUTPUT_DIR and not Path(OUTPUT_DIR).is_dir():
        raise UserError(f"there is no folder {OUTPUT_DIR}: train a model first, or name one")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA GPU was found")
    dtype = args.dtype or ("fp16" if device == "cuda" else "fp32")
    photos = find_images(args.instance_data_dir, "--instance_data_dir") if args.instance_data_dir else []
    chosen = {"revision": args.revision, "variant": args.variant, "configuration": args.single_file_config}
    check_flags(args, args.compare_with or name)
    models = find_models(name, args.compare_with, chosen, lora)
    check_steps(args.num_inference_steps, models)
    photos = [load_image(photo) for photo in photos[: len(models) * args.num_images]]  # may be gone by the end
    drawing = Drawing(
        prompts=args.prompt,
        device=device,
        dtype=dtype,
        negative_prompt=args.negative_prompt,
        num_images=args.num_images,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        height=args.height,
        width=args.width,
        seed=args.seed,
    )

    def save() -> Path:
        place = still_ours(output)
        save_image(sheet(drawing, models, photos), place)
        return place

    try:
        for model in models:
            for picture in draw(model, drawing):
                model.pictures.append(picture)
    except (Exception, KeyboardInterrupt) as error:
        drawn = sum(len(model.pictures) for model in models)
        if not drawn:
            raise
        place = save()
        kept = f"{place} has the {counted(drawn, 'image')} drawn before"
        if isinstance(error, UserError):
            raise RunError(f"{error}; {kept}") from error
        say(kept)
        raise
    place = save()
    say(f"{place}: {counted(sum(len(model.pictures) for model in models), 'image')}")


if __name__ == "__main__":
    run_program(main, os.path.basename(__file__))
