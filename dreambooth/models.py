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


def check_model_source(args: argparse.Namespace) -> None:
    """Finds a model folder that is incomplete before anything is loaded from it.

    Raises:
        UserError: naming the parts that are missing, or the path that does not exist.
    """
    source = args.pretrained_model_name_or_path
    folder = Path(source)
    if not folder.is_dir():
        # A Hub id is "name" or "owner/name"; everything else can only have meant a path.
        if folder.is_file() or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise UserError(f"--pretrained_model_name_or_path {source} is not a folder")
        return
    parts = ["text_encoder", "vae", "scheduler"]
    parts += [] if args.external_unet_path else ["unet"]
    parts += [] if args.tokenizer_name else ["tokenizer"]
    missing = sorted(part for part in parts if not (folder / part).is_dir())
    if missing:
        raise UserError(
            f"--pretrained_model_name_or_path {source} has no {', '.join(missing)}: "
            "it is not a whole Stable Diffusion folder in diffusers' layout"
        )


@contextlib.contextmanager
def _loading(part: str, source: str) -> Iterator[None]:
    """Turns what the libraries raise for a file that is missing, torn or of another shape into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load the {part} of {source}: {first_line}") from error


def load_tokenizer(args: argparse.Namespace) -> CLIPTokenizer:
    """Loads the tokenizer, from --tokenizer_name where that is given."""
    with _loading("tokenizer", args.tokenizer_name or args.pretrained_model_name_or_path):
        if args.tokenizer_name:
            return CLIPTokenizer.from_pretrained(args.tokenizer_name)
        return CLIPTokenizer.from_pretrained(
            args.pretrained_model_name_or_path, subfolder="tokenizer", revision=args.revision
        )


def load_text_encoder(args: argparse.Namespace) -> CLIPTextModel:
    """Loads the text encoder: frozen, fp32, on the CPU."""
    with _loading("text encoder", args.pretrained_model_name_or_path):
        text_encoder = CLIPTextModel.from_pretrained(
            args.pretrained_model_name_or_path,
            subfolder="text_encoder",
            revision=args.revision,
            torch_dtype=torch.float32,
        )
    return text_encoder.requires_grad_(False).eval()


def load_vae(args: argparse.Namespace) -> AutoencoderKL:
    """Loads the VAE: frozen, fp32, on the CPU.

    Raises:
        UserError: if it cannot be loaded, or halves the image in a way that --resolution does not allow.
    """
    with _loading("VAE", args.pretrained_model_name_or_path):
        vae = AutoencoderKL.from_pretrained(
            args.pretrained_model_name_or_path, subfolder="vae", revision=args.revision, torch_dtype=torch.float32
        )
    factor = vae_factor(vae)
    if args.resolution % factor:
        lower = args.resolution // factor * factor
        raise UserError(
            f"--resolution {args.resolution} is not a multiple of {factor}, the factor of this model's VAE: "
            f"use {f'{lower} or ' if lower else ''}{lower + factor}"
        )
    return vae.requires_grad_(False).eval()


def load_unet(args: argparse.Namespace) -> UNet2DConditionModel:
    """Loads the UNet that is trained: fp32, on the CPU; from --external_unet_path where that is given."""
    source = args.external_unet_path or args.pretrained_model_name_or_path
    with _loading("UNet", source):
        if args.external_unet_path:
            # A UNet folder itself, such as checkpoint-500/unet, or a pipeline that has one.
            inside = "unet" if (Path(source) / "unet").is_dir() else None
            return UNet2DConditionModel.from_pretrained(source, subfolder=inside, torch_dtype=torch.float32)
        return UNet2DConditionModel.from_pretrained(
            source, subfolder="unet", revision=args.revision, torch_dtype=torch.float32
        )


def load_noise_scheduler(args: argparse.Namespace) -> DDPMScheduler:
    """Loads the noise schedule that the checkpoint was trained with.

    Raises:
        UserError: if its UNet predicts something that this project has no loss for.
    """
    with _loading("scheduler", args.pretrained_model_name_or_path):
        noise_scheduler = DDPMScheduler.from_pretrained(
            args.pretrained_model_name_or_path, subfolder="scheduler", revision=args.revision
        )
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"the scheduler of {args.pretrained_model_name_or_path} has prediction_type {prediction_type!r}; "
            f"this project trains {' and '.join(PREDICTION_TYPES)}"
        )
    return noise_scheduler


def load_pipeline(
    args: argparse.Namespace, unet: UNet2DConditionModel, torch_dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """Loads the whole checkpoint anew, with `unet` in place of its own and without a safety checker."""
    parts = {"unet": unet, "safety_checker": None, "feature_extractor": None, "image_encoder": None}
    if args.tokenizer_name:
        parts["tokenizer"] = load_tokenizer(args)
    disable_progress_bar()  # a bar for five parts, on every rank
    with _loading("pipeline", args.pretrained_model_name_or_path):
        return StableDiffusionPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            revision=args.revision,
            torch_dtype=torch_dtype,
            requires_safety_checker=False,
            **parts,
        )


def vae_factor(vae: AutoencoderKL) -> int:
    """Returns by how much the VAE's latents are smaller than its images, along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_shape(vae: AutoencoderKL, resolution: int) -> tuple[int, int, int]:
    """Returns (channels, height, width) of the latents of a square image of `resolution` pixels."""
    side = resolution // vae_factor(vae)
    return vae.config.latent_channels, side, side


@torch.no_grad()
def embed_prompts(
    prompts: list[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Encodes each prompt once; warns where the tokenizer has to cut one.

    Returns:
        Tensor of shape (prompts, tokens, width), of `dtype`, on `device`.
    """
    longest = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    for prompt in prompts:
        kept = tokenizer(prompt, truncation=True, max_length=longest).input_ids
        whole = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(whole) > longest:
            # The last id that is kept is the end mark.
            cut = tokenizer.decode(whole[len(kept) - 1 : -1])
            warn(f"the prompt {prompt!r} is longer than the {longest - 2} tokens that fit; this part is cut: {cut!r}")
    token_ids = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
    ).input_ids
    text_encoder = text_encoder.to(device, dtype)
    return text_encoder(token_ids.to(device))[0]
