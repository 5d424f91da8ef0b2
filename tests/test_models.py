"""Model folders as newer and older libraries write them, and what of a model is fetched from the Hub."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from harness import COLOSSALAI, TRADITIONAL, Running, scalars, train, unet_weights
from PIL import Image
from test_hub import Hub
from transformers import CLIPTokenizerFast

from benchmarks import random_model
from dreambooth.command_line.console import UserError
from dreambooth.model import components
from dreambooth.model.components import load_tokenizer, warn_of_dropout
from dreambooth.model.folder import find_folder
from dreambooth.model.pipeline import load_part, load_pipeline, settings_in
from dreambooth.model.stable_diffusion import STABLE_DIFFUSION
from dreambooth.model.weights import choose_weights

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def model(tiny_model, tmp_path):
    """A model to change."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_other_processes_have_cores_while_weights_are_checked(tiny_model, monkeypatch):
    """Torch has its threads back afterwards."""
    threads, seen = torch.get_num_threads(), set()

    def check(weights: torch.Tensor) -> bool:
        seen.add(torch.get_num_threads())
        return True

    monkeypatch.setattr(components, "all_finite", check)
    try:
        torch.set_num_threads(6)
        load_part(STABLE_DIFFUSION, "vae", tiny_model)
        assert seen == {3} and torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(threads)


def test_dropout_is_told(tiny_model, capfd):
    """It draws what no seed of a run fixes."""
    unet, text_encoder = (load_part(STABLE_DIFFUSION, name, tiny_model) for name in ("unet", "text_encoder"))
    warn_of_dropout(unet, text_encoder)
    assert not capfd.readouterr().err
    unet.mid_block.resnets[0].dropout.p = 0.25
    warn_of_dropout(unet, text_encoder)
    assert "warning: dropout of 0.25" in capfd.readouterr().err
    attention = {name.rpartition(".")[2]: module for name, module in text_encoder.named_modules()}["self_attn"]
    attention.dropout = 0.5
    warn_of_dropout(unet, text_encoder)
    assert "warning: dropout of 0.5" in capfd.readouterr().err


def into_shards(folder, part, variant=None):
    """Saves a part anew, in shards with an index."""
    module = STABLE_DIFFUSION.components[part].from_pretrained(folder / part)
    (folder / part / f"{WEIGHTS[part]}.safetensors").unlink()
    module.save_pretrained(folder / part, max_shard_size="40KB", variant=variant)
    assert len(list((folder / part).glob("*.safetensors"))) > 1


def into_variant(folder, variant, parts=tuple(WEIGHTS)):
    """Renames weights as those of a variant are named."""
    for part in parts:
        file = folder / part / f"{WEIGHTS[part]}.safetensors"
        file.rename(file.with_name(f"{WEIGHTS[part]}.{variant}.safetensors"))


def change_json(file, **changed):
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def states(folder, **options):
    """Returns the weights of each part, as they are loaded."""
    return {
        "text_encoder": load_part(STABLE_DIFFUSION, "text_encoder", folder, **options).state_dict(),
        "unet": load_part(STABLE_DIFFUSION, "unet", folder, **options).state_dict(),
        "vae": load_part(STABLE_DIFFUSION, "vae", folder, **options).state_dict(),
    }


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for part in one:
        assert one[part].keys() == other[part].keys()
        assert all(tensor.equal(other[part][name]) for name, tensor in one[part].items())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_shards_are_the_weights(variant, model):
    expected = states(model)
    for part in WEIGHTS:
        into_shards(model, part, variant)
    find_folder(str(model), "MODEL")
    assert_same_weights(states(model), expected)
    unet = load_part(STABLE_DIFFUSION, "unet", model / "unet", torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 and p.requires_grad and p.device.type == "cpu" for p in unet.parameters())
    assert not unet.training
    pipeline = load_pipeline(model)
    assert_same_weights({part: getattr(pipeline, part).state_dict() for part in WEIGHTS}, expected)


def index_of(folder, part):
    return folder / part / f"{WEIGHTS[part]}.safetensors.index.json"


def shards_of(folder, part):
    return sorted((folder / part).glob("*.safetensors"))


