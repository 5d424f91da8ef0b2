"""What becomes of photos, captions and class images: what is read, what is generated, what is kept."""

import json
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from harness import COLOSSALAI, TRADITIONAL, Running, command_line, train
from PIL import Image
from safetensors.torch import load_file, save_file

from dreambooth.command_line.console import RunError, UserError
from dreambooth.command_line.flags import InstanceFlags, ModelFlags, PriorFlags
from dreambooth.data import images, latents, samples
from dreambooth.data.class_images import (
    Origin,
    check_class_images,
    check_origins,
    digest_of_weights,
    generate_class_images,
)
from dreambooth.data.images import (
    find_images,
    load_image,
    look_at,
    photo_of,
    pictures_of,
    png_of,
    save_new,
    scaled_image,
    scaled_size,
)
from dreambooth.data.instance_images import find_instance_images
from dreambooth.data.latents import cache_latents
from dreambooth.data.randomness import Stream, generator, starting_points
from dreambooth.data.samples import build_dataset, build_loader
from dreambooth.data.schedule import Schedule
from dreambooth.model.components import latent_shape, load_tokenizer
from dreambooth.model.pipeline import load_part, load_pipeline
from dreambooth.model.prompts import embed
from dreambooth.model.stable_diffusion import STABLE_DIFFUSION
from dreambooth.processes.environment import Place
from dreambooth.processes.ranks import Ranks
from dreambooth.processes.threads import ahead, in_threads
from dreambooth.run.image_file import save_image

BOTH = pytest.mark.parametrize("script", [COLOSSALAI, TRADITIONAL])
ALONE, CPU = Place(), Ranks(0, 1, torch.device("cpu"))


# Captions ------------------------------------------------------------------------------------------------------------


def folder_of(folder: Path, files: dict[str, str | None]) -> InstanceFlags:
    """Writes files, each a text or, for None, a picture of its own; returns the flags of a run on the folder."""
    folder.mkdir(exist_ok=True)
    for number, (name, text) in enumerate(files.items()):
        (folder / name).parent.mkdir(exist_ok=True)
        if text is None:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name, format="PNG")
        else:
            (folder / name).write_text(text)
    return InstanceFlags(instance_data_dir=str(folder), instance_prompt="a sks dog", resolution=8)


@pytest.mark.parametrize("name", ["1.txt", "1.TXT", "1.Caption", "1.png.txt", "1.png.caption"])
def test_a_caption_beside_an_image(name, tmp_path, capfd):
    flags = folder_of(tmp_path / "set", {"1.png": None, "2.PNG": None, name: "a dog on a sofa"})
    assert [photo.prompt for photo in find_instance_images(flags, ALONE)] == ["a dog on a sofa", "a sks dog"]
    told = capfd.readouterr()
    assert told.out == "captions: 1 of 2 images have one\n" and not told.err


def test_captions_go_by_names_in_any_case_of_letters(tmp_path, capfd):
    """But not where two images differ by that alone."""
    files = {"IMG_1.JPG": None, "img_2.png": None, "a.png": None, "A.png": None}
    captions = {"img_1.txt": "a dog", "IMG_2.PNG.TXT": "a cat", "a.txt": "a hat"}
    photos = find_instance_images(folder_of(tmp_path / "set", files | captions), ALONE)
    prompts = {Path(photo.name).name: photo.prompt for photo in photos}
    assert prompts == {"IMG_1.JPG": "a dog", "img_2.png": "a cat", "a.png": "a hat", "A.png": "a sks dog"}
    assert not capfd.readouterr().err


def test_two_captions_of_an_image_are_an_error(tmp_path):
    flags = folder_of(tmp_path / "set", {"1.png": None, "1.txt": "a dog", "1.caption": "a cat"})
    with pytest.raises(UserError, match=r"1\.png has two captions, in 1\.caption and in 1\.txt: remove one"):
        find_instance_images(flags, ALONE)


