"""Checkpoints: everything that a run needs to go on as if it had never stopped.

checkpoint-N/
    unet/                    fp32 weights, which `UNet2DConditionModel.from_pretrained` loads
    text_encoder/            likewise, where it is trained
    optimizer.safetensors    what AdamW keeps of each parameter, "exp_avg.unet.conv_in.bias" and so on
    state.json               step, learning rate schedule, loss scale, the run's settings, library versions

Nothing in it is pickled. No state of a random generator is needed: every draw follows from the seed and the number of
its sample (dreambooth/randomness.py). No part depends on the plugin or the number of ranks.
"""

import argparse
import hashlib
import json
import math
import re
import shutil
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dreambooth.console import UserError, is_rank_0, say, warn
from dreambooth.denoiser import Denoiser
from dreambooth.images import Photo
from dreambooth.models import first_line
from dreambooth.output import bytes_of, readable, written_whole
from dreambooth.randomness import shared_seed
from dreambooth.schedule import Schedule

NAME = re.compile(r"checkpoint-(\d+)")
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "colossalai")
# Flags that do not change the steps that are still to come.
FREE_FLAGS = {
    "output_dir",
    "logging_dir",
    "save_steps",
    "save_minutes",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "resume_anyway",
    "push_to_hub",
    "hub_token",
    "hub_model_id",
    "local_rank",
    "sample_batch_size",
    "cache_latents",
    "plugin",
    "placement",
    "offload_optim_frac",
    "num_train_epochs",  # of which, as of the next, the number of steps counts
    "max_train_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "validation_prompt",
    "num_validation_images",
    "validation_steps",
    "dry_run",
    "compile",
    "cuda_graphs",
    "allow_tf32",
    "dataloader_num_workers",
    "enable_xformers_memory_efficient_attention",
    "set_grads_to_none",
    "report_to",
}


@dataclass
class Progress:
    """How far a run is, besides its weights.

    Args:
        step: optimizer steps done, those included that the loss scale skipped.
        adam_step: updates that AdamW has made.
        optimizer: what AdamW keeps, by the tensor's name and the parameter's, on the CPU; on rank 0 only.
        lr_scheduler: what its `state_dict` returns.
        grad_scaler: what a loss scaler's `state_dict` returns; empty where there is none.
    """

    step: int
    adam_step: int
    optimizer: dict[tuple[str, str], torch.Tensor]
    lr_scheduler: dict
    grad_scaler: dict = field(default_factory=dict)


