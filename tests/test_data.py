"""Images, the stream of samples, and random draws."""

import itertools
import resource

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.command_line.console import RunError, UserError
from dreambooth.data.class_images import image_name, missing_numbers
from dreambooth.data.images import (
    Facts,
    Photo,
    crop_to_square,
    facts_of_all,
    find_images,
    list_images,
    load_image,
    photo_of,
)
from dreambooth.data.randomness import Stream, generator
from dreambooth.data.samples import Examples, collate
from dreambooth.data.schedule import Schedule
from dreambooth.run.image_file import save_image


def photos_in(folder) -> list:
    return facts_of_all([photo_of(path) for path in list_images(folder)])


def examples(photos, **changed) -> Examples:
    settings = dict(
        prompt_indices={"": 0},
        seed=3,
        order=Stream.INSTANCE_ORDER,
        draws=Stream.INSTANCE_SAMPLE,
        resolution=16,
        center_crop=False,
        latent_shape=(4, 8, 8),
        num_timesteps=1000,
    )
    return Examples(photos, **(settings | changed))


def test_only_images_are_found_and_in_order(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.webp", "d.bmp", "e.jpeg", ".hidden.png", "notes.txt", "f.png.partial"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG", "c.webp", "d.bmp", "e.jpeg"]
    assert len(find_images(tmp_path, "--x", limit=2)) == 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "CMYK", "1"])
def test_every_mode_becomes_rgb_over_white(tmp_path, mode):
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    suffix = "jpg" if mode == "CMYK" else "png"
    image.convert(mode).save(tmp_path / f"image.{suffix}")
    loaded = load_image(photo_of(tmp_path / f"image.{suffix}"))
    assert loaded.mode == "RGB"
    if mode in ("RGBA", "LA"):
        assert loaded.getpixel((1, 0)) == (255, 255, 255)


def test_crop_keeps_the_shorter_side_and_the_place(tmp_path):
    """Left third red, middle green, right blue: where along the long side it begins decides what is seen."""
    image = Image.new("RGB", (30, 10), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 10, 10))
    image.paste((0, 0, 255), (20, 0, 30, 10))
    for offset, channel in ((0, 0), (10, 1), (20, 2)):
        cropped = crop_to_square(image, 20, offset)
        assert cropped.shape == (3, 20, 20) and cropped.dtype == torch.float32
        expected = torch.full((3, 20, 20), -1.0)
        expected[channel] = 1.0
        torch.testing.assert_close(cropped, expected)


def test_a_sample_is_a_function_of_its_number_alone(photos):
    paths = photos_in(photos)
    forwards = [examples(paths)[n] for n in range(8)]
    backwards = [examples(paths)[n] for n in reversed(range(8))][::-1]
    for first, second in zip(forwards, backwards, strict=True):
        for key in first.keys() - {"of_view"}:
            assert torch.equal(first[key], second[key])
    noises = {tuple(sample["noise"].flatten().tolist()) for sample in forwards}
    assert len(noises) == 8
    other_seed = examples(paths, seed=4)[0]
    assert not torch.equal(other_seed["noise"], forwards[0]["noise"])
    prior = examples(paths, draws=Stream.CLASS_SAMPLE)[0]
    assert not torch.equal(prior["noise"], forwards[0]["noise"])


def test_center_crop_changes_no_other_draw(photos):
    paths = photos_in(photos)
    random, center = examples(paths)[0], examples(paths, center_crop=True)[0]
    assert torch.equal(random["noise"], center["noise"])
    assert not torch.equal(random["pixel_values"], center["pixel_values"])


def test_draws_have_the_distribution_that_they_claim(photos):
    samples = [examples(photos_in(photos)[:1], num_timesteps=10)[n] for n in range(400)]
    noise = torch.stack([sample["noise"] for sample in samples])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs((noise * torch.stack([sample["posterior_noise"] for sample in samples])).mean()) < 0.01
    timesteps = torch.stack([sample["timesteps"] for sample in samples])
    assert set(timesteps.tolist()) == set(range(10))
    assert timesteps.bincount().max() < 70


