"""Runs that stop and go on, compared with runs that never stopped."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from harness import COLOSSALAI, TRADITIONAL, scalars, train, unet_weights
from safetensors.torch import load_file

BOTH = pytest.mark.parametrize("script", [COLOSSALAI, TRADITIONAL])


@pytest.fixture
def long_run(flags, prior):
    """Flags of eight steps with everything that has a state, and a checkpoint every three."""
    return flags | prior | {"max_train_steps": 8, "save_steps": 3, "lr_scheduler": "cosine", "lr_warmup_steps": 2}


def stop_after(step: int, output_dir, elsewhere):
    """Leaves in `elsewhere` what a run killed just after `step` leaves: its checkpoints up to there."""
    elsewhere.mkdir()
    for folder in output_dir.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) <= step:
            shutil.copytree(folder, elsewhere / folder.name)


def assert_same(one, other) -> None:
    """Weights, and the optimizer's state in the last checkpoint, to the bit."""
    for weights, others in (
        (unet_weights(one / "unet"), unet_weights(other / "unet")),
        *((load_file(d / "checkpoint-6" / "optimizer.safetensors") for d in (one, other)),),
    ):
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights)


@BOTH
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(script, nproc, long_run, tmp_path):
    whole, resumed = long_run["output_dir"], tmp_path / "resumed"
    train(script, long_run, nproc=nproc)
    stop_after(3, whole, resumed)
    train(script, long_run | {"output_dir": resumed, "resume_from_checkpoint": "latest"}, nproc=nproc)
    assert_same(whole, resumed)
    assert (resumed / "checkpoint-3").is_dir()


@BOTH
def test_a_run_goes_on_with_the_seed_that_was_drawn_for_it(script, long_run, tmp_path):
    """Its command has none, and is repeated as it is."""
    whole, resumed = long_run["output_dir"], tmp_path / "resumed"
    long_run |= {"seed": None, "resume_from_checkpoint": "latest"}
    train(script, long_run)
    stop_after(3, whole, resumed)
    train(script, long_run | {"output_dir": resumed})
    assert_same(whole, resumed)
    other = train(script, long_run | {"output_dir": tmp_path / "other"})
    assert "starting from the beginning" in other.stderr
    assert scalars(tmp_path / "other", "loss") != scalars(whole, "loss"), "drawn, not always the same"


@BOTH
def test_what_resume_anyway_changes_acts(script, long_run, tmp_path):
    """The learning rate and its course are those of the new flags, from the first step on."""
    whole, resumed, wanted = long_run["output_dir"], tmp_path / "resumed", tmp_path / "wanted"
    train(script, long_run)
    stop_after(3, whole, resumed)
    changed = long_run | {"learning_rate": 1e-3, "max_train_steps": 10}
    train(script, changed | {"output_dir": resumed, "resume_from_checkpoint": "latest", "resume_anyway": True})
    train(script, changed | {"output_dir": wanted})
    assert scalars(resumed, "lr", first=4) == scalars(wanted, "lr")[3:]


@BOTH
def test_a_run_goes_on_with_other_ranks_and_the_other_trainer(script, long_run, tmp_path):
    """Two processes of batch 1 go on where one of batch 2 stopped, in the other script."""
    whole, resumed = long_run["output_dir"], tmp_path / "resumed"
    train(script, long_run)
    stop_after(3, whole, resumed)
    other = {COLOSSALAI: TRADITIONAL, TRADITIONAL: COLOSSALAI}[script]
    more = {"output_dir": resumed, "train_batch_size": 1, "resume_from_checkpoint": resumed / "checkpoint-3"}
    train(other, long_run | more, nproc=2)
    np.testing.assert_allclose(scalars(resumed, "loss", first=4), scalars(whole, "loss")[3:], rtol=1e-5)


def test_what_a_checkpoint_is_made_of(long_run):
    """fp32 weights that diffusers loads, fp32 moments, and JSON; nothing that is unpickled."""
    train(COLOSSALAI, long_run | {"checkpoints_total_limit": 1, "save_steps": 2, "hub_token": "hf_secret"})
    output_dir = long_run["output_dir"]
    assert [path.name for path in sorted(output_dir.glob("checkpoint-*"))] == ["checkpoint-8"]
    folder = output_dir / "checkpoint-8"
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    trained = unet_weights(output_dir / "unet")
    assert all(torch.equal(parameter, trained[name]) for name, parameter in unet.named_parameters())
    moments = load_file(folder / "optimizer.safetensors")
    assert {name.split(".")[0] for name in moments} == {"exp_avg", "exp_avg_sq"}
    assert len(moments) == 2 * len(trained) and all(tensor.dtype == torch.float32 for tensor in moments.values())
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == state["adam_step"] == 8 and state["settings"]["learning_rate"] == 1e-4
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    assert all(b"hf_secret" not in path.read_bytes() for path in output_dir.rglob("*") if path.is_file())


