"""The module that is trained, flat and not."""

import functools
import re

import pytest
import torch
from colossalai.tensor import ColoParameter
from colossalai.tensor.param_op_hook import ColoParamOpHook, ColoParamOpHookManager
from diffusers import UNet2DConditionModel

from dreambooth.model import denoiser, recording, trainable
from dreambooth.model.activations import discard_activations
from dreambooth.model.libraries import name_in_file
from dreambooth.model.pipeline import load_part
from dreambooth.model.stable_diffusion import STABLE_DIFFUSION
from dreambooth.model.stable_diffusion_xl import STABLE_DIFFUSION_XL


def build(folder) -> denoiser.Denoiser:
    trained = {name: load_part(STABLE_DIFFUSION, name, folder) for name in ("unet", "text_encoder")}
    return denoiser.Denoiser(STABLE_DIFFUSION, **trained).train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flat_parameters_change_nothing_but_their_number(checkpointing, tiny_model, monkeypatch):
    """Three steps: the same losses and weights, out of a few parameters that seven ranks could share."""
    monkeypatch.setattr(trainable, "FLAT_ELEMENTS", 2**15)
    plain, flat = build(tiny_model), build(tiny_model)
    start = {name: weight.clone() for name, weight in plain.trained.values().items()}
    flat.trained.flatten(multiple_of=7)
    assert 1 < len(list(flat.parameters())) < 20 < len(list(plain.parameters()))
    assert not any(parameter.numel() % 7 for parameter in flat.parameters())
    assert all(torch.equal(flat.trained.values()[name], weight) for name, weight in start.items())
    losses = []
    for one in (plain, flat):
        if checkpointing:
            one.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
        for step in range(3):
            torch.manual_seed(step)
            latents, timesteps, conditioning = (
                torch.randn(2, 4, 16, 16),
                torch.randint(1000, (2,)),
                {"input_ids": torch.randint(99, (2, 7))},
            )
            loss = one(latents, timesteps, conditioning).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-6) and losses[0] != losses[2]
    for name, weight in plain.trained.values().items():
        assert not torch.equal(weight, start[name])
        torch.testing.assert_close(flat.trained.values()[name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("on_demand", [True, False])
def test_gradients_of_flat_parameters_come_one_after_another(on_demand, tiny_model, monkeypatch):
    """While others are computed; where all weights are handed out first, at the end."""
    monkeypatch.setattr(trainable, "FLAT_ELEMENTS", 2**15)
    flat, order = build(tiny_model), []
    flat.trained.flatten(multiple_of=1, on_demand=on_demand)
    for name, parameter in flat.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))

    def at_the_first_layer(module, inputs, output):
        output.register_hook(lambda _: order.append("first layer"))

    flat.unet.conv_in.register_forward_hook(at_the_first_layer)
    for _ in range(2):
        order.clear()
        flat(torch.randn(1, 4, 16, 16), torch.tensor([7]), {"input_ids": torch.randint(99, (1, 7))}).sum().backward()
        assert len(order) == 1 + len(flat.trained.by_parameter) == len({*order})
        before = order.index("first layer")
        assert before > len(order) / 2 if on_demand else before == 0, order


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_normalizations_in_half_precision_compute_the_same(device, flat, tiny_model):
    """Without autocast to the bit, with it as near to fp32 as before; only on CUDA would autocast widen them."""
    plain, half = build(tiny_model).to(device), build(tiny_model).to(device)
    half.normalize_in_half()
    if flat:
        half.trained.flatten(multiple_of=1)
    dtypes = []
    for one in half.unet.modules():
        if isinstance(one, torch.nn.GroupNorm | torch.nn.LayerNorm):
            one.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    torch.manual_seed(0)
    latents, timesteps, tokens = torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), torch.randint(99, (2, 7))
    inputs = latents.to(device), timesteps.to(device), {"input_ids": tokens.to(device)}
    wanted = plain(*inputs)
    assert torch.equal(half(*inputs), wanted)
    dtypes.clear()
    with torch.autocast(device, torch.bfloat16):
        found, as_autocast = half(*inputs), plain(*inputs)
    assert set(dtypes) == {torch.bfloat16}
    assert (found - wanted).norm() < 1.2 * (as_autocast - wanted).norm() < 0.02 * wanted.norm()
    found.square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in half.parameters())
    if flat:
        assert half.unet.conv_in.weight.dtype == torch.bfloat16, "cast at once, not layer by layer"