@pytest.mark.parametrize("count", [1, 3, 5])
def test_every_pass_takes_every_image_once_in_a_new_order(photos, count):
    paths = photos_in(photos)[:count]
    stream = examples(paths)
    passes = [[stream.place_of(p * count + i) for i in range(count)] for p in range(20)]
    assert all(sorted(one) == list(range(count)) for one in passes)
    if count > 1:
        assert len({tuple(one) for one in passes}) > 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 32])
def test_ranks_share_consecutive_samples(world_size, batch):
    """Also where a step takes more samples than there are images."""
    schedule = Schedule(batch=batch, world_size=world_size, steps=3)
    steps = zip(*[schedule.batches(rank) for rank in range(world_size)], strict=True)
    for step, shares in enumerate(steps):
        assert all(len(share) == batch for share in shares)
        first = step * schedule.total_batch
        assert list(itertools.chain(*shares)) == list(range(first, first + schedule.total_batch))
    assert list(schedule.batches(0, first_step=2)) == list(schedule.batches(0))[2:]


def test_generators_never_overlap():
    draws = [generator(1, stream, n).integers(2**63, size=4) for stream in Stream for n in range(50)]
    assert len(np.unique(np.concatenate(draws))) == len(draws) * 4
    first, second = generator(7, Stream.CLASS_ORDER, 0), generator(7, Stream.CLASS_ORDER, 1)
    ahead = first.integers(2**63, size=100_000)
    assert not np.isin(second.integers(2**63, size=100), ahead).any()


