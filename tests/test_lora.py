"""Low-rank adapters: real runs of both trainers, and what they leave, drawn by diffusers alone."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from harness import COLOSSALAI, TRADITIONAL, scalars, train
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import inference
from benchmarks import random_model
from dreambooth.command_line.colossalai_flags import ColossalAIFlags, StrategyFlags
from dreambooth.command_line.console import UserError
from dreambooth.command_line.flags import Flags, LoraFlags, ModelFlags, OutputFlags, TrainingFlags
from dreambooth.command_line.parser import read
from dreambooth.command_line.rules import problems_of
from dreambooth.engine.strategy import choose_strategy
from dreambooth.model.activations import discard_activations
from dreambooth.model.channels_last import keep_channels_last
from dreambooth.model.denoiser import Denoiser
from dreambooth.model.lora import (
    KOHYA_WEIGHTS,
    WEIGHTS,
    adapter_weights,
    adapters_of,
    add_adapters,
    load_adapters,
    read_lora,
)
from dreambooth.model.pipeline import load_model, load_part
from dreambooth.model.stable_diffusion import STABLE_DIFFUSION

BOTH = pytest.mark.parametrize("script", [COLOSSALAI, TRADITIONAL])
MODELS = pytest.mark.parametrize("model", ["tiny_model", "xl_model"])
ALPHA, RANK = 6, 4
PROMPT = "a photo of sks dog"


@pytest.fixture
def lora(flags):
    """Flags of a run of four steps, all of whose adapters count."""
    return flags | {
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "max_train_steps": 4,
        "save_steps": 2,
        "learning_rate": 1e-2,
    }


@pytest.fixture
def trained(lora, once, request):
    """Returns a function that trains a model's UNet and text encoders once for all tests: the output folder."""

    def run(model: str) -> Path:
        base = request.getfixturevalue(model)
        changed = {"pretrained_model_name_or_path": base, "train_text_encoder": True, "save_kohya_lora": True}

        def make(folder):
            train(TRADITIONAL, lora | changed | {"output_dir": folder / "out"})

        return once(f"lora-{model}", make) / "out"

    return run


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def pipeline_of(folder: Path) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Returns the pipeline, by diffusers alone."""
    xl = (folder / "text_encoder_2").is_dir()
    kind, left_out = (StableDiffusionXLPipeline, {}) if xl else (StableDiffusionPipeline, {"safety_checker": None})
    pipeline = kind.from_pretrained(folder, **left_out)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images_of(pipeline) -> np.ndarray:
    start = torch.Generator().manual_seed(0)
    return pipeline(PROMPT, num_inference_steps=3, output_type="np", generator=start).images


def model_with_adapters(folder: Path, checkpoint: Path | None = None, *, seed: int = 1, **flags):
    """Returns a model as a trainer makes it, and its adapters: those of a checkpoint, if there is one."""
    model = load_model(folder, resolution=32)
    components = {name: model.components[name] for name in ("unet", *model.family.text_encoders)}
    origin = {"base": "org/model", "instance_prompt": PROMPT}
    adapters = adapters_of(LoraFlags(**{"lora_rank": RANK, "lora_alpha": ALPHA} | flags), components, **origin)
    add_adapters(components, adapters, seed)
    model.family.freeze_unread(components)
    if checkpoint:
        load_adapters(checkpoint, components)
    return components, adapters


# Runs --------------------------------------------------------------------------------------------------------------


def test_both_trainers_and_two_ranks_agree(lora, tmp_path):
    """From the same adapters on; and with --train_text_encoder, as each of its ranks draws those too."""
    lora |= {"train_text_encoder": True, "learning_rate": 1e-3}
    runs = {"ddp": (COLOSSALAI, 1), "two": (COLOSSALAI, 2), "traditional": (TRADITIONAL, 1)}
    for name, (script, nproc) in runs.items():
        train(script, lora | {"output_dir": tmp_path / name, "train_batch_size": 2 // nproc}, nproc=nproc)
    losses = {name: scalars(tmp_path / name, "loss") for name in runs}
    wanted = load_file(tmp_path / "ddp" / WEIGHTS)
    for name in ("two", "traditional"):
        np.testing.assert_allclose(losses[name], losses["ddp"], rtol=1e-5)
        found = load_file(tmp_path / name / WEIGHTS)
        assert found.keys() == wanted.keys()
        for key, weight in wanted.items():
            torch.testing.assert_close(found[key], weight, rtol=0, atol=5e-4, msg=key)


@pytest.mark.parametrize("script, use_8bit_adam", [(COLOSSALAI, False), (TRADITIONAL, False), (COLOSSALAI, True)])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(script, use_8bit_adam, lora, tmp_path):
    whole, resumed = lora["output_dir"], tmp_path / "resumed"
    lora |= {"use_8bit_adam": use_8bit_adam, "train_text_encoder": not use_8bit_adam}
    train(script, lora)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train(script, lora | {"output_dir": resumed, "resume_from_checkpoint": "latest"})
    for file in (WEIGHTS, f"checkpoint-4/{WEIGHTS}", "checkpoint-4/optimizer.safetensors"):
        one, other = load_file(whole / file), load_file(resumed / file)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), file
    earlier, later = (load_file(whole / f"checkpoint-{step}" / WEIGHTS) for step in (2, 4))
    assert not any(torch.equal(earlier[name], later[name]) for name in later)


def test_a_checkpoint_has_adapters_alone(trained, tiny_model):
    folder = trained("tiny_model") / "checkpoint-4"
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, "optimizer.safetensors", "state.json"}
    weights, moments = load_file(folder / WEIGHTS), load_file(folder / "optimizer.safetensors")
    assert moments.keys() == {f"{state}.{name}" for state in ("exp_avg", "exp_avg_sq") for name in weights}
    assert all(tensor.dtype == torch.float32 for tensor in [*weights.values(), *moments.values()])
    size = sum(path.stat().st_size for path in folder.iterdir())
    whole = sum(path.stat().st_size for part in ("unet", "text_encoder") for path in (tiny_model / part).iterdir())
    assert size < 3 * whole / 4, "with fp32 moments a whole one has three times the size of its components"


def test_what_a_run_leaves(trained, tiny_model):
    """No pipeline; and in the file what it takes to use it, but not where the model was."""
    folder = trained("tiny_model")
    files = {path.name for path in folder.iterdir()}
    assert files == {WEIGHTS, KOHYA_WEIGHTS, "dreambooth.json", "logs", "checkpoint-2", "checkpoint-4"}
    told = metadata_of(folder / WEIGHTS)
    assert (told["rank"], told["alpha"], told["instance_prompt"]) == ("4", "6", PROMPT)
    assert told["target_modules"].startswith("to_q,to_k,to_v,to_out.0") and "base_model" not in told
    config = json.loads(told["lora_adapter_metadata"])
    assert config["unet.r"] == config["unet.lora_alpha"] == config["text_encoder.r"] == RANK, "alpha is in the weights"
    assert json.loads(metadata_of(folder / "checkpoint-4" / WEIGHTS)["lora_adapter_metadata"])["unet.lora_alpha"] == 6
    for file in folder.rglob("*"):
        assert file.is_dir() or str(tiny_model).encode() not in file.read_bytes(), file
    assert {*json.loads((folder / "dreambooth.json").read_text())["files"]} == {WEIGHTS, KOHYA_WEIGHTS}


def test_adapters_and_a_pipeline_do_not_replace_each_other(lora, tmp_path):
    """A run into the other's folder is refused before anything loads, and a dry run of it too; nothing is touched."""
    short = {"max_train_steps": 1, "save_minutes": 0}
    whole = {name: value for name, value in lora.items() if not name.startswith("lora_")} | short
    lora |= short | {"output_dir": tmp_path / "lora"}
    file = {"save_single_file": True}
    train(TRADITIONAL, whole | file)
    train(TRADITIONAL, lora | {"save_kohya_lora": True})
    nothing = {"pretrained_model_name_or_path": tmp_path}  # a folder without a model
    pipeline, adapters = whole["output_dir"], lora["output_dir"]
    for changed, folder, told in (
        (lora, pipeline, "a pipeline of step 1, written .*, and adapters, which this run leaves, do not replace it"),
        (lora | {"dry_run": True}, pipeline, "a pipeline of step 1, written .*, and adapters"),
        (whole, adapters, "a LoRA of step 1, written .*, and a run without --lora_rank leaves none"),
        (whole, pipeline, "out.safetensors of step 1, .*: add --save_single_file, which writes it anew"),
        (lora, adapters, f"{KOHYA_WEIGHTS} of step 1, .*: add --save_kohya_lora, which writes it anew"),
    ):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        done = train(TRADITIONAL, changed | nothing | {"output_dir": folder}, check=False)
        assert done.returncode == 2 and len(done.error_lines) == 1
        assert re.search(f"--output_dir {folder} has {told}", done.error_lines[0]), done.error_lines
        assert "choose another --output_dir" in done.error_lines[0]
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    for changed in (whole | file, lora | {"save_kohya_lora": True}):
        assert "of step 1, written 2" in train(TRADITIONAL, changed).stdout
    (pipeline / "out.safetensors").rename(tmp_path / "moved.safetensors")
    train(TRADITIONAL, whole)
    assert not (pipeline / "out.safetensors").exists()


