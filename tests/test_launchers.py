"""The launchers, with settings from the environment and further flags of the trainers."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from harness import ROOT, connect, run, scalars, wait_for
from PIL import Image

from dreambooth.model.lora import WEIGHTS

SETTINGS = {
    "--pretrained_model_name_or_path": "MODEL_NAME",
    "--instance_data_dir": "INSTANCE_DIR",
    "--instance_prompt": "INSTANCE_PROMPT",
    "--class_data_dir": "CLASS_DIR",
    "--class_prompt": "CLASS_PROMPT",
    "--output_dir": "OUTPUT_DIR",
}
# In place of the real ones where only their words count: each prints its name, its threads and its words, a line each.
STUB = """#!/bin/sh
case $1 in -c) echo "$TORCH_GPUS"; exit ;; */image_file.py) exit ;; esac
printf '%s\\n' "${0##*/}" "threads ${OMP_NUM_THREADS-all}" "$@" ""
"""


# A command whose program runs in a fork (stand_in.py). Comparisons, which nobody looks at, are drawn in two steps.
IN_A_FORK = f"""#!/bin/sh
case $1 in */inference.py) set -- "$@" --num_inference_steps 2 ;; esac
exec {sys.executable} -IS {ROOT}/tests/stand_in.py "$0" "$@"
"""


@pytest.fixture(scope="module")
def commands_in_forks(tmp_path_factory):
    """A folder of commands, `python` and `torchrun`, that are IN_A_FORK."""
    folder = tmp_path_factory.mktemp("commands")
    for name in ("python", "torchrun"):
        (folder / name).write_text(IN_A_FORK)
        (folder / name).chmod(0o755)
    connect("socket").close()  # as soon as they can run there
    return folder


def launch(launcher: str, folder: Path, settings: dict, *flags, commands: Path | None = None, **options):
    """Runs a launcher on the CPU, in `folder`, where it writes to; with `commands` that are not Python's own."""
    env = {
        "PATH": f"{commands or Path(sys.executable).parent}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "CLASS_DIR": "class_images",
        "OUTPUT_DIR": "a folder with spaces",
    }
    return run(["env", "-C", folder, "bash", ROOT / launcher, *flags], env=env | settings, **options)


def commands(folder: Path, settings: dict, *flags, **options) -> list[list[str]]:
    """Returns the words of the trainer's and the comparison's command that a launcher gives in `folder`."""
    done = with_stubs(folder, settings, *flags, **options)
    assert done.returncode == 0, done.stderr
    return [command.splitlines() for command in done.stdout.split("\n\n") if command]


def with_stubs(
    folder: Path, settings: dict, *flags, launcher: str = "colossalai.sh", gpus: int = 0
) -> subprocess.CompletedProcess:
    """Runs a launcher in `folder` with what prints its words in place of real programs.

    `gpus` is the number of those that nvidia-smi lists.
    """
    stubs = folder / "stubs"
    stubs.mkdir(exist_ok=True)
    listing = "\n".join(f"GPU {number}: a card\n  MIG 1g.10gb Device 0: a part of it" for number in range(gpus))
    bodies = {"python": STUB, "torchrun": STUB, "nvidia-smi": f"#!/bin/sh\ncat <<END\n{listing}\nEND\n"}
    for name, body in bodies.items():
        (stubs / name).write_text(body)
        (stubs / name).chmod(0o755)
    env = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    }
    env |= {"PATH": f"{stubs}:{os.environ['PATH']}"} | settings
    return subprocess.run(["bash", ROOT / launcher, *flags], cwd=folder, env=env, capture_output=True, text=True)


def value(words: list[str], flag: str) -> str:
    """Returns the word after the first `flag`."""
    return words[words.index(flag) + 1]


