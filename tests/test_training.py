"""Whole runs of both trainers on the CPU."""

import re
import shutil
import socket

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from harness import COLOSSALAI, ROOT, TRADITIONAL, Running, command_line, scalars, train, unet_weights

from benchmarks import random_model
from dreambooth.data.images import find_images
from dreambooth.data.latents import cache_latents
from dreambooth.data.samples import build_dataset, collate
from dreambooth.data.schedule import Schedule
from dreambooth.model.components import latent_shape
from dreambooth.model.loss import latents_of
from dreambooth.model.pipeline import load_part
from dreambooth.model.stable_diffusion import STABLE_DIFFUSION
from dreambooth.processes.ranks import Ranks

BOTH = pytest.mark.parametrize("script", [COLOSSALAI, TRADITIONAL])


def assert_weights_close(first: dict, second: dict, learning_rate: float, steps: int) -> None:
    """Same weights to 1e-5, but for elements whose gradient is rounding noise.

    Adam moves every element by about the learning rate, also one whose gradient is 0 but for rounding; the two runs
    may move such an element in different directions, hence no further apart than two learning rates a step.
    """
    assert first.keys() == second.keys()
    difference = torch.cat([(first[name] - second[name]).abs().flatten() for name in first])
    assert difference.max() <= 2 * learning_rate * steps
    assert (difference > 1e-5).float().mean() < 0.01


@BOTH
def test_two_processes_on_real_photos(script, flags, prior, dog_photos):
    flags |= prior | {"instance_data_dir": dog_photos, "max_train_steps": 4, "save_steps": 2}
    done = train(script, flags, nproc=2)
    assert "4 steps of 4 samples (2 ranks x 2)" in done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) == len(set(lines)) == 6, "what is told is told by one rank"

    output_dir = flags["output_dir"]
    pipeline = StableDiffusionPipeline.from_pretrained(output_dir)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a photo of sks dog", num_inference_steps=2).images[0]
    assert image.size == (32, 32)
    before = unet_weights(flags["pretrained_model_name_or_path"] / "unet")
    after = unet_weights(output_dir / "unet")
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in before)
    for step in (2, 4):
        UNet2DConditionModel.from_pretrained(output_dir / f"checkpoint-{step}" / "unet")
    last = unet_weights(output_dir / "checkpoint-4" / "unet")
    assert all(torch.equal(last[name], after[name]) for name in after)
    for name in ("loss", "lr", "images_per_second", "peak_memory_gib", "grad_norm"):
        assert len(scalars(output_dir, name)) == 4
    assert {path.name for path in output_dir.iterdir() if path.name.startswith(".")} == set()


def test_two_machines_are_as_two_processes_of_one(flags, prior, tmp_path):
    """A torchrun each, which know of one another by an address only."""
    flags |= {"max_train_steps": 4}
    train(COLOSSALAI, flags | prior | {"class_data_dir": tmp_path / "class_1"}, nproc=2)
    apart = command_line(flags | prior | {"output_dir": "apart", "save_steps": 4})
    folders = [tmp_path / "one", tmp_path / "other"]  # no file of one machine is where the other looks for its own
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    machines = []
    for number, folder in enumerate(folders):
        folder.mkdir()
        torchrun = [*address, f"--node_rank={number}"]
        machines.append(Running(ROOT / COLOSSALAI, apart, torchrun=torchrun, cwd=folder))
    for machine in machines:
        machine.wait()
    here, there = (sorted(folder.iterdir()) for folder in (tmp_path / "class_1", prior["class_data_dir"]))
    assert [path.read_bytes() for path in here] == [path.read_bytes() for path in there] and len(here) == 7
    written = folders[0] / "apart"
    assert scalars(written, "loss") == scalars(flags["output_dir"], "loss")
    for folder in (written, written / "checkpoint-4"):
        weights, wanted = unet_weights(folder / "unet"), unet_weights(flags["output_dir"] / "unet")
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert not list(folders[1].iterdir())