def test_nor_do_their_checkpoints(lora, tmp_path):
    short = {"max_train_steps": 3, "output_dir": tmp_path / "new"}
    for adapters, checkpoint in ((True, {"unet/config.json": "{}"}), (False, {WEIGHTS: ""})):
        folder = tmp_path / f"{adapters}" / "checkpoint-2"
        for name, text in (checkpoint | {"state.json": '{"written_at": 1.0}'}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        changed = lora | short if adapters else {k: v for k, v in (lora | short).items() if "lora_" not in k}
        done = train(TRADITIONAL, changed | {"output_dir": folder.parent}, check=False)
        kind = "without" if adapters else "with"
        assert done.returncode == 2 and f"has checkpoint-2 of a run {kind} --lora_rank" in done.error_lines[0]
        assert {path.name for path in folder.parent.iterdir()} == {"checkpoint-2"}


def test_a_run_replaces_only_what_the_tool_wrote(lora, tmp_path):
    """Its own adapters of before; a file of somebody else's stays."""
    lora |= {"max_train_steps": 1, "save_minutes": 0}
    train(TRADITIONAL, lora)
    (lora["output_dir"] / "notes.txt").touch()
    done = train(TRADITIONAL, lora | {"save_dtype": "fp16"})
    assert "has a LoRA of step 1" in done.stdout and (lora["output_dir"] / "notes.txt").exists()
    assert {tensor.dtype for tensor in load_file(lora["output_dir"] / WEIGHTS).values()} == {torch.float16}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / WEIGHTS).write_text("mine")
    done = train(TRADITIONAL, lora | {"output_dir": tmp_path / "other"}, check=False)
    assert done.returncode == 2 and f"has a {WEIGHTS} that this program did not write" in done.error_lines[0]
    assert (tmp_path / "other" / WEIGHTS).read_text() == "mine"


