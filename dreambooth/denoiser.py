"""What is trained: the UNet, and with --train_text_encoder the text encoder, as one module."""

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from dreambooth.console import RunError


class Denoiser(torch.nn.Module):
    """A UNet that is told what an image shows: by embeddings, or in tokens that its own text encoder reads.

    The names of its parameters begin with the part that they belong to, "unet." or "text_encoder.".

    Args:
        unet: trained.
        text_encoder: trained too; None where it is frozen, and has done its work before.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel | None = None):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
        """Returns the UNet's prediction.

        Args:
            noisy_latents: (batch, channels, height, width), in the dtype of the weights.
            timesteps: (batch,), int64.
            prompts: (batch, tokens), int64, for the text encoder; without it (batch, tokens, width), its embeddings.

        Returns:
            Tensor of the shape of `noisy_latents`.
        """
        embeddings = prompts if self.text_encoder is None else self.text_encoder(prompts)[0]
        return self.unet(noisy_latents, timesteps, embeddings).sample

    def enable_gradient_checkpointing(self) -> None:
        """Makes the parts recompute activations in the backward pass."""
        self.unet.enable_gradient_checkpointing()
        if self.text_encoder is not None:
            self.text_encoder.gradient_checkpointing_enable()

    def parts_with(self, weights: dict[str, Tensor]) -> dict[str, torch.nn.Module]:
        """Returns the parts of a pipeline that training changes, anew and with other weights.

        Args:
            weights: by the names of all parameters; they become the parts' own.

        Returns:
            Models on the CPU, by "unet" and "text_encoder".

        Raises:
            RunError: if a weight is not a finite number, so that no file gets such weights.
        """
        broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
        if broken:
            raise RunError(f"the weights hold values that are not finite, in {broken[0]}: they are not saved")
        parts = {}
        for part, model in self.named_children():
            with init_empty_weights():  # no time for random weights that are replaced
                parts[part] = (
                    UNet2DConditionModel.from_config(model.config) if part == "unet" else CLIPTextModel(model.config)
                )
            own = {name.removeprefix(f"{part}."): t for name, t in weights.items() if name.startswith(f"{part}.")}
            parts[part].load_state_dict(own, assign=True)
        return parts
