"""Builds a Stable Diffusion folder with random weights: the real classes and layout, no download.

    python -m benchmarks.random_model FOLDER --shape stable-diffusion-v1-4

Such a model serves wherever only shapes matter: tests, speed and memory.
"""

import argparse
import json
import tempfile
from pathlib import Path

from dreambooth.command_line.console import before_imports

before_imports(__name__)

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

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
    # The configuration of CompVis/stable-diffusion-v1-4: UNet of 859.5 M parameters, 512 px images, f8 VAE.
    "stable-diffusion-v1-4": {
        "text": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
        "vae": dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512),
        "unet": dict(
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            layers_per_block=2,
            attention_head_dim=8,
            cross_attention_dim=768,
            sample_size=64,
        ),
    },
    # That of stabilityai/stable-diffusion-xl-base-1.0: UNet of 2,567.5 M parameters, 1024 px images, f8 VAE.
    "stable-diffusion-xl": {
        "text": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
        "text_2": dict(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            hidden_act="gelu",
            projection_dim=1280,
        ),
        "vae": dict(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=1024, scaling_factor=0.13025
        ),
        "unet": dict(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            sample_size=128,
        ),
    },
}


def byte_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Returns a CLIPTokenizer that splits text into bytes: 514 tokens, no merges."""
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77, pad_token=pad_token)


def text_configuration(tokenizer: CLIPTokenizer, shape: dict) -> CLIPTextConfig:
    """Returns the configuration of a text encoder of a shape, which reads what a tokenizer writes."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )


def build(folder: str | Path, shape: str = "tiny", prediction_type: str = "epsilon", seed: int = 0) -> None:
    """Writes a whole pipeline folder.

    Args:
        folder: where to.
        shape: a key of SHAPES.
        prediction_type: of the scheduler.
        seed: of the random weights.
    """
    write_pipeline(pipeline_of(SHAPES[shape], prediction_type, seed), folder)


def pipeline_of(parts: dict, prediction_type: str, seed: int) -> DiffusionPipeline:
    """Returns a pipeline of random weights, of a value of SHAPES: Stable Diffusion XL where it has two texts."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    depth = len(parts["vae"]["block_out_channels"])
    own = {
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(text_configuration(tokenizer, parts["text"])),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            latent_channels=4,
            **parts["vae"],
        ),
        "unet": UNet2DConditionModel(**parts["unet"]),
    }
    noise = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type)
    if "text_2" not in parts:
        return StableDiffusionPipeline(
            **own,
            scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, **noise),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    tokenizer_2 = byte_tokenizer(pad_token="!")
    return StableDiffusionXLPipeline(
        **own,
        tokenizer_2=tokenizer_2,
        text_encoder_2=CLIPTextModelWithProjection(text_configuration(tokenizer_2, parts["text_2"])),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **noise),
        add_watermarker=False,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the pipeline goes")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny", help="size of the model (default: tiny)")
    parser.add_argument("--prediction_type", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    arguments = parser.parse_args()
    build(arguments.folder, arguments.shape, arguments.prediction_type, arguments.seed)