def test_a_dry_run_tells_what_adapters_take(lora):
    done = train(COLOSSALAI, lora | {"dry_run": True, "save_kohya_lora": True})
    assert re.search(r"disk: 0\.\d MiB for 2 checkpoints of 0\.\d MiB and the LoRA of 0\.\d MiB", done.stdout)
    assert not lora["output_dir"].exists()


@MODELS
def test_low_level_zero_trains_adapters(model, lora, request, tmp_path):
    """On two ranks, the CPU in the place of GPUs: the steps of fp32, to the rounding of bf16."""
    lora |= {"pretrained_model_name_or_path": request.getfixturevalue(model), "train_text_encoder": True}
    lora |= {"learning_rate": 1e-3}
    train(COLOSSALAI, lora)
    sharded = {"plugin": "low_level_zero", "mixed_precision": "bf16", "train_batch_size": 1}
    train("tests/sharding_on_cpu.py", lora | sharded | {"output_dir": tmp_path / "zero"}, nproc=2)
    for name in ("loss", "grad_norm"):
        wanted = scalars(lora["output_dir"], name)
        np.testing.assert_allclose(scalars(tmp_path / "zero", name), wanted, rtol=3e-3 if name == "loss" else 3e-2)
    names, means = set(), []
    for folder in (tmp_path / "zero", lora["output_dir"]):
        moments = load_file(folder / "checkpoint-4" / "optimizer.safetensors")
        names.add(frozenset(moments))
        means.append(torch.cat([moments[name].flatten() for name in sorted(moments) if name.startswith("exp_avg.")]))
    assert len(names) == 1 and (means[0] - means[1]).norm() <= 3e-2 * means[1].norm()


def test_validation_draws_what_is_trained(lora, tiny_model):
    """The picture after the last step is that of the adapters which are saved, beside the model as it is."""
    train(COLOSSALAI, lora | {"validation_prompt": PROMPT, "num_validation_images": 1, "learning_rate": 0.1})
    folder = lora["output_dir"]
    untrained = lora | {
        "validation_prompt": PROMPT,
        "num_validation_images": 1,
        "learning_rate": 0,
        "max_train_steps": 1,
    }
    train(COLOSSALAI, untrained | {"output_dir": folder.with_name("untrained")})
    pictures = [np.asarray(Image.open(file)) for file in sorted(folder.parent.rglob("step-*.png"))]
    assert len(pictures) == 2 and (pictures[0] != pictures[1]).any()


# What comes out -----------------------------------------------------------------------------------------------------