@pytest.mark.parametrize(
    "launcher, nproc, expected",
    [
        ("colossalai.sh", "", "plugin torch_ddp, placement cuda"),
        ("dreambooth.sh", "2", "traditional process"),
    ],
)
def test_a_model_and_photos_of_ones_own(launcher, nproc, expected, tiny_model, photos, commands_in_forks, tmp_path):
    """Paths are of the folder that the user is in. The second time nothing stands in for Python and torchrun."""
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "photos").symlink_to(photos)
    settings = {"MODEL_NAME": "model", "INSTANCE_DIR": "photos", "COMPARISON": "", "NPROC": nproc, "CLASS_DIR": ""}
    more = ["--resolution", "32", "--num_class_images", "2", "--max_train_steps", "3"]
    done = launch(launcher, tmp_path, settings, *more, commands=None if nproc else commands_in_forks)
    assert "Warning" not in done.stderr, "of a library"
    assert expected in done.stdout and f"on {nproc or 1} x cpu, 3 steps of {nproc or 1} sample" in done.stdout
    assert len(scalars(tmp_path / "a folder with spaces", "loss")) == 3, "the later --max_train_steps wins"
    StableDiffusionPipeline.from_pretrained(tmp_path / "a folder with spaces")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "photos", "a folder with spaces", "class_images"}
    assert len(list(tmp_path.glob("class_images/tiny_model*/a dog/*.png"))) == 2


def test_with_nothing_set_the_small_model_is_trained_and_compared(commands_in_forks, tmp_path):
    """A step of 4 samples on any number of processes; pictures of 128 px. What sets them is the same in both."""
    flags = ["--max_train_steps", "1", "--num_class_images", "4"]
    done = launch("colossalai.sh", tmp_path, {}, *flags, commands=commands_in_forks)
    assert f"on {min(2, os.cpu_count())} x cpu, 1 step of 4 samples" in done.stdout
    comparison = Image.open(tmp_path / "comparison.png")
    assert comparison.width == 4 * (128 + 8) + 8 and comparison.height > 8 * 128, "six prompts and the instance images"
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "a folder with spaces")
    assert pipeline.unet.config.sample_size * 8 == Image.open(tmp_path / "class_images" / "00000.png").width == 128


@pytest.mark.parametrize("rank", [["--lora_rank", "2"], ["--rank=2"]])
def test_adapters_have_settings_of_their_own(rank, tmp_path):
    """Weights that begin at zero need another learning rate, and adapters a folder; a further flag wins, as always."""
    model, folder = str(ROOT / "assets/tiny-stable-diffusion"), "dreambooth-model"
    training, comparison = commands(tmp_path, {"NPROC": "1"})
    assert value(training, "--learning_rate") == "4e-4" and comparison[3:6] == [folder, "--compare_with", model]
    training, comparison = commands(tmp_path, {"NPROC": "1"}, *rank, "--learning_rate", "3e-4")
    assert value(training, "--learning_rate") == "7e-3" and training[-2:] == ["--learning_rate", "3e-4"]
    assert value(training, "--output_dir") == "dreambooth-lora" and comparison[3:6] == [
        model,
        "--lora",
        "dreambooth-lora",
    ]
    assert value(commands(tmp_path, {"NPROC": "1", "OUTPUT_DIR": "mine"}, *rank)[0], "--output_dir") == "mine"
    for flags in ([], rank):  # those of the trainers, for real models
        assert "--learning_rate" not in commands(tmp_path, {"MODEL_NAME": "some/model"}, *flags)[0]


def test_adapters_are_trained_and_compared(tiny_model, photos, commands_in_forks, tmp_path):
    settings = {"MODEL_NAME": str(tiny_model), "INSTANCE_DIR": str(photos), "NPROC": "1"}
    more = ["--lora_rank", "2", "--resolution", "32", "--num_class_images", "2", "--max_train_steps", "2"]
    done = launch("dreambooth.sh", tmp_path, settings, *more, commands=commands_in_forks)
    files = {path.name for path in (tmp_path / "a folder with spaces").iterdir()}
    assert WEIGHTS in files and "model_index.json" not in files
    assert "comparison.png: 24 images" in done.stdout and (tmp_path / "comparison.png").is_file()


def test_a_signal_to_the_launcher_alone_reaches_the_trainer(tiny_model, photos, tmp_path):
    """Which takes its time to save."""
    settings = {"MODEL_NAME": tiny_model, "INSTANCE_DIR": photos, "NPROC": "1", "CUDA_VISIBLE_DEVICES": ""}
    env = os.environ | settings | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = ["--max_train_steps", "100000", "--save_steps", "1", "--checkpoints_total_limit", "1"]
    command = ["bash", ROOT / "colossalai.sh", *words, "--resolution", "32", "--num_class_images", "1"]
    launcher = subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True)
    try:
        wait_for(lambda: list(tmp_path.glob("dreambooth-model/checkpoint-*")))
        launcher.terminate()
        assert launcher.wait(timeout=60) == 75
        assert not (tmp_path / "comparison.png").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)


