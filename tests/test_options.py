"""Each option acts as it says, through the real scripts: a test fails if the option is ignored."""

import io
import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from harness import (
    COLOSSALAI,
    ROOT,
    TRADITIONAL,
    Running,
    children_of,
    command_line,
    scalars,
    train,
    unet_weights,
    wait_for,
)
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import random_model
from dreambooth.data.images import find_images
from dreambooth.data.randomness import Stream, starting_points
from dreambooth.data.samples import Examples

BOTH = pytest.mark.parametrize("script", [COLOSSALAI, TRADITIONAL])
# As a captioner writes of the characters of a game: one line that lists what is known.
TEYVAT = (
    "Teyvat, Name:{0}, Element:{1}, Weapon:Sword, Region:{2}, Model type:Medium Female, Description:a girl with {3}"
)
CAPTIONS = [
    TEYVAT.format(*facts)
    for facts in (
        ("Ayaka", "Cryo", "Inazuma", "a fan"),
        ("Jean", "Anemo", "Mondstadt", "a ponytail"),
        ("Keqing", "Electro", "Liyue", "cat ears"),
        ("Lumine", "Anemo", "Void", "flowers in her hair"),
        ("Furina", "Hydro", "Fontaine", "a small hat"),
    )
]


def losses(output_dir) -> list[float]:
    return scalars(output_dir, "loss")


@pytest.fixture
def short(flags):
    """Flags of a run of three steps."""
    return flags | {"max_train_steps": 3, "learning_rate": 1e-3}


def captioned(folder, photos, captions: list[str], *, metadata: bool):
    """Copies photos into a folder, with captions beside them or in a metadata.jsonl."""
    shutil.copytree(photos, folder)
    names = sorted(path.name for path in folder.iterdir())
    if metadata:
        rows = [{"file_name": name, "text": text} for name, text in zip(names, captions, strict=True)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        for name, text in zip(names, captions, strict=True):
            (folder / name).with_suffix(".txt").write_text(text + "\n")
    return folder


def test_each_image_has_its_caption(short, photos, tmp_path):
    """Captions that all say the instance prompt change nothing; others do, wherever they are written."""
    prompt = short["instance_prompt"]
    cases = {
        "prompt": {},
        "same": {"instance_data_dir": captioned(tmp_path / "1", photos, [prompt] * 5, metadata=False)},
        "text files": {"instance_data_dir": captioned(tmp_path / "2", photos, CAPTIONS, metadata=False)},
        "metadata": {"instance_data_dir": captioned(tmp_path / "3", photos, CAPTIONS, metadata=True)},
        "another": {"instance_data_dir": captioned(tmp_path / "4", photos, [*CAPTIONS[:4], "a girl"], metadata=True)},
    }
    found = {}
    for name, changed in cases.items():
        without_prompt = {} if name == "prompt" else {"instance_prompt": None}
        done = train(COLOSSALAI, short | changed | without_prompt | {"output_dir": tmp_path / name})
        assert ("captions: 5 of 5 images have one" in done.stdout) == (name != "prompt")
        found[name] = losses(tmp_path / name)
    assert found["same"] == found["prompt"]
    assert found["metadata"] == found["text files"]
    assert found["metadata"] != found["prompt"]
    assert found["another"] != found["metadata"], "the caption of one image"


def test_the_instance_prompt_serves_where_there_is_no_caption(short, photos, tmp_path):
    folder = captioned(tmp_path / "photos", photos, [short["instance_prompt"]] * 5, metadata=False)
    (folder / "2.txt").unlink()
    done = train(TRADITIONAL, short | {"instance_data_dir": folder})
    assert "captions: 4 of 5 images have one" in done.stdout
    train(TRADITIONAL, short | {"output_dir": tmp_path / "plain"})
    assert losses(short["output_dir"]) == losses(tmp_path / "plain")


def parquet(path, photos, *, library: bool, columns: tuple[str, str] = ("image", "text")) -> None:
    """Writes photos and captions as a data set; as the `datasets` library does, or as any other tool."""
    encoded = [{"bytes": file.read_bytes(), "path": None} for file in sorted(photos.iterdir())]
    if library:
        import datasets

        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_dict({"image": encoded, "text": CAPTIONS}, features=features).to_parquet(path)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(dict(zip(columns, (encoded, CAPTIONS), strict=True))), path)


