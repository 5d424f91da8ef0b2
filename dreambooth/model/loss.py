"""The loss of DreamBooth (Ruiz et al., arXiv 2208.12242, equation 2) on a latent diffusion model.

A step of training is, for images x with prompts c, noise e and timesteps t:

    z = scaling_factor * (mean(x) + std(x) * e')      a sample of the VAE's posterior
    z_t = sqrt(abar_t) * z + sqrt(1 - abar_t) * e     the noise schedule
    loss = |unet(z_t, t, c) - target|^2               mean over instance examples
           + prior_loss_weight * the same             mean over class examples
"""

import contextlib

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor

from dreambooth.model.family import Conditioning

MAX_ENCODED_AT_A_TIME, MAX_PIXELS_AT_A_TIME = 4, 2**19  # for an encoder in fp32 in two GiB, or what one image takes


def images_at_a_time(resolution: int) -> int:
    """Returns how many images of a side of so many pixels are encoded at a time."""
    return min(MAX_ENCODED_AT_A_TIME, max(1, MAX_PIXELS_AT_A_TIME // resolution**2))


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixel_values: Tensor, posterior_noise: Tensor) -> Tensor:
    """Samples the VAE's posterior of images, a few at a time, with the noise given.

    Args:
        vae: frozen; one in fp32 computes in fp32, also under autocast.
        pixel_values: (batch, 3, height, width), in [-1, 1], any float dtype.
        posterior_noise: (batch, channels, height / f, width / f), float32, standard normal.

    Returns:
        Latents of the shape of `posterior_noise`, float32, multiplied by the VAE's scaling factor.
    """
    as_it_is = torch.autocast(pixel_values.device.type, enabled=False)
    with as_it_is if vae.dtype == torch.float32 else contextlib.nullcontext():
        few = pixel_values.to(vae.dtype).split(images_at_a_time(pixel_values.shape[-1]))
        posteriors = [vae.encode(images).latent_dist for images in few]
    mean, std = (torch.cat([getattr(one, name).float() for one in posteriors]) for name in ("mean", "std"))
    latents = mean + std * posterior_noise
    # The VAE's attention may leave the channels last in memory. The UNet would go on so, up to the gradients of its
    # weights, of which Gemini takes only those that lie as the weights do.
    return (latents * vae.config.scaling_factor).contiguous()


def latents_of(batch: dict[str, Tensor], vae: AutoencoderKL) -> Tensor:
    """Returns the latents of a batch of `dreambooth.data.samples.collate`, encoding the images that are not yet.

    Returns:
        (batch, channels, height, width), float32, multiplied by the VAE's scaling factor.
    """
    parts = [batch["latents"]] if "latents" in batch else []
    if "pixel_values" in batch:
        parts.append(encode_images(vae, batch["pixel_values"], batch["posterior_noise"]))
    return torch.cat(parts)[batch["rows"]]


def target_of(noise_scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Returns what the UNet has to predict: the noise, or v = sqrt(abar_t) e - sqrt(1 - abar_t) z.

    v-prediction: Salimans and Ho, "Progressive distillation for fast sampling of diffusion models", arXiv 2202.00512.

    Args:
        latents, noise: (batch, channels, height, width), float32.
        timesteps: (batch,), int64.

    Returns:
        Tensor of the shape of `noise`, float32.
    """
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    assert noise_scheduler.config.prediction_type == "epsilon", noise_scheduler.config.prediction_type
    return noise


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Returns the weights min(snr, gamma) / snr, or for v-prediction min(snr, gamma) / (snr + 1).

    snr = abar_t / (1 - abar_t), the ratio of signal to noise. From Hang et al., "Efficient diffusion training via
    min-SNR weighting strategy", arXiv 2303.09556: it keeps timesteps of little noise from ruling the gradient.

    Args:
        timesteps: (batch,), int64.
        gamma: above 0.

    Returns:
        Tensor of shape (batch,), float32.
    """
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)  # 1 where there is no signal at all


def dreambooth_loss(
    prediction: Tensor, target: Tensor, weights: Tensor, timestep_weights: Tensor | None = None
) -> Tensor:
    """Mean squared error in float32: a mean over samples, of the weighted sum over a sample's examples.

    Args:
        prediction, target: (examples * samples, channels, height, width): the first example of each sample, then the
            second of each.
        weights: (examples, samples), float32: 1 of instance examples, prior_loss_weight of class examples.
        timestep_weights: (examples * samples,), float32; None is 1 for each.

    Returns:
        Scalar, float32.
    """
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)
    if timestep_weights is not None:
        errors = errors * timestep_weights
    return (errors.view_as(weights) * weights).mean(1).sum()


def example_inputs(
    examples: int, latent_shape: tuple[int, ...], conditioning: Conditioning, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Conditioning]:
    """Returns what `training_loss` would hand to the denoiser: zeros, of the same shapes and dtypes.

    Args:
        examples: in a batch, class examples included.
        latent_shape: (channels, height, width).
        conditioning: of any number of prompts or examples, of which a batch has rows.
        dtype: that of `training_loss`.
        device: the denoiser's.
    """
    latents = torch.zeros(examples, *latent_shape, dtype=dtype, device=device)
    timesteps = torch.zeros(examples, dtype=torch.int64, device=device)
    rows = {name: one[:1].to(device).repeat_interleave(examples, dim=0) for name, one in conditioning.items()}
    return latents, timesteps, rows


def training_loss(
    denoiser: torch.nn.Module,
    batch: dict[str, Tensor],
    *,
    vae: AutoencoderKL,
    noise_scheduler: DDPMScheduler,
    dtype: torch.dtype,
    snr_gamma: float | None = None,
) -> Tensor:
    """Returns the loss of one batch.

    Args:
        denoiser: called as `dreambooth.model.denoiser.Denoiser`, wrapped or not.
        batch: what `dreambooth.data.samples.collate` makes, on the denoiser's device, with the conditioning by which
            the denoiser is to predict.
        vae: frozen, on the same device where the batch has images to encode.
        noise_scheduler: adds the noise and defines the target.
        dtype: of the denoiser's weights, hence of its inputs.
        snr_gamma: of `min_snr_weights`; None weighs all timesteps alike.

    Returns:
        Scalar, float32, with gradient.
    """
    latents = latents_of(batch, vae)
    noisy_latents = noise_scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
    target = target_of(noise_scheduler, latents, batch["noise"], batch["timesteps"])
    prediction = denoiser(noisy_latents.to(dtype), batch["timesteps"], batch["conditioning"])
    of_timesteps = None if snr_gamma is None else min_snr_weights(noise_scheduler, batch["timesteps"], snr_gamma)
    return dreambooth_loss(prediction, target, batch["weights"], of_timesteps)
