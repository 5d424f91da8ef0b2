"""Every plugin and placement on CUDA GPUs: two of them where the machine has two, else one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from harness import (
    COLOSSALAI,
    ROOT,
    TRADITIONAL,
    children_of,
    command_line,
    scalars,
    start_torchrun,
    train,
    unet_weights,
    wait_for,
)
from safetensors.torch import load_file

from benchmarks.runs import STRATEGIES, strategy_flags

pytestmark = pytest.mark.gpu

NPROC = min(torch.cuda.device_count(), 2)
SHARDING = ("low_level_zero", "gemini")


def each(strategies):
    return pytest.mark.parametrize("strategy", strategies, ids=[strategy.name for strategy in strategies])


def flatten(weights: dict) -> torch.Tensor:
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


def moments(checkpoint, name: str) -> torch.Tensor:
    tensors = load_file(checkpoint / "optimizer.safetensors")
    return flatten({key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")})


@pytest.fixture
def report(record_property):
    """Tells benchmarks/reliability.py how far a resumed run's losses are from those of the uninterrupted one."""

    def tell(fault: str, strategy, resumed: list[float], whole: list[float]) -> None:
        difference = float(np.max(np.abs(np.array(resumed) / np.array(whole) - 1)))
        record_property("on_gpus", json.dumps([fault, strategy.plugin, difference]))

    return tell


@pytest.fixture(scope="module")
def reference_of(once, tiny_model, photos):
    """Returns a function that takes ten steps in fp32 on one process with some flags: losses, norms, weights."""

    def of(flags: dict, model=tiny_model):
        def make(folder):
            run = run_flags(model, photos) | prior_flags(folder) | {"output_dir": folder / "out"}
            train(TRADITIONAL, run | {"train_batch_size": 4} | flags, on_gpu=True)

        return once("-".join(["reference", model.name, *flags]), make) / "out"

    return of


@pytest.fixture(scope="module")
def reference(reference_of):
    return reference_of({})


def run_flags(model, photos) -> dict:
    return {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": photos,
        "instance_prompt": "a photo of sks dog",
        "resolution": 32,
        "train_batch_size": 4 // NPROC,
        "max_train_steps": 10,
        "save_steps": 10,
        "learning_rate": 1e-3,
        "seed": 1,
        "mixed_precision": "no",
    }


def prior_flags(folder) -> dict:
    return {
        "with_prior_preservation": True,
        "class_data_dir": folder / "class_images",
        "class_prompt": "a photo of dog",
        "num_class_images": 6,
    }


@each(STRATEGIES)
def test_ten_steps_agree_with_fp32(strategy, reference, tiny_model, photos, tmp_path):
    """Losses, gradient norms and the way the weights went, to half-precision error; the output is fp32 and loads."""
    flags = run_flags(tiny_model, photos) | strategy_flags(strategy) | {"output_dir": tmp_path / "out"}
    class_images = reference.parent  # the reference's: drawn in fp16, whatever the run's precision
    train(strategy.script, flags | prior_flags(class_images), nproc=NPROC, on_gpu=True)

    assert_agree(tmp_path / "out", reference, tiny_model, tolerance=1e-3 if strategy.precision == "no" else 3e-2)
    weights = unet_weights(tmp_path / "out" / "unet")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    half = torch.cat([(tensor.bfloat16().float() != tensor).flatten() for tensor in weights.values()])
    assert half.float().mean() > 0.9, "these are the master weights, not the half-precision copy"
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert np.isfinite(pipeline("a photo of sks dog", num_inference_steps=2, output_type="np").images).all()


def assert_agree(output_dir, reference, model, *, tolerance: float, in_8_bits: bool = False) -> None:
    """Losses, gradient norms, what AdamW keeps of the gradients, and the way that the weights went.

    A factor in its gradients changes no step of AdamW's, but the mean that it keeps of them; not where it keeps that
    in 8 bits.
    """
    np.testing.assert_allclose(scalars(output_dir, "loss"), scalars(reference, "loss"), rtol=tolerance, err_msg="loss")
    np.testing.assert_allclose(
        scalars(output_dir, "grad_norm"),
        scalars(reference, "grad_norm"),
        rtol=min(5 * tolerance, 0.15),
        err_msg="norm",
    )
    files = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
    for part, file in files.items():
        if not (model / part).is_dir():
            continue
        start, moved, wanted = (
            flatten(load_file(folder / part / f"{file}.safetensors")) for folder in (model, output_dir, reference)
        )
        if not torch.equal(wanted, start):
            assert torch.cosine_similarity(moved - start, wanted - start, dim=0) > 0.9
            np.testing.assert_allclose((moved - start).norm(), (wanted - start).norm(), rtol=0.1)
            if not in_8_bits:
                mean, due = (
                    moments(folder / "checkpoint-10", f"exp_avg.{part}") for folder in (output_dir, reference)
                )
                assert (mean - due).norm() < 0.1 * due.norm()


