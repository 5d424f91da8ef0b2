"""The files that have a part's weights: one file or shards, plain or in a variant such as fp16.

    unet/diffusion_pytorch_model.safetensors
    unet/diffusion_pytorch_model.fp16.safetensors
    unet/diffusion_pytorch_model.safetensors.index.json       of shards, *-00001-of-00002.safetensors and so on
    unet/diffusion_pytorch_model.safetensors.index.fp16.json

diffusers names them so; in transformers' models they begin with "model". Other formats are not read: to unpickle a
file is to run what it says.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

PATTERNS = (
    r"{stem}(?:\.(?P<variant>[^.]+))?\.safetensors",
    r"{stem}\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json",  # counts more, as for diffusers
)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHARD = re.compile(r"-\d+-of-\d+")


@dataclass(frozen=True)
class Weights:
    """Which of its weights a part is loaded from.

    Args:
        file: their name, or that of their index.
        variant: None for the plain ones.
    """

    file: str
    variant: str | None = None

    @property
    def in_shards(self) -> bool:
        """Whether `file` is an index."""
        return self.file.endswith(".json")


def choose_weights(names: Sequence[str], stem: str, wanted: str | None) -> Weights:
    """Returns the weights that are wanted, else the plain ones, else the only ones.

    Args:
        names: of the files that there are.
        stem: with which those of weights begin.
        wanted: variant; None for the plain one.

    Raises:
        ValueError: if there are none, or several that are not wanted.
    """
    found = {}
    for pattern in PATTERNS:
        matches = (re.fullmatch(pattern.format(stem=stem), name) for name in names if not SHARD.search(name))
        found |= {match["variant"]: Weights(match[0], match["variant"]) for match in matches if match}
    for variant in (wanted, None):
        if variant in found:
            return found[variant]
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise ValueError(f"it has the variants {', '.join(sorted(found))}: choose one with --variant")
    if any(".bin" in name for name in names):
        raise ValueError(
            "its weights are in a pickle file (.bin), which may run code when it is read: convert them to safetensors"
        )
    raise ValueError(f"it has no {stem}.safetensors")


def shard_names(index: Path) -> list[str]:
    """Returns the names of the files that an index of shards leads to.

    Raises:
        ValueError: if it is not an index, or leads to other files than safetensors beside it.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        others = [name for name in names if os.path.basename(name) != name or not name.endswith(".safetensors")]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{index.name} is not an index of shards") from error
    if others:
        raise ValueError(f"{index.name} names {others[0]}: only safetensors files beside it are read")
    return names


def weight_files(folder: Path, weights: Weights) -> list[Path]:
    """Returns the safetensors files of weights in `folder`: one, or all shards.

    Raises:
        ValueError: if one is missing or torn.
    """
    names = shard_names(folder / weights.file) if weights.in_shards else [weights.file]
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing, which {weights.file} names")
        if not os.access(folder / name, os.R_OK):
            raise ValueError(f"{name} cannot be read: this user has no permission to")
        try:
            with safe_open(folder / name, framework="pt"):  # compares the file's size with what its header says
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{name} is damaged: {error}") from error
    return [folder / name for name in names]


def stored_dtype(file: Path) -> torch.dtype:
    """Returns the dtype of the weights in a safetensors file."""
    with safe_open(file, framework="pt") as tensors:
        dtypes = (tensors.get_slice(name).get_dtype() for name in tensors.keys())
        return next((DTYPES[dtype] for dtype in dtypes if dtype in DTYPES), torch.float32)
