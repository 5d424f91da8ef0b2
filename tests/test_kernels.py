"""The Triton kernels, and the UNet that is made of them, against PyTorch; without a GPU by Triton's interpreter."""

import copy
import signal
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from benchmarks.random_model import SHAPES
from dreambooth.model import kernels_ahead
from dreambooth.model.denoiser import Denoiser
from dreambooth.model.kernels_ahead import KernelsAhead, sizes_of
from dreambooth.model.stable_diffusion import STABLE_DIFFUSION

triton = pytest.importorskip("triton")
channels_last = pytest.importorskip("dreambooth.model.channels_last")
kernels = pytest.importorskip("dreambooth.model.kernels")
kernel_compiler = pytest.importorskip("dreambooth.model.kernel_compiler")
GPUTarget = kernel_compiler.GPUTarget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and int(triton.__version__.split(".")[1]) < 3:
    pytest.skip("the interpreter of Triton 3.1 computes nonsense with today's numpy", allow_module_level=True)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Compares the whole, and the largest element: a few that are wrong would not show in the whole."""
    difference = found.double() - wanted.double()
    assert difference.norm() <= tolerance * wanted.double().norm()
    assert difference.abs().max() <= 10 * tolerance * wanted.double().abs().max()


def assert_gradients_close(found, own: list, wanted, exact: list, gradient: torch.Tensor) -> None:
    """Compares results, and what a gradient of theirs becomes for the inputs that each was made of."""
    assert_close(found, wanted)
    of_own, of_exact = torch.autograd.grad(found, own, gradient), torch.autograd.grad(wanted, exact, gradient.double())
    for one, other in zip(of_own, of_exact, strict=True):
        assert_close(one, other)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
# Pixels that fill no tile, more than one part, channels that fill no block, groups that straddle blocks, more parts
# than are summed at once.
@pytest.mark.parametrize(
    "shape, groups", [((2, 64, 8, 8), 32), ((3, 96, 13, 11), 8), ((1, 40, 16, 16), 4), ((2, 6, 65, 64), 3)], ids=str
)
def test_group_norm_and_its_gradients(shape, groups, shifted, silu):
    torch.manual_seed(0)
    images, channels = shape[:2]
    x, gradient = 3 + 2 * draw(*shape), draw(*shape)
    inputs = [x, draw(channels), draw(channels)] + [draw(images, channels)] * shifted
    exact = [one.double().requires_grad_() for one in inputs]
    shift = exact[3][:, :, None, None] if shifted else 0
    wanted = F.group_norm(exact[0] + shift, groups, exact[1], exact[2], 1e-5)
    wanted = F.silu(wanted) if silu else wanted
    own = [one.clone().requires_grad_() for one in inputs]
    found = kernels.group_norm(own[0], own[1], own[2], groups, 1e-5, shift=own[3] if shifted else None, silu=silu)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_gradients_close(found, own, wanted, exact, gradient)


def test_a_group_far_from_zero_keeps_its_variance():
    """A sum of squares would lose it: 1000 squared, and beside it 1."""
    torch.manual_seed(0)
    x, one = 1000 + draw(1, 8, 32, 32), torch.ones(8, device=DEVICE)
    wanted = F.group_norm(x.double(), 2, one.double(), 0 * one.double(), 1e-5)
    assert_close(kernels.group_norm(x, one, 0 * one, 2, 1e-5), wanted, tolerance=1e-4)


@pytest.mark.parametrize("shape", [(2, 37, 24), (700, 320)], ids=str)
def test_layer_norm_and_its_gradients(shape):
    torch.manual_seed(0)
    width, gradient = shape[-1], draw(*shape)
    inputs = [3 + 2 * draw(*shape), draw(width), draw(width)]
    own, exact = ([one.to(dtype).requires_grad_() for one in inputs] for dtype in (torch.float32, torch.float64))
    found, wanted = kernels.layer_norm(*own, 1e-5), F.layer_norm(exact[0], (width,), *exact[1:], 1e-5)
    assert_gradients_close(found, own, wanted, exact, gradient)


@pytest.mark.parametrize("shape", [(2, 700, 24), (3, 24)], ids=str)
def test_linear_and_its_gradients(shape):
    torch.manual_seed(0)
    inputs, gradient = [draw(*shape), draw(70, shape[-1]), draw(70)], draw(70, *shape[:-1]).movedim(0, -1)
    own, exact = ([one.to(dtype).requires_grad_() for one in inputs] for dtype in (torch.float32, torch.float64))
    found, wanted = kernels.linear(*own), F.linear(*exact)
    assert_gradients_close(found, own, wanted, exact, gradient)


def test_gated_gelu_and_its_gradient():
    torch.manual_seed(0)
    both, gradient = draw(3, 50, 2 * 24), draw(3, 50, 24)
    own, exact = both.clone().requires_grad_(), both.double().requires_grad_()
    hidden, gate = exact.chunk(2, dim=-1)
    wanted, found = hidden * F.gelu(gate), kernels.gated_gelu(own)
    assert_close(found, wanted)
    assert_close(
        torch.autograd.grad(found, own, gradient)[0], torch.autograd.grad(wanted, exact, gradient.double())[0]
    )


@pytest.mark.parametrize("shape", [(5, 70, 3, 3), (3, 4, 3, 3), (2, 65, 1, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_are_copied_between_layouts(shape, dtype):
    torch.manual_seed(0)
    weight, back = draw(*shape), torch.full(shape, torch.nan, device=DEVICE)
    last = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE).to(memory_format=torch.channels_last)
    kernels.copy_weight(last, weight)
    assert torch.equal(last, weight.to(dtype)) and last.is_contiguous(memory_format=torch.channels_last)
    kernels.copy_weight(back, last)
    assert torch.equal(back, last.float())


def test_the_norm_of_some_tensors():
    torch.manual_seed(0)
    tensors = [draw(20000), draw(3).half(), 30 * draw(8193)]
    assert_close(kernels.norm(tensors), torch.cat([tensor.double() for tensor in tensors]).norm())


@pytest.mark.parametrize("divided", [False, True])
def test_steps_of_adamw(divided):
    """Three of them, with half-precision gradients; an element that the last block does not fill stays as it is."""
    torch.manual_seed(0)
    settings = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-2, "weight_decay": 0.1}
    padded, moments = draw(3000), torch.zeros(2, 3000, device=DEVICE)
    weights, exact = padded[:2999], torch.nn.Parameter(padded[:2999].double())
    half = torch.zeros(3000, device=DEVICE, dtype=torch.float16)
    beyond, optimizer = padded[2999].item(), torch.optim.AdamW([exact], **settings)
    divisor = torch.tensor(3.0, device=DEVICE) if divided else None
    for step in (1, 2, 3):
        gradients = draw(2999).half()
        exact.grad = gradients.double() / (3 if divided else 1)
        optimizer.step()
        corrections = 1 - torch.tensor(settings["betas"], device=DEVICE) ** step
        means, squares = moments[:, :2999]
        kernels.adamw(weights, gradients, means, squares, corrections, divisor=divisor, half=half[:2999], **settings)
        assert_close(weights, exact.detach())
        assert torch.equal(half[:2999], weights.half()) and half[2999] == 0
    assert padded[2999].item() == beyond and moments[0, 2999] == moments[1, 2999] == 0


def test_a_unet_with_flat_parameters_can_keep_channels_last():
    """Its weights are not attributes of its layers before they are handed out."""
    torch.manual_seed(0)
    plain = UNet2DConditionModel(**SHAPES["tiny"]["unet"]).to(DEVICE).train()
    flat = Denoiser(STABLE_DIFFUSION, unet=copy.deepcopy(plain))
    flat.trained.flatten(multiple_of=1)
    channels_last.keep_channels_last(flat.unet)
    latents, timesteps, prompt = draw(2, 4, 8, 8), torch.tensor([3, 900], device=DEVICE), draw(2, 7, 32)
    found = flat(latents, timesteps, {"encoder_hidden_states": prompt})
    assert_close(found, plain(latents, timesteps, prompt).sample, 1e-3 if DEVICE == "cuda" else 1e-5)


@pytest.mark.parametrize("shape", ["tiny", "tiny-xl"])
def test_a_unet_with_channels_last_computes_the_same(shape):
    """Its prediction and all gradients, in fp32; and it can be made what it was."""
    torch.manual_seed(0)
    plain = UNet2DConditionModel(**SHAPES[shape]["unet"]).to(DEVICE).train()
    plain.time_embedding.act = plain.conv_act  # releases of 2024 have one of a kind for all models of a process
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    kinds = [type(module) for module in last.modules()]
    undo = channels_last.keep_channels_last(last)
    assert not [module for module in last.modules() if type(module) is torch.nn.GroupNorm]
    latents, timesteps = draw(2, 4, 8, 8), torch.tensor([3, 900], device=DEVICE)
    added = {"text_embeds": draw(2, 40), "time_ids": torch.tensor([[66, 40, 9, 0, 32, 32]] * 2, device=DEVICE)}
    rest = timesteps, draw(2, 7, plain.config.cross_attention_dim)
    wanted = plain(latents, *rest, added_cond_kwargs=added).sample
    found = last(latents.contiguous(memory_format=torch.channels_last), *rest, added_cond_kwargs=added).sample
    assert found.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-3 if DEVICE == "cuda" else 1e-5  # convolutions in TF32
    assert_close(found, wanted, tolerance)
    gradient = torch.randn_like(wanted)
    wanted.backward(gradient)
    found.backward(gradient)
    for one, other in zip(last.parameters(), plain.parameters(), strict=True):
        assert_close(one.grad, other.grad, 10 * tolerance)
    undo()
    assert [type(module) for module in last.modules()] == kinds


def launched_by(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *, carried_out: bool = True) -> set:
    """Returns what Triton would compile for what is launched: names, dtypes, sizes as far as they count, constants."""
    found, kind = set(), type(kernels._moments)
    run = kind.run

    def counts(name: str, value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if isinstance(value, float) or name in ("size", "parts", "per_group", "rows", "programs", "total"):
            return type(value)
        return value if name.isupper() or value is None else (value == 1, value % 16 == 0)

    def noted(self, *values, grid, warmup, **constants):
        named = dict(zip(self.arg_names, values, strict=False)) | constants
        found.add((self.fn.__name__, *((name, counts(name, value)) for name, value in sorted(named.items()))))
        return run(self, *values, grid=grid, warmup=warmup, **constants) if carried_out else None

    with monkeypatch.context() as patched:
        patched.setattr(kind, "run", noted)
        work()
    return found


def compiled_ahead(
    sizes: dict, dtype: torch.dtype, weights_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> set:
    """Returns what the compiler of kernels has compiled, in the same form."""
    lists = kernel_compiler.launches(sizes, dtype, weights_dtype)
    return launched_by(lambda: kernel_compiler.carry_out(lists), monkeypatch, carried_out=False)


@pytest.mark.parametrize("shape, weights_dtype", [("tiny-v2", torch.float32), ("tiny-xl", torch.float16)])
def test_all_that_a_step_launches_is_compiled_ahead(shape, weights_dtype, monkeypatch):
    """Of layers whose sizes are multiples of 16, for which Triton has kernels of their own, and of others."""
    unet = UNet2DConditionModel(**SHAPES[shape]["unet"]).to(DEVICE, torch.float16)
    ahead = compiled_ahead(sizes_of(unet), torch.float16, weights_dtype, monkeypatch)

    def step() -> None:
        last = copy.deepcopy(unet).to(memory_format=torch.channels_last)
        channels_last.keep_channels_last(last)
        latents = draw(2, 4, 8, 8).half().to(memory_format=torch.channels_last)
        added = {"text_embeds": draw(2, 40).half(), "time_ids": torch.zeros(2, 6, device=DEVICE)}
        prompt = draw(2, 7, unet.config.cross_attention_dim).half()
        last(latents, torch.tensor([3, 900], device=DEVICE), prompt, added_cond_kwargs=added).sample.sum().backward()
        for leaf in last.parameters():
            if leaf.shape[2:].numel() > 1:
                place = torch.zeros(leaf.shape, dtype=weights_dtype, device=DEVICE)
                kernels.copy_weight(leaf.detach(), place)
                kernels.copy_weight(place, leaf.detach())
        gradient, (weights, means, squares) = draw(3000).to(weights_dtype), (draw(3000) for _ in range(3))
        half = {"half": gradient.clone()} if weights_dtype == torch.float16 else {}
        betas = {"corrections": draw(2), "betas": (0.9, 0.999)}
        rest = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "divisor": kernels.norm([gradient, gradient])}
        kernels.adamw(weights, gradient, means, squares, **betas, **rest, **half)

    assert launched_by(step, monkeypatch) <= ahead


@pytest.mark.parametrize("capability, dtype", [(75, torch.float16), (90, torch.bfloat16)])
def test_all_kernels_can_be_compiled_for_a_gpu(capability, dtype, tmp_path, monkeypatch):
    """By the compiler itself, which may refuse or abort at what the interpreter runs: for a T4 and for an H100."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SHAPES["stable-diffusion-v1-4"]["unet"])
    wanted = compiled_ahead(sizes_of(unet), dtype, torch.float32, monkeypatch)
    # On a GPU a layer normalization's moments are in fp32 whatever it normalizes; on the CPU they are not.
    moments = {dict(values)[name][0] for kernel, *values in wanted if "layer" in kernel for name in ("mean", "rstd")}
    assert moments == {torch.float32}
    # Files of the folder that the command is typed in are none of the libraries'.
    for name in ("torch", "json", "contextlib"):
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ahead = KernelsAhead(wanted=True)
    ahead.compile(unet, dtype=dtype, weights_dtype=torch.float32, target=GPUTarget("cuda", capability, 32))
    ahead.wait()
    assert len(list(tmp_path.rglob("*.cubin"))) == len(wanted) > 25


