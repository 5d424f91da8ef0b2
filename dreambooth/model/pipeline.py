"""A model as a whole: loaded for training, or as the pipeline that draws."""

import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from transformers import CLIPTokenizer, CLIPTokenizerFast, PreTrainedTokenizerBase

from dreambooth.command_line.console import UserError, warn
from dreambooth.model.components import (
    check_resolution,
    load_component,
    load_noise_scheduler,
    load_tokenizer,
    loading,
    part_folder,
    save_component,
    vae_factor,
    without_weights,
)
from dreambooth.model.family import Family, Model, dtype_of_vae
from dreambooth.model.folder import INDEX, family_of, load_sampler, read_index
from dreambooth.model.libraries import save_vocabulary
from dreambooth.model.lora import Lora, add_to_pipeline

NOTHING: Mapping[str, Path] = {}


def load_model(
    folder: Path,
    *,
    resolution: int,
    variant: str | None = None,
    tokenizer: Path | None = None,
    elsewhere: Mapping[str, Path] = NOTHING,
    trained: Path | None = None,
) -> Model:
    """Loads a model for training, on the CPU, the VAE in fp32.

    The other components are of the dtype of their files, which they are mapped from: no process has a copy of its own
    of what it does not use whole.

    Args:
        folder: of the model.
        resolution: of the images, in pixels.
        variant: of the weights, where a part has it.
        tokenizer: folder of other tokenizers than its own, as of `load_tokenizers`.
        elsewhere: folders of parts that come from somewhere else.
        trained: checkpoint whose parts count instead of those of the model.

    Raises:
        UserError: if a part cannot be loaded, parts do not fit, or images of that resolution have no latents.
    """
    family = family_of(folder)
    tokenizers = load_tokenizers(family, tokenizer or folder)
    components = {}
    for name in family.components:
        in_checkpoint = trained is not None and (trained / name).is_dir()
        source = trained if in_checkpoint else elsewhere.get(name, folder)
        components[name] = load_part(family, name, source, torch.float32 if name == "vae" else None, variant=variant)
        if name == "vae":
            check_resolution(resolution, components[name])
            components[name].requires_grad_(False)
    if "vae" in elsewhere:
        _compare_latents(folder / "vae", components["vae"])
    noise_scheduler = load_noise_scheduler(folder)
    if "unet" in elsewhere and (elsewhere["unet"].parent / "scheduler").is_dir():
        _check_target(elsewhere["unet"].parent, noise_scheduler)
    family.check_fit(tokenizers, components)
    family.freeze_unread(components)
    return Model(family, tokenizers, components, noise_scheduler)


def _check_target(other: Path, noise_scheduler: DDPMScheduler) -> None:
    """Finds a UNet, of the model in `other`, that predicts something else than this model's scheduler says.

    Raises:
        UserError: if it does.
    """
    found = load_noise_scheduler(other).config.prediction_type
    wanted = noise_scheduler.config.prediction_type
    if found != wanted:
        raise UserError(
            f"--external_unet_path is of a model that predicts {found}, and the scheduler of "
            f"--pretrained_model_name_or_path says {wanted}: name that model there instead"
        )


def _compare_latents(own: Path, vae: AutoencoderKL) -> None:
    """Warns of a VAE whose latents are scaled otherwise than those of the model's own, if that is there.

    Raises:
        UserError: if they have other sides.
    """
    if (own / "config.json").is_file():
        of_model = without_weights(AutoencoderKL, own)
        if vae_factor(of_model) != vae_factor(vae):
            raise UserError(
                f"the VAE makes latents that are {vae_factor(vae)} times smaller than images, and the model's own "
                f"{vae_factor(of_model)} times: use one that does as much"
            )
        wanted, found = of_model.config.scaling_factor, vae.config.scaling_factor
        if wanted != found:
            warn(
                f"the VAE scales latents by {found:g}, and the model's own by {wanted:g}: it is hardly one that the "
                "UNet was trained with"
            )


