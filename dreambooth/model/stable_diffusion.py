"""The five parts of a Stable Diffusion checkpoint: tokenizer, text encoder, VAE, UNet, noise scheduler."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer, CLIPTokenizerFast, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from dreambooth.command_line.console import UserError, first_line, warn
from dreambooth.model.precision import all_finite
from dreambooth.model.weights import Weights, choose_weights, weight_files

PREDICTION_TYPES = ("epsilon", "v_prediction")
ENCODED_AT_A_TIME = 32  # prompts
INDEX = "model_index.json"
# The parts that have weights, and what they are called.
KINDS = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
LABELS = {"text_encoder": "text encoder", "unet": "UNet", "vae": "VAE"}
PARTS = (*KINDS, "tokenizer", "scheduler")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # other parts that a Stable Diffusion may have


@contextlib.contextmanager
def loading(part: str, source: str | Path) -> Iterator[None]:
    """Turns what the libraries raise for a file that is missing, torn or of another shape into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # What a damaged file leads the libraries to has no limit.
        raise UserError(f"cannot load the {part} of {source}: {first_line(error)}") from error


def read_index(path: Path, model: str) -> dict:
    """Reads a model_index.json.

    Raises:
        UserError: if it is missing or broken, or of a pipeline that this project cannot train.
    """
    try:
        index = json.loads(path.read_text())
        classes = {part: index[part][1] or kind.__name__ for part, kind in KINDS.items() if part in index}
        others = [part for part, entry in index.items() if isinstance(entry, list) and entry[1] is not None]
        others = sorted({part for part in others if not part.startswith("_")} - {*PARTS, *UNUSED})
        scheduler = index["scheduler"][1]
        known = hasattr(getattr(diffusers, scheduler, None), "from_pretrained")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path} is not that of a Stable Diffusion folder in diffusers' layout") from error
    if others or any(KINDS[part].__name__ != found for part, found in classes.items()):
        raise UserError(
            f"{model} is a {index.get('_class_name')}, which this project does not train: "
            "use a Stable Diffusion 1.x or 2.x"
        )
    if not known:
        raise UserError(f"{path} names a scheduler that diffusers does not have: {scheduler}")
    return index


def scheduler_class(index: dict) -> type:
    """Returns the class of the scheduler that a model_index.json names."""
    return getattr(diffusers, index["scheduler"][1])


def choose(part: str, names: Sequence[str], variant: str | None) -> Weights:
    """Returns which of the weights among the files `names` a part is loaded from, as `choose_weights` does."""
    stem = "model" if issubclass(KINDS[part], PreTrainedModel) else "diffusion_pytorch_model"
    return choose_weights(names, stem, variant)


def check_configurations(folder: Path) -> None:
    """Compares the shapes of a model's parts by their configurations; no weights are read.

    Raises:
        UserError: as `check_parts_fit` does, or if a configuration cannot be read.
    """
    models = {}
    for part in KINDS:
        with loading(LABELS[part], folder):
            models[part] = _without_weights(part, folder / part)
    check_parts_fit(load_tokenizer(folder, None), **models)


def _without_weights(part: str, folder: Path) -> torch.nn.Module:
    """Returns a model of the configuration in `folder`, whose weights take no memory."""
    kind = KINDS[part]
    with init_empty_weights():
        if issubclass(kind, PreTrainedModel):
            return kind(kind.config_class.from_pretrained(folder))
        return kind.from_config(kind.load_config(folder))


