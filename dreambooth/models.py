"""The five parts of a Stable Diffusion checkpoint: tokenizer, text encoder, VAE, UNet, noise scheduler."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.logging import disable_progress_bar
from transformers import CLIPTextModel, CLIPTokenizer

from dreambooth.console import UserError, warn

PREDICTION_TYPES = ("epsilon", "v_prediction")


def find_model(args: argparse.Namespace) -> Path:
    """Returns the folder of --pretrained_model_name_or_path; a Hub id is downloaded, or found in the Hub's cache.

    Raises:
        UserError: if there is no such model, or a part of it is missing.
    """
    name = args.pretrained_model_name_or_path
    folder = Path(name)
    if not folder.is_dir():
        # A Hub id is "name" or "owner/name"; everything else can only have meant a path.
        if folder.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
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
    return folder


def _download(name: str, revision: str | None) -> Path:
    """Brings what is needed of a Hub model into the cache, which alone serves where the Hub is out of reach."""
    unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    try:
        return Path(StableDiffusionPipeline.download(name, revision=revision, **unused))
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
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"cannot load the {part} of {source}: {first_line(error)}") from error


def load_tokenizer(model: Path, other: str | None) -> CLIPTokenizer:
    """Loads the tokenizer of `model`, or of the folder or Hub id `other` where that is given."""
    with _loading("tokenizer", other or model):
        return CLIPTokenizer.from_pretrained(other) if other else CLIPTokenizer.from_pretrained(model / "tokenizer")


def load_text_encoder(model: Path) -> CLIPTextModel:
    """Loads the text encoder: frozen, fp32, on the CPU."""
    with _loading("text encoder", model):
        text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder", torch_dtype=torch.float32)
    return text_encoder.requires_grad_(False).eval()


def load_vae(model: Path, resolution: int) -> AutoencoderKL:
    """Loads the VAE: frozen, fp32, on the CPU.

    Raises:
        UserError: if it cannot be loaded, or its factor does not divide `resolution`.
    """
    with _loading("VAE", model):
        vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32)
    factor = vae_factor(vae)
    if resolution % factor:
        lower = resolution // factor * factor
        raise UserError(
            f"--resolution {resolution} is not a multiple of {factor}, the factor of this model's VAE: "
            f"use {f'{lower} or ' if lower else ''}{lower + factor}"
        )
    return vae.requires_grad_(False).eval()


def load_unet(model: Path, external: str | None) -> UNet2DConditionModel:
    """Loads the UNet that is trained, fp32, on the CPU: that of `model`, or of the folder `external` where given."""
    folder = Path(external or model)
    # An external folder is a UNet itself, such as checkpoint-500/unet, or has one.
    folder = folder / "unet" if (folder / "unet").is_dir() else folder
    with _loading("UNet", folder):
        return UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)


def load_noise_scheduler(model: Path) -> DDPMScheduler:
    """Loads the noise schedule that the checkpoint was trained with.

    Raises:
        UserError: if its UNet predicts something that this project has no loss for.
    """
    with _loading("scheduler", model):
        noise_scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"the scheduler of {model} has prediction_type {prediction_type!r}; "
            f"this project trains {' and '.join(PREDICTION_TYPES)}"
        )
    return noise_scheduler


def load_pipeline(
    model: Path, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer, torch_dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """Loads `model` anew, with `unet` and `tokenizer` in place of its own and without a safety checker."""
    disable_progress_bar()  # a bar for five parts, on every rank
    with _loading("pipeline", model):
        return StableDiffusionPipeline.from_pretrained(
            model,
            unet=unet,
            tokenizer=tokenizer,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
            torch_dtype=torch_dtype,
        )


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


@torch.no_grad()
def embed_prompts(
    prompts: list[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Encodes each prompt once; warns where one is cut.

    Returns:
        Tensor of shape (prompts, tokens, width), of `dtype`, on `device`.
    """
    warn_of_cut_prompts(prompts, tokenizer, text_encoder)
    longest = max_tokens(tokenizer, text_encoder)
    token_ids = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
    ).input_ids
    text_encoder = text_encoder.to(device, dtype)
    return text_encoder(token_ids.to(device))[0]
