"""What works inside the plugins, without them: Gemini's optimizer, what it fetches, how low_level_zero offloads."""

import pytest
import torch

from dreambooth.plugins import OffloadThroughPinnedMemory, ShardAdamW
from dreambooth.strategy import Strategy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("div_scale", [-1.0, 250.0])
def test_steps_are_those_of_adamw_on_divided_gradients(dtype, div_scale):
    """With half-precision gradients beside fp32 weights."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(1000, generator=draw)
    weights, reference = torch.nn.Parameter(start.to(dtype)), torch.nn.Parameter(start.clone())
    optimizer = ShardAdamW([weights], lr=1e-2, weight_decay=0.1, fused=True)
    adamw = torch.optim.AdamW([reference], lr=1e-2, weight_decay=0.1)
    shard = start.clone()
    for _ in range(5):
        gradient = torch.randn(1000, generator=draw).to(dtype)
        # As Gemini does it: the gradient is set beside data of its dtype, then the fp32 shard takes the data's place.
        weights.data = gradient
        weights.grad = weights.data
        weights.data = shard
        optimizer.step(div_scale=div_scale)
        reference.grad = gradient.float() / (div_scale if div_scale > 0 else 1)
        adamw.step()
        torch.testing.assert_close(shard, reference.data, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(shard, start, atol=1e-3)


@pytest.mark.gpu
def test_what_zero_offloads_goes_through_pinned_memory():
    on_gpu = torch.randn(1000, device="cuda")
    with OffloadThroughPinnedMemory():
        offloaded = on_gpu.to(torch.float32).to(torch.device("cpu"))
        assert not offloaded.to(torch.float64).is_pinned()
    assert offloaded.is_pinned() and torch.equal(offloaded, on_gpu.cpu())


@pytest.mark.parametrize(
    ("plugin", "placement", "fetches"),
    [
        ("gemini", "cpu", [True, True]),
        ("gemini", "auto", [True, False]),
        ("gemini", "cuda", [False, False]),
        ("low_level_zero", "cpu", [False, False]),
        ("torch_ddp", "cuda", [False, False]),
    ],
)
def test_weights_that_take_more_than_a_fifth_of_a_gpu_are_fetched_with_auto(plugin, placement, fetches):
    """Of Stable Diffusion's UNet, in half precision, on GPUs of 8 and of 12 GB."""
    strategy = Strategy(plugin, placement, "bf16")
    assert [strategy.fetches_weights(860_000_000, memory) for memory in (8_000_000_000, 12_000_000_000)] == fetches