@pytest.mark.parametrize(
    "name", ["notes.txt", "captions.txt", "9.caption", "metadata.csv", "metadata.json", "1.json", "Metadata.jsonl"]
)
def test_a_file_that_looks_like_captions_and_is_not_read_is_told(name, tmp_path, capfd):
    flags = folder_of(tmp_path / "set", {"1.png": None, name: "1.png, a dog"})
    find_instance_images(flags, ALONE)
    told = capfd.readouterr()
    (warning,) = told.err.splitlines()
    assert f"{name} is not read (1 such), captions are in NAME.txt" in warning
    assert told.out == "captions: 0 of 1 images have one\n"


def test_folders_of_other_trainers_are_told(tmp_path, capfd):
    files = {"1.png": None, "10_sks dog/2.png": None, "more/notes.md": "", ".hidden/3.png": None}
    find_instance_images(folder_of(tmp_path / "set", files), ALONE)
    told = capfd.readouterr()
    (warning,) = told.err.splitlines()
    assert 'images in 10_sks dog are not looked at (1 such folders): give "sks dog" as --instance_prompt' in warning
    assert not told.out


# Photos --------------------------------------------------------------------------------------------------------------


def large_photo(path: Path, width: int = 1200, height: int = 900, **options) -> Path:
    """Writes a photo without sharp edges, as a camera's is seen from afar."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(path, **options)
    return path


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_photo_is_scaled_as_if_it_had_been_decoded_whole(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = look_at(photo_of(large_photo(tmp_path / "x.jpg", quality=95, exif=exif)))
    assert photo.facts.size == ((1200, 900) if orientation == 1 else (900, 1200))
    scaled = load_image(photo, 64)
    assert scaled.size == scaled_size(photo.facts.size, 64) and min(scaled.size) == 64
    whole = load_image(photo).resize(scaled.size, Image.Resampling.BILINEAR)
    assert abs(np.asarray(whole).astype(int) - np.asarray(scaled)).max() <= 3


@pytest.mark.parametrize("size", [(30_000, 1), (3, 5), (64, 900)])
def test_a_photo_that_is_small_along_a_side_is_kept_as_it_is(size):
    assert scaled_size(size, 64) == size


def counted(photo, reads: list):
    """Returns a photo that notes when its file is read."""
    return replace(photo, read=lambda: [reads.append(photo.name), Path(photo.name).read_bytes()][1])


def test_a_photo_is_decoded_once(tmp_path, monkeypatch):
    """Once it has been looked at; and again only where the memory for such images is too small."""
    assert images._scaled.limit == 2**28
    monkeypatch.setattr(images, "_scaled", images._RecentlyUsed(limit=2 * 64 * 86 * 3))
    reads = []
    photos = []
    for number in range(3):
        path = large_photo(tmp_path / f"{number}.jpg", 1200 + 4 * number)
        photos.append(look_at(counted(photo_of(path), reads), 64))
    assert len(reads) == 3
    for _ in range(5):
        scaled_image(photos[2], 64)
        scaled_image(photos[1], 64)
    assert len(reads) == 3
    scaled_image(photos[0], 64)
    assert reads[3:] == [photos[0].name]


def test_threads_wait_for_the_one_that_decodes_a_photo(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_scaled", images._RecentlyUsed(limit=2**20))
    reads, path = [], large_photo(tmp_path / "x.jpg")
    photo = replace(counted(photo_of(path), reads), facts=look_at(photo_of(path)).facts)
    scaled = list(in_threads(lambda _: scaled_image(photo, 64), range(8), threads=4))
    assert len(reads) == 1 and all(image is scaled[0] for image in scaled)


def test_a_photo_that_has_changed_is_named(tmp_path):
    """Whoever reads it sees to it that it is the one whose digest the ranks and the checkpoint have compared."""
    path = large_photo(tmp_path / "x.jpg")
    photo = look_at(photo_of(path))
    assert scaled_image(photo, 64)
    large_photo(path, 1000)
    with pytest.raises(UserError, match="x.jpg is not the one that was there when the run began"):
        scaled_image(photo, 32)


def test_each_rank_looks_at_its_share_in_threads(tmp_path):
    for number in range(7):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    shares = [find_images(tmp_path, "--x", place=Place(rank, 3)) for rank in range(3)]
    looked = [{photo.name for photo in share if photo.facts} for share in shares]
    assert [len(names) for names in looked] == [3, 2, 2] and len(set.union(*looked)) == 7
    (tmp_path / "3.png").write_bytes(b"")
    (tmp_path / "5.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"3\.png"):
        find_images(tmp_path, "--x")


def test_what_is_taken_ahead_is_in_order_and_not_far():
    taken = []

    def numbers():
        for number in range(50):
            taken.append((number, threading.current_thread()))
            yield number
        raise ValueError("50")

    done = []
    with pytest.raises(ValueError, match="50"):
        for number in ahead(numbers()):
            done.append(number)
            assert len(taken) <= number + 3
    assert done == list(range(50)) and {thread for _, thread in taken}.isdisjoint({threading.current_thread()})
    assert list(ahead(iter([]))) == [] and list(ahead(iter([None]))) == [None]


def test_work_in_threads_is_in_order_and_not_far_ahead():
    begun, lock = [], threading.Lock()

    def work(number: int) -> int:
        with lock:
            begun.append(number)
        time.sleep(0.01 * (number % 3 == 0))
        if number == 50:
            raise ValueError("50")
        return number

    done = []
    with pytest.raises(ValueError, match="50"):
        for number in in_threads(work, range(10**6), threads=3):
            done.append(number)
            assert len(begun) <= len(done) + 6
    assert done == list(range(50))


def test_two_runs_write_one_image_at_once(tmp_path, monkeypatch):
    """The second begins and ends while the first has yet to give its file the name."""
    path, red, blue = tmp_path / "00000.png", *(Image.new("RGB", (8, 8), color) for color in ("red", "blue"))

    def slow(*names):
        monkeypatch.undo()
        save_image(blue, path)
        assert save_new(png_of(blue, ""), tmp_path / "new.png")
        os.replace(*names)

    monkeypatch.setattr(os, "replace", slow)
    save_image(red, path)
    assert not save_new(png_of(red, ""), tmp_path / "new.png")
    found = [load_image(photo_of(one)).tobytes() for one in (path, tmp_path / "new.png")]
    assert found == [red.tobytes(), blue.tobytes()]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("links", [True, False])
def test_an_image_that_is_there_is_kept(links, tmp_path, monkeypatch):
    if not links:  # as on exFAT

        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "00000.png"
    assert save_new(b"first", path) and not save_new(b"second", path)
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~images_umask()


def images_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_pictures_are_those_of_diffusers_and_finite(tiny_model):
    from diffusers.image_processor import VaeImageProcessor

    drawn = np.random.default_rng(0).random((3, 8, 8, 3), dtype=np.float32)
    expected = VaeImageProcessor.numpy_to_pil(drawn)
    assert [image.tobytes() for image in pictures_of(drawn)] == [image.tobytes() for image in expected]
    for value in (np.nan, np.inf):
        drawn[1, 2, 3, 0] = value
        with pytest.raises(ValueError, match="image 1 has pixels that are not finite"):
            pictures_of(drawn)


# Class images --------------------------------------------------------------------------------------------------------


SMALL = InstanceFlags(resolution=32)


def prior_flags(folder: Path, images: int = 3, prompt: str = "a dog") -> PriorFlags:
    return PriorFlags(
        with_prior_preservation=True,
        class_data_dir=str(folder),
        class_prompt=prompt,
        num_class_images=images,
        sample_batch_size=2,
    )


def generate(model: Path, prior: PriorFlags, *, seed: int = 1, change=lambda pipeline: None, dry_run: bool = False):
    """Does what a trainer does about class images; `change` may change the pipeline that draws them, quickly."""
    flags = ModelFlags(pretrained_model_name_or_path=str(model))

    def load():
        pipeline = load_pipeline(model)
        change(pipeline)
        draw = type(pipeline).__call__
        quick = type("Quick", (type(pipeline),), {"__call__": lambda *a, **k: draw(*a, num_inference_steps=2, **k)})
        pipeline.__class__ = quick
        return pipeline

    found = check_class_images(prior, SMALL, ALONE)
    check_origins(prior, flags, found, model, {})
    how = {"resolution": SMALL.resolution, "seed": seed, "ranks": CPU, "dry_run": dry_run}
    return generate_class_images(prior, SMALL, flags, found, load, model, {}, **how)


def test_class_images_know_what_they_were_made_from(tiny_model, tmp_path, capfd):
    """Another prompt or model is refused; a seed of another run is told; what is missing comes from this run's."""
    first = generate(tiny_model, prior_flags(tmp_path / "class", images=2))
    assert "class images: 2 of 2 are generated first" in capfd.readouterr().out
    for path in (tmp_path / "class").iterdir():
        origin = json.loads(Image.open(path).text["dreambooth"])
        assert origin["prompt"] == "a dog" and origin["seed"] == 1 and origin["model"] == tiny_model.name
        assert str(tmp_path) not in str(origin)
    with pytest.raises(UserError, match="00000.png was generated for 'a dog', and --class_prompt is 'a cat': name an"):
        check_class_images(prior_flags(tmp_path / "class", prompt="a cat"), SMALL, ALONE)

    # The same model in another place and in fp16 is no other; a variant of other weights is.
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model, moved)
    weights = moved / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(weights).items()}
    variant = weights.with_name("diffusion_pytorch_model.fp16.safetensors")
    save_file(tensors, variant)
    weights.unlink()
    assert (
        digest_of_weights(moved, {}, None)
        == digest_of_weights(tiny_model, {}, None)
        == digest_of_weights(moved, {"unet": moved / "unet"}, None)
    )
    variant.rename(weights)
    of_average = weights.with_name("diffusion_pytorch_model.non_ema.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, of_average)
    assert digest_of_weights(moved, {}, None) == digest_of_weights(tiny_model, {}, None)
    assert digest_of_weights(moved, {}, "non_ema") not in ("", digest_of_weights(moved, {}, None))
    photos = generate(moved, prior_flags(tmp_path / "class"), seed=2)
    told = "class images: 2 found in {} (2 generated by an earlier run, from seed 1), 1 of 3 are generated first"
    assert told.format(tmp_path / "class") in capfd.readouterr().out
    assert [photo.facts.digest for photo in photos[:2]] == [photo.facts.digest for photo in first]
    assert [photo.prompt for photo in photos] == ["a dog"] * 3
    assert all(look_at(photo) == photo for photo in photos), "the facts are those of the files"

    # One that is trained is another, whatever its name.
    tensors["decoder.conv_out.bias"] += 0.1
    save_file(tensors, weights)
    with pytest.raises(UserError, match="00000.png was generated by .*, whose weights are not those of moved: name"):
        generate(moved, prior_flags(tmp_path / "class"))
    assert len(list((tmp_path / "class").iterdir())) == 3


def test_class_images_of_ones_own_and_of_older_versions_are_used(tiny_model, tmp_path, capfd):
    """Black ones are told by name, as an earlier version made them of pixels that are not finite."""
    large_photo(tmp_path / "mine.jpg")
    Image.new("RGB", (32, 32)).save(tmp_path / "00001.png")
    photos = generate(tiny_model, prior_flags(tmp_path))
    assert [Path(photo.name).name for photo in photos] == ["00000.png", "00001.png", "mine.jpg"]
    told = capfd.readouterr()
    assert f"class images: 2 found in {tmp_path} (2 of unknown origin), 1 of 3 are generated first" in told.out
    (warning,) = (line for line in told.err.splitlines() if line.startswith("warning: "))
    assert "00001.png is of one colour (1 such)" in warning


def test_class_images_that_are_all_there_may_be_on_a_disk_that_takes_none(tiny_model, tmp_path, monkeypatch):
    generate(tiny_model, prior_flags(tmp_path, images=2))
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert len(check_class_images(prior_flags(tmp_path, images=2), SMALL, ALONE)) == 2
    with pytest.raises(UserError, match="--class_data_dir .*: no permission to read and write"):
        check_class_images(prior_flags(tmp_path), SMALL, ALONE)


def test_a_dry_run_stands_in_for_class_images(tiny_model, tmp_path, capfd):
    photos = generate(tiny_model, prior_flags(tmp_path / "class"), dry_run=True)
    assert len(photos) == 3 and all(photo.facts.size == (32, 32) and photo.facts.digest for photo in photos)
    assert "class images: 3 of 3 would be generated first" in capfd.readouterr().out
    assert not (tmp_path / "class").exists()


def makes_no_numbers(pipeline) -> None:
    """A noise schedule that ends without signal, for a model that predicts noise; fp16 can overflow likewise."""
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )


def test_class_images_that_are_not_finite_are_not_written(tiny_model, tmp_path):
    with pytest.raises(RunError, match="class image 00000.png, drawn in fp32, has .* not finite: try --mixed_prec"):
        generate(tiny_model, prior_flags(tmp_path / "class"), change=makes_no_numbers)
    assert list((tmp_path / "class").iterdir()) == []


def test_runs_of_two_seeds_share_no_class_image(tiny_model, tmp_path):
    photos = [generate(tiny_model, prior_flags(tmp_path / str(seed)), seed=seed) for seed in (1, 2)]
    made = [load_image(photo).tobytes() for of_seed in photos for photo in of_seed]
    assert len(set(made)) == len(made) == 6


def test_a_class_image_follows_from_the_seed_and_its_number(tiny_model):
    """To rounding whatever the batch, and no two seeds, nor class and validation images, share one."""
    pipeline = load_pipeline(tiny_model)
    pipeline.set_progress_bar_config(disable=True)

    def draw(seed: int, size: int, stream: Stream = Stream.CLASS_IMAGE) -> np.ndarray:
        batches = [range(first, min(first + size, 4)) for first in range(0, 4, size)]
        settings = {"num_inference_steps": 3, "output_type": "np"}
        points = [starting_points(pipeline, seed, stream, batch) for batch in batches]
        return np.concatenate([pipeline(["a dog"] * len(p["latents"]), **settings, **p).images for p in points])

    of_samplers = [starting_points(pipeline, seed, Stream.CLASS_IMAGE, range(4))["generator"] for seed in (1, 2)]
    assert len({one.initial_seed() for of_seed in of_samplers for one in of_seed}) == 8
    for scheduler in (type(pipeline.scheduler), EulerAncestralDiscreteScheduler):
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        one, other = draw(1, 1), draw(1, 3)
        np.testing.assert_allclose(one, other, atol=1e-4)
        everything = [*one, *draw(2, 1), *draw(1, 1, Stream.VALIDATION)]
        for number, image in enumerate(everything):
            assert all(abs(image - another).max() > 0.1 for another in everything[:number])


