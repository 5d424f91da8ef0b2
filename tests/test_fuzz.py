"""Properties that hold for any flags, any damaged image, and any sizes of a run."""

import contextlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ROOT
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from dreambooth.command_line.colossalai_flags import ColossalAIFlags
from dreambooth.command_line.console import UserError
from dreambooth.command_line.flags import Flags, TrainingFlags
from dreambooth.command_line.parser import build_parser, parse
from dreambooth.data.images import load_image, photo_of
from dreambooth.data.samples import DreamBoothDataset, build_dataset, build_loader
from dreambooth.data.schedule import Schedule, plan
from dreambooth.engine.strategy import choose_strategy
from dreambooth.processes.ranks import Ranks

# The same examples on every machine; a slow one is no failure.
always = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}

KINDS = {"colossalai": ColossalAIFlags, "traditional": Flags}
FLAGS = sorted(build_parser(ColossalAIFlags, "")._option_string_actions)
GOOD = ["--pretrained_model_name_or_path", "model", "--instance_data_dir", str(ROOT / "assets/instance_images")]
GOOD += ["--instance_prompt", "a photo of sks dog"]
ODD_VALUES = [
    *("", " ", "0", "1", "-1", "2", "0.5", "1e-8", "1e30", "-0", "nan", "inf", "-inf", "1_0", "٣", "0x1", "9" * 5000),
    *("true", "False", "no", "fp16", "bf16", "auto", "cpu", "gemini", "low_level_zero", "torch_ddp_fp16", "cosine"),
    *("nowhere", ".", "/", "/dev/null", "/dev/null/x", "~", "latest", "x" * 300, "x/" * 3000, str(ROOT), "README.md"),
    *("-", "--", "---", "=", "-x", "a\nb", "\r\n", "\x1b[31m", "\u2028", "\udcff", "%s", "{}", "'\"", "🐶", "a b"),
]
values = st.sampled_from(ODD_VALUES) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
flags = st.sampled_from(FLAGS)
likely = st.tuples(
    st.sampled_from(["--max_train_steps", "--num_class_images", "--lr_warmup_steps", "--seed", "--adam_beta1"]),
    st.sampled_from(["0", "1", "2", "0.5", "17"]),
) | st.tuples(
    st.sampled_from(["--output_dir", "--class_data_dir", "--class_prompt", "--instance_prompt", "--logging_dir"]),
    values,
)
groups = st.one_of(
    likely,
    st.tuples(st.sampled_from(["--with_prior_preservation", "--center_crop", "--push_to_hub", "--test_run"])),
    st.tuples(flags),
    st.tuples(values),
    st.tuples(flags, values),
    st.builds(lambda flag, value: (f"{flag}={value}",), flags, values),
)
words = st.one_of(st.lists(groups, max_size=6), st.lists(likely, max_size=3)).map(
    lambda groups: [word for group in groups for word in group]
)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=1000, **always)
@given(words=words, whole=st.booleans())
def test_any_words_are_parsed_or_refused_in_one_line(name, words, whole):
    """With and without the flags that are required: the rules between flags come after."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            flags = parse(KINDS[name], [*GOOD, *words] if whole else words)
            if name == "colossalai":
                choose_strategy(flags)
            event("parsed")
        except UserError as error:
            assert str(error).isprintable() and str(error).strip()
            event("refused")
        except SystemExit as ended:
            assert ended.code == 0 and {"-h", "--help"} & set(words)
            event("help")
    assert all(line.startswith("warning: ") and line.isprintable() for line in stderr.getvalue().split("\n")[:-1])


def encoded(format: str, mode: str, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).convert(mode).save(stream, format, exif=exif.tobytes(), **options)
    return stream.getvalue()


FILES = {
    "png": encoded("PNG", "RGBA"),
    "palette": encoded("PNG", "P", transparency=3),
    "jpeg": encoded("JPEG", "RGB"),
    "webp": encoded("WEBP", "RGB"),
    "bmp": encoded("BMP", "RGB"),
    "gif": encoded("GIF", "P"),
}
places = st.integers(0, 2**16)
changes = st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, as the scripts have it
@pytest.mark.parametrize("name", FILES)
@settings(max_examples=300, **always)
@given(damage=changes | places)
def test_any_damage_leaves_an_image_or_one_line(name, damage, tmp_path):
    """A file with some bytes changed, or cut off at a place."""
    whole = bytearray(FILES[name])
    if isinstance(damage, int):
        del whole[damage % len(whole) :]
    else:
        for place, value in damage:
            whole[place % len(whole)] = value
    path = tmp_path / "x.png"
    path.write_bytes(whole)
    try:
        image = load_image(photo_of(path))
    except UserError as error:
        assert str(path) in str(error) and str(error).isprintable()
        event("refused")
    else:
        assert image.mode == "RGB" and min(image.size) > 0
        event("read")


class Numbered(DreamBoothDataset):
    """Tells which sample and which images a step would take, and reads no file."""

    def __getitem__(self, n: int) -> list[dict[str, torch.Tensor]]:
        images = [one.place_of(n) for one in self.sets]
        told = {"number": torch.tensor(n), "images": torch.tensor(images), "weights": torch.tensor(1.0)}
        return [told | {"of_view": {}}]


def numbered(instance_images: int, class_images: int, seed: int) -> Numbered:
    photos = [[photo_of(Path(f"{n}.png")) for n in range(count)] for count in (instance_images, class_images)]
    settings = {"resolution": 8, "center_crop": False, "latent_shape": (1, 1, 1), "num_timesteps": 10}
    dataset = build_dataset(*photos, seed=seed, **settings)
    return Numbered(dataset.sets[0], dataset.sets[1] if class_images else None, dataset.prompts)


@settings(max_examples=200, **always)
@given(
    instance_images=st.integers(1, 9),
    class_images=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
    world_size=st.integers(1, 5),
    batch=st.integers(1, 6),
    steps=st.integers(1, 8),
    accumulation=st.integers(1, 3),
    data=st.data(),
)
def test_the_stream_of_samples(instance_images, class_images, seed, world_size, batch, steps, accumulation, data):
    dataset = numbered(instance_images, class_images, seed)
    schedule = Schedule(batch, world_size, steps, accumulation)

    def batches(rank: int, first_step: int = 0) -> list[dict]:
        """Returns what a rank takes in each step."""
        ranks = Ranks(rank, world_size, torch.device("cpu"))
        steps = list(build_loader(dataset, schedule, ranks, first_step))
        assert all(len(one["number"]) == batch for step in steps for one in step)
        return [{key: sum((one[key].tolist() for one in step), []) for key in ("number", "images")} for step in steps]

    by_rank = [batches(rank) for rank in range(world_size)]
    taken = Counter(n for one_rank in by_rank for step in one_rank for n in step["number"])
    assert taken == Counter(range(steps * schedule.total_batch)), "every sample once, over all ranks"

    in_order = sorted(
        (n, images)
        for one_rank in by_rank
        for step in one_rank
        for n, images in zip(step["number"], step["images"], strict=True)
    )
    for part, count in enumerate([instance_images, class_images][: dataset.examples_per_sample]):
        images = [images[part] for _, images in in_order]
        for first in range(0, len(images) - count + 1, count):
            assert sorted(images[first : first + count]) == list(range(count)), "every image once in each pass"

    first_step = data.draw(st.integers(0, steps))
    for rank, whole in enumerate(by_rank):
        assert batches(rank, first_step) == whole[first_step:], "a resumed run takes the samples that are left"


@settings(max_examples=200, **always)
@given(
    images=st.integers(1, 10_000),
    world_size=st.integers(1, 64),
    batch=st.integers(1, 64),
    accumulation=st.integers(1, 8),
    epochs=st.integers(1, 100),
)
def test_epochs_take_every_image_and_no_step_more(images, world_size, batch, accumulation, epochs):
    flags = TrainingFlags(train_batch_size=batch, gradient_accumulation_steps=accumulation, num_train_epochs=epochs)
    schedule = plan(flags, world_size, images)
    steps_per_epoch = schedule.steps // epochs
    assert schedule.steps == epochs * steps_per_epoch
    assert (steps_per_epoch - 1) * schedule.total_batch < images <= steps_per_epoch * schedule.total_batch
