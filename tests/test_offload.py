"""AdamW in host memory, piece by piece: the bits of the whole, and copies that may come as late as they like."""

import contextlib
import functools

import pytest
import torch

from dreambooth.engine import offload
from dreambooth.engine.offload import ORDINARY, HostAdamW, Lane, Memory, StreamedAdamW
from dreambooth.engine.optimizer import AdamW, DeviceAdamW, Part, new_state

PIECE = 128
SIZES = (1, 64, PIECE, 5 * PIECE + 7, 20 * PIECE)
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4, "fused": True}
DIVISOR = 1.2345678


class LateLane(Lane):
    """A lane whose copies are made when somebody waits for them, and no sooner."""

    lanes: list["LateLane"] = []

    def __init__(self, device):
        super().__init__(device)
        self.begun, self.followed = [], 0
        self.lanes.append(self)

    def follow(self):
        self.followed += 1

    def copy(self, to, source):
        assert self.followed, "it may read what the GPU has not written yet, or write what it still reads"
        self.begun.append((to, source))
        until = len(self.begun)
        return lambda: self.make(until)

    def make(self, until=None):
        for number, copy in enumerate(self.begun[:until]):
            if copy:
                copy[0].copy_(copy[1])
                self.begun[number] = None

    @contextlib.contextmanager
    def entered(self):
        self.make()
        yield

    def join(self):
        self.make()
        self.begun, self.followed = [], 0


class Turning(Memory):
    turns, ahead = True, 2 * PIECE


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(offload, "PIECE", PIECE)


def whole(start: list[torch.Tensor], gradients: list[list[torch.Tensor]], divisor: float | None) -> AdamW:
    """Returns torch's AdamW after steps in fp32 on whole tensors."""
    masters = [torch.nn.Parameter(one.clone()) for one in start]
    optimizer = AdamW(masters, **SETTINGS)
    for step in gradients:
        for master, gradient in zip(masters, step, strict=True):
            master.grad = gradient.float()
        optimizer.divisor = None if divisor is None else torch.tensor(divisor)
        optimizer.step()
    return optimizer


def drawn(dtype: torch.dtype, steps: int = 4) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=draw) for size in SIZES]
    return start, [[torch.randn(size, generator=draw).to(dtype) for size in SIZES] for _ in range(steps)]


def assert_same(optimizer: AdamW, host: AdamW) -> None:
    for one, other in zip(optimizer.param_groups[0]["params"], host.param_groups[0]["params"], strict=True):
        assert torch.equal(one, other)
        kept, found = optimizer.state[one], host.state[other]
        assert kept.keys() == found.keys() and all(torch.equal(kept[name], found[name]) for name in kept)


@pytest.mark.parametrize("memory", [ORDINARY, Turning()], ids=["in order", "in turns"])
@pytest.mark.parametrize("divisor", [None, DIVISOR])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lane", [Lane, LateLane])
def test_steps_in_pieces_are_those_on_the_whole_to_the_bit(monkeypatch, lane, dtype, divisor, memory):
    monkeypatch.setattr(offload, "Lane", lane)
    start, gradients = drawn(dtype)
    masters = [torch.nn.Parameter(one.clone()) for one in start]
    optimizer = AdamW(masters, **SETTINGS)
    states = [optimizer.state[one] for one in masters]
    for state, one in zip(states, masters, strict=True):
        state |= new_state(optimizer, one.detach())
    working = [torch.zeros_like(one, dtype=dtype) for one in start]
    host, gathered = StreamedAdamW(torch.device("cpu"), dtype, memory), []

    def gather(number):
        assert torch.equal(working[number], masters[number].detach().to(dtype)), "it is whole"
        gathered.append(number)

    for number, step in enumerate(gradients):
        parts = [
            Part(master.detach(), state, gradient, weights, lambda part=part: gather(part))
            for part, (master, state, gradient, weights) in enumerate(zip(masters, states, step, working, strict=True))
        ]
        host.step(parts, optimizer.param_groups[0], None if divisor is None else torch.tensor(divisor))
        backwards = memory.turns and number % 2
        assert gathered == ([4, 3, 2, 1, 0] if backwards else [0, 1, 2, 3, 4])
        gathered.clear()
    assert_same(whole(start, gradients, divisor), optimizer)


