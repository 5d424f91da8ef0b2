"""What a forward and a backward pass hold in memory, counted without memory: on tensors that have shapes alone.

torch's meta device runs the real modules, with their checkpoints and hooks, and computes nothing. What each operation
makes is counted from when it is made until nothing refers to it any more.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Moment:
    """What there is at one time of a pass.

    Args:
        activations: bytes of all that was made, but for gradients of weights.
        gradients: number of weights whose gradients are there.
    """

    activations: int
    gradients: int


@dataclass(frozen=True)
class Passes:
    """The moments of a forward and a backward pass at which most is held: one for each number of gradients."""

    moments: tuple[Moment, ...]

    def peak(self, of_gradients: Callable[[int], int] = lambda weights: 0) -> Moment:
        """Returns the moment that takes the most memory, if the gradients of some weights take so many bytes."""
        return max(self.moments, key=lambda one: one.activations + of_gradients(one.gradients))


def trace(predict: Callable[[], Tensor], weights: Iterable[Tensor]) -> Passes:
    """Counts what a prediction holds, and what the way back from it does.

    Args:
        predict: computes on the meta device.
        weights: that it reads, with or without gradients; they count as no part of it.
    """
    counter = _Counter(weights)
    with _shapes_alone(), counter.listening():
        prediction = predict()
        if prediction.requires_grad:
            prediction.float().sum().backward()
    return Passes(tuple(counter.moments))


class _Counter(TorchDispatchMode):
    """Counts the memory of what each operation returns, once for tensors that share it, until it goes."""

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        self.held = self.gradients = 0
        self.moments: list[Moment] = [Moment(0, 0)]
        self.sizes: dict[int, int] = {}  # by the identity of the memory
        self.alive: dict[int, weakref.ref] = {}
        self.weights = list(weights)
        for weight in self.weights:
            self.sizes[weight.untyped_storage()._cdata] = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Counts within it."""
        resize = torch.UntypedStorage.resize_

        def counted(memory: torch.UntypedStorage, size: int) -> torch.UntypedStorage:  # of what is discarded
            if memory._cdata in self.sizes:
                self.held += size - self.sizes[memory._cdata]
                self.sizes[memory._cdata] = size
            self._note()
            return resize(memory, size)

        hooks = [one.register_post_accumulate_grad_hook(self._arrived) for one in self.weights if one.requires_grad]
        with mock.patch.object(torch.UntypedStorage, "resize_", counted), self:
            yield
        for hook in hooks:
            hook.remove()

    def _arrived(self, weight: Tensor) -> None:
        weight.grad = None  # how many bytes it takes, and how long, is the strategy's
        self.gradients += weight.numel()
        self._note()

    def _note(self) -> None:
        last = self.moments[-1]
        if self.gradients > last.gradients:
            self.moments.append(Moment(self.held, self.gradients))
        elif self.held > last.activations:
            self.moments[-1] = Moment(self.held, last.gradients)

    def _watch(self, tensor: Tensor) -> None:
        memory = tensor.untyped_storage()
        key = memory._cdata
        if key not in self.sizes:
            self.sizes[key] = memory.nbytes()
            self.alive[key] = weakref.ref(memory, lambda _: self._gone(key))
            self.held += memory.nbytes()

    def _gone(self, key: int) -> None:
        self.held -= self.sizes.pop(key)
        del self.alive[key]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, Tensor):
                self._watch(one)
        self._note()
        return made


class _Attention(torch.autograd.Function):
    """What the kernels of GPUs keep of attention: its inputs, its result and a number for each row."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = torch.empty_like(query)  # laid out as it is: what puts heads together again makes no copy
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(one) for one in ctx.saved_tensors[:3])


@contextlib.contextmanager
def _shapes_alone() -> Iterator[None]:
    """Keeps from the meta device what it has no way of: attention in one piece, and states of random numbers."""
    checkpoint = torch.utils.checkpoint.checkpoint

    def attention(query: Tensor, key: Tensor, value: Tensor, *_, **__) -> Tensor:
        return _Attention.apply(query, key, value)

    def without_state(function: Callable, *args, **kwargs) -> Tensor:
        return checkpoint(function, *args, **kwargs | {"use_reentrant": False, "preserve_rng_state": False})

    with (
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(torch.utils.checkpoint, "checkpoint", without_state),
        mock.patch.object(torch.random, "fork_rng", lambda *_, **__: contextlib.nullcontext()),
    ):
        yield
