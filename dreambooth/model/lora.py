"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): small weights that are trained beside those that are frozen.

    y = W x + alpha / rank * B A x

W is (out, in), A (rank, in), drawn at random, and B (out, rank), zeros at first: training begins at the model as it
is. peft computes them. Files name them as peft does, after the component that they belong to, such as
"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight".
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import Tensor

from dreambooth.command_line.console import UserError, warn
from dreambooth.command_line.flags import LoraFlags
from dreambooth.model.components import check_safetensors, loading
from dreambooth.model.libraries import name_in_file

WEIGHTS = "pytorch_lora_weights.safetensors"  # by which diffusers finds them in a folder
KOHYA_WEIGHTS = "kohya_lora_weights.safetensors"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ALL = (
    *ATTENTION,
    *("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
)
OF_TEXT_ENCODERS = ("q_proj", "k_proj", "v_proj", "out_proj")
TOLD = 300  # characters of what a library says
NAME = "default"  # by which peft knows the adapters of a model
A, B = ENDINGS = (".lora_A.weight", ".lora_B.weight")
UPS = (B, ".lora_B.bias", ".lora_up.weight")
DOWNS = (A, ".lora_down.weight")
METADATA = "lora_adapter_metadata"  # of which newer releases of diffusers make them again
# Other names of A and B, in files of other programs.
OTHER_NAMES = {
    f".processor.{layer.removesuffix('.0')}_lora.{side}.": f".{layer}.lora_{half}."
    for layer in ATTENTION
    for side, half in (("down", "A"), ("up", "B"))
} | {
    ".lora.down.": ".lora_A.",
    ".lora.up.": ".lora_B.",
    ".lora_linear_layer.down.": ".lora_A.",
    ".lora_linear_layer.up.": ".lora_B.",
}
MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale")
# Ends all names in files of which each part that adds is known, so that it can be scaled; magnitudes are told apart.
SCALABLE = (*UPS, *DOWNS, ".lora_A.bias", ".alpha", *MAGNITUDES)
LYCORIS = re.compile(r"\.(hada_w|lokr_w|lora_mid|oft_)")
KOHYA = re.compile(r"lora_(unet|te|te1|te2)_")


@dataclass(frozen=True)
class Adapters:
    """What the adapters of a run are.

    Args:
        rank, alpha, dropout: see above.
        targets: layers that have them, by their component: of each name, and of each that ends with it after a dot.
        origin: what files tell besides: the model's Hub id, as base_model, and instance_prompt, where there are any.
    """

    rank: int
    alpha: float
    dropout: float
    targets: Mapping[str, tuple[str, ...]]
    origin: Mapping[str, str]

    @property
    def scale(self) -> float:
        """By which what they add is multiplied."""
        return self.alpha / self.rank

    def metadata(self, *, alpha: float | None = None) -> dict[str, str]:
        """Returns what a file of them says besides its weights; `alpha` where that is another in it."""
        config = {
            f"{component}.{name}": value
            for component, targets in self.targets.items()
            for name, value in {
                "r": self.rank,
                "lora_alpha": self.alpha if alpha is None else alpha,
                "target_modules": list(targets),
            }.items()
        }
        told = {"rank": str(self.rank), "alpha": f"{self.alpha:g}"}
        told["target_modules"] = ",".join(dict.fromkeys(name for targets in self.targets.values() for name in targets))
        return {METADATA: json.dumps(config, sort_keys=True)} | told | dict(self.origin)


def adapters_of(
    flags: LoraFlags, components: Mapping[str, torch.nn.Module], *, base: str | None, instance_prompt: str | None
) -> Adapters:
    """Returns the adapters that flags ask for.

    Args:
        flags: with a rank.
        components: that get them, by their names.
        base: the model's Hub id, where it has one.
        instance_prompt: where there is one for all images.

    Raises:
        UserError: if the UNet has no layer of a name that --lora_target_modules gives.
    """
    named = {"attention": ATTENTION, "all": ALL}.get(flags.lora_target_modules)
    names = named or [name.strip() for name in flags.lora_target_modules.split(",") if name.strip()]
    found = tuple(name for name in names if any(_named(components["unet"], [name])))
    missing = [name for name in names if name not in found]
    if not found or (missing and not named):  # a model need not have all the kinds of layers that a word stands for
        raise UserError(
            f"--lora_target_modules {flags.lora_target_modules}: the UNet has no linear layer and no convolution "
            f"of the name {(missing or [''])[0]!r}; such as {', '.join(ATTENTION)}"
        )
    for name in found:
        if block := next(_named(components["unet"], [name], are_layers=False), None):
            raise UserError(f"--lora_target_modules {flags.lora_target_modules}: {name!r} is also a block, {block}")
    origin = {"base_model": base, "instance_prompt": instance_prompt}
    return Adapters(
        rank=flags.lora_rank,
        alpha=flags.alpha,
        dropout=flags.lora_dropout,
        targets={name: found if name == "unet" else OF_TEXT_ENCODERS for name in components},
        origin={name: text for name, text in origin.items() if text},
    )


def _named(component: torch.nn.Module, targets: Collection[str], *, are_layers: bool = True) -> Iterator[str]:
    """Yields the full names of `targets`: of layers, which adapters stand beside, or of what no adapter is for."""
    for name, module in component.named_modules():
        is_layer = isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        if is_layer == are_layers and any(f".{name}".endswith(f".{target}") for target in targets):
            yield name


def add_adapters(components: Mapping[str, torch.nn.Module], adapters: Adapters, seed: int) -> None:
    """Gives components their adapters, fp32, on the CPU, and freezes all else of them.

    Args:
        components: by their names, those of `adapters`.
        adapters: what they are.
        seed: that the random weights follow from.
    """
    from peft import LoraConfig, inject_adapter_in_model  # only where it is wanted

    settings = {"r": adapters.rank, "lora_alpha": adapters.alpha, "lora_dropout": adapters.dropout}
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        for name, component in components.items():
            component.requires_grad_(False)
            inject_adapter_in_model(LoraConfig(**settings, target_modules=[*adapters.targets[name]]), component, NAME)
            for weight in adapter_weights(component).values():
                weight.data = weight.data.float()  # where those of the model are of another dtype, so are they


def adapter_weights(component: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Returns the adapters' weights of a component, by their names in the component."""
    return {name: weight for name, weight in component.named_parameters() if ".lora_" in name}


def name_in_lora_file(component: torch.nn.Module, name: str) -> str:
    """Returns the name by which files have an adapter's weight of a component."""
    return name_in_file(component, name).replace(f".{NAME}.", ".")


def load_adapters(folder: Path, components: Mapping[str, torch.nn.Module]) -> None:
    """Gives adapters the weights that a checkpoint in `folder` has of them.

    Raises:
        UserError: if one is missing or does not fit.
    """
    with loading("LoRA", folder), safe_open(folder / WEIGHTS, framework="pt") as file:
        for component, module in components.items():
            for name, weight in adapter_weights(module).items():
                weight.data.copy_(file.get_tensor(f"{component}.{name_in_lora_file(module, name)}"))


def digest_of(components: Mapping[str, torch.nn.Module]) -> str:
    """Returns what tells adapters of other weights apart: hexadecimal digits."""
    digest = hashlib.sha256()
    for component in components.values():
        for weight in adapter_weights(component).values():
            digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()[:16]


def scaled(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Returns adapters that add `scale` times as much: all of it in B and its bias."""
    return {name: weight * scale if name.endswith(UPS) else weight for name, weight in weights.items()}


def as_kohya_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns adapters, whose alpha is their rank, by the names that kohya's scripts and web interfaces read."""
    several = any(name.startswith("text_encoder_2.") for name in weights)
    components = {
        "unet": "lora_unet",
        "text_encoder": "lora_te1" if several else "lora_te",
        "text_encoder_2": "lora_te2",
    }
    told = {}
    for name, weight in weights.items():
        component, _, layer = name.rpartition(".lora_")[0].partition(".")
        module = f"{components[component]}_{layer.replace('.', '_')}"
        if name.endswith(A):
            told[f"{module}.lora_down.weight"] = weight
            told[f"{module}.alpha"] = torch.tensor(float(len(weight)))
        else:
            told[f"{module}.lora_up.weight"] = weight
    return told


def kohya_metadata(adapters: Adapters) -> dict[str, str]:
    """Returns what kohya's scripts tell in a file of adapters, whose alpha is their rank."""
    told = {"ss_network_module": "networks.lora", "ss_network_dim": str(adapters.rank)}
    return told | {"ss_network_alpha": str(adapters.rank)} | dict(adapters.origin)


# Drawing with them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lora:
    """Adapters to draw with.

    Args:
        name: by which messages call them.
        weights: as a file has them; what they add is multiplied by 1.
        base: Hub id of the model that they were trained with, where it is told.
    """

    name: str
    weights: Mapping[str, Tensor]
    base: str | None = None


def read_lora(name: str, flag: str, *, scale: float = 1.0) -> Lora:
    """Reads a file of adapters, of this project or another.

    Args:
        name: of the file, or of a folder that a run has left, or of its checkpoint.
        flag: that gives the name, for messages.
        scale: by which what they add is multiplied besides.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    path = Path(name, WEIGHTS) if os.path.isdir(name) else Path(name)
    if not path.is_file():
        told = f"has no {WEIGHTS}" if os.path.isdir(name) else "is neither a folder nor a file"
        raise UserError(f"{flag} {name} {told}: name what a run with --lora_rank has left")
    check_safetensors(path, "LoRA", flag)
    with loading("LoRA", path), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        weights = {_as_peft_names(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no dictionary
        config = json.loads(metadata.get(METADATA, "{}"))
        weights = {key: _by_alpha(key, weights, config) for key in weights}
    if not any(key.endswith(A) or KOHYA.match(key) for key in weights):
        raise UserError(f"{flag} {name} has no LoRA in it that is known here")
    if lycoris := next((key for key in weights if LYCORIS.search(key)), None):
        raise UserError(f"{flag} {name} has {lycoris}: LoHa, LoKr and other kinds of LyCORIS are not read here")
    if scale != 1 and (odd := next((key for key in weights if not key.endswith(SCALABLE)), None)):
        raise UserError(f"{flag} {name} has {odd}, which is not known here, and so no scale but 1 is for it")
    if scale != 1 and any(key.endswith(MAGNITUDES) for key in weights):
        raise UserError(f"{flag} {name} is a DoRA, whose magnitudes no scale but 1 is for")
    return Lora(name, scaled(weights, scale), metadata.get("base_model"))


def _as_peft_names(name: str) -> str:
    for other, own in OTHER_NAMES.items():
        name = name.replace(other, own)
    return name


def _by_alpha(name: str, weights: Mapping[str, Tensor], config: Mapping) -> Tensor:
    """Returns an adapter's weight with alpha in it, as a file's metadata tell it: libraries of 2024 do not read it."""
    whole, of_b, _ = name.rpartition(".lora_B.")
    weight, of_a = weights[name], weights.get(f"{whole}{A}")
    if not of_b or of_a is None:
        return weight
    component, _, layer = whole.partition(".")
    patterns = config.get(f"{component}.alpha_pattern") or {}  # the first that fits counts, as in peft
    of_layer = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    alpha, rank = next(of_layer, config.get(f"{component}.lora_alpha")), len(of_a)
    if alpha is None:
        return weight
    return weight * (alpha / (math.sqrt(rank) if config.get(f"{component}.use_rslora") else rank))


def add_to_pipeline(pipeline: DiffusionPipeline, lora: Lora) -> None:
    """Gives a pipeline adapters, beside weights that stay as they are.

    Raises:
        UserError: if they are those of another model.
    """
    try:
        _check_fit(pipeline, lora.weights)
        pipeline.load_lora_weights(dict(lora.weights))
    except Exception as error:  # what a file leads the libraries to has no limit
        told = " ".join(str(error).split())[:TOLD] or type(error).__name__  # often a heading with what matters below
        raise UserError(f"the LoRA of {lora.name} does not fit this model: {told}") from error
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    found = sum(hasattr(module, "lora_A") for part in parts for module in part.modules())
    wanted = len({name.rpartition(".lora_")[0] for name in lora.weights if name.endswith(DOWNS)})
    if found < wanted:
        warn(f"the LoRA of {lora.name} has {wanted} layers, of which this model takes {found}")


def _check_fit(pipeline: DiffusionPipeline, weights: Mapping[str, Tensor]) -> None:
    """Finds adapters, but those by kohya's names, that are not whole, or of another shape than their layers."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    layers = {f"{name}.{layer}": module for name, part in parts.items() for layer, module in part.named_modules()}
    for name, weight in weights.items():
        if not name.endswith(ENDINGS) or KOHYA.match(name):
            continue
        whole, _, _ = name.rpartition(".lora_")
        component, _, layer = whole.partition(".")
        if not {f"{whole}{ending}" for ending in ENDINGS} <= weights.keys():
            raise ValueError(f"it has one half of {component}.{layer}, and not the other")
        found = layers.get(f"{component}.{layer}") or layers.get(f"{component}.{layer.removeprefix('text_model.')}")
        if found is None:
            raise ValueError(f"it has no {component}.{layer}")
        side = name.endswith(A)  # of A the inputs, of B the outputs
        if weight.shape[int(side)] != found.weight.shape[int(side)]:
            told = f"{found.weight.shape[int(side)]} {'inputs' if side else 'outputs'}, and {weight.shape[int(side)]}"
            raise ValueError(f"its {component}.{layer} has {told} in the LoRA")
