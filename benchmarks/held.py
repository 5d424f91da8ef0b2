"""Runs a trainer on GPUs that are held to the size of smaller ones, and tells what of them it took.

    python -m benchmarks.held 12 train_dreambooth_colossalai.py --plugin gemini --placement cpu ...

runs a trainer with its flags, saving included, as on a card of 12 GB; on the GPU as it is where the size is 0. Its
last line is JSON of rank 0: GiB that torch's allocator had reserved at most before the steps, and from then on, and
how much was in tensors. `benchmarks.cards` calls it.
"""

from dreambooth.command_line.console import before_imports

before_imports(__name__)

import importlib
import json
import os
import sys
from pathlib import Path

import torch

from dreambooth.command_line.console import is_rank_0, run_program
from dreambooth.processes.environment import find_place
from dreambooth.run.estimate import GIB
from dreambooth.run.memory import SEEN_OF_A_CARD

# What CUDA takes of a card beside torch's allocator, NCCL's buffers included: nvidia-smi's figure of a process on an
# H100, less what torch had reserved.
BESIDE_TORCH = 1.3 * GIB


class Smaller:
    """The properties of a GPU, but for its memory."""

    def __init__(self, properties: object, size: int):
        self._properties, self.total_memory = properties, size

    def __getattr__(self, name: str) -> object:
        return getattr(self._properties, name)


def hold(card: int) -> None:
    """Holds this process's GPU to a card of so many GB: what its allocator gives, and what is told of its memory."""
    device = find_place().local_rank
    size, properties, free_and_total = (
        int(card * GIB * SEEN_OF_A_CARD),
        torch.cuda.get_device_properties(device),
        torch.cuda.mem_get_info,
    )
    most = int(card * GIB - BESIDE_TORCH)
    torch.cuda.set_per_process_memory_fraction(most / properties.total_memory, device)

    def mem_get_info(of: torch.device | int | None = None) -> tuple[int, int]:
        free, _ = free_and_total(of)
        return max(0, min(free, most - torch.cuda.memory_reserved(device))), size

    torch.cuda.mem_get_info = mem_get_info
    torch.cuda.get_device_properties = lambda of=None: Smaller(properties, size)


def main() -> None:
    card, script, *flags = sys.argv[1:]
    on_gpu, before_steps, reset = torch.cuda.is_available(), [0], torch.cuda.reset_peak_memory_stats

    def reset_peak_memory_stats(device: torch.device | None = None) -> None:
        before_steps.append(torch.cuda.max_memory_reserved(device))
        reset(device)

    if on_gpu:
        torch.cuda.reset_peak_memory_stats = reset_peak_memory_stats  # which trainers call before the first step
        if int(card):
            hold(int(card))
    trainer = importlib.import_module(Path(script).stem)
    trainer.main(flags)
    if is_rank_0():
        found = [max(before_steps)] + [torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()] * on_gpu
        names = ("before_steps_gib", "reserved_gib", "in_tensors_gib")
        print(json.dumps({name: size / GIB for name, size in zip(names, found, strict=False)}), flush=True)


if __name__ == "__main__":
    run_program(main, os.path.basename(__file__))