@BOTH
def test_settings_that_change_the_run_are_refused_by_name(script, long_run, tmp_path):
    train(script, long_run)
    for flag, value, named in (
        ("learning_rate", 1e-3, "learning_rate was 0.0001 and is 0.001"),
        ("seed", 2, "seed was 1 and is 2"),
        ("train_batch_size", 3, "samples per step was 2 and is 3"),
        ("max_train_steps", 9, "steps was 8 and is 9"),
        ("mixed_precision", "bf16", "mixed_precision was 'no' and is 'bf16'"),
    ):
        changed = long_run | {flag: value, "resume_from_checkpoint": "latest"}
        done = train(script, changed, check=False)
        assert done.returncode == 2 and len(done.error_lines) == 1 and named in done.error_lines[0]
        assert "see --resume_anyway" in done.error_lines[0] and done.error_lines[0].count(" was ") == 1
    train(script, changed | {"resume_anyway": True})
    train(script, long_run | {"mixed_precision": "no", "resume_from_checkpoint": "latest"})  # as without the flag
    assert (long_run["output_dir"] / "checkpoint-6").is_dir()
    # Before anything is generated, where that can be.
    changed = long_run | {"num_class_images": 9, "resume_from_checkpoint": "latest"}
    done = train(script, changed, check=False)
    assert done.returncode == 2 and "num_class_images was 7 and is 9" in done.error_lines[0]
    assert len(list(long_run["class_data_dir"].iterdir())) == 7


def test_a_model_that_reads_or_predicts_something_else_is_another_run(long_run, tmp_path):
    """Though all its weights are the same."""
    train(TRADITIONAL, long_run)
    for file, changed, named in (
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "v_prediction"},
            "prediction_type was 'epsilon' and is",
        ),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "noise schedule was {"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 9}, ": the tokenizers are not those of its run; see"),
    ):
        model = tmp_path / "another model"
        shutil.copytree(long_run["pretrained_model_name_or_path"], model, dirs_exist_ok=True)
        (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | changed))
        changed = long_run | {"pretrained_model_name_or_path": model, "resume_from_checkpoint": "latest"}
        done = train(TRADITIONAL, changed, check=False)
        assert done.returncode == 2 and len(done.error_lines) == 1 and named in done.error_lines[0]


def test_only_whole_checkpoints_are_taken(long_run):
    """A half-written one has another name; one that lost a file is named."""
    output_dir = long_run["output_dir"]
    train(COLOSSALAI, long_run)
    shutil.copytree(output_dir / "checkpoint-6", output_dir / ".checkpoint-7.partial")
    done = train(COLOSSALAI, long_run | {"resume_from_checkpoint": "latest", "max_train_steps": 8})
    assert "6/8" in done.stderr or "7/8" in done.stderr
    torn = output_dir / "checkpoint-6" / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    done = train(COLOSSALAI, long_run | {"resume_from_checkpoint": "latest"}, check=False)
    told = "checkpoint-6 is not a whole checkpoint: optimizer.safetensors is damaged or cut short"
    assert done.returncode == 2 and told in done.error_lines[0]
    assert re.search(r"; \S+/checkpoint-\d is another$", done.error_lines[0])
    done = train(COLOSSALAI, long_run | {"resume_from_checkpoint": output_dir}, check=False)
    assert done.returncode == 2 and re.search(r"; \S+/checkpoint-\d is another$", done.error_lines[0])