def test_both_trainers_take_the_same_steps(flags, prior, tmp_path):
    """Point by point: same samples, same noise, same optimizer, same schedule of the learning rate."""
    flags |= prior | {"lr_scheduler": "cosine", "lr_warmup_steps": 3, "mixed_precision": "no"}
    results = {}
    for script in (COLOSSALAI, TRADITIONAL):
        output_dir = tmp_path / script
        train(script, flags | {"output_dir": output_dir})
        results[script] = {name: scalars(output_dir, name) for name in ("loss", "grad_norm", "lr")}
    for name, values in results[COLOSSALAI].items():
        np.testing.assert_allclose(results[TRADITIONAL][name], values, rtol=1e-5, atol=0, err_msg=name)
    lr = results[COLOSSALAI]["lr"]
    np.testing.assert_allclose(lr[:4], [0, 1e-4 / 3, 2e-4 / 3, 1e-4], rtol=1e-5)
    assert lr[-1] < lr[4] < 1e-4


@BOTH
def test_any_number_of_ranks_gives_the_same_run(script, flags, prior, tmp_path):
    results, flags = {}, flags | {"max_train_steps": 5}
    for nproc, batch in ((1, 4), (2, 2), (4, 1)):
        folder = tmp_path / str(nproc)
        run_flags = flags | prior | {"output_dir": folder / "out", "class_data_dir": folder / "class_images"}
        train(script, run_flags | {"train_batch_size": batch, "num_class_images": 5}, nproc=nproc)
        results[nproc] = {
            "loss": scalars(folder / "out", "loss"),
            "grad_norm": scalars(folder / "out", "grad_norm"),
            "class_images": {path.name: path.read_bytes() for path in (folder / "class_images").iterdir()},
            "weights": unet_weights(folder / "out" / "unet"),
        }
    one = results.pop(1)
    assert len(one["class_images"]) == 5
    assert len(set(one["class_images"].values())) == 5, "no two alike"
    assert len(one["loss"]) == 5
    for result in results.values():
        np.testing.assert_allclose(result["loss"], one["loss"], rtol=1e-5)
        np.testing.assert_allclose(result["grad_norm"], one["grad_norm"], rtol=1e-5)
        assert result["class_images"] == one["class_images"]
        assert_weights_close(result["weights"], one["weights"], flags["learning_rate"], steps=5)


@BOTH
def test_steps_per_epoch_count_the_ranks_and_the_larger_set(script, flags, prior):
    """7 class images over 2 ranks of batch 1 are 4 steps; two epochs are 8, and --scale_lr doubles the rate."""
    flags |= prior | {"max_train_steps": None, "num_train_epochs": 2, "train_batch_size": 1, "scale_lr": True}
    train(script, flags, nproc=2)
    np.testing.assert_allclose(scalars(flags["output_dir"], "lr"), [2e-4] * 8)


@BOTH
def test_gradients_are_clipped(script, flags, tmp_path):
    """With a large epsilon AdamW's first step is the gradient times a constant, so its length shows the clip."""
    flags |= {"max_train_steps": 1, "adam_epsilon": 1e3, "adam_weight_decay": 0, "learning_rate": 1e3}
    before = unet_weights(flags["pretrained_model_name_or_path"] / "unet")
    for max_norm in (1e-2, 2e-2):
        output_dir = tmp_path / str(max_norm)
        train(script, flags | {"output_dir": output_dir, "max_grad_norm": max_norm})
        after = unet_weights(output_dir / "unet")
        length = torch.cat([(after[name] - before[name]).double().flatten() for name in before]).norm()
        assert scalars(output_dir, "grad_norm")[0] > 10 * max_norm, "logged before clipping"
        np.testing.assert_allclose(length, max_norm, rtol=1e-3)


