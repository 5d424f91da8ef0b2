"""Runs train_dreambooth_colossalai.py with low_level_zero or gemini where there is no GPU: the CPU plays one.

    PYTHONPATH=. python tests/sharding_on_cpu.py --plugin gemini --placement cpu --mixed_precision bf16 ...

What is replaced has to do with devices and streams. Shards and chunks, what ranks send each other (over gloo),
clipping, loss scale and optimizers are ColossalAI's own and the trainer's. The loss scale of fp16 grows every second
step, as it else would every thousandth.
"""

import contextlib
import dataclasses
import functools
import gc
import os
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.distributed as dist
from colossalai.accelerator import BaseAccelerator, CpuAccelerator, set_accelerator
from colossalai.zero import GeminiOptimizer
from colossalai.zero.gemini.placement_policy import AutoPlacementPolicy

import train_dreambooth_colossalai as trainer
from dreambooth.command_line.console import run_program
from dreambooth.engine.plugins import AheadZeroOptimizer

GPU_MEMORY = 2**30  # bytes


class Gpu(str):
    """A device's name that torch takes for the CPU's, and ColossalAI for a GPU's."""

    type = "cuda"


class Stream:
    """A stream, whose work is done at once; but who reads it has to have waited for it."""

    unread: set["Stream"] = set()

    def wait_stream(self, other: "Stream") -> None:
        if self is DEFAULT_STREAM:
            self.unread.discard(other)

    def synchronize(self) -> None:
        self.unread.discard(self)


DEFAULT_STREAM = Stream()


class Accelerator(CpuAccelerator):
    """ColossalAI's view of the devices."""

    def __init__(self):
        BaseAccelerator.__init__(self, name="cuda", communication_backend="gloo", is_synchronous=False)

    def get_current_device(self) -> Gpu:
        return Gpu("cpu")

    def device_count(self) -> int:
        return 1

    def Stream(self) -> Stream:
        return Stream()

    def current_stream(self) -> Stream:
        return DEFAULT_STREAM

    @contextlib.contextmanager
    def stream(self, stream) -> Iterator[None]:
        if stream not in (None, DEFAULT_STREAM):
            stream.unread.add(stream)
        yield

    def synchronize(self, device=None) -> None:
        raise AssertionError("the host waits for all that the GPU has to do")


def after_all_streams(step: Callable) -> Callable:
    @functools.wraps(step)
    def checked(*args, **kwargs):
        assert not Stream.unread, "a step reads gradients that another stream may not have written yet"
        return step(*args, **kwargs)

    return checked


def with_memory(evict_tensors: Callable) -> Callable:
    """Has the policy of placement auto find a GPU's memory."""

    @functools.wraps(evict_tensors)
    def evict(*args, **kwargs):
        from colossalai.legacy.utils import memory  # not at the top: the other placements need not wait for it

        memory.colo_device_memory_capacity = lambda device: GPU_MEMORY
        return evict_tensors(*args, **kwargs)

    return evict


def in_order(collective: Callable) -> Callable:
    """Has a collective be over before what was launched after it, as in a stream; gloo has threads of its own."""

    @functools.wraps(collective)
    def waited(*args, **kwargs):
        work = collective(*args, **kwargs)
        if work is not None:
            work.wait()
        return work

    return waited


def play_a_gpu() -> None:
    """Replaces what a machine without GPUs lacks, for ColossalAI; for the trainer the device is the CPU."""
    set_accelerator(Accelerator())
    AutoPlacementPolicy.evict_tensors = with_memory(AutoPlacementPolicy.evict_tensors)
    torch.Tensor.record_stream = lambda tensor, stream: None
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        setattr(torch.cuda, name, lambda *_: 0)
    empty = torch.empty
    torch.empty = lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs)
    for name in ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor"):
        setattr(dist, name, in_order(getattr(dist, name)))
    for optimizer in (AheadZeroOptimizer, GeminiOptimizer):
        optimizer.step = after_all_streams(optimizer.step)

    choose_strategy, join = trainer.choose_strategy, trainer.join
    on_gpu = mock.patch.multiple("torch.cuda", is_available=lambda: True, get_device_capability=lambda: (8, 0))
    trainer.choose_strategy = on_gpu(choose_strategy)
    trainer.join = lambda place: dataclasses.replace(join(place), device=torch.device("cpu"))
    for plugin in ("LowLevelZeroPlugin", "GeminiPlugin"):
        setattr(trainer, plugin, functools.partial(getattr(trainer, plugin), growth_interval=2))


def main() -> None:
    # Gemini's plugin has garbage collected when it goes: in a fork this would copy all that was imported before it.
    gc.unfreeze = lambda: None
    play_a_gpu()
    run_program(trainer.main, os.path.basename(__file__))


if __name__ == "__main__":
    main()
