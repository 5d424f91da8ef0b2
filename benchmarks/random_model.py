"""Builds a Stable Diffusion folder with random weights: the real classes and layout, no download.

    python -m benchmarks.random_model FOLDER --shape stable-diffusion-v1-4

Such a model serves wherever only shapes matter: tests, speed and memory.
"""

import argparse
from pathlib import Path

from dreambooth.command_line.console import before_imports

before_imports(__name__)

import torch
from transformers import CLIPTokenizer

from dreambooth.model.configurations import SHAPE_OF_1, SHAPE_OF_XL, build_pipeline, tokenizer_of
from dreambooth.model.pipeline import write_pipeline

# All have the vocabulary of `byte_tokenizer`; a larger one would only add unused rows to the text encoders.
SHAPES = {
    # For tests: 32 px images.
    "tiny": {
        "text": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
        "vae": dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=32),
        "unet": dict(
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=1,  # the number of heads, as in Stable Diffusion's own configuration
            norm_num_groups=4,
            cross_attention_dim=32,
            sample_size=16,
        ),
    },
    # For tests of Stable Diffusion 2.x: its build, f8 VAE, 768 px images.
    "tiny-v2": {
        "text": dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu"
        ),
        "vae": dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=768),
        "unet": dict(
            block_out_channels=(8, 16, 16, 16),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            layers_per_block=1,
            attention_head_dim=(1, 2, 4, 4),
            norm_num_groups=4,
            use_linear_projection=True,
            cross_attention_dim=32,
            sample_size=96,
        ),
    },
    # For tests of Stable Diffusion XL: 32 px images, two text encoders, and widths that are all different.
    "tiny-xl": {
        "text": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2),
        "text_2": dict(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_act="gelu",
            projection_dim=40,
        ),
        "vae": dict(
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=32, scaling_factor=0.13025
        ),
        "unet": dict(
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(1, 2),
            use_linear_projection=True,
            norm_num_groups=4,
            cross_attention_dim=80,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=88,
            sample_size=16,
        ),
    },
    # UNets of 859.5 M and 2,567.5 M parameters, for 512 and 1024 px.
    "stable-diffusion-v1-4": SHAPE_OF_1,
    "stable-diffusion-xl": SHAPE_OF_XL,
}


def byte_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Returns a CLIPTokenizer that splits text into bytes: 514 tokens, no merges."""
    return tokenizer_of([], pad_token)


def build(folder: str | Path, shape: str = "tiny", prediction_type: str = "epsilon", seed: int = 0) -> None:
    """Writes a whole pipeline folder.

    Args:
        folder: where to.
        shape: a key of SHAPES.
        prediction_type: of the scheduler.
        seed: of the random weights.
    """
    torch.manual_seed(seed)
    write_pipeline(build_pipeline(SHAPES[shape], byte_tokenizer, prediction_type), folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the pipeline goes")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny", help="size of the model (default: tiny)")
    parser.add_argument("--prediction_type", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    arguments = parser.parse_args()
    folder = Path(arguments.folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        parser.error(f"{folder} is there, and is no empty folder: name a new one")
    build(arguments.folder, arguments.shape, arguments.prediction_type, arguments.seed)