@pytest.mark.parametrize("sides", [(16, 16), None])
def test_a_size_may_be_two_sides_or_that_of_the_vae(sides, tiny_model):
    """As diffusers' configurations have it."""
    pipeline = load_pipeline(tiny_model)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        points = starting_points(pipeline, 1, Stream.VALIDATION, [0])
        return pipeline("a dog", num_inference_steps=1, output_type="np", **points).images

    expected = draw()
    pipeline.unet.register_to_config(sample_size=sides)
    assert np.array_equal(draw(), expected)


def test_what_a_run_that_died_has_left_is_removed(tiny_model, tmp_path):
    """Not what another one is about to write, nor what is not this tool's."""
    names = [".00000.png.partial", ".00001.png.12-ab34cd56.partial", ".00002.png.13-00000000.partial", ".mine.partial"]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    for name in (names[0], names[1], names[3]):
        os.utime(tmp_path / name, (0, 0))
    generate(tiny_model, prior_flags(tmp_path, images=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names[2], names[3], "00000.png"])


def test_an_image_that_another_run_has_written_meanwhile(tiny_model, tmp_path):
    """It is kept and used if it is of the same origin, else the run ends."""
    prior = prior_flags(tmp_path, images=2)
    weights = digest_of_weights(tiny_model, {}, None)

    def written(prompt: str):
        origin = Origin("other", weights, prompt, 7)
        content = png_of(Image.new("RGB", (32, 32), "red"), json.dumps(vars(origin)))
        return lambda pipeline: save_new(content, tmp_path / "00001.png")

    photos = generate(tiny_model, prior, change=written("a dog"))
    assert [photo.facts.size for photo in photos] == [(32, 32)] * 2
    assert load_image(photos[1]).getpixel((0, 0)) == (255, 0, 0)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="00001.png was generated for 'a cat', and --class_prompt is 'a dog'"):
        generate(tiny_model, prior, change=written("a cat"))