@BOTH
def test_a_data_set_is_a_folder_with_captions(script, short, photos, tmp_path):
    """Rows with a PNG of any size and a caption, train split only, in a file, a folder, or with columns renamed."""
    folder = captioned(tmp_path / "photos", photos, CAPTIONS, metadata=True)
    sets = tmp_path / "set" / "data"
    sets.mkdir(parents=True)
    parquet(sets / "train-00000-of-00001.parquet", photos, library=True)
    parquet(tmp_path / "other.PARQUET", photos, library=False, columns=("picture", "caption"))
    renamed = {"image_column": "picture", "caption_column": "caption", "dataset_config_name": "one"}
    lines = [f'photos/{file.name},"{text}"' for file, text in zip(sorted(photos.iterdir()), CAPTIONS, strict=True)]
    (tmp_path / "paths.csv").write_text("\n".join(["image,text", *lines]))
    sources = {
        "folder": {"instance_data_dir": folder},
        "parquet folder": {"instance_data_dir": None, "dataset_name": tmp_path / "set"},
        "parquet file": {"instance_data_dir": None, "dataset_name": tmp_path / "other.PARQUET"} | renamed,
        "imagefolder": {"instance_data_dir": None, "dataset_name": folder},
        "paths in a file": {"instance_data_dir": None, "dataset_name": tmp_path / "paths.csv"},
    }
    del short["instance_prompt"]
    for name, changed in sources.items():
        done = train(script, short | changed | {"output_dir": tmp_path / name})
        assert losses(tmp_path / name) == losses(tmp_path / "folder")
        assert ("--dataset_config_name one: no effect" in done.stderr) == ("dataset_config_name" in changed)