def _load_weights(
    part: str, folder: Path, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> torch.nn.Module:
    """Loads a part, on the CPU, for inference.

    Raises:
        UserError: if its weights are not whole, or not all finite.
    """
    kind, weights = KINDS[part], choose(part, os.listdir(folder), variant)
    files = weight_files(folder, weights)
    disable_progress_bar()  # of transformers' shards, on every rank
    if weights.in_shards and not issubclass(kind, PreTrainedModel):
        # diffusers 0.29 would leave shards to accelerate, whose newer releases fail over them.
        module = _fill(_without_weights(part, folder), files, folder).to(dtype).eval()
    else:
        module, info = kind.from_pretrained(
            folder, variant=weights.variant, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        if info["missing_keys"]:
            raise UserError(f"{folder} has no weights for {min(info['missing_keys'])}")
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


def load_tokenizer(model: Path, other: Path | None) -> CLIPTokenizer | CLIPTokenizerFast:
    """Loads the tokenizer of `model`, or that in the folder `other` where one is given."""
    folder = other or model / "tokenizer"
    # Newer releases of transformers save a tokenizer.json alone, which CLIPTokenizer of older ones cannot load.
    files = os.listdir(folder)
    kind = CLIPTokenizerFast if "tokenizer.json" in files and "vocab.json" not in files else CLIPTokenizer
    with loading("tokenizer", other or model):
        return kind.from_pretrained(folder)


def load_text_encoder(
    model: Path, trained: Path | None, dtype: torch.dtype = torch.float32, *, variant: str | None = None
) -> CLIPTextModel:
    """Loads the text encoder, on the CPU: that of `model`, or of the checkpoint `trained` where that has one."""
    folder = trained if trained and (trained / "text_encoder").is_dir() else model
    with loading("text encoder", folder):
        return _load_weights("text_encoder", folder / "text_encoder", dtype, variant)


def load_vae(model: Path, resolution: int, *, variant: str | None = None) -> AutoencoderKL:
    """Loads the VAE: frozen, fp32, on the CPU.

    Raises:
        UserError: if it cannot be loaded, or its factor does not divide `resolution`.
    """
    with loading("VAE", model):
        vae = _load_weights("vae", model / "vae", variant=variant)
    factor = vae_factor(vae)
    if resolution % factor:
        lower = resolution // factor * factor
        raise UserError(
            f"--resolution {resolution} is not a multiple of {factor}, the factor of this model's VAE: "
            f"use {f'{lower} or ' if lower else ''}{lower + factor}"
        )
    return vae.requires_grad_(False).eval()


def unet_folder(folder: str | Path) -> Path:
    """Returns the folder of a UNet: `folder` is one itself, such as checkpoint-500/unet, or has one."""
    folder = Path(folder)
    return folder / "unet" if (folder / "unet").is_dir() else folder


def load_unet(
    model: Path, external: str | Path | None, dtype: torch.dtype = torch.float32, *, variant: str | None = None
) -> UNet2DConditionModel:
    """Loads the UNet that is trained, on the CPU: that of `model`, or of the folder `external` where given."""
    folder = unet_folder(external or model)
    with loading("UNet", folder):
        return _load_weights("unet", folder, dtype, variant)


def warn_of_dropout(*parts: torch.nn.Module) -> None:
    """Warns of parts whose dropout is on in training: it draws what no seed and no checkpoint of a run fixes."""
    modules = [module for part in parts for module in part.modules()]
    rates = [module.p for module in modules if isinstance(module, torch.nn.Dropout)]
    rates += [module.dropout for module in modules if isinstance(vars(module).get("dropout"), float)]  # as CLIP has it
    if max(rates, default=0.0) > 0:
        warn(f"the model has dropout of {max(rates):g}, drawn anew in each run: a resumed one does not go on exactly")


def load_noise_scheduler(model: Path) -> DDPMScheduler:
    """Loads the noise schedule that the checkpoint was trained with.

    Raises:
        UserError: if its UNet predicts something that this project has no loss for.
    """
    with loading("scheduler", model):
        noise_scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
        if not noise_scheduler.alphas_cumprod.isfinite().all() or not len(noise_scheduler.alphas_cumprod):
            raise ValueError("its noise schedule is empty or not finite")
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"the scheduler of {model} has prediction_type {prediction_type!r}; "
            f"this project trains {' and '.join(PREDICTION_TYPES)}"
        )
    return noise_scheduler


def load_pipeline(
    model: Path,
    dtype: torch.dtype = torch.float32,
    *,
    variant: str | None = None,
    sampler: str | None = None,
    **parts: torch.nn.Module | CLIPTokenizer,
) -> StableDiffusionPipeline:
    """Loads `model` anew, on the CPU, with some of its `parts` replaced and without a safety checker.

    Args:
        model: folder.
        dtype: of all parts.
        variant: of the weights that are loaded, where a part has it.
        sampler: class of diffusers by which it draws; None for the model's own.
    """
    with loading("pipeline", model):
        if "tokenizer" not in parts:
            parts["tokenizer"] = load_tokenizer(model, None)
        for part in KINDS.keys() - parts.keys():
            with loading(LABELS[part], model):
                parts[part] = _load_weights(part, model / part, dtype, variant)
        scheduler = getattr(diffusers, sampler) if sampler else scheduler_class(read_index(model / INDEX, str(model)))
        pipeline = StableDiffusionPipeline(
            **parts,
            scheduler=scheduler.from_pretrained(model / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return pipeline.to(dtype=dtype)


def check_parts_fit(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, vae: AutoencoderKL, unet: UNet2DConditionModel
) -> None:
    """Compares the shapes that the parts hand to each other.

    Raises:
        UserError: if they are parts of different models, or of one that needs more than an image and a prompt.
    """
    tokens, known = len(tokenizer), text_encoder.config.vocab_size
    if tokens > known:
        raise UserError(f"the tokenizer has {tokens} tokens, of which the text encoder knows {known}: use its own")
    channels, latents = unet.config.in_channels, vae.config.latent_channels
    if channels != latents or unet.config.out_channels != latents:
        hint = "it is an inpainting model, which cannot be trained here" if channels == 9 else "use the VAE's own UNet"
        raise UserError(
            f"the UNet takes {channels} channels and returns {unet.config.out_channels}, "
            f"and the VAE's latents have {latents}: {hint}"
        )
    width, encoded = unet.config.cross_attention_dim, text_encoder.config.hidden_size
    if any(one != encoded for one in (width if isinstance(width, list | tuple) else [width])):
        raise UserError(
            f"the UNet reads prompts of width {width}, and the text encoder writes {encoded}: use a UNet of this model"
        )
    if any(unet.config[name] for name in ("addition_embed_type", "class_embed_type", "num_class_embeds")):
        raise UserError("the UNet wants more than an image and a prompt: use that of a Stable Diffusion 1.x or 2.x")


def vae_factor(vae: AutoencoderKL) -> int:
    """Returns by how much the VAE's latents are smaller than its images, along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_shape(vae: AutoencoderKL, resolution: int) -> tuple[int, int, int]:
    """Returns (channels, height, width) of the latents of a square image of `resolution` pixels."""
    side = resolution // vae_factor(vae)
    return vae.config.latent_channels, side, side


def max_tokens(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> int:
    """Returns how many tokens of a prompt are read, its start and end marks counted in."""
    return min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)


def check_max_length(wanted: int | None, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """Compares --tokenizer_max_length with what is read.

    Raises:
        UserError: if it is another number.
    """
    longest = max_tokens(tokenizer, text_encoder)
    if wanted is not None and wanted != longest:
        raise UserError(
            f"--tokenizer_max_length {wanted}: this model reads {longest} tokens of a prompt; leave it out"
        )
    if wanted is not None:
        warn(f"--tokenizer_max_length {wanted}: no effect, it is always so")


def warn_of_cut_prompts(prompts: list[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """Tells which prompts are longer than what is read, and what of them is cut."""
    longest = max_tokens(tokenizer, text_encoder)
    for prompt in prompts:
        tokens = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(tokens) > longest:
            cut = tokenizer.decode(tokens[longest - 1 : -1])  # the end mark takes the last place
            warn(f"the prompt {prompt!r} is longer than the {longest - 2} tokens that fit; this part is cut: {cut!r}")


def tokenize(prompts: list[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> torch.Tensor:
    """Splits prompts into the tokens that the text encoder reads; warns where one is cut.

    Returns:
        Tensor of shape (prompts, tokens), int64, on the CPU.
    """
    warn_of_cut_prompts(prompts, tokenizer, text_encoder)
    longest = max_tokens(tokenizer, text_encoder)
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt").input_ids


@torch.no_grad()
def embed(token_ids: torch.Tensor, text_encoder: CLIPTextModel, dtype: torch.dtype) -> torch.Tensor:
    """Encodes prompts once and for all, on the device where their tokens are.

    Args:
        token_ids: (prompts, tokens), int64.
        text_encoder: is moved there.
        dtype: to keep the result in; it is computed in fp32, as it happens once.

    Returns:
        Tensor of shape (prompts, tokens, width), of `dtype`, on the CPU: all captions of a large data set would take
        more of a GPU than the model.
    """
    text_encoder.to(token_ids.device, torch.float32)
    return torch.cat([text_encoder(some)[0].to("cpu", dtype) for some in token_ids.split(ENCODED_AT_A_TIME)])


def fingerprint(*parts: torch.nn.Module) -> str:
    """Returns what tells models of other weights apart, in a pass over them: hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        for name, tensor in sorted(part.state_dict().items()):
            numbers = tensor.contiguous().view(torch.uint8).flatten()
            whole = numbers[: numbers.numel() // 4 * 4].view(torch.int32).sum(dtype=torch.int64)
            digest.update(f"{name} {tuple(tensor.shape)} {whole}".encode())
    return digest.hexdigest()[:16]