@pytest.mark.parametrize("flag", SETTINGS)
def test_what_the_comparison_follows_is_a_setting_only(flag, tmp_path):
    """It would show another subject, or look for the trained model elsewhere."""
    for words in ([flag, "x"], [f"{flag}=x"]):
        done = launch("colossalai.sh", tmp_path, {}, *words, check=False)
        assert done.returncode == 2 and len(done.error_lines) == 1
        assert f"{flag}: set {SETTINGS[flag]} in the environment" in done.error_lines[0]


def test_settings_reach_the_trainer(commands_in_forks, tmp_path):
    for name, flag in (("PLACEMENT", "--placement"), ("PLUGIN", "--plugin"), ("INSTANCE_DIR", "--instance_data_dir")):
        training, *_ = commands(tmp_path, {name: "a b"})
        assert value(training, flag) == "a b"
    settings = {"NPROC": "1", "PLUGIN": "gemini"}
    done = launch("colossalai.sh", tmp_path, settings, commands=commands_in_forks, check=False)
    assert done.returncode == 2, "that of the trainer"
    assert len(done.error_lines) == 1 and "--plugin gemini needs a CUDA GPU" in done.error_lines[0], done.stderr


@pytest.mark.parametrize("launcher", ["colossalai.sh", "dreambooth.sh"])
def test_the_comparison_is_of_what_was_trained(launcher, tmp_path):
    """Further flags reach the trainer; those that name the model's files reach the comparison too."""
    settings = {"MODEL_NAME": "some/model", "INSTANCE_DIR": "my photos", "INSTANCE_PROMPT": "a zwx cat"}
    settings |= {"CLASS_PROMPT": "a cat", "OUTPUT_DIR": "cat", "COMPARISON": "sheet.png"}
    flags = ["--revision", "v2", "--variant=fp16", "--max_train_steps", "9", "--resume_from_checkpoint", "latest"]
    training, comparison = commands(tmp_path, settings, *flags, launcher=launcher)
    assert training[0] == "python" and Path(training[2]).parent == ROOT and training[-7:] == flags
    assert value(training, "--instance_data_dir") == value(comparison, "--instance_data_dir") == "my photos"
    assert value(training, "--pretrained_model_name_or_path") == value(comparison, "--compare_with") == "some/model"
    assert value(training, "--output_dir") == "cat" and value(comparison, "--output") == "sheet.png"
    assert comparison[:4] == ["python", "threads all", str(ROOT / "inference.py"), "cat"]
    assert "a zwx cat in the snow" in comparison and "a cat on the grass" in comparison
    assert comparison[6:8] == ["--revision=v2", "--variant=fp16"]


def test_an_empty_word_is_for_the_trainer_to_tell(tmp_path):
    done = with_stubs(tmp_path, {}, "--validation_prompt", "")
    assert "--validation_prompt\n\n" in done.stdout and not done.stderr


@pytest.mark.parametrize("words", [["--dry_run"], ["--help"], ["-h"]])
def test_where_nothing_was_trained_there_is_nothing_to_compare(words, tmp_path):
    assert len(commands(tmp_path, {}, *words)) == 1


def test_a_data_set_is_not_for_launchers(tmp_path):
    for words in (["--dataset_name", "x"], ["--dataset_name=x"]):
        done = launch("dreambooth.sh", tmp_path, {}, *words, check=False)
        assert done.returncode == 2 and "set INSTANCE_DIR, or call train_dreambooth.py" in done.error_lines[0]


def test_a_module_of_the_user_is_not_taken_for_ours(tmp_path):
    (tmp_path / "dreambooth.py").write_text("raise SystemExit('mine')")
    (tmp_path / "comparison.png").write_bytes(b"mine")
    done = launch("colossalai.sh", tmp_path, {}, check=False)
    assert done.returncode == 2 and "comparison.png is there, and is not as this program makes" in done.error_lines[0]


@pytest.mark.parametrize("flag", ["--external_unet_path", "--pretrained_vae_model_name_or_path", "--tokenizer_name"])
def test_a_part_that_the_comparison_would_not_show(flag, tmp_path):
    flags = [flag, "other"]
    done = launch("colossalai.sh", tmp_path, {}, *flags, check=False)
    assert done.returncode == 2 and "set COMPARISON= for none" in done.error_lines[0]
    assert commands(tmp_path, {"COMPARISON": ""}, *flags)[0][-2:] == flags


