"""The launchers, with settings from the environment and further flags of the trainers."""

import os
import sys
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from harness import run, scalars


@pytest.mark.parametrize(
    "launcher, settings, expected",
    [
        ("colossalai.sh", {"NPROC": "2", "PLUGIN": "torch_ddp"}, "plugin torch_ddp, placement cuda"),
        ("colossalai.sh", {}, "plugin torch_ddp, placement cuda"),
        ("dreambooth.sh", {"NPROC": "2"}, "traditional process"),
        ("dreambooth.sh", {}, "traditional process"),
    ],
)
def test_launcher(launcher, settings, expected, tiny_model, photos, tmp_path):
    env = settings | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "MODEL_NAME": str(tiny_model),
        "INSTANCE_DIR": str(photos),
        "CLASS_DIR": str(tmp_path / "class_images"),
        "OUTPUT_DIR": str(tmp_path / "a folder with spaces"),
    }
    more = ["--resolution", "32", "--num_class_images", "2", "--max_train_steps", "3"]
    done = run(["bash", launcher, *more], env=env)
    ranks = settings.get("NPROC", "1")
    assert expected in done.stdout and f"on {ranks} x cpu, 3 steps of {ranks} samples" in done.stdout
    assert len(scalars(tmp_path / "a folder with spaces", "loss")) == 3, "the later --max_train_steps wins"
    StableDiffusionPipeline.from_pretrained(tmp_path / "a folder with spaces")


def test_settings_reach_the_trainer(tmp_path):
    """Each of these settings alone is enough to be refused for."""
    for name, value, expected in (
        ("PLACEMENT", "cpu", "--placement cpu (plugin gemini) needs a CUDA GPU"),
        ("PLUGIN", "gemini", "--plugin gemini needs a CUDA GPU"),
        ("INSTANCE_DIR", str(tmp_path / "none"), "none is not a folder"),
    ):
        env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
        env |= {"INSTANCE_DIR": str(tmp_path), name: value}
        done = run(["bash", "colossalai.sh"], env=env, check=False)
        assert done.returncode != 0
        assert len(done.error_lines) == 1 and expected in done.error_lines[0], done.stderr
