"""Models in one file of the original layout: read, written, refused. diffusers' own loader is the judge."""

import errno
import fcntl
import functools
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from harness import COLOSSALAI, ROOT, TRADITIONAL, Running, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks import random_model
from dreambooth.command_line.console import UserError
from dreambooth.model import single_file
from dreambooth.model.components import load_tokenizer
from dreambooth.model.configurations import build_pipeline, clip_tokenizer, write_configuration
from dreambooth.model.libraries import name_in_file
from dreambooth.model.original_layout import of_clip, of_open_clip, of_unet, of_vae
from dreambooth.model.stable_diffusion import STABLE_DIFFUSION
from dreambooth.model.unpickle import main as unpickle

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
SHAPES = pytest.mark.parametrize("shape", ["tiny", "tiny-v2", "tiny-xl"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dreambooth"


@pytest.fixture
def env(cache):
    """Of processes that have it too."""
    return {"XDG_CACHE_HOME": str(cache.parent)}


@pytest.fixture
def model_of(once):
    """Returns the folder of a tiny model of a shape."""
    return lambda shape: once(f"single-{shape}", functools.partial(random_model.build, shape=shape))


def assert_same(one: DiffusionPipeline, other: DiffusionPipeline, dtype: torch.dtype = torch.float32) -> None:
    """Compares all weights, to the bit, the first ones rounded to a dtype."""
    for part in PARTS:
        if (module := getattr(one, part, None)) is None:
            continue
        found = getattr(other, part).state_dict()
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor.to(dtype) if tensor.is_floating_point() else tensor, found[name]), (part, name)


def pipelines(shape: str):
    return StableDiffusionXLPipeline if shape == "tiny-xl" else StableDiffusionPipeline


@SHAPES
def test_from_a_folder_to_a_file_to_a_folder(shape, model_of, flags, env, tmp_path):
    """At learning rate 0 nothing changes: the file is what diffusers reads as the model, and is trained as such."""
    model, kind = model_of(shape), pipelines(shape)
    still = flags | {"learning_rate": 0, "max_train_steps": 1, "resolution": 32, "save_single_file": True}
    output, again = tmp_path / "output", tmp_path / "again"
    train(
        TRADITIONAL,
        still | {"pretrained_model_name_or_path": model, "output_dir": output, "save_dtype": "fp32"},
        env=env,
    )
    whole = kind.from_pretrained(model)
    file = output / "output.safetensors"
    assert_same(whole, kind.from_single_file(file, config=str(model), local_files_only=True))
    with safe_open(file, framework="pt") as opened:
        told = opened.metadata()
    assert told["modelspec.title"] == "output" and told["modelspec.resolution"] == "32x32"

    from_file = {"pretrained_model_name_or_path": file, "single_file_config": model, "output_dir": again}
    if shape == "tiny":
        planned = train(COLOSSALAI, still | from_file | {"dry_run": True}, env=env)
        assert planned.stdout.splitlines()[-1] == "nothing was written outside the caches of models and data sets"
        assert not again.exists()
    train(COLOSSALAI, still | from_file, nproc=2 if shape == "tiny" else 1, env=env)
    assert_same(whole, kind.from_pretrained(again))
    assert_same(
        whole,
        kind.from_single_file(
            again / "again.safetensors", config=str(model), local_files_only=True, torch_dtype=torch.float16
        ),
        torch.float16,
    )


def test_what_is_drawn_of_a_file_is_what_is_drawn_of_its_folder(model_of, flags, env, tmp_path, cache):
    model, output = model_of("tiny"), tmp_path / "output"
    wanted = {"pretrained_model_name_or_path": model, "save_single_file": True, "save_dtype": "bf16"}
    train(TRADITIONAL, flags | wanted | {"max_train_steps": 1, "output_dir": output}, env=env)
    for part in ("unet", "vae", "text_encoder"):
        (weights,) = (output / part).glob("*.safetensors")
        assert {one.dtype for one in load_file(weights).values() if one.is_floating_point()} == {torch.bfloat16}
    file, drawn = tmp_path / "model.safetensors", []
    save_file(load_file(output / "output.safetensors") | {"alphas_cumprod": torch.ones(1000)}, file)  # of no part
    for number, name in enumerate([[output], [file, "--single_file_config", model]] * 2):
        image = tmp_path / f"{number}.png"
        words = ["inference.py", *name, "--prompt", "a dog", "--num_inference_steps", 2, "--output", image]
        drawn.append((Running(words[0], words[1:], env=env).wait(), image.read_bytes()))
    assert len({pixels for _, pixels in drawn}) == 1
    told = f"unpacked to {cache}"
    assert told in drawn[1][0].stdout and told not in drawn[3][0].stdout, "it is unpacked once"
    (unpacked,) = (path for path in cache.iterdir() if path.is_dir())
    assert unpacked.suffix == "", "nothing is left of the work"
    (weights,) = (unpacked / "unet").glob("*.safetensors")
    assert {one.dtype for one in load_file(weights).values()} == {torch.bfloat16}, "it is as large as in the file"


@pytest.mark.parametrize("kind", single_file.KINDS)
def test_a_kind_is_told_by_its_keys(kind):
    """The real shapes, without weights: what the weights of each are called tells diffusers what it is."""
    title, shape, _ = single_file.KINDS[kind]
    with init_empty_weights():
        pipeline = build_pipeline(shape, clip_tokenizer, "epsilon")
        weights = dict(of_unet(pipeline.unet.state_dict(), 2)) | dict(of_vae(pipeline.vae.state_dict(), 4))
        prefix = "conditioner.embedders.0." if kind == "xl_base" else "cond_stage_model."
        of_text = of_open_clip if kind == "v2" else of_clip
        text_encoder = pipeline.text_encoder
        of_its_files = {name_in_file(text_encoder, name): one for name, one in text_encoder.state_dict().items()}
        weights |= dict(of_text(of_its_files, prefix))
        if kind == "xl_base":
            weights |= dict(of_open_clip(pipeline.text_encoder_2.state_dict(), "conditioner.embedders.1."))
    found, _ = single_file._described(weights, "model.safetensors", "MODEL", None)
    assert found == f"{title} that predicts {'v' if kind == 'v2' else 'epsilon'}"


def test_the_tokenizer_is_that_of_clip():
    """Numbers of tokens as in the vocabulary that OpenAI published with its models."""
    assert clip_tokenizer()("a photo of a dog!")["input_ids"] == [49406, 320, 1125, 539, 320, 1929, 256, 49407]
    assert clip_tokenizer("!").pad_token_id == 0


@pytest.mark.parametrize("kind", single_file.KINDS)
def test_texts_are_filled_up_as_in_training(kind, tmp_path):
    """OpenAI's by their end; those of open_clip, of Stable Diffusion 2 and XL's second encoder, by zeros."""
    _, shape, prediction_type = single_file.KINDS[kind]
    write_configuration(tmp_path, shape, prediction_type)
    filled = {path.name: load_tokenizer(tmp_path / path.name).pad_token_id for path in tmp_path.glob("tokenizer*")}
    zeros = {"v1": (), "v2": ("tokenizer",), "xl_base": ("tokenizer_2",)}[kind]
    assert filled == {name: 0 if name in zeros else 49407 for name in filled} and "tokenizer" in filled


def test_what_is_no_such_file(tmp_path, monkeypatch):
    inpainting = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)}
    refiner = {"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(1)}
    unet = {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    for weights, told in (
        ({"unet.down.lora_A.weight": torch.zeros(1)}, "is a LoRA: name the model that it was made for"),
        ({"some.weight": torch.zeros(1)}, "is not a Stable Diffusion in its original layout"),
        (inpainting, "is what diffusers calls inpainting"),
        (refiner | unet, "is what diffusers calls xl_refiner"),
        (unet, "keys of a Stable Diffusion 1.x that predicts epsilon and another shape, .*with --single_file_config$"),
        (unet | {"edm_vpred.sigma_max": torch.zeros(1)}, "is of the EDM kind, such as CosXL"),
        (
            {
                single_file.FIRST_OF_UNET: torch.zeros(64, 8, 3, 3),
                single_file.FIRST_OF_DECODER: torch.zeros(96, 8, 3, 3),
            },
            "keys of a Stable Diffusion 1.x that predicts epsilon and another shape",
        ),
    ):
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=told):
            single_file.unpack(str(tmp_path / "model.safetensors"), "MODEL", None)
    torn = (tmp_path / "model.safetensors").read_bytes()[:-2]
    (tmp_path / "model.safetensors").write_bytes(torn)
    with pytest.raises(UserError, match="cannot load the model of"):
        single_file.unpack(str(tmp_path / "model.safetensors"), "MODEL", None)
    assert not any(path.is_dir() for path in single_file.cache_folder().iterdir())


def test_a_file_that_does_not_tell_its_shape_says_so_when_written_and_read(model_of, flags, env, tmp_path):
    """That of the small model, whose latents have eight channels: it is no model that edits images."""
    model, output = ROOT / "assets/tiny-stable-diffusion", tmp_path / "output"
    given = {"pretrained_model_name_or_path": model, "output_dir": output, "save_single_file": True}
    done = train(TRADITIONAL, flags | given | {"max_train_steps": 1}, env=env)
    assert "output.safetensors does not tell this model's configurations" in done.stdout
    words = [output / "output.safetensors", "--prompt", "a dog", "--num_inference_steps", 1]
    words += ["--output", tmp_path / "dog.png"]
    refused = Running("inference.py", words, env=env).wait(check=False)
    assert refused.returncode == 2 and len(refused.error_lines) == 1
    told = f"another shape, which files do not tell: .* with --single_file_config, as {output} does"
    assert re.search(told, refused.error_lines[0])
    Running("inference.py", [*words, "--single_file_config", output], env=env).wait()
    refused = Running("inference.py", [*words, "--single_file_config", model_of("tiny")], env=env).wait(check=False)
    assert refused.error_lines[0].endswith(f"of another shape than --single_file_config {model_of('tiny')}")


def test_a_file_that_tells_all_says_nothing(model_of, tmp_path, monkeypatch, capsys):
    """As if the tiny models were such as everybody starts from; of another prediction or noise it says so."""
    model = shutil.copytree(model_of("tiny"), tmp_path / "model")
    monkeypatch.setitem(single_file.KINDS, "v1", ("tiny", random_model.SHAPES["tiny"], "epsilon"))
    write = functools.partial(single_file.write_single_file, model, tmp_path / "a.safetensors", STABLE_DIFFUSION)
    write(torch.float32, title="a", resolution=32)
    assert not capsys.readouterr().out
    scheduler, vae = model / "scheduler" / "scheduler_config.json", model / "vae" / "config.json"
    for file, other in (
        (scheduler, {"prediction_type": "v_prediction"}),
        (scheduler, {"beta_end": 0.02}),
        (scheduler, {"rescale_betas_zero_snr": True}),
        (vae, {"scaling_factor": 0.5}),
    ):
        own = file.read_text()
        file.write_text(json.dumps(json.loads(own) | other))
        write(torch.float32, title="a", resolution=32)
        assert "a.safetensors does not tell this model's configurations" in capsys.readouterr().out, other
        file.write_text(own)


class Runs:
    def __reduce__(self):
        return os.system, ("touch it-ran",)


class Callback:
    """Of a library that is not installed here."""

    def __init__(self):
        self.best = {"loss": 0.5}


def test_pickles_are_refused_and_turned_into_files_without_running_them(tmp_path, flags, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"weight": torch.ones(2), "tied": torch.ones(2)}}, "model.ckpt")
    refused = train(TRADITIONAL, flags | {"pretrained_model_name_or_path": tmp_path / "model.ckpt"}, check=False)
    assert refused.returncode == 2
    assert f"python -m dreambooth.model.unpickle {tmp_path / 'model.ckpt'} makes" in refused.error_lines[-1]
    monkeypatch.setattr("sys.argv", ["unpickle", "model.ckpt"])
    unpickle()
    assert load_file("model.safetensors")["weight"].tolist() == [1, 1]
    with pytest.raises(UserError, match="is there already"):
        unpickle()
    monkeypatch.setattr("sys.argv", ["unpickle", "evil.ckpt"])
    for evil in (pickle.dumps({"state_dict": Runs()}), pickle.dumps(Runs())):
        Path("evil.ckpt").write_bytes(evil)
        with pytest.raises(UserError, match="evil.ckpt "):
            unpickle()
    # What a trainer leaves beside the weights is of classes that are not there, and may be more than that.
    monkeypatch.setattr(Callback, "__module__", "a.library")
    library = mock.patch.dict(sys.modules, {"a": sys.modules[__name__], "a.library": sys.modules[__name__]})
    beside = {"callbacks": {Callback: Callback()}, "optimizer_states": [Runs()], "precision": torch.float16}
    weights = OrderedDict(weight=torch.ones(2), bias=torch.nn.Parameter(torch.zeros(1)))
    monkeypatch.setattr("sys.argv", ["unpickle", "trained.ckpt"])
    for zipped in (True, False):
        with library:
            torch.save(beside | {"state_dict": weights}, "trained.ckpt", _use_new_zipfile_serialization=zipped)
        unpickle()
        found = {name: one.tolist() for name, one in load_file("trained.safetensors").items()}
        assert found == {"weight": [1, 1], "bias": [0]}
        Path("trained.safetensors").unlink()
    assert not Path("it-ran").exists()


