"""The five parts of a Stable Diffusion checkpoint: tokenizer, text encoder, VAE, UNet, noise scheduler."""

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.logging import disable_progress_bar
from transformers import CLIPTextModel, CLIPTokenizer

from dreambooth.console import UserError, warn
from dreambooth.precision import all_finite

PREDICTION_TYPES = ("epsilon", "v_prediction")
ENCODED_AT_A_TIME = 32  # prompts
# Of model_index.json; other pipelines have other parts.
CLASSES = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


def find_model(args: argparse.Namespace) -> Path:
    """Returns the folder of --pretrained_model_name_or_path; a Hub id is downloaded, or found in the Hub's cache.

    Raises:
        UserError: if there is no such model, or a part of it is missing.
    """
    name = args.pretrained_model_name_or_path
    folder = Path(name)
    if not os.path.isdir(folder):
        # A Hub id is "name" or "owner/name"; everything else can only have meant a path.
        if os.path.isfile(folder) or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"--pretrained_model_name_or_path {name} is not a folder")
        folder = _download(name, args.revision)
    parts = ["text_encoder", "vae", "scheduler"]
    parts += [] if args.external_unet_path else ["unet"]
    parts += [] if args.tokenizer_name else ["tokenizer"]
    missing = sorted(part for part in parts if not (folder / part).is_dir())
    if missing:
        raise UserError(
            f"--pretrained_model_name_or_path {name} has no {', '.join(missing)}: "
            "it is not a whole Stable Diffusion folder in diffusers' layout"
        )
    _check_index(folder)
    return folder


def _check_index(folder: Path) -> None:
    """Reads the model_index.json that the trained pipeline will be written by.

    Raises:
        UserError: if it is missing or broken, or of a pipeline that this project cannot train.
    """
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text())
        parts = {part: index[part][1] or CLASSES[part] for part in CLASSES if part in index}
        scheduler = getattr(diffusers, index["scheduler"][1], None)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path} is not that of a Stable Diffusion folder in diffusers' layout") from error
    if "text_encoder_2" in index or any(CLASSES[part] != found for part, found in parts.items()):
        raise UserError(
            f"{folder} is a {index.get('_class_name')}, which this project does not train: "
            "use a Stable Diffusion 1.x or 2.x"
        )
    if not hasattr(scheduler, "from_pretrained"):
        raise UserError(f"{path} names a scheduler that diffusers does not have: {index['scheduler'][1]}")
    with _loading("scheduler", folder):
        scheduler.from_pretrained(folder / "scheduler")


def _download(name: str, revision: str | None) -> Path:
    """Brings what is needed of a Hub model into the cache, which alone serves where the Hub is out of reach."""
    unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    try:
        return Path(StableDiffusionPipeline.download(name, revision=revision, use_safetensors=True, **unused))
    except (OSError, ValueError) as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(
            f"--pretrained_model_name_or_path {name} is no folder, and cannot be had from the Hub: {reason}"
        ) from error


def first_line(error: Exception) -> str:
    """Returns the first line of what a library says, or the kind of error where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _loading(part: str, source: str | Path) -> Iterator[None]:
    """Turns what the libraries raise for a file that is missing, torn or of another shape into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # What a damaged file leads the libraries to has no limit.
        raise UserError(f"cannot load the {part} of {source}: {first_line(error)}") from error


def _load_weights(kind: type, folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Loads a part on the CPU, from safetensors alone: to unpickle a file is to run what it says.

    Raises:
        UserError: if its weights are not whole, or not all finite.
    """
    if not any(folder.glob("*.safetensors*")) and any(folder.glob("*.bin*")):
        raise UserError(
            f"{folder} has its weights in a pickle file (.bin), which may run code when it is read: "
            "convert them to safetensors"
        )
    module, info = kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:
        raise UserError(f"{folder} has no weights for {min(info['missing_keys'])}")
    for name, parameter in module.named_parameters():
        if not all_finite(parameter):
            raise UserError(f"the weights in {folder} are damaged: {name} is not finite everywhere")
    return module


def load_tokenizer(model: Path, other: str | None) -> CLIPTokenizer:
    """Loads the tokenizer of `model`, or of the folder or Hub id `other` where that is given."""
    with _loading("tokenizer", other or model):
        return CLIPTokenizer.from_pretrained(other) if other else CLIPTokenizer.from_pretrained(model / "tokenizer")


def load_text_encoder(model: Path, trained: Path | None) -> CLIPTextModel:
    """Loads the text encoder, fp32, on the CPU: that of `model`, or of the checkpoint `trained` where that has one."""
    folder = trained if trained and (trained / "text_encoder").is_dir() else model
    with _loading("text encoder", folder):
        return _load_weights(CLIPTextModel, folder / "text_encoder")


def load_vae(model: Path, resolution: int) -> AutoencoderKL:
    """Loads the VAE: frozen, fp32, on the CPU.

    Raises:
        UserError: if it cannot be loaded, or its factor does not divide `resolution`.
    """
    with _loading("VAE", model):
        vae = _load_weights(AutoencoderKL, model / "vae")
    factor = vae_factor(vae)
    if resolution % factor:
        lower = resolution // factor * factor
        raise UserError(
            f"--resolution {resolution} is not a multiple of {factor}, the factor of this model's VAE: "
            f"use {f'{lower} or ' if lower else ''}{lower + factor}"
        )
    return vae.requires_grad_(False).eval()


def load_unet(model: Path, external: str | Path | None, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Loads the UNet that is trained, on the CPU: that of `model`, or of the folder `external` where given."""
    folder = Path(external or model)
    # An external folder is a UNet itself, such as checkpoint-500/unet, or has one.
    folder = folder / "unet" if (folder / "unet").is_dir() else folder
    with _loading("UNet", folder):
        return _load_weights(UNet2DConditionModel, folder, dtype)


def load_noise_scheduler(model: Path) -> DDPMScheduler:
    """Loads the noise schedule that the checkpoint was trained with.

    Raises:
        UserError: if its UNet predicts something that this project has no loss for.
    """
    with _loading("scheduler", model):
        noise_scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
        if not noise_scheduler.alphas_cumprod.isfinite().all() or not len(noise_scheduler.alphas_cumprod):
            raise ValueError("its noise schedule is empty or not finite")
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"the scheduler of {model} has prediction_type {prediction_type!r}; "
            f"this project trains {' and '.join(PREDICTION_TYPES)}"
        )
    return noise_scheduler