def pickled(folder, part):
    map_ = json.loads(index_of(folder, part).read_text())["weight_map"]
    torch.save({"more": torch.zeros(1)}, folder / part / "shard.bin")
    change_json(index_of(folder, part), weight_map=dict.fromkeys(map_, "shard.bin"))


DAMAGE = {
    "missing": (lambda folder, part: shards_of(folder, part)[1].unlink(), "-00002-of-"),
    "torn": (lambda folder, part: os.truncate(shards_of(folder, part)[0], 20000), "is damaged"),
    "pickled": (pickled, "names shard.bin: only safetensors files beside it are read"),
    "elsewhere": (
        lambda folder, part: change_json(index_of(folder, part), weight_map={"a": "../vae/x.safetensors"}),
        "names ../vae/x.safetensors: only safetensors",
    ),
    "index torn": (lambda folder, part: os.truncate(index_of(folder, part), 50), "is not an index of shards"),
    "index of nothing": (lambda folder, part: change_json(index_of(folder, part), weight_map=7), "is not an index of"),
    "tensor missing": (
        lambda folder, part: shutil.copy(shards_of(folder, part)[0], shards_of(folder, part)[1]),
        "has no weights for",
    ),
}


def test_weights_that_may_not_be_read_are_not_called_damaged(model, monkeypatch):
    """Whoever runs the tests may read all, so that the system's answer is another one here."""
    monkeypatch.setattr(os, "access", lambda path, mode: "vae" not in str(path))
    with pytest.raises(UserError, match="cannot be read: this user has no permission to"):
        find_folder(str(model), "MODEL")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shards_are_one_line(damage, part, model):
    into_shards(model, part)
    change, expected = DAMAGE[damage]
    change(model, part)
    only_loading_shows = damage == "tensor missing"
    checks = [] if only_loading_shows else [lambda: find_folder(str(model), "MODEL")]
    for check in (*checks, lambda: states(model), lambda: load_pipeline(model)):
        with pytest.raises(UserError, match=expected) as error:
            check()
        assert only_loading_shows or f"cannot load the {STABLE_DIFFUSION.labels[part]} of {model}" in str(error.value)


def test_shards_of_another_shape_are_one_line(model):
    into_shards(model, "unet")
    change_json(model / "unet" / "config.json", block_out_channels=[32, 64])
    with pytest.raises(UserError, match=r"cannot load the UNet of .*: \S+ has the shape .*, and by config.json"):
        load_part(STABLE_DIFFUSION, "unet", model)


