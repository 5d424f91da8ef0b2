"""The flags of inference.py."""

import argparse

from dreambooth.command_line.flags import MAX_SEED, OUTPUT_DIR
from dreambooth.command_line.parser import Parser, number
from dreambooth.command_line.paths import path


class Once(argparse.Action):
    """Takes a value, and no second one: of two adapters one would be left out without a word."""

    def __call__(self, parser, namespace, value, option=None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option} {value}: one is named already, and no two are drawn with")
        setattr(namespace, self.dest, value)


def inference_parser(description: str) -> Parser:
    """Returns a parser of them; `description` is the program's, for --help."""
    positive = number(int, 1)
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model",
        type=path,
        metavar="MODEL",
        nargs="?",
        help="folder of a trained pipeline, a Hub id, or a .safetensors file in the original layout "
        f"(default: {OUTPUT_DIR}; with --lora the Hub id in its file)",
    )
    parser.add_argument("--prompt", nargs="+", action="extend", required=True, help="one prompt or several")
    parser.add_argument("--negative_prompt", metavar="PROMPT", help="what the images should not show (default: unset)")
    parser.add_argument(
        "--lora",
        type=path,
        action=Once,
        metavar="FOLDER|FILE",
        help="draw with these adapters beside MODEL's weights: the output of a run with --lora_rank, one of its "
        "checkpoints, or a file of them (default: none)",
    )
    parser.add_argument(
        "--lora_scale",
        type=number(float, -100, 100),
        metavar="X",
        help="by which what the adapters add is multiplied; 0 is MODEL alone (default: 1)",
    )
    parser.add_argument(
        "--compare_with",
        type=path,
        metavar="MODEL",
        help="model to show beside, as before the training: a folder, a Hub id or a .safetensors file (default: none)",
    )
    parser.add_argument(
        "--instance_data_dir",
        type=path,
        metavar="FOLDER",
        help="photos of the subject: a row of them below (default: none)",
    )
    parser.add_argument(
        "--revision",
        metavar="NAME",
        help="branch, tag or commit on the Hub of the --compare_with model, else of MODEL (default: its main branch)",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="weights to load, such as fp16, of the --compare_with model, else of MODEL (default: the plain ones)",
    )
    parser.add_argument(
        "--single_file_config",
        type=path,
        metavar="FOLDER",
        help="folder whose configurations are those of the --compare_with model, else of MODEL, where "
        "that is one file (default: as its weights tell)",
    )
    parser.add_argument(
        "--output",
        type=path,
        default="image.png",
        metavar="FILE",
        help="image to write, over an earlier one of this program but no other file (default: image.png)",
    )
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
    for side in ("height", "width"):
        parser.add_argument(
            f"--{side}",
            type=positive,
            metavar="PIXELS",
            help="of an image, such as the --resolution of its training (default: the model's)",
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
