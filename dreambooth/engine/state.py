"""What a training engine gives to a checkpoint, and takes up from one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from dreambooth.model.denoiser import Denoiser

OPTIMIZER = "optimizer.safetensors"  # what AdamW keeps, in a checkpoint


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
        with safe_open(self.folder / OPTIMIZER, framework="pt") as file:
            kept = set(file.keys())
            return {name: file.get_tensor(f"{name}.{parameter}") for name in names if f"{name}.{parameter}" in kept}