@MODELS
def test_diffusers_draws_what_was_trained(model, trained, request):
    """By load_lora_weights alone: as with weights to which B A was added by hand, as by kohya's names, as trained."""
    base, folder = request.getfixturevalue(model), trained(model)
    untouched = images_of(pipeline_of(base))
    by_diffusers = pipeline_of(base)
    by_diffusers.load_lora_weights(str(folder))
    drawn = images_of(by_diffusers)
    assert np.abs(drawn - untouched).max() > 1e-2
    by_kohya = pipeline_of(base)
    by_kohya.load_lora_weights(str(folder), weight_name=KOHYA_WEIGHTS)
    np.testing.assert_allclose(images_of(by_kohya), drawn, rtol=0, atol=1e-6)

    by_hand, checkpoint = pipeline_of(base), load_file(folder / "checkpoint-4" / WEIGHTS)
    for name in [name for name in checkpoint if name.endswith(".lora_A.weight")]:
        component, _, layer = name.removesuffix(".lora_A.weight").partition(".")
        part = getattr(by_hand, component)
        layer = layer if hasattr(part, "text_model") or component == "unet" else layer.removeprefix("text_model.")
        ups = checkpoint[name.replace("lora_A", "lora_B")]
        part.get_submodule(layer).weight.data += ALPHA / RANK * ups @ checkpoint[name]
    np.testing.assert_allclose(images_of(by_hand), drawn, rtol=0, atol=1e-4)

    components, _ = model_with_adapters(base, folder / "checkpoint-4")
    as_trained = pipeline_of(base)
    as_trained.register_modules(**components)
    np.testing.assert_allclose(images_of(as_trained), drawn, rtol=0, atol=1e-5)


@MODELS
def test_kohyas_names(model, trained):
    """Those that diffusers would write, but for lora_te of a model with one text encoder, as its readers expect."""
    folder = trained(model)
    wanted = convert_state_dict_to_kohya(load_file(folder / WEIGHTS))
    if model == "tiny_model":
        wanted = {name.replace("lora_te1_", "lora_te_"): tensor for name, tensor in wanted.items()}
    found = load_file(folder / KOHYA_WEIGHTS)
    assert found.keys() == wanted.keys() and sum(name.endswith(".alpha") for name in found) == len(found) / 3
    assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in wanted.items())
    assert metadata_of(folder / KOHYA_WEIGHTS)["ss_network_dim"] == "4"


def test_what_nothing_reads_stays_as_it_was_drawn(trained, xl_model):
    """The last layer of the first text encoder; it is in the file, as older releases of diffusers insist on it."""
    weights = load_file(trained("xl_model") / WEIGHTS)
    last = {name for name in weights if name.startswith("text_encoder.text_model.encoder.layers.2")}
    assert len(last) == 8
    ups = {name: weight for name, weight in weights.items() if ".lora_B." in name}
    assert {name for name, weight in ups.items() if not weight.any()} == last & ups.keys()
    drawn = adapter_weights(model_with_adapters(xl_model)[0]["text_encoder"])
    drawn = {name.replace(".default.", "."): weight for name, weight in drawn.items()}
    own = {name: name.removeprefix("text_encoder.") for name in last}
    assert all(torch.equal(weights[name], drawn.get(found, drawn.get(found[11:]))) for name, found in own.items())


def draw(tmp_path, *words, output="image.png") -> np.ndarray:
    inference.main(
        [*map(str, words), "--prompt", PROMPT, "--num_inference_steps", "2", "--output", str(tmp_path / output)]
    )
    return np.asarray(Image.open(tmp_path / output))