@BOTH
def test_gradients_are_those_of_the_loss_whatever_accelerate_is_told(script, flags, tmp_path):
    """Its variable for accumulation would have it divide a gradient that the trainer has divided already."""
    flags |= {"max_train_steps": 1}
    train(script, flags)
    told = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    train(script, flags | {"output_dir": tmp_path / "told"}, env=told)
    assert scalars(tmp_path / "told", "grad_norm") == scalars(flags["output_dir"], "grad_norm")


@BOTH
def test_v_prediction_is_another_target(script, flags, tmp_path):
    """On the very same weights, a scheduler that says v_prediction gives the loss of another target."""
    model = tmp_path / "v_model"
    random_model.build(model, "tiny", prediction_type="v_prediction")
    losses = []
    for source in (flags["pretrained_model_name_or_path"], model):
        output_dir = tmp_path / f"{source.name}_trained"
        train(
            script, flags | {"max_train_steps": 2, "pretrained_model_name_or_path": source, "output_dir": output_dir}
        )
        losses.append(scalars(output_dir, "loss"))
    assert abs(losses[0][0] - losses[1][0]) > 1e-3
    assert StableDiffusionPipeline.from_pretrained(output_dir).scheduler.config.prediction_type == "v_prediction"


@BOTH
@pytest.mark.parametrize("flag", ["external_unet_path", "externel_unet_path"])
def test_external_unet_is_the_one_that_is_trained(script, flag, flags, tmp_path):
    random_model.build(tmp_path / "other", "tiny", seed=5)
    train(script, flags | {"max_train_steps": 1, "learning_rate": 0, flag: tmp_path / "other" / "unet"})
    other = unet_weights(tmp_path / "other" / "unet")
    after = unet_weights(flags["output_dir"] / "unet")
    assert all(torch.equal(after[name], other[name]) for name in other)


def test_options_that_do_not_change_the_result(flags, prior, tmp_path):
    """Gradient checkpointing to rounding, bf16 within its precision; a drawn seed is printed and can be given back."""
    plain = tmp_path / "plain"
    done = train(COLOSSALAI, flags | prior | {"output_dir": plain, "seed": None})
    seed = re.findall(r", seed (\d+)$", done.stdout, re.MULTILINE)[-1]
    for name, extra, tolerance in (
        ("checkpointed", {"gradient_checkpointing": True}, 1e-5),
        ("bf16", {"mixed_precision": "bf16"}, 2e-2),
    ):
        output_dir = tmp_path / name
        train(COLOSSALAI, flags | prior | extra | {"output_dir": output_dir, "seed": seed})
        np.testing.assert_allclose(scalars(output_dir, "loss"), scalars(plain, "loss"), rtol=tolerance, err_msg=name)


def test_test_run_uses_ten_images_of_each_folder(flags, prior, tmp_path):
    """An epoch of batch 1 has as many steps as the larger set has images."""
    many = tmp_path / "many"
    many.mkdir()
    for number in range(12):
        source = flags["instance_data_dir"] / f"{number % 5}.png"
        (many / f"{number:02d}.png").write_bytes(source.read_bytes())
    flags |= prior | {
        "max_train_steps": None,
        "train_batch_size": 1,
        "num_class_images": 11,
        "instance_data_dir": many,
    }
    for value, steps in (("False", 12), ("true", 10)):
        output_dir, class_images = tmp_path / value, tmp_path / f"class_{value}"
        shutil.copytree(prior["class_data_dir"], class_images)
        train(COLOSSALAI, flags | {"test_run": value, "output_dir": output_dir, "class_data_dir": class_images})
        assert len(scalars(output_dir, "loss")) == steps
        assert len(list(class_images.iterdir())) == min(steps, 11)


