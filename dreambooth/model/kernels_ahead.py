"""Triton's compiler at work while a model is prepared, so that the kernels are there when the first step wants them.

Triton compiles a kernel when it is launched first, for the dtypes and some of the sizes that it is launched with, and
up to release 3.6 has a C compiler build what launches it: nine seconds for some 28 kernels, until all are in its cache
on the disk. Here each is launched on next to nothing, in a thread beside the main one.

It is one thread, though several would be faster: those releases load what launches their kernels as Python modules of
one and the same name, and of two threads that do so at a time one may come by the other's.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import UnionType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from torch import Tensor

Launch = Callable[[], object]


def compile_kernels(
    unet: UNet2DConditionModel, *, dtype: torch.dtype, weights_dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """Begins to compile the kernels of recorded steps (see `Denoiser.record`), and returns at once.

    Nobody else may launch a kernel of Triton's until that is done. What cannot be compiled is not told: it fails again
    where it is needed, and is told there. What is launched there otherwise than here, and so is another kernel to
    Triton, is compiled there: with memory that is aligned otherwise, say.

    Args:
        unet: that is going to be trained, or has adapters that are; only the sizes of its layers count.
        dtype: in which it computes.
        weights_dtype: of its weights and their gradients.
        device: a GPU.

    Returns:
        A function that waits until all are compiled.
    """
    launches = list(_launches(unet, dtype, weights_dtype, device))

    def carry_out() -> None:
        # A thread has a GPU of its own that is current, and leaves the backward pass to another one unless told.
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with on_device, torch.autograd.set_multithreading_enabled(False):
            for launch in launches:
                with contextlib.suppress(Exception):
                    launch()

    thread = threading.Thread(target=carry_out, daemon=True)
    thread.start()
    return thread.join


def _launches(
    unet: UNet2DConditionModel, dtype: torch.dtype, weights_dtype: torch.dtype, device: torch.device
) -> Iterator[Launch]:
    """Yields what launches the kernels of each size of layers, and those of the update."""
    from dreambooth.model import kernels  # Triton is not there without a GPU

    def sizes(kind: type | UnionType, size: Callable[[Any], Any]) -> list:
        """Returns the different sizes of layers; now, as weights may leave their layers later."""
        return sorted({size(layer) for layer in unet.modules() if isinstance(layer, kind)})

    zeros = functools.partial(torch.zeros, device=device, dtype=dtype)
    leaf = functools.partial(zeros, requires_grad=True)

    def both_ways(operation: Callable[..., Tensor], *inputs: Tensor) -> None:
        operation(*inputs).sum().backward()

    def group_norm(channels: int, groups: int, shifted: bool, silu: bool) -> None:
        shift = leaf(1, channels) if shifted else None
        operation = functools.partial(kernels.group_norm, groups=groups, eps=1e-5, shift=shift, silu=silu)
        both_ways(operation, leaf(1, channels, 1, 1), leaf(channels), leaf(channels))

    def layer_norm(width: int) -> None:
        both_ways(functools.partial(kernels.layer_norm, eps=1e-5), leaf(1, width), leaf(width), leaf(width))

    def convolution(shape: tuple[int, int, int]) -> None:
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

    for channels, groups in sizes(torch.nn.GroupNorm, lambda norm: (norm.num_channels, norm.num_groups)):
        for shifted, silu in ((True, True), (False, True), (False, False)):
            yield functools.partial(group_norm, channels, groups, shifted, silu)
    for width in sizes(torch.nn.LayerNorm, lambda norm: norm.normalized_shape[-1]):
        yield functools.partial(layer_norm, width)
    for width in sizes(GEGLU, lambda gate: gate.proj.out_features):
        yield functools.partial(both_ways, kernels.gated_gelu, leaf(1, width))
    for width in sizes(torch.nn.Linear | torch.nn.Conv2d, lambda layer: len(layer.weight)):
        yield functools.partial(kernels.column_sums, zeros(1, width))
    for shape in sizes(torch.nn.Conv2d, lambda layer: tuple(layer.weight.shape[1:])):
        yield functools.partial(convolution, shape)
    yield update
