"""A model in one .safetensors file of the original layout, as community sites give it, and as it is written for them.

One that is read is unpacked, once, to a folder in diffusers' layout in a cache; all else goes on from there.
"""

import fcntl
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from diffusers.utils.logging import disable_progress_bar
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreambooth.command_line.console import UserError, first_line, say
from dreambooth.command_line.paths import NO_LOCKS, PARTIAL, flush
from dreambooth.model.components import check_safetensors, loading, noise_settings, stem_of, without_weights
from dreambooth.model.configurations import (
    SHAPE_OF_1,
    SHAPE_OF_2,
    SHAPE_OF_XL,
    build_pipeline,
    clip_tokenizer,
    write_configuration,
)
from dreambooth.model.family import Family
from dreambooth.model.folder import INDEX, family_of
from dreambooth.model.original_layout import of_clip, of_open_clip, of_unet, of_vae
from dreambooth.model.pipeline import load_noise_scheduler, write_pipeline
from dreambooth.model.weights import DTYPES, choose_weights, weight_files

# What diffusers calls the models that this project trains: the shape of each, and what its UNet predicts.
KINDS = {
    "v1": ("Stable Diffusion 1.x", SHAPE_OF_1, "epsilon"),
    "v2": ("Stable Diffusion 2.1", SHAPE_OF_2, "v_prediction"),
    "xl_base": ("Stable Diffusion XL", SHAPE_OF_XL, "epsilon"),
}
# Keys without weights by which files of XL say that they predict v, and that their last timestep is all noise.
V_PREDICTION, ENDS_IN_NOISE = "v_pred", "ztsnr"
BY_SIGMAS = "edm_vpred."  # what the names of two others begin with, of models whose noise no betas schedule
OF_UNET = "model.diffusion_model."
OF_PARTS = OF_UNET, "first_stage_model.", "cond_stage_model.", "conditioner."
# What the UNet and the VAE's decoder begin with: both read latents, but for UNets that read more besides.
FIRST_OF_UNET, FIRST_OF_DECODER = f"{OF_UNET}input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"
# In the metadata of files, by the conventions of https://github.com/Stability-AI/ModelSpec.
ARCHITECTURES = {"v1": "stable-diffusion-v1", "v2": "stable-diffusion-v2", "xl_base": "stable-diffusion-xl-v1-base"}


WAY = 2  # of unpacking; another number unpacks anew what an earlier release has in the cache


