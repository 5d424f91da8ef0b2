"""low_level_zero and gemini on two ranks, with the CPU in the place of GPUs (sharding_on_cpu.py).

The tiny model's loss hardly depends on its weights in a few steps: what counts is the gradient that AdamW was given,
which follows from the means that checkpoints hold.
"""

import json
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import torch
from harness import COLOSSALAI, ROOT, Running, command_line, scalars, train, unet_weights
from safetensors.torch import load_file, save_file

SCRIPT = "tests/sharding_on_cpu.py"
STRATEGIES = [
    ("low_level_zero", "cuda", "fp16"),
    ("low_level_zero", "cpu", "bf16"),
    ("gemini", "cuda", "fp16"),
    ("gemini", "cpu", "bf16"),
    ("gemini", "auto", "bf16"),
]
ROUNDING = {"fp16": 5e-3, "bf16": 3e-2}  # of a gradient, relative to its length
STEPS = 4

each = pytest.mark.parametrize("strategy", STRATEGIES, ids="-".join)


def strategy_flags(plugin: str, placement: str, precision: str) -> dict:
    return {"plugin": plugin, "placement": placement, "mixed_precision": precision}


def flatten(tensors: dict) -> torch.Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def weights(folder) -> torch.Tensor:
    return flatten(unet_weights(folder / "unet"))


