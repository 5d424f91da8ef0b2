"""Triton's compiler at work while a model is prepared, so that the kernels are there when the first step wants them.

Triton compiles a kernel when it is launched first, for the dtypes and some of the sizes that it is launched with, and
up to release 3.6 has a C compiler build what launches it: nine seconds for the kernels of Stable Diffusion 1.4, until
all are in its cache on the disk. Here another program, `kernel_compiler.py`, fills that cache, on several cores.

It is no thread of this process: most of the compiler's work is Python's, which does one thing at a time. And releases
up to 3.6 load what launches their kernels as Python modules of one and the same name, so that of two threads one may
come by the other's.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU

from dreambooth.processes.environment import find_place
from dreambooth.processes.threads import cores_of

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parents[2]
# It finds libraries where this process does, and not in the folder that a command was typed in.
COMPILER = """
import sys
sys.path[:] = sys.argv[1:]
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


class KernelsAhead:
    """The kernels of recorded steps (see `Denoiser.record`), in Triton's cache before they are wanted.

    The program that compiles them starts at once, and imports its libraries until it is told what to compile. It ends
    with this process, or soon after. What it cannot compile it does not tell: that fails again where it is needed, and
    is told there. What is launched there otherwise than here, and so is another kernel to Triton, is compiled there:
    with memory that is aligned otherwise, say.

    Args:
        wanted: whether there are going to be recorded steps with these kernels; else nothing is done.
    """

    def __init__(self, *, wanted: bool):
        self.compiler: subprocess.Popen | None = None
        if not wanted:
            return
        # It is to leave the GPU alone, and its processes have a core each.
        env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-c", COMPILER, str(ROOT), *filter(None, sys.path)]
        quiet = {name: subprocess.DEVNULL for name in ("stdout", "stderr")}
        with contextlib.suppress(OSError):  # of a machine that starts no more processes
            self.compiler = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, text=True, **quiet)

    def compile(
        self,
        unet: UNet2DConditionModel,
        *,
        dtype: torch.dtype,
        weights_dtype: torch.dtype,
        target: "GPUTarget | None" = None,
    ) -> None:
        """Has the kernels compiled, and returns at once.

        Args:
            unet: that is going to be trained, or has adapters that are; only the sizes of its layers count.
            dtype: in which it computes.
            weights_dtype: of its weights and their gradients.
            target: the GPU; None for that of this process.
        """
        if self.compiler is None:
            return
        if target is None:
            from triton.runtime import driver  # Triton is not there without a GPU

            target = driver.active.get_current_target()
        place = find_place()
        task = {"target": dataclasses.asdict(target), "sizes": sizes_of(unet), "cores": cores_of(place)}
        task |= {"dtype": _name(dtype), "weights_dtype": _name(weights_dtype)}
        # The processes of a machine begin at different kernels, as what one has compiled is there for all.
        task |= {"share": place.local_rank / place.local_world_size, "seconds": LONGEST_S}
        with contextlib.suppress(OSError), self.compiler.stdin as sink:  # it may have failed
            json.dump(task, sink)

    def wait(self) -> None:
        """Waits until the kernels are compiled, two minutes at most."""
        if self.compiler is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.compiler.wait(LONGEST_S)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
