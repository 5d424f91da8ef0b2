"""AdamW in host memory for a model that computes on a GPU: gradients come down, new weights go up, piece by piece.

Three things go on at a time, each with another piece: its gradient is on the way down, in half precision; AdamW
updates its fp32 weights, on all cores; its new weights are on the way up, in half precision too. So a step takes as
long as the slowest of the three, and what it needs besides weights and moments is a few pieces.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dreambooth.engine.optimizer import STATE, Part, settings_of

# Elements of a piece. Its gradient and its new weights are read right after they are written, 16 MiB of them, while
# they are in the caches of a CPU; copies of so many are as fast as larger ones. AdamW's arithmetic goes by vectors,
# and rounds the last few elements, which fill none, otherwise: a multiple of 64 has it do the same as on the whole.
PIECE = 2 * 2**20
BUFFERS = 3  # pieces on their way, in each direction: one arrives, one is there, one is being left


class Memory:
    """Where master weights and moments lie: in ordinary memory. It need not be pinned, as no GPU copies from it."""

    turns = False  # whether every other step goes from the last piece to the first
    ahead = 0  # how many elements before its turn `expect` names a piece

    def take(self, tensor: Tensor) -> Tensor:
        """Returns `tensor`, in this memory."""
        return tensor

    def zeros_like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns zeros of the shape of `tensor`: in this memory if that is, else on its device."""
        return torch.zeros_like(tensor, dtype=dtype)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in this memory."""
        return tensor.device.type == "cpu"

    def expect(self, tensors: Iterable[Tensor]) -> None:
        """Says that some tensors are going to be worked on soon."""


ORDINARY = Memory()


class Lane:
    """A way between a GPU and host memory: copies follow each other, beside whatever else GPU and host do.

    Args:
        device: the GPU; on the CPU, as in tests, a copy is over when it is begun.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def follow(self) -> None:
        """Has later copies wait for what the GPU has been given to do so far."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())

    def copy(self, to: Tensor, source: Tensor) -> Callable[[], None]:
        """Begins a copy, and returns what waits for its end."""
        with self.entered():
            to.copy_(source, non_blocking=True)
        return self.stream.record_event().synchronize if self.stream else _is_over

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """What the GPU is given to do within it waits for the copies before."""
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            yield

    def join(self) -> None:
        """Has the GPU wait for the copies before it does what it is given next."""
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)


def _is_over() -> None:
    """Waits for a copy that has been made at once."""


@dataclass(frozen=True)
class Piece:
    """At most PIECE elements of a part.

    Args:
        tensors: masters and moments.
        step: of AdamW, before this one.
        gather: as of the part, of its last piece.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    step: Tensor
    gradient: Tensor
    working: Tensor
    gather: Callable | None


def pieces_of(parts: Iterable[Part], *, backwards: bool = False) -> list[Piece]:
    """Returns the pieces of some parts in order, or from the last to the first."""
    pieces = []
    for part in reversed(list(parts)) if backwards else parts:
        kept = [part.masters, *(part.state[name] for name in STATE), part.gradient, part.working]
        assert {one.numel() for one in kept} == {part.masters.numel()}
        split = [*zip(*(one.detach().view(-1).split(PIECE) for one in kept), strict=True)]
        for number, (*tensors, gradient, working) in enumerate(reversed(split) if backwards else split, start=1):
            gather = part.gather if number == len(split) else None
            pieces.append(Piece(tuple(tensors), part.state["step"], gradient, working, gather))
    return pieces


class HostAdamW:
    """Steps of torch's fused AdamW in host memory, in pieces; to the bit as on the whole.

    Args:
        memory: where masters and moments lie.
    """

    def __init__(self, memory: Memory):
        self.memory = memory
        self._gradient = torch.empty(0)  # of the piece in hand, in fp32
        self._backwards = False

    @torch.no_grad()
    def step(self, parts: list[Part], group: dict, divisor: Tensor | None) -> None:
        """Updates some parts; on every rank in the same order.

        Args:
            parts: of which gradients and working weights are in host memory.
            group: of the optimizer, with its settings.
            divisor: by what the gradients are divided, a scalar, float32; None for nothing. It may be on a GPU, which
                is waited for when the first gradients are on their way.
        """
        pieces = pieces_of(parts, backwards=self._backwards)
        # What is left in memory of a step is what it has ended with, and the next one begins with that.
        self._backwards = self.memory.turns and not self._backwards
        if not self._gradient.numel():
            self._gradient = torch.empty(PIECE)
        settings = settings_of(group)
        soon, known, done = iter(pieces), 0, 0  # elements that memory knows of, and those worked on
        for number, (piece, arrived) in enumerate(zip(pieces, self._gradients(pieces), strict=True)):
            if not number:
                settings["grad_scale"] = None if divisor is None else divisor.cpu()
            done += arrived.numel()
            while known < done + self.memory.ahead and (other := next(soon, None)):
                self.memory.expect(other.tensors)
                known += other.gradient.numel()
            gradient = self._gradient[: arrived.numel()].copy_(arrived)
            masters, *moments = ([one] for one in piece.tensors)
            # It counts up the step that it is given, which other pieces are in too.
            adamw(masters, [gradient], *moments, [], [piece.step.clone()], fused=True, **settings)
            self._hand_over(piece)
        for part in parts:
            part.state["step"] += 1
        self._finish()

    def _gradients(self, pieces: list[Piece]) -> Iterator[Tensor]:
        """Yields the gradient of each piece, in host memory, where it stays as it is until the next is asked for."""
        for piece in pieces:
            yield piece.gradient

    def _hand_over(self, piece: Piece) -> None:
        """Gives the new weights of a piece to those who compute with them."""
        piece.working.copy_(piece.tensors[0])

    def _finish(self) -> None:
        """Has the next forward pass wait for the new weights."""


class StreamedAdamW(HostAdamW):
    """The same, where gradients and working weights are on the GPU.

    Args:
        device: the GPU.
        dtype: of gradients and working weights.
        memory: where masters and moments lie.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, memory: Memory):
        super().__init__(memory)
        self.down, self.up = Lane(device), Lane(device)
        buffers = {"dtype": dtype, "pin_memory": device.type == "cuda"}
        self._arriving = [torch.empty(PIECE, **buffers) for _ in range(BUFFERS)]
        self._leaving = deque((torch.empty(PIECE, **buffers), _is_over) for _ in range(BUFFERS))

    def _gradients(self, pieces: list[Piece]) -> Iterator[Tensor]:
        self.down.follow()  # what has made the gradients
        self.up.follow()  # what has read the weights before
        later, begun = iter(pieces), deque()

        def fetch(buffer: Tensor) -> None:
            for piece in islice(later, 1):
                part = buffer[: piece.gradient.numel()]
                begun.append((buffer, part, self.down.copy(part, piece.gradient)))

        for buffer in self._arriving:
            fetch(buffer)
        while begun:
            buffer, part, arrived = begun.popleft()
            arrived()
            yield part
            fetch(buffer)

    def _hand_over(self, piece: Piece) -> None:
        buffer, left = self._leaving.popleft()
        left()
        part = buffer[: piece.working.numel()].copy_(piece.tensors[0])
        self._leaving.append((buffer, self.up.copy(piece.working, part)))
        if piece.gather:
            with self.up.entered():
                piece.gather()

    def _finish(self) -> None:
        self.up.join()
