"""Bad input: one clear line, exit status 2, and nothing written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import COLOSSALAI, ROOT, STANDALONE, TRADITIONAL, Running, command_line, train, wait_for
from PIL import Image

from benchmarks import random_model
from dreambooth.command_line.flags import Flags
from dreambooth.command_line.parser import read

# Flags changed from those of a good run, and what the error line has to say.
BAD_FLAGS = {
    "logs where the pipeline goes": (
        {"logging_dir": "./unet/logs"},
        "--logging_dir ./unet/logs: the trained pipeline's folder of that name replaces it",
    ),
    "logs where a checkpoint goes": (
        {"logging_dir": "checkpoint-2/logs", "save_steps": 2},
        "--logging_dir checkpoint-2/logs: the run itself writes checkpoint-2",
    ),
    "logs where the listing goes": (
        {"logging_dir": "dreambooth.json"},
        "--logging_dir dreambooth.json: the run itself writes dreambooth.json",
    ),
    "logs out of the output folder": (
        {"logging_dir": "logs/../../x"},
        "--logging_dir logs/../../x leads out of --output_dir: name a folder inside, or a whole path",
    ),
    "logs where a file is": (
        {"logging_dir": ROOT / "README.md" / "logs"},
        f"--logging_dir {ROOT / 'README.md' / 'logs'} cannot be made: Not a directory",
    ),
    "a length of prompts": (
        {"tokenizer_max_length": 128},
        "--tokenizer_max_length 128: this model reads 77 tokens of a prompt",
    ),
    "no folder of photos": ({"instance_data_dir": "nowhere"}, "--instance_data_dir nowhere is not a folder"),
    "prior without class flags": (
        {"with_prior_preservation": True},
        "--with_prior_preservation also needs --class_data_dir and --class_prompt",
    ),
    "no model": ({"pretrained_model_name_or_path": "./nowhere"}, "./nowhere is not a folder"),
    "no external UNet": ({"external_unet_path": "nowhere"}, "--external_unet_path nowhere is not a folder"),
    "resolution": ({"resolution": 31}, "--resolution 31 is not a multiple of 2"),
    "zero": ({"train_batch_size": 0}, "--train_batch_size: '0' is not a whole number of at least 1"),
    "negative": ({"max_train_steps": -1}, "--max_train_steps: '-1' is not a whole number of at least 1"),
    "negative power": ({"learning_rate": "-1e-4"}, "--learning_rate: '-1e-4' is not a number of at least 0"),
    "less than all": ({"max_grad_norm": "-inf"}, "--max_grad_norm: '-inf' is not a number of at least 0"),
    "fraction": ({"num_class_images": 1.5}, "--num_class_images: '1.5' is not a whole number"),
    "NaN": ({"learning_rate": "nan"}, "--learning_rate: 'nan' is not a number of at least 0"),
    "infinite": ({"max_grad_norm": "inf"}, "--max_grad_norm: 'inf' is not a number of at least 0"),
    "boolean": ({"test_run": "maybe"}, "--test_run: 'maybe' is neither true nor false"),
    "unknown flag": ({"use_magic": True}, "unrecognized arguments: --use_magic"),
    "mistyped flag": (
        {"pretrained_model_name_or_path": None, "pretrained_model": "m"},
        "unrecognized arguments: --pretrained_model m; the following arguments are required: --pretrained_model_name",
    ),
    "missing flag": (
        {"instance_prompt": None},
        "0.png has no caption: give it one, or all without one an --instance_prompt",
    ),
    "fp16 on the CPU": ({"mixed_precision": "fp16"}, "--mixed_precision fp16 needs a CUDA GPU"),
    "tokenizer out of reach": (
        {"tokenizer_name": "no/such"},
        "no/such is no folder, and cannot be had from the Hub: ",
    ),
    "data set out of reach": (
        {"dataset_name": "no/such", "instance_data_dir": None},
        "no/such is neither a folder nor a file, and cannot be had from the Hub: no answer; see to the network",
    ),
    "several": (
        {"instance_data_dir": "nowhere", "with_prior_preservation": True, "class_prompt": "a dog"},
        "also needs --class_data_dir; --instance_data_dir nowhere is not a folder",
    ),
}

# The same for the plugins; without a CUDA GPU all but torch_ddp refuse.
BAD_PLUGINS = {
    "torch_ddp on cpu": ({"plugin": "torch_ddp", "placement": "cpu"}, "--plugin torch_ddp goes with --placement cuda"),
    "zero auto": (
        {"plugin": "low_level_zero", "placement": "auto"},
        "--plugin low_level_zero goes with --placement cuda or cpu, not auto",
    ),
    "zero without GPU": ({"plugin": "low_level_zero"}, "--plugin low_level_zero needs a CUDA GPU"),
    "CUDA graphs without GPU": ({"cuda_graphs": True}, "--cuda_graphs needs a CUDA GPU"),
    "gemini without GPU": ({"plugin": "gemini"}, "--plugin gemini needs a CUDA GPU"),
    "fp16 without GPU": ({"plugin": "torch_ddp_fp16"}, "--plugin torch_ddp_fp16 needs a CUDA GPU"),
    "placement without GPU": ({"placement": "auto"}, "--placement auto (plugin gemini) needs a CUDA GPU"),
    "offload": ({"offload_optim_frac": 0.5}, "--offload_optim_frac goes with --plugin gemini"),
    "offload above one": ({"offload_optim_frac": 1.5}, "'1.5' is not a number of at least 0 and at most 1"),
    "on a disk": (
        {"offload_dir": "."},
        "--offload_dir goes with --plugin low_level_zero or gemini and --placement cpu",
    ),
    "unknown plugin": ({"plugin": "magic"}, "invalid choice: 'magic'"),
}


def assert_one_line(done, expected: str) -> None:
    assert done.returncode == 2, done.stderr
    assert len(done.error_lines) == 1, done.stderr
    assert expected in done.error_lines[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(case, flags):
    changed, expected = BAD_FLAGS[case]
    # Both scripts share the parser; each meets half of the cases.
    script = (COLOSSALAI, TRADITIONAL)[sorted(BAD_FLAGS).index(case) % 2]
    nowhere = {"env": {"HF_ENDPOINT": "http://127.0.0.1:9"}} if "out of reach" in case else {}
    done = train(script, flags | changed, check=False, **nowhere)
    assert_one_line(done, expected)
    assert len(done.stderr.splitlines()) <= 2, "besides, that there is no GPU"
    assert not flags["output_dir"].exists()


def test_a_home_directory_behind_an_equal_sign(monkeypatch):
    """A shell leaves it there as it is."""
    monkeypatch.setenv("HOME", "/home/someone")
    words = ["--pretrained_model_name_or_path=~/sd", "--output_dir=~/out", "--instance_prompt=~ sks"]
    flags = read(Flags, words)
    assert flags.model.pretrained_model_name_or_path == "/home/someone/sd"
    assert flags.output.output_dir == "/home/someone/out" and flags.instance.instance_prompt == "~ sks"


@pytest.mark.parametrize("case", BAD_PLUGINS)
def test_bad_plugins(case, flags):
    changed, expected = BAD_PLUGINS[case]
    assert_one_line(train(COLOSSALAI, flags | changed, check=False), expected)


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "vae", "unet", "scheduler"])
def test_model_without_a_part(part, flags, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(flags["pretrained_model_name_or_path"], model)
    shutil.rmtree(model / part)
    done = train(COLOSSALAI, flags | {"pretrained_model_name_or_path": model}, check=False)
    assert_one_line(done, f"{model} has no {part}")


def test_model_with_a_torn_part(flags, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(flags["pretrained_model_name_or_path"], model)
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = train(COLOSSALAI, flags | {"pretrained_model_name_or_path": model}, check=False)
    assert_one_line(done, f"cannot load the VAE of {model}: ")


def test_prediction_type_without_a_loss(flags, tmp_path):
    model = tmp_path / "model"
    random_model.build(model, "tiny", prediction_type="sample")
    done = train(COLOSSALAI, flags | {"pretrained_model_name_or_path": model}, check=False)
    assert_one_line(done, "prediction_type 'sample'; this project trains epsilon and v_prediction")


def test_hub_id_that_cannot_be_had(flags):
    """Offline, a Hub id that is not in the cache is one line too."""
    done = train(
        COLOSSALAI,
        flags | {"pretrained_model_name_or_path": "nobody/nothing"},
        check=False,
        env={"HF_HUB_OFFLINE": "1"},
    )
    assert_one_line(done, "nobody/nothing is no folder, and cannot be had from the Hub: HF_HUB_OFFLINE is set")


def test_output_path_that_is_a_file(flags, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = train(COLOSSALAI, flags | {"output_dir": tmp_path / "file"}, check=False)
    assert_one_line(done, "is a file; name a folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_without_images(flags, tmp_path):
    (tmp_path / "empty").mkdir()
    done = train(COLOSSALAI, flags | {"instance_data_dir": tmp_path / "empty"}, check=False)
    assert_one_line(done, "has no image (png, jpg, jpeg, webp, bmp)")


def test_on_several_ranks_the_line_appears_once(flags, photos, tmp_path):
    """Every rank finds the truncated photo; torchrun itself exits with 1, as for any failure of its processes."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    Image.new("RGB", (64, 64)).save(folder / "9.png")
    (folder / "9.png").write_bytes((folder / "9.png").read_bytes()[:60])
    done = train(TRADITIONAL, flags | {"instance_data_dir": folder}, nproc=2, torchrun=STANDALONE, check=False)
    assert done.returncode == 1
    assert len(done.error_lines) == 1, done.stderr
    assert "cannot read the image" in done.error_lines[0] and "9.png" in done.error_lines[0]
    assert "exitcode  : 2" in done.stderr
    assert not flags["output_dir"].exists()


