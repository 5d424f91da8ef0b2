"""The estimate of memory: against what was measured on GPUs, and what a run holds on the CPU; what is made of it."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import COLOSSALAI, ROOT, TRADITIONAL, Running, command_line, run, train

from benchmarks import memory, random_model
from dreambooth.command_line import limits
from dreambooth.command_line.colossalai_flags import ColossalAIFlags
from dreambooth.command_line.flags import Flags, LoraFlags, ModelFlags, TrainingFlags
from dreambooth.command_line.parser import parse
from dreambooth.engine.strategy import Strategy, choose_strategy
from dreambooth.model.configurations import build_pipeline
from dreambooth.model.outline import outline_of
from dreambooth.model.pipeline import write_pipeline
from dreambooth.model.precision import DTYPES
from dreambooth.model.tracing import trace
from dreambooth.run.estimate import CONTEXT, GIB, LIBRARIES_WITH_GPU, Setup, counts_of, estimate
from dreambooth.run.memory import (
    FITS,
    PERHAPS,
    Machine,
    _host_memory,
    estimate_of,
    lighter,
    refusal,
    strategies,
    this_machine,
)

CARD = 80 * GIB
FP32, BF16 = torch.float32, torch.bfloat16
WHOLE, RANK_16 = LoraFlags(), LoraFlags(lora_rank=16)
# A model between the tests' tiny ones and real ones: 68 M weights.
MIDDLE = {
    "text": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2),
    "vae": dict(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=256),
    "unet": dict(
        block_out_channels=(128, 256, 512),
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=64,
        sample_size=32,
    ),
}


@pytest.fixture(scope="module")
def of_1_4():
    """The outline of Stable Diffusion 1.4 at 512 px."""
    return memory.outline("stable-diffusion-v1-4")


@pytest.fixture(scope="module")
def of_xl():
    return memory.outline("stable-diffusion-xl")


@pytest.fixture(scope="module")
def middle_model(once):
    def make(folder: Path) -> None:
        torch.manual_seed(0)
        write_pipeline(build_pipeline(MIDDLE, random_model.byte_tokenizer, "epsilon"), folder)

    return once("middle", make)


@pytest.fixture(autouse=True)
def _forgets():
    yield
    limits._cheaper.clear()
    limits._cheaper_for_host.clear()


def on_gpu(plugin: str | None = None, placement: str = "cuda", **more) -> Setup:
    strategy = plugin and Strategy(plugin, placement, "bf16", float(placement != "cuda"))
    return Setup(strategy, **{"dtype": BF16, "batch": 16, "card": CARD} | more)


# GiB that torch had allocated on a GPU at most, from benchmarks/h100.json.
ON_H100 = [
    (on_gpu(dtype=FP32, encodes=FP32), 38.40),
    (on_gpu(dtype=FP32, encodes=FP32, batch=8), 24.20),
    (on_gpu(), 25.49),
    (on_gpu("torch_ddp"), 28.69),
    (on_gpu("torch_ddp", ranks=2), 28.69),
    (on_gpu("low_level_zero"), 25.49),
    (on_gpu("low_level_zero", ranks=2), 20.69),
    (on_gpu("low_level_zero", ranks=2, batch=8), 13.61),
    (on_gpu("low_level_zero", ranks=2, recomputes=True), 10.09),
    (on_gpu("low_level_zero", "cpu", ranks=2), 11.47),
    (on_gpu("gemini", ranks=2), 16.87),
    (on_gpu("gemini", ranks=2, recomputes=True), 10.67),
    (on_gpu("gemini", "auto", ranks=2), 11.62),
    (on_gpu("gemini", "cpu", ranks=2), 10.11),
]
# From benchmarks/h200.json, where activations are as they are now.
ON_H200 = [
    (on_gpu(batch=8), 18.42),
    (on_gpu("torch_ddp", batch=8), 21.62),
    (on_gpu("low_level_zero", batch=8), 18.41),
    (on_gpu("gemini", recomputes=True), 15.33),
]
# From benchmarks/four_h200_batch16.json and four_h100_batch8.json: what torch had reserved with graphs, which is more
# than is allocated, and what it had allocated under Gemini, which has none.
ON_FOUR = [
    (on_gpu(dtype=FP32, encodes=FP32), 38.4),
    (on_gpu(records=True), 26.9),
    *((on_gpu("torch_ddp", records=True, ranks=ranks), 26.9) for ranks in (1, 2, 4)),
    (on_gpu("low_level_zero", records=True), 26.3),
    (on_gpu("low_level_zero", records=True, ranks=2), 21.5),
    (on_gpu("low_level_zero", records=True, ranks=4), 19.1),
    (on_gpu("gemini"), 21.5),
    (on_gpu("gemini", ranks=2), 16.9),
    (on_gpu("gemini", ranks=4), 14.2),
    (on_gpu(records=True, batch=8), 20.7),
    *((on_gpu("torch_ddp", records=True, ranks=ranks, batch=8), 20.8) for ranks in (1, 2, 4)),
    (on_gpu("low_level_zero", records=True, batch=8), 20.1),
    (on_gpu("low_level_zero", records=True, ranks=2, batch=8), 15.3),
    (on_gpu("low_level_zero", records=True, ranks=4, batch=8), 12.9),
    (on_gpu("gemini", batch=8), 16.6),
    (on_gpu("gemini", batch=8, ranks=2), 12.0),
    (on_gpu("gemini", batch=8, ranks=4), 9.4),
]
# Batch 1 with prior preservation on an H100: allocated, reserved of graphs, and of AdamW in 8 bits the card's use by
# nvidia-smi less CONTEXT, in which is what torch reserves without need.
OTHERS = [
    (on_gpu("torch_ddp", batch=1, examples=2), 16.9),
    (on_gpu("torch_ddp", batch=1, examples=2, records=True), 16.7),
    (on_gpu("torch_ddp", batch=1, examples=2, recomputes=True, use_8bit_adam=True), 11.2),
]
# Stable Diffusion XL at 1024 px, batch 1, on H200 and H100: allocated, and reserved of graphs.
ADAPTERS = {"lora": LoraFlags(lora_rank=16), "recomputes": True, "batch": 1}
OF_XL = [
    (on_gpu("torch_ddp", batch=1, records=True), 49.2),
    (on_gpu("torch_ddp", batch=1, recomputes=True, records=True), 44.4),
    (on_gpu("torch_ddp", batch=1, recomputes=True), 44.31),
    (on_gpu("torch_ddp", batch=1, recomputes=True, use_8bit_adam=True), 29.66),
    (on_gpu("torch_ddp", **ADAPTERS), 5.87),
    (on_gpu("torch_ddp", **ADAPTERS, records=True), 6.28),
    (on_gpu("torch_ddp", **ADAPTERS, examples=2, records=True), 6.95),
    (on_gpu("low_level_zero", batch=1, recomputes=True), 38.68),
    (on_gpu("low_level_zero", batch=1, recomputes=True, ranks=2), 24.33),
    *(
        (on_gpu("low_level_zero", batch=1, recomputes=True, records=True, ranks=ranks), measured)
        for ranks, measured in ((1, 40.0), (2, 25.7), (4, 18.5))
    ),
    (on_gpu("torch_ddp", batch=1, recomputes=True, records=True, use_8bit_adam=True), 30.56),
    (on_gpu("gemini", batch=1, recomputes=True), 35.68),
    (on_gpu("gemini", batch=1, recomputes=True, ranks=2), 21.33),
    (on_gpu("gemini", batch=1, recomputes=True, ranks=4), 13.7),
    (on_gpu("low_level_zero", "cpu", batch=1), 10.23),
    (on_gpu("low_level_zero", "cpu", batch=1, recomputes=True, ranks=2), 9.94),
    (on_gpu("gemini", "cpu", batch=1), 4.27),
    (on_gpu("low_level_zero", "cpu", batch=1), 10.55),
    (on_gpu("low_level_zero", "cpu", batch=1, recomputes=True, ranks=2), 10.26),
    (on_gpu("gemini", "cpu", batch=1), 4.60),
]
ONE_MORE_COPY = (on_gpu("torch_ddp", ranks=2, batch=8), 24.82)  # of the gradients, in this run and some others


def name(value) -> str:
    if isinstance(value, Setup):
        return f"{value.flags()} {value.ranks}x{value.batch}x{value.examples}"
    return str(value)


@pytest.mark.parametrize(("setup", "measured"), [*ON_H100, *ON_H200, *ON_FOUR, *OTHERS], ids=name)
def test_it_is_what_was_measured_on_gpus(setup, measured, of_1_4):
    found = (estimate_of(of_1_4, setup).card.bytes - CONTEXT) / GIB
    print(f"{name(setup)}: {found:.2f} of {measured:.2f} GiB, {found / measured - 1:+.1%}")
    assert found == pytest.approx(measured, rel=0.01 if (setup, measured) in ON_H100 else 0.1)


@pytest.mark.parametrize(("setup", "measured"), OF_XL, ids=name)
def test_it_is_what_was_measured_of_xl(setup, measured, of_xl):
    found = (estimate_of(of_xl, setup).card.bytes - CONTEXT) / GIB
    print(f"{name(setup)}: {found:.2f} of {measured:.2f} GiB, {found / measured - 1:+.1%}")
    assert found == pytest.approx(measured, rel=0.1)


def test_one_measured_run_held_the_gradients_once_more(of_1_4):
    setup, measured = ONE_MORE_COPY
    found = estimate_of(of_1_4, setup).card.bytes - CONTEXT
    assert (found + 4 * of_1_4.size("unet")) / GIB == pytest.approx(measured, rel=0.01)


# The largest resident set of a process, in GiB: what is offloaded is most of it. Steps did not go in pieces then, and
# had gradients in fp32 in host memory.
@pytest.mark.parametrize(
    ("setup", "measured"),
    [
        (on_gpu("gemini", "auto", ranks=2), 10.5),
        (on_gpu("gemini", "cpu", ranks=2), 11.23),
        (on_gpu("low_level_zero", "cpu", ranks=2), 9.3),
        (on_gpu("low_level_zero", "cpu"), 16.09),
        (on_gpu("gemini", "cpu"), 18.53),
    ],
    ids=name,
)
def test_host_memory_is_what_was_measured_beside_gpus(setup, measured, of_1_4):
    of_gradients = 4 * of_1_4.size("unet") // setup.ranks
    assert (estimate_of(of_1_4, setup).host.bytes + of_gradients) / GIB == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("plugin", ["low_level_zero", "gemini"])
def test_what_is_on_a_disk_is_in_no_memory(plugin, of_xl):
    """12 bytes of each weight: 28.7 GiB."""
    setup = on_gpu(plugin, "cpu", batch=1)
    on_disk = replace(setup, strategy=replace(setup.strategy, offload_dir="FOLDER"))
    in_memory, moved = estimate_of(of_xl, setup), estimate_of(of_xl, on_disk)
    assert moved.disk == 12 * of_xl.size("unet") and in_memory.disk == 0 and moved.card == in_memory.card
    assert moved.host.bytes < in_memory.host.bytes - 20 * GIB and "--offload_dir FOLDER" in on_disk.flags()
    remember(setup.strategy)
    told = refuse(setup, of_xl, Machine(card=24 * GIB, host=20 * GIB, gpus=1))
    assert f"use --plugin {plugin} --placement cpu --offload_dir FOLDER" in told


def test_terms_add_up_by_hand(of_1_4):
    """W = 859.5 M: 4 + 8 + 4 bytes of each, 2 of its copy in half precision, and what the passes hold."""
    w = 859_520_964
    found = estimate_of(of_1_4, on_gpu("torch_ddp", batch=8))
    terms = {term.what: term.bytes for term in found.card.terms}
    assert terms["of fp32 weights"] == terms["of gradients in DDP's buckets"] == 4 * w
    assert terms["of AdamW's moments"] == 8 * w and terms["of their copies in half precision"] == 2 * w
    assert found.card.bytes == sum(terms.values()) and "while gradients are computed" in str(found.card)
    assert found.host.bytes == LIBRARIES_WITH_GPU


def test_activations_are_counted_until_they_go():
    first, last = (torch.nn.Linear(8, 8, bias=False, device="meta") for _ in range(2))
    x = torch.empty(4, 8, device="meta")
    weights = [first.weight, last.weight]
    passes = trace(lambda: last(torch.relu(first(x))), weights)
    # Of 4 x 8 numbers there are the three results, the sum's gradient, and that of the hidden layer at most; and for a
    # moment the gradient of a weight.
    assert passes.peak().activations <= 4 * (5 * 32 + 64 + 2) and passes.peak().activations >= 4 * (3 * 32 + 64)
    assert passes.moments[-1].gradients == 128 and all(one.grad is None for one in weights)
    assert passes.peak(lambda weights: 10**6 * weights).gradients == 128


def test_activations_grow_with_images_and_shrink_by_what_spares_them(of_1_4):
    def held(**how) -> int:
        return of_1_4.passes(False, WHOLE, BF16, **how).peak().activations

    plain, discarding, recomputing = held(), held(discards=True), held(recomputes=True)
    # By a count on a CPU, at the same size: 13.9 GiB of 16 images are kept, and made again 3.8 + 1.0 of them.
    assert 16 * plain / GIB == pytest.approx(13.9, rel=0.03)
    assert 16 * (plain - discarding) / GIB == pytest.approx(4.8, abs=0.5)
    assert recomputing < plain / 3
    assert of_1_4.passes(False, WHOLE, FP32).peak().activations == pytest.approx(2 * plain, rel=0.01)


@pytest.mark.parametrize("shape", random_model.SHAPES)
@pytest.mark.parametrize("text_encoders", [False, True])
def test_any_model_is_traced_and_takes_less_than_the_quick_bound(shape, text_encoders):
    """Large ones, which take long, in half precision only, where they come closer to the bound.

    And without what spares memory, which takes less: small ones show that it is traced, at the same kinds of layers.
    """
    model = memory.outline(shape)
    is_large = model.size("unet") > 10**8
    spares_memory = [] if is_large else [{"recomputes": True}, {"discards": True}]
    ways = {BF16: [{}, *spares_memory]} | ({} if is_large else {FP32: [{}]})
    assert 0 < model.encoding(2, FP32) < model.encoding_at_most(2, FP32)
    for dtype in ways:
        most = model.passes_at_most(text_encoders, WHOLE, dtype).peak().activations
        for how in ways[dtype]:
            passes = model.passes(text_encoders, WHOLE, dtype, **how)
            assert 0 < passes.peak().activations < most
            assert passes.moments[-1].gradients == model.weights(text_encoders, WHOLE)[0]


def test_the_outline_is_that_of_the_files(tiny_model, xl_model):
    for folder, shape in ((tiny_model, "tiny"), (xl_model, "tiny-xl")):
        found, wanted = outline_of(folder, 32), memory.outline(shape)
        assert found.family is wanted.family and found.size("unet", "vae") == wanted.size("unet", "vae")


# Runs on the CPU, many of which compute slowly in bf16. The second step has all that there is to hold, but DDP, which
# lays out its buckets again in it. What goes with weights is most of it, 1.2 to 1.5 GiB, whatever the size of images:
# of 256 px activations are 0.1.
CPU_RUNS = [
    (TRADITIONAL, {}),
    (TRADITIONAL, {"mixed_precision": "bf16", "train_batch_size": 1, "resolution": 64}),
    (COLOSSALAI, {"gradient_checkpointing": True, "max_train_steps": 3, "resolution": 128}),
]


def most_held(process: subprocess.Popen) -> int:
    """Returns the most bytes of its own that a process had, looked at all the time.

    By a number that the kernel keeps: to add up smaps_rollup, which tells nearly the same, took longer than the run.
    """
    most = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        most = max(most, *(1024 * int(size) for size in re.findall(r"RssAnon:\s+(\d+)", status)), 0)
        time.sleep(0.01)
    return most


@pytest.mark.parametrize(("script", "more"), CPU_RUNS, ids=str)
def test_host_memory_of_a_run_on_the_cpu(script, more, middle_model, photos, tmp_path):
    """Within a tenth, where malloc gives back what is freed; by its own settings it keeps a fifth of all besides."""
    flags = {
        "pretrained_model_name_or_path": middle_model,
        "instance_data_dir": photos,
        "instance_prompt": "a dog",
        "resolution": 256,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "output_dir": tmp_path / "out",
    }
    flags |= more
    command = [sys.executable, script, *map(str, command_line(flags))]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        held = most_held(process)
    assert process.returncode == 0
    precision = more.get("mixed_precision", "no")
    strategy = Strategy("torch_ddp", "cuda", precision) if script == COLOSSALAI else None
    setup = Setup(strategy, DTYPES[precision], flags["train_batch_size"], recomputes="gradient_checkpointing" in more)
    assert estimate_of(outline_of(middle_model, flags["resolution"]), setup).host.bytes == pytest.approx(held, rel=0.1)


def test_a_dry_run_says_what_its_two_figures_of_the_host_count(photos, tiny_model, tmp_path):
    """On the CPU: less the libraries' files, what was held is what was estimated, to what malloc keeps."""
    flags = {"pretrained_model_name_or_path": tiny_model, "instance_data_dir": photos, "instance_prompt": "a dog"}
    flags |= {"resolution": 32, "max_train_steps": 2, "output_dir": tmp_path / "out", "dry_run": True}
    done = run([sys.executable, TRADITIONAL, *command_line(flags)], env={"CUDA_VISIBLE_DEVICES": ""})
    estimated = float(re.search(r"host, this run: (\S+) GiB", done.stdout)[1])
    held, files = map(
        float, re.search(r"memory: (\S+) GiB of host .*, (\S+) GiB of it mapped files", done.stdout).groups()
    )
    assert files > 0 and held - files == pytest.approx(estimated, abs=0.2)