def test_collate_puts_instance_examples_before_class_examples(photos):
    paths = photos_in(photos)
    instance, prior = examples(paths), examples(paths, prompt_indices={"": 1})
    batch = collate([[instance[n], prior[n]] for n in range(3)])
    assert batch["prompt_indices"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch["pixel_values"].shape == (6, 3, 16, 16)
    assert torch.equal(batch["noise"][4], prior[1]["noise"])


def test_a_view_is_what_the_pixels_are_of(photos):
    """Where in the scaled photo the square lies; what a family reads of it goes with the example into the batch."""
    paths = photos_in(photos)

    def of_view(view):
        return {"time_ids": torch.tensor([*view.original_size, *view.crop, *view.size])}

    stream = examples(paths, of_view=of_view)
    for place, photo in enumerate(paths):
        for offset in stream.offsets(place):
            view = stream.view((place, offset))
            width, height = photo.facts.size
            assert view.original_size == (height, width) and view.size == (16, 16) and min(view.crop) == 0
            whole = load_image(photo).resize(
                (round(width * 16 / min(photo.facts.size)), round(height * 16 / min(photo.facts.size)))
            )
            top, left = view.crop
            shown = np.asarray(whole)[top : top + 16, left : left + 16] / 127.5 - 1
            error = np.abs(shown.transpose(2, 0, 1) - stream.pixel_values((place, offset)).numpy()).mean()
            assert error < 0.1, (place, offset)
    batch = collate([[stream[n]] for n in range(3)])
    assert batch["conditioning"]["time_ids"].shape == (3, 6) and "of_view" not in batch
    assert batch["conditioning"]["time_ids"][:, 4:].eq(16).all()


@pytest.mark.parametrize("size", [(64, 54), (54, 64), (63, 54), (16, 20)])
def test_a_view_is_right_to_the_pixel(size, tmp_path):
    """Also where the longer side comes out between two whole numbers of pixels when the photo is scaled."""
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png")
    stream = examples(photos_in(tmp_path))
    whole = torch.from_numpy(np.asarray(load_image(stream.photos[0], 16)) / np.float32(127.5) - 1).permute(2, 0, 1)
    for offset in stream.offsets(0):
        top, left = stream.view((0, offset)).crop
        torch.testing.assert_close(stream.pixel_values((0, offset)), whole[:, top : top + 16, left : left + 16])


def photo(width: int, height: int) -> Photo:
    """Returns a photo that has been looked at and cannot be read again."""
    return Photo("x", "", lambda: b"", Facts(b"", (width, height), False, ""))


@pytest.mark.parametrize(
    "size, offsets, of_view",
    [
        # 683 x 512 when scaled: the VAE makes a latent of 8 pixels.
        ((4032, 3024), range(0, 172, 8), (168, 512)),
        ((3024, 4032), range(0, 172, 8), (168, 512)),
        ((512, 512), range(1), (0, 512)),
        ((2001, 2000), range(1), (0, 512)),
        # Four pixels make a latent of a photo that is scaled up to twice its size, none of one of 40 pixels.
        ((1000, 256), range(0, 745, 4), (744 * 2, 512)),
        ((42, 40), range(3), (26, 512)),
    ],
)
def test_crops_lie_on_the_grid_of_the_latents(size, offsets, of_view):
    stream = examples([photo(*size)], resolution=512, latent_shape=(4, 64, 64))
    assert list(stream.offsets(0)) == list(offsets)
    view = stream.view((0, offsets[-1]))
    assert (max(view.crop), view.size[0]) == of_view and min(view.crop) == 0
    assert (view.crop[0] == 0) == (size[0] >= size[1]) or len(offsets) == 1
    taken = [stream.crop(n, generator(3, stream.draws, n)) for n in range(200 * len(offsets))]
    times = np.bincount([offsets.index(offset) for _, offset in taken], minlength=len(offsets))
    assert times.min() > 130 and times.max() < 280, "each is as likely as any other"


@pytest.mark.parametrize("size, offset", [((4032, 3024), 86), ((3024, 4032), 86), ((1000, 257), 372), ((512, 512), 0)])
def test_the_crop_at_the_centre_is_there_to_the_pixel(size, offset):
    stream = examples([photo(*size)], resolution=512, latent_shape=(4, 64, 64), center_crop=True)
    assert list(stream.offsets(0)) == [offset]


@pytest.mark.parametrize("first, last", [(0, 7), (3, 60), (0, 10**9), (10**9, 10**9 + 40)])
@pytest.mark.parametrize("places", [{0, 1, 2}, {1}, set()])
def test_crops_of_a_run_are_known_before_it_starts(first, last, places):
    """However long it is, and each is named once."""
    stream = examples([photo(40, 30), photo(30, 30), photo(30, 90)])
    shown = [stream.crop(n, generator(3, stream.draws, n)) for n in range(first, min(last, first + 2000))]
    crops = stream.crops(range(first, last), places)
    assert crops == sorted({crop for crop in shown if crop[0] in places})
    assert last - first < 100 or len(crops) == sum(len(stream.offsets(place)) for place in places)


def test_examples_with_and_without_latents_meet_in_a_batch(photos):
    """Each keeps its place, and its draws."""
    paths = photos_in(photos)
    plain, cached = examples(paths), examples(paths)
    for number in (0, 3):
        crop = plain.crop(number, generator(plain.seed, plain.draws, number))
        cached.moments[crop] = torch.stack([torch.full(plain.latent_shape, 7.0), torch.ones(plain.latent_shape)])
    batch = collate([[cached[n]] for n in range(4)])
    assert batch["latents"].shape[0] == batch["pixel_values"].shape[0] == 2
    assert torch.equal(batch["noise"], collate([[plain[n]] for n in range(4)])["noise"])
    both = [*batch["latents"], *(row.mean() for row in batch["pixel_values"])]
    in_order = [both[row] for row in batch["rows"]]
    for number in range(4):
        example = plain[number]
        expected = 7 + example["posterior_noise"] if number in (0, 3) else example["pixel_values"].mean()
        assert torch.equal(in_order[number], expected)


def test_only_missing_class_images_are_asked_for():
    assert missing_numbers([], 4) == [0, 1, 2, 3]
    present = ["mine.jpg", image_name(1)]
    assert missing_numbers(present, 4) == [0, 2]
    assert missing_numbers(present, 2) == missing_numbers(present, 1) == []


def test_an_image_is_written_whole_or_not_at_all(tmp_path):
    """A writer that fails half-way, here at a limit of this process, leaves nothing behind."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        with pytest.raises(RunError, match="cannot write .*00000.png: .*File too large"):
            save_image(Image.new("RGB", (64, 64)), tmp_path / "00000.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(UserError, match="broken.png"):
        find_images(tmp_path, "--instance_data_dir")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_a_truncated_image_is_named(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"cut.{suffix}"):
        find_images(tmp_path, "--instance_data_dir")
