"""inference.py on a tiny model."""

import json
import math
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from harness import Running
from PIL import Image
from safetensors.torch import load_file, save_file

import inference
from benchmarks import random_model
from dreambooth.command_line.console import RunError, UserError
from dreambooth.data import images as images_module
from dreambooth.run.grid import captioned_grid
from dreambooth.run.image_file import check_image_file, encoded, save_image, still_ours


def infer(model, *words, **options):
    argv = [model, "--num_inference_steps", 2, *words]
    return Running("inference.py", [str(word) for word in argv]).wait(**options)


def test_one_image(tiny_model, tmp_path):
    """The picture itself, without a frame; the same seed gives the same again."""
    output = tmp_path / "new" / "dog.png"
    infer(tiny_model, "--prompt", "A photo of sks dog in a bucket", "--output", output)
    first = Image.open(output).tobytes()
    assert Image.open(output).size == (32, 32)
    for seed, same in ((0, True), (1, False)):
        infer(tiny_model, "--prompt", "A photo of sks dog in a bucket", "--output", output, "--seed", seed)
        assert (Image.open(output).tobytes() == first) is same


def test_a_sheet_compares_two_models(tiny_model, tmp_path):
    """Two prompts, two seeds, two models: equal models make equal halves, different ones do not."""
    random_model.build(tmp_path / "other", "tiny", seed=7)
    sheets = []
    for other in (tiny_model, tmp_path / "other"):
        output = tmp_path / f"{other.name}.png"
        words = ["--prompt", "a dog", "a long " + "and longer " * 50 + "prompt", "--num_images", 2]
        done = infer(tiny_model, "--compare_with", other, *words, "--output", output)
        assert "8 images" in done.stdout
        assert sum("is longer than the 75 tokens that fit" in line for line in done.stderr.splitlines()) == 2
        assert "indexing errors" not in done.stderr
        sheets.append(np.array(Image.open(output)).astype(int))
    step = 32 + 8
    cells = [[sheet[26:50, 8 + step * column : 40 + step * column] for column in range(4)] for sheet in sheets]
    same, different = cells
    assert (same[0] == same[2]).all() and (same[1] == same[3]).all() and (same[0] != same[1]).any()
    assert (different[0] != different[2]).any()
    assert (different[2] == same[2]).all(), "the second half is the model's own, whatever it is compared with"


# Checks before work, and results that are kept ---------------------------------------------------------------------


def change_json(file, **changed):
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