@pytest.mark.parametrize("launcher", ["colossalai.sh", "dreambooth.sh"])
def test_a_picture_of_somebody_else_is_not_written_over(launcher, tmp_path):
    """Known before the training."""
    (tmp_path / "comparison.png").write_text("mine")
    done = launch(launcher, tmp_path, {}, check=False)
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert "COMPARISON comparison.png is there" in done.error_lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.png"]
    done = launch(launcher, tmp_path, {"COMPARISON": "sheets/c.txt"}, check=False)
    assert done.returncode == 2 and "COMPARISON sheets/c.txt: the name has to end in .png" in done.error_lines[0]


@pytest.mark.parametrize("nproc", ["0", "two", "-1"])
def test_processes_that_are_no_number(nproc, tmp_path):
    done = launch("dreambooth.sh", tmp_path, {"NPROC": nproc}, check=False)
    assert (
        done.returncode == 2
        and done.stderr == f"dreambooth.sh: error: NPROC={nproc} is no number of processes, such as 2\n"
    )


def test_a_plugin_for_the_process_that_has_none(tmp_path):
    done = with_stubs(tmp_path, {"PLUGIN": "gemini"}, launcher="dreambooth.sh")
    assert "PLUGIN and PLACEMENT have no effect here" in done.stderr and "gemini" not in done.stdout


def test_defaults_are_those_of_the_project(tmp_path):
    """Wherever the user is; what is written goes to where he is."""
    training, comparison = commands(tmp_path, {"NPROC": "1"})
    assert value(training, "--pretrained_model_name_or_path") == str(ROOT / "assets/tiny-stable-diffusion")
    assert value(training, "--instance_data_dir") == str(ROOT / "assets/instance_images")
    assert value(training, "--class_data_dir").startswith("class_images/tiny-stable-diffusion-")
    assert value(training, "--output_dir") == "dreambooth-model" and value(comparison, "--output") == "comparison.png"
    assert value(comparison, "--num_inference_steps") == "25" and value(comparison, "--guidance_scale") == "4"


def test_the_class_folder_is_of_one_model_and_one_prompt(tmp_path):
    def folder(model: str, prompt: str = "a dog") -> str:
        settings = {"MODEL_NAME": model, "CLASS_PROMPT": prompt, "NPROC": "1", "COMPARISON": ""}
        return value(commands(tmp_path, settings)[0], "--class_data_dir")

    (tmp_path / "one" / "model").mkdir(parents=True)
    (tmp_path / "two" / "model").mkdir(parents=True)
    folders = [folder("one/model"), folder("two/model"), folder("owner/model"), folder("one/model", "a cat")]
    assert len(set(folders)) == 4
    assert folder("one/model/") == folder("./one/model") == folder(str(tmp_path / "one/model//")) == folders[0]
    assert folder("owner/model/") == folders[2], "what is no folder has its name too"
    for one in [*folders, folder("one/model", "a cat/dog")]:
        assert one.startswith("class_images/model-") and len(Path(one).parts) == 3


def test_as_many_processes_as_torch_sees_gpus(tmp_path):
    """nvidia-smi lists four cards and a part of each; CUDA_VISIBLE_DEVICES may leave less."""
    for seen, expected in (("1", ["python"]), ("3", ["torchrun", "--standalone", "--nproc_per_node", "3"])):
        training, comparison = commands(tmp_path, {"TORCH_GPUS": seen, "MODEL_NAME": "some/model"}, gpus=4)
        assert [training[0], *training[2:]][: len(expected)] == expected and comparison[0] == "python"
    for hidden in ({"CUDA_VISIBLE_DEVICES": ""}, {"NPROC": "1"}):  # torch, which takes seconds to answer, is not asked
        assert commands(tmp_path, {"TORCH_GPUS": "4", "MODEL_NAME": "some/model"} | hidden, gpus=4)[0][0] == "python"


def test_processes_share_the_cores_and_the_comparison_has_all(tmp_path):
    cores = len(os.sched_getaffinity(0))
    training, comparison = commands(tmp_path, {"NPROC": "2"})
    assert (training[1], comparison[1]) == (f"threads {max(1, cores // 2)}", "threads all")
    training, comparison = commands(tmp_path, {"NPROC": "2", "OMP_NUM_THREADS": "7"})
    assert (training[1], comparison[1]) == ("threads 7", "threads 7")
