"""Where the model is: a folder, or the Hub and its cache."""

import json
import os
from collections.abc import Mapping, Set
from pathlib import Path

import diffusers
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import DummyObject
from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache

from dreambooth.command_line.console import UserError, warn
from dreambooth.command_line.flags import ModelFlags
from dreambooth.command_line.paths import MODEL_FILES, is_model_file
from dreambooth.model.components import choose, load_tokenizer, loading, part_folder, without_weights
from dreambooth.model.family import Family
from dreambooth.model.hub import HUB_TIMEOUT_S, can_be_hub_id, hub_reason
from dreambooth.model.lora import WEIGHTS as ADAPTERS
from dreambooth.model.stable_diffusion import STABLE_DIFFUSION
from dreambooth.model.stable_diffusion_xl import STABLE_DIFFUSION_XL
from dreambooth.model.weights import Weights, shard_names, weight_files

INDEX = "model_index.json"
FAMILIES: tuple[Family, ...] = (STABLE_DIFFUSION, STABLE_DIFFUSION_XL)
# The folders of a pipeline, of all of them, as an output folder may have what another one's run has left.
PIPELINE = tuple(dict.fromkeys(part for one in FAMILIES for part in (*one.components, *one.tokenizers, "scheduler")))
DISTILLED = ("turbo", "lightning", "hyper-sd", "lcm", "dmd2")  # in the names of models made to draw in few steps
SCHEDULERS_OF_DISTILLED = ("LCMScheduler", "TCDScheduler")


def read_index(path: Path, model: str) -> tuple[dict, Family]:
    """Reads a model_index.json, and returns the family that it describes with it.

    Raises:
        UserError: if it is missing or broken, or of a pipeline that this project cannot train.
    """
    try:
        index = json.loads(path.read_text())
        classes = {part: entry[1] for part, entry in index.items() if isinstance(entry, list) and part[0] != "_"}
        scheduler = classes["scheduler"]
        kind = getattr(diffusers, scheduler, None)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path} is not that of a Stable Diffusion folder in diffusers' layout") from error
    family = next((family for family in FAMILIES if not _odd_parts(family, classes)), None)
    if family is None:
        told = next(filter(None, (one.told_apart(classes) for one in FAMILIES)), None)
        told = told or _otherwise(index.get("_class_name"), classes)
        raise UserError(f"{model} is {told}: use a {' or '.join(one.name for one in FAMILIES)}")
    # Other classes of diffusers may run code that lies in the folder; a dummy says which library the real one wants.
    if not (isinstance(kind, type) and (issubclass(kind, SchedulerMixin) or isinstance(kind, DummyObject))):
        raise UserError(f"{path} names a scheduler that diffusers does not have: {scheduler}")
    return index, family


def _otherwise(pipeline: str | None, classes: dict[str, str | None]) -> str:
    """Returns what a model is that no family describes, though it may be called by the name of one's pipeline."""
    for family in FAMILIES:
        if family.pipeline.__name__ == pipeline:
            return f"a {pipeline} with other parts than one has ({', '.join(sorted(_odd_parts(family, classes)))})"
    return f"a {pipeline}, which this project does not train"


def _odd_parts(family: Family, classes: dict[str, str | None]) -> set[str]:
    """Returns which parts of a pipeline, with the names of their classes, are not as those of a family, or missing."""
    parts = {part for part, kind in classes.items() if kind is not None} - {*family.others}
    of_other_classes = {part for part, kind in family.components.items() if classes.get(part) != kind.__name__}
    return of_other_classes | (parts ^ parts_of(family))


def parts_of(family: Family) -> set[str]:
    """Returns the folders of a family's parts that are needed."""
    return {*family.components, *family.tokenizers, "scheduler"}


def family_of(folder: Path) -> Family:
    """Returns the family of the model in a folder.

    Raises:
        UserError: as `read_index` does.
    """
    return read_index(folder / INDEX, str(folder))[1]