@pytest.fixture
def model(tiny_model, tmp_path):
    """A model to change."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def without_signal(model):
    """Gives a model a noise schedule that ends without signal, of which one that predicts noise makes NaN."""
    index = json.loads((model / "model_index.json").read_text())
    change_json(model / "model_index.json", scheduler=["diffusers", "DDIMScheduler"], _class_name=index["_class_name"])
    schedule = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "_class_name": "DDIMScheduler"}
    change_json(model / "scheduler" / "scheduler_config.json", **schedule)


SLIPS = {
    "no model to compare": (["--compare_with", "./nowhere"], "--compare_with ./nowhere is not a folder"),
    "half a model to compare": (["--compare_with", "{half}"], "--compare_with {half} has no vae"),
    "torn model to compare": (["--compare_with", "{torn}"], "cannot load the VAE of {torn}: .* is damaged"),
    "inpainting": (["--compare_with", "{inpainting}"], "it is an inpainting model"),
    "a file in the way": (["--output", "{file}/sheet.png"], "--output {file} is a file"),
    "a file far in the way": (["--output", "{file}/a/b/sheet.png"], "--output {file}/a/b cannot be made: Not a dir"),
    "a folder of the name": (["--output", "{folder}/a.png"], "--output {folder}/a.png is a folder; name a file"),
    "a long name": (["--output", "x" * 250 + ".png"], "cannot be made: File name too long"),
    "two adapters": (["--lora", "{folder}", "--lora", "{file}"], "--lora {file}: one is named already"),
    "no photos": (["--instance_data_dir", "{folder}/none"], "--instance_data_dir {folder}/none is not a folder"),
    "a configuration of a folder": (
        ["--single_file_config", "{folder}"],
        "is of a model that is one file, and .* is none",
    ),
    "more steps than timesteps": (["--num_inference_steps", "1000"], "1000: .* was trained with 1000 timesteps; give"),
    "more steps than the sampler takes": (["--num_inference_steps", "60", "--compare_with", "{lcm}"], "60: The comb"),
    "no such variant": (["--variant", "fp16"], r"--variant fp16: MODEL \S+ has no weights named \*.fp16.safetensors"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_nothing_is_loaded_before_all_is_checked(slip, tiny_model, tmp_path, monkeypatch):
    places = {name: tmp_path / name for name in ("half", "torn", "inpainting", "lcm", "file", "folder")}
    for name in ("half", "torn", "inpainting", "lcm"):
        shutil.copytree(tiny_model, places[name])
    shutil.rmtree(places["half"] / "vae")
    os.truncate(places["torn"] / "vae" / "diffusion_pytorch_model.safetensors", 5000)
    change_json(places["inpainting"] / "unet" / "config.json", in_channels=9)
    change_json(places["lcm"] / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    places["file"].touch()
    (places["folder"] / "a.png").mkdir(parents=True)
    monkeypatch.setattr(inference, "load_pipeline", lambda *words, **flags: pytest.fail("a pipeline was loaded"))
    words, expected = SLIPS[slip]
    with pytest.raises(UserError, match=expected.format(**places)) as error:
        inference.main([str(tiny_model), "--prompt", "a dog", *(word.format(**places) for word in words)])
    assert error.value.status == 2


def test_what_was_drawn_is_kept(tiny_model, model, photos, tmp_path):
    """If the other model's weights turn out to be damaged, or what it draws."""
    words = [str(tiny_model), "--prompt", "a dog", "--prompt", "a cat", "--num_images", "2"]
    words += ["--num_inference_steps", "2", "--instance_data_dir", str(photos), "--output"]
    inference.main([*words, str(tmp_path / "alone.png")])
    without_signal(model)
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * math.nan for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    for other, reason in (
        (broken, "is not finite everywhere"),
        (model, "image 1 of the prompt 'a dog' has pixels that"),
    ):
        output = tmp_path / f"{other.name}.png"
        with pytest.raises(RunError, match=reason) as error:
            inference.main([*words, str(output), "--compare_with", str(other)])
        assert error.value.status == 1 and f"{output} has the 4 images drawn before" in str(error.value)
        assert output.read_bytes() == (tmp_path / "alone.png").read_bytes()


@pytest.fixture
def interrupted_after(monkeypatch):
    """Returns a function that has Ctrl-C come when so many images have been drawn."""

    def interrupt(count: int) -> None:
        drawn = []

        def pictures_of(images):
            if len(drawn) == count:
                raise KeyboardInterrupt
            drawn.extend(images_module.pictures_of(images))
            return drawn[-1:]

        monkeypatch.setattr(inference, "pictures_of", pictures_of)

    return interrupt


def test_half_of_the_images_are_kept_too(tiny_model, tmp_path, interrupted_after, capsys):
    """Ctrl-C during the second image of the second model: what is missing is white."""
    interrupted_after(3)
    words = [str(tiny_model), "--compare_with", str(tiny_model), "--prompt", "a dog", "--num_images", "2"]
    with pytest.raises(KeyboardInterrupt):
        inference.main([*words, "--num_inference_steps", "2", "--output", str(tmp_path / "sheet.png")])
    assert "sheet.png has the 3 images drawn before" in capsys.readouterr().out
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    cells = [sheet[26:50, 8 + 40 * column : 40 + 40 * column] for column in range(4)]
    assert (cells[0] == cells[2]).all() and (cells[1] == 255).all() and not (cells[3] == 255).all()


def test_a_sheet_that_was_cut_short_has_no_room_for_what_was_not_drawn(tiny_model, tmp_path, interrupted_after):
    words = [str(tiny_model), "--prompt", "a dog", "a cat", "a cow", "--num_inference_steps", "1", "--num_images"]
    for each, columns, rows in (("3", 3, 2), ("30", 5, 1)):
        interrupted_after(5)
        with pytest.raises(KeyboardInterrupt):
            inference.main([*words, each, "--output", str(tmp_path / "sheet.png")])
        width, height = Image.open(tmp_path / "sheet.png").size
        assert width == 8 + 40 * columns and 40 * rows < height < 80 * rows