def test_captions_beside_the_images_of_a_data_set_are_told(short, photos, tmp_path):
    """Which the library passes over; but not other texts."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "README.txt").write_text("five photos")
    source = {"instance_data_dir": None, "dataset_name": folder, "max_train_steps": 1}
    assert "is not read" not in train(TRADITIONAL, short | source).stderr
    (folder / "1.txt").write_text("a sks dog")
    assert f"--dataset_name {folder}: 1.txt is not read (1 such): " in train(TRADITIONAL, short | source).stderr


def test_a_data_set_has_configurations(short, photos, tmp_path):
    """Of which the one named is taken."""
    for name, columns in (("one", ("image", "text")), ("two", ("picture", "text"))):
        parquet(tmp_path / f"{name}.parquet", photos, library=False, columns=columns)
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    source = {"instance_data_dir": None, "instance_prompt": None, "dataset_name": tmp_path, "max_train_steps": 1}
    train(COLOSSALAI, short | source | {"dataset_config_name": "one"})
    done = train(COLOSSALAI, short | source | {"dataset_config_name": "two"}, check=False)
    assert "has no column 'image' but picture, text" in done.error_lines[0]


DATASET_PROBLEMS = {
    "no such file": ("nowhere/a/b.parquet", {}, "is neither a folder nor a file"),
    "no such image column": ("set.parquet", {"image_column": "picture"}, "has no column 'picture' but image, text"),
    "no such caption column": (
        "set.parquet",
        {"caption_column": "caption"},
        "has no column 'caption' but image, text",
    ),
    "a caption column mistyped": (
        "set.parquet",
        {"caption_column": "captoin", "instance_prompt": "a dog"},
        "has no column 'captoin' but image, text",
    ),
    "no image in the column": ("set", {"image_column": "text"}, "row 0: the column 'text' holds no image"),
    "no path in the column": ("set.parquet", {"image_column": "text"}, "row 0: No such file or directory: "),
    "no parquet": ("broken.parquet", {}, "cannot be loaded"),
    "empty folder": ("empty", {}, "cannot be loaded"),
    "a torn line": ("torn.jsonl", {}, "cannot be loaded: JSON parse error"),
    "two sources": ("set.parquet", {"instance_data_dir": "."}, "name one of them"),
}


@pytest.mark.parametrize("case", DATASET_PROBLEMS)
def test_a_data_set_that_does_not_serve_is_one_line(case, short, photos, tmp_path):
    name, changed, expected = DATASET_PROBLEMS[case]
    parquet(tmp_path / "set.parquet", photos, library=False)
    (tmp_path / "set").mkdir()
    shutil.copy(tmp_path / "set.parquet", tmp_path / "set")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" + bytes(100))
    (tmp_path / "torn.jsonl").write_text('{"image": "a.png", "te')
    (tmp_path / "empty").mkdir()
    source = {"instance_data_dir": None, "instance_prompt": None, "dataset_name": tmp_path / name}
    done = train(COLOSSALAI, short | source | changed, check=False)
    assert done.returncode == 2 and len(done.error_lines) == 1, done.stderr
    assert expected in done.error_lines[0]


@BOTH
def test_the_text_encoder_is_trained_saved_and_resumed(script, short, prior, tmp_path):
    flags = short | prior | {"max_train_steps": 4, "save_steps": 2, "train_batch_size": 1}
    whole, resumed = flags["output_dir"], tmp_path / "resumed"
    train(script, flags | {"output_dir": tmp_path / "frozen"}, nproc=2)
    train(script, flags | {"train_text_encoder": True}, nproc=2)
    start, frozen, trained = (
        load_file(folder / "text_encoder" / "model.safetensors")
        for folder in (flags["pretrained_model_name_or_path"], tmp_path / "frozen", whole)
    )
    assert all(torch.equal(frozen[name], start[name]) for name in start)
    unchanged = [name for name in start if torch.equal(trained[name], start[name])]
    assert not unchanged
    assert losses(whole) != losses(tmp_path / "frozen")
    assert not (tmp_path / "frozen" / "checkpoint-2" / "text_encoder").exists()

    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    more = {"train_text_encoder": True, "output_dir": resumed, "resume_from_checkpoint": "latest"}
    train(script, flags | more, nproc=2)
    again = load_file(resumed / "text_encoder" / "model.safetensors")
    assert all(torch.equal(again[name], trained[name]) for name in trained)
    moments = load_file(resumed / "checkpoint-4" / "optimizer.safetensors")
    assert any(name.startswith("exp_avg.text_encoder.") for name in moments)
    fewer = more | {"train_text_encoder": False, "resume_anyway": True}
    assert "train_text_encoder was True and is False" in train(script, flags | fewer, check=False).error_lines[0]


def test_both_trainers_train_the_same_text_encoder(short, tmp_path):
    results = {}
    for script in (COLOSSALAI, TRADITIONAL):
        output_dir = tmp_path / script
        flags = {"train_text_encoder": True, "gradient_checkpointing": True, "save_dtype": "bf16"}
        train(script, short | flags | {"output_dir": output_dir})
        results[script] = losses(output_dir)
        weights = load_file(output_dir / "text_encoder" / "model.safetensors")
        assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {torch.bfloat16}
        for how in ({}, {"torch_dtype": torch.bfloat16}):
            pipeline = StableDiffusionPipeline.from_pretrained(output_dir, **how)
            parts = pipeline.unet, pipeline.vae, pipeline.text_encoder
            assert {part.dtype for part in parts} == {how.get("torch_dtype", torch.float32)}, "or it cannot draw"
    np.testing.assert_allclose(results[TRADITIONAL], results[COLOSSALAI], rtol=1e-5)


@BOTH
def test_accumulated_batches_are_one_large_batch(script, short, prior, tmp_path):
    """On one process and on two."""
    flags = short | prior | {"mixed_precision": "no"}
    found = {}
    for batch, accumulation, nproc in ((4, 1, 1), (1, 4, 1), (1, 2, 2), (2, 2, 1)):
        output_dir = tmp_path / f"{batch} {accumulation} {nproc}"
        more = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "output_dir": output_dir}
        done = train(script, flags | more, nproc=nproc)
        assert "3 steps of 4 samples" in done.stdout
        found[output_dir.name] = {name: scalars(output_dir, name) for name in ("loss", "grad_norm")}
    for values in found.values():
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(values[name], found["4 1 1"][name], rtol=1e-5, err_msg=name)


COUNT_REDUCTIONS = """
import sys, torch
import train_dreambooth_colossalai as trainer
from torch.nn.parallel import DistributedDataParallel
from dreambooth.command_line.parser import parse
from dreambooth.model.pipeline import load_part
from dreambooth.model.stable_diffusion import STABLE_DIFFUSION
from dreambooth.model.denoiser import Denoiser
from dreambooth.data.schedule import Schedule
from dreambooth.engine.strategy import choose_strategy

