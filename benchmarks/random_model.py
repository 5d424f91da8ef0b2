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
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dreambooth.model.pipeline import write_pipeline

# Both have the vocabulary of `byte_tokenizer`; a larger one would only add unused rows to the text encoder.
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
}


def byte_tokenizer() -> CLIPTokenizer:
    """Returns a CLIPTokenizer that splits text into bytes: 514 tokens, no merges."""
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77, pad_token="<|endoftext|>")


def build(folder: str | Path, shape: str = "tiny", prediction_type: str = "epsilon", seed: int = 0) -> None:
    """Writes a whole pipeline folder.

    Args:
        folder: where to.
        shape: a key of SHAPES.
        prediction_type: of the scheduler.
        seed: of the random weights.
    """
    parts = SHAPES[shape]
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **parts["text"],
        )
    )
    depth = len(parts["vae"]["block_out_channels"])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        latent_channels=4,
        **parts["vae"],
    )
    unet = UNet2DConditionModel(**parts["unet"])
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    write_pipeline(pipeline, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the pipeline goes")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny", help="size of the model (default: tiny)")
    parser.add_argument("--prediction_type", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    arguments = parser.parse_args()
    build(arguments.folder, arguments.shape, arguments.prediction_type, arguments.seed)