def optimizer_state(checkpoint, name: str) -> torch.Tensor:
    tensors = load_file(checkpoint / "optimizer.safetensors")
    return flatten({key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")})


def gradient(output_dir, step: int) -> torch.Tensor:
    """Returns what AdamW was given in a step: its mean is a tenth of that and nine tenths of the mean before."""
    means = [optimizer_state(output_dir / f"checkpoint-{at}", "exp_avg") for at in range(max(1, step - 1), step + 1)]
    return (means[-1] - (0.9 * means[0] if step > 1 else 0)) / 0.1


def run_state(output_dir, step: int) -> dict:
    return json.loads((output_dir / f"checkpoint-{step}" / "state.json").read_text())


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture
def flags(tiny_model, photos):
    """Of steps of four samples, each of which is kept; at the first the learning rate is 0."""
    return {
        "pretrained_model_name_or_path": tiny_model,
        "instance_data_dir": photos,
        "instance_prompt": "a photo of sks dog",
        "resolution": 32,
        "train_batch_size": 2,
        "max_train_steps": STEPS,
        "save_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 1,
        "seed": 1,
    }


@pytest.fixture
def run_of(flags, once):
    """Returns a function that runs a strategy on two ranks once for all tests: the output folder."""

    def run(strategy: tuple[str, str, str]):
        def make(folder):
            train(SCRIPT, flags | strategy_flags(*strategy) | {"output_dir": folder / "out"}, nproc=2)

        return once("-".join(strategy), make) / "out"

    return run


@pytest.fixture
def reference(flags, once):
    """The output folder of a run in fp32 on one rank."""
    return once(
        "fp32-of-sharding",
        lambda folder: train(COLOSSALAI, flags | {"train_batch_size": 4, "output_dir": folder / "out"}),
    ).joinpath("out")


@each
def test_two_ranks_take_the_steps_of_fp32_on_one(strategy, run_of, reference, tiny_model):
    """Losses, norms, and the gradients that AdamW was given: clipped exactly, also when the loss scale has grown."""
    found, rounding = run_of(strategy), ROUNDING[strategy[-1]]
    norms = scalars(found, "grad_norm")
    assert min(norms) < 1 < max(norms), "some steps clip and some do not"
    np.testing.assert_allclose(scalars(found, "loss"), scalars(reference, "loss"), rtol=rounding / 10)
    np.testing.assert_allclose(norms, scalars(reference, "grad_norm"), rtol=rounding / 3)
    for step in range(1, STEPS + 1):
        given, wanted = gradient(found, step), gradient(reference, step)
        np.testing.assert_allclose(given.norm(), min(norms[step - 1], 1), rtol=1e-5)
        assert relative_error(given, wanted) < rounding, step
    start = weights(tiny_model)
    assert relative_error(weights(found) - start, weights(reference) - start) < 2 * rounding


@pytest.mark.parametrize("strategy", [STRATEGIES[0], STRATEGIES[3]], ids="-".join)
def test_stable_diffusion_xl_takes_the_steps_of_fp32(strategy, xl_model, flags, once, tmp_path):
    """With its text encoders, of which some weights are frozen."""
    flags |= {"pretrained_model_name_or_path": xl_model, "train_text_encoder": True}
    reference = once(
        "fp32-of-sharding-xl",
        lambda folder: train(COLOSSALAI, flags | {"train_batch_size": 4, "output_dir": folder / "out"}),
    ).joinpath("out")
    train(SCRIPT, flags | strategy_flags(*strategy) | {"output_dir": tmp_path}, nproc=2)
    rounding = ROUNDING[strategy[-1]]
    np.testing.assert_allclose(scalars(tmp_path, "loss"), scalars(reference, "loss"), rtol=rounding / 10)
    np.testing.assert_allclose(scalars(tmp_path, "grad_norm"), scalars(reference, "grad_norm"), rtol=rounding / 3)
    assert relative_error(gradient(tmp_path, STEPS), gradient(reference, STEPS)) < rounding
    saved = {part: load_file(tmp_path / part / "model.safetensors") for part in ("text_encoder", "text_encoder_2")}
    for part, tensors in saved.items():
        before = load_file(xl_model / part / "model.safetensors")
        frozen = [name for name in before if part == "text_encoder" and ("layers.2." in name or "final_" in name)]
        assert {name for name in before if tensors[name].equal(before[name])} == set(frozen)


@each
def test_no_bit_of_the_weights_is_lost_at_learning_rate_0(strategy, run_of, tiny_model):
    before, after = unet_weights(tiny_model / "unet"), unet_weights(run_of(strategy) / "checkpoint-1" / "unet")
    assert all(torch.equal(after[name], before[name]) for name in before)


@each
def test_fp32_weights_are_saved_and_not_the_copy_in_half_precision(strategy, run_of):
    moved = weights(run_of(strategy)).float()
    assert (moved.bfloat16().float() != moved).double().mean() > 0.9
    assert (moved.half().float() != moved).double().mean() > 0.9


@pytest.fixture
def go_on(run_of, flags, tmp_path):
    """Returns a function that goes on after a step of a strategy's run: the output folder."""

    def go(strategy: tuple[str, str, str], *, after: int, nproc: int):
        shutil.copytree(run_of(strategy) / f"checkpoint-{after}", tmp_path / f"checkpoint-{after}")
        more = {"train_batch_size": 4 // nproc, "output_dir": tmp_path, "resume_from_checkpoint": "latest"}
        train(SCRIPT, flags | strategy_flags(*strategy) | more, nproc=nproc)
        return tmp_path

    return go


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s[-1] == "fp16"], ids="-".join)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(strategy, run_of, go_on):
    """The loss scale has grown in step 2, and grows again in step 4, which the resumed run takes."""
    resumed, whole = go_on(strategy, after=3, nproc=2), run_of(strategy)
    for file in ("optimizer.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        here, there = (load_file(folder / f"checkpoint-{STEPS}" / file) for folder in (resumed, whole))
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in there)
    scaler = {"scale": 2.0**14, "_growth_step": 0, "_hysteresis_step": 0}
    assert run_state(resumed, STEPS)["grad_scaler"] == run_state(whole, STEPS)["grad_scaler"] == scaler


IN_A_FOLDER_OF_ITS_OWN = """
import os, runpy, sys
folder = os.path.join(os.path.dirname(sys.argv[0]), os.environ["RANK"])
os.mkdir(folder)
os.chdir(folder)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s[1] == "cuda"], ids="-".join)
def test_machines_that_share_no_files_send_theirs_to_rank_0(strategy, run_of, flags, tmp_path):
    """Two processes, each the only one of its machine by the environment, and in a folder of its own."""
    script = tmp_path / "apart.py"
    script.write_text(IN_A_FOLDER_OF_ITS_OWN)
    more = {"output_dir": "out", "save_steps": STEPS, "validation_prompt": "a dog", "num_validation_images": 1}
    argv = [str(ROOT / SCRIPT), *command_line(flags | strategy_flags(*strategy) | more)]
    Running(script, argv, 2, env={"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}).wait()
    here, there = tmp_path / "0" / "out", run_of(strategy)
    for file in (f"checkpoint-{STEPS}/optimizer.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        assert (here / file).read_bytes() == (there / file).read_bytes()
    assert (here / "validation" / f"step-{STEPS}.png").is_file() and not list((tmp_path / "1").iterdir())


def test_weights_in_half_precision_are_taken_as_they_are(flags, tiny_model, tmp_path):
    """A model of which there is an fp16 variant alone: its numbers are the fp32 weights of step 0."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(half, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    file.unlink()
    more = {"pretrained_model_name_or_path": model, "output_dir": tmp_path / "out", "max_train_steps": 1}
    train(SCRIPT, flags | strategy_flags("low_level_zero", "cuda", "bf16") | more, nproc=2)
    found = unet_weights(tmp_path / "out" / "unet")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in half.items())


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s[1] == "cpu"], ids="-".join)
def test_a_run_of_two_ranks_goes_on_on_one(strategy, run_of, go_on):
    resumed, whole = go_on(strategy, after=2, nproc=1), run_of(strategy)
    before = weights(whole / "checkpoint-2")
    assert relative_error(weights(resumed) - before, weights(whole) - before) < 0.05
    for name in ("exp_avg", "exp_avg_sq"):
        states = [optimizer_state(folder / f"checkpoint-{STEPS}", name) for folder in (resumed, whole)]
        assert relative_error(*states) < 0.03