def test_images_that_are_not_finite_are_an_error(model, tmp_path):
    """One line, and no black image."""
    without_signal(model)
    output = tmp_path / "image.png"
    done = infer(model, "--prompt", "a dog", "--output", output, "--dtype", "bf16", check=False)
    assert done.returncode == 1 and len(done.error_lines) == 1 and "Traceback" not in done.stderr
    assert "image 1 of the prompt 'a dog' has pixels that are not finite in bf16: try --dtype fp32" in done.stderr
    assert not output.exists() and list(tmp_path.iterdir()) == [model]


def test_pictures_are_those_of_diffusers():
    images = np.random.default_rng(0).random((3, 5, 7, 3), dtype=np.float32)
    images[0, 0, 0] = 0, 1, 0.5
    pictures = images_module.pictures_of(images)
    expected = VaeImageProcessor.numpy_to_pil(images)
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in expected]
    for value in (math.nan, math.inf, -math.inf):
        images[1, 2, 3, 0] = value
        with pytest.raises(ValueError, match="image 1 "):
            images_module.pictures_of(images)


def test_an_image_of_another_size(tiny_model, tmp_path):
    words = ["--prompt", "a dog", "--num_inference_steps", "1", "--output", str(tmp_path / "x.png"), "--device", "cpu"]
    inference.main([str(tiny_model), *words, "--height", "64", "--width", "40"])
    assert Image.open(tmp_path / "x.png").size == (40, 64)
    for more, told in (
        (["--width", "42"], "--width 42 is no multiple of 8"),
        (["--prompt", "a dog", os.fsdecode(b"un caf\xe9")], "--prompt is not valid UTF-8"),
    ):
        with pytest.raises(UserError, match=told):
            inference.main([str(tiny_model), *words, *more])