STEM = "diffusion_pytorch_model"
CHOICES = {
    "plain": ([f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"], None, (f"{STEM}.safetensors", None)),
    "wanted": ([f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"], "fp16", (f"{STEM}.fp16.safetensors", "fp16")),
    "only one": ([f"{STEM}.fp16.safetensors", "config.json"], None, (f"{STEM}.fp16.safetensors", "fp16")),
    "not wanted": ([f"{STEM}.safetensors"], "fp16", (f"{STEM}.safetensors", None)),
    "index": ([f"{STEM}.safetensors.index.json"], None, (f"{STEM}.safetensors.index.json", None)),
    "shards of a variant": (
        [f"{STEM}.fp16-00001-of-00002.safetensors", f"{STEM}.safetensors.index.fp16.json"],
        "fp16",
        (f"{STEM}.safetensors.index.fp16.json", "fp16"),
    ),
    "shards named otherwise": (
        [f"{STEM}-00001-of-00002.fp16.safetensors", f"{STEM}.safetensors.index.fp16.json"],
        None,
        (f"{STEM}.safetensors.index.fp16.json", "fp16"),
    ),
    "several": ([f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors"], None, "variants bf16, fp16: choose one"),
    "pickle": ([f"{STEM}.bin"], None, "pickle file"),
    "pickle of a variant": ([f"{STEM}.fp16.bin", "config.json"], "fp16", "pickle file"),
    "none": (["config.json", "other.safetensors"], None, f"it has no {STEM}.safetensors"),
    "shards of a variant without an index": (
        [f"{STEM}.fp16-00001-of-00002.safetensors", f"{STEM}.fp16-00002-of-00002.safetensors"],
        None,
        f"it has no {STEM}.safetensors",
    ),
    "shards without an index": ([f"{STEM}-00001-of-00002.safetensors"], None, f"it has no {STEM}.safetensors"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_which_weights_are_taken(case):
    names, wanted, expected = CHOICES[case]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            choose_weights(names, STEM, wanted)
    else:
        weights = choose_weights(names, STEM, wanted)
        assert (weights.file, weights.variant) == expected


def test_a_variant_is_taken_where_it_is_asked_for(model, tmp_path, capsys):
    """The variant has other weights than the plain files, so that one can tell which were taken."""
    random_model.build(tmp_path / "other", "tiny", seed=7)
    into_variant(tmp_path / "other", "ema")
    for part in WEIGHTS:
        shutil.copy(tmp_path / "other" / part / f"{WEIGHTS[part]}.ema.safetensors", model / part)
    plain, other = states(model), states(tmp_path / "other")
    assert_same_weights(states(model, variant="ema"), other)
    assert not plain["unet"]["conv_in.weight"].equal(other["unet"]["conv_in.weight"])
    pipeline = load_pipeline(model, variant="ema")
    assert_same_weights({part: getattr(pipeline, part).state_dict() for part in WEIGHTS}, other)
    find_folder(str(model), "MODEL", variant="ema")
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"--variant fp16: MODEL .* has no weights named \*.fp16.safetensors"):
        find_folder(str(model), "MODEL", variant="fp16")
    (model / "vae" / f"{WEIGHTS['vae']}.ema.safetensors").unlink()
    find_folder(str(model), "MODEL", variant="ema")
    assert "has none of its vae, the plain weights are taken" in capsys.readouterr().err


def losses_and_weights(script, flags):
    done = train(script, flags)
    return done, scalars(flags["output_dir"], "loss"), unet_weights(flags["output_dir"] / "unet")


def test_models_in_shards_and_variants_train(model, flags, prior, tmp_path):
    """As the plain ones do, to the bit; with class images and validation images, which pipelines of their own draw."""
    flags |= prior | {"validation_prompt": "a dog", "max_train_steps": 1, "num_class_images": 1}
    flags |= {"num_validation_images": 1, "pretrained_model_name_or_path": model}
    flags |= {"class_data_dir": tmp_path / "plain class"}
    _, losses, weights = losses_and_weights(TRADITIONAL, flags | {"output_dir": tmp_path / "plain"})
    images = [tmp_path / "plain class" / "00000.png", tmp_path / "plain" / "validation" / "step-1.png"]
    images = [Image.open(image).tobytes() for image in images]

    into_variant(model, "fp16", ["vae", "text_encoder"])
    into_shards(model, "unet", "fp16")
    shutil.copytree(model / "unet", tmp_path / "unet")
    cases = {
        "alone": (COLOSSALAI, {}, 1),
        "asked for": (TRADITIONAL, {"variant": "fp16"}, 0),
        "external": (TRADITIONAL, {"external_unet_path": tmp_path / "unet"}, 2),
    }
    for name, (script, more, warnings) in cases.items():
        class_dir, output_dir = tmp_path / f"{name} class", tmp_path / name
        more |= {"class_data_dir": class_dir, "output_dir": output_dir}
        done, found, trained = losses_and_weights(script, flags | more)
        assert done.stderr.count("has fp16 weights alone") == warnings, done.stderr
        assert found == losses and all(weights[key].equal(trained[key]) for key in weights), name
        drawn = class_dir / "00000.png", output_dir / "validation" / "step-1.png"
        assert [Image.open(image).tobytes() for image in drawn] == images


def test_validation_images_by_another_scheduler(flags, model):
    """The training is the same, the images are not."""
    flags |= {"max_train_steps": 1, "validation_prompt": "a dog", "num_validation_images": 1}
    runs = []
    for name in (None, "DDPMScheduler", "DPMSolverMultistepScheduler"):
        output_dir = flags["output_dir"] / str(name)
        more = {"validation_scheduler": name, "output_dir": output_dir}
        _, (loss,), weights = losses_and_weights(TRADITIONAL, flags | more)
        runs.append((loss, weights["conv_out.bias"].tolist(), (output_dir / "validation/step-1.png").read_bytes()))
    assert runs[0][:2] == runs[1][:2] == runs[2][:2]
    assert len({image for *_, image in runs}) == 3
    assert isinstance(load_pipeline(model, sampler=name).scheduler, DPMSolverMultistepScheduler)
    saved = json.loads((flags["output_dir"] / str(name) / "model_index.json").read_text())
    assert saved["scheduler"] == json.loads((model / "model_index.json").read_text())["scheduler"]


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
@pytest.mark.parametrize("script", [COLOSSALAI, TRADITIONAL])
def test_noise_that_no_betas_schedule_is_refused(script, scheduler, model, flags):
    """Its UNet would be trained with noise that it has never seen."""
    shutil.rmtree(model / "scheduler")
    scheduler().save_pretrained(model / "scheduler")
    change_json(model / "model_index.json", scheduler=["diffusers", scheduler.__name__])
    done = train(script, flags | {"pretrained_model_name_or_path": model}, check=False)
    assert done.returncode == 2 and len(done.error_lines) == 1
    assert f"a {scheduler.__name__}, has no betas" in done.error_lines[0]


def test_settings_of_a_pipeline_stay_as_they_are(model):
    """Those of its index that are no parts."""
    change_json(model / "model_index.json", requires_safety_checker=True, of_a_later_release=1)
    index = json.loads((model / "model_index.json").read_text())
    assert settings_in(index, STABLE_DIFFUSION) == {"requires_safety_checker": True}
    assert load_pipeline(model).config["requires_safety_checker"] is False, "there is none"


def test_a_tokenizer_that_newer_libraries_saved(model):
    """It is a tokenizer.json alone."""
    prompts = ["a photo of sks dog", "A  café, (très) bon!", ""]
    expected = load_tokenizer(model / "tokenizer")(prompts).input_ids
    CLIPTokenizerFast.from_pretrained(model / "tokenizer").save_pretrained(model / "tokenizer", legacy_format=False)
    for name in ("vocab.json", "merges.txt"):
        (model / "tokenizer" / name).unlink(missing_ok=True)
    assert load_tokenizer(model / "tokenizer")(prompts).input_ids == expected


# The Hub ------------------------------------------------------------------------------------------------------------


FIND = """
import json, sys
import huggingface_hub.constants
from dreambooth.command_line.console import UserError
from dreambooth.model.folder import find_folder
orders, answers = (open(path, mode) for path, mode in zip(sys.argv[1:], "rw"))
for line in orders:
    order = json.loads(line)
    huggingface_hub.constants.HF_HUB_CACHE = order["cache"]
    wanted = {"variant": order["variant"], "elsewhere": set(order["elsewhere"])}
    try:
        answer = str(find_folder("someone/tiny", "MODEL", **wanted)), ""
    except UserError as error:
        answer = "", str(error)
    print(json.dumps(answer), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def finder(tiny_model, tmp_path_factory):
    """A server of the Hub's protocol, and a process that looks for models there: it is known when it starts."""
    server = Hub(tiny_model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = tmp_path_factory.mktemp("finder")
    (folder / "find.py").write_text(FIND)
    pipes = [folder / "orders", folder / "answers"]
    for pipe in pipes:
        os.mkfifo(pipe)
    process = Running(folder / "find.py", [str(pipe) for pipe in pipes], env={"HF_ENDPOINT": server.url})
    with pipes[0].open("w") as orders, pipes[1].open() as answers:
        yield server, orders, answers, process.stderr
    process.wait()
    server.shutdown()


@pytest.fixture
def find(finder, model, tmp_path):
    """Returns a function that finds `model`, as it is then, on the Hub: its folder, and the weights that were fetched.

    What cannot be had raises UserError; what is fetched goes into a cache of the test.
    """
    server, orders, answers, _ = finder

    def found(*, variant=None, elsewhere=()):
        server.files = {str(path.relative_to(model)): path for path in model.rglob("*") if path.is_file()}
        server.fetched.clear()
        order = {"cache": str(tmp_path / "cache"), "variant": variant, "elsewhere": list(elsewhere)}
        print(json.dumps(order), file=orders, flush=True)
        folder, error = json.loads(answers.readline())
        if error:
            raise UserError(error)
        return Path(folder), {name for name in server.fetched if not name.endswith((".json", ".txt"))}

    return found


def test_of_the_hub_the_files_that_are_loaded_are_fetched(find, finder, model):
    """Not other variants, formats and parts; those of a variant if it is asked for."""
    for part, name in WEIGHTS.items():
        for other in (f"{name}.fp16.safetensors", f"{name}.non_ema.safetensors", f"{name}.bin", "flax_model.msgpack"):
            shutil.copy(model / part / f"{name}.safetensors", model / part / other)
    into_shards(shutil.copytree(model, model.parent / "copy"), "unet")
    for file in (model.parent / "copy" / "unet").iterdir():
        shutil.copy(file, model / "unet")
    (model / "unet" / f"{STEM}.safetensors").unlink()
    for part in ("safety_checker", "feature_extractor"):
        (model / part).mkdir()
        (model / part / "weights").write_text("{}")
    folder, fetched = find()
    shards = {f"unet/{path.name}" for path in shards_of(model, "unet") if "-of-" in path.name}
    assert fetched == {"text_encoder/model.safetensors", f"vae/{STEM}.safetensors"} | shards
    assert load_pipeline(folder)
    assert find() == (folder, set()), "all is there"
    fp16 = {"text_encoder/model.fp16.safetensors", f"vae/{STEM}.fp16.safetensors"}
    assert find(variant="fp16", elsewhere=["unet"]) == (folder, fp16)
    with pytest.raises(UserError, match="--variant bf16: MODEL someone/tiny has no weights named"):
        find(variant="bf16")


def test_the_only_variant_on_the_hub(find, finder, model):
    into_variant(model, "fp16")
    folder, fetched = find()
    assert len(fetched) == 3
    assert_same_weights(states(folder), states(model))
    assert finder[3].read_text().count("MODEL someone/tiny has fp16 weights alone") == 1


def other_unet(model, **config):
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(model / "unet") | config)
    unet.save_pretrained(model / "unet")


OTHERS = {
    "of a later family": (
        lambda model: change_json(
            model / "model_index.json",
            _class_name="StableDiffusion3Pipeline",
            text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
        ),
        "someone/tiny is a StableDiffusion3Pipeline, which this project does not train",
    ),
    "depth": (
        lambda model: change_json(
            model / "model_index.json",
            _class_name="StableDiffusionDepth2ImgPipeline",
            depth_estimator=["transformers", "DPTForDepthEstimation"],
        ),
        "someone/tiny is a StableDiffusionDepth2ImgPipeline, which this project does not train",
    ),
    "inpainting": (lambda model: other_unet(model, in_channels=9), "it is an inpainting model, which cannot be"),
    "pickle": (
        lambda model: (model / "vae" / f"{STEM}.safetensors").rename(model / "vae" / f"{STEM}.bin"),
        "cannot load the VAE of someone/tiny: its weights are in a pickle file",
    ),
    "no index": (lambda model: (model / "model_index.json").unlink(), "someone/tiny has no model_index.json on the"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_cannot_be_trained_is_not_fetched(case, find, finder, model):
    change, expected = OTHERS[case]
    change(model)
    with pytest.raises(UserError, match=expected):
        find()
    assert all(name.endswith((".json", ".txt")) for name in finder[0].fetched)


def test_what_a_trainer_has_fetched_is_enough_offline(tiny_model, model, tmp_path):
    """Of a model that names a safety checker and a feature extractor, as Stable Diffusion 1.x and 2.x do."""
    change_json(
        model / "model_index.json",
        feature_extractor=["transformers", "CLIPImageProcessor"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
    )
    repository = tmp_path / "hf" / "hub" / "models--someone--tiny"
    shutil.copytree(model, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    words = [tiny_model, "--compare_with", "someone/tiny", "--prompt", "a dog", "--num_inference_steps", 2]
    words = [str(word) for word in (*words, "--output", tmp_path / "sheet.png")]
    done = Running("inference.py", words, env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}).wait()
    assert "sheet.png: 2 images" in done.stdout and (tmp_path / "sheet.png").is_file()