# Runs ----------------------------------------------------------------------------------------------------------------

# A trainer whose ranks do not share their class folders.
APART = """
import os, sys
from dreambooth.data import class_images
from dreambooth.command_line.console import run_program
import {module} as trainer
class_images.APPEARS_WITHIN_S = 1
run_program(lambda: trainer.main([word.replace("@RANK", os.environ["RANK"]) for word in sys.argv[1:]]), "apart")
"""


@BOTH
def test_ranks_that_do_not_share_a_class_folder(script, flags, prior, tmp_path):
    """The first file that a rank does not find is named, and no step is taken."""
    (tmp_path / "apart.py").write_text(APART.format(module=Path(script).stem))
    flags |= prior | {"class_data_dir": tmp_path / "@RANK", "max_train_steps": 1, "num_class_images": 2}
    flags |= {"sample_batch_size": 1}
    done = Running(str(tmp_path / "apart.py"), command_line(flags), nproc=2).wait(check=False)
    assert done.returncode == 1 and len(done.error_lines) == 1, done.stderr
    assert (
        "does not find 0000" in done.error_lines[0]
        and "give all processes a folder of one file" in done.error_lines[0]
    )
    assert not (flags["output_dir"] / "model_index.json").exists()


@BOTH
def test_validation_images_that_are_not_finite_end_nothing(script, flags, tiny_model, tmp_path):
    """They are told. So is a class image of the same model, and ends the run."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    index = json.loads((model / "model_index.json").read_text()) | {"scheduler": ["diffusers", "DDIMScheduler"]}
    (model / "model_index.json").write_text(json.dumps(index))
    path = model / "scheduler" / "scheduler_config.json"
    config = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    flags |= {"pretrained_model_name_or_path": model, "max_train_steps": 1}
    done = train(script, flags | {"validation_prompt": "dog", "num_validation_images": 1})
    (warning,) = (line for line in done.stderr.splitlines() if line.startswith("warning: no valid"))
    assert "no validation images of step 1: image 0 has pixels that are not finite" in warning
    assert (flags["output_dir"] / "model_index.json").exists() and not (flags["output_dir"] / "validation").exists()


@pytest.mark.parametrize(
    ("script", "says", "told"),
    [
        (COLOSSALAI, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublas", "out of GPU memory while drawing"),
        (TRADITIONAL, "a sampler does not like it", "RuntimeError: a sampler does not like it"),
    ],
)
def test_validation_images_that_cannot_be_drawn_end_nothing(script, says, told, flags):
    """Also where memory is short by a library's own words."""
    fails = (
        "import dreambooth.run.validation as validation\n"
        f"def fails(*others): raise RuntimeError('{says}')\n"
        "validation._draw = fails"
    )
    flags |= {"max_train_steps": 1, "validation_prompt": "dog", "num_validation_images": 1}
    done = train(script, flags, before=fails)
    (warning,) = (line for line in done.stderr.splitlines() if line.startswith("warning: no valid"))
    assert f"no validation images of step 1: {told}" in warning
    assert (flags["output_dir"] / "model_index.json").exists()