def load_tokenizers(family: Family, folder: Path) -> dict[str, CLIPTokenizer | CLIPTokenizerFast]:
    """Loads a family's tokenizers, each from its folder within `folder`, which may be that of an only one itself."""
    alone = len(family.tokenizers) == 1 and not (folder / family.tokenizers[0]).is_dir()
    missing = [] if alone else [name for name in family.tokenizers if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}: name a folder with {' and '.join(family.tokenizers)}"
        )
    return {name: load_tokenizer(folder if alone else folder / name) for name in family.tokenizers}


def load_part(
    family: Family,
    name: str,
    folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    *,
    variant: str | None = None,
) -> torch.nn.Module:
    """Loads one of a family's parts, on the CPU, for inference.

    Args:
        family: of the model.
        name: of the part.
        folder: of a model, of a checkpoint, or of the part itself.
        dtype: of its weights; None for that of its files.
        variant: of the weights, where it has it.
    """
    with loading(family.labels[name], folder):
        return load_component(family.components[name], part_folder(folder, name), dtype, variant)


def load_pipeline(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    variant: str | None = None,
    sampler: str | None = None,
    elsewhere: Mapping[str, Path] = NOTHING,
    lora: Lora | None = None,
    **parts: torch.nn.Module | CLIPTokenizer,
) -> DiffusionPipeline:
    """Loads a model anew, on the CPU, with some of its `parts` replaced and without a safety checker.

    Args:
        folder: of the model.
        dtype: of all parts, but for a VAE that computes in fp32 whatever the others do (`dtype_of_vae`).
        variant: of the weights that are loaded, where a part has it.
        sampler: class of diffusers by which it draws; None for the model's own.
        elsewhere: folders of parts that come from somewhere else.
        lora: adapters that it draws with.
        parts: by their names.
    """
    with loading("pipeline", folder):
        index, family = read_index(folder / INDEX, str(folder))
        parts |= {name: load_tokenizer(folder / name) for name in family.tokenizers if name not in parts}
        for name in family.components.keys() - parts.keys():
            # A VAE that may have to stay in fp32 is not rounded before it is known whether it does.
            loaded = torch.float32 if name == "vae" and family.heeds_force_upcast else dtype
            parts[name] = load_part(family, name, elsewhere.get(name, folder), loaded, variant=variant)
        parts["scheduler"] = load_sampler(folder, sampler)
        pipeline = family.pipeline(**(settings_in(index, family) | parts | family.left_out))
    if lora:
        add_to_pipeline(pipeline, lora)
    of_vae = dtype_of_vae(family, pipeline.vae, dtype)
    for name in family.components:
        getattr(pipeline, name).to(of_vae if name == "vae" else dtype)
    if of_vae != dtype:
        pipeline.vae.__class__ = _VAEInFp32
    return pipeline


class _VAEInFp32(AutoencoderKL):
    """A VAE in fp32 in a pipeline that is in half precision: diffusers' own does so in fp16 only."""

    def decode(self, z: torch.Tensor, *args: Any, **kwargs: Any):
        return super().decode(z.float(), *args, **kwargs)


def settings_in(index: dict, family: Family) -> dict[str, Any]:
    """Returns the arguments of a pipeline that its model_index.json has besides the parts."""
    names = inspect.signature(family.pipeline).parameters.keys() & index.keys()
    return {name: index[name] for name in names if not isinstance(index[name], list)}


def write_pipeline(pipeline: DiffusionPipeline, folder: str | Path, *, without: Collection[str] = ()) -> None:
    """Writes a pipeline as diffusers does, in safetensors, for the libraries of any time to read.

    Args:
        pipeline: on the CPU.
        folder: gets its index, and a new folder for each part.
        without: names of parts that are written otherwise.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if part is None or name in without:
            continue
        if isinstance(part, torch.nn.Module):
            save_component(part, folder / name)
        else:
            part.save_pretrained(folder / name)
        if isinstance(part, PreTrainedTokenizerBase):
            save_vocabulary(part, folder / name)