@pytest.mark.parametrize(
    "script, cached",
    [
        (COLOSSALAI, "every image"),
        (COLOSSALAI, "every crop"),
        (COLOSSALAI, "some images"),
        (COLOSSALAI, "no image"),
        (TRADITIONAL, "every crop"),
        (TRADITIONAL, "some images"),
    ],
)
def test_the_latent_cache_changes_nothing(cached, script, flags, prior, photos, tmp_path):
    """Losses and gradient norms are the same with and without, whatever part of the images can be in it."""
    flags |= prior | {"center_crop": cached == "every image", "max_train_steps": 5}
    if cached in ("every crop", "no image"):  # photos that are not square as class images too
        flags["class_data_dir"] = shutil.copytree(photos, tmp_path / "others")
        (flags["class_data_dir"] / "2.png").unlink()  # which has one crop
        flags["instance_data_dir"], flags["num_class_images"] = flags["class_data_dir"], 4
        flags["class_data_dir"] = shutil.copytree(flags["instance_data_dir"], tmp_path / "class")
    results = {}
    room = {"some images": 4, "no image": 0}.get(cached, 29)  # crops
    limit = f"import dreambooth.data.latents as latents; latents.CACHE_BYTES = {room * 2 * 4 * 4 * 16 * 16}"
    for cache, nproc in (("off", 1), ("on" if cached == "every crop" else "auto", 2)):
        output_dir = tmp_path / cache
        more = {"cache_latents": cache, "output_dir": output_dir, "train_batch_size": 2 // nproc}
        done = train(script, flags | more, nproc=nproc, before=limit)
        results[cache] = {name: scalars(output_dir, name) for name in ("loss", "grad_norm")}
        told = {"every image": "latents of 12 of 12 ", "every crop": "8 of 8 ", "some images": "2 of 12 "}.get(cached)
        assert ("cached in" in done.stdout) == bool(told and cache != "off")
        assert not told or cache == "off" or f"{told}images cached in " in done.stdout
    off, on = results.values()
    for name, values in off.items():
        np.testing.assert_allclose(on[name], values, rtol=1e-5, err_msg=name)


def test_steps_take_their_latents_from_the_cache(tiny_model, photos, tmp_path):
    """Once all crops are in it, the photos may be gone."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    vae = load_part(STABLE_DIFFUSION, "vae", tiny_model).requires_grad_(False)
    shape = latent_shape(vae, 32)
    settings = {"seed": 1, "resolution": 32, "center_crop": False, "latent_shape": shape, "num_timesteps": 10}
    dataset = build_dataset(find_images(folder, "--x"), [], **settings)
    encoded = latents_of(collate([dataset[n] for n in range(40)]), vae)
    assert cache_latents(dataset, vae, Ranks(0, 1, torch.device("cpu")), Schedule(4, 1, 10), which="on")
    shutil.rmtree(folder)
    torch.testing.assert_close(latents_of(collate([dataset[n] for n in range(40)]), vae=None), encoded)


# Runs a trainer, and prints how many objects a garbage collection in a step would go through, and one afterwards.
COUNT_OBJECTS = """
import gc, sys
import train_dreambooth_colossalai as trainer
from dreambooth.run.callbacks import Callbacks

gc.unfreeze()  # what was frozen before the fork
objects = []

def on_step_end(callbacks, step, **figures):
    objects.append(len(gc.get_objects()))
    return go_on(callbacks, step, **figures)

go_on, Callbacks.on_step_end = Callbacks.on_step_end, on_step_end
trainer.main(sys.argv[1:])
print("most:", max(objects), "of", len(gc.get_objects()))
"""


def test_no_step_waits_long_for_the_garbage_collector(flags, tmp_path):
    """A full collection goes through what the steps have made, not through what was there before."""
    script = tmp_path / "count_objects.py"
    script.write_text(COUNT_OBJECTS)
    done = train(str(script), flags | {"max_train_steps": 4})
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("most:"))
    most, all_of_them = int(line.split()[1]), int(line.split()[3])
    assert most < all_of_them / 10, line
