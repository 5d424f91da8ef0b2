"""What is trained: a set of named weights within a module, wherever they lie.

A weight is in a parameter of its own, or with others in a flat one. Plugins may split parameters over the ranks: then
each rank has a piece of some of them. Optimizers, checkpoints and saving go by this set and its names.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from dreambooth.model.slices import Slice

# Size of a flat parameter: so many elements that few are left, and so few that the first gradients are shared among
# ranks while others are computed.
FLAT_ELEMENTS = 64 * 2**20


@dataclass(frozen=True)
class Weight:
    """A weight that is trained.

    Args:
        name: within the module, such as "unet.conv_in.weight".
        shape: of it.
        owner: the module that computes with it, as its attribute `attribute`.
        offset: number of its first element in the parameter that it lies in.
    """

    name: str
    shape: torch.Size
    owner: torch.nn.Module
    attribute: str
    offset: int = 0


@dataclass(frozen=True)
class Shard:
    """What this rank holds of a parameter.

    Args:
        tensor: the weights that AdamW updates, some elements of the parameter, one after another.
        first: number of the first of them.
        state_key: by which the optimizer keeps its state of them; None where there are none.
        is_everywhere: whether all ranks hold the same, which is all of it.
    """

    tensor: Tensor
    first: int
    state_key: Tensor | None
    is_everywhere: bool = False


@dataclass(frozen=True)
class Piece:
    """What this rank holds of a weight: its elements from `first` to `last`, somewhere in a shard."""

    weight: Weight
    first: int
    last: int
    shard: Shard

    def of(self, tensor: Tensor) -> Tensor:
        """Returns the elements of the piece in a tensor that is laid out as the shard is."""
        begin = self.weight.offset + self.first - self.shard.first
        return tensor.view(-1)[begin : begin + self.last - self.first]

    def slice_of(self, tensor: Tensor, prefix: str = "") -> Slice:
        """Returns them as a slice, with a name that begins with `prefix`."""
        weight, everywhere = self.weight, self.shard.is_everywhere
        return Slice(f"{prefix}{weight.name}", weight.shape, self.first, self.of(tensor), everywhere)


def whole(parameter: Parameter) -> Shard:
    """Returns a parameter as the shard that every rank holds."""
    return Shard(parameter.detach(), 0, parameter, is_everywhere=True)


class Trainable:
    """The weights of a module that take gradients.

    Args:
        module: what of it is frozen stays as it is, and is not among them.
        names: of those whose name here is to be another, by the name in the module. What is frozen and has none is in
            no file.
    """

    def __init__(self, module: torch.nn.Module, names: Mapping[str, str]):
        self.module = module
        self.is_flat = self._on_demand = False
        self._waiting: dict[int, str] = {}  # numbers of flat parameters not handed out yet, to a type of device
        # Copies, as they are now, whatever the module is converted to: what they are mapped from is a whole file.
        self._frozen = {
            names[name]: parameter.detach().clone()
            for name, parameter in module.named_parameters()
            if name in names and not parameter.requires_grad
        }
        # The weights in each parameter, in the order of `parameters`.
        self.by_parameter = [
            [Weight(names.get(name := f"{path}.{attribute}", name), parameter.shape, owner, attribute)]
            for path, owner in module.named_modules()
            for attribute, parameter in owner.named_parameters(recurse=False)
            if parameter.requires_grad
        ]

    def __iter__(self) -> Iterator[Weight]:
        """Goes through the weights, in the order of their parameters."""
        for weights in self.by_parameter:
            yield from weights

    def numel(self) -> int:
        """Returns the number of elements of all weights."""
        return sum(weight.shape.numel() for weight in self)

    def parameters(self) -> list[Parameter]:
        """Returns the parameters that the weights lie in, for an optimizer."""
        if self.is_flat:
            return [getattr(self.module, f"flat{number}") for number in range(len(self.by_parameter))]
        return [getattr(weight.owner, weight.attribute) for weight in self]

    def flatten(self, multiple_of: int, device: torch.device | None = None, *, on_demand: bool = True) -> None:
        """Lays the weights out in a few flat parameters of the module.

        It computes the same, with fewer kernels to launch: one cast and one update for a flat parameter instead of one
        for each weight. A plugin that does these in Python would take longer over them than the GPU over its work.

        Args:
            multiple_of: what divides their lengths, by zeros at their ends. If it is the number of ranks, a plugin
                that gives each a part need not fill up parameters itself, for which it would move them.
            device: where they lie then; None for where the weights do. Those that are mapped from files go to a GPU
                without a copy in host memory.
            on_demand: whether a flat parameter is handed out when the first of its weights is wanted. On the way back
                autograd then comes to it as soon as the gradients of its weights are there: they are put together, and
                ranks share them, while others are computed. Otherwise all are handed out first, and come last.
        """
        flat: list[list[Weight]] = [[]]
        size = 0
        for weight in self:
            if size and size + weight.shape.numel() > FLAT_ELEMENTS:
                flat.append([])
                size = 0
            flat[-1].append(replace(weight, offset=size))
            size += weight.shape.numel()
        for number, weights in enumerate(flat):
            values = [getattr(weight.owner, weight.attribute).detach().to(device) for weight in weights]
            for weight in weights:
                delattr(weight.owner, weight.attribute)
            filling = values[0].new_zeros(-sum(weight.shape.numel() for weight in weights) % multiple_of)
            parameter = Parameter(torch.cat([*(value.flatten() for value in values), filling]))
            self.module.register_parameter(f"flat{number}", parameter)
            for reader in self._readers(weights) if on_demand else ():
                reader.register_forward_pre_hook(functools.partial(self._hand_out, number))
        self.by_parameter, self.is_flat, self._on_demand = flat, True, on_demand

    def _readers(self, weights: list[Weight]) -> set[torch.nn.Module]:
        """Returns the modules that want weights when they are called: their owners, and what these are parts of.

        CLIP's embeddings look at the shape of a part's weight before they call it, and adapters at the dtype. Whole
        components do not.
        """
        wholes = {part: module for module in self.module.modules() for part in module.children()}
        readers = {weight.owner for weight in weights}
        for part in [*readers]:
            whole = wholes[part]
            while isinstance(whole, torch.nn.ModuleList | torch.nn.ModuleDict):  # which nobody calls
                whole = wholes[whole]
            readers.add(whole)
        return readers - {self.module, *self.module.children()}

    def hand_out(self, device_type: str) -> None:
        """Has each module get its weights out of the flat parameters in the forward pass that now begins.

        Under autocast they are in half precision, all of a flat parameter at once.
        """
        for weight in self:
            weight.owner.__dict__.pop(weight.attribute, None)  # nobody computes with those of an earlier pass
        self._waiting = dict.fromkeys(range(len(self.by_parameter)), device_type)
        if not self._on_demand:
            for number in range(len(self.by_parameter)):
                self._hand_out(number)

    def _hand_out(self, number: int, *_of_a_hook) -> None:
        device_type = self._waiting.pop(number, None)
        if device_type is None:
            return
        flat, weights = getattr(self.module, f"flat{number}"), self.by_parameter[number]
        if torch.is_autocast_enabled(device_type):
            flat = flat.to(torch.get_autocast_dtype(device_type))
        sizes = [weight.shape.numel() for weight in weights]
        *values, _ = flat.split([*sizes, flat.numel() - sum(sizes)])  # the last is filling
        # Gemini makes tensors of its own type, whose every use would go through Python.
        with torch._C.DisableTorchFunctionSubclass():
            for weight, value in zip(weights, values, strict=True):
                weight.owner.__dict__[weight.attribute] = value.view(weight.shape)

    def pieces(self, shard_of: Callable[[Parameter], Shard] = whole) -> Iterator[Piece]:
        """Yields what this rank holds of each weight, in the same order on all ranks; a piece may be empty.

        Args:
            shard_of: returns what this rank holds of a parameter.
        """
        for parameter, weights in zip(self.parameters(), self.by_parameter, strict=True):
            shard = shard_of(parameter)
            for weight in weights:
                first = max(weight.offset, shard.first)
                last = max(first, min(weight.offset + weight.shape.numel(), shard.first + shard.tensor.numel()))
                yield Piece(weight, first - weight.offset, last - weight.offset, shard)

    def frozen(self) -> list[Slice]:
        """Returns the weights in files that take no gradients, in fp32, as they were before training."""
        return [
            Slice(name, weight.shape, 0, weight.float().flatten(), is_everywhere=True)
            for name, weight in self._frozen.items()
        ]

    def values(self) -> dict[str, Tensor]:
        """Returns the weights of whole parameters by name, without gradient; they share memory with them."""
        return {piece.weight.name: piece.of(piece.shard.tensor).view(piece.weight.shape) for piece in self.pieces()}
