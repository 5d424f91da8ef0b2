"""What is trained: the UNet, and with --train_text_encoder the text encoders, as one module."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor
from transformers import PreTrainedModel

from dreambooth.command_line.console import RunError
from dreambooth.model.family import Conditioning, Family
from dreambooth.model.precision import all_finite

# Size of a flat parameter: so many elements that few are left, and so few that the first gradients are shared among
# ranks while others are computed.
FLAT_ELEMENTS = 64 * 2**20


class HalfGroupNorm(torch.nn.GroupNorm):
    """A group normalization that under autocast reads and writes half precision, as the layers around it do.

    Autocast would widen it to fp32, and with it what is kept for the backward pass. Mean and variance are in fp32
    either way: the kernel sees to that.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class HalfLayerNorm(torch.nn.LayerNorm):
    """The same for a layer normalization."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


@dataclass(frozen=True)
class Part:
    """What this rank holds of a weight: its flattened elements from `first` to `last`.

    Args:
        name: of the weight.
        tensor: the fp32 weights that AdamW updates, in which these are some.
        start: where they begin in it.
        state_key: by which the optimizer keeps its state of all of them.
    """

    name: str
    first: int
    last: int
    tensor: Tensor
    start: int
    state_key: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Returns the part's elements of a tensor that is laid out as `tensor` is."""
        return tensor.view(-1)[self.start : self.start + self.last - self.first]


@dataclass(frozen=True)
class Piece:
    """Where a weight lies in the parameter that holds it: a flat one, or its own.

    Args:
        name: of the weight.
        offset: of its first element.
        shape: of the weight.
        owner: the module that has it, as its attribute `attribute`.
    """

    name: str
    offset: int
    shape: torch.Size
    owner: torch.nn.Module
    attribute: str

    def part(self, tensor: Tensor, begin: int, state_key: Tensor) -> Part:
        """Returns what of the weight is in `tensor`, which has the parameter's elements from `begin` on."""
        first = max(self.offset, begin)
        last = max(first, min(self.offset + self.shape.numel(), begin + tensor.numel()))
        return Part(self.name, first - self.offset, last - self.offset, tensor, first - begin, state_key)