def remember(strategy: Strategy | None, *, train_text_encoder: bool = False, **training) -> None:
    model = ModelFlags(pretrained_model_name_or_path="x", train_text_encoder=train_text_encoder)
    limits.remember_cheaper_flags(Flags(model=model, training=TrainingFlags(**training)), strategy)


def refuse(setup: Setup, model, machine: Machine) -> str:
    remember(setup.strategy, train_batch_size=setup.batch, gradient_checkpointing=setup.recomputes)
    assert machine.verdict(estimate_of(model, setup)) not in (FITS, PERHAPS)
    return refusal(setup, model, machine)


@pytest.mark.parametrize(
    ("setup", "gib", "wanted"),
    [
        (on_gpu("torch_ddp", batch=4), 16, "use --plugin torch_ddp --use_8bit_adam, which"),
        (on_gpu("torch_ddp"), 24, "use --plugin torch_ddp --gradient_checkpointing, which"),
        (on_gpu("low_level_zero", recomputes=True, batch=1), 8, "use --plugin low_level_zero --placement cpu"),
        (on_gpu(), 20, "use --gradient_checkpointing, which takes about 1"),
        (on_gpu(), 4, "or train_dreambooth_colossalai.py"),
        (on_gpu("gemini", "cpu", batch=64), 7, "--train_batch_size 1 with more --gradient_accumulation_steps"),
    ],
    ids=name,
)
def test_a_refusal_names_the_cheapest_that_fits(setup, gib, wanted, of_1_4):
    setup = replace(setup, card=gib * GIB)
    told = refuse(setup, of_1_4, Machine(card=gib * GIB, host=64 * GIB, gpus=1))
    assert wanted in told and "\n" not in told, told


