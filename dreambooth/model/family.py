"""What is particular to a kind of model: a family is one object, in a file of its own, such as stable_diffusion.py.

Everything else trains whatever a family describes. folder.py has the list of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from torch import Tensor
from transformers import CLIPTokenizer

# What a prediction depends on besides latents and timesteps: tensors whose first dimension is that of prompts or of
# examples, by the names of the arguments of the module that takes them. A frozen text encoder leaves those of the
# UNet; one that is trained takes tokens.
Conditioning = dict[str, Tensor]


@dataclass(frozen=True)
class View:
    """What an example shows of an image, in pixels.

    Args:
        original_size: (height, width) of the image.
        crop: (top, left) of what is shown, in the image scaled as it is shown.
        size: (height, width) of what is shown.
    """

    original_size: tuple[int, int]
    crop: tuple[int, int]
    size: tuple[int, int]


# What reads a prompt: a tokenizer, and its text encoder.
Reader = tuple[CLIPTokenizer, torch.nn.Module]


@dataclass
class Model:
    """A model, loaded for training, on the CPU.

    Args:
        family: of the model.
        tokenizers: by their folders.
        components: those that have weights, by their folders.
        noise_scheduler: the noise that it was trained with.
    """

    family: "Family"
    tokenizers: dict[str, CLIPTokenizer]
    components: dict[str, torch.nn.Module]
    noise_scheduler: DDPMScheduler

    @property
    def text_encoders(self) -> dict[str, torch.nn.Module]:
        """Those of the components that read prompts, in their order."""
        return {name: self.components[name] for name in self.family.text_encoders}

    @property
    def readers(self) -> list[Reader]:
        """All that read prompts."""
        return readers_of(self.family, self.tokenizers | self.components)


class Family(Protocol):
    """A kind of model.

    Every one has a UNet, "unet", and a VAE, "vae".
    """

    name: str  # as in "use a Stable Diffusion 1.x or 2.x"
    pipeline: type[DiffusionPipeline]  # that draws
    components: Mapping[str, type]  # classes of the parts that have weights, by their folders
    labels: Mapping[str, str]  # what messages call them
    text_encoders: tuple[str, ...]  # those of them that read prompts
    tokenizers: tuple[str, ...]  # a tokenizer's folder for each
    others: tuple[str, ...]  # parts that a folder may have besides, and that are not used
    left_out: Mapping[str, Any]  # arguments of the pipeline in their place
    resolution: int  # of training images, in pixels, where no flag names one
    heeds_force_upcast: bool  # whether force_upcast of the VAE's configuration is meant: all have it, as its default

    def told_apart(self, classes: Mapping[str, str | None]) -> str | None:
        """Returns what a model is that shares parts with this family and cannot be trained; None if it is not such.

        Args:
            classes: of its parts, by their folders; None of one that is left out.
        """

    def check_fit(self, tokenizers: Mapping[str, CLIPTokenizer], components: Mapping[str, torch.nn.Module]) -> None:
        """Compares the shapes that the parts hand to each other.

        Raises:
            UserError: if they are parts of different models, or of one that this family does not describe.
        """

    def freeze_unread(self, components: Mapping[str, torch.nn.Module]) -> None:
        """Freezes the weights that no prediction depends on, as their gradients would never come."""

    def tokenize(
        self,
        prompts: list[str],
        tokenizers: Mapping[str, CLIPTokenizer],
        components: Mapping[str, torch.nn.Module],
    ) -> Conditioning:
        """Splits prompts into what the text encoders read, on the CPU; what is longer than they read is cut."""

    def encode(self, tokens: Conditioning, text_encoders: Mapping[str, torch.nn.Module]) -> Conditioning:
        """Returns what the UNet reads of prompts, with gradients where the text encoders are trained."""

    def of_view(self, view: View) -> Conditioning:
        """Returns what the UNet reads of an example's view besides, without a dimension of examples; on the CPU."""

    def predict(
        self, unet: torch.nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Returns the UNet's prediction, of the shape of `noisy_latents`."""


def readers_of(family: Family, parts: Mapping[str, Any]) -> list[Reader]:
    """Returns all that read prompts among the parts of a model, which are by their names."""
    return [(parts[one], parts[other]) for one, other in zip(family.tokenizers, family.text_encoders, strict=True)]


def dtype_of_vae(family: Family, vae: AutoencoderKL, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that a VAE computes in, in a run of `dtype`: fp32 if half precision overflows in it."""
    return torch.float32 if family.heeds_force_upcast and vae.config.force_upcast else dtype