def load_sampler(folder: Path, kind: str | None = None) -> SchedulerMixin:
    """Loads the scheduler by which a model draws, as a class of diffusers; None for that which its index names."""
    kind = kind or read_index(folder / INDEX, str(folder))[0]["scheduler"][1]
    with loading("scheduler", folder):
        return getattr(diffusers, kind).from_pretrained(folder / "scheduler")


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


def known_family(flags: ModelFlags) -> Family | None:
    """Returns the family of --pretrained_model_name_or_path, if that can be told before anything is downloaded."""
    name = flags.pretrained_model_name_or_path
    try:
        cached = None if os.path.exists(name) else _cached(name, INDEX, flags.revision)
        return read_index(cached or Path(name, INDEX), name)[1]
    except (UserError, ValueError):  # no model, or no name of one: `find_model` will say so
        return None


def find_model(flags: ModelFlags, elsewhere: Mapping[str, Path]) -> Path:
    """Returns the folder of --pretrained_model_name_or_path; a Hub id is downloaded, or found in the Hub's cache.

    Args:
        flags: name it.
        elsewhere: what `find_elsewhere` has returned.

    Raises:
        UserError: as `find_folder` does.
    """
    name = flags.pretrained_model_name_or_path
    tokenizers = {one for family in FAMILIES for one in family.tokenizers} if flags.tokenizer_name else set()
    folder = find_folder(
        name,
        "--pretrained_model_name_or_path",
        elsewhere=elsewhere.keys() | tokenizers,
        revision=flags.revision,
        variant=flags.variant,
        configuration=flags.single_file_config,
    )
    _warn_of_distilled(name, folder)
    return folder


def _warn_of_distilled(name: str, folder: Path) -> None:
    """Warns of a model that draws in few steps, as its name or its scheduler tells: "trailing" is how such ones step.

    So do those whose last timestep is all noise, which is no such sign.
    """
    index, _ = read_index(folder / INDEX, name)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    names = [os.path.basename(os.path.normpath(one)).lower() for one in (name, str(index.get("_name_or_path", "")))]
    signs = [f"its name has {word!r} in it" for word in DISTILLED if any(word in one for one in names)]
    if (kind := index["scheduler"][1]) in SCHEDULERS_OF_DISTILLED:
        signs.append(f"its scheduler is {kind}")
    if scheduler.get("timestep_spacing") == "trailing" and not scheduler.get("rescale_betas_zero_snr"):
        signs.append("its scheduler has timestep_spacing 'trailing'")
    if signs:
        warn(
            f"--pretrained_model_name_or_path {name} looks distilled to draw in few steps, as Turbo and Lightning are "
            f"({signs[0]}): this training undoes that; train the model that it was made of"
        )


def find_elsewhere(flags: ModelFlags) -> dict[str, Path]:
    """Returns the folders of the parts that flags name instead of MODEL's; a VAE may be downloaded.

    Raises:
        UserError: if one of them cannot serve.
    """
    elsewhere = {}
    if name := flags.external_unet_path:
        folder = _unpacked(name, "--external_unet_path", flags.single_file_config) if is_model_file(name) else name
        elsewhere["unet"] = part_folder(folder, "unet")
        if (elsewhere["unet"] / ADAPTERS).is_file() and not (elsewhere["unet"] / "config.json").exists():
            raise UserError(f"--external_unet_path {name} has a LoRA, and no UNet that could be trained")
        _check_part(elsewhere["unet"], UNet2DConditionModel, "UNet", "--external_unet_path", name, flags.variant)
    if name := flags.pretrained_vae_model_name_or_path:
        flag = "--pretrained_vae_model_name_or_path"
        elsewhere["vae"] = _find_vae(name, flag, flags.variant)
        _check_part(elsewhere["vae"], AutoencoderKL, "VAE", flag, name, flags.variant)
    return elsewhere


def _check_part(folder: Path, kind: type, label: str, flag: str, name: str, variant: str | None) -> None:
    """Finds a part of another class, without weights or with torn ones; warns where they are of another variant."""
    with loading(label, folder):
        weights = choose(kind, os.listdir(folder), variant)
        weight_files(folder, weights)
        found = json.loads((folder / "config.json").read_text()).get("_class_name", kind.__name__)
        if found != kind.__name__:
            raise UserError(f"{flag} {name} is of class {found}: name one of {kind.__name__}")
    if weights.variant and weights.variant != variant:
        _tell_only_variant(flag, name, weights.variant)


