"""Comparisons of what parts hand to each other with what they read, for the families' `check_fit`."""

import math

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from dreambooth.command_line.console import UserError, counted

RGB = 3  # channels of an image


def check_vocabulary(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """Finds tokens that a text encoder does not know.

    Raises:
        UserError: if there are any.
    """
    tokens, known = len(tokenizer), text_encoder.config.vocab_size
    if tokens > known:
        raise UserError(f"the tokenizer has {tokens} tokens, of which the text encoder knows {known}: use its own")


def check_latents(unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    """Compares the channels of a UNet with those of a VAE's latents.

    Raises:
        UserError: if they are not as many.
    """
    channels, latents = unet.config.in_channels, vae.config.latent_channels
    if channels != latents or unet.config.out_channels != latents:
        inpainting = "it is an inpainting model, which cannot be trained here"
        hint = inpainting if channels == 9 else "use the VAE's own UNet"
        raise UserError(
            f"the UNet takes {channels} channels and returns {unet.config.out_channels}, "
            f"and the VAE's latents have {latents}: {hint}"
        )


def check_vae(vae: AutoencoderKL) -> None:
    """Finds a VAE that is not one of images in RGB, or whose latents are scaled by no positive number.

    Raises:
        UserError: if it is such.
    """
    found = vae.config
    if (found.in_channels, found.out_channels) != (RGB, RGB):
        channels = counted(found.in_channels, "channel")
        raise UserError(f"the VAE reads images of {channels} and returns such of {found.out_channels}: use one of RGB")
    if not 0 < found.scaling_factor < math.inf:
        raise UserError(
            f"the VAE scales latents by {found.scaling_factor:g}: use one that does so by a positive number"
        )


def check_width(unet: UNet2DConditionModel, encoded: int) -> None:
    """Compares the width of the prompts that a UNet reads with that of encoded ones.

    Raises:
        UserError: if some layer reads another width.
    """
    width = unet.config.cross_attention_dim
    if any(one != encoded for one in (width if isinstance(width, list | tuple) else [width])):
        raise UserError(
            f"the UNet reads prompts of width {width}, and this model encodes them in {encoded}: use a UNet of it"
        )