@pytest.mark.parametrize("divisor", [None, DIVISOR])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_steps_beside_the_gradients_are_those_in_fp32(device, dtype, divisor):
    """Of gradients in half precision, and each part is shared as soon as its new weights are there."""
    start, gradients = drawn(dtype)
    masters = [torch.nn.Parameter(one.to(device, copy=True)) for one in start]
    optimizer = AdamW(masters, **SETTINGS)
    working, gathered = [torch.zeros_like(one, dtype=dtype) for one in masters], []

    def gather(number, async_op):
        assert async_op and torch.equal(working[number], masters[number].detach().to(dtype))
        gathered.append(number)

    for step in gradients:
        parts = []
        for number, master in enumerate(masters):
            state = optimizer.state[master]
            state |= {} if state else new_state(optimizer, master.detach())
            share = functools.partial(gather, number)
            parts.append(Part(master.detach(), state, step[number].to(device), working[number], share))
        DeviceAdamW().step(
            parts, optimizer.param_groups[0], None if divisor is None else torch.tensor(divisor, device=device)
        )
    assert gathered == len(gradients) * list(range(len(masters)))
    if device == "cpu":
        return assert_same(whole(start, gradients, divisor), optimizer)
    for wanted, master in zip(whole(start, gradients, divisor).param_groups[0]["params"], masters, strict=True):
        torch.testing.assert_close(master.cpu(), wanted, rtol=1e-5, atol=1e-6)


def test_pieces_on_their_way_take_a_few_buffers(monkeypatch):
    """Each is used again once its copy is over: of the whole there is no copy in host memory."""
    monkeypatch.setattr(offload, "Lane", LateLane)
    start, gradients = drawn(torch.bfloat16, steps=1)
    host = StreamedAdamW(torch.device("cpu"), torch.bfloat16, ORDINARY)
    used = {"down": set(), "up": set()}
    for name, lane in (("down", host.down), ("up", host.up)):
        copy = lane.copy

        def seen(to, source, copy=copy, name=name):
            used[name].add((to if name == "down" else source).untyped_storage().data_ptr())
            return copy(to, source)

        monkeypatch.setattr(lane, "copy", seen)
    optimizer = AdamW([torch.nn.Parameter(one) for one in start], **SETTINGS)
    parts = [
        Part(one, new_state(optimizer, one), gradient, torch.empty_like(gradient))
        for one, gradient in zip(start, gradients[0], strict=True)
    ]
    host.step(parts, optimizer.param_groups[0], None)
    assert [len(buffers) for buffers in used.values()] == [offload.BUFFERS] * 2


@pytest.mark.parametrize("divisor", [None, DIVISOR])
def test_weights_take_the_place_of_their_gradients(divisor):
    """Where both are in host memory."""
    start, gradients = drawn(torch.bfloat16)
    masters = [torch.nn.Parameter(one.clone()) for one in start]
    optimizer, host = AdamW(masters, **SETTINGS), HostAdamW(ORDINARY)
    for one in masters:
        optimizer.state[one] |= new_state(optimizer, one.detach())
    for step in gradients:
        halves = [one.clone() for one in step]
        parts = [
            Part(one.detach(), optimizer.state[one], half, half) for one, half in zip(masters, halves, strict=True)
        ]
        host.step(parts, optimizer.param_groups[0], None if divisor is None else torch.tensor(divisor))
        assert all(torch.equal(half, one.detach().bfloat16()) for half, one in zip(halves, masters, strict=True))
    assert_same(whole(start, gradients, divisor), optimizer)


