"""Makes images with a trained pipeline.

    python inference.py dreambooth-model --prompt "A photo of sks dog in a bucket" --output dog.png

Several prompts, or several images of each, are laid out as a grid: a row per prompt, a column per seed.
"""

from dreambooth.console import UserError, quiet_libraries, run

quiet_libraries()  # before the imports that warn

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import make_image_grid
from diffusers.utils.logging import disable_progress_bar
from PIL import Image

from dreambooth.arguments import Parser, number
from dreambooth.precision import DTYPES
from dreambooth.randomness import MAX_SEED


def build_parser() -> Parser:
    """Returns the parser."""
    positive = number(int, 1)
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder of a trained pipeline, or a Hub id")
    parser.add_argument("--prompt", nargs="+", required=True, help="one prompt or several")
    parser.add_argument("--negative_prompt", metavar="PROMPT", help="what the images should not show (default: unset)")
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
            model, torch_dtype=torch_dtype, safety_checker=None, requires_safety_checker=False
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a pipeline from {model}: {str(error).splitlines()[0]}") from error
    pipeline.set_progress_bar_config(leave=False)
    return pipeline.to(device)


def generate(pipeline: StableDiffusionPipeline, prompt: str, args) -> list[Image.Image]:
    """Returns the images of one prompt, one at a time, each from a seed of its own."""
    images = []
    for i in range(args.num_images):
        generator = torch.Generator().manual_seed((args.seed + i) % (MAX_SEED + 1))
        images += pipeline(
            prompt,
            negative_prompt=args.negative_prompt,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=generator,
        ).images
    return images


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    output = Path(args.output)
    if not output.suffix or Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--output {output}: the name has to end as an image's does, such as .png")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA GPU was found")
    pipeline = load(args.model, device, args.dtype or ("fp16" if device == "cuda" else "fp32"))

    images = [image for prompt in args.prompt for image in generate(pipeline, prompt, args)]
    output.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=len(args.prompt), cols=args.num_images).save(output)
    print(f"{output}: {len(args.prompt)} x {args.num_images} image{'s' * (len(images) > 1)}")


if __name__ == "__main__":
    run(main, os.path.basename(__file__))