@pytest.fixture
def two_batches_of_eight(flags, once):
    """The output folder of two steps in fp32 on one rank, of eight samples each, without clipping."""
    more = {"train_batch_size": 8, "max_train_steps": 2, "max_grad_norm": 0}
    return once(
        "fp32-of-eight", lambda folder: train(COLOSSALAI, flags | more | {"output_dir": folder / "out"})
    ).joinpath("out")


@pytest.mark.parametrize("plugin", ["low_level_zero", "gemini"])
def test_four_batches_on_two_ranks_are_one_of_eight_and_no_limit_clips_nothing(
    plugin, flags, two_batches_of_eight, tmp_path
):
    more = {"train_batch_size": 1, "gradient_accumulation_steps": 4, "max_train_steps": 2, "max_grad_norm": 0}
    flags |= strategy_flags(plugin, "cuda", "bf16") | more | {"output_dir": tmp_path}
    train(SCRIPT, flags, nproc=2)
    for step in (1, 2):
        wanted = gradient(two_batches_of_eight, step)
        assert relative_error(gradient(tmp_path, step), wanted) < ROUNDING["bf16"] and wanted.norm() > 1.05
    with pytest.raises(KeyError):
        scalars(tmp_path, "grad_norm")


@pytest.fixture
def as_if(flags, tmp_path):
    """Returns a function that takes a step or more on one rank, after some lines of Python: the finished process."""

    def run(lines: str, strategy: tuple[str, str, str], steps: int = 1, **more: object):
        script = tmp_path / "as_if.py"
        script.write_text(f"import sharding_on_cpu\n{lines}\nsharding_on_cpu.main()\n")
        more |= {"max_train_steps": steps, "lr_warmup_steps": 0, "output_dir": tmp_path / "out"}
        return train(str(script), flags | strategy_flags(*strategy) | more, check=False)

    return run


