"""HybridAdam's path for bf16 gradients in host memory, which is Python and needs none of its compiled kernels."""

import pytest
import torch
from colossalai.nn.optimizer.nvme_optimizer import NVMeOptimizer

from train_dreambooth_colossalai import ClippingHybridAdam


def without_kernels(parameter: torch.nn.Parameter, lr: float, eps: float) -> ClippingHybridAdam:
    """Builds the optimizer but for its compiled kernels."""
    optimizer = ClippingHybridAdam.__new__(ClippingHybridAdam)
    defaults = dict(lr=lr, betas=(0.9, 0.999), eps=eps, weight_decay=0.0, bias_correction=True)
    NVMeOptimizer.__init__(optimizer, [parameter], defaults)
    optimizer.adamw_mode = True
    return optimizer


@pytest.mark.parametrize("div_scale", [-1.0, 250.0])
def test_bf16_gradients_in_host_memory_are_divided(div_scale):
    """With a large epsilon the first step is the learning rate times the divided gradient, over epsilon."""
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    parameter = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    optimizer = without_kernels(parameter, lr=1e3, eps=1e6)
    # As Gemini does it: a bf16 gradient beside fp32 master weights.
    parameter.grad = gradient.clone()
    parameter.data = torch.zeros(1000)
    optimizer.step(div_scale=div_scale)
    divided = gradient.float() / (div_scale if div_scale > 0 else 1)
    torch.testing.assert_close(parameter.data, -1e-3 * divided, rtol=1e-4, atol=0)