flags = parse(trainer.ColossalAIFlags, sys.argv[1:])
strategy = choose_strategy(flags)
trainer.join(trainer.find_place())
denoiser = Denoiser(STABLE_DIFFUSION, unet=load_part(STABLE_DIFFUSION, "unet", sys.argv[2]))
optimizer = trainer.build_optimizer(flags.optimizer, strategy, denoiser, Schedule(1, 1, 1))
lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
inputs = (torch.ones(1, 4, 16, 16), torch.tensor([1]), {"encoder_hidden_states": torch.ones(1, 77, 32)})
training = trainer.boost(strategy, denoiser, optimizer, lr_scheduler, {}, max_grad_norm=1.0)
(ddp,) = (module for module in training.model.modules() if isinstance(module, DistributedDataParallel))
reduced = []

def hook(state, bucket):
    reduced.append(bucket.index())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future

ddp.register_comm_hook(None, hook)
for synchronized in (False, True):
    with trainer.contextlib.nullcontext() if synchronized else training.no_sync():
        training.backward(training.model(*inputs).square().mean())
    print("reductions:", len(reduced))
"""


def test_ranks_share_their_gradients_once_a_step(short, tmp_path):
    (tmp_path / "count_reductions.py").write_text(COUNT_REDUCTIONS)
    done = train(tmp_path / "count_reductions.py", short)
    before_the_last, after = (int(line.split()[1]) for line in done.stdout.splitlines() if "reductions" in line)
    assert before_the_last == 0 and after > 0


COUNT_BATCHES = """
from torch.nn.parallel import DistributedDataParallel
no_sync = DistributedDataParallel.no_sync
DistributedDataParallel.no_sync = lambda self: print("kept back", flush=True) or no_sync(self)
"""


@BOTH
def test_gradients_of_all_but_the_last_batch_are_kept_back(script, short):
    more = {"max_train_steps": 2, "gradient_accumulation_steps": 3, "train_batch_size": 1}
    done = train(script, short | more, nproc=2, before=COUNT_BATCHES)
    assert done.stdout.count("kept back") == 2 * 2 * 2, "on two ranks, in two steps, of two batches of three"


@BOTH
def test_class_images_are_drawn_in_the_precision_wanted(script, short, prior, tmp_path):
    drawn = {}
    for precision in ("fp32", "bf16", "no"):
        more = {"class_data_dir": tmp_path / precision, "output_dir": tmp_path / "out", "num_class_images": 1}
        more |= {"max_train_steps": 1, "save_minutes": 0, "prior_generation_precision": precision}
        train(script, short | prior | more)
        drawn[precision] = (tmp_path / precision / "00000.png").read_bytes()
    assert drawn["fp32"] == drawn["no"] != drawn["bf16"]


@BOTH
def test_8_bit_adam_keeps_its_moments_in_8_bits(script, short, tmp_path):
    """In checkpoints too."""
    flags = short | {"max_train_steps": 4, "save_steps": 4, "use_8bit_adam": True}
    in_8_bits, plain = flags["output_dir"], tmp_path / "plain"
    train(script, flags)
    train(script, flags | {"use_8bit_adam": False, "output_dir": plain})
    kept = load_file(in_8_bits / "checkpoint-4" / "optimizer.safetensors")
    of_large = {name: tensor for name, tensor in kept.items() if name.startswith("state") and tensor.numel() >= 4096}
    assert of_large and all(tensor.dtype == torch.uint8 for tensor in of_large.values())
    size = [(folder / "checkpoint-4" / "optimizer.safetensors").stat().st_size for folder in (in_8_bits, plain)]
    assert size[0] < 0.7 * size[1]  # many parameters of the tiny model are too small for 8 bits
    np.testing.assert_allclose(losses(in_8_bits), losses(plain), rtol=0.02)
    assert losses(in_8_bits)[2:] != losses(plain)[2:]


@BOTH
def test_with_8_bit_adam_a_run_goes_on_to_the_bit(script, short, tmp_path):
    """From a checkpoint in fp32 of a model in fp16: what was mapped from a file, or not, is the same."""
    flags = short | {"pretrained_model_name_or_path": ROOT / "assets" / "tiny-stable-diffusion", "resolution": 64}
    flags |= {"max_train_steps": 3, "save_steps": 2, "use_8bit_adam": True, "train_batch_size": 1}
    whole, resumed = flags["output_dir"], tmp_path / "resumed"
    train(script, flags)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train(script, flags | {"output_dir": resumed, "resume_from_checkpoint": "latest"})
    again, weights = unet_weights(resumed / "unet"), unet_weights(whole / "unet")
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_8_bit_adam_without_bitsandbytes_says_what_to_install(short):
    without = "import sys; sys.modules['bitsandbytes'] = None"
    done = train(TRADITIONAL, short | {"use_8bit_adam": True}, before=without, anew=True, check=False)
    assert done.returncode == 2 and "pip install bitsandbytes" in done.stderr.splitlines()[-1], done.stderr


@BOTH
@pytest.mark.parametrize("option", [{"snr_gamma": 1}, {"noise_offset": 0.5}])
def test_the_loss_heeds(script, option, short, prior, tmp_path):
    train(script, short | prior | option)
    train(script, short | prior | {"output_dir": tmp_path / "plain"})
    with_option, plain = losses(short["output_dir"]), losses(tmp_path / "plain")
    assert all(abs(one - other) > 1e-3 for one, other in zip(with_option, plain, strict=True))


def test_noise_offset_shifts_whole_channels_and_no_other_draw(photos):
    """By normal numbers of the deviation given, one for each channel of each sample."""
    settings = dict(prompt_indices={"": 0}, seed=3, order=Stream.INSTANCE_ORDER, draws=Stream.INSTANCE_SAMPLE)
    settings |= dict(resolution=16, center_crop=False, latent_shape=(4, 8, 8), num_timesteps=1000)
    images = find_images(photos, "--x")
    plain, shifted = Examples(images, **settings), Examples(images, **settings, noise_offset=0.1)
    shifts = []
    for number in range(200):
        one, other = plain[number], shifted[number]
        difference = other["noise"] - one["noise"]
        torch.testing.assert_close(difference, difference[:, :1, :1].expand_as(difference))
        shifts.append(difference[:, 0, 0])
        assert torch.equal(one["timesteps"], other["timesteps"])
        assert torch.equal(one["posterior_noise"], other["posterior_noise"])
    shifts = torch.stack(shifts)
    assert abs(shifts.mean()) < 0.01 and abs(shifts.std() - 0.1) < 0.01
    assert len(shifts.unique()) == shifts.numel()


def test_a_picture_where_a_validation_image_goes_is_known_before_training(short):
    output_dir = short["output_dir"]
    (output_dir / "validation").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(output_dir / "validation" / "step-2.png")
    options = {"validation_prompt": "a sks dog", "num_validation_images": 1}
    done = train(COLOSSALAI, short | options | {"validation_steps": 2}, check=False)
    assert done.returncode == 2 and len(done.error_lines) == 1
    assert "validation/step-2.png is there, and is not as this program makes them" in done.error_lines[0]
    train(COLOSSALAI, short | options)  # which draws after the last step alone


@BOTH
@pytest.mark.parametrize("nproc", [1, 2])
def test_validation_draws_the_current_weights_and_changes_nothing(script, nproc, short, tmp_path):
    plain, output_dir = tmp_path / "plain", short["output_dir"]
    options = {"validation_prompt": "a sks dog", "num_validation_images": 2, "validation_steps": 2, "save_steps": 2}
    train(script, short | {"output_dir": plain}, nproc=nproc)
    train(script, short | options, nproc=nproc)
    with_images, without = unet_weights(output_dir / "unet"), unet_weights(plain / "unet")
    assert all(torch.equal(with_images[name], without[name]) for name in without)
    assert losses(output_dir) == losses(plain)

    assert {path.name for path in (output_dir / "validation").iterdir()} == {"step-2.png", "step-3.png"}
    assert Image.open(output_dir / "validation" / "step-2.png").width > 64
    events = EventAccumulator(str(output_dir / "logs"), size_guidance={"images": 0})
    events.Reload()
    drawn = events.Images("validation")
    assert [event.step for event in drawn] == [2, 3]
    drawn = [np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in drawn]
    assert not np.array_equal(*drawn)
    # The same by hand, from the checkpoint of that step.
    unet = UNet2DConditionModel.from_pretrained(output_dir / "checkpoint-2" / "unet")
    pipeline = StableDiffusionPipeline.from_pretrained(output_dir, unet=unet)
    pipeline.set_progress_bar_config(disable=True)
    for number in range(2):
        point = starting_points(pipeline, short["seed"], Stream.VALIDATION, [number])
        image = np.asarray(pipeline("a sks dog", num_inference_steps=25, **point).images[0]).astype(int)
        assert abs(image - drawn[0][:32, 32 * number : 32 * (number + 1)]).max() <= 2


@pytest.fixture(scope="module")
def tiny_v2(tmp_path_factory):
    """A whole Stable Diffusion of 2.x's build: v-prediction, linear projections, heads of 64 or fewer, gelu."""
    folder = tmp_path_factory.mktemp("tiny_v2")
    random_model.build(folder, "tiny-v2", prediction_type="v_prediction")
    return folder