# Latents and prompts -------------------------------------------------------------------------------------------------


def to_be_cached(tiny_model, photos, **changed):
    """Returns a data set of photos, whose 11, 5, 1, 4 and 8 crops are to be cached, and the VAE that encodes them."""
    vae = load_part(STABLE_DIFFUSION, "vae", tiny_model).requires_grad_(False)
    settings = {"seed": 1, "resolution": 32, "latent_shape": latent_shape(vae, 32), "num_timesteps": 10}
    settings |= {"center_crop": False} | changed
    return build_dataset(find_images(photos, "--x", resolution=32), [], **settings), vae


@pytest.mark.parametrize("which", ["on", "auto"])
def test_latents_are_cached_in_fp32_whatever_the_precision(which, tiny_model, photos):
    """And the VAE ends on the CPU, or in the run's precision where steps still need it."""
    dataset, vae = to_be_cached(tiny_model, photos)
    (part,) = dataset.sets
    exact = load_part(STABLE_DIFFUSION, "vae", tiny_model).requires_grad_(False)
    moves, move = [], vae.to
    vae.to = lambda *where: moves.append(where) or move(*where)
    is_complete = cache_latents(dataset, vae, CPU, Schedule(5, 1, 1), dtype=torch.bfloat16, which=which)
    assert is_complete == (which == "on")
    assert moves[-1] == (("cpu",) if is_complete else (CPU.device, torch.bfloat16)), "a cached run needs no VAE"
    assert len(part.moments) == (5 if is_complete else 1)
    for crop, moments in part.moments.items():
        with torch.no_grad():
            posterior = exact.encode(part.pixel_values(crop)[None]).latent_dist
        expected = torch.cat([posterior.mean, posterior.std]) * exact.config.scaling_factor
        torch.testing.assert_close(moments, expected, rtol=1e-4, atol=1e-5)
    assert vae.dtype == (torch.float32 if is_complete else torch.bfloat16)