def test_an_error_of_one_rank_alone_is_told(flags, photos, tmp_path):
    """Rank 1 has another folder in mind than rank 0: it waits for rank 0 to speak, then speaks itself."""
    launcher = tmp_path / "launch.py"
    launcher.write_text(
        "import os, runpy, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv[sys.argv.index('--instance_data_dir') + 1] = 'nowhere'\n"
        f"runpy.run_path({COLOSSALAI!r}, run_name='__main__')\n"
    )
    done = train(str(launcher), flags, nproc=2, check=False)
    assert len(done.error_lines) == 1 and "nowhere is not a folder" in done.error_lines[0]


def test_warnings(flags, tiny_model):
    """Flags without an effect, and a prompt that does not fit, are told once; the run goes on."""
    flags |= {
        "instance_prompt": "a photo of sks dog " + "very " * 30 + "happy",
        "class_prompt": "a photo of dog",
        "prior_loss_weight": 0.5,
        "hub_token": "hf_secret",
        "revision": "main",
        "local_rank": 3,
        "lr_warmup_steps": 5,
        "num_train_epochs": 4,
        "max_train_steps": 1,
        "resume_anyway": True,
        "caption_column": "caption",
    }
    done = train(COLOSSALAI, flags, nproc=2)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    for expected in (
        "--class_prompt, --prior_loss_weight: no effect without --with_prior_preservation",
        "--hub_token: no effect without --push_to_hub",
        "--revision: no effect on a local folder",
        "--local_rank 3: no effect",
        "--lr_warmup_steps: no effect",
        "--num_train_epochs: no effect",
        "--resume_anyway: no effect without --resume_from_checkpoint",
        "--caption_column: no effect",
        "is longer than the 75 tokens that fit",
        "no CUDA GPU was found",
    ):
        assert sum(expected in line for line in warnings) == 1, (expected, warnings)
    cut = next(line for line in warnings if "is cut" in line).rpartition("is cut: ")[2]
    assert cut.strip("'").endswith("happy") and "sks" not in cut
    assert all(len(line) < 400 for line in warnings)
    assert "hf_secret" not in done.stdout + done.stderr


