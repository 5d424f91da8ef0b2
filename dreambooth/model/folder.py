"""Where the model is: a folder, or the Hub and its cache."""

import json
import os
from collections.abc import Set
from pathlib import Path

import diffusers
from diffusers import UNet2DConditionModel
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from dreambooth.command_line.console import UserError, warn
from dreambooth.command_line.flags import ModelFlags
from dreambooth.model.components import choose, load_tokenizer, loading, unet_folder, without_weights
from dreambooth.model.family import Family
from dreambooth.model.hub import HUB_TIMEOUT_S, can_be_hub_id, hub_reason
from dreambooth.model.stable_diffusion import STABLE_DIFFUSION
from dreambooth.model.weights import Weights, shard_names, weight_files

INDEX = "model_index.json"
FAMILIES: tuple[Family, ...] = (STABLE_DIFFUSION,)
# Of all of them, as an output folder may have what another one's run has left: the folders of a pipeline, and of
# those the ones of components that can be trained.
PIPELINE = tuple(dict.fromkeys(part for one in FAMILIES for part in (*one.components, *one.tokenizers, "scheduler")))
TRAINABLE = tuple(dict.fromkeys(part for one in FAMILIES for part in ("unet", *one.text_encoders)))


def read_index(path: Path, model: str) -> tuple[dict, Family]:
    """Reads a model_index.json, and returns the family that it describes with it.

    Raises:
        UserError: if it is missing or broken, or of a pipeline that this project cannot train.
    """
    try:
        index = json.loads(path.read_text())
        classes = {part: entry[1] for part, entry in index.items() if isinstance(entry, list) and part[0] != "_"}
        scheduler = classes["scheduler"]
        known = hasattr(getattr(diffusers, scheduler, None), "from_pretrained")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path} is not that of a Stable Diffusion folder in diffusers' layout") from error
    family = next((family for family in FAMILIES if _describes(family, classes)), None)
    if family is None:
        raise UserError(
            f"{model} is a {index.get('_class_name')}, which this project does not train: "
            f"use a {' or '.join(family.name for family in FAMILIES)}"
        )
    if not known:
        raise UserError(f"{path} names a scheduler that diffusers does not have: {scheduler}")
    return index, family


def _describes(family: Family, classes: dict[str, str | None]) -> bool:
    """Whether the parts of a pipeline, with the names of their classes, are those of a family."""
    parts = {part for part, kind in classes.items() if kind is not None} - {*family.others}
    fits = all(classes.get(part) == kind.__name__ for part, kind in family.components.items())
    return fits and parts == parts_of(family)


def parts_of(family: Family) -> set[str]:
    """Returns the folders of a family's parts that are needed."""
    return {*family.components, *family.tokenizers, "scheduler"}


def family_of(folder: Path) -> Family:
    """Returns the family of the model in a folder.

    Raises:
        UserError: as `read_index` does.
    """
    return read_index(folder / INDEX, str(folder))[1]


def scheduler_class(index: dict) -> type:
    """Returns the class of the scheduler that a model_index.json names."""
    return getattr(diffusers, index["scheduler"][1])


def check_configurations(folder: Path, family: Family) -> None:
    """Compares the shapes of a model's parts by their configurations; no weights are read.

    Raises:
        UserError: as the family's `check_fit` does, or if a configuration cannot be read.
    """
    components = {}
    for part, kind in family.components.items():
        with loading(family.labels[part], folder):
            components[part] = without_weights(kind, folder / part)
    family.check_fit({name: load_tokenizer(folder / name) for name in family.tokenizers}, components)


def find_model(flags: ModelFlags) -> Path:
    """Returns the folder of --pretrained_model_name_or_path; a Hub id is downloaded, or found in the Hub's cache.

    Raises:
        UserError: as `find_folder` does.
    """
    elsewhere = set()
    if flags.external_unet_path:
        elsewhere.add("unet")
        folder = unet_folder(flags.external_unet_path)
        with loading("UNet", folder):
            weights = choose(UNet2DConditionModel, os.listdir(folder), flags.variant)
        if weights.variant and weights.variant != flags.variant:
            _tell_only_variant("--external_unet_path", flags.external_unet_path, weights.variant)
    if flags.tokenizer_name:
        elsewhere.update(name for family in FAMILIES for name in family.tokenizers)
    return find_folder(
        flags.pretrained_model_name_or_path,
        "--pretrained_model_name_or_path",
        elsewhere=elsewhere,
        revision=flags.revision,
        variant=flags.variant,
    )


def find_tokenizer(name: str | None) -> Path | None:
    """Returns the folder of --tokenizer_name; a Hub id is downloaded, or found in the Hub's cache.

    Raises:
        UserError: if there is none.
    """
    if name is None or os.path.isdir(name):
        return name and Path(name)
    if os.path.isfile(name) or not can_be_hub_id(name):
        raise UserError(f"--tokenizer_name {name} is not a folder")
    try:
        return Path(snapshot_download(name, allow_patterns=("*.json", "*.txt"), etag_timeout=HUB_TIMEOUT_S))
    except Exception as error:  # whatever the network and the Hub can answer
        raise UserError(
            f"--tokenizer_name {name} is no folder, and cannot be had from the Hub: {hub_reason(error)}"
        ) from error