def test_each_crop_that_a_run_takes_is_encoded_once(tiny_model, photos, capfd):
    """A run that goes on leaves out those that it takes no more, but for some: its batches are of the same crops."""
    kept, batches = {}, {}
    for first_step in (0, 20):
        dataset, vae = to_be_cached(tiny_model, photos)
        (part,) = dataset.sets
        encoded, encode = [], vae.encode
        vae.encode = lambda images, encode=encode, encoded=encoded: encoded.append(images) or encode(images)
        assert cache_latents(dataset, vae, CPU, Schedule(1, 1, 22), first_step, which="on")
        assert all("latents" in part[n] for n in range(first_step, 22))
        told = capfd.readouterr().out
        assert "latents of 5 of 5 images cached in " in told and f", {len(part.moments)} crops, 0." in told
        kept[first_step], batches[first_step] = part.moments, encoded
    taken = {part.crop(n, generator(1, part.draws, n)) for n in range(22)}
    sizes = [len(batch) for batch in batches[0]]
    assert kept[0].keys() == taken and sum(sizes) == len(taken) and {*sizes[:-1]} == {4}
    assert 1 <= len(batches[20]) <= 2 < len(sizes)
    assert all(any(torch.equal(batch, other) for other in batches[0]) for batch in batches[20])
    assert all(torch.equal(moments, kept[0][crop]) for crop, moments in kept[20].items())
    part.moments.clear()
    assert cache_latents(dataset, vae, CPU, Schedule(1, 1, 22), 22, which="on") and not part.moments