def test_a_pickle_makes_no_storage_itself(tmp_path, monkeypatch):
    """Torch would take a number that it is given for the address of an allocator."""
    names = b"ctorch.storage\nUntypedStorage\n"
    body = b"\x80\x04}\x8c\x01a" + names + b"K\x08\x85}\x8c\x06device\x8c\x03cpus\x92s."  # a NEWOBJ_EX
    assert pickle.loads(body)["a"].nbytes() == 8, "this test could not fail"
    torch.save({"a": torch.zeros(2)}, tmp_path / "sound.ckpt")
    with zipfile.ZipFile(tmp_path / "sound.ckpt") as sound, zipfile.ZipFile(tmp_path / "evil.ckpt", "w") as evil:
        for name in sound.namelist():
            evil.writestr(name, body if name.endswith("data.pkl") else sound.read(name))
    monkeypatch.setattr("sys.argv", ["unpickle", str(tmp_path / "evil.ckpt")])
    with pytest.raises(UserError, match=r"evil.ckpt cannot be read.* must be a type"):
        unpickle()


def test_numbers_that_the_other_format_lacks_are_told(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "a.ckpt")
    monkeypatch.setattr("sys.argv", ["unpickle", str(tmp_path / "a.ckpt")])
    with pytest.raises(UserError, match=r"a.ckpt has numbers of torch.complex128, which a .safetensors file cannot"):
        unpickle()
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["a.ckpt"]