@pytest.mark.parametrize("plugin", ["low_level_zero", "gemini"])
def test_steps_whose_gradients_overflow_are_skipped(plugin, as_if, tiny_model, tmp_path):
    lines = "sharding_on_cpu.trainer.INITIAL_LOSS_SCALE = 2.0**32"
    done = as_if(lines, (plugin, "cuda", "fp16"), steps=2)
    assert done.returncode == 0 and "lr_scheduler" not in done.stderr, done.stderr
    assert np.isnan(scalars(tmp_path / "out", "grad_norm")).all()
    assert torch.equal(weights(tmp_path / "out"), weights(tiny_model))
    state = run_state(tmp_path / "out", 2)
    assert state["adam_step"] == 0
    assert state["grad_scaler"] == {"scale": 2.0**31, "_growth_step": 0, "_hysteresis_step": 2}


@pytest.mark.parametrize("plugin", ["low_level_zero", "gemini"])
def test_after_a_step_that_was_skipped_gradients_add_up_anew(plugin, as_if, tmp_path):
    """The first of its two batches overflows."""
    lines = (
        "from dreambooth.engine.booster_training import BoosterTraining as Training\n"
        "backward, factors = Training.backward, iter([1e38])\n"
        "Training.backward = lambda self, loss: backward(self, loss * next(factors, 1))"
    )
    done = as_if(lines, (plugin, "cuda", "fp16"), steps=3, train_batch_size=1, gradient_accumulation_steps=2)
    assert done.returncode == 0, done.stderr
    assert np.isfinite(scalars(tmp_path / "out", "grad_norm")).tolist() == [False, True, True]


# What another ColossalAI might do, and what is said of it then.
OTHERS = {
    "low_level_zero splits weights from their end": (
        ("low_level_zero", "cuda", "bf16"),
        "from colossalai.zero import LowLevelZeroOptimizer as Zero\n"
        "split = Zero._create_master_param_current_rank\n"
        "Zero._create_master_param_current_rank = lambda *args: [w.copy_(w.flip(0)) for w in split(*args)]",
        "has split the weights among ranks in an unknown way, as unet.",
    ),
    "gemini lays weights out with a gap": (
        ("gemini", "cpu", "bf16"),
        "from colossalai.zero import GeminiOptimizer as Gemini\n"
        "of = Gemini.get_offsets\n"
        "Gemini.get_offsets = lambda *args: (of(*args)[0], of(*args)[1] + 1, of(*args)[2] - 1)",
        "has split the weights among ranks in an unknown way, as unet.",
    ),
    "gemini divides by no argument of step": (
        ("gemini", "cuda", "bf16"),
        "from dreambooth.engine.plugins import ShardAdamW\n"
        "step = ShardAdamW.step\n"
        "ShardAdamW.step = lambda self, closure=None, div_scale=None: step(self, closure)",
        "did not say by what the gradients are to be divided",
    ),
    "it keeps gradients of this rank's part alone": (
        ("low_level_zero", "cpu", "bf16"),
        "from colossalai.zero.low_level.bookkeeping import GradientStore as Store\n"
        "of = Store.get_partitioned_gradients_by_param_id\n"
        "Store.get_partitioned_gradients_by_param_id = lambda *args: [part[1:] for part in of(*args)]",
        "has split the gradients among ranks in an unknown way",
    ),
    "it computes with copies of the weights": (
        ("low_level_zero", "cpu", "bf16"),
        "from colossalai.zero import LowLevelZeroOptimizer as Zero\n"
        "create = Zero._create_master_param_current_rank\n"
        "def create_beside(self, weights):\n"
        "    made = create(self, weights)\n"
        "    padded = self._working_param_to_padded_working_param\n"
        "    padded.update({one: whole.clone() for one, whole in padded.items()})\n"
        "    return made\n"
        "Zero._create_master_param_current_rank = create_beside",
        "has the weights that are computed with elsewhere",
    ),
    "gemini keeps half-precision weights on the GPU": (
        ("gemini", "cpu", "bf16"),
        "from dreambooth.engine.plugins import WritingGeminiOptimizer as Gemini\n"
        "set_grad_ptr = Gemini._set_grad_ptr\n"
        "def set_on_gpu(self):\n"
        "    for chunk in self.chunk16_set:\n"
        "        chunk.pin_memory = False\n"
        "    set_grad_ptr(self)\n"
        "Gemini._set_grad_ptr = set_on_gpu",
        "keeps weights on a GPU whose masters are in host memory",
    ),
    "it does not update the loss scale": (
        ("low_level_zero", "cuda", "fp16"),
        "from colossalai.amp.naive_amp.mixed_precision_mixin import FP16MixedPrecisionMixin\n"
        "FP16MixedPrecisionMixin.should_skip_step = lambda self: False",
        "did not say whether the gradients overflowed",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_colossalai_that_passes_an_override_by_is_told(other, as_if):
    strategy, lines, told = OTHERS[other]
    done = as_if(lines, strategy)
    assert done.returncode == 1 and len(done.error_lines) == 1, done.stderr
    assert f"error: ColossalAI {version('colossalai')} {told}" in done.error_lines[0]
    assert "install that of requirements.txt" in done.error_lines[0]


def test_a_colossalai_of_another_source_is_told_at_the_start(as_if):
    lines = "from dreambooth.engine import plugins\nplugins.SOURCES[plugins.Chunk] = 'that of another'"
    done = as_if(lines, ("gemini", "cpu", "bf16"))
    assert done.returncode == 0 and "inside Chunk: watch the first steps" in done.stderr, done.stderr


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s[1] == "cpu"], ids="-".join)
def test_steps_in_host_memory_are_the_same_to_the_bit_in_pieces_of_any_size(strategy, run_of, flags, tmp_path):
    """Of 128 elements, which cut through most weights."""
    script = tmp_path / "in_small_pieces.py"
    lines = "from dreambooth.engine import offload\noffload.PIECE = 128"
    script.write_text(f"import sharding_on_cpu\n{lines}\nsharding_on_cpu.main()\n")
    more = {"max_train_steps": 2, "output_dir": tmp_path / "out", "save_steps": 2}
    train(str(script), flags | strategy_flags(*strategy) | more, nproc=2)
    assert_same_state(tmp_path / "out", run_of(strategy), step=2)


