"""Where the model is: a folder, or the Hub and its cache."""

import argparse
import os
from collections.abc import Set
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from dreambooth.command_line.console import UserError, warn
from dreambooth.model.hub import HUB_TIMEOUT_S, can_be_hub_id, hub_reason
from dreambooth.model.stable_diffusion import (
    INDEX,
    KINDS,
    LABELS,
    PARTS,
    check_configurations,
    choose,
    loading,
    read_index,
    scheduler_class,
    unet_folder,
)
from dreambooth.model.weights import Weights, shard_names, weight_files


def find_model(args: argparse.Namespace) -> Path:
    """Returns the folder of --pretrained_model_name_or_path; a Hub id is downloaded, or found in the Hub's cache.

    Raises:
        UserError: as `find_folder` does.
    """
    parts = set(PARTS)
    if args.external_unet_path:
        parts.remove("unet")
        folder = unet_folder(args.external_unet_path)
        with loading("UNet", folder):
            weights = choose("unet", os.listdir(folder), args.variant)
        if weights.variant and weights.variant != args.variant:
            _tell_only_variant("--external_unet_path", args.external_unet_path, weights.variant)
    if args.tokenizer_name:
        parts.remove("tokenizer")
    return find_folder(
        args.pretrained_model_name_or_path,
        "--pretrained_model_name_or_path",
        parts=parts,
        revision=args.revision,
        variant=args.variant,
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
    parts: Set[str] = frozenset(PARTS),
    revision: str | None = None,
    variant: str | None = None,
) -> Path:
    """Returns the folder of a model; a Hub id is downloaded, or found in the Hub's cache.

    No weights are read, but their files are opened, which finds those that are torn.

    Args:
        name: a folder or a Hub id.
        flag: that gives the name, for messages.
        parts: that are needed.
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
        folder = _download(name, flag, parts, revision, variant)
    missing = sorted(part for part in parts if not (folder / part).is_dir())
    if missing:
        raise UserError(
            f"{flag} {name} has no {', '.join(missing)}: "
            "it is not a whole Stable Diffusion folder in diffusers' layout"
        )
    index = read_index(folder / INDEX, name)
    with loading("scheduler", folder):
        scheduler_class(index).from_pretrained(folder / "scheduler")
    chosen = _choose({part: os.listdir(folder / part) for part in parts}, name, flag, variant)
    for part, weights in chosen.items():
        with loading(LABELS[part], folder):
            weight_files(folder / part, weights)
    _tell_variants(chosen, name, flag, variant)
    if {*PARTS} <= parts:
        check_configurations(folder)
    return folder


def _choose(names: dict[str, list[str]], model: str, flag: str, variant: str | None) -> dict[str, Weights]:
    """Returns which weights of each part are taken, of the files `names` in the parts' folders.

    Raises:
        UserError: if a part has none, or no part has those of `variant`.
    """
    chosen = {}
    for part in sorted(KINDS.keys() & names.keys()):
        with loading(LABELS[part], model):
            chosen[part] = choose(part, names[part], variant)
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


def _download(name: str, flag: str, parts: Set[str], revision: str | None, variant: str | None) -> Path:
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
        read_index(Path(hf_hub_download(name, INDEX, revision=revision)), name)
        names = {part: [file[len(part) + 1 :] for file in files if file.startswith(f"{part}/")] for part in parts}
        chosen = _choose({part: inside for part, inside in names.items() if inside}, name, flag, variant)
        wanted = [INDEX, *(f"{part}/{ending}" for part in parts for ending in ("*config.json", "*.txt"))]
        wanted += [f"{part}/*.json" for part in parts - KINDS.keys()]
        wanted += [f"{part}/{weights.file}" for part, weights in chosen.items() if weights.in_shards]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        if {*PARTS} <= parts:
            check_configurations(folder)
        for part, weights in chosen.items():
            with loading(LABELS[part], name):
                shards = shard_names(folder / part / weights.file) if weights.in_shards else [weights.file]
            wanted += [f"{part}/{shard}" for shard in shards]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{flag} {name} cannot be had from the Hub: {hub_reason(error)}") from error
