"""What to say when the machine's memory is not enough, the most common failure of all."""

import re
import shutil
from pathlib import Path
from typing import Protocol

import torch

from dreambooth.command_line.flags import Flags

GIB = 2**30
# What torch, Triton, cuBLAS, cuDNN and NCCL say when a GPU has no more memory, in whatever error.
OUT_OF_GPU_MEMORY = re.compile(r"CUDA(| error:| driver error:|\]:) out of memory|_ALLOC_FAILED|Cuda failure 2\b")
OUT_OF_HOST_MEMORY = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory")
# A DataLoader's worker that wrote beyond the end of /dev/shm, in words of either side.
OUT_OF_SHARED_MEMORY = re.compile(
    r"DataLoader worker \(pid.*\) (exited unexpectedly|is killed by signal: Bus error)"
    r"|unable to (open|write to|mmap|resize|allocate).*(shared memory|/torch_|shm)"
)
ASKED_FOR = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")
# As torch's allocator found it. By the time an error is told, what the run computed with is gone.
FOUND = re.compile(
    r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free.*allocated memory ([\d.]+ \w+) is alloc", re.DOTALL
)


# What makes a run take less memory, in the order of its cost: in it an error tells them, and what fits is looked for.
NO_GRAPHS, CHECKPOINTING = "no --cuda_graphs on", "--gradient_checkpointing"
SMALLER_BATCH = "a smaller --train_batch_size with more --gradient_accumulation_steps"
EIGHT_BIT, SPLIT, HOST = "--use_8bit_adam", "--plugin low_level_zero on several GPUs", "--placement cpu"
NO_TEXT_ENCODER, LOWER_RESOLUTION = "no --train_text_encoder", "a lower --resolution"
RANK_OF_ADAPTERS = 16
LORA = f"--lora_rank {RANK_OF_ADAPTERS}, which trains small adapters instead"
DISK = "--offload_dir on a fast disk"
_cheaper: list[str] = []
_cheaper_for_host: list[str] = []  # what spares host memory, and no GPU's


class Spread(Protocol):
    """How a run spreads what it holds, as far as it decides what else would take less; ColossalAI's strategy."""

    shards: bool
    placement: str
    offload_dir: str | None


def remember_cheaper_flags(flags: Flags, strategy: Spread | None = None) -> None:
    """Keeps what would make this run take less memory, in the order of its cost, until memory runs out.

    Args:
        flags: of the run.
        strategy: of the run; None in a script without ColossalAI's plugins.
    """
    shards, placement = (strategy.shards, strategy.placement) if strategy else (False, None)
    stays_whole = flags.optimizer.use_8bit_adam or flags.training.mixed_precision == "no"
    offered = {
        NO_GRAPHS: flags.training.cuda_graphs == "on",
        CHECKPOINTING: not flags.training.gradient_checkpointing,
        SMALLER_BATCH: flags.training.train_batch_size > 1,
        EIGHT_BIT: not (flags.optimizer.use_8bit_adam or shards),
        SPLIT: strategy is not None and not (shards or stays_whole),
        HOST: placement == "cuda" and not stays_whole,
        NO_TEXT_ENCODER: flags.model.train_text_encoder,
        LOWER_RESOLUTION: True,
        LORA: not flags.lora.is_on,
    }
    _cheaper[:] = [flag for flag, helps in offered.items() if helps]
    _cheaper_for_host[:] = [DISK] * (placement == "cpu" and strategy.offload_dir is None)


def cheaper_flags(*, of_host: bool = False) -> list[str]:
    """Returns what would make this run take less memory, or less of the host's, in the order of its cost."""
    return [*(_cheaper_for_host if of_host else ()), *_cheaper]


def host_memory_gib(what: str) -> float:
    """Returns a figure of this process's memory that Linux keeps, in GiB.

    The system calls that tell a process's peak tell that of the program which has started it, too.

    Args:
        what: "VmHWM", the largest resident set that it had; "RssFile", what is resident of files; "RssAnon", of
            its own.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) * 1024 / GIB


def is_out_of_gpu_memory(error: Exception) -> bool:
    """Whether an error is that a GPU has no more memory, in torch's words or a library's."""
    return isinstance(error, torch.OutOfMemoryError) or bool(OUT_OF_GPU_MEMORY.search(str(error)))


def explain(error: Exception) -> str | None:
    """Returns a line about an error that is one of memory: what was done, what there was, what helps; else None."""
    text, what = str(error), getattr(error, "doing", "setting up the run")
    if is_out_of_gpu_memory(error):
        return f"out of GPU memory while {what}: {_on_gpu(text)}{_what_helps(error)}"
    if isinstance(error, MemoryError) or OUT_OF_HOST_MEMORY.search(text):
        helps = _what_helps(error, of_host=True)
        return f"out of host memory while {what}: this process held {host_memory_gib('VmHWM'):.1f} GiB{helps}"
    if isinstance(error, RuntimeError | OSError) and OUT_OF_SHARED_MEMORY.search(text):
        return (
            f"a process that decodes images ended while {what}, most likely for want of shared memory: /dev/shm has "
            f"{_shared_memory()}. Start the container with a larger --shm-size, or use --dataloader_num_workers 0, "
            "which helps where host memory is short too"
        )
    return None


def _on_gpu(text: str) -> str:
    asked = ASKED_FOR.search(text)
    more = f", and {asked[1]} more were asked for" if asked else ""
    if found := FOUND.search(text):
        total, free, held = found.groups()
    else:  # a library's words
        try:
            free, total = (f"{size / GIB:.2f} GiB" for size in torch.cuda.mem_get_info())
        except RuntimeError:  # there was not even room for CUDA itself
            return "no room for CUDA; does another process use the GPU?"
        held = f"{torch.cuda.memory_allocated() / GIB:.2f} GiB"
    return f"of {total} this process held {held} in tensors, {free} were free{more}"


def _what_helps(error: Exception, *, of_host: bool = False) -> str:
    flags = getattr(error, "takes_less", None) or ", ".join(cheaper_flags(of_host=of_host))
    return f". What takes less, in the order of its cost: {flags}" if flags else ""


def _shared_memory() -> str:
    folder = Path("/dev/shm")
    return f"{shutil.disk_usage(folder).total / 2**20:.1f} MiB" if folder.is_dir() else "no room"
