"""Each flag acts: another value makes another loss, or a test of its own says what it does."""

import json
import re
import shutil
import sys
from dataclasses import Field, fields

import pytest
from harness import COLOSSALAI, ROOT, TRADITIONAL, Running, command_line, run, scalars

from benchmarks import random_model
from dreambooth.command_line.colossalai_flags import ColossalAIFlags

# Another value of each flag that changes the losses of three steps, and the flags beside which it does.
CHANGES = {
    "pretrained_model_name_or_path": ("{other_model}", {}),
    "external_unet_path": ("{other_model}/unet", {}),
    "pretrained_vae_model_name_or_path": ("{other_model}", {}),
    "tokenizer_name": ("{other_tokenizer}", {}),
    "train_text_encoder": (True, {}),
    "lora_rank": (4, {}),
    "lora_alpha": (64, {"lora_rank": 4}),
    "lora_dropout": (0.5, {"lora_rank": 4}),
    "lora_target_modules": ("all", {"lora_rank": 4}),
    "instance_data_dir": ("{other_photos}", {}),
    "instance_prompt": ("a drawing", {}),
    "resolution": (16, {}),
    "center_crop": (True, {}),
    "with_prior_preservation": (False, {}),
    "class_data_dir": ("{other_class_images}", {}),
    "class_prompt": ("a drawing", {}),
    "num_class_images": (1, {}),
    "prior_loss_weight": (0.5, {}),
    "train_batch_size": (3, {}),
    "gradient_accumulation_steps": (2, {}),
    "max_train_steps": (4, {"lr_scheduler": "linear"}),
    "snr_gamma": (1, {}),
    "noise_offset": (0.5, {}),
    "mixed_precision": ("bf16", {}),
    "seed": (2, {}),
    "learning_rate": (2e-3, {}),
    "scale_lr": (True, {}),
    "lr_scheduler": ("linear", {}),
    "lr_warmup_steps": (2, {"lr_scheduler": "constant_with_warmup"}),
    "lr_num_cycles": (3, {"lr_scheduler": "cosine_with_restarts"}),
    "lr_power": (3, {"lr_scheduler": "polynomial"}),
    "max_grad_norm": (1e-3, {"adam_epsilon": 1e-2}),  # with so large an epsilon, AdamW heeds the gradient's length
    "use_8bit_adam": (True, {}),
    "adam_beta1": (0.5, {}),
    "adam_beta2": (0.9, {}),
    "adam_weight_decay": (10, {}),
    "adam_epsilon": (1e-2, {}),
}
# Where the other flags are seen to act; the tests name them.
ELSEWHERE = {
    "test_hub": ["revision", "push_to_hub", "hub_token", "hub_model_id", "hub_private_repo", "logging_dir"],
    "test_options": [
        *("dataset_name", "dataset_config_name", "image_column", "caption_column", "report_to"),
        *("dataloader_num_workers", "dry_run", "validation_prompt", "num_validation_images", "validation_steps"),
        "gradient_checkpointing",
    ],
    "test_training": ["cache_latents", "num_train_epochs", "test_run"],
    "test_images": ["sample_batch_size"],
    "test_checkpoints": ["save_steps", "checkpoints_total_limit", "resume_from_checkpoint", "resume_anyway"],
    "test_faults": ["save_minutes", "output_dir"],
    "test_input": ["local_rank", "plugin", "placement", "offload_optim_frac"],
    "test_disk": ["offload_dir"],
    "test_single_file": ["single_file_config", "save_single_file", "save_dtype"],
    "test_lora": ["save_kohya_lora"],
    "test_models": ["variant", "validation_scheduler"],
    "test_peer_flags": ["prior_generation_precision", "tokenizer_max_length"],
    "test_gpu": ["cuda_graphs", "allow_tf32", "compile"],
}