def load_pipeline(
    model: Path, dtype: torch.dtype = torch.float32, **parts: torch.nn.Module | CLIPTokenizer
) -> StableDiffusionPipeline:
    """Loads `model` anew, on the CPU, with some of its `parts` replaced and without a safety checker."""
    disable_progress_bar()  # a bar for five parts, on every rank
    with _loading("pipeline", model):
        pipeline = StableDiffusionPipeline.from_pretrained(
            model,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
            use_safetensors=True,
            torch_dtype=dtype,
            **parts,
        )
    return pipeline.to(dtype=dtype)


def check_parts_fit(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, vae: AutoencoderKL, unet: UNet2DConditionModel
) -> None:
    """Compares the shapes that the parts hand to each other.

    Raises:
        UserError: if they are parts of different models, or of one that needs more than an image and a prompt.
    """
    tokens, known = len(tokenizer), text_encoder.config.vocab_size
    if tokens > known:
        raise UserError(f"the tokenizer has {tokens} tokens, of which the text encoder knows {known}: use its own")
    channels, latents = unet.config.in_channels, vae.config.latent_channels
    if channels != latents or unet.config.out_channels != latents:
        hint = "it is an inpainting model, which cannot be trained here" if channels == 9 else "use the VAE's own UNet"
        raise UserError(
            f"the UNet takes {channels} channels and returns {unet.config.out_channels}, "
            f"and the VAE's latents have {latents}: {hint}"
        )
    width, encoded = unet.config.cross_attention_dim, text_encoder.config.hidden_size
    if any(one != encoded for one in (width if isinstance(width, list | tuple) else [width])):
        raise UserError(
            f"the UNet reads prompts of width {width}, and the text encoder writes {encoded}: use a UNet of this model"
        )
    if any(unet.config[name] for name in ("addition_embed_type", "class_embed_type", "num_class_embeds")):
        raise UserError("the UNet wants more than an image and a prompt: use that of a Stable Diffusion 1.x or 2.x")


def vae_factor(vae: AutoencoderKL) -> int:
    """Returns by how much the VAE's latents are smaller than its images, along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_shape(vae: AutoencoderKL, resolution: int) -> tuple[int, int, int]:
    """Returns (channels, height, width) of the latents of a square image of `resolution` pixels."""
    side = resolution // vae_factor(vae)
    return vae.config.latent_channels, side, side


def max_tokens(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> int:
    """Returns how many tokens of a prompt are read, its start and end marks counted in."""
    return min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)


def warn_of_cut_prompts(prompts: list[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """Tells which prompts are longer than what is read, and what of them is cut."""
    longest = max_tokens(tokenizer, text_encoder)
    for prompt in prompts:
        tokens = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(tokens) > longest:
            cut = tokenizer.decode(tokens[longest - 1 : -1])  # the end mark takes the last place
            warn(f"the prompt {prompt!r} is longer than the {longest - 2} tokens that fit; this part is cut: {cut!r}")


def tokenize(prompts: list[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> torch.Tensor:
    """Splits prompts into the tokens that the text encoder reads; warns where one is cut.

    Returns:
        Tensor of shape (prompts, tokens), int64, on the CPU.
    """
    warn_of_cut_prompts(prompts, tokenizer, text_encoder)
    longest = max_tokens(tokenizer, text_encoder)
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt").input_ids


@torch.no_grad()
def embed(token_ids: torch.Tensor, text_encoder: CLIPTextModel, dtype: torch.dtype) -> torch.Tensor:
    """Encodes prompts once and for all, on the device where their tokens are.

    Args:
        token_ids: (prompts, tokens), int64.
        text_encoder: is moved there.
        dtype: to keep the result in; it is computed in fp32, as it happens once.

    Returns:
        Tensor of shape (prompts, tokens, width), of `dtype`, on the CPU: all captions of a large data set would take
        more of a GPU than the model.
    """
    text_encoder.to(token_ids.device, torch.float32)
    return torch.cat([text_encoder(some)[0].to("cpu", dtype) for some in token_ids.split(ENCODED_AT_A_TIME)])