def assert_same_state(output_dir, other, step: int) -> None:
    for file in ("optimizer.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        here, there = (load_file(folder / f"checkpoint-{step}" / file) for folder in (output_dir, other))
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in there)


NOTHING_IN_VAIN = """
from colossalai.zero.gemini.chunk import Chunk
def move(self, **settings):
    raise AssertionError("the GPU fetches fp32 weights")
Chunk._Chunk__paired_shard_move = move
from colossalai.logging import DistributedLogger
def debug(self, *message):
    raise AssertionError("a line that nobody sees is made at each step")
DistributedLogger.debug = debug
"""


def test_gemini_fetches_weights_that_are_in_half_precision_already_and_makes_no_line_in_vain(as_if, run_of):
    done = as_if(NOTHING_IN_VAIN, ("gemini", "cpu", "bf16"), steps=3)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("plugin", ["low_level_zero", "gemini"])
def test_after_steps_that_were_skipped_weights_in_host_memory_are_those_on_the_gpu(plugin, flags, tmp_path):
    """The first gradients overflow, and are where Gemini's weights have been."""
    script = tmp_path / "overflows.py"
    script.write_text(
        "import sharding_on_cpu\nsharding_on_cpu.trainer.INITIAL_LOSS_SCALE = 2.0**20\nsharding_on_cpu.main()\n"
    )
    runs = {}
    for placement in ("cuda", "cpu"):
        more = {"max_train_steps": 12, "save_steps": 12, "lr_warmup_steps": 0, "output_dir": tmp_path / placement}
        train(str(script), flags | strategy_flags(plugin, placement, "fp16") | more)
        runs[placement] = tmp_path / placement
    assert 1 < run_state(runs["cpu"], 12)["adam_step"] < 12
    assert run_state(runs["cpu"], 12)["grad_scaler"] == run_state(runs["cuda"], 12)["grad_scaler"]
    np.testing.assert_allclose(scalars(runs["cpu"], "loss"), scalars(runs["cuda"], "loss"), rtol=1e-3)
