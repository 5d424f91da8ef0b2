"""The loss of DreamBooth (Ruiz et al., arXiv 2208.12242, equation 2) on a latent diffusion model.

A step of training is, for images x with prompts c, noise e and timesteps t:

    z = scaling_factor * (mean(x) + std(x) * e')      a sample of the VAE's posterior
    z_t = sqrt(abar_t) * z + sqrt(1 - abar_t) * e     the noise schedule
    loss = |unet(z_t, t, c) - target|^2               mean over instance examples
           + prior_loss_weight * the same             mean over class examples
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixel_values: Tensor, posterior_noise: Tensor) -> Tensor:
    """Samples the VAE's posterior of images, with the noise given.

    Args:
        vae: frozen, in the run's precision.
        pixel_values: (batch, 3, height, width), in [-1, 1], any float dtype.
        posterior_noise: (batch, channels, height / f, width / f), float32, standard normal.

    Returns:
        Latents of the shape of `posterior_noise`, float32, multiplied by the VAE's scaling factor.
    """
    posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
    latents = posterior.mean.float() + posterior.std.float() * posterior_noise
    return latents * vae.config.scaling_factor


def latents_of(batch: dict[str, Tensor], vae: AutoencoderKL) -> Tensor:
    """Returns the latents of a batch of `dreambooth.data.collate`, encoding the images that are not yet.

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


def dreambooth_loss(prediction: Tensor, target: Tensor, prior_loss_weight: float | None) -> Tensor:
    """Mean squared error in float32: the instance term, plus the weighted prior term.

    Args:
        prediction, target: (batch, channels, height, width); with a prior, the first half of the batch are
            instance examples and the second half class examples.
        prior_loss_weight: weight of the prior term; None where there is no prior.

    Returns:
        Scalar, float32.
    """
    prediction, target = prediction.float(), target.float()
    if prior_loss_weight is None:
        return F.mse_loss(prediction, target)
    instance_prediction, class_prediction = prediction.chunk(2)
    instance_target, class_target = target.chunk(2)
    instance_term = F.mse_loss(instance_prediction, instance_target)
    return instance_term + prior_loss_weight * F.mse_loss(class_prediction, class_target)


def training_loss(
    unet: torch.nn.Module,
    batch: dict[str, Tensor],
    *,
    vae: AutoencoderKL,
    prompt_embeddings: Tensor,
    noise_scheduler: DDPMScheduler,
    unet_dtype: torch.dtype,
    prior_loss_weight: float | None,
) -> Tensor:
    """Returns the loss of one step.

    Args:
        unet: called as diffusers' UNet2DConditionModel, wrapped or not.
        batch: what `dreambooth.data.collate` makes, on the UNet's device.
        vae: frozen, on the same device where the batch has images to encode.
        prompt_embeddings: (prompts, tokens, width).
        noise_scheduler: adds the noise and defines the target.
        unet_dtype: dtype of the UNet's weights, hence of its inputs.
        prior_loss_weight: weight of the prior term; None where the batch has no class examples.

    Returns:
        Scalar, float32, with gradient.
    """
    latents = latents_of(batch, vae)
    noisy_latents = noise_scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
    target = target_of(noise_scheduler, latents, batch["noise"], batch["timesteps"])
    text = prompt_embeddings[batch["prompt_indices"]]
    prediction = unet(noisy_latents.to(unet_dtype), batch["timesteps"], text.to(unet_dtype)).sample
    return dreambooth_loss(prediction, target, prior_loss_weight)