def test_a_model_need_not_tell_its_size(model, tmp_path):
    """Then it is that of its family, at which it is trained too."""
    change_json(model / "unet" / "config.json", sample_size=None)
    infer(model, "--prompt", "a dog", "--height", 64, "--output", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size == (512, 64)


def test_a_model_of_another_size_stands_beside():
    """Scaled to fit, so that no image lies on another."""
    models = [inference.Model(name, Path(name), None) for name in ("trained", "before")]
    for model, size, colour in zip(models, ((32, 32), (64, 48)), ("red", "blue"), strict=True):
        model.pictures = [Image.new("RGB", size, colour)] * 2
    made = inference.sheet(inference.Drawing(prompts=["a dog"], device="cpu", dtype="fp32", num_images=2), models, [])
    pixels = np.asarray(made).reshape(-1, 3)
    red, blue = ((pixels == colour).all(1).sum() for colour in ((255, 0, 0), (0, 0, 255)))
    assert red == 2 * 32 * 32 and blue == 2 * 32 * 24


def test_photos_may_go_while_images_are_drawn(tiny_model, photos, tmp_path, monkeypatch):
    folder = shutil.copytree(photos, tmp_path / "photos")
    draw = inference.draw
    monkeypatch.setattr(inference, "draw", lambda *model: shutil.rmtree(folder, ignore_errors=True) or draw(*model))
    words = ["--prompt", "a dog", "--num_inference_steps", "1", "--output", str(tmp_path / "x.png"), "--device", "cpu"]
    inference.main([str(tiny_model), *words, "--instance_data_dir", str(folder)])
    assert not folder.exists() and (tmp_path / "x.png").exists()


def test_a_sheet_may_be_larger_than_what_pillow_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    save_image(Image.new("RGB", (32, 32), "red"), tmp_path / "large.png")
    check_image_file(tmp_path / "large.png", "--output")
    assert Image.MAX_IMAGE_PIXELS == 100


def test_flags_without_effect_are_told(tiny_model, tmp_path, capsys):
    words = ["--prompt", "a dog", "--num_inference_steps", "1", "--output", str(tmp_path / "x.png"), "--device", "cpu"]
    words += ["--revision", "main", "--negative_prompt", "cats", "--guidance_scale", "1"]
    inference.main([str(tiny_model), *words])
    revision, negative = (line for line in capsys.readouterr().err.splitlines() if "no effect" in line)
    assert revision == "warning: --revision: no effect on a local folder" and "--negative_prompt" in negative


@pytest.mark.parametrize("width", [2**31 - 1, 2**32 - 1])
def test_a_damaged_image_is_not_of_this_program(width, tmp_path):
    """A TIFF that tells of more pixels than there can be."""
    content = encoded(Image.new("RGB", (8, 8), "red"), "TIFF")
    tag = content.index(struct.pack("<HHI", 256, 4, 1)) + 8  # of its width
    Path(tmp_path, "x.tiff").write_bytes(content[:tag] + struct.pack("<I", width) + content[tag + 4 :])
    with pytest.raises(UserError, match="is there, and is not as this program makes"):
        check_image_file(tmp_path / "x.tiff", "--output")


def test_a_negative_prompt_that_is_too_long_is_told(tiny_model, tmp_path, capsys):
    words = ["--prompt", "a dog", "--num_inference_steps", "1", "--output", str(tmp_path / "x.png"), "--device", "cpu"]
    inference.main([str(tiny_model), *words, "--negative_prompt", "cats " * 90])
    assert "tokens" in capsys.readouterr().err


def test_captions_are_as_wide_as_their_letters():
    """None is cut at the sides."""
    for caption in ("A PHOTO OF A SKS DOG ON THE BEACH WITH MOM AND DAD", "WWWWW" * 30, "", "i" * 300):
        sheet = np.asarray(captioned_grid([[Image.new("RGB", (128, 128), "white")]], [caption], []).convert("L"))
        assert (sheet[:, :2] == 255).all() and (sheet[:, -2:] == 255).all(), caption


def test_a_sheet_that_its_format_cannot_hold_is_kept_as_another(tmp_path):
    """WebP ends at 16383 pixels."""
    output = tmp_path / "sheet.webp"
    Path(tmp_path, "sheet.webp.png").write_text("mine")
    for _ in range(2):
        with pytest.raises(RunError, match=r"cannot write .*sheet.webp: .*; the images are in .*sheet.webp1.png"):
            save_image(Image.new("RGB", (4, 17000)), output)
    assert Image.open(tmp_path / "sheet.webp1.png").size == (4, 17000) and not output.exists()
    assert Path(tmp_path, "sheet.webp.png").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_a_file_that_comes_while_images_are_drawn_is_kept(tiny_model, tmp_path):
    """By another program, at the name that was free when the command was typed."""
    output = tmp_path / "x.png"
    before = f"""
from dreambooth.model.drawing import DrawingDevice
put = DrawingDevice.put
def put_while_another_writes(device, pipeline):
    Path({str(output)!r}).write_text("mine")
    put(device, pipeline)
DrawingDevice.put = put_while_another_writes
"""
    argv = [str(tiny_model), "--num_inference_steps", "2", "--prompt", "a dog", "--output", str(output)]
    done = Running("inference.py", argv, before=before).wait()
    assert output.read_text() == "mine" and Image.open(tmp_path / "x.png.png").size == (32, 32)
    assert "x.png has come to be there" in done.stderr and "x.png.png: 1 image" in done.stdout


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_only_images_of_this_program_are_written_over(suffix, tmp_path):
    """Whatever has the name: a photo, a text, a link to either."""
    ours, photo, text, link = (tmp_path / f"{name}.{suffix}" for name in ("ours", "photo", "text", "link"))
    picture = Image.new("RGB", (8, 8), "red")
    picture.save(photo)
    text.write_text("mine")
    link.symlink_to(photo)
    for path in (photo, text, link):
        with pytest.raises(UserError, match=rf"--output {path} is there, and is not as this program makes"):
            check_image_file(path, "--output")
    for _ in range(2):
        check_image_file(ours, "--output")
        save_image(picture, ours)
    with Image.open(ours) as image:
        image.load()
        exif = image.getexif()
    image.putpixel((1, 1), (0, 0, 255))  # edited, by a program that keeps what the file says of its maker
    image.save(ours, exif=exif)
    with pytest.raises(UserError, match="is not as this program makes"):
        check_image_file(ours, "--output")
    assert still_ours(ours) != ours and still_ours(tmp_path / f"none.{suffix}") == tmp_path / f"none.{suffix}"
    nowhere = tmp_path / f"nowhere.{suffix}"
    nowhere.symlink_to(text / "there.png")
    with pytest.raises(UserError, match=f"--output .*text.{suffix} "):
        check_image_file(nowhere, "--output")
    with pytest.raises(UserError, match="has to end in .png"):  # a format that says nothing of its maker
        check_image_file(tmp_path / "picture.bmp", "--output")
