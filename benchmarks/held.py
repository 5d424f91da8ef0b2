"""Runs a trainer on GPUs that are held to the size of smaller ones, and tells what of them it took.

    python -m benchmarks.held 12 train_dreambooth_colossalai.py --plugin gemini --placement cpu ...

runs a trainer with its flags, saving included, as on a card of 12 GB; on the GPU as it is where the size is 0. Its
last line is JSON of rank 0: GiB that torch's allocator had reserved at most before the steps, and from then on, and
how much was in tensors, and GiB of host memory of its own. `benchmarks.cards` calls it.
"""

from dreambooth.command_line.console import before_imports

before_imports(__name__)

import importlib
import json
import os
import sys
import threading
from pathlib import Path

import torch

from dreambooth.command_line.console import UserError, is_rank_0, run_program
from dreambooth.command_line.limits import host_memory_gib
from dreambooth.processes.environment import find_place
from dreambooth.run.estimate import GIB
from dreambooth.run.memory import SEEN_OF_A_CARD

# What CUDA takes of a card beside torch's allocator, NCCL's buffers included: nvidia-smi's figure of a process on an
# H100, less what torch had reserved.
BESIDE_TORCH = 1.3 * GIB
POLLED_EVERY_S = 0.2


class Smaller:
    """The properties of a GPU, but for its memory."""

    def __init__(self, properties: object, size: int):
        self._properties, self.total_memory = properties, size

    def __getattr__(self, name: str) -> object:
        return getattr(self._properties, name)


def hold(card: int) -> None:
    """Holds this process's GPU to a card of so many GB: what its allocator gives, and what is told of its memory."""
    device, free_and_total = find_place().local_rank, torch.cuda.mem_get_info
    properties = torch.cuda.get_device_properties(device)
    size, most = int(card * GIB * SEEN_OF_A_CARD), int(card * GIB - BESIDE_TORCH)
    torch.cuda.set_per_process_memory_fraction(most / properties.total_memory, device)

    def mem_get_info(of: torch.device | int | None = None) -> tuple[int, int]:
        free, _ = free_and_total(of)
        return max(0, min(free, most - torch.cuda.memory_reserved(device))), size

    torch.cuda.mem_get_info = mem_get_info
    torch.cuda.get_device_properties = lambda of=None: Smaller(properties, size)


class Peaks:
    """What torch's allocator held at most between one reset of its own figures and the next, in GiB.

    Trainers reset them before the first step, Gemini also later, for figures of its own.
    """

    def __init__(self):
        self.reserved, self.in_tensors = [], []
        self._reset = torch.cuda.reset_peak_memory_stats
        torch.cuda.reset_peak_memory_stats = self.reset

    def reset(self, device: torch.device | None = None) -> None:
        self.note()
        self._reset(device)

    def note(self) -> None:
        self.reserved.append(torch.cuda.max_memory_reserved() / GIB)
        self.in_tensors.append(torch.cuda.max_memory_allocated() / GIB)

    def told(self) -> dict:
        """Returns them: before the steps, and from then on."""
        self.note()
        before, *later = self.reserved
        return {"before_steps_gib": before, "reserved_gib": max(later), "in_tensors_gib": max(self.in_tensors[1:])}


class HostMemory:
    """How much host memory this process had at most of its own, in GiB: without what the system keeps of files.

    Linux keeps a peak only of both together, so this looks time and again.
    """

    def __init__(self):
        self.own_gib = 0.0
        threading.Thread(target=self._poll, daemon=True).start()

    def _poll(self) -> None:
        pause = threading.Event()
        while not pause.wait(POLLED_EVERY_S):
            self.own_gib = max(self.own_gib, host_memory_gib("RssAnon"))


def main() -> None:
    if len(sys.argv) < 3 or not sys.argv[1].isdigit():
        raise UserError(
            "python -m benchmarks.held GB SCRIPT FLAGS, as in 12 train_dreambooth_colossalai.py --plugin ..."
        )
    card, script, *flags = sys.argv[1:]
    host, peaks = HostMemory(), Peaks() if torch.cuda.is_available() else None
    if peaks and int(card):
        hold(int(card))
    trainer = importlib.import_module(Path(script).stem)
    trainer.main(flags)
    if is_rank_0():
        print(json.dumps({"own_host_gib": host.own_gib} | (peaks.told() if peaks else {})), flush=True)


if __name__ == "__main__":
    run_program(main, os.path.basename(__file__))