def find_folder(
    name: str,
    flag: str,
    *,
    elsewhere: Set[str] = frozenset(),
    revision: str | None = None,
    variant: str | None = None,
) -> Path:
    """Returns the folder of a model; a Hub id is downloaded, or found in the Hub's cache.

    No weights are read, but their files are opened, which finds those that are torn.

    Args:
        name: a folder or a Hub id.
        flag: that gives the name, for messages.
        elsewhere: parts that come from somewhere else, and need not be there.
        revision: branch, tag or commit of a Hub id; None for the main branch.
        variant: of the weights; a part without it has its plain ones taken. None prefers the plain ones.

    Raises:
        UserError: if there is no such model, a part of it is missing, torn or of another one, or it is of a family
            that this project does not know.
    """
    folder = Path(name)
    if not os.path.isdir(folder):
        if os.path.isfile(folder) or not can_be_hub_id(name):
            raise UserError(f"{flag} {name} is not a folder")
        folder = _download(name, flag, elsewhere, revision, variant)
    has_index = (folder / INDEX).is_file()
    family = read_index(folder / INDEX, name)[1] if has_index else FAMILIES[0]  # says what is missing
    parts = parts_of(family) - elsewhere
    missing = sorted(part for part in parts if not (folder / part).is_dir())
    if missing:
        raise UserError(
            f"{flag} {name} has no {', '.join(missing)}: "
            "it is not a whole Stable Diffusion folder in diffusers' layout"
        )
    index, _ = read_index(folder / INDEX, name)
    with loading("scheduler", folder):
        scheduler_class(index).from_pretrained(folder / "scheduler")
    chosen = _choose(family, {part: os.listdir(folder / part) for part in parts}, name, flag, variant)
    for part, weights in chosen.items():
        with loading(family.labels[part], folder):
            weight_files(folder / part, weights)
    _tell_variants(chosen, name, flag, variant)
    if not elsewhere:
        check_configurations(folder, family)
    return folder


def _choose(
    family: Family, names: dict[str, list[str]], model: str, flag: str, variant: str | None
) -> dict[str, Weights]:
    """Returns which weights of each part are taken, of the files `names` in the parts' folders.

    Raises:
        UserError: if a part has none, or no part has those of `variant`.
    """
    chosen = {}
    for part in sorted(family.components.keys() & names.keys()):
        with loading(family.labels[part], model):
            chosen[part] = choose(family.components[part], names[part], variant)
    if variant and all(weights.variant != variant for weights in chosen.values()):
        raise UserError(f"--variant {variant}: {flag} {model} has no weights named *.{variant}.safetensors")
    return chosen


def _tell_variants(chosen: dict[str, Weights], model: str, flag: str, wanted: str | None) -> None:
    """Warns where other weights are taken than the flags name."""
    found = {weights.variant for weights in chosen.values()}
    for variant in sorted(filter(None, found - {wanted})):
        _tell_only_variant(flag, model, variant)
    plain = [part for part, weights in chosen.items() if weights.variant is None]
    if wanted and plain:
        warn(f"--variant {wanted}: {flag} {model} has none of its {', '.join(plain)}, the plain weights are taken")


def _tell_only_variant(flag: str, model: str, variant: str) -> None:
    warn(f"{flag} {model} has {variant} weights alone, as fetched with --variant {variant}: they are taken")


def _download(name: str, flag: str, elsewhere: Set[str], revision: str | None, variant: str | None) -> Path:
    """Brings what is needed of a Hub model into the cache, which alone serves where the Hub is out of reach.

    Small files come first: a model that cannot be used is refused before gigabytes are fetched.
    """
    try:
        info = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # whatever the network and the Hub can answer
        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        except Exception:
            raise UserError(
                f"{flag} {name} is no folder, and cannot be had from the Hub: {hub_reason(error)}"
            ) from error
    files = [file.rfilename for file in info.siblings or ()]
    if INDEX not in files:
        raise UserError(f"{flag} {name} has no {INDEX} on the Hub: it is not in diffusers' layout")
    try:
        _, family = read_index(Path(hf_hub_download(name, INDEX, revision=revision)), name)
        parts = parts_of(family) - elsewhere
        names = {part: [file[len(part) + 1 :] for file in files if file.startswith(f"{part}/")] for part in parts}
        chosen = _choose(family, {part: inside for part, inside in names.items() if inside}, name, flag, variant)
        wanted = [INDEX, *(f"{part}/{ending}" for part in parts for ending in ("*config.json", "*.txt"))]
        wanted += [f"{part}/*.json" for part in parts - family.components.keys()]
        wanted += [f"{part}/{weights.file}" for part, weights in chosen.items() if weights.in_shards]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        if not elsewhere:
            check_configurations(folder, family)
        for part, weights in chosen.items():
            with loading(family.labels[part], name):
                shards = shard_names(folder / part / weights.file) if weights.in_shards else [weights.file]
            wanted += [f"{part}/{shard}" for shard in shards]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{flag} {name} cannot be had from the Hub: {hub_reason(error)}") from error
