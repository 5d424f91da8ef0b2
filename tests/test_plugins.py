"""What works inside the plugins, without them: optimizers, what is fetched."""

import pytest
import torch
import torch.distributed as dist
import triton
from colossalai.accelerator import get_accelerator
from colossalai.amp.naive_amp.mixed_precision_mixin import BF16MixedPrecisionMixin
from colossalai.zero.gemini.chunk import Chunk
from colossalai.zero.low_level.bookkeeping import BucketStore

from dreambooth.engine.offload import ORDINARY, HostAdamW
from dreambooth.engine.optimizer import AdamW, DeviceAdamW, Part, clip, load_torch_scaler, new_state, norm_of
from dreambooth.engine.plugins import (
    AheadZeroOptimizer,
    HeldGradScaler,
    InPlaceBucket,
    LastingChunk,
    ShardAdamW,
    changed_inside,
    let_convolutions_compile,
)
from dreambooth.engine.strategy import Strategy
from dreambooth.model.precision import no_kernels


def test_a_loss_scale_goes_on_under_every_plugin(monkeypatch):
    """Torch's and ColossalAI's take up each other's scale, and how many steps it has been good for; and their own."""
    for name, found in {"get_current_device": torch.device("cpu"), "device_count": 1}.items():
        monkeypatch.setattr(type(get_accelerator()), name, lambda self, found=found: found)
    theirs, ours = torch.amp.GradScaler("cpu", init_scale=2.0**9), HeldGradScaler(initial_scale=2.0**11)
    ours._growth_step, ours._hysteresis_step = 7, 1
    kept = ours.state()
    load_torch_scaler(theirs, kept)
    theirs.scale(torch.ones(()))  # it makes its tensors now
    assert theirs.get_scale() == 2.0**11 and theirs.state_dict()["_growth_tracker"] == 7
    again, other = torch.amp.GradScaler("cpu"), HeldGradScaler(initial_scale=1.0)
    load_torch_scaler(again, theirs.state_dict())
    again.scale(torch.ones(()))
    assert again.state_dict() == theirs.state_dict()
    other.load_state(theirs.state_dict())
    assert other.state() == {"scale": 2.0**11, "_growth_step": 7, "_hysteresis_step": 0}
    other.load_state(kept)
    assert other.state() == kept
    other.load_state(theirs.state_dict() | {"_growth_tracker": 1500})
    other.update(False)
    other.end_step()
    assert other.state() == {"scale": 2.0**12, "_growth_step": 0, "_hysteresis_step": 0}


def test_colossalai_is_the_one_that_this_builds_on():
    assert changed_inside() == []


@pytest.mark.parametrize("bias", [None, [4]])
def test_torch_knows_the_shapes_of_the_gradients_of_a_convolution(bias):
    """By which its compiler goes, also where the gradient of the bias is computed apart."""
    let_convolutions_compile()
    image, weight = torch.empty(2, 3, 8, 8, device="meta"), torch.empty(4, 3, 3, 3, device="meta")
    gradient, how = torch.empty(2, 4, 8, 8, device="meta"), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    of_image, of_weight, of_bias = torch.ops.aten.convolution_backward(
        gradient, image, weight, bias, *how, [True, True, bias is not None]
    )
    assert of_image.shape == image.shape and of_weight.shape == weight.shape
    assert bias is None or list(of_bias.shape) == bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("div_scale", [-1.0, 250.0])