@pytest.mark.parametrize("trouble", ["none is wanted", "no process", "no such GPU", "it hangs"])
def test_kernels_that_are_not_compiled_ahead_are_left(trouble, tmp_path, monkeypatch):
    """And the program that was to compile them is gone."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SHAPES["tiny"]["unet"])
    (tmp_path / "ptxas").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "ptxas").chmod(0o755)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if trouble == "no process":
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    if trouble == "it hangs":
        monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "ptxas"))
        monkeypatch.setattr(kernels_ahead, "LONGEST_S", 2)
    ahead = KernelsAhead(wanted=trouble != "none is wanted")
    target = GPUTarget("cuda", 0 if trouble == "no such GPU" else 90, 32)
    ahead.compile(unet, dtype=torch.float16, weights_dtype=torch.float32, target=target)
    ahead.wait()
    assert not list(tmp_path.rglob("*.cubin"))
    statuses = {"no such GPU": -signal.SIGABRT, "it hangs": -signal.SIGALRM}  # the compiler itself aborts
    assert (ahead.compiler and ahead.compiler.wait(20)) == statuses.get(trouble)


def test_the_compiler_of_kernels_ends_with_the_trainer():
    """Which may be killed before it has said what is to be compiled."""
    ahead = KernelsAhead(wanted=True)
    ahead.compiler.stdin.close()
    assert ahead.compiler.wait(60) == 0


def test_the_compiler_of_kernels_does_not_wait_for_ever(monkeypatch):
    """For a trainer that lives on and says nothing, as a notebook may after an error."""
    in_haste = "\nmain.__globals__['LONGEST_WAIT_S'] = 1\nmain()"
    monkeypatch.setattr(kernels_ahead, "COMPILER", kernels_ahead.COMPILER.replace("\nmain()", in_haste))
    ahead = KernelsAhead(wanted=True)
    assert ahead.compiler.wait(60) == -signal.SIGALRM
