"""A model by its configurations alone: how many weights it has, and what its steps hold in memory."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dreambooth.command_line.flags import LoraFlags
from dreambooth.model.activations import discard_activations
from dreambooth.model.components import (
    check_resolution,
    empty_copy,
    latent_shape,
    loading,
    part_folder,
    without_weights,
)
from dreambooth.model.denoiser import Denoiser
from dreambooth.model.family import Conditioning, Family, View
from dreambooth.model.folder import family_of
from dreambooth.model.lora import adapters_of, add_adapters
from dreambooth.model.loss import example_inputs
from dreambooth.model.pipeline import load_tokenizers
from dreambooth.model.tracing import Moment, Passes, trace

NOTHING: Mapping[str, Path] = {}
HELD_IN_ENCODING = 8  # tensors of its widest level: as traced, a VAE's encoder holds 5 of them, or fewer


@dataclass(frozen=True, eq=False)
class Outline:
    """A model without weights, for runs of one resolution.

    Args:
        family: of the model.
        components: those that have weights, on the meta device, by their names.
        resolution: of the images, in pixels.
    """

    family: Family
    components: Mapping[str, torch.nn.Module]
    resolution: int

    def trained(self, text_encoders: bool) -> tuple[str, ...]:
        """Returns the names of the components that are trained, with or without the text encoders."""
        return "unet", *(self.family.text_encoders if text_encoders else ())

    def size(self, *names: str) -> int:
        """Returns the number of weights of some components, frozen ones too."""
        return sum(weight.numel() for name in names for weight in self.components[name].parameters())

    def denoiser(self, text_encoders: bool, lora: LoraFlags, dtype: torch.dtype = torch.float32) -> Denoiser:
        """Returns what is trained, with what is frozen beside its adapters; anew, on the meta device."""
        parts = {name: empty_copy(self.components[name]) for name in self.trained(text_encoders)}
        adapters = None
        if lora.is_on:
            adapters = adapters_of(lora, parts, base="", instance_prompt=None)
            add_adapters(parts, adapters, seed=0)
        if text_encoders:
            self.family.freeze_unread(parts)
        return Denoiser(self.family, adapters=adapters, **parts).train().to("meta", dtype)

    @functools.cache  # noqa: B019 - one outline lives as long as a run
    def _shapes(self, text_encoders: bool, lora: LoraFlags) -> tuple[list[torch.Size], list[torch.Size]]:
        """Returns those of the weights that are trained, and of all weights."""
        denoiser = self.denoiser(text_encoders, lora)
        return [weight.shape for weight in denoiser.trained], [weight.shape for weight in denoiser.parameters()]

    def weights(self, text_encoders: bool, lora: LoraFlags) -> tuple[int, int]:
        """Returns the number of weights that are trained, and of those in convolutions over more than a pixel."""
        shapes, _ = self._shapes(text_encoders, lora)
        of_convolutions = [shape.numel() for shape in shapes if len(shape) == 4 and shape[2:].numel() > 1]
        return sum(shape.numel() for shape in shapes), sum(of_convolutions)

    @functools.cache  # noqa: B019 - as above
    def chunks(self, text_encoders: bool) -> int:
        """Returns the number of elements of the equal chunks that Gemini lays flat parameters into, one in each."""
        denoiser = self.denoiser(text_encoders, LoraFlags())  # which leave it nothing to split
        denoiser.trained.flatten(1)
        lengths = [flat.numel() for flat in denoiser.trained.parameters()]
        return len(lengths) * max(lengths)

    @functools.cache  # noqa: B019 - as above
    def passes(
        self,
        text_encoders: bool,
        lora: LoraFlags,
        dtype: torch.dtype,
        *,
        recomputes: bool = False,
        discards: bool = False,
    ) -> Passes:
        """Returns what a forward and a backward pass of one example hold, in a second or two.

        Args:
            text_encoders: whether they are trained.
            lora: adapters, if they alone are.
            dtype: in which it is computed.
            recomputes: with --gradient_checkpointing.
            discards: with what `discard_activations` does.
        """
        denoiser = self.denoiser(text_encoders, lora, dtype)
        if recomputes:
            denoiser.enable_gradient_checkpointing()
        elif discards:
            discard_activations(denoiser.unet)
        inputs = example_inputs(1, self.latents, self._conditioning(text_encoders), dtype, torch.device("meta"))
        return trace(lambda: denoiser(*inputs), denoiser.parameters())

    def passes_at_most(self, text_encoders: bool, lora: LoraFlags, dtype: torch.dtype) -> Passes:
        """Returns more than any passes hold, at once: as if each layer were as wide as the latents and kept all."""
        trained, every = self._shapes(text_encoders, lora)
        widths = sum(sum(shape[:2]) for shape in every)
        places = max(self.latents[1] * self.latents[2], self._tokens)
        return Passes((Moment(widths * places * dtype.itemsize, sum(shape.numel() for shape in trained)),))

    @functools.cache  # noqa: B019 - as above
    def encoding(self, images: int, dtype: torch.dtype) -> int:
        """Returns the bytes that the VAE takes to encode so many images, without its weights."""
        vae = empty_copy(self.components["vae"]).requires_grad_(False).to(dtype)
        pixels = torch.empty(images, 3, self.resolution, self.resolution, dtype=dtype, device="meta")
        return trace(lambda: vae.encode(pixels).latent_dist.mean, vae.parameters()).peak().activations

    def encoding_at_most(self, images: int, dtype: torch.dtype) -> int:
        """Returns more than `encoding`, at once: of the widest of the encoder's levels, which holds few tensors."""
        widths = self.components["vae"].config.block_out_channels
        numbers = max(width * self.resolution**2 // 4**level for level, width in enumerate(widths))
        return HELD_IN_ENCODING * images * numbers * dtype.itemsize

    @property
    def latents(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image's latents."""
        return latent_shape(self.components["vae"], self.resolution)

    @property
    def _tokens(self) -> int:
        """How many of a prompt the text encoders read."""
        return max(self.components[name].config.max_position_embeddings for name in self.family.text_encoders)

    def _conditioning(self, text_encoders: bool) -> Conditioning:
        """Returns what the denoiser reads beside latents, of one example."""
        names = ["input_ids", *(f"input_ids_{n + 2}" for n in range(len(self.family.text_encoders) - 1))]
        conditioning = {name: torch.zeros(1, self._tokens, dtype=torch.int64, device="meta") for name in names}
        if not text_encoders:
            readers = {name: empty_copy(self.components[name]).to("meta") for name in self.family.text_encoders}
            with torch.no_grad():
                conditioning = self.family.encode(conditioning, readers)
        side = self.resolution
        of_view = self.family.of_view(View((side, side), (0, 0), (side, side)))
        return conditioning | {name: tensor[None] for name, tensor in of_view.items()}


def outline_of(
    folder: Path, resolution: int, elsewhere: Mapping[str, Path] = NOTHING, tokenizer: Path | None = None
) -> Outline:
    """Returns the outline of the model in a folder, which `find_folder` has looked at; no weights are read.

    Args:
        folder: of the model.
        resolution: of the images, in pixels.
        elsewhere: folders of parts that come from somewhere else.
        tokenizer: folder of other tokenizers than its own.

    Raises:
        UserError: if a configuration cannot be read, parts do not fit, or images of that resolution have no latents.
    """
    family = family_of(folder)
    components = {}
    for name, kind in family.components.items():
        source = elsewhere.get(name, folder)
        with loading(family.labels[name], source):
            components[name] = without_weights(kind, part_folder(source, name))
    check_resolution(resolution, components["vae"])
    if elsewhere:
        family.check_fit(load_tokenizers(family, tokenizer or folder), components)
    return Outline(family, components, resolution)


def times(passes: Passes, examples: int) -> Passes:
    """Returns the passes of so many examples, from those of one: activations grow with their number."""
    return Passes(tuple(replace(one, activations=examples * one.activations) for one in passes.moments))
