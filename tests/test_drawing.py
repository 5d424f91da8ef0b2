"""Pipelines that draw where there is not the room for all of one."""

import functools
import gc
import weakref

import numpy as np
import pytest
import torch
from conftest import PRIOR
from harness import COLOSSALAI, Running, command_line

from dreambooth.data.randomness import Stream, starting_points
from dreambooth.model import drawing
from dreambooth.model.drawing import WAYS, DrawingDevice, decode_in_tiles
from dreambooth.model.pipeline import load_pipeline

# accelerate takes layers to the CPU only in vain: there it mixes up what it has moved with what it has not.
UNRECORDED = len(WAYS) - 1
PLACES = [("cpu", 1), *(pytest.param("cuda", failures, marks=pytest.mark.gpu) for failures in range(1, UNRECORDED))]


# A GPU that has the room for parts of a pipeline alone: lines that a process executes first.
SMALL_GPU = """
import torch
from diffusers import AutoencoderKL

decode = AutoencoderKL.decode


def of_a_part_alone(vae, *args, **kwargs):
    if not hasattr(vae, "_hf_hook"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return decode(vae, *args, **kwargs)


AutoencoderKL.decode = of_a_part_alone
"""


class Room:
    """Draws two images, and runs out of memory in as many calls as are named, once something was computed."""

    def __init__(self, failures: int):
        self.failures = failures
        self.calls = 0

    def __call__(self, pipeline) -> np.ndarray:
        self.calls += 1
        short = {"num_inference_steps": 2, "output_type": "np"}
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(["a dog"] * 2, **short, **starting_points(pipeline, 1, Stream.CLASS_IMAGE, [0, 1])).images
        if self.calls <= self.failures:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return images


@pytest.fixture(params=["tiny", "tiny-xl"])
def model(request, tiny_model, xl_model):
    return {"tiny": tiny_model, "tiny-xl": xl_model}[request.param]


@pytest.mark.parametrize(("name", "failures"), PLACES)
def test_less_of_a_pipeline_at_a_time_draws_the_same(model, name, failures, capsys):
    found = []
    for room in (Room(0), Room(failures)):
        device = DrawingDevice(name, "class images")
        device.put(load_pipeline(model))
        found.append(device.draw(room))
        assert room.calls == 1 + room.failures
    assert np.array_equal(*found)
    told = capsys.readouterr().err.splitlines()
    words = ["its parts are there one at a time", "its layers are there one at a time, which takes longer"]
    assert len(told) == failures and all(
        f"warning: class images: the GPU has no room for the whole model: {one}" in line
        for one, line in zip(words, told, strict=False)
    )
    # The next is not tried in a way that was too much.
    again = Room(0)
    device.put(load_pipeline(model))
    assert np.array_equal(device.draw(again), found[0]) and again.calls == 1
    assert not capsys.readouterr().err


def images_of(pipeline, numbers: list[int]) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    points = starting_points(pipeline, 1, Stream.CLASS_IMAGE, numbers)
    return pipeline(["a dog"] * len(numbers), num_inference_steps=5, output_type="np", **points).images


@pytest.mark.gpu
def test_recorded_passes_draw_the_same_and_leave_nothing(model, monkeypatch):
    """Also a last batch that is smaller; for another pipeline on the same device, too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    batches = [[0, 1, 2], [3, 4, 5], [6]]
    plain = DrawingDevice("cuda", "class images")
    plain.put(load_pipeline(model))
    wanted = [plain.draw(functools.partial(images_of, numbers=numbers)) for numbers in batches]
    plain.clear()

    def drawn(device: DrawingDevice) -> list[np.ndarray]:
        device.put(load_pipeline(model))
        return [device.draw(functools.partial(images_of, numbers=numbers)) for numbers in batches]

    device = DrawingDevice("cuda", "class images", replays=True)
    drawn(device)  # what libraries set up stays
    device.clear()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        found = drawn(device)
        for one, other in zip(found, wanted, strict=True):
            assert np.abs(one - other).max() < 1e-3
    unet = device.pipeline.unet
    assert len(unet.forward.passes) == 2, "two sizes of batches"
    device.clear()
    assert "forward" not in vars(unet)
    del unet
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("a capture")], ids=str)
def test_what_cannot_be_recorded_is_drawn_without(error, tiny_model, capsys, monkeypatch):
    """A capture's error may stand for one of memory."""

    def cannot_record(unet):
        raise error

    monkeypatch.setattr(drawing, "replay", cannot_record)
    device, plain, found = DrawingDevice("cpu", "class images", replays=True), DrawingDevice("cpu", ""), []
    for one in (device, plain):
        one.put(load_pipeline(tiny_model))
        found.append(one.draw(Room(0)))
    assert np.array_equal(*found)
    told = capsys.readouterr().err
    assert told == f"warning: class images: the UNet cannot be recorded ({error}): images take longer\n"


