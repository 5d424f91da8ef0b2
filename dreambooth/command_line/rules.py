"""The rules that hold between flags: what stands in the way of a run, and which flags have no effect.

Each yields what it has to say, in a line.
"""

import importlib.util
import os
from collections.abc import Iterator

from dreambooth.command_line.console import is_blank, is_utf_8
from dreambooth.command_line.flags import ALWAYS_SO, Flags, TrainingFlags, idle
from dreambooth.command_line.paths import is_model_file, kind_on_disk, not_utf_8, same_folder, unwritable

POLYNOMIAL_LR_END = 1e-7  # of diffusers


def problems_of(flags: Flags) -> list[str]:
    """Returns what stands in the way of a run, as far as flags and folders tell."""
    # Without words where there have to be some, the other rules have little to go by.
    return list(_blank_words(flags)) or [problem for rule in PROBLEMS for problem in rule(flags)]


def warnings_of(flags: Flags) -> list[str]:
    """Returns what is said of flags without an effect, and of what is hardly meant."""
    return [warning for rule in WARNINGS for warning in rule(flags)]


def _blank_words(flags: Flags) -> Iterator[str]:
    """A shell gives an empty word for a variable that is not set."""
    for group in flags.groups():
        for name, text in vars(group).items():
            if isinstance(text, str) and is_blank(text):
                yield f"--{name} {text!r} is blank: give it a value or leave it out"


def _broken_prompts(flags: Flags) -> Iterator[str]:
    prompts = {
        "instance_prompt": flags.instance.instance_prompt,
        "class_prompt": flags.prior.class_prompt,
        "validation_prompt": flags.validation.validation_prompt,
    }
    for name, text in prompts.items():
        if not is_utf_8(text or ""):
            yield f"--{name} is not valid UTF-8"


def _half_a_prior(flags: Flags) -> Iterator[str]:
    prior, instance = flags.prior, flags.instance
    if not prior.with_prior_preservation:
        return
    missing = [f"--{name}" for name in ("class_data_dir", "class_prompt") if not getattr(prior, name)]
    if missing:
        yield f"--with_prior_preservation also needs {' and '.join(missing)}"
        return
    for name in ("instance_data_dir", "dataset_name"):
        if (images := getattr(instance, name)) and same_folder(prior.class_data_dir, images):
            yield f"--class_data_dir is the folder of --{name}: class images need their own"


def _no_instance_images(flags: Flags) -> Iterator[str]:
    folder, dataset = flags.instance.instance_data_dir, flags.instance.dataset_name
    if folder and dataset:
        yield "--instance_data_dir and --dataset_name: name one of them"
    elif not folder and not dataset:
        yield "the images of the subject are missing: --instance_data_dir names a folder, --dataset_name a data set"
    elif folder and not os.path.isdir(folder):
        yield f"--instance_data_dir {folder} is not a folder"


def _unfit_output_dir(flags: Flags) -> Iterator[str]:
    folder = flags.output.output_dir
    yield from not_utf_8("--output_dir", folder)
    yield from unwritable("--output_dir", folder)
    if os.path.isfile(os.path.join(folder, "validation")):
        yield f"--output_dir {folder} has a file named validation, where a folder goes"
    if os.path.isdir(folder) and same_folder(folder, flags.model.pretrained_model_name_or_path):
        yield "--output_dir is the folder of --pretrained_model_name_or_path, which it would replace"


def _unfit_logging_dir(flags: Flags) -> Iterator[str]:
    output_dir, logs = flags.output.output_dir, flags.output.logging_dir
    yield from not_utf_8("--logging_dir", logs)
    if os.path.normpath(logs).split(os.sep)[0] == os.pardir:
        yield f"--logging_dir {logs} leads out of --output_dir: name a folder inside, or a whole path"
    elif os.path.isdir(output_dir) or os.path.isabs(logs):
        yield from unwritable("--logging_dir", os.path.join(output_dir, logs))


def _no_external_unet(flags: Flags) -> Iterator[str]:
    folder = flags.model.external_unet_path
    if folder and not os.path.isdir(folder) and not is_model_file(folder):
        yield f"--external_unet_path {folder} is not a folder, nor a .safetensors file"


def _no_file_to_configure(flags: Flags) -> Iterator[str]:
    folder, model = flags.model.single_file_config, flags.model.pretrained_model_name_or_path
    if folder and not os.path.isdir(folder):
        yield f"--single_file_config {folder} is not a folder"
    elif folder and not os.path.isfile(model) and not os.path.isfile(flags.model.external_unet_path or ""):
        yield "--single_file_config is of a model that is one file, and none is named"