def cache_folder() -> Path:
    """Returns the folder of unpacked models, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dreambooth")


def unpack(name: str, flag: str, configuration: str | None) -> Path:
    """Returns the folder of the model in a file; it is unpacked unless it was before.

    Args:
        name: path of the file.
        flag: that gives it, for messages.
        configuration: folder of a model in diffusers' layout whose configurations and tokenizers are this one's; None
            for those that its keys tell of.

    Raises:
        UserError: if the file is of another kind, or there is no room.
    """
    check_safetensors(name, "model", flag)
    with loading("model", name):
        with safe_open(name, framework="pt") as file:
            shapes = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}
            of_parts = [key for key in shapes if key.startswith(OF_PARTS)]  # files have other numbers besides
            dtypes = {DTYPES.get(file.get_slice(key).get_dtype()) for key in of_parts} - {None}
    title, write = _described(shapes, name, flag, configuration)
    # Half precisions of both kinds fit into fp32 alone.
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    folder = cache_folder() / f"{Path(name).stem}-{_key(Path(name), configuration)}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder) as alone:
            if not folder.exists():
                if alone:
                    for left in folder.parent.glob(f"{glob.escape(folder.name)}*{PARTIAL}*"):
                        shutil.rmtree(left, ignore_errors=True)  # by a run that was killed, with what is beside it
                partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{PARTIAL}")
                try:
                    with loading("model", name):
                        write(partial, dtype)
                    for path in [*partial.rglob("*"), partial]:  # with its name it is taken to be whole
                        flush(path)
                    _take_name(partial, folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
                say(f"{flag} {name}: {title}, unpacked to {folder}, where the next run finds it")
    except OSError as error:
        raise UserError(f"{flag} {name} cannot be unpacked to {folder}: {first_line(error)}") from error
    return folder


def _described(
    shapes: Mapping[str, Tensor], name: str, flag: str, configuration: str | None
) -> tuple[str, Callable[[Path, torch.dtype], None]]:
    """Returns what a model is called, and a function that writes its folder in a dtype."""
    if not any(key.startswith(OF_UNET) for key in shapes):
        if any("lora" in key for key in shapes):
            raise UserError(f"{flag} {name} is a LoRA: name the model that it was made for")
        raise UserError(f"{flag} {name} is not a Stable Diffusion in its original layout, whole in one file")
    if configuration is None:
        kind = _kind_of(shapes)
        if kind not in KINDS:
            raise UserError(
                f"{flag} {name} is what diffusers calls {kind}, which this project does not train: "
                f"use a {', '.join(title for title, *_ in KINDS.values())}"
            )
        if any(key.startswith(BY_SIGMAS) for key in shapes):
            raise UserError(
                f"{flag} {name} is of the EDM kind, such as CosXL, whose noise this project does not schedule"
            )
        title, shape, _ = KINDS[kind]
        prediction_type = _prediction_type(shapes, kind)
        title += f" that predicts {'v' if prediction_type == 'v_prediction' else 'epsilon'}"

    def write(folder: Path, dtype: torch.dtype) -> None:
        if configuration is not None:
            family_of(Path(configuration))  # says what is wrong with the folder
            if not _fits(shapes, without_weights(UNet2DConditionModel, Path(configuration, "unet"))):
                raise UserError(f"{flag} {name} is of another shape than --single_file_config {configuration}")
            write_pipeline(_load(name, Path(configuration), dtype), folder)
            return
        if not _is_of_kind(shapes, kind):
            beside = Path(name).parent
            where = f", as {beside} does" if (beside / INDEX).is_file() else ""
            raise UserError(
                f"{flag} {name} has the keys of a {title} and another shape, which files do not tell: "
                f"name a folder that has its configurations with --single_file_config{where}"
            )
        source = folder.with_name(f"{folder.name}.configuration")
        try:
            write_configuration(source, shape, prediction_type, ends_in_noise=ENDS_IN_NOISE in shapes)
            write_pipeline(_load(name, source, dtype), folder)
        finally:
            shutil.rmtree(source, ignore_errors=True)

    return ("a model" if configuration else title), write


def _kind_of(shapes: Mapping[str, Tensor]) -> str:
    """Returns what diffusers calls a model of these weights.

    It goes by how many channels a UNet reads. Where these are all of the VAE's, the model is an ordinary one, however
    many they are.
    """
    first, latents = shapes.get(FIRST_OF_UNET), shapes.get(FIRST_OF_DECODER)
    if first is not None and latents is not None and first.shape[1] == latents.shape[1]:
        shapes = {**shapes, FIRST_OF_UNET: torch.empty(first.shape[0], 4, 3, 3, device="meta")}
    return infer_diffusers_model_type(shapes)


def _prediction_type(shapes: Collection[str], kind: str) -> str:
    """Returns what the UNet of a model of these keys predicts, as far as a file says."""
    return "v_prediction" if V_PREDICTION in shapes else KINDS[kind][2]


def _is_of_kind(shapes: Mapping[str, Tensor], kind: str) -> bool:
    """Whether a model's UNet is of the shape of those that everybody starts from."""
    with init_empty_weights():
        return _fits(shapes, UNet2DConditionModel(**KINDS[kind][1]["unet"]))


def _fits(shapes: Mapping[str, Tensor], unet: UNet2DConditionModel) -> bool:
    """Whether a model has all weights of a UNet, each with as many numbers."""
    wanted = of_unet(unet.state_dict(), unet.config.layers_per_block)
    return all(name in shapes and shapes[name].numel() == one.numel() for name, one in wanted)


def _load(name: str, configuration: Path, dtype: torch.dtype) -> DiffusionPipeline:
    disable_progress_bar()
    family = family_of(configuration)
    return family.pipeline.from_single_file(
        name, config=str(configuration), local_files_only=True, torch_dtype=dtype, **family.left_out
    )


