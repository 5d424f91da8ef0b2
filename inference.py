"""Makes images with a trained pipeline.

    python inference.py --prompt "a sks dog in a bucket" --output dog.png

Without MODEL it is the folder that the trainers write to by default. Several prompts, or several images of each, are
laid out on a sheet: a row per prompt with the prompt under it, a column per seed. With --compare_with, the images of
another model stand beside them, from the same seeds; with --instance_data_dir, the subject stands below:

    python inference.py --compare_with CompVis/stable-diffusion-v1-4 --instance_data_dir photos \\
        --prompt "a photo of sks dog on the beach" "a photo of dog" --output comparison.png
"""

from dreambooth.console import UserError, quiet_libraries, run

quiet_libraries()  # before the imports that warn

import io
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from PIL import Image, ImageOps
from tqdm import tqdm

from dreambooth.arguments import OUTPUT_DIR, Parser, number
from dreambooth.grid import captioned_grid
from dreambooth.images import find_images, load_image
from dreambooth.models import first_line, warn_of_cut_prompts
from dreambooth.precision import DTYPES
from dreambooth.randomness import MAX_SEED


def build_parser() -> Parser:
    """Returns the parser."""
    positive = number(int, 1)
    parser = Parser(__doc__)
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=OUTPUT_DIR,
        help=f"folder of a trained pipeline, or a Hub id (default: {OUTPUT_DIR})",
    )
    parser.add_argument("--prompt", nargs="+", required=True, help="one prompt or several")
    parser.add_argument("--negative_prompt", metavar="PROMPT", help="what the images should not show (default: unset)")
    parser.add_argument(
        "--compare_with",
        metavar="MODEL",
        help="model to show beside, as before the training: a folder or a Hub id (default: none)",
    )
    parser.add_argument(
        "--instance_data_dir",
        type=Path,
        metavar="FOLDER",
        help="photos of the subject: a row of them below (default: none)",
    )
    parser.add_argument("--output", default="image.png", metavar="FILE", help="image to write (default: image.png)")
    parser.add_argument(
        "--num_images", type=positive, default=1, metavar="N", help="images of each prompt (default: 1)"
    )
    parser.add_argument(
        "--num_inference_steps", type=positive, default=50, metavar="N", help="denoising steps (default: 50)"
    )
    parser.add_argument(
        "--guidance_scale",
        type=number(float, 0),
        default=7.5,
        metavar="X",
        help="how strictly the prompt is followed; 1 or less is no guidance (default: 7.5)",
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, highest=MAX_SEED),
        default=0,
        metavar="N",
        help="image i of every prompt starts from seed + i (default: 0)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(default: cuda where there is a GPU, else cpu)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="(default: fp16 on cuda, fp32 on cpu)")
    return parser


def load(model: str, device: str, dtype: str) -> StableDiffusionPipeline:
    """Loads a pipeline without a safety checker.

    Raises:
        UserError: if it cannot be loaded.
    """
    torch_dtype = DTYPES["no" if dtype == "fp32" else dtype]
    disable_progress_bar()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            model,
            torch_dtype=torch_dtype,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a pipeline from {model}: {first_line(error)}") from error
    return pipeline.to(device)


def generate(model: str, args, device: str, dtype: str) -> list[list[Image.Image]]:
    """Returns the images of each prompt, one at a time, each from a seed of its own."""
    pipeline = load(model, device, dtype)
    warn_of_cut_prompts(args.prompt, pipeline.tokenizer, pipeline.text_encoder)
    total = len(args.prompt) * args.num_images
    with tqdm(total=total, desc=model, unit="image", disable=total == 1) as progress:
        pipeline.set_progress_bar_config(disable=total > 1)

        def image(prompt: str, seed: int) -> Image.Image:
            made = pipeline(
                prompt,
                negative_prompt=args.negative_prompt,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                generator=torch.Generator().manual_seed(seed % (MAX_SEED + 1)),
            ).images[0]
            progress.update()
            return made

        return [[image(prompt, args.seed + i) for i in range(args.num_images)] for prompt in args.prompt]


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    output = Path(args.output)
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), Image.registered_extensions()[output.suffix.lower()])
    except (KeyError, OSError, ValueError) as error:
        raise UserError(f"--output {output}: the name has to end as a colour image's does, such as .png") from error
    if args.model == OUTPUT_DIR and not Path(OUTPUT_DIR).is_dir():
        raise UserError(f"there is no folder {OUTPUT_DIR}: train a model first, or name one")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA GPU was found")
    dtype = args.dtype or ("fp16" if device == "cuda" else "fp32")
    photos = find_images(args.instance_data_dir, "--instance_data_dir") if args.instance_data_dir else []

    rows, headings = generate(args.model, args, device, dtype), []
    if args.compare_with:
        before = generate(args.compare_with, args, device, dtype)
        rows, headings = [old + new for old, new in zip(before, rows, strict=True)], ["before", "after"]
    number, single, captions = sum(map(len, rows)), len(rows) == len(rows[0]) == 1 and not photos, args.prompt
    if photos:
        shown = [ImageOps.fit(load_image(path), rows[0][0].size) for path in photos[: len(rows[0])]]
        rows, captions = [*rows, shown], [*captions, "instance images"]
    output.parent.mkdir(parents=True, exist_ok=True)
    (rows[0][0] if single else captioned_grid(rows, captions, headings)).save(output)
    print(f"{output}: {number} image{'' if number == 1 else 's'}")


if __name__ == "__main__":
    run(main, os.path.basename(__file__))
