"""What a training engine gives to a checkpoint, and takes up from one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from dreambooth.model.denoiser import Denoiser
from dreambooth.model.slices import Slice

OPTIMIZER = "optimizer.safetensors"  # what AdamW keeps, in a checkpoint


@dataclass
class Progress:
    """How far a run is, besides its weights and what AdamW keeps of each.

    Args:
        adam_step: updates that AdamW has made.
        lr_scheduler: what its `state_dict` returns.
        grad_scaler: the state of a loss scaler, torch's or ColossalAI's; empty where there is none.
    """

    adam_step: int
    lr_scheduler: dict
    grad_scaler: dict = field(default_factory=dict)


class Training(Protocol):
    """The denoiser and its optimizer in a trainer's hands."""

    denoiser: Denoiser  # a plugin may have split its parameters

    def weights(self) -> list[Slice]:
        """Returns what this rank holds of the denoiser's weights, in fp32; those that are frozen, every rank has."""

    def optimizer_state(self) -> list[Slice]:
        """Returns what it holds of AdamW's state: "exp_avg.unet.conv_in.weight" and so on."""

    def progress(self) -> Progress:
        """Returns how far the run is."""


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
    files: dict = field(default_factory=dict)  # what each was when it was written

    def optimizer_state(self, parameter: str, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Returns those of the tensors `names` that AdamW kept of a parameter, mapped into memory from the file."""
        with safe_open(self.folder / OPTIMIZER, framework="pt") as file:
            kept = set(file.keys())
            return {name: file.get_tensor(f"{name}.{parameter}") for name in names if f"{name}.{parameter}" in kept}