def bytes_kept(loss: torch.Tensor) -> int:
    """Returns the memory of all that autograd keeps for the backward pass of `loss`."""
    nodes, kept, ahead = set(), {}, [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        for name in dir(node):
            tensor = getattr(node, name) if name.startswith("_saved_") else None
            if isinstance(tensor, torch.Tensor):
                memory = tensor.untyped_storage()
                kept[memory._cdata] = memory.nbytes()
        ahead += [following for following, _ in node.next_functions]
    return sum(kept.values())


def bytes_spared(unet: UNet2DConditionModel, latents: torch.Tensor, timesteps: torch.Tensor) -> int:
    """Returns the memory of all activations that `discard_activations` is for."""
    spared = []
    for name, layer in unet.named_modules():
        if re.search(r"resnets.*conv[12]$|^conv_out$|attn[12]$|ff$|ff\.net\.2$", name):
            times = 2 if ".net." in name else 1  # the product and the GELU in it
            layer.register_forward_hook(
                lambda layer, inputs, output, times=times: spared.append(times * inputs[0].nbytes)
            )
    unet(latents, timesteps, latents.new_zeros(2, 7, unet.config.cross_attention_dim))
    return sum(spared)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_discarded_activations_are_the_same_again(precision, tiny_model):
    """Between the passes their memory is free; the gradients are those of a UNet that keeps them, to the bit."""
    keeping, discarding = build(tiny_model), build(tiny_model)
    discard_activations(discarding.unet)
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, dtype=precision)
    inputs = latents, torch.tensor([3, 900]), {"input_ids": torch.randint(99, (2, 7))}
    kept, gradients = [], []
    for one in (keeping, discarding):
        one.to(precision).trained.flatten(multiple_of=1)
        loss = one(*inputs).float().square().mean()
        kept.append(bytes_kept(loss))
        loss.backward()
        gradients.append([parameter.grad for parameter in one.parameters()])
    norms = (layer for layer in keeping.unet.modules() if isinstance(layer, torch.nn.LayerNorm))
    copied = sum(2 * layer.normalized_shape[0] for layer in norms) * precision.itemsize
    spared = bytes_spared(build(tiny_model).to(precision).unet, *inputs[:2])
    assert kept[0] - kept[1] == spared - copied > 0.2 * kept[0]
    assert all(map(torch.equal, *gradients))
    with torch.no_grad():
        assert torch.equal(keeping(*inputs), discarding(*inputs))


class FetchesWeights(ColoParamOpHook):
    """As Gemini's hook does: a weight is there for an operation, in either pass, and not a number in between."""

    def __init__(self, parameters: list[ColoParameter]):
        self.weights = {id(parameter): parameter.data.clone() for parameter in parameters}
        self.let_go(parameters)

    def fetch(self, parameters: list[ColoParameter]) -> None:
        for parameter in parameters:
            parameter.data.copy_(self.weights[id(parameter)])

    def let_go(self, parameters: list[ColoParameter]) -> None:
        for parameter in parameters:
            parameter.data.fill_(torch.nan)

    pre_forward = pre_backward = fetch
    post_forward = post_backward = let_go

    def rewrite_op(self, function):
        return function


def test_what_is_made_again_needs_no_weights_that_gemini_has_let_go_of(tiny_model):
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), {"input_ids": torch.randint(99, (2, 7))}
    whole, fetching = build(tiny_model), build(tiny_model)
    discard_activations(fetching.unet)
    for module in fetching.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, ColoParameter(parameter.data))
    kept = []
    for one, hooks in ((whole, ()), (fetching, (FetchesWeights(list(fetching.parameters())),))):
        with ColoParamOpHookManager.use_hooks(*hooks):
            loss = one(*inputs).square().mean()
            kept.append(bytes_kept(loss))
            loss.backward()
    assert kept[0] - kept[1] == bytes_spared(build(tiny_model).unet, *inputs[:2])
    for parameter, wanted in zip(fetching.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter.grad, wanted.grad)