def test_inference_draws_with_adapters(trained, tiny_model, tmp_path, capsys):
    folder = trained("tiny_model")
    base, with_lora = draw(tmp_path, tiny_model), draw(tmp_path, tiny_model, "--lora", folder)
    assert (base != with_lora).any()
    for source in (folder / "checkpoint-4", folder / WEIGHTS, folder / KOHYA_WEIGHTS):
        found = draw(tmp_path, tiny_model, "--lora", source)
        assert np.abs(found.astype(int) - with_lora).max() <= 1, source
    assert (draw(tmp_path, tiny_model, "--lora", folder, "--lora_scale", 0) == base).all()
    assert (draw(tmp_path, tiny_model, "--lora", folder, "--lora_scale", 0.5) != with_lora).any()
    sheet = draw(tmp_path, tiny_model, "--lora", folder, "--compare_with", tiny_model)
    assert sheet.shape[1] > 2 * base.shape[1] - 1
    draw(tmp_path, tiny_model, "--lora_scale", 2)
    assert "--lora_scale: no effect without --lora" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "factors"),
    [
        ({"lora_alpha": 8}, (2, 2)),
        ({"lora_alpha": 8, "use_rslora": True}, (4, 4)),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": 16}}, (4, 2)),
        ({"lora_alpha": 4, "alpha_pattern": {"mid_.*to_v": 12}}, (1, 3)),
    ],
)
def test_alpha_of_other_programs_is_read_as_peft_reads_it(told, factors, tmp_path):
    """The rank is 4."""
    layers = [f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_v")]
    weights = {f"{layer}.lora_A.weight": torch.ones(4, 16) for layer in layers}
    weights |= {f"{layer}.lora_B.weight": torch.ones(16, 4) for layer in layers}
    weights |= {f"{layer}.lora_B.bias": torch.ones(16) for layer in layers}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in told.items()})}
    save_file(weights, tmp_path / WEIGHTS, metadata=metadata)
    read = read_lora(str(tmp_path), "--lora").weights
    assert all((read[f"{layer}.lora_A.weight"] == 1).all() for layer in layers)
    nothing = read_lora(str(tmp_path), "--lora", scale=0).weights
    for of_b in ("weight", "bias"):  # the latter as peft's lora_bias has it
        assert not any(nothing[f"{layer}.lora_B.{of_b}"].any() for layer in layers)
        assert [read[f"{layer}.lora_B.{of_b}"].unique().tolist() for layer in layers] == [[one] for one in factors]


def test_all_that_a_file_adds_is_scaled(trained, tiny_model, tmp_path):
    """By names that diffusers had for attention at first; a name that is not known could not be scaled."""
    told = {}
    for name, weight in load_file(trained("tiny_model") / WEIGHTS).items():
        for side, half in (("down", "A"), ("up", "B")):
            name = re.sub(rf"\.(to_[qkv]|to_out)(\.0)?\.lora_{half}\.", rf".processor.\1_lora.{side}.", name)
        told[name] = weight
    assert sum(".processor.to_" in name for name in told) == sum(name.startswith("unet.") for name in told)
    save_file(told, tmp_path / "early.safetensors")
    drawn = [draw(tmp_path, tiny_model)]
    drawn += [draw(tmp_path, tiny_model, "--lora", tmp_path / "early.safetensors", "--lora_scale", n) for n in (0, 1)]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()
    save_file(told | {"unet.mid_block.lora.magic.weight": torch.ones(1)}, tmp_path / "early.safetensors")
    with pytest.raises(UserError, match=r"has unet\.mid_block\.lora\.magic\.weight, which is not known here"):
        read_lora(str(tmp_path / "early.safetensors"), "--lora", scale=0.5)


