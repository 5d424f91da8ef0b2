"""Has Triton compile all kernels for a GPU that is not there, and run none: `kernels_for_gpus.py CAPABILITY DTYPE`.

What asks the GPU, and what launches kernels, is replaced; what compiles them is Triton's own, up to the GPU's code.
"""

import sys
from types import SimpleNamespace

import torch
from diffusers import UNet2DConditionModel
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.random_model import SHAPES
from dreambooth.model.kernels_ahead import _launches

found = []  # sizes of the kernels' code


def load_binary(name: str, kernel: bytes, *rest) -> tuple:
    found.append(len(kernel))
    return True, True, 0, 0, 1024


class Driver:
    """Of a GPU whose kernels do nothing."""

    utils = SimpleNamespace(
        load_binary=load_binary,
        unload_module=lambda *ignored: None,
        get_device_properties=lambda device: {"max_shared_mem": 64 * 1024},
    )
    launcher_cls = staticmethod(lambda source, metadata: lambda *ignored: None)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]), 32)


driver.set_active(Driver())
with torch.device("meta"):
    unet = UNet2DConditionModel(**SHAPES["stable-diffusion-v1-4"]["unet"])
torch.autograd.set_multithreading_enabled(False)
for launch in _launches(unet, getattr(torch, sys.argv[2]), torch.float32, torch.device("cpu")):
    launch()
print(len(found))
