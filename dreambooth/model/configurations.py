"""The configurations of the models that everybody starts from: what a file of weights alone does not say.

Of CompVis/stable-diffusion-v1-4 (and 1.5), stabilityai/stable-diffusion-2-1 and -2-1-base, and
stabilityai/stable-diffusion-xl-base-1.0, as their publishers have them.
"""

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dreambooth.model.components import save_configuration
from dreambooth.model.pipeline import write_pipeline

BLOCKS = dict(
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    layers_per_block=2,
)
VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
VIT_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
SHAPE_OF_1 = {
    "text": VIT_L,
    "vae": dict(**VAE, sample_size=512),
    "unet": dict(**BLOCKS, attention_head_dim=8, cross_attention_dim=768, sample_size=64),
}
SHAPE_OF_2 = {
    "pad_token": "!",  # as open_clip's texts, with which it was trained, end in zeros
    # The last of its 24 layers is not read, and not there.
    "text": dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
        projection_dim=512,
    ),
    "vae": dict(**VAE, sample_size=768),
    "unet": dict(
        **BLOCKS,
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
        sample_size=96,
    ),
}
SHAPE_OF_XL = {
    "text": VIT_L,
    "text_2": dict(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
        projection_dim=1280,
    ),
    "vae": dict(**VAE, sample_size=1024, scaling_factor=0.13025),
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
}
# The byte pairs of CLIP's tokenizer, as OpenAI published them.
VOCABULARY = Path(__file__).resolve().parents[2] / "assets" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
TOKENS = 49_408  # of which the first 512 are bytes and the last two begin and end a text
END = "<|endoftext|>"  # with which most texts are filled up too


def clip_tokenizer(pad_token: str = END) -> CLIPTokenizer:
    """Returns the tokenizer that the text encoders of all these models read."""
    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")
    return tokenizer_of([tuple(line.split()) for line in lines[1 : TOKENS - 513]], pad_token)


def tokenizer_of(merges: list[tuple[str, str]], pad_token: str = END) -> CLIPTokenizer:
    """Returns a CLIPTokenizer of bytes and pairs that are merged; of no pairs, one that splits text into bytes."""
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", END]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, pairs = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        pairs.write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
        return CLIPTokenizer(str(vocabulary), str(pairs), model_max_length=77, pad_token=pad_token)


def text_configuration(tokenizer: CLIPTokenizer, shape: dict) -> CLIPTextConfig:
    """Returns the configuration of a text encoder of a shape, which reads what a tokenizer writes."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )


def build_pipeline(
    shape: dict, make_tokenizer: Callable[..., CLIPTokenizer], prediction_type: str, *, ends_in_noise: bool = False
) -> DiffusionPipeline:
    """Returns a pipeline of random weights; Stable Diffusion XL where the shape has two texts.

    Args:
        shape: of its parts, such as SHAPE_OF_1; with what its texts are filled up, if not with their end.
        make_tokenizer: returns a tokenizer with a `pad_token`.
        prediction_type: of its scheduler.
        ends_in_noise: whether the last timestep of its scheduler is all noise.
    """
    tokenizer = make_tokenizer(pad_token=shape.get("pad_token", END))
    depth = len(shape["vae"]["block_out_channels"])
    own = {
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(text_configuration(tokenizer, shape["text"])),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            latent_channels=4,
            **shape["vae"],
        ),
        "unet": UNet2DConditionModel(**shape["unet"]),
    }
    noise = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type)
    if "text_2" not in shape:
        v_prediction = prediction_type == "v_prediction"
        own_of_kind = dict(clip_sample=False, set_alpha_to_one=False) if v_prediction else dict(skip_prk_steps=True)
        scheduler = (DDIMScheduler if v_prediction else PNDMScheduler)(steps_offset=1, **own_of_kind, **noise)
        nothing = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        return StableDiffusionPipeline(**own, scheduler=scheduler, **nothing)
    if ends_in_noise:
        noise |= dict(rescale_betas_zero_snr=True)
    tokenizer_2 = make_tokenizer(pad_token="!")
    return StableDiffusionXLPipeline(
        **own,
        tokenizer_2=tokenizer_2,
        text_encoder_2=CLIPTextModelWithProjection(text_configuration(tokenizer_2, shape["text_2"])),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **noise),
        add_watermarker=False,
    )


def write_configuration(folder: Path, shape: dict, prediction_type: str, *, ends_in_noise: bool = False) -> None:
    """Writes the folder of a model but for its weights."""
    with init_empty_weights():
        pipeline = build_pipeline(shape, clip_tokenizer, prediction_type, ends_in_noise=ends_in_noise)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    write_pipeline(pipeline, folder, without=parts)
    for name, part in parts.items():
        save_configuration(part, folder / name)