def _find_vae(name: str, flag: str, variant: str | None) -> Path:
    """Returns the folder of a VAE, or of that of a model; of a Hub id only what is needed is downloaded."""
    if os.path.isdir(name):
        return part_folder(name, "vae")
    if os.path.isfile(name) or not can_be_hub_id(name):
        raise UserError(f"{flag} {name} is not a folder")
    try:
        files = [file.rfilename for file in HfApi().model_info(name, timeout=HUB_TIMEOUT_S).siblings or ()]
    except Exception as error:  # whatever the network and the Hub can answer
        cached = _cached(name, "vae/config.json") or _cached(name, "config.json")
        if cached is None:
            raise _not_to_be_had(name, flag, error) from error
        return cached.parent
    inside = "vae/" if any(file.startswith("vae/") for file in files) else ""
    try:
        with loading("VAE", name):
            weights = choose(AutoencoderKL, [file.removeprefix(inside) for file in files], variant)
        wanted = [f"{inside}config.json", f"{inside}{weights.file}"]
        if weights.in_shards:
            with loading("VAE", name):
                wanted += [f"{inside}{shard}" for shard in shard_names(Path(hf_hub_download(name, wanted[1])))]
        return Path(snapshot_download(name, allow_patterns=wanted), inside)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{flag} {name} cannot be had from the Hub: {hub_reason(error)}") from error


def _not_to_be_had(name: str, flag: str, error: Exception) -> UserError:
    return UserError(f"{flag} {name} is no folder, and cannot be had from the Hub: {hub_reason(error)}")


def _cached(name: str, file: str, revision: str | None = None) -> Path | None:
    """Returns a file of a Hub id in the Hub's cache, if it is there, whatever else of it is not."""
    cached = try_to_load_from_cache(name, file, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


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
        raise _not_to_be_had(name, "--tokenizer_name", error) from error


def find_folder(
    name: str,
    flag: str,
    *,
    elsewhere: Set[str] = frozenset(),
    revision: str | None = None,
    variant: str | None = None,
    configuration: str | None = None,
) -> Path:
    """Returns the folder of a model; a Hub id is downloaded, or found in the Hub's cache, and a file is unpacked.

    No weights are read, but their files are opened, which finds those that are torn.

    Args:
        name: a folder, a Hub id or a file.
        flag: that gives the name, for messages.
        elsewhere: parts that come from somewhere else, and need not be there.
        revision: branch, tag or commit of a Hub id; None for the main branch.
        variant: of the weights; a part without it has its plain ones taken. None prefers the plain ones.
        configuration: of a file, as of `dreambooth.model.single_file.unpack`.

    Raises:
        UserError: if there is no such model, a part of it is missing, torn or of another one, or it is of a family
            that this project does not know.
    """
    folder = Path(name)
    if is_model_file(name):
        folder = _unpacked(name, flag, configuration)
    elif not os.path.isdir(folder):
        if os.path.isfile(folder) or not can_be_hub_id(name) or name.lower().endswith(MODEL_FILES):
            raise UserError(f"{flag} {name} is not a folder, nor a .safetensors file")
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
    load_sampler(folder)  # whether it can be
    chosen = _choose(family, {part: os.listdir(folder / part) for part in parts}, name, flag, variant)
    for part, weights in chosen.items():
        with loading(family.labels[part], folder):
            weight_files(folder / part, weights)
    _tell_variants(chosen, name, flag, variant)
    if not elsewhere:
        check_configurations(folder, family)
    return folder


def _unpacked(name: str, flag: str, configuration: str | None) -> Path:
    from dreambooth.model.single_file import unpack  # with diffusers' loader, which takes time to import

    return unpack(name, flag, configuration)


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
        # Not all files of the repository are wanted, and newer releases would ask for all before they name a folder.
        cached = _cached(name, INDEX, revision)
        if cached is None:
            raise _not_to_be_had(name, flag, error) from error
        return cached.parent
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