@pytest.mark.parametrize("in_host_memory", [False, True])
def test_steps_are_those_of_adamw_on_divided_gradients(dtype, div_scale, in_host_memory):
    """With half-precision gradients beside fp32 weights; in host memory the weights take their place."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(1000, generator=draw)
    weights, reference = torch.nn.Parameter(start.to(dtype)), torch.nn.Parameter(start.clone())
    optimizer = ShardAdamW([weights], lr=1e-2, weight_decay=0.1, fused=True)
    optimizer.host = HostAdamW(ORDINARY)
    adamw = torch.optim.AdamW([reference], lr=1e-2, weight_decay=0.1)
    shard = start.clone()
    for _ in range(5):
        gradient = torch.randn(1000, generator=draw).to(dtype)
        given = gradient.clone()
        # As Gemini does it: the gradient is set beside data of its dtype, then the fp32 shard takes the data's place.
        weights.data = gradient
        weights.grad = weights.data
        weights.data = shard
        optimizer.in_half = {weights: gradient} if in_host_memory else {}
        optimizer.step(div_scale=div_scale)
        assert torch.equal(gradient, shard.to(dtype)) == in_host_memory
        reference.grad = given.float() / (div_scale if div_scale > 0 else 1)
        adamw.step()
        torch.testing.assert_close(shard, reference.data, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(shard, start, atol=1e-3)


def test_a_step_that_is_skipped_leaves_gradients_that_are_numbers(monkeypatch):
    """Where nothing writes them anew, as between the weights of a flat parameter that is recorded."""
    monkeypatch.setattr("dreambooth.engine.optimizer.has_kernels", lambda *parameters: True)
    for overflow in (torch.inf, torch.nan):
        weight = torch.nn.Parameter(torch.zeros(3))
        weight.grad = torch.tensor([overflow, 1.0, 0.0])
        optimizer = AdamW([weight], lr=1e-3, fused=True)
        optimizer.found_inf = torch.ones(())
        assert not clip(optimizer, 1.0).isfinite()
        optimizer.step()
        assert weight.grad[1:].isfinite().all() and weight.grad[2] == 0 and not weight.any()


@pytest.mark.skipif(triton.__version__ < "3.2", reason="the interpreter of Triton 3.1 computes nonsense")
@pytest.mark.parametrize("clips", [False, True])
def test_steps_by_kernels_are_those_of_adamw(clips, monkeypatch):
    """In three groups, of which one has nothing to do, and with a state that torch's own step can go on from."""
    torch.manual_seed(0)
    weights, exact = (
        [torch.nn.Parameter(torch.ones(size, dtype=dtype)) for size in (3000, 5, 7)]
        for dtype in (torch.float32, torch.float64)
    )
    settings = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1}
    optimizer = AdamW([{"params": [one]} for one in weights], fused=True, **settings)
    adamw = torch.optim.AdamW(exact, **settings)
    for with_kernels in (True, True, False):
        monkeypatch.setattr("dreambooth.engine.optimizer.has_kernels", lambda *parameters, value=with_kernels: value)
        for one, other in zip(weights[:2], exact[:2], strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.double() / (3 if clips else 1)
        optimizer.divisor = torch.tensor(3.0) if clips else None
        optimizer.step()
        adamw.step()
    for one, other in zip(weights, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)
    assert weights[2].eq(1).all() and not weights[1].eq(1).any()


class NoCompiler:
    """Triton's driver, where there is none."""

    @property
    def active(self):
        raise RuntimeError("Failed to find C compiler")


def test_without_a_compiler_there_are_no_kernels(monkeypatch, capsys):
    """Which a warning says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr("triton.runtime.driver", NoCompiler())
    no_kernels.cache_clear()
    try:
        assert "needs a C compiler and Python's headers" in no_kernels()
    finally:
        no_kernels.cache_clear()
    assert capsys.readouterr().err.startswith("warning: this machine lacks a C compiler")


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("loss_scale", [1.0, 256.0])
def test_gradients_are_clipped_as_torch_does(monkeypatch, max_norm, loss_scale):
    """Out of half-precision gradients with the loss scale in them; the norm is told with it."""
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=draw) for size in (1000, 300)]
    optimizer = object.__new__(AheadZeroOptimizer)
    optimizer._clip_grad_norm, optimizer.grad_handles = max_norm, []
    optimizer.mixed_precision_mixin = BF16MixedPrecisionMixin()
    monkeypatch.setattr(optimizer.mixed_precision_mixin, "get_grad_div_scale", lambda: loss_scale)  # as that of fp16
    half = [(gradient * loss_scale).half() for gradient in gradients]
    weights = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for weight, gradient in zip(weights, half, strict=True):
        weight.grad = gradient.float() / loss_scale
    norm = torch.nn.utils.clip_grad_norm_(weights, max_norm or float("inf"))

    masters = [torch.zeros_like(gradient) for gradient in gradients]
    settings = {"lr": 1e-2, "eps": 1e-2}  # with so large an eps AdamW sees the size of gradients
    adamw = AdamW(map(torch.nn.Parameter, masters), fused=True, **settings)
    parts = [
        Part(master, new_state(adamw, master), gradient, torch.empty_like(gradient))
        for master, gradient in zip(masters, half, strict=True)
    ]
    DeviceAdamW().step(parts, adamw.param_groups[0], optimizer._divisor(norm_of(half)))
    torch.optim.AdamW(weights, **settings).step()

    torch.testing.assert_close(optimizer.get_grad_norm(), norm * loss_scale)
    for master, weight in zip(masters, weights, strict=True):
        torch.testing.assert_close(master, weight.detach())


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


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[12], [11], [12, 6]])
def test_a_flat_gradient_is_shared_where_it_lies(sizes, ranks):
    """In the order of ColossalAI's own; one that is filled up for the ranks is another tensor already."""

    def flattened(kind) -> tuple[torch.Tensor, list[torch.Tensor]]:
        bucket = kind.__new__(kind)  # its own groups and streams are not needed
        bucket._world_size = ranks
        bucket.reset_all()
        gradients = [torch.arange(size, dtype=torch.bfloat16) for size in sizes]
        for gradient in gradients:
            parameter = torch.nn.Parameter(torch.zeros_like(gradient))
            parameter.grad = gradient
            bucket.add_param_grad(0, parameter, -gradient.numel() % ranks)
        bucket.build_grad_in_bucket()
        return bucket.get_flatten_grad(), gradients

    (found, gradients), (wanted, _) = flattened(InPlaceBucket), flattened(BucketStore)
    assert torch.equal(found, wanted)
    assert (found.data_ptr() == gradients[0].data_ptr()) == (len(sizes) == 1 and sizes[0] % ranks == 0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Chunk, LastingChunk])
def test_a_chunk_keeps_its_memory_until_it_has_been_read(kind):
    """While its gradients are shared in another stream, what is computed next does not get hold of it."""
    size, device = 2**20, torch.device("cuda")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda:0"))
    try:
        chunk = Chunk(size, dist.group.WORLD, torch.bfloat16)
        chunk.append_tensor(torch.zeros(size, dtype=torch.bfloat16, device=device))
        chunk.close_chunk()
        chunk.__class__ = kind
        chunk.access_chunk()
        chunk.cuda_global_chunk.fill_(1)
        shares = torch.cuda.Stream()
        shares.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(shares):
            torch.cuda._sleep(2 * 10**9)  # cycles, a second, of other work first: a busy host is slow to go on
            chunk.reduce(async_op=True)
            chunk.wait_async_reduce()
        after = [torch.full([size], 2, dtype=torch.bfloat16, device=device) for _ in range(4)]
        torch.cuda.synchronize()
        found = set(chunk.cuda_shard.tolist())
    finally:
        dist.destroy_process_group()
    assert len(after) == 4 and found == ({2} if kind is Chunk else {1}), "ColossalAI's own is overwritten"
