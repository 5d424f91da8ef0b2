"""Triton's compiler at work while a model is prepared, so that the kernels are there when the first step wants them.

Triton compiles a kernel when it is launched first, for the dtypes and some of the sizes that it is launched with, and
up to release 3.6 has a C compiler build what launches it: nine seconds for some 28 kernels, until all are in its cache
on the disk. Here another program, `kernel_compiler.py`, fills that cache, on several cores at a time.

It is no thread of this process: most of the compiler's work is Python's, which does one thing at a time. And releases
up to 3.6 load what launches their kernels as Python modules of one and the same name, so that of two threads one may
come by the other's.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU

ROOT = Path(__file__).resolve().parents[2]
# A folder that the command was typed in may have files of the libraries' names.
COMPILER = """
import sys
sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]
from dreambooth.model.kernel_compiler import main
main()
"""
LONGEST_S = 120  # that a run waits


def sizes_of(unet: UNet2DConditionModel) -> dict[str, list]:
    """Returns the different sizes of a UNet's layers, by what has kernels for them."""

    def of(kind: type | UnionType, size: Callable[[Any], Any]) -> list:
        return sorted({size(layer) for layer in unet.modules() if isinstance(layer, kind)})

    return {
        "group_norm": of(torch.nn.GroupNorm, lambda norm: (norm.num_channels, norm.num_groups)),
        "layer_norm": of(torch.nn.LayerNorm, lambda norm: norm.normalized_shape[-1]),
        "gate": of(GEGLU, lambda gate: gate.proj.out_features),
        "rows": of(torch.nn.Linear | torch.nn.Conv2d, lambda layer: len(layer.weight)),
        "convolution": of(torch.nn.Conv2d, lambda layer: tuple(layer.weight.shape[1:])),
    }


def compile_kernels(
    unet: UNet2DConditionModel,
    *,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
    capability: tuple[int, int],
    processes: int,
) -> Callable[[], None]:
    """Begins to compile the kernels of recorded steps (see `Denoiser.record`), and returns at once.

    What cannot be compiled is not told: it fails again where it is needed, and is told there. What is launched there
    otherwise than here, and so is another kernel to Triton, is compiled there: with memory that is aligned otherwise,
    say.

    Args:
        unet: that is going to be trained, or has adapters that are; only the sizes of its layers count.
        dtype: in which it computes.
        weights_dtype: of its weights and their gradients.
        capability: of the GPU.
        processes: that compile at a time.

    Returns:
        A function that waits until all are compiled.
    """
    major, minor = capability
    task = {"capability": 10 * major + minor, "sizes": sizes_of(unet), "processes": processes}
    task |= {"dtype": _name(dtype), "weights_dtype": _name(weights_dtype)}
    # It is to leave the GPU alone, and the processes have a core each.
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMPILER, str(ROOT), json.dumps(task)]
    try:
        quiet = {name: subprocess.DEVNULL for name in ("stdin", "stdout", "stderr")}
        compiler = subprocess.Popen(command, env=env, **quiet)
    except OSError:  # of a machine that starts no more processes: kernels are compiled as they are wanted
        return lambda: None

    def wait() -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            compiler.wait(LONGEST_S)

    return wait


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
