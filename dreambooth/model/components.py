"""A model's parts, each loaded from its folder and checked: whatever family they are of."""

import contextlib
import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDPMScheduler
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, CLIPTokenizerFast, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from dreambooth.command_line.console import UserError, first_line, warn
from dreambooth.command_line.paths import PICKLES, content_of
from dreambooth.model.libraries import name_in_file
from dreambooth.model.precision import all_finite
from dreambooth.model.weights import Weights, choose_weights, stored_dtype, weight_files
from dreambooth.processes.threads import cores_left_over

PREDICTION_TYPES = ("epsilon", "v_prediction")
# The functions of torch that fill a weight with its first numbers, and return it.
INITIALIZERS = tuple(name for name in dir(torch.nn.init) if name.endswith("_") and not name.startswith("_"))


@contextlib.contextmanager
def loading(part: str, source: str | Path) -> Iterator[None]:
    """Turns what the libraries raise for a file that is missing, torn or of another shape into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # What a damaged file leads the libraries to has no limit.
        raise UserError(f"cannot load the {part} of {source}: {first_line(error)}") from error


def check_safetensors(file: str | Path, part: str, flag: str) -> None:
    """Finds out whether a file is in safetensors.

    Args:
        file: that is there.
        part: what is to be in it, for messages.
        flag: that gives its name, likewise.

    Raises:
        UserError: saying what it is instead, and of a pickle what makes a safetensors file of it.
    """
    with loading(part, file):
        content = content_of(file)
    if content in ("a zip", "a pickle") or str(file).lower().endswith(PICKLES):
        raise UserError(
            f"{flag} {file} is a pickle, which may run code when it is read: "
            f"python -m dreambooth.model.unpickle {shlex.quote(str(file))} makes a .safetensors file of it that cannot"
        )
    if content != "a safetensors file":
        raise UserError(f"{flag} {file} is {content}: name a .safetensors file of a {part}")


def choose(kind: type, names: Sequence[str], variant: str | None) -> Weights:
    """Returns which of the weights among the files `names` a part of a class is loaded from, as `choose_weights`."""
    return choose_weights(names, stem_of(kind), variant)


def stem_of(kind: type) -> str:
    """Returns with what the files of the weights of a class begin."""
    return "model" if issubclass(kind, PreTrainedModel) else "diffusion_pytorch_model"


def save_component(component: torch.nn.Module, folder: Path) -> None:
    """Writes a component, in safetensors, as its library would but for names that not all releases read."""
    save_configuration(component, folder)
    tensors = {name_in_file(component, name): tensor.contiguous() for name, tensor in component.state_dict().items()}
    save_file(tensors, folder / f"{stem_of(type(component))}.safetensors", metadata={"format": "pt"})


def save_configuration(component: torch.nn.Module, folder: Path) -> None:
    """Writes what a component is but for its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(component, PreTrainedModel):
        disable_progress_bar()
        # Transformers writes the dtype of the weights, and loads them in it, where diffusers loads the other parts in
        # fp32: a pipeline of both would not draw.
        empty_copy(component).save_pretrained(folder, state_dict={})  # no weights, no file of them
    else:
        component.save_config(folder)


def without_weights(kind: type, folder: Path) -> torch.nn.Module:
    """Returns a part of the configuration in `folder`, whose weights take no memory."""
    of_transformers = issubclass(kind, PreTrainedModel)
    return _empty(kind, kind.config_class.from_pretrained(folder) if of_transformers else kind.load_config(folder))


def empty_copy(module: torch.nn.Module) -> torch.nn.Module:
    """Returns a model of the same class and configuration, whose weights take no memory."""
    return _empty(type(module), module.config)


def _empty(kind: type, config: Any) -> torch.nn.Module:
    # Numbers are not drawn for weights that take no memory: it would be half of the time.
    by_torch = mock.patch.multiple(torch.nn.init, **dict.fromkeys(INITIALIZERS, lambda tensor, *_, **__: tensor))
    by_transformers = mock.patch.object(PreTrainedModel, "init_weights", lambda model: None)
    with init_empty_weights(), by_torch, by_transformers:
        return kind(config) if issubclass(kind, PreTrainedModel) else kind.from_config(config)


