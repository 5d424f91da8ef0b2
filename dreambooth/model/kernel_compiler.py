"""A program that compiles the kernels of recorded steps, on several cores, for a GPU that it does not touch.

`kernels_ahead.py` starts it, and writes to its standard input what is to be compiled. Each kernel is called on next to
nothing in the CPU's memory, and Triton compiles what is called for the first time, without launching it. What is
compiled is in Triton's cache on the disk then, where the trainer finds it.
"""

import contextlib
import functools
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from dreambooth.model import kernels

Launch = Callable[[], object]
MOST_PROCESSES = 5  # more would be done no sooner: group normalization alone takes as long
# That it waits for a trainer, which may read a model from a slow disk, or have failed in a notebook and live on.
LONGEST_WAIT_S = 600


class Driver:
    """One of Triton's, for a GPU that it knows by name alone."""

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target


def only_compile(run: Callable) -> Callable:
    """Returns a `JITFunction.run` that has a kernel compiled, and the program that launches it, and does not do so."""

    @functools.wraps(run)
    def compiled(function: JITFunction, *values, grid, warmup, **constants) -> None:
        kernel = run(function, *values, grid=grid, warmup=True, **constants)
        # This fails without the GPU's own driver, with which it is linked, and where Triton has one program for all.
        with contextlib.suppress(Exception):
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(kernel.src, kernel.metadata)

    return compiled


def launches(sizes: Mapping[str, Sequence], dtype: torch.dtype, weights_dtype: torch.dtype) -> list[list[Launch]]:
    """Returns what launches the kernels of each size of layers, and those of the update.

    What is in one list often has the same compiled. Different ones share three kernels, of group normalization.

    Args:
        sizes: see `kernels_ahead.sizes_of`.
        dtype: in which is computed.
        weights_dtype: of the weights and their gradients.
    """
    zeros = functools.partial(torch.zeros, dtype=dtype)
    leaf = functools.partial(zeros, requires_grad=True)

    def both_ways(operation: Callable[..., Tensor], *inputs: Tensor) -> None:
        operation(*inputs).sum().backward()

    def group_norm(shifted: bool, silu: bool, channels: int, groups: int) -> None:
        shift = leaf(1, channels) if shifted else None
        operation = functools.partial(kernels.group_norm, groups=groups, eps=1e-5, shift=shift, silu=silu)
        both_ways(operation, leaf(1, channels, 1, 1), leaf(channels), leaf(channels))

    def layer_norm(width: int) -> None:
        both_ways(functools.partial(kernels.layer_norm, eps=1e-5), leaf(1, width), leaf(width), leaf(width))

    def convolution(*shape: int) -> None:
        weight, handed_out = zeros(1, *shape, dtype=weights_dtype), zeros(1, *shape)
        handed_out = handed_out.to(memory_format=torch.channels_last)
        if weight.stride() != handed_out.stride():
            kernels.copy_weight(handed_out, weight)
            kernels.copy_weight(weight, handed_out)

    def update() -> None:
        gradient = zeros(1, dtype=weights_dtype)
        weights, means, squares, corrections = (zeros(2, dtype=torch.float32) for _ in range(4))
        settings = {"lr": 0.1, "betas": (0.9, 0.9), "eps": 0.1, "weight_decay": 0.1}
        if weights_dtype != torch.float32:
            settings["half"] = zeros(1, dtype=weights_dtype)
        divisor = kernels.norm([gradient, gradient])  # of which the second has its sums where they are not aligned
        kernels.adamw(weights, gradient, means, squares, corrections, divisor=divisor, **settings)

    kinds = (True, True), (False, True), (False, False)
    return [
        *([functools.partial(group_norm, *kind, *size) for size in sizes["group_norm"]] for kind in kinds),
        *([functools.partial(layer_norm, width)] for width in sizes["layer_norm"]),
        [functools.partial(both_ways, kernels.gated_gelu, leaf(1, width)) for width in sizes["gate"]],
        [functools.partial(kernels.column_sums, zeros(1, width)) for width in sizes["rows"]],
        [functools.partial(convolution, *shape) for shape in sizes["convolution"]],
        [update],
    ]


def carry_out(lists: Iterable[list[Launch]]) -> None:
    """Launches all in some lists; what cannot be compiled is left to who needs it, and is told there."""
    for launch in itertools.chain(*lists):
        with contextlib.suppress(Exception):
            launch()


def main() -> None:
    signal.alarm(LONGEST_WAIT_S)
    try:
        task = json.load(sys.stdin)
    except ValueError:  # the trainer has ended, and nothing is to be compiled
        return
    driver.set_active(Driver(GPUTarget(**task["target"])))
    JITFunction.run = only_compile(JITFunction.run)
    lists = launches(task["sizes"], *(getattr(torch, task[name]) for name in ("dtype", "weights_dtype")))
    first = int(task["share"] * len(lists))
    lists = lists[first:] + lists[:first]
    count = min(task["cores"], MOST_PROCESSES)
    for number in range(1, count):
        # By a fork, as the libraries are imported by now.
        if os.fork() == 0:
            lists = lists[number:]
            break
    signal.alarm(task["seconds"])  # ends this process, of which nobody else may take notice if it hangs
    carry_out(lists[::count])
    with contextlib.suppress(ChildProcessError):
        while os.wait():
            pass