@pytest.mark.gpu
def test_without_room_for_recorded_passes_it_does_without(model, capsys):
    device, room = DrawingDevice("cuda", "class images", replays=True), Room(1)
    device.put(load_pipeline(model))
    found = device.draw(room)
    assert room.calls == 2 and "forward" not in vars(device.pipeline.unet)
    assert "the UNet cannot be recorded (CUDA out of memory.): images take longer" in capsys.readouterr().err
    whole = DrawingDevice("cuda", "class images")
    whole.put(load_pipeline(model))
    assert np.abs(found - whole.draw(Room(0))).max() < 2e-3


def test_the_last_way_decodes_large_images_in_tiles(tiny_model, monkeypatch):
    """Near to the whole, and not the whole."""
    monkeypatch.setattr(drawing, "TILE", 24)
    pipeline = load_pipeline(tiny_model)
    whole = Room(0)(pipeline)
    decode_in_tiles(pipeline.vae)
    assert 0 < np.abs(Room(0)(pipeline) - whole).mean() < 0.1


@pytest.mark.parametrize("failures", [0, 1])
def test_what_has_drawn_is_let_go_of(tiny_model, failures):
    """At once: nobody looks for garbage while a model is trained."""
    device = DrawingDevice("cpu", "class images")
    device.put(load_pipeline(tiny_model))
    device.draw(Room(failures))
    unet = weakref.ref(device.pipeline.unet)
    gc.collect()
    gc.disable()
    try:
        device.clear()
        assert unet() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("error", "ways"),
    [("a kernel", 1), ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", UNRECORDED)],
    ids=["other", "memory"],
)
def test_only_want_of_memory_is_tried_again_and_at_last_ends_it(tiny_model, error, ways):
    def draw(pipeline):
        calls.append(pipeline)
        raise RuntimeError(error)

    calls, device = [], DrawingDevice("cpu", "class images")
    device.put(load_pipeline(tiny_model))
    with pytest.raises(RuntimeError, match=error):
        device.draw(draw)
    assert len(calls) == ways


def test_runs_draw_where_only_parts_of_the_model_fit(flags, class_images, tmp_path):
    """Class images are those of a large GPU, and there are validation images and an image of inference.py."""
    own = {"class_data_dir": tmp_path / "class_images", "validation_prompt": "a dog", "validation_steps": 1}
    flags |= PRIOR | own | {"max_train_steps": 2, "num_validation_images": 1}
    ran = Running(COLOSSALAI, command_line(flags), before=SMALL_GPU).wait()
    told = [line.split(": ")[1] for line in ran.stderr.splitlines() if "has no room for the whole model" in line]
    assert told == ["class images", "validation images"], ran.stderr
    for path in sorted(class_images.glob("*.png")):
        assert (tmp_path / "class_images" / path.name).read_bytes() == path.read_bytes()
    assert len(list(flags["output_dir"].glob("validation/step-*.png"))) == 2
    made = tmp_path / "made.png"
    words = [flags["output_dir"], "--prompt", "a dog", "--output", made, "--num_inference_steps", "2"]
    drawn = Running("inference.py", [str(word) for word in words], before=SMALL_GPU).wait()
    assert made.exists() and "the GPU has no room for the whole model" in drawn.stderr