# At the rate of the others a random text encoder runs away, and takes roundings for a reason to turn.
TEXT_ENCODER = {"train_text_encoder": True, "learning_rate": 2e-4}
# Options that touch the step, and the run in fp32 on one process that has to agree.
OPTIONS = {
    "accumulation": ({"gradient_accumulation_steps": 2, "train_batch_size": 2 // max(NPROC, 1)}, {}),
    "text encoder": (TEXT_ENCODER, TEXT_ENCODER),
    "noise and weights": ({"snr_gamma": 1, "noise_offset": 0.2}, {"snr_gamma": 1, "noise_offset": 0.2}),
    "gradient checkpointing": (TEXT_ENCODER | {"gradient_checkpointing": True}, TEXT_ENCODER),
    "validation": ({"validation_prompt": "a dog", "num_validation_images": 1, "validation_steps": 3}, {}),
}


@pytest.mark.parametrize("option", OPTIONS)
@each([strategy for strategy in STRATEGIES if strategy.precision == "bf16" or strategy.plugin == "torch_ddp_fp16"])
def test_options_agree_with_fp32(option, strategy, reference_of, tiny_model, photos, tmp_path):
    changed, same = OPTIONS[option]
    reference = reference_of(same)
    flags = run_flags(tiny_model, photos) | prior_flags(reference.parent) | {"output_dir": tmp_path / "out"}
    train(strategy.script, flags | strategy_flags(strategy) | changed, nproc=NPROC, on_gpu=True)
    assert_agree(tmp_path / "out", reference, tiny_model, tolerance=3e-2)


def test_gemini_with_half_of_the_optimizer_state_offloaded_agrees_with_fp32(reference, tiny_model, photos, tmp_path):
    flags = run_flags(tiny_model, photos) | prior_flags(reference.parent) | {"mixed_precision": "bf16"}
    flags |= {"plugin": "gemini", "offload_optim_frac": 0.5, "output_dir": tmp_path / "out"}
    train(COLOSSALAI, flags, nproc=NPROC, on_gpu=True)
    assert_agree(tmp_path / "out", reference, tiny_model, tolerance=3e-2)


@pytest.mark.parametrize("plugin", SHARDING)
def test_a_run_with_weights_and_state_on_a_disk_agrees_with_fp32(plugin, reference, tiny_model, photos, tmp_path):
    flags = run_flags(tiny_model, photos) | prior_flags(reference.parent) | {"mixed_precision": "bf16"}
    flags |= {"plugin": plugin, "placement": "cpu", "output_dir": tmp_path / "out", "offload_dir": tmp_path / "disk"}
    (tmp_path / "disk").mkdir()
    train(COLOSSALAI, flags, nproc=NPROC, on_gpu=True)
    assert_agree(tmp_path / "out", reference, tiny_model, tolerance=3e-2)
    assert not list((tmp_path / "disk").iterdir())


def test_gemini_fetches_weights_that_are_too_large_for_auto(reference, tiny_model, photos, tmp_path):
    """The real trainer, told that the GPUs have next to no memory."""
    script = tmp_path / "on_small_gpus.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from unittest import mock\n"
        "from dreambooth.processes.ranks import Ranks\n"
        "from train_dreambooth_colossalai import main\n"
        "with mock.patch.object(Ranks, 'gpu_memory', return_value=1) as asked:\n"
        "    main()\n"
        "asked.assert_called()\n"
    )
    flags = run_flags(tiny_model, photos) | prior_flags(reference.parent) | {"mixed_precision": "bf16"}
    flags |= {"plugin": "gemini", "placement": "auto", "output_dir": tmp_path / "out"}
    train(script, flags, nproc=NPROC, on_gpu=True)
    assert_agree(tmp_path / "out", reference, tiny_model, tolerance=3e-2)


# Strategies of which one rank has not the room for graphs.
RECORDS_ALONE = ("traditional-cuda-bf16", "torch_ddp-cuda-bf16", "low_level_zero-cuda-bf16")
# Plugins and precisions with which compiled runs are looked at.
COMPILED = ("traditional-cuda-no", "traditional-cuda-bf16", "torch_ddp-cuda-bf16", "low_level_zero-cuda-bf16")
COMPILED += ("low_level_zero-cpu-fp16",)
RECORDED = (
    {},
    {"compile": True},
    TEXT_ENCODER,
    {"use_8bit_adam": True},
    {"gradient_checkpointing": True},
    {"train_batch_size": 2 // max(NPROC, 1), "gradient_accumulation_steps": 2},
)


@pytest.mark.parametrize("more", RECORDED, ids=str)
@each([strategy for strategy in STRATEGIES if strategy.plugin != "gemini"])
def test_a_recorded_run_agrees_with_fp32(strategy, more, reference_of, tiny_model, photos, tmp_path):
    if "use_8bit_adam" in more and strategy.plugin in SHARDING:
        pytest.skip("quantizes whole parameters")
    if "compile" in more and strategy.name not in COMPILED:
        pytest.skip("the compiler takes minutes, for what it makes of another plugin's denoiser too")
    same = TEXT_ENCODER if "train_text_encoder" in more else {}
    reference = reference_of(same)
    flags = run_flags(tiny_model, photos) | prior_flags(reference.parent) | strategy_flags(strategy) | more
    flags |= {"cuda_graphs": True, "output_dir": tmp_path / "out"}
    train(strategy.script, flags, nproc=NPROC, on_gpu=True, timeout=900 if "compile" in more else 300)
    tolerance = 1e-3 if strategy.precision == "no" else 3e-2
    assert_agree(tmp_path / "out", reference, tiny_model, tolerance=tolerance, in_8_bits="use_8bit_adam" in more)


@each(STRATEGIES[1:])
def test_stable_diffusion_xl_and_its_text_encoders_agree_with_fp32(strategy, reference_of, xl_model, photos, tmp_path):
    """Recorded wherever that can be: the first text encoder computes a layer that is frozen, as nobody reads it."""
    reference = reference_of(TEXT_ENCODER, xl_model)
    flags = run_flags(xl_model, photos) | prior_flags(reference.parent) | strategy_flags(strategy) | TEXT_ENCODER
    done = train(strategy.script, flags | {"output_dir": tmp_path / "out"}, nproc=NPROC, on_gpu=True)
    assert "CUDA graphs: none" not in done.stdout
    assert_agree(tmp_path / "out", reference, xl_model, tolerance=1e-3 if strategy.precision == "no" else 3e-2)


@pytest.mark.parametrize("ranks", ["all", "1"])
@each([strategy for strategy in STRATEGIES if strategy.plugin != "gemini"])
def test_without_room_for_graphs_a_run_goes_on(strategy, ranks, reference, tiny_model, photos, tmp_path):
    """And says so, also where one GPU alone has not the room."""
    if ranks == "1" and (NPROC < 2 or strategy.name not in RECORDS_ALONE):
        pytest.skip("needs two CUDA GPUs, and is looked at where ranks share what they record, or do not")
    script = tmp_path / f"in_little_room_{strategy.script}"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"import os, {Path(strategy.script).stem} as trainer\n"
        "from dreambooth.engine import booster_training\n"
        f"if {ranks!r} in ('all', os.environ.get('RANK', '0')):\n"
        "    trainer.state_bytes = booster_training.state_bytes = lambda *_: 10**15\n"
        "trainer.run_program(trainer.main, 'trainer')\n"
    )
    flags = run_flags(tiny_model, photos) | prior_flags(reference.parent) | strategy_flags(strategy)
    done = train(script, flags | {"output_dir": tmp_path / "out"}, nproc=NPROC, on_gpu=True)
    assert ("CUDA graphs: none" in done.stdout + done.stderr) == (strategy.placement == "cuda")
    tolerance = 1e-3 if strategy.precision == "no" else 3e-2
    assert_agree(tmp_path / "out", reference, tiny_model, tolerance=tolerance)
    if strategy.placement == "cuda":
        insisting = flags | {"cuda_graphs": "on", "output_dir": tmp_path / "none"}
        done = train(script, insisting, nproc=NPROC, on_gpu=True, check=False)
        assert done.returncode != 0 and any("out of GPU memory" in line for line in done.error_lines)


@pytest.mark.parametrize("flag", ["compile", "cuda_graphs"])
def test_what_gemini_cannot_have_is_refused(flag, flags):
    done = train(COLOSSALAI, flags | {"plugin": "gemini", flag: True}, on_gpu=True, check=False)
    assert done.returncode == 2 and f"--{flag} cannot see what" in done.error_lines[0]


@pytest.mark.parametrize("cuda_graphs", ["off", "on"])
@pytest.mark.parametrize(
    "script, more",
    [(TRADITIONAL, {}), (COLOSSALAI, {"plugin": "torch_ddp"}), (COLOSSALAI, {"plugin": "low_level_zero"})],
)
def test_adapters_take_the_steps_of_fp32(script, more, cuda_graphs, flags, tmp_path):
    """Beside weights in bf16; those of all kinds of layers, of text encoders too."""
    flags |= {"lora_rank": 4, "lora_target_modules": "all", "train_text_encoder": True, "max_train_steps": 6}
    flags |= {"learning_rate": 1e-3}
    exact = {"mixed_precision": "no", "cuda_graphs": "off", "output_dir": tmp_path / "fp32"}
    train(TRADITIONAL, flags | exact, nproc=NPROC, on_gpu=True)
    train(script, flags | more | {"mixed_precision": "bf16", "cuda_graphs": cuda_graphs}, nproc=NPROC, on_gpu=True)
    for name in ("loss", "grad_norm"):
        found, wanted = (scalars(folder, name) for folder in (flags["output_dir"], tmp_path / "fp32"))
        np.testing.assert_allclose(found, wanted, rtol=3e-2)


def test_tf32_rounds_the_matrix_products_of_fp32(flags, tmp_path):
    flags |= {"mixed_precision": "no", "max_train_steps": 2}
    for name, allowed in (("fp32", False), ("tf32", True)):
        train(COLOSSALAI, flags | {"allow_tf32": allowed, "output_dir": tmp_path / name}, on_gpu=True)
    fp32, tf32 = (scalars(tmp_path / name, "loss") for name in ("fp32", "tf32"))
    assert fp32 != tf32
    np.testing.assert_allclose(tf32, fp32, rtol=1e-2)


def test_8_bit_adam_is_close_to_fp32_and_resumes(flags, tmp_path):
    flags |= {"max_train_steps": 6, "save_steps": 3, "mixed_precision": "bf16"}
    train(COLOSSALAI, flags | {"output_dir": tmp_path / "fp32"}, nproc=NPROC, on_gpu=True)
    train(COLOSSALAI, flags | {"use_8bit_adam": True}, nproc=NPROC, on_gpu=True)
    np.testing.assert_allclose(scalars(flags["output_dir"], "loss"), scalars(tmp_path / "fp32", "loss"), rtol=3e-2)
    shutil.copytree(flags["output_dir"] / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    more = {"use_8bit_adam": True, "output_dir": tmp_path / "resumed", "resume_from_checkpoint": "latest"}
    train(COLOSSALAI, flags | more, nproc=NPROC, on_gpu=True)
    whole = scalars(flags["output_dir"], "loss")[3:]
    np.testing.assert_allclose(scalars(tmp_path / "resumed", "loss", first=4), whole, rtol=3e-3)


@each([strategy for strategy in STRATEGIES if strategy.plugin in SHARDING])
def test_8_bit_adam_is_refused_where_parameters_are_split(strategy, flags):
    flags |= strategy_flags(strategy) | {"use_8bit_adam": True}
    done = train(COLOSSALAI, flags, on_gpu=True, check=False)
    assert done.returncode == 2 and "--use_8bit_adam quantizes whole parameters" in done.error_lines[0]


@each(STRATEGIES)
def test_nothing_is_lost_around_training(strategy, flags):
    """At learning rate 0 the fp32 weights come out as they went in, to the bit."""
    flags |= strategy_flags(strategy) | {"learning_rate": 0, "max_train_steps": 2}
    train(strategy.script, flags, nproc=NPROC, on_gpu=True)
    before = unet_weights(flags["pretrained_model_name_or_path"] / "unet")
    after = unet_weights(flags["output_dir"] / "unet")
    assert all(torch.equal(after[name], before[name]) for name in before)


@each(STRATEGIES)
def test_gradients_are_clipped(strategy, flags):
    """As on the CPU: with a large epsilon the first step's length is the clipped norm of the gradients."""
    flags |= strategy_flags(strategy)
    flags |= {"max_train_steps": 1, "adam_epsilon": 1e3, "adam_weight_decay": 0, "learning_rate": 1e3}
    train(strategy.script, flags | {"max_grad_norm": 1e-2}, nproc=NPROC, on_gpu=True)
    before = unet_weights(flags["pretrained_model_name_or_path"] / "unet")
    after = unet_weights(flags["output_dir"] / "unet")
    np.testing.assert_allclose((flatten(after) - flatten(before)).norm(), 1e-2, rtol=2e-2)
    assert scalars(flags["output_dir"], "grad_norm")[0] > 0.1


@each(STRATEGIES)
def test_a_resumed_run_goes_on_as_it_would_have(strategy, flags, report, tmp_path):
    report("stopped at half time", strategy, *resume_at_half_time(strategy, flags, tmp_path / "resumed", nproc=NPROC))


@pytest.mark.skipif(NPROC < 2, reason="needs two CUDA GPUs")
@each([strategy for strategy in STRATEGIES if strategy.plugin in SHARDING and strategy.precision == "bf16"])
def test_a_run_of_two_gpus_goes_on_on_one(strategy, flags, report, tmp_path):
    """With the same total batch: what two ranks hold makes the whole that one holds."""
    report("resumed on one GPU", strategy, *resume_at_half_time(strategy, flags, tmp_path / "resumed", nproc=1))


@pytest.mark.parametrize(
    ("first", "second"),
    [("traditional-cuda-fp16", "low_level_zero-cuda-fp16"), ("gemini-cuda-fp16", "torch_ddp_fp16-cuda-fp16")],
)
def test_in_fp16_another_plugin_goes_on(first, second, flags, tmp_path):
    """With the loss scale of the one before, of which each plugin counts in its own way."""
    by_name = {strategy.name: strategy for strategy in STRATEGIES}
    resume_at_half_time(by_name[first], flags, tmp_path / "resumed", nproc=NPROC, second=by_name[second])


def resume_at_half_time(strategy, flags: dict, resumed, *, nproc: int, second=None) -> tuple[list[float], list[float]]:
    """Repeats the second half of a run of NPROC processes on `nproc`, and returns its losses and those of the first.

    It starts from the exact fp32 state; what differs afterwards is the order in which GPUs add, and the strategy if
    there is a `second`.
    """
    flags |= strategy_flags(strategy) | {"max_train_steps": 4, "save_steps": 2}
    whole = flags["output_dir"]
    train(strategy.script, flags, nproc=NPROC, on_gpu=True)
    weights = flatten(unet_weights(whole / "unet"))
    assert torch.equal(flatten(unet_weights(whole / "checkpoint-4" / "unet")), weights)

    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    flags |= {"train_batch_size": flags["train_batch_size"] * NPROC // nproc}
    flags |= {"output_dir": resumed, "resume_from_checkpoint": "latest"}
    second = second or strategy
    flags = {name: value for name, value in flags.items() if name not in ("plugin", "placement")}
    train(second.script, flags | strategy_flags(second), nproc=nproc, on_gpu=True)
    moved = weights - flatten(unet_weights(whole / "checkpoint-2" / "unet"))
    error = flatten(unet_weights(resumed / "unet")) - weights
    assert error.norm() < 0.1 * moved.norm()
    for moment in ("exp_avg", "exp_avg_sq"):
        here, there = (moments(folder / "checkpoint-4", moment) for folder in (resumed, whole))
        assert (here - there).norm() < 0.1 * there.norm()
    return scalars(resumed, "loss", first=3), scalars(whole, "loss")[2:]


def test_a_signal_to_all_processes_ends_the_step_and_saves(flags):
    """The worker processes that decode images get it too."""
    flags |= {"max_train_steps": 10**5, "cache_latents": "off"}
    command = [sys.executable, COLOSSALAI, *command_line(flags)]
    run = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(children_of(run.pid)) >= 2 and (flags["output_dir"] / "logs").is_dir())
    time.sleep(5)
    os.killpg(run.pid, signal.SIGINT)
    stderr = run.communicate(timeout=60)[1]
    assert run.returncode == 75 and "stopped by SIGINT" in stderr.splitlines()[-1], stderr
    assert len(list(flags["output_dir"].glob("checkpoint-*"))) == 1


@each([one for one in STRATEGIES if one.plugin != "gemini" and one.placement == "cuda" and one.precision == "bf16"])
def test_kernels_are_compiled_before_they_are_wanted(strategy, flags, tmp_path):
    """From an empty cache on: when the model is about to be recorded all are there that the run will launch."""
    counts = f"""
import pathlib, runpy, sys
from dreambooth.model.kernels_ahead import KernelsAhead
wait, cache = KernelsAhead.wait, pathlib.Path({str(tmp_path / "triton")!r})
def counted(ahead):
    wait(ahead)
    print("ahead:", len([file for file in cache.rglob("*") if file.suffix in (".cubin", ".so")]))
KernelsAhead.wait, sys.argv[0] = counted, {strategy.script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", counts, *command_line(flags | strategy_flags(strategy))]
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "triton")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    all_of_them = len([file for file in (tmp_path / "triton").rglob("*") if file.suffix in (".cubin", ".so")])
    assert all_of_them > 15 and f"ahead: {all_of_them}\n" in done.stdout, (done.stdout, all_of_them)


def test_a_photo_damaged_during_the_run_is_one_line(flags, photos, tmp_path):
    """Though a worker process finds it, of images that are not kept in memory."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    more = {"instance_data_dir": folder, "max_train_steps": 10**5, "save_steps": 20, "cache_latents": "off"}
    keeps_none = f"""
import runpy, sys
from dreambooth.data import images
images._scaled.limit, sys.argv[0] = 0, {COLOSSALAI!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", keeps_none, *command_line(flags | more)]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for((flags["output_dir"] / "checkpoint-20").is_dir)
    (folder / "3.png").write_bytes(b"no image")
    stderr = run.communicate(timeout=60)[1]
    assert stderr.count("error: ") == 1 and "cannot read the image" in stderr.splitlines()[-1], stderr


@pytest.mark.skipif(NPROC < 2, reason="needs two CUDA GPUs")
@each([strategy for strategy in STRATEGIES if strategy.plugin in SHARDING and strategy.precision == "bf16"])
def test_a_killed_rank_costs_nothing(strategy, flags, report, tmp_path):
    """The other rank, which waits for it in a collective, ends in time; the run goes on with the same losses."""
    flags |= strategy_flags(strategy) | {"max_train_steps": 20, "save_steps": 5}
    whole, killed = flags["output_dir"], tmp_path / "killed"
    train(strategy.script, flags, nproc=2, on_gpu=True)
    more = flags | {"output_dir": killed, "resume_from_checkpoint": "latest"}
    run = start_torchrun(strategy.script, more, tmp_path / "log")
    wait_for((killed / "checkpoint-10").is_dir, timeout=300)
    os.kill(children_of(run.pid)[1], signal.SIGKILL)
    assert run.wait(timeout=300), "the other rank waits for half an hour"
    train(strategy.script, more, nproc=2, on_gpu=True)
    losses = [scalars(folder, "loss") for folder in (killed, whole)]
    np.testing.assert_allclose(*losses, rtol=2e-3)
    report("one of two processes killed", strategy, *losses)


@pytest.mark.skipif(NPROC < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("script, batch", [(COLOSSALAI, 2), (TRADITIONAL, 2), (COLOSSALAI, 1)])
def test_class_images_are_the_same_on_two_gpus(script, batch, flags, prior, tmp_path):
    """Also in so many batches that the passes of the UNet are recorded."""
    images, prior = {}, prior | {"sample_batch_size": batch}
    for nproc in (1, 2):
        folder = tmp_path / str(nproc)
        run = flags | prior | {"output_dir": folder / "out", "class_data_dir": folder / "class", "max_train_steps": 1}
        train(script, run, nproc=nproc, on_gpu=True)
        images[nproc] = {path.name: path.read_bytes() for path in (folder / "class").iterdir()}
    assert len(set(images[1].values())) == 7
    assert images[1] == images[2]


def test_more_processes_than_gpus_is_one_line(flags):
    """The machine's GPUs are known before any model is loaded."""
    count = torch.cuda.device_count()
    done = train(COLOSSALAI, flags, nproc=count + 1, on_gpu=True, check=False)
    assert done.returncode != 0
    assert len(done.error_lines) == 1
    assert f"{count + 1} processes were started on this machine" in done.error_lines[0]