def test_who_brings_tensors_into_memory_is_told_of_each_before_its_turn(monkeypatch):
    expected, worked_on = [], []
    memory = Turning()
    monkeypatch.setattr(memory, "expect", lambda tensors: expected.append(tensors[0].data_ptr()), raising=False)
    start, gradients = drawn(torch.bfloat16, steps=1)
    optimizer, host = AdamW([torch.nn.Parameter(one) for one in start], **SETTINGS), HostAdamW(memory)
    hand_over = host._hand_over

    def seen(piece):
        worked_on.append(piece.tensors[0].data_ptr())
        sizes = [len(one.tensors[0]) for one in pieces]
        before = next(
            number
            for number in range(30)
            if sum(sizes[:number]) >= min(sum(sizes[: len(worked_on)]) + memory.ahead, sum(sizes))
        )
        assert len(expected) == before
        hand_over(piece)

    monkeypatch.setattr(host, "_hand_over", seen)
    parts = [Part(one, new_state(optimizer, one), half, half) for one, half in zip(start, gradients[0], strict=True)]
    pieces = offload.pieces_of(parts)
    host.step(parts, optimizer.param_groups[0], None)
    assert expected == worked_on == [piece.tensors[0].data_ptr() for piece in pieces] and len(pieces) == 29


@pytest.mark.gpu
def test_gradients_on_a_gpu_come_down_in_pieces_through_pinned_memory(monkeypatch):
    """And the new weights go up; from and to tensors that other work of the GPU writes and reads."""
    monkeypatch.setattr(offload, "PIECE", 2**16)
    device, dtype = torch.device("cuda"), torch.bfloat16
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=draw) for size in (2**20 + 3, 2**22)]
    gradients = [[torch.randn(one.shape, generator=draw).to(dtype) for one in start] for _ in range(3)]
    masters = [torch.nn.Parameter(one.clone()) for one in start]
    optimizer, host = AdamW(masters, **SETTINGS), StreamedAdamW(device, dtype, ORDINARY)
    assert all(buffer.is_pinned() for buffer in host._arriving)
    for one in masters:
        optimizer.state[one] |= new_state(optimizer, one.detach())
    working = [torch.zeros(one.shape, dtype=dtype, device=device) for one in start]
    for step in gradients:
        torch.cuda._sleep(10**8)  # what has made the gradients is not over when the step begins
        on_gpu = [one.to(device) * 1 for one in step]
        parts = [
            Part(one.detach(), optimizer.state[one], gradient, weights)
            for one, gradient, weights in zip(masters, on_gpu, working, strict=True)
        ]
        host.step(parts, optimizer.param_groups[0], torch.tensor(DIVISOR, device=device))
        read = [one.clone() for one in working]  # by the next forward pass
        assert all(torch.equal(a.cpu(), b.detach().to(dtype)) for a, b in zip(read, masters, strict=True))
    assert_same(whole(start, gradients, DIVISOR), optimizer)


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(torch.cuda, "host_memory_stats"), reason="needs a torch that counts pinned memory")
def test_pinned_memory_holds_a_few_pieces_however_much_is_updated():
    device, dtype = torch.device("cuda"), torch.bfloat16
    before = torch.cuda.host_memory_stats()["allocated_bytes.peak"]
    host = StreamedAdamW(device, dtype, ORDINARY)
    masters = torch.zeros(2**25)
    optimizer = AdamW([torch.nn.Parameter(masters)], **SETTINGS)
    gradient, working = (torch.ones(masters.shape, dtype=dtype, device=device) for _ in range(2))
    part = Part(masters, new_state(optimizer, masters), gradient, working)
    host.step([part], optimizer.param_groups[0], None)
    peak = torch.cuda.host_memory_stats()["allocated_bytes.peak"] - before
    assert peak <= 2 * offload.BUFFERS * PIECE * dtype.itemsize + 2**20