def test_stable_diffusion_2_at_768_pixels(short, tiny_v2, photos, tmp_path):
    """Both trainers take the same steps, of an external UNet too, and the result draws at its size."""
    flags = short | {"pretrained_model_name_or_path": tiny_v2, "resolution": 768, "train_batch_size": 1}
    flags |= {"max_train_steps": 2, "instance_data_dir": tmp_path / "photos"}
    flags["instance_data_dir"].mkdir()
    for photo in sorted(photos.iterdir())[:2]:
        shutil.copy(photo, flags["instance_data_dir"])
    found = {}
    for script in (COLOSSALAI, TRADITIONAL):
        train(script, flags | {"output_dir": tmp_path / script})
        found[script] = losses(tmp_path / script)
    np.testing.assert_allclose(found[COLOSSALAI], found[TRADITIONAL], rtol=1e-5)
    small = {"resolution": 32, "max_train_steps": 1}
    for unet in (None, tmp_path / TRADITIONAL / "unet"):
        train(COLOSSALAI, flags | small | {"external_unet_path": unet, "output_dir": tmp_path / f"from {bool(unet)}"})
    assert losses(tmp_path / "from True") != losses(tmp_path / "from False")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / COLOSSALAI)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a photo of sks dog", num_inference_steps=1).images[0].size == (768, 768)