def _configurations(folder: Path) -> list[Path]:
    """Returns the files by which the folder of --single_file_config says what a model is."""
    patterns = "model_index.json", "*/*config.json", "tokenizer*/*"
    return sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())


def _key(path: Path, configuration: str | None) -> str:
    """Returns what tells a file from another: where it is, its size, when it was written, and how it is unpacked."""
    status = path.stat()
    told = (
        WAY,
        str(path.resolve()),
        status.st_size,
        status.st_mtime_ns,
        configuration and [(file.name, file.read_bytes()) for file in _configurations(Path(configuration))],
    )
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Within it no other process unpacks to a folder; it is told whether that is so, which takes locks."""
    alone = True
    with open(folder.with_name(f"{folder.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            alone = False
        yield alone


def _take_name(partial: Path, folder: Path) -> None:
    """Gives a folder that is whole now its name; another process may have been faster with the same."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _tells_all(weights: Mapping[str, Tensor], kind: str, noise_scheduler: DDPMScheduler, vae: AutoencoderKL) -> bool:
    """Whether who reads a file of these weights makes the model of it that they are of."""
    ends_in_noise, prediction_type = ENDS_IN_NOISE in weights, _prediction_type(weights, kind)
    with init_empty_weights():
        read = build_pipeline(KINDS[kind][1], clip_tokenizer, prediction_type, ends_in_noise=ends_in_noise)
    noise = noise_settings(DDPMScheduler.from_config(read.scheduler.config))
    is_same = noise == noise_settings(noise_scheduler) and read.vae.config.scaling_factor == vae.config.scaling_factor
    return is_same and _fits(weights, read.unet)


def write_single_file(
    folder: Path, path: Path, family: Family, dtype: torch.dtype, *, title: str, resolution: int
) -> None:
    """Writes the model in a folder as one file in the original layout; says so where the file does not tell all.

    Args:
        folder: in diffusers' layout, with plain weights.
        path: of the file.
        family: of the model.
        dtype: of its weights.
        title: what programs call it.
        resolution: of the images that it was trained on, in pixels.
    """
    parts, models = {}, {}
    for name, kind in family.components.items():
        files = weight_files(folder / name, choose_weights(os.listdir(folder / name), stem_of(kind), None))
        parts[name] = {key: tensor for file in files for key, tensor in load_file(file).items()}
        models[name] = without_weights(kind, folder / name)
    weights = dict(of_unet(parts["unet"], models["unet"].config.layers_per_block))
    weights |= of_vae(parts["vae"], len(models["vae"].config.block_out_channels))
    is_xl = len(family.text_encoders) > 1
    kind = "xl_base" if is_xl else "v1"
    for number, name in enumerate(family.text_encoders):
        prefix = f"conditioner.embedders.{number}." if is_xl else "cond_stage_model."
        of_openai = models[name].config.hidden_act == "quick_gelu"  # OpenCLIP has the exact one
        weights |= (of_clip if of_openai else of_open_clip)(parts[name], prefix)
        if not (of_openai or is_xl):
            kind = "v2"
    noise_scheduler = load_noise_scheduler(folder)
    is_v = noise_scheduler.config.prediction_type == "v_prediction"
    if is_xl and is_v:
        weights[V_PREDICTION] = torch.empty(0)
        if noise_scheduler.config.rescale_betas_zero_snr:
            weights[ENDS_IN_NOISE] = torch.empty(0)
    told = {
        "sai_model_spec": "1.0.0",
        "architecture": ARCHITECTURES[kind] + ("-768-v" if kind == "v2" and is_v else "-512" if kind == "v2" else ""),
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "resolution": f"{resolution}x{resolution}",
        "prediction_type": "v" if is_v else "epsilon",
    }
    weights = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in weights.items()
    }
    if not _tells_all(weights, kind, noise_scheduler, models["vae"]):
        say(
            f"{path.name} does not tell this model's configurations, which are none that everybody starts from: "
            "who reads it names the folder beside it, here with --single_file_config"
        )
    save_file(weights, path, metadata={"format": "pt"} | {f"modelspec.{key}": value for key, value in told.items()})