# Those of CHANGES that a run that goes on need not name: what they give is compared instead, or is the run's own.
COMPARED_OTHERWISE = {
    *("pretrained_model_name_or_path", "external_unet_path", "tokenizer_name"),
    "pretrained_vae_model_name_or_path",
    *("instance_data_dir", "instance_prompt", "class_data_dir"),
    *("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "mixed_precision", "seed"),
}


def declared() -> dict[str, Field]:
    flags = {flag.name: flag for group in fields(ColossalAIFlags) for flag in fields(group.type)}
    del flags["always_so"]
    return flags


def test_every_flag_has_its_place():
    named = [*CHANGES, *(flag for flags in ELSEWHERE.values() for flag in flags)]
    assert sorted(named) == sorted(declared())


def test_what_changes_the_loss_is_declared_so():
    """These names are in checkpoints: one that is missing, or has another name, is not compared any more."""
    numbers = {name for name, flag in declared().items() if flag.metadata["numbers"]}
    assert numbers == (CHANGES.keys() - COMPARED_OTHERWISE) | {"test_run", "allow_tf32"}


@pytest.mark.parametrize("script", [COLOSSALAI, TRADITIONAL, "inference.py"])
@pytest.mark.parametrize("words", [["--seed", "x"], ["--help"]])
def test_what_words_alone_tell_is_told_before_libraries_are_imported(script, words):
    done = run([sys.executable, "-X", "importtime", script, *words], check=False)
    if words == ["--help"]:
        assert done.returncode == 0 and done.stdout.startswith(f"usage: {script} ")
    else:
        assert done.returncode == 2 and f"{script}: error: argument --seed: 'x' is" in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "dreambooth.command_line.parser" in imported
    assert not imported & {"torch", "numpy", "diffusers", "transformers", "PIL"}


def test_the_tests_named_use_the_flags():
    for module, flags in ELSEWHERE.items():
        text = (ROOT / "tests" / f"{module}.py").read_text()
        missing = [flag for flag in flags if not re.search(rf"\b{flag}\b", text)]
        assert not missing, (module, missing)


@pytest.fixture(scope="module")
def others(tmp_path_factory, photos):
    """Folders of class images, and of another model, tokenizer (two letters exchanged), photos and class images."""
    folder = tmp_path_factory.mktemp("others")
    random_model.build(folder / "model", "tiny", seed=7)
    tokenizer = folder / "model" / "tokenizer"
    exchanged = folder / "tokenizer"
    tokenizer.rename(exchanged)
    vocabulary = json.loads((exchanged / "vocab.json").read_text())
    vocabulary["s"], vocabulary["d"] = vocabulary["d"], vocabulary["s"]
    (exchanged / "vocab.json").write_text(json.dumps(vocabulary))
    (exchanged / "tokenizer.json").unlink(missing_ok=True)  # which says the same, where the library writes both
    random_model.build(folder / "model", "tiny", seed=7)
    shutil.copytree(photos, folder / "class_images")
    drawings = ROOT / "assets" / "instance_images"
    shutil.copytree(drawings, folder / "other_class_images")
    return {
        "other_model": folder / "model",
        "other_tokenizer": exchanged,
        "other_photos": drawings,
        "class_images": folder / "class_images",
        "other_class_images": folder / "other_class_images",
    }


# What the traditional script does with flags by itself; the others go into functions that both scripts call.
OF_TRADITIONAL = (
    *("train_text_encoder", "lora_rank", "with_prior_preservation", "train_batch_size", "gradient_accumulation_steps"),
    *("mixed_precision", "learning_rate", "scale_lr", "lr_scheduler", "max_grad_norm", "use_8bit_adam"),
)


@pytest.mark.parametrize(("script", "named"), [(COLOSSALAI, CHANGES), (TRADITIONAL, OF_TRADITIONAL)])
def test_another_value_makes_another_loss(script, named, flags, prior, others, tmp_path):
    base = flags | prior | {"class_data_dir": others["class_images"], "num_class_images": 5, "max_train_steps": 3}
    base |= {"learning_rate": 1e-3, "save_minutes": 0}
    runs, changes = {}, {}  # by what differs from `base`: some flags are changed to what stands beside others
    for flag in named:
        value, beside = CHANGES[flag]
        changed = beside | {flag: value.format(**others) if isinstance(value, str) else value}
        runs |= {json.dumps(what): base | what for what in (beside, changed)}
        changes[flag] = json.dumps(beside), json.dumps(changed)
    folders = {name: tmp_path / f"run{number}" for number, name in enumerate(runs)}
    file = tmp_path / "runs.json"
    file.write_text(json.dumps([command_line(run | {"output_dir": folders[name]}) for name, run in runs.items()]))
    Running("tests/many_runs.py", [script, str(file)]).wait(timeout=600)
    losses = {name: scalars(folder, "loss")[:3] for name, folder in folders.items()}
    ignored = [flag for flag, (beside, changed) in changes.items() if losses[changed] == losses[beside]]
    assert not ignored
