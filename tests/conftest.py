"""A tiny model and a few photos, made once."""

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

# Tests run several at a time, and processes with many threads would only wait for each other. Where a trainer takes
# all cores for the optimizer, its threads sleep while they wait, and leave the cores to others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Kernels for GPUs run in Triton's interpreter where there is none; it looks for this when it is imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from filelock import FileLock
from harness import COLOSSALAI, SHARED_DATA, Running, train, zygote_for_all


def pytest_configure(config):
    """Sets up what all processes share: the zygote, and a cache that data sets are converted into, not the user's."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shared = contextlib.ExitStack()
        os.environ["HF_DATASETS_CACHE"] = shared.enter_context(tempfile.TemporaryDirectory())
        shared.enter_context(zygote_for_all())
        config.add_cleanup(shared.close)


def pytest_collection_modifyitems(items):
    import torch

    # The longest first, so that no worker is left alone with them: each begins with an equal part of the list.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    long = sorted((item for item in items if item.path.stem in LONG), key=lambda item: LONG.index(item.path.stem))
    others = [item for item in items if item.path.stem not in LONG]
    share = math.ceil(len(others) / workers)
    items[:] = [
        item
        for number in range(workers)
        for item in [*long[number::workers], *others[number * share : (number + 1) * share]]
    ]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _nothing_is_left():
    """Ends runs that a failed test has started."""
    others = list(Running.unfinished)
    yield
    for left in [run for run in Running.unfinished if run not in others]:
        left.kill()
        left.wait(check=False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A whole Stable Diffusion of 32 px images with random weights."""
    from benchmarks import random_model

    folder = tmp_path_factory.mktemp("tiny_model")
    random_model.build(folder, "tiny")
    return folder


@pytest.fixture(scope="session")
def xl_model(once):
    """A whole Stable Diffusion XL of 32 px images with random weights."""
    from benchmarks import random_model

    return once("tiny-xl", lambda folder: random_model.build(folder, "tiny-xl"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Five smooth pictures of different sizes, none of them square."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for number in range(5):
        width, height = 40 + 8 * number, 66 - 4 * number
        x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
        channels = [np.sin((number + 2) * x + c) * np.cos((c + 1) * y) * 0.5 + 0.5 for c in range(3)]
        Image.fromarray((np.stack(channels, axis=-1) * 255).astype("uint8")).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory, testrun_uid):
    """Returns a function that has a folder made once for all of pytest's workers: once(name, make)."""

    def made_once(name: str, make: Callable[[Path], None]) -> Path:
        folder = tmp_path_factory.getbasetemp().parent / f"{name}-{testrun_uid}"
        done = Path(f"{folder}.done")
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed: this one fails of the same
                make(folder)
                done.touch()
        return folder

    return made_once


@pytest.fixture(scope="session")
def dog_photos():
    """Real photographs, where the folder is there."""
    folder = SHARED_DATA / "dog"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture
def flags(tiny_model, photos, tmp_path):
    """Flags of a short run on the tiny model."""
    return {
        "pretrained_model_name_or_path": tiny_model,
        "instance_data_dir": photos,
        "instance_prompt": "a photo of sks dog",
        "resolution": 32,
        "train_batch_size": 2,
        "max_train_steps": 10,
        "learning_rate": 1e-4,
        "seed": 1,
        "output_dir": tmp_path / "out",
    }


LONG = (
    "test_learning",
    "test_faults",
    "test_flags",
    "test_launchers",
    "test_benchmarks",
    "test_processes",
    "test_training",
)

# Prior preservation with seven class images, which no sampling batch divides.
PRIOR = {
    "with_prior_preservation": True,
    "class_prompt": "a photo of dog",
    "num_class_images": 7,
    "sample_batch_size": 2,
}


@pytest.fixture(scope="session")
def class_images(once, tiny_model, photos):
    """The class images that a run generates, which takes longer than most tests."""

    def make(folder):
        run = {
            "pretrained_model_name_or_path": tiny_model,
            "instance_data_dir": photos,
            "instance_prompt": "a sks dog",
        }
        run |= {"resolution": 32, "max_train_steps": 1, "seed": 1, "output_dir": folder / "out"}
        train(COLOSSALAI, run | PRIOR | {"class_data_dir": folder / "class_images"})

    return once("class images", make) / "class_images"


@pytest.fixture
def prior(class_images, tmp_path):
    """Flags of prior preservation; the class images are there."""
    return PRIOR | {"class_data_dir": shutil.copytree(class_images, tmp_path / "class_images")}