@pytest.mark.parametrize(
    ("kind", "scale", "expected"),
    [
        ("dora_scale", 0.5, "is a DoRA, whose magnitudes no scale but 1"),
        ("hada_w1_a", 1.0, "LoHa, LoKr and other kinds"),
    ],
)
def test_adapters_of_other_kinds_are_refused(kind, scale, expected, trained, tmp_path):
    weights = load_file(trained("tiny_model") / KOHYA_WEIGHTS)
    save_file(weights | {f"lora_unet_mid_block.{kind}": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=expected):
        read_lora(str(tmp_path / "other.safetensors"), "--lora", scale=scale)


def test_adapters_that_fit_in_part_are_told(trained, tiny_model, tmp_path, capsys):
    """Those by kohya's names, of which diffusers leaves out what it does not know."""
    weights = load_file(trained("tiny_model") / KOHYA_WEIGHTS)
    draw(tmp_path, tiny_model, "--lora", trained("tiny_model") / KOHYA_WEIGHTS)
    assert "of which this model takes" not in capsys.readouterr().err
    layer = next(name for name in weights if "down_blocks" in name and name.endswith("lora_down.weight"))
    for name in [name for name in weights if name.startswith(layer.removesuffix("lora_down.weight"))]:
        weights[name.replace("down_blocks_0", "down_blocks_7")] = weights[name].clone()
    count = sum(name.endswith("lora_down.weight") for name in weights)
    save_file(weights, tmp_path / "more.safetensors")
    draw(tmp_path, tiny_model, "--lora", tmp_path / "more.safetensors")
    assert f"has {count} layers, of which this model takes {count - 1}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "which",
    ["nothing", "empty", "torn", "another", "pickle", "old pickle", "text", "other family", "no base", "no model"]
    + ["no A", "no B"],
)
def test_inference_refuses_what_is_no_lora_of_the_model(which, trained, tiny_model, xl_model, tmp_path):
    folder = trained("tiny_model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").write_bytes((folder / WEIGHTS).read_bytes()[:3000])
    save_file({"a": torch.zeros(1)}, tmp_path / "another")
    (tmp_path / "text").write_text("Entry not found")
    for name, is_zip in (("pickle", True), ("old pickle", False)):
        torch.save({"a": torch.zeros(1)}, tmp_path / name, _use_new_zipfile_serialization=is_zip)
    for half in "AB":
        weights = load_file(folder / WEIGHTS)
        del weights[next(name for name in weights if name.endswith(f"lora_{half}.weight"))]
        save_file(weights, tmp_path / f"no {half}")
    converts = "is a pickle, which .*: python -m dreambooth.model.unpickle"
    words, expected = {
        "nothing": ([tiny_model, "--lora", tmp_path / "x"], "--lora {}/x is neither a folder nor a file"),
        "empty": ([tiny_model, "--lora", tmp_path / "empty"], f"--lora {{}}/empty has no {WEIGHTS}: name what"),
        "torn": ([tiny_model, "--lora", tmp_path / "torn"], "cannot load the LoRA of {}/torn: "),
        "another": ([tiny_model, "--lora", tmp_path / "another"], "--lora {}/another has no LoRA in it"),
        "pickle": ([tiny_model, "--lora", tmp_path / "pickle"], f"--lora {{}}/pickle {converts} {{}}/pickle makes"),
        "old pickle": (
            [tiny_model, "--lora", tmp_path / "old pickle"],
            f"/old pickle {converts} '{{}}/old pickle' makes",
        ),
        "text": ([tiny_model, "--lora", tmp_path / "text"], "--lora {}/text is a text: name a .safetensors file"),
        "no A": ([tiny_model, "--lora", tmp_path / "no A"], "does not fit this model: it has one half of"),
        "no B": ([tiny_model, "--lora", tmp_path / "no B"], "does not fit this model: it has one half of"),
        "other family": ([xl_model, "--lora", folder], f"the LoRA of {folder} does not fit this model: it"),
        "no base": (["--lora", folder], f"--lora {folder} does not tell the model"),
        "no model": ([folder], f"{folder} has a LoRA, which goes with the model .*: MODEL --lora {folder}"),
    }[which]
    with pytest.raises(UserError, match=expected.format(tmp_path, tmp_path)) as error:
        draw(tmp_path, *words)
    assert error.value.status == 2 and "\n" not in str(error.value)