def test_the_process_list_does_not_show_the_token(flags, tmp_path):
    """Nor do the libraries say anything while they are imported; here they are."""
    command = [sys.executable, COLOSSALAI, *command_line(flags | {"hub_token": "hf_secret", "max_train_steps": 10**6})]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=log) as run,
    ):
        wait_for((flags["output_dir"] / "logs").is_dir)
        shown = Path(f"/proc/{run.pid}/cmdline").read_text()
        run.kill()
    told = (tmp_path / "log").read_text().splitlines()
    ours = ("warning: --hub_token", "warning: no CUDA GPU was found", "training: ")
    assert told and all(line.startswith(ours) for line in told), told
    assert "hf_secret" not in shown and "--hub_token" in shown and "***" in shown


def test_hub_that_cannot_be_reached_is_known_before_training(flags):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = train(COLOSSALAI, flags | {"push_to_hub": True, "hub_token": "hf_secret"}, check=False, env=env)
    assert_one_line(done, "--push_to_hub: cannot create out on the Hub: ")
    assert "hf_secret" not in done.stderr
    assert not flags["output_dir"].exists()


@pytest.mark.parametrize(
    "words, expected",
    [
        (["nowhere", "--prompt", "a dog", "--output", "dog"], "--output dog: the name has to end in .png"),
        (["nowhere", "--prompt", "a dog", "--output", "dog.xbm"], "--output dog.xbm: the name has to end in .png"),
        (["nowhere", "--prompt", "a dog", "--device", "cuda"], "--device cuda: no CUDA GPU was found"),
        (["nowhere", "--prompt", "a dog", "--num_images", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_inference(words, expected):
    assert_one_line(Running("inference.py", words).wait(check=False), expected)


def test_inference_with_a_hub_id_that_cannot_be_had():
    words = ["nowhere", "--prompt", "a dog"]
    done = Running("inference.py", words, env={"HF_HUB_OFFLINE": "1"}).wait(check=False)
    assert_one_line(done, "MODEL nowhere is no folder, and cannot be had from the Hub: HF_HUB_OFFLINE is set")