@BOTH
def test_a_dry_run_tells_the_plan_and_writes_nothing(script, short, prior):
    flags = short | prior | {"max_train_steps": 8, "save_steps": 2, "checkpoints_total_limit": 1}
    empty = flags["output_dir"].with_name("none")
    done = train(script, flags | {"dry_run": True, "class_data_dir": empty}, nproc=2)
    assert not flags["output_dir"].exists() and not empty.exists()
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert told["class images"] == "7 of 7 would be generated first"
    assert told["steps"] == "8 steps of 4 samples (2 ranks x 2), 8 of them to do"
    assert "s a step" in told["time"] and "GiB of host memory" in told["memory"]
    assert done.stdout.splitlines()[-1] == "nothing was written"

    words = r"([\d.]+) MiB for 4 checkpoints of ([\d.]+) MiB, of which 1 stays, and the pipeline of ([\d.]+) MiB"
    all_told, *told = (float(number) for number in re.fullmatch(words, told["disk"]).groups())
    train(script, flags, nproc=2)
    parts = ("unet", "vae", "text_encoder")
    folders = [[flags["output_dir"] / "checkpoint-8"], [flags["output_dir"] / part for part in parts]]
    found = [sum(p.stat().st_size for one in some for p in one.rglob("*.safetensors")) / 2**20 for some in folders]
    np.testing.assert_allclose(told, found, atol=0.2)
    # The oldest goes once the newest is complete.
    assert all_told == pytest.approx(max(2 * told[0], told[0] + told[1]), abs=0.3)

    done = train(script, flags | {"dry_run": True, "resume_from_checkpoint": "latest"}, nproc=2)
    assert "8 steps of 4 samples (2 ranks x 2), 0 of them to do" in done.stdout and "nan" not in done.stdout
    (prior["class_data_dir"] / "00003.png").unlink()
    done = train(script, flags | {"dry_run": True, "resume_from_checkpoint": "latest"}, nproc=2)
    assert "1 of 7 would be generated first" in done.stdout