class Program(torch.nn.Module):
    """That torch.load would run as it reads it, past any unpickler."""

    def __init__(self):
        super().__init__()
        self.weight = torch.zeros(1)

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        print("it ran")
        self.weight, self.training = state[0], state[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_program_is_not_run(tmp_path, monkeypatch, capfd):
    torch.jit.save(torch.jit.script(Program()), tmp_path / "program.ckpt")
    torch.load(tmp_path / "program.ckpt", weights_only=False)
    assert "it ran" in capfd.readouterr().out, "this test could not fail"
    monkeypatch.setattr("sys.argv", ["unpickle", str(tmp_path / "program.ckpt")])
    with pytest.raises(UserError, match="program.ckpt is a program of TorchScript: reading it would run it"):
        unpickle()
    assert "it ran" not in capfd.readouterr().out


class Made:
    """By a method of its class, as a time zone is."""

    @classmethod
    def again(cls) -> "Made":
        return cls()

    def __reduce__(self):
        return Made.again, ()


@pytest.mark.parametrize("zipped", [True, False])
def test_what_lies_beside_weights_may_be_anything(zipped, tmp_path, monkeypatch):
    """Weights in 8 bits, objects that a method of their class makes, whole modules."""
    weights = {"weight": torch.ones(2, dtype=torch.float8_e4m3fn)} if zipped else {"weight": torch.ones(2)}
    beside = {"made": Made(), "ema": torch.nn.Linear(1, 1)}
    torch.save(beside | {"state_dict": weights}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    monkeypatch.setattr("sys.argv", ["unpickle", str(tmp_path / "a.ckpt")])
    unpickle()
    found = load_file(tmp_path / "a.safetensors")["weight"]
    assert found.dtype == weights["weight"].dtype and found.float().tolist() == [1, 1]
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.ckpt").stat().st_mode


def test_what_is_turned_into_a_file_and_what_is_told_of_the_rest(tmp_path, monkeypatch, capsys):
    """PyTorch's older format is a pickle, that of today a zip."""
    monkeypatch.chdir(tmp_path)
    weights = {"state_dict": {"weight": torch.arange(100.0)}, "global_step": 3}
    torch.save(weights, "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save(weights, "new.ckpt")
    Path("torn.ckpt").write_bytes(Path("new.ckpt").read_bytes()[:-100])
    Path("torn_old.ckpt").write_bytes(Path("old.ckpt").read_bytes()[:-100])
    Path("text.ckpt").write_text("Entry not found\n")
    Path("picture.ckpt").write_bytes(b"\x89PNG\r\n\x1a\n")
    Path("empty.ckpt").touch()
    Path("folder.ckpt").mkdir()
    save_file({"weight": torch.zeros(1)}, "named.ckpt")
    torch.save({"global_step": 3}, "none.ckpt")
    torch.save({"state_dict": [1], 7: torch.zeros(1)}, "odd.ckpt")
    for name, told in (
        ("old", None),
        ("torn", "torn.ckpt cannot be read, it may be torn: "),
        ("torn_old", "torn_old.ckpt cannot be read, it may be torn: "),
        ("text", "text.ckpt is a text, and no file of weights in PyTorch's format$"),
        ("picture", "picture.ckpt is a file of another kind, and no file of weights"),
        ("empty", "empty.ckpt is an empty file, and no file of weights"),
        ("named", "named.ckpt is a safetensors file, and no file of weights in PyTorch's format"),
        ("missing", "missing.ckpt is not there: name a file of weights"),
        ("folder", "folder.ckpt is a folder: name a file of weights"),
        ("none", "none.ckpt has no weights"),
        ("odd", "odd.ckpt has no weights"),
    ):
        monkeypatch.setattr("sys.argv", ["unpickle", f"{name}.ckpt"])
        if told is None:
            unpickle()
            assert torch.equal(load_file(f"{name}.safetensors")["weight"], torch.arange(100.0))
            continue
        with pytest.raises(UserError, match=told) as error:
            unpickle()
        assert "mmap" not in str(error.value)
        assert not Path(f"{name}.safetensors").exists()


def test_what_is_no_safetensors_file_says_what_it_is(tmp_path):
    torch.save({}, tmp_path / "pickle.safetensors")
    (tmp_path / "text.safetensors").write_text("Entry not found\n")
    for name, told in (
        ("pickle", "MODEL .*pickle.safetensors is a pickle, which may run code when it is read: python -m dreambooth"),
        ("text", "MODEL .*text.safetensors is a text: name a .safetensors file of a model$"),
    ):
        with pytest.raises(UserError, match=told):
            single_file.unpack(str(tmp_path / f"{name}.safetensors"), "MODEL", None)


@pytest.mark.parametrize("another", [False, True])
def test_a_cache_without_locks(another, model_of, tmp_path, cache, monkeypatch):
    """As on some network file systems: another process may unpack the same at the same time."""

    def refuse(*_) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    def write_beside_another(pipeline: DiffusionPipeline, partial: Path) -> None:
        write(pipeline, partial)
        if another:
            shutil.copytree(partial, partial.with_name(partial.name.rsplit(".", 2)[0]))

    file, model, write = tmp_path / "model.safetensors", model_of("tiny"), single_file.write_pipeline
    single_file.write_single_file(model, file, STABLE_DIFFUSION, torch.float32, title="x", resolution=32)
    monkeypatch.setattr(single_file, "write_pipeline", write_beside_another)
    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = single_file.unpack(str(file), "--flag", str(model))
    assert_same(StableDiffusionPipeline.from_pretrained(model), StableDiffusionPipeline.from_pretrained(folder))
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [folder.name]


def test_what_a_killed_run_has_left_in_the_cache_goes(model_of, tmp_path, cache):
    """When the same file is unpacked again: a folder that is not whole, and the configurations beside it."""
    file, model = tmp_path / "model.safetensors", model_of("tiny")
    single_file.write_single_file(model, file, STABLE_DIFFUSION, torch.float32, title="x", resolution=32)
    folder = single_file.unpack(str(file), "--flag", str(model))
    folder.rename(cache / "another")
    for end in (".partial", ".0a1b2c3d.partial", ".0a1b2c3d.partial.configuration"):
        shutil.copytree(cache / "another", f"{folder}{end}")
    assert single_file.unpack(str(file), "--flag", str(model)) == folder
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {folder.name, "another"}


def test_a_file_of_ones_own_is_not_replaced(model_of, flags, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "output.safetensors").write_text("mine")
    given = {"pretrained_model_name_or_path": model_of("tiny"), "output_dir": output, "save_single_file": True}
    refused = train(TRADITIONAL, flags | given, check=False)
    assert refused.returncode == 2 and "has a output.safetensors that this program did not write" in refused.stderr
    assert (output / "output.safetensors").read_text() == "mine"


def test_the_file_that_is_trained_is_not_replaced(flags, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    save_file({"weight": torch.zeros(1)}, output / "output.safetensors")
    link = tmp_path / "model.safetensors"
    link.symlink_to(output / "output.safetensors")
    given = {"pretrained_model_name_or_path": link, "output_dir": output, "save_single_file": True}
    refused = train(TRADITIONAL, flags | given, check=False)
    told = f"--output_dir {output}: the run would replace output.safetensors, the model to train"
    assert refused.returncode == 2 and refused.error_lines[0].endswith(told)


def test_a_file_to_train_and_to_write_to(flags, tmp_path):
    """Is told once what it is."""
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(1)}, file)
    refused = train(TRADITIONAL, flags | {"pretrained_model_name_or_path": file, "output_dir": file}, check=False)
    assert refused.returncode == 2 and refused.error_lines[0].endswith(f"--output_dir {file} is a file; name a folder")


def test_a_configuration_of_nothing(flags, tmp_path):
    for given, told in (
        ({"single_file_config": tmp_path / "none"}, "is not a folder"),
        ({"single_file_config": tmp_path}, "and none is named"),
    ):
        refused = train(TRADITIONAL, flags | given, check=False)
        assert refused.returncode == 2 and told in refused.stderr


def test_another_configuration_in_the_same_folder_is_another_model(tmp_path):
    """Whoever has given a wrong one mends it there."""
    file, folder = tmp_path / "model.safetensors", tmp_path / "configuration"
    file.write_bytes(b"")
    (folder / "scheduler").mkdir(parents=True)
    keys = set()
    for prediction_type in ("epsilon", "v_prediction", "epsilon"):
        config = folder / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps({"prediction_type": prediction_type}))
        (folder / "dreambooth.json").write_text(str(len(keys)))  # no configuration
        keys.add(single_file._key(file, str(folder)))
    assert len(keys) == 2
