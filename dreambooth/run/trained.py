"""What is trained, out of all ranks' hands: into files, or as models that draw."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from dreambooth.command_line.console import RunError, ToldByRank0, is_rank_0
from dreambooth.engine.state import Training
from dreambooth.model.components import empty_copy, save_configuration, stem_of
from dreambooth.model.libraries import name_in_file
from dreambooth.model.lora import WEIGHTS, Lora, scaled
from dreambooth.model.precision import all_finite
from dreambooth.model.slices import Slice, gather, write_slices
from dreambooth.processes.ranks import Ranks, from_all_ranks, from_rank_0


def write_trained(folder: Path, training: Training, ranks: Ranks, dtype: torch.dtype = torch.float32) -> None:
    """Writes the components that are trained, whole, as folders within `folder`; to be called on every rank.

    Of adapters it writes a file.

    Raises:
        OSError: on rank 0, if some rank cannot write.
        ToldByRank0: then, on the others.
    """
    slices = training.weights()
    if adapters := training.denoiser.adapters:
        write_slices(folder / WEIGHTS, slices, ranks, adapters.metadata())
        return
    for name, component in training.denoiser.named_children():
        own = from_rank_0(lambda own=folder / name, component=component: _configured(component, own))
        prefix = f"{name}."
        own_slices = [one for one in slices if one.name.startswith(prefix)]
        weights = [replace(one, name=one.name.removeprefix(prefix), dtype=dtype) for one in own_slices]
        write_slices(own / f"{stem_of(type(component))}.safetensors", weights, ranks)


def _configured(component: torch.nn.Module, folder: Path) -> Path:
    save_configuration(component, folder)
    return folder


def check_finite(slices: Iterable[Slice]) -> None:
    """Finds weights that are no numbers, so that no file gets them; to be called on every rank.

    Raises:
        RunError: on rank 0, naming one.
        ToldByRank0: then, on the others.
    """
    broken = next((one.name for one in slices if not all_finite(one.values)), None)
    if found := [name for name in from_all_ranks(broken) if name]:
        if not is_rank_0():
            raise ToldByRank0(RunError.status)
        raise RunError(f"the weights hold values that are not finite, in {found[0]}: they are not saved")


def gather_adapters(training: Training, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Puts the adapters that are trained together on rank 0, with their alpha in B; to be called on every rank.

    Returns:
        Their weights, fp32, on the CPU, by their names in files; on other ranks than 0 empty ones.

    Raises:
        RunError, ToldByRank0: as `check_finite` does.
    """
    slices = training.weights()
    check_finite(slices)
    weights = {one.name: whole for one, whole in zip(slices, gather(slices, ranks), strict=True)}
    return scaled(weights, training.denoiser.adapters.scale)


def gather_for_pipeline(training: Training, ranks: Ranks, dtype: torch.dtype) -> dict[str, torch.nn.Module | Lora]:
    """Puts what is trained together on rank 0, as arguments of `load_pipeline`; to be called on every rank.

    Raises:
        RunError, ToldByRank0: as `check_finite` does.
    """
    if training.denoiser.adapters is None:
        return gather_trained(training, ranks, dtype)
    return {"lora": Lora("this run", gather_adapters(training, ranks))}


def gather_trained(training: Training, ranks: Ranks, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Puts the components that are trained together on rank 0, anew; to be called on every rank.

    Args:
        training: whose weights they get.
        ranks: of the run.
        dtype: of their weights; no rank has all of them in fp32 beside its own.

    Returns:
        Models on the CPU, by their names; on other ranks than 0 none.

    Raises:
        RunError, ToldByRank0: as `check_finite` does.
    """
    slices = training.weights()
    check_finite(slices)
    weights = {one.name: whole.to(dtype) for one, whole in zip(slices, gather(slices, ranks), strict=True)}
    if ranks.rank:
        return {}
    components = {}
    for name, component in training.denoiser.named_children():
        components[name] = empty_copy(component)
        own = {inner: weights[f"{name}.{name_in_file(component, inner)}"] for inner in components[name].state_dict()}
        components[name].load_state_dict(own, assign=True)
    return components