def test_inference_finds_adapters_where_runs_leave_them(trained, tmp_path, monkeypatch):
    """And says how they are used, where no pipeline is beside them."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no folder dreambooth-model: train a model first"):
        draw(tmp_path)
    Path("dreambooth-lora").symlink_to(trained("tiny_model"))
    with pytest.raises(UserError, match="dreambooth-lora has a LoRA, .*: MODEL --lora dreambooth-lora"):
        draw(tmp_path)


# Refusals and flags -------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_adapters_that_it_began_with(trained, lora, tmp_path):
    base = {"train_text_encoder": True, "resume_from_checkpoint": trained("tiny_model") / "checkpoint-4"}
    lora |= base | {"resume_anyway": True, "max_train_steps": 5}
    for changed in ({"lora_rank": 8}, {"lora_target_modules": "to_q"}):
        done = train(TRADITIONAL, lora | changed, check=False)
        assert done.returncode == 2 and "a run trains the same parts to its end" in done.error_lines[0], changed
        assert f"{next(iter(changed))} was" in done.error_lines[0]


def test_the_other_kind_of_run_is_told_alone(trained, flags, tmp_path):
    """Not the learning rate, whose default follows from it and which nobody gave; also for the newest of a folder."""
    del flags["learning_rate"]
    whole = flags | {"max_train_steps": 2, "save_steps": 1, "output_dir": tmp_path / "whole"}
    train(TRADITIONAL, whole)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    of_adapters = trained("tiny_model") / "checkpoint-4"
    for changed, told in (
        (
            whole | {"lora_rank": 8, "resume_from_checkpoint": "latest", "output_dir": tmp_path / "stopped"},
            "checkpoint-2: its run was without --lora_rank: leave it out; a",
        ),
        (
            flags | {"train_text_encoder": True, "max_train_steps": 5, "resume_from_checkpoint": of_adapters},
            "checkpoint-4: its run was with --lora_rank 4: give it here too; a",
        ),
    ):
        done = train(TRADITIONAL, changed, check=False)
        assert done.returncode == 2 and told in done.error_lines[0], done.stderr
        assert "learning_rate" not in done.error_lines[0] and "None" not in done.error_lines[0]


def test_layers_that_get_no_adapters_are_told_in_one_line(lora):
    done = train(COLOSSALAI, lora | {"lora_target_modules": "to_x"}, check=False)
    assert done.returncode == 2 and done.stderr.count("--lora_target_modules to_x") == 1, done.stderr


@pytest.mark.parametrize("targets", ["to_x", "to_q,norm1", ",", "to_q,conv_in,x"])
def test_layers_that_get_no_adapters_are_refused(targets, tiny_model):
    with pytest.raises(UserError, match=f"--lora_target_modules {targets}: the UNet has no linear layer and no"):
        model_with_adapters(tiny_model, lora_target_modules=targets)


@pytest.mark.parametrize("targets", ["0", "to_q,0"])
def test_a_name_that_blocks_have_too_is_refused(targets, tiny_model):
    with pytest.raises(UserError, match=f"--lora_target_modules {targets}: '0' is also a block, down_blocks.0"):
        model_with_adapters(tiny_model, lora_target_modules=targets)


def test_what_does_not_go_together(monkeypatch, photos, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    model = ModelFlags(pretrained_model_name_or_path="m")

    def chosen(lora_rank, **flags):
        lora, strategy = LoraFlags(lora_rank=lora_rank), StrategyFlags(**flags)
        return choose_strategy(ColossalAIFlags(model=model, lora=lora, strategy=strategy)).plugin

    for flags in ({"plugin": "gemini"}, {"placement": "auto"}, {"plugin": "gemini", "placement": "cpu"}):
        with pytest.raises(UserError, match="has nothing to split with --lora_rank: use --plugin torch_ddp"):
            chosen(4, **flags)
    assert chosen(4, placement="cpu") == "low_level_zero" and chosen(None, placement="cpu") == "gemini"
    found = problems_of(Flags(model=model, lora=LoraFlags(lora_rank=4), training=TrainingFlags(compile=True)))
    assert any("--compile is for whole UNets" in problem for problem in found)
    found = problems_of(Flags(model=model, lora=LoraFlags(lora_rank=4), output=OutputFlags(save_single_file=True)))
    assert any("--save_single_file writes a whole pipeline" in problem for problem in found)


@pytest.mark.parametrize(
    "words, rate, folder",
    [
        ([], 5e-6, "dreambooth-model"),
        (["--lora_rank", "4"], 1e-4, "dreambooth-lora"),
        (["--rank=4", "--learning_rate=5e-6"], 5e-6, "dreambooth-lora"),
        (["--learning_rate=1", "--output_dir=x"], 1, "x"),
        (["--rank=4", "--output_dir=dreambooth-model"], 1e-4, "dreambooth-model"),
    ],
)
def test_defaults_follow_what_is_trained(words, rate, folder):
    flags = read(Flags, ["--pretrained_model_name_or_path", "m", "--instance_data_dir", "d", *words])
    assert flags.optimizer.learning_rate == rate and flags.output.output_dir == folder


# The module that is trained -----------------------------------------------------------------------------------------


def inputs(*, seed: int = 0):
    torch.manual_seed(seed)
    return torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), {"input_ids": torch.randint(99, (2, 7))}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True])
def test_adapters_learn_and_all_else_stays(precision, flat, tiny_model):
    """In fp32, beside weights that are kept once, in the run's precision, and get no gradient."""
    components, adapters = model_with_adapters(tiny_model)
    denoiser = Denoiser(STABLE_DIFFUSION, adapters=adapters, **components).train()
    assert denoiser.trained.frozen() == [], "no copies"
    denoiser.cast(torch.float32, frozen=precision)
    names = {name for name in dict(denoiser.named_parameters()) if ".lora_" in name}
    frozen = {name: weight.clone() for name, weight in denoiser.named_parameters() if name not in names}
    if flat:
        denoiser.trained.flatten(multiple_of=2)
    assert all(weight.dtype == torch.float32 for weight in denoiser.trained.parameters())
    optimizer, losses = torch.optim.AdamW(denoiser.trained.parameters(), lr=1e-2), []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32):
            loss = (denoiser(*inputs()) - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    now = {name: weight for name, weight in denoiser.named_parameters() if name in frozen}
    assert now.keys() == frozen.keys() and not any(weight.requires_grad for weight in now.values())
    assert all(weight.dtype == precision and torch.equal(weight, frozen[name]) for name, weight in now.items())
    assert len(denoiser.trained.values()) == len(names)


def test_adapters_follow_from_the_seed(tiny_model):
    """The UNet's also where text encoders have some; and nothing else is drawn otherwise afterwards."""
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    found = [model_with_adapters(tiny_model, seed=seed)[0] for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), wanted)
    weights = [adapter_weights(components["unet"]) for components in found]
    downs = [name for name in weights[0] if ".lora_A." in name]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in downs)
    unet = {"unet": load_part(STABLE_DIFFUSION, "unet", tiny_model)}
    add_adapters(unet, adapters_of(LoraFlags(lora_rank=RANK), unet, base="m", instance_prompt=None), 1)
    assert all(torch.equal(weight, weights[0][name]) for name, weight in adapter_weights(unet["unet"]).items())