class Denoiser(torch.nn.Module):
    """The UNet, and the text encoders if they are trained too.

    The names of its weights begin with the part that they belong to, such as "unet." or "text_encoder.".

    Args:
        family: of the model.
        components: those that are trained, by their names: "unet", and text encoders that are not frozen, which have
            done their work before else.
    """

    def __init__(self, family: Family, **components: torch.nn.Module):
        super().__init__()
        self.family = family
        for name, component in components.items():
            self.add_module(name, component)
        self.shapes = {name: parameter.shape for name, parameter in self.named_parameters()}
        self.is_flat = False
        # The weights in each parameter.
        self.pieces = [
            [Piece(f"{path}.{attribute}", 0, parameter.shape, owner, attribute)]
            for path, owner in self.named_modules()
            for attribute, parameter in owner.named_parameters(recurse=False)
        ]

    def numel(self) -> int:
        """Returns the number of its weights."""
        return sum(shape.numel() for shape in self.shapes.values())

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the UNet's prediction.

        Args:
            noisy_latents: (batch, channels, height, width), in the dtype of the weights.
            timesteps: (batch,), int64.
            conditioning: what the text encoders take; without them, what the UNet takes besides.

        Returns:
            Tensor of the shape of `noisy_latents`.
        """
        if self.is_flat:
            self._hand_out_weights(noisy_latents.device.type)
        if text_encoders := self.text_encoders:
            conditioning = self.family.encode(conditioning, text_encoders)
        return self.unet(noisy_latents, timesteps, **conditioning).sample

    @property
    def text_encoders(self) -> dict[str, torch.nn.Module]:
        """Those that are trained."""
        return {name: component for name, component in self.named_children() if name in self.family.text_encoders}

    def _hand_out_weights(self, device_type: str) -> None:
        """Gives each module its piece of the flat parameters; under autocast in half precision, all at once."""
        for flat, pieces in zip(self.parameters(recurse=False), self.pieces, strict=True):
            if torch.is_autocast_enabled(device_type):
                flat = flat.to(torch.get_autocast_dtype(device_type))
            sizes = [piece.shape.numel() for piece in pieces]
            *weights, _ = flat.split([*sizes, flat.numel() - sum(sizes)])  # the last is filling
            # Gemini makes tensors of its own type, whose every use would go through Python.
            with torch._C.DisableTorchFunctionSubclass():
                for piece, weight in zip(pieces, weights, strict=True):
                    piece.owner.__dict__[piece.attribute] = weight.view(piece.shape)

    def normalize_in_half(self) -> None:
        """Keeps autocast from widening normalizations to fp32."""
        half = {torch.nn.GroupNorm: HalfGroupNorm, torch.nn.LayerNorm: HalfLayerNorm}
        for module in self.modules():
            module.__class__ = half.get(type(module), type(module))

    def compile_blocks(self) -> None:
        """Compiles the UNet's residual and transformer blocks; those that are alike, once.

        As a whole the UNet would take longer to compile, and its gradients would come all at once, so that ranks could
        not share some while others are computed.
        """
        torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)  # shapes of a block
        for block in self.unet.modules():
            if isinstance(block, ResnetBlock2D | Transformer2DModel):
                block.compile(dynamic=False)

    def record(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, autocast: torch.dtype | None
    ) -> None:
        """Records the forward and backward pass as CUDA graphs: what the host would launch piece by piece, at once.

        To be done before the module is wrapped, with its weights on the GPU, where they have to stay in place.

        Args:
            noisy_latents, timesteps, conditioning: as in `forward`, of the shapes and dtypes of all that will follow.
            autocast: dtype of the autocast context in which the denoiser will be called; None for none.
        """
        with torch.autocast("cuda", autocast, enabled=autocast is not None, cache_enabled=False):
            torch.cuda.make_graphed_callables(self, (noisy_latents, timesteps, conditioning))
        torch.cuda.empty_cache()  # of what the recording took besides the graphs' own memory

    def flatten(self, multiple_of: int) -> None:
        """Lays the weights out in a few flat parameters.

        It computes the same. There is less to launch for the host, which casts, hands out and updates a few tensors
        instead of hundreds; a plugin that does so in Python would take longer over it than the GPU over its work.

        Args:
            multiple_of: what divides their lengths, by zeros at their ends. If it is the number of ranks, a plugin
                that gives each a part need not fill up parameters itself, for which it would move them.
        """
        groups: list[list[Piece]] = [[]]
        size = 0
        for (piece,) in self.pieces:
            if size and size + piece.shape.numel() > FLAT_ELEMENTS:
                groups.append([])
                size = 0
            groups[-1].append(replace(piece, offset=size))
            size += piece.shape.numel()
        for number, group in enumerate(groups):
            weights = [getattr(piece.owner, piece.attribute).detach() for piece in group]
            for piece in group:
                delattr(piece.owner, piece.attribute)
            filling = weights[0].new_zeros(-sum(piece.shape.numel() for piece in group) % multiple_of)
            flat = torch.cat([*(weight.flatten() for weight in weights), filling])
            self.register_parameter(f"flat{number}", torch.nn.Parameter(flat))
        self.pieces, self.is_flat = groups, True

    def parts(self) -> Iterator[Part]:
        """Yields each weight, whole."""
        for parameter, pieces in zip(self.parameters(), self.pieces, strict=True):
            for piece in pieces:
                yield piece.part(parameter.detach(), 0, parameter)

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights by name, without gradient; they share memory with the parameters."""
        return {part.name: part.of(part.tensor).view(self.shapes[part.name]) for part in self.parts()}

    def enable_gradient_checkpointing(self) -> None:
        """Makes the parts recompute activations in the backward pass."""
        self.unet.enable_gradient_checkpointing()
        for text_encoder in self.text_encoders.values():
            # The reentrant kind would go through the backward pass of the flat parameters once for each layer.
            text_encoder.gradient_checkpointing_enable({"use_reentrant": False})

    def parts_with(self, weights: dict[str, Tensor]) -> dict[str, torch.nn.Module]:
        """Returns the parts of a pipeline that training changes, anew and with other weights.

        Args:
            weights: by their names, all of them; they become the parts' own.

        Returns:
            Models on the CPU, by their names.

        Raises:
            RunError: if a weight is not a finite number, so that no file gets such weights.
        """
        broken = [name for name, tensor in weights.items() if not all_finite(tensor)]
        if broken:
            raise RunError(f"the weights hold values that are not finite, in {broken[0]}: they are not saved")
        parts = {}
        for part, model in self.named_children():
            with init_empty_weights():  # no time for random weights that are replaced
                kind = type(model)
                of_transformers = isinstance(model, PreTrainedModel)
                parts[part] = kind(model.config) if of_transformers else kind.from_config(model.config)
            own = {name.removeprefix(f"{part}."): t for name, t in weights.items() if name.startswith(f"{part}.")}
            parts[part].load_state_dict(own, assign=True)
        return parts