def load_component(
    kind: type, folder: Path, dtype: torch.dtype | None = torch.float32, variant: str | None = None
) -> torch.nn.Module:
    """Loads a part of a class from its folder, on the CPU, for inference.

    Weights whose files have them in `dtype` stay in these files, mapped into memory, until they are moved or changed.

    Args:
        kind: class of the part.
        folder: of it.
        dtype: of its weights; None for that of the files.
        variant: of the weights, where it has it.

    Raises:
        UserError: if its weights are not whole, or not all finite.
    """
    weights = choose(kind, os.listdir(folder), variant)
    files = weight_files(folder, weights)
    dtype = dtype or stored_dtype(files[0])
    disable_progress_bar()  # of transformers' shards, on every rank
    if weights.in_shards and not issubclass(kind, PreTrainedModel):
        # diffusers 0.29 would leave shards to accelerate, whose newer releases fail over them.
        module = _fill(without_weights(kind, folder), files, folder).to(dtype).eval()
    else:
        module, info = kind.from_pretrained(
            folder, variant=weights.variant, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        if info["missing_keys"]:
            raise UserError(f"{folder} has no weights for {min(info['missing_keys'])}")
    with cores_left_over():
        for name, parameter in module.named_parameters():
            if parameter.is_meta:  # an index that is wrong
                raise UserError(f"{folder} has no weights for {name}")
            if not all_finite(parameter):
                raise UserError(f"the weights in {folder} are damaged: {name} is not finite everywhere")
    return module


def _fill(module: torch.nn.Module, files: list[Path], folder: Path) -> torch.nn.Module:
    """Gives a model without weights those of its shards."""
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for name, tensor in module.state_dict().items():
        if name not in weights:
            raise UserError(f"{folder} has no weights for {name}")
        if weights[name].shape != tensor.shape:
            found, wanted = tuple(weights[name].shape), tuple(tensor.shape)
            raise ValueError(f"{name} has the shape {found}, and by config.json {wanted}")
    module.load_state_dict(weights, strict=False, assign=True)
    return module


def load_tokenizer(folder: Path) -> CLIPTokenizer | CLIPTokenizerFast:
    """Loads a tokenizer from its folder."""
    with loading("tokenizer", folder):
        # Newer releases of transformers save a tokenizer.json alone, which CLIPTokenizer of older ones cannot load.
        files = os.listdir(folder)
        kind = CLIPTokenizerFast if "tokenizer.json" in files and "vocab.json" not in files else CLIPTokenizer
        tokenizer = kind.from_pretrained(folder)
        if tokenizer.model_max_length < 2:  # the marks of start and end alone
            raise ValueError(f"its model_max_length is {tokenizer.model_max_length}")
        return tokenizer


def check_resolution(resolution: int, vae: AutoencoderKL) -> None:
    """Finds out whether images of a side of `resolution` pixels have latents.

    Raises:
        UserError: if the VAE's factor does not divide it.
    """
    factor = vae_factor(vae)
    if resolution % factor:
        lower = resolution // factor * factor
        raise UserError(
            f"--resolution {resolution} is not a multiple of {factor}, the factor of this model's VAE: "
            f"use {f'{lower} or ' if lower else ''}{lower + factor}"
        )


def part_folder(folder: str | Path, part: str) -> Path:
    """Returns the folder of a part: `folder` is one itself, such as checkpoint-500/unet, or has one."""
    folder = Path(folder)
    return folder / part if (folder / part).is_dir() else folder


def warn_of_dropout(*parts: torch.nn.Module) -> None:
    """Warns of parts whose dropout is on in training: it draws what no seed and no checkpoint of a run fixes."""
    if rate := dropout_of(*parts):
        warn(f"dropout of {rate:g} is drawn anew in each run: neither a repeated nor a resumed one goes exactly alike")


def dropout_of(*parts: torch.nn.Module) -> float:
    """Returns the highest rate of dropout in some parts; 0 where there is none."""
    modules = [module for part in parts for module in part.modules()]
    rates = [module.p for module in modules if isinstance(module, torch.nn.Dropout)]
    rates += [module.dropout for module in modules if isinstance(vars(module).get("dropout"), float)]  # as CLIP has it
    return max(rates, default=0.0)


def load_noise_scheduler(model: Path) -> DDPMScheduler:
    """Loads the noise schedule that the checkpoint was trained with.

    Raises:
        UserError: if it has none, or its UNet predicts something that this project has no loss for.
    """
    with loading("scheduler", model):
        config = DDPMScheduler.load_config(model / "scheduler")
        if not {"beta_start", "trained_betas"} & config.keys() or config.get("use_flow_sigmas"):
            raise UserError(
                f"the scheduler of {model}, a {config.get('_class_name')}, has no betas: this project trains models "
                "whose noise is scheduled by betas, not by flow matching or by sigmas alone"
            )
        noise_scheduler = DDPMScheduler.from_config(config)
        if not noise_scheduler.alphas_cumprod.isfinite().all() or not len(noise_scheduler.alphas_cumprod):
            raise ValueError("its noise schedule is empty or not finite")
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"the scheduler of {model} has prediction_type {prediction_type!r}; "
            f"this project trains {' and '.join(PREDICTION_TYPES)}"
        )
    return noise_scheduler


def vae_factor(vae: AutoencoderKL) -> int:
    """Returns by how much the VAE's latents are smaller than its images, along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_shape(vae: AutoencoderKL, resolution: int) -> tuple[int, int, int]:
    """Returns (channels, height, width) of the latents of a square image of `resolution` pixels."""
    side = resolution // vae_factor(vae)
    return vae.config.latent_channels, side, side


def noise_settings(noise_scheduler: DDPMScheduler) -> dict:
    """Returns what a run takes of its noise scheduler."""
    config = noise_scheduler.config
    betas = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    noise = {name: config.get(name) for name in ("num_train_timesteps", *betas)}
    return {"prediction_type": config.prediction_type, "noise schedule": noise}


def fingerprint_of_tokens(tokenizer: CLIPTokenizer) -> str:
    """Returns what tells tokenizers of other tokens apart: hexadecimal digits."""
    tokens = [sorted(tokenizer.get_vocab().items()), tokenizer.pad_token_id, tokenizer.model_max_length]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def fingerprint(*parts: torch.nn.Module) -> str:
    """Returns what tells models of other weights apart, in a pass over them in fp32: hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        for name, tensor in sorted((name_in_file(part, name), one) for name, one in part.state_dict().items()):
            same = tensor.float() if tensor.is_floating_point() else tensor
            numbers = same.contiguous().view(torch.uint8).flatten()
            whole = numbers[: numbers.numel() // 4 * 4].view(torch.int32).sum(dtype=torch.int64)
            digest.update(f"{name} {tuple(tensor.shape)} {whole}".encode())
    return digest.hexdigest()[:16]