@pytest.mark.parametrize(
    "words",
    [
        "--plugin torch_ddp --use_8bit_adam",
        "--plugin torch_ddp --mixed_precision no",
        "--plugin torch_ddp --compile --mixed_precision bf16",
        "--plugin low_level_zero --cuda_graphs on --gradient_checkpointing",
        "--plugin gemini --offload_optim_frac 0.5",
    ],
)
def test_what_is_proposed_is_not_refused(words, monkeypatch, tmp_path):
    """Whoever adds to a command what is proposed, and takes away what it says, has that very run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    typed = ["--pretrained_model_name_or_path", "m", "--instance_data_dir", str(tmp_path), "--instance_prompt", "a"]
    typed += words.split()
    flags = parse(ColossalAIFlags, typed, "")
    strategy, training = choose_strategy(flags), flags.training
    limits.remember_cheaper_flags(flags, strategy)
    own = Setup(
        strategy,
        DTYPES[strategy.precision],
        batch=training.train_batch_size,
        card=CARD,
        recomputes=training.gradient_checkpointing,
        use_8bit_adam=flags.optimizer.use_8bit_adam,
        records=training.cuda_graphs == "on",
        compiles=training.compile,
    )
    for other in [*lighter(own, Machine(card=CARD, gpus=2)), *strategies(own)]:
        proposed = other.flags(own).replace("FOLDER", str(tmp_path)).replace(" on 2 GPUs", "")
        proposed = proposed.replace(" with more --gradient_accumulation_steps", "")
        left = [*typed, ""]
        for gone in re.findall(r"no (--\w+)", proposed):
            has_value = not left[left.index(gone) + 1].startswith("--")
            del left[left.index(gone) : left.index(gone) + 1 + has_value]
        again = parse(ColossalAIFlags, [*filter(None, left), *re.sub(r"no --\w+( on)?", "", proposed).split()], "")
        assert choose_strategy(again) == replace(
            other.strategy, offload_dir=other.strategy.offload_dir and str(tmp_path)
        ), proposed
        assert again.optimizer.use_8bit_adam == other.use_8bit_adam and again.training.compile == other.compiles
        assert (again.training.cuda_graphs == "on") == other.records


def test_adapters_are_the_last_resort(of_xl):
    """Where nothing trains the whole UNet: they are another result, which is said."""
    setup = on_gpu(batch=1, card=13 * GIB)
    told = refuse(setup, of_xl, Machine(card=13 * GIB, host=64 * GIB, gpus=1))
    assert "use --lora_rank 16, which trains adapters alone, about 11.0 GiB" in told, told
    assert told.endswith(", or train_dreambooth_colossalai.py, which can keep more in host memory")
    whole = replace(setup, strategy=Strategy("torch_ddp", "cuda", "bf16", 0.0))
    assert "--lora_rank" not in refuse(whole, of_xl, Machine(card=13 * GIB, host=64 * GIB, gpus=1))


@pytest.mark.parametrize("text_encoders", [False, True])
def test_adapters_leave_what_is_frozen_in_half_precision(text_encoders, of_1_4):
    """Without gradients and optimizer state; the fewer, the smaller the rank, and activations as they are."""
    setup = on_gpu("torch_ddp", batch=1, text_encoders=text_encoders, lora=RANK_16)
    terms = {term.what: term.bytes for term in estimate_of(of_1_4, setup).card.terms}
    trained = of_1_4.size(*of_1_4.trained(text_encoders))
    weights, of_convolutions = of_1_4.weights(text_encoders, RANK_16)
    assert terms["of frozen weights"] == 2 * trained and weights < trained / 100 and not of_convolutions
    assert terms["of AdamW's moments"] == 8 * weights == 2 * terms["of fp32 weights"]
    assert of_1_4.weights(text_encoders, LoraFlags(lora_rank=8))[0] == weights / 2
    whole = replace(setup, lora=WHOLE)
    assert estimate_of(of_1_4, setup).card.bytes < estimate_of(of_1_4, whole).card.bytes / 3
    assert "gemini" not in " ".join(one.flags() for one in strategies(setup))


def test_several_gpus_are_proposed_where_there_are_some(of_xl):
    setup = on_gpu("torch_ddp", batch=1, card=40 * GIB)
    told = refuse(setup, of_xl, Machine(card=40 * GIB, gpus=4))
    assert "use --plugin torch_ddp --use_8bit_adam, which" in told
    setup = replace(setup, card=24 * GIB)
    assert "--plugin low_level_zero on 4 GPUs" in refuse(setup, of_xl, Machine(card=24 * GIB, gpus=4))


def test_too_little_host_memory_is_told_too(of_xl):
    setup = on_gpu("low_level_zero", "cpu", batch=1)
    told = refuse(setup, of_xl, Machine(card=CARD, host=24 * GIB, gpus=1))
    assert "24.0 GiB of the host" in told and "--offload_dir FOLDER, which" in told, told
    assert (
        Machine(card=CARD, host=45 * GIB, processes=2).verdict(estimate_of(of_xl, setup)) == "too little host memory"
    )


def test_what_would_fit_is_looked_for_in_the_order_that_errors_of_memory_tell(of_1_4):
    setup = on_gpu("torch_ddp", text_encoders=True, records=True)
    remember(setup.strategy, train_text_encoder=True, train_batch_size=16, cuda_graphs="on")
    signs = {
        limits.NO_GRAPHS: "no --cuda_graphs on",
        limits.CHECKPOINTING: "--gradient_checkpointing",
        limits.SMALLER_BATCH: "--train_batch_size 1",
        limits.EIGHT_BIT: "--use_8bit_adam",
        limits.SPLIT: "on 2 GPUs",
        limits.HOST: "--placement cpu",
        limits.NO_TEXT_ENCODER: "no --train_text_encoder",
    }
    told = limits.cheaper_flags()
    assert told == [*signs, limits.LOWER_RESOLUTION, limits.LORA]
    seen = [one.flags(setup) for one in lighter(setup, Machine(card=CARD, gpus=2))]
    first = [next(number for number, flags in enumerate(seen) if sign in flags) for sign in signs.values()]
    assert first == sorted(first) and len(set(first)) == len(first)


def test_it_is_told_what_was_held_when_memory_ran_out():
    """And not what is left of it when the error is told."""
    torchs = (
        "CUDA out of memory. Tried to allocate 80.00 MiB. GPU 0 has a total capacity of 11.76 GiB of which 31.25 MiB "
        "is free. Including non-PyTorch memory, this process has 11.72 GiB memory in use. Of the allocated memory "
        "10.51 GiB is allocated by PyTorch, and 212.40 MiB is reserved by PyTorch but unallocated. If reserved but"
    )
    told = limits.explain(torch.OutOfMemoryError(torchs))
    what = "of 11.76 GiB this process held 10.51 GiB in tensors, 31.25 MiB were free, and 80.00 MiB more"
    assert told == f"out of GPU memory while setting up the run: {what} were asked for"


@pytest.mark.parametrize("of", ["CUDA", "CUDA error:", "CUDA driver error:", "Triton Error [CUDA]:"])
def test_whoever_says_it_a_gpu_without_memory_is_told(of):
    """torch, and Triton where it loads a kernel."""
    assert limits.explain(RuntimeError(f"{of} out of memory")).startswith("out of GPU memory while")


def test_a_run_that_would_have_fitted_is_not_refused(of_1_4):
    """Each on a card of just what it was measured to take."""
    for setup, measured in [*ON_H100, *ON_H200, *ON_FOUR, *OTHERS, ONE_MORE_COPY]:
        card = int(measured * GIB) + CONTEXT
        assert Machine(card=card).verdict(estimate_of(of_1_4, setup)) in (FITS, PERHAPS)


def test_what_cannot_be_told_is_no_reason_to_refuse(of_1_4, tmp_path):
    assert Machine().verdict(estimate_of(of_1_4, on_gpu())) == FITS
    assert _host_memory(tmp_path) == (None, None)


def test_the_host_s_memory_is_that_of_its_control_group(tmp_path):
    (tmp_path / "proc").mkdir()
    kib = {"MemTotal": 100, "MemAvailable": 60, "SwapTotal": 20, "SwapFree": 10}
    (tmp_path / "proc" / "meminfo").write_text("".join(f"{name}:  {size} kB\n" for name, size in kib.items()))
    assert _host_memory(tmp_path) == (120 * 1024, 70 * 1024)
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    for file, text in (("memory.max", "max"), ("memory.current", "30000"), ("memory.stat", "inactive_file 10000\n")):
        (group / file).write_text(text)
    assert _host_memory(tmp_path) == (120 * 1024, 70 * 1024)
    (group / "memory.max").write_text("50000\n")
    assert _host_memory(tmp_path) == (50000, 30000)


def test_this_machine_says_what_it_has():
    machine = this_machine(torch.device("cpu"))
    assert machine.card is None and machine.host > GIB and 0 < machine.host_free <= machine.host


SMALL = (
    "from unittest import mock\n"
    "from dreambooth.run import memory\n"
    "mock.patch.object(memory, '_host_memory', lambda root: (2**20 * {there}, 2**20 * {free})).start()\n"
)


@pytest.mark.parametrize("script", [COLOSSALAI, TRADITIONAL])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_run_that_does_not_fit_ends_before_class_images(script, dry_run, flags, tmp_path):
    run = flags | {"with_prior_preservation": True, "class_prompt": "a dog", "class_data_dir": tmp_path / "class"}
    run |= {"dry_run": dry_run}
    done = Running(script, command_line(run), nproc=2, before=SMALL.format(there=1, free=1)).wait(check=False)
    assert done.returncode == 2 and len(done.error_lines) == 1, done.stderr
    assert "GiB of host memory" in done.error_lines[0] and "a lower --resolution" in done.error_lines[0]
    assert not (tmp_path / "class").exists() and "Traceback" not in done.stderr
    assert ("* " in done.stdout) == dry_run


def test_where_it_is_close_a_run_goes_on_with_a_warning(flags):
    done = Running(COLOSSALAI, command_line(flags), before=SMALL.format(there=2**20, free=1)).wait()
    assert "other programs may have left too little memory" in done.stderr
    done = train(COLOSSALAI, flags | {"output_dir": flags["output_dir"].with_name("other")})
    assert "memory" not in done.stderr


def test_what_a_library_cannot_do_without_memory_keeps_no_run_from_training(flags):
    before = SMALL.format(there=1, free=1) + (
        "from dreambooth.model import outline\n"
        "mock.patch.object(outline, 'trace', side_effect=NotImplementedError('no such kernel')).start()\n"
    )
    done = Running(TRADITIONAL, command_line(flags), before=before).wait()
    assert "warning: memory is not estimated: no such kernel" in done.stderr


@pytest.mark.parametrize("script", [COLOSSALAI, TRADITIONAL])
def test_a_dry_run_tells_every_strategy(script, flags):
    done = train(script, flags | {"dry_run": True})
    lines = done.stdout.splitlines()
    own = [line for line in lines if line.startswith("* ")]
    assert len(own) == 1 and "on the CPU" in own[0] and own[0].endswith("fits")
    others = [line for line in lines if line.startswith("  ") and line.endswith(" GB")]
    assert len(others) == (13 if script == COLOSSALAI else 3)
    assert len({len(line.rsplit("  ", 1)[0]) for line in [*own, *others]}) == 1, "aligned"
    assert any(line.startswith("host, this run: ") for line in lines) and lines[-1] == "nothing was written"


def test_every_strategy_is_told_once(of_1_4):
    found = [setup.flags() for setup in strategies(on_gpu("torch_ddp"))]
    assert len(found) == len(set(found)) == 13 and found[0] == "--plugin torch_ddp"


def test_readme_has_what_is_estimated():
    """To a rounding: what a pass holds differs by some MiB between releases of the libraries."""
    number = re.compile(r"\d+\.\d")
    section = (ROOT / "README.md").read_text().partition("### Memory\n")[2].partition("\n## ")[0]
    found = [line for line in section.splitlines() if line.startswith("|")]
    wanted = [line for line in memory.tables().splitlines() if line]
    assert [number.sub("", line) for line in found] == [number.sub("", line) for line in wanted]
    for line, by_now in zip(found, wanted, strict=True):
        numbers = [[float(one) for one in number.findall(text)] for text in (line, by_now)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.11), by_now


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("script", "more"),
    [
        (TRADITIONAL, {}),
        (TRADITIONAL, {"gradient_checkpointing": True}),
        *((COLOSSALAI, {"plugin": plugin}) for plugin in ("torch_ddp", "low_level_zero", "gemini")),
        *((COLOSSALAI, {"plugin": plugin, "placement": "cpu"}) for plugin in ("low_level_zero", "gemini")),
    ],
    ids=str,
)
def test_it_is_what_a_gpu_shows(script, more, middle_model, photos, tmp_path):
    """What torch reserves: as much as is estimated, or up to a tenth and a quarter of a GiB more, as it rounds up."""
    wrapper = tmp_path / f"watched_{script}"
    wrapper.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"import {Path(script).stem} as trainer\n"
        "import torch\n"
        "trainer.main()\n"
        "print('reserved', torch.cuda.max_memory_reserved())\n"
    )
    flags = {
        "pretrained_model_name_or_path": middle_model,
        "instance_data_dir": photos,
        "instance_prompt": "a dog",
        "resolution": 512,
        "train_batch_size": 16,
        "max_train_steps": 4,
        "mixed_precision": "bf16",
        "cuda_graphs": "off",
        "cache_latents": True,
        "output_dir": tmp_path / "out",
    }
    done = train(wrapper, flags | more, on_gpu=True)
    reserved = int(re.search(r"^reserved (\d+)$", done.stdout, re.MULTILINE)[1])
    strategy = None
    if plugin := more.get("plugin"):
        placement = more.get("placement", "cuda")
        strategy = Strategy(plugin, placement, "bf16", float(placement != "cuda"))
    card = torch.cuda.get_device_properties(0).total_memory
    setup = Setup(strategy, BF16, 16, card=card, recomputes="gradient_checkpointing" in more)
    model = outline_of(middle_model, 512)
    found = estimate(setup, counts_of(model, setup)).card.bytes - CONTEXT
    assert 0.9 * found <= reserved <= 1.1 * found + GIB / 4