class Training(Protocol):
    """The denoiser and its optimizer in a trainer's hands; what collects state is to be called on every rank."""

    denoiser: Denoiser  # the shapes of its parts count, not its weights, which a plugin may have split

    def weights(self) -> dict[str, torch.Tensor]:
        """Returns the fp32 weights, on the CPU, by the names of the denoiser's parameters; on rank 0 only."""

    def progress(self, step: int) -> Progress:
        """Returns how far the run is after `step`."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, whole."""

    folder: Path
    written_at: float
    step: int
    adam_step: int
    lr_scheduler: dict
    grad_scaler: dict
    settings: dict
    versions: dict
    interim: bool = False  # no flag has asked for it

    def optimizer_state(self, parameter: str, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Returns those of the tensors `names` that AdamW kept of a parameter, on the CPU."""
        with safe_open(self.folder / "optimizer.safetensors", framework="pt") as file:
            kept = set(file.keys())
            return {name: file.get_tensor(f"{name}.{parameter}") for name in names if f"{name}.{parameter}" in kept}


def seed_of(args: argparse.Namespace, checkpoint: Checkpoint | None) -> int:
    """Returns the seed of the run: --seed, or that of the run that it goes on with, or one drawn for all ranks."""
    earlier = None if checkpoint is None else checkpoint.settings.get("seed")
    return shared_seed(earlier if args.seed is None else args.seed)


def flag_settings(args: argparse.Namespace, seed: int, precision: str) -> dict:
    """Returns the flags that two runs have to share so that one can go on where the other stopped.

    Args:
        args: the flags.
        seed, precision: of the run, whether the flags name them or not.
    """
    flags = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    return flags | {"seed": seed, "mixed_precision": precision}


def data_settings(schedule: Schedule, images: list[Photo]) -> dict:
    """Returns what two such runs have to share besides.

    Args:
        schedule: ranks and batch per rank may change, if their product does not.
        images: of the subject and of the class, with their facts; their prompts count too.
    """
    digest = hashlib.sha256()
    for photo in images:
        digest.update(photo.facts.digest + hashlib.sha256(photo.prompt.encode()).digest())
    return {"steps": schedule.steps, "samples per step": schedule.total_batch, "images": digest.hexdigest()[:16]}


def find_checkpoint(args: argparse.Namespace) -> Checkpoint | None:
    """Returns the checkpoint of --resume_from_checkpoint: the one named, or the newest; None without any.

    Raises:
        UserError: if the one named is missing or broken.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    folders = list_checkpoints(Path(args.output_dir)) if wanted == "latest" else [Path(wanted)]
    if not folders:
        warn(f"--resume_from_checkpoint latest: {args.output_dir} has no checkpoint, starting from the beginning")
        return None
    checkpoint = _read(folders[-1])
    for library, found in versions().items():
        if found != checkpoint.versions.get(library):
            warn(f"{checkpoint.folder} was written with {library} {checkpoint.versions.get(library)}, this is {found}")
    return checkpoint


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoints in a folder, in the order in which they were written.

    That is not that of their steps where a new run was started beside an old one's. One that was not finished has
    another name.
    """
    folders = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: (_written_at(path), int(NAME.fullmatch(path.name)[1])))


def _state_of(folder: Path) -> dict:
    """Returns what the state.json of a checkpoint says; of one that is damaged, nothing."""
    try:
        return dict(json.loads((folder / "state.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _written_at(folder: Path) -> float:
    """Returns when a checkpoint was written, in seconds; of one that is damaged, when its folder last changed."""
    try:
        return float(json.loads((folder / "state.json").read_text())["written_at"])
    except (OSError, ValueError, TypeError, KeyError):
        return folder.stat().st_mtime


def _read(folder: Path) -> Checkpoint:
    try:
        state = json.loads((folder / "state.json").read_text())
        with safe_open(folder / "optimizer.safetensors", framework="pt"):
            return Checkpoint(folder=folder, **state)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(
            f"--resume_from_checkpoint: {folder} is not a whole checkpoint: {first_line(error)}"
        ) from error


def check_settings(checkpoint: Checkpoint | None, settings: dict, resume_anyway: bool) -> None:
    """Compares settings of this run with those of the run that wrote the checkpoint, if there is one.

    Raises:
        UserError: naming each that differs, unless `resume_anyway`, and what is trained is the same.
    """
    earlier = settings if checkpoint is None else checkpoint.settings
    differing = {
        name: f"{name} was {earlier.get(name)!r} and is {value!r}"
        for name, value in sorted(json.loads(json.dumps(settings)).items())
        if value != earlier.get(name)
    }
    if not differing:
        return
    parts_differ = "train_text_encoder" in differing
    told = "; ".join(differing.values())
    if parts_differ or not resume_anyway:
        hint = "a run trains the same parts to its end" if parts_differ else "see --resume_anyway"
        raise UserError(f"--resume_from_checkpoint {checkpoint.folder}: {told}; {hint}")
    warn(f"--resume_anyway: the run goes on, but not as it would have: {told}")


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that compute."""
    return {library: version(library) for library in LIBRARIES}


def save_checkpoint(
    args: argparse.Namespace, settings: dict, training: Training, step: int, *, interim: bool = False
) -> None:
    """Writes checkpoint-N, then removes those beyond --checkpoints_total_limit; to be called on every rank.

    An `interim` one, which no flag asks for, goes when there is a later one.

    Raises:
        RunError: if it cannot be written, or the weights are not finite; earlier checkpoints stay as they are.
    """
    started = time.monotonic()
    weights, progress = training.weights(), training.progress(step)
    if not is_rank_0():
        return
    output_dir = Path(args.output_dir)
    parts = training.denoiser.parts_with(weights)
    tensors = {f"{name}.{parameter}": tensor for (name, parameter), tensor in progress.optimizer.items()}
    size = bytes_of(parts.values()) + sum(tensor.nbytes for tensor in tensors.values())
    with written_whole(output_dir / f"checkpoint-{step}", size) as folder:
        for name, part in parts.items():
            part.save_pretrained(folder / name, safe_serialization=True)
        save_file(tensors, folder / "optimizer.safetensors")
        state = {
            "written_at": time.time(),
            "step": step,
            "adam_step": progress.adam_step,
            "lr_scheduler": progress.lr_scheduler,
            "grad_scaler": progress.grad_scaler,
            "settings": settings,
            "versions": versions(),
            "interim": interim,
        }
        (folder / "state.json").write_text(json.dumps(state, indent=1))
    say(f"checkpoint-{step} saved in {time.monotonic() - started:.1f} s, {readable(size)}")
    remove_interim_checkpoints(output_dir, before=step)
    if args.checkpoints_total_limit:
        for old in list_checkpoints(output_dir)[: -args.checkpoints_total_limit]:
            shutil.rmtree(old)


def remove_interim_checkpoints(output_dir: Path, before: float = math.inf) -> None:
    """Removes the checkpoints before step `before` that no flag has asked for."""
    for folder in list_checkpoints(output_dir):
        state = _state_of(folder)
        if state.get("interim") and state["step"] < before:
            shutil.rmtree(folder)