@pytest.mark.parametrize("multiple_of", [1, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_pieces_of_all_ranks_make_the_weights(world_size, multiple_of, tiny_model, monkeypatch):
    """Whatever the ranks hold of each flat parameter, whose length their number need not divide."""
    monkeypatch.setattr(trainable, "FLAT_ELEMENTS", 2**15)
    one = build(tiny_model)
    start = {name: weight.flatten() for name, weight in one.trained.values().items()}
    one.trained.flatten(multiple_of)
    whole = {name: torch.full_like(weight, torch.nan) for name, weight in start.items()}
    for rank in range(world_size):

        def shard_of(flat, rank=rank):
            shards = flat.detach().tensor_split(world_size)
            return trainable.Shard(shards[rank], sum(map(len, shards[:rank])), flat)

        for piece in one.trained.pieces(shard_of):
            held = whole[piece.weight.name][piece.first : piece.last]
            assert held.isnan().all(), "held once"
            held.copy_(piece.of(piece.shard.tensor))
    assert all(torch.equal(whole[name], weight) for name, weight in start.items())


def test_what_is_frozen_is_not_in_the_set(tiny_model):
    """Nor in a flat parameter; it computes as before, and gets no gradient."""
    one, whole = build(tiny_model), build(tiny_model)
    one.unet.requires_grad_(False)
    one.unet.conv_in.requires_grad_(True)
    partly = denoiser.Denoiser(STABLE_DIFFUSION, unet=one.unet, text_encoder=one.text_encoder.requires_grad_(False))
    assert [weight.name for weight in partly.trained] == ["unet.conv_in.weight", "unet.conv_in.bias"]
    partly.trained.flatten(multiple_of=1)
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([3]), {"input_ids": torch.tensor([[1, 2, 3]])}
    prediction = partly(*inputs)
    assert torch.equal(prediction, whole(*inputs))
    prediction.square().mean().backward()
    given = [name for name, parameter in partly.named_parameters() if parameter.grad is not None]
    assert given == ["flat0"]


def test_what_is_frozen_within_a_component_is_whole_in_fp32(tiny_model):
    """With what is trained it makes the component, whatever precision the module computes in."""
    text_encoder = load_part(STABLE_DIFFUSION, "text_encoder", tiny_model)
    start = {f"text_encoder.{name_in_file(text_encoder, name)}": w for name, w in text_encoder.state_dict().items()}
    start = {name: weight.clone() for name, weight in start.items()}
    next(text_encoder.parameters()).requires_grad_(False)
    trained = denoiser.Denoiser(STABLE_DIFFUSION, text_encoder=text_encoder).trained
    own = trained.values()
    trained.module.to(torch.bfloat16)
    (frozen,) = trained.frozen()
    assert {frozen.name, *own} == {*start} and frozen.name not in own and frozen.is_everywhere
    assert torch.equal(frozen.values.view(frozen.shape), start[frozen.name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_frozen_computes_beside_what_is_handed_out_in_half(dtype, xl_model, monkeypatch):
    """As the last layer of XL's first text encoder, which nobody reads; a recording without its graphs, on the CPU."""
    monkeypatch.setattr(recording, "_copy", torch.Tensor.copy_)  # Triton's permutes convolutions' weights on GPUs
    names = ("unet", *STABLE_DIFFUSION_XL.text_encoders)
    parts = {name: load_part(STABLE_DIFFUSION_XL, name, xl_model) for name in names}
    STABLE_DIFFUSION_XL.freeze_unread(parts)
    one = denoiser.Denoiser(STABLE_DIFFUSION_XL, **parts).train()
    assert not all(parameter.requires_grad for parameter in one.text_encoder.parameters())
    one.cast(torch.float32, frozen=dtype)
    one.normalize_in_half()

    recorded = object.__new__(recording.Recording)  # whose constructor records
    recorded.predict, recorded.trained, recorded.dtype = one._predict, one.trained, dtype
    recorded.parameters = one.trained.parameters()
    tokens = torch.zeros(1, 77, dtype=torch.long)
    recorded.inputs = {"noisy_latents": torch.randn(1, 4, 16, 16), "timesteps": torch.tensor([3])}
    recorded.inputs |= {"input_ids": tokens, "input_ids_2": tokens, "time_ids": torch.zeros(1, 6)}
    assert recorded._forward().isfinite().all()


def test_flat_parameters_lie_where_they_are_wanted(tiny_model):
    one = build(tiny_model)
    one.trained.flatten(2, torch.device("meta"))
    assert one.trained.is_flat and all(parameter.is_meta for parameter in one.trained.parameters())


@pytest.mark.parametrize("room_of_others", [[True] * 3, [True, True, False], [True, False], [False]])
@pytest.mark.parametrize("shares", [True, False])
def test_all_ranks_record_or_none(room_of_others, shares, tiny_model, monkeypatch, capsys):
    """And before any of them shares gradients, it is known whether the others can: graphs stand in for a GPU's."""
    made, answers = [], iter(room_of_others)

    class Graphs:
        def __init__(self, *inputs, share, **settings):
            made.append("tried out")
            self.share = share

        def record(self):
            made.append(self.share)

        def release(self):
            made.append("released")

    monkeypatch.setattr("dreambooth.model.denoiser.Recording", Graphs)
    monkeypatch.setattr("dreambooth.model.denoiser.from_all_ranks", lambda own: [own, next(answers)])
    one, share = build(tiny_model), (lambda gradients: None) if shares else None
    inputs = torch.zeros(1, 4, 16, 16), torch.zeros(1), {}
    besides = functools.partial(made.append, "encoded")
    one.record(inputs, dtype=torch.float32, keep_free=8, insist=False, share=share, besides=besides)
    if all(room_of_others):
        assert isinstance(one.recording, Graphs) and made == ["tried out", share, "encoded"]
    else:
        assert one.recording is None and "CUDA graphs: none" in capsys.readouterr().out
        assert made == [*("tried out", share, "encoded")[: len(room_of_others)], "released"]


def test_gradients_are_shared_while_others_are_computed(tiny_model, monkeypatch):
    """Of each flat parameter once, when all of its weights have theirs; a recording without its graphs, on the CPU."""
    monkeypatch.setattr(trainable, "FLAT_ELEMENTS", 2**15)
    monkeypatch.setattr(recording, "SMALL", 2**6)
    monkeypatch.setattr(recording, "_copy", torch.Tensor.copy_)  # Triton's permutes convolutions' weights on GPUs
    one = build(tiny_model)
    one.trained.flatten(multiple_of=1)
    inputs = (torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), {"input_ids": torch.arange(2 * 77).view(2, 77)})
    gradient = torch.randn(2, 4, 16, 16)
    one(*inputs).backward(gradient)
    expected = [parameter.grad for parameter in one.trained.parameters()]

    recorded = object.__new__(recording.Recording)  # whose constructor records
    recorded.predict, recorded.trained, recorded.dtype = one._predict, one.trained, torch.float32
    recorded.parameters = one.trained.parameters()
    recorded.inputs = {"noisy_latents": inputs[0], "timesteps": inputs[1]} | inputs[2]
    recorded.gradients = [torch.full_like(value, torch.nan) for value in expected]
    shared, waited, missing = [], [], []

    def share(whole: torch.Tensor):
        number = next(n for n, one in enumerate(recorded.gradients) if one is whole)
        shared.append(number)
        missing.append(sum(bool(value.isnan().any()) for value in recorded.gradients))
        assert not whole.isnan().any()
        return lambda: waited.append(number)

    for how in (share, None):
        for value in recorded.gradients:
            value.fill_(torch.nan)
        recorded._backward(recorded._forward(), gradient, how)
        for value, wanted in zip(recorded.gradients, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert sorted(shared) == sorted(waited) == list(range(len(expected))) and len(expected) > 2
    assert missing[0] > 0 == missing[-1]