@pytest.mark.parametrize(
    "steps, room, dtype, places",
    [
        (1, 29, torch.bfloat16, {2}),
        # Each photo is taken 16 times; that of 8 crops shows 7 of them on average, that of 11 crops 8.6.
        (16, 29, torch.bfloat16, {1, 2, 3, 4}),
        (10**9, 29, torch.bfloat16, {0, 1, 2, 3, 4}),
        (10**9, 7, torch.bfloat16, {1, 2}),
        (1, 29, torch.float32, {0, 1, 2, 3, 4}),
        (10**9, 7, torch.float32, {1, 2}),
    ],
)
def test_latents_are_cached_where_it_halves_the_encoding(steps, room, dtype, places, tiny_model, photos, monkeypatch):
    """On average, or costs nothing, and as far as there is room. Where the run goes on makes no difference."""
    monkeypatch.setattr(latents, "CACHE_BYTES", room * 2 * 4 * 4 * 16 * 16)
    for first_step in (0, steps - 1):
        dataset, vae = to_be_cached(tiny_model, photos)
        is_complete = cache_latents(dataset, vae, CPU, Schedule(5, 1, steps), first_step, dtype=dtype)
        assert is_complete == (len(places) == 5)
        assert {place for place, _ in dataset.sets[0].moments} == places


@pytest.mark.parametrize(
    "device, workers, decodes, started",
    [
        *[("cuda", None, True, min(4, os.cpu_count())), ("cuda", None, False, 0), ("cpu", None, True, 0)],
        *[("cuda", 3, False, 3), ("cuda", 0, True, 0), ("cpu", 2, False, 2)],
    ],
)
def test_processes_decode_where_there_is_something_to_decode(device, workers, decodes, started, monkeypatch):
    """Or where it is asked for; a thread makes the batches on a GPU machine otherwise."""
    found = {}

    class Loader(list):
        def __init__(self, dataset, **settings):
            found.update(settings)

    monkeypatch.setattr(samples, "DataLoader", Loader)
    monkeypatch.setattr(samples, "ahead", lambda batches: found.update(in_thread=True) or batches)
    ranks = Ranks(0, 1, torch.device(device))
    assert not list(build_loader([], Schedule(1, 1, 1), ranks, workers=workers, decodes=decodes))
    assert found["num_workers"] == started and found["pin_memory"] == (device == "cuda" and started > 0)
    assert found.get("in_thread", False) == ((device, workers, decodes) == ("cuda", None, False))


def test_prompts_are_embedded_in_fp32_and_travel_with_their_batch(tiny_model, photos):
    tokenizer = load_tokenizer(tiny_model / "tokenizer")
    encoders = {"text_encoder": load_part(STABLE_DIFFUSION, "text_encoder", tiny_model)}
    tokens = STABLE_DIFFUSION.tokenize(["a sks dog", "a dog"] * 40, {"tokenizer": tokenizer}, encoders)
    with torch.no_grad():
        exact = encoders["text_encoder"](tokens["input_ids"])[0]
    embedded = embed(STABLE_DIFFUSION, tokens, encoders, device=torch.device("cpu"), dtype=torch.bfloat16)
    prompts = embedded["encoder_hidden_states"]
    assert prompts.device.type == "cpu" and torch.equal(prompts, exact.bfloat16())
    found = [replace(photo, prompt=f"{n % 2}") for n, photo in enumerate(find_images(photos, "--x", resolution=32))]
    settings = {"resolution": 32, "center_crop": True, "latent_shape": (4, 16, 16), "num_timesteps": 10}
    dataset = build_dataset(found, [], seed=1, **settings)
    for (batch,) in build_loader(dataset, Schedule(3, 1, 2), CPU, conditioning={"encoder_hidden_states": prompts}):
        assert torch.equal(batch["conditioning"]["encoder_hidden_states"], prompts[batch["prompt_indices"]])