@BOTH
def test_a_command_of_diffusers_runs(script, short, prior, tmp_path):
    """Flags that its script has and the public example has not; some of them are what always is."""
    more = {"set_grads_to_none": True, "enable_xformers_memory_efficient_attention": True, "allow_tf32": True}
    more |= {"report_to": "tensorboard", "checkpointing_steps": 2, "dataloader_num_workers": 2}
    done = train(script, short | prior | more)
    assert done.stderr.count("no effect") == 3, "of the first three"
    assert (short["output_dir"] / "checkpoint-2").is_dir()
    train(script, short | prior | {"output_dir": tmp_path / "plain"})
    assert losses(short["output_dir"]) == losses(tmp_path / "plain")


def test_worker_processes_decode_the_images(short):
    more = {"max_train_steps": 10**5, "dataloader_num_workers": 2, "cache_latents": "off"}
    run = Running(COLOSSALAI, command_line(short | more))
    wait_for(lambda: len(children_of(run.pids[0])) >= 2)
    run.send(signal.SIGKILL)
    run.wait(check=False)


@pytest.mark.parametrize(
    ("course", "by_hand"),
    [
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, [1, 0.5, 1, 0.5]),
        ({"lr_scheduler": "polynomial", "lr_power": 2}, [1, 0.75**2, 0.5**2, 0.25**2]),
    ],
)
def test_the_course_of_the_learning_rate(course, by_hand, short):
    train(TRADITIONAL, short | course | {"max_train_steps": 4})
    np.testing.assert_allclose(scalars(short["output_dir"], "lr"), [1e-3 * factor for factor in by_hand], rtol=5e-3)


def test_gradient_checkpointing_needs_less_memory(short):
    """Activations of many images are a good part of what a tiny model's run holds."""
    peaks = {}
    for checkpointing in (False, True):
        flags = short | {"resolution": 128, "train_batch_size": 8, "max_train_steps": 1}
        flags |= {"gradient_checkpointing": checkpointing}
        train(COLOSSALAI, flags)
        peaks[checkpointing] = scalars(flags["output_dir"], "peak_host_memory_gib")[-1]
        shutil.rmtree(flags["output_dir"])
    assert peaks[True] < peaks[False] - 0.03, peaks