def test_the_newest_checkpoint_is_the_one_written_last(long_run):
    """Also beside those of a longer run from before, whatever their steps and however the folders were copied."""
    output_dir = long_run["output_dir"]
    train(TRADITIONAL, long_run | {"max_train_steps": 6, "save_steps": 6})
    shutil.move(output_dir, output_dir.with_name("before"))
    shutil.copytree(output_dir.with_name("before") / "checkpoint-6", output_dir / "checkpoint-6")
    train(TRADITIONAL, long_run | {"max_train_steps": 4, "save_steps": 2, "checkpoints_total_limit": 2})
    assert {path.name for path in output_dir.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    shutil.copytree(output_dir.with_name("before") / "checkpoint-6", output_dir / "checkpoint-6")
    more = {"max_train_steps": 5, "resume_from_checkpoint": "latest", "resume_anyway": True}
    assert "4/5" in train(TRADITIONAL, long_run | more).stderr


def test_the_newest_checkpoint_is_so_whatever_the_clock_says(long_run):
    """The first was written by a machine whose clock is thirty years ahead."""
    train(TRADITIONAL, long_run | {"max_train_steps": 4, "lr_scheduler": "constant"})
    state = long_run["output_dir"] / "checkpoint-3" / "state.json"
    found = json.loads(state.read_text())
    state.write_text(json.dumps(found | {"written_at": found["written_at"] + 1e9}))
    more = {"resume_from_checkpoint": "latest", "checkpoints_total_limit": 1, "lr_scheduler": "constant"}
    train(TRADITIONAL, long_run | more)
    assert [path.name for path in long_run["output_dir"].glob("checkpoint-*")] == ["checkpoint-6"]


def test_interim_checkpoints_take_no_place_of_those_asked_for(flags):
    """Also where one of a later step is left of a run that was killed."""
    flags |= {"max_train_steps": 5, "save_steps": 2}
    train(TRADITIONAL, flags)
    first, interim = (flags["output_dir"] / f"checkpoint-{step}" for step in (2, 5))
    shutil.copytree(flags["output_dir"] / "checkpoint-4", interim)
    state = json.loads((interim / "state.json").read_text())
    (interim / "state.json").write_text(json.dumps(state | {"step": 5, "interim": True}))
    train(TRADITIONAL, flags | {"resume_from_checkpoint": first, "checkpoints_total_limit": 2})
    assert {path.name for path in flags["output_dir"].glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    (first / "state.json").write_text(json.dumps(state | {"step": 2, "interim": True}))
    done = train(TRADITIONAL, flags | {"max_train_steps": 1})
    assert f"{first} is of a run that was cut short, and this one, which begins anew, removes it" in done.stderr


def test_a_run_that_begins_anew_tells_of_checkpoints_that_it_may_replace(flags):
    flags |= {"max_train_steps": 2, "save_steps": 1}
    done = train(TRADITIONAL, flags)
    assert "begins anew" not in done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{flags['output_dir']} has a pipeline of step 2, written 20")
    told = f"{flags['output_dir'] / 'checkpoint-2'} is of an earlier run, and this one, which begins anew, may replace"
    assert told in train(TRADITIONAL, flags).stderr
    assert "begins anew" not in train(TRADITIONAL, flags | {"resume_from_checkpoint": "latest"}).stderr


def test_a_caption_that_has_changed_is_another_run(flags, photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "0.txt").write_text("a sks dog")
    flags |= {"instance_data_dir": folder, "max_train_steps": 2, "save_steps": 1, "instance_prompt": "sks"}
    train(COLOSSALAI, flags)
    resumed = flags | {"resume_from_checkpoint": "latest"}

    def error_of(caption_of: dict[str, str]) -> str:
        for name in ("0", "1"):
            (folder / f"{name}.txt").unlink(missing_ok=True)
        for name, caption in caption_of.items():
            (folder / f"{name}.txt").write_text(caption)
        done = train(COLOSSALAI, resumed, check=False)
        assert done.returncode == 2 and len(done.error_lines) == 1, done.stderr
        return done.error_lines[0]

    assert "prompts was ['a sks dog', 'sks'] and is ['a sks cat', 'sks']; see" in error_of({"0": "a sks cat"})
    for captions in ({"0": "a sks dog", "1": "a sks dog"}, {"1": "a sks dog"}):
        assert ": the photos, each with its prompt, are not those of its run; " in error_of(captions)


def test_a_run_whose_steps_are_all_done_says_so(flags):
    flags |= {"max_train_steps": 1, "save_steps": 1}
    assert "nothing is left to train" not in train(COLOSSALAI, flags).stdout
    done = train(COLOSSALAI, flags | {"resume_from_checkpoint": "latest"})
    assert "checkpoint-1 has all steps of the run: nothing is left to train" in done.stdout


def test_latest_without_a_checkpoint_starts_anew_but_not_over_what_is_done(long_run):
    long_run |= {"resume_from_checkpoint": "latest", "max_train_steps": 1}
    done = train(COLOSSALAI, long_run)
    assert "has no checkpoint, starting from the beginning" in done.stderr
    index = long_run["output_dir"] / "model_index.json"
    written = index.stat().st_mtime_ns
    done = train(COLOSSALAI, long_run | {"max_train_steps": 2}, check=False)
    assert done.returncode == 2 and len(done.error_lines) == 1, done.stderr
    assert "has no checkpoint, but a pipeline of step 1, written " in done.error_lines[0]
    assert index.stat().st_mtime_ns == written
    train(COLOSSALAI, long_run | {"resume_from_checkpoint": None})
    assert index.stat().st_mtime_ns > written