def _embeddings_that_change(flags: Flags) -> Iterator[str]:
    if "pre_compute_text_embeddings" in flags.training.always_so and flags.model.train_text_encoder:
        yield "--pre_compute_text_embeddings: with --train_text_encoder prompts are encoded in every step"


def _polynomial_that_rises(flags: Flags) -> Iterator[str]:
    if flags.optimizer.lr_scheduler == "polynomial" and flags.optimizer.learning_rate <= POLYNOMIAL_LR_END:
        yield f"--lr_scheduler polynomial falls to {POLYNOMIAL_LR_END}: give a --learning_rate above it"


def _pipeline_of_adapters(flags: Flags) -> Iterator[str]:
    if flags.output.save_single_file and flags.lora.is_on:
        yield "--save_single_file writes a whole pipeline, and --lora_rank leaves none: leave one of them out"


def _compiled_adapters(flags: Flags) -> Iterator[str]:
    if flags.training.compile and flags.lora.is_on:
        yield "--compile is for whole UNets, and was not tried with --lora_rank: leave one of them out"


def _no_bitsandbytes(flags: Flags) -> Iterator[str]:
    if flags.optimizer.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        yield "--use_8bit_adam needs a package that is not there: pip install bitsandbytes"


def _flags_that_need_another(flags: Flags) -> Iterator[str]:
    for group in flags.groups():
        given: dict[str, list[str]] = {}
        for flag in idle(group):
            if getattr(group, flag.name) != flag.default:
                needed, one_of = flag.metadata["needs"], flag.metadata["needs_one_of"]
                here = f"on --{needed} {getattr(group, needed)}, but on {', '.join(one_of)}"
                given.setdefault(here if one_of else f"without --{needed}", []).append(f"--{flag.name}")
        for where, names in given.items():
            yield f"{', '.join(names)}: no effect {where}"


def _flags_of_other_trainers(flags: Flags) -> Iterator[str]:
    for name in flags.training.always_so:
        yield f"--{name}: no effect, {ALWAYS_SO[name]}"


def _prompts_that_are_the_same(flags: Flags) -> Iterator[str]:
    prior, instance_prompt = flags.prior, flags.instance.instance_prompt or ""
    if prior.with_prior_preservation and prior.class_prompt.split() == instance_prompt.split():
        yield "--class_prompt is --instance_prompt: give the subject a rare word, which the class does not have"


def _revision_of_a_folder(flags: Flags) -> Iterator[str]:
    if flags.model.revision and (kind := kind_on_disk(flags.model.pretrained_model_name_or_path)):
        yield f"--revision: no effect on a local {kind}"


def _epochs_beside_steps(flags: Flags) -> Iterator[str]:
    if flags.training.max_train_steps and flags.training.num_train_epochs != TrainingFlags.num_train_epochs:
        yield "--num_train_epochs: no effect beside --max_train_steps"


def _settings_of_accelerate(flags: Flags) -> Iterator[str]:
    accumulation = str(flags.training.gradient_accumulation_steps)
    for name, defaults, flag in (
        ("GRADIENT_ACCUMULATION_STEPS", ("1", accumulation), "--gradient_accumulation_steps"),
        ("DYNAMO_BACKEND", ("no",), "--compile"),
        ("USE_CPU", ("false",), "CUDA_VISIBLE_DEVICES"),
    ):
        value = os.environ.get(f"ACCELERATE_{name}", "")
        if value and value.lower() not in defaults:
            yield f"ACCELERATE_{name}={value}: no effect, {flag} decides"


def _another_local_rank(flags: Flags) -> Iterator[str]:
    local_rank = flags.training.local_rank
    if local_rank is not None and str(local_rank) != (os.environ.get("LOCAL_RANK") or "0"):
        yield f"--local_rank {local_rank}: no effect, LOCAL_RANK of the environment decides"


PROBLEMS = (
    _broken_prompts,
    _half_a_prior,
    _no_instance_images,
    _unfit_output_dir,
    _unfit_logging_dir,
    _no_external_unet,
    _no_file_to_configure,
    _embeddings_that_change,
    _polynomial_that_rises,
    _compiled_adapters,
    _pipeline_of_adapters,
    _no_bitsandbytes,
)
WARNINGS = (
    _flags_that_need_another,
    _flags_of_other_trainers,
    _prompts_that_are_the_same,
    _revision_of_a_folder,
    _epochs_beside_steps,
    _settings_of_accelerate,
    _another_local_rank,
)