def test_a_base_on_the_hub_is_told(tiny_model):
    _, adapters = model_with_adapters(tiny_model)
    assert adapters.metadata()["base_model"] == "org/model"
    unet = {"unet": load_part(STABLE_DIFFUSION, "unet", tiny_model)}
    nobodys = adapters_of(LoraFlags(lora_rank=RANK), unet, base=None, instance_prompt=None)
    assert "base_model" not in nobodys.metadata()


def make_adapters_count(module: torch.nn.Module) -> None:
    for name, weight in adapter_weights(module).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.1)


@pytest.mark.skipif(triton.__version__ < "3.2", reason="the interpreter of Triton 3.1 computes nonsense")
@pytest.mark.parametrize(("model", "targets"), [("xl_model", "attention"), ("tiny_model", "all")])
def test_a_unet_with_adapters_keeps_channels_last(model, targets, request):
    """It predicts the same, with all gradients of adapters: a layer that has one is left as it is."""
    folder = request.getfixturevalue(model)
    plain = model_with_adapters(folder, lora_target_modules=targets)[0]["unet"].train()
    make_adapters_count(plain)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    undo = keep_channels_last(last)
    width, (latents, timesteps, _) = plain.config.cross_attention_dim, inputs()
    added = {"text_embeds": torch.randn(2, 40), "time_ids": torch.tensor([[66, 40, 9, 0, 32, 32]] * 2)}
    rest = timesteps, torch.randn(2, 7, width)
    wanted = plain(latents, *rest, added_cond_kwargs=added).sample
    found = last(latents.contiguous(memory_format=torch.channels_last), *rest, added_cond_kwargs=added).sample
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    gradient = torch.randn_like(wanted)
    wanted.backward(gradient)
    found.backward(gradient)
    for (name, one), other in zip(adapter_weights(last).items(), adapter_weights(plain).values(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)
    undo()
    assert type(last) is UNet2DConditionModel


def test_activations_are_made_again_beside_adapters(tiny_model):
    """To the bit, though frozen layers keep less of them."""
    unets = [model_with_adapters(tiny_model, lora_target_modules="all")[0]["unet"].train() for _ in range(2)]
    torch.manual_seed(0)
    make_adapters_count(unets[0])
    unets[1].load_state_dict(unets[0].state_dict())
    discard_activations(unets[1])
    latents, timesteps, _ = inputs()
    for unet in unets:
        unet(
            latents, timesteps, torch.linspace(-1, 1, 7 * 32).view(1, 7, 32).expand(2, -1, -1)
        ).sample.square().mean().backward()
    for one, other in zip(*(adapter_weights(unet).values() for unet in unets), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_dropout_of_adapters_is_known_to_draw(tiny_model):
    """So that a run warns of it, and its recomputing repeats what was drawn."""
    for rate in (0.0, 0.1):
        components, adapters = model_with_adapters(tiny_model, lora_dropout=rate)
        assert Denoiser(STABLE_DIFFUSION, adapters=adapters, **components).draws == (rate > 0)


def test_adapters_of_all_layers(tiny_model):
    """Both kinds of layers have some, and the shape of the model's own names is what --lora_target_modules says."""
    unet = model_with_adapters(tiny_model, lora_target_modules="all")[0]["unet"]
    kinds = {type(module.base_layer) for module in unet.modules() if hasattr(module, "base_layer")}
    assert kinds == {torch.nn.Linear, torch.nn.Conv2d}
    random_names = {name for name, module in unet.named_modules() if hasattr(module, "base_layer")}
    assert len(random_names) > 40 and random_model.SHAPES["tiny"]["unet"]["layers_per_block"] == 1
    few = model_with_adapters(tiny_model, lora_target_modules="to_k, to_v")[0]["unet"]
    assert {name.split(".")[-1] for name, module in few.named_modules() if hasattr(module, "base_layer")} == {
        "to_k",
        "to_v",
    }
