"""The launchers, with settings from the environment and further flags of the trainers."""

import os
import sys
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from harness import run, scalars
from PIL import Image


def launch(launcher: str, tmp_path: Path, settings: dict, *flags, **options):
    """Runs a launcher on the CPU, writing to `tmp_path`."""
    env = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "CLASS_DIR": str(tmp_path / "class_images"),
        "OUTPUT_DIR": str(tmp_path / "a folder with spaces"),
        "COMPARISON": str(tmp_path / "comparison.png"),
    }
    return run(["bash", launcher, *flags], env=env | settings, **options)


@pytest.mark.parametrize(
    "launcher, nproc, expected",
    [
        ("colossalai.sh", "2", "plugin torch_ddp, placement cuda"),
        ("colossalai.sh", "", "plugin torch_ddp, placement cuda"),
        ("dreambooth.sh", "2", "traditional process"),
        ("dreambooth.sh", "", "traditional process"),
    ],
)
def test_a_model_and_photos_of_ones_own(launcher, nproc, expected, tiny_model, photos, tmp_path):
    settings = {"MODEL_NAME": str(tiny_model), "INSTANCE_DIR": str(photos), "COMPARISON": "", "NPROC": nproc}
    more = ["--resolution", "32", "--num_class_images", "2", "--max_train_steps", "3"]
    done = launch(launcher, tmp_path, settings, *more)
    assert expected in done.stdout and f"on {nproc or 1} x cpu, 3 steps of {nproc or 1} samples" in done.stdout
    assert len(scalars(tmp_path / "a folder with spaces", "loss")) == 3, "the later --max_train_steps wins"
    StableDiffusionPipeline.from_pretrained(tmp_path / "a folder with spaces")
    assert not (tmp_path / "comparison.png").exists()


def test_with_nothing_set_the_small_model_is_trained_and_compared(tmp_path):
    """A step of 4 samples on any number of processes; pictures of 128 px. What sets them is the same in both."""
    done = launch("colossalai.sh", tmp_path, {}, "--max_train_steps", "1", "--num_class_images", "4")
    assert f"on {min(2, os.cpu_count())} x cpu, 1 steps of 4 samples" in done.stdout
    comparison = Image.open(tmp_path / "comparison.png")
    assert comparison.width == 4 * (128 + 8) + 8 and comparison.height > 8 * 128, "six prompts and the instance images"
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "a folder with spaces")
    assert pipeline.unet.config.sample_size * 8 == Image.open(tmp_path / "class_images" / "00000.png").width == 128


def test_the_output_folder_is_a_setting_only(tmp_path):
    """The comparison would look for the trained model elsewhere."""
    done = launch("colossalai.sh", tmp_path, {}, "--output_dir", "x", check=False)
    assert done.returncode == 2 and "OUTPUT_DIR" in done.error_lines[0]


def test_settings_reach_the_trainer(tmp_path):
    """Each of these settings alone is enough to be refused for."""
    for name, value, expected in (
        ("PLACEMENT", "cpu", "--placement cpu (plugin gemini) needs a CUDA GPU"),
        ("PLUGIN", "gemini", "--plugin gemini needs a CUDA GPU"),
        ("INSTANCE_DIR", str(tmp_path / "none"), "none is not a folder"),
    ):
        done = launch(
            "colossalai.sh", tmp_path, {"INSTANCE_DIR": str(tmp_path), "NPROC": "1", name: value}, check=False
        )
        assert done.returncode != 0
        assert len(done.error_lines) == 1 and expected in done.error_lines[0], done.stderr
