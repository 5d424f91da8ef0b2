"""Which process of a run this is."""

import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dreambooth.console import Stopped, UserError, warn


@dataclass(frozen=True)
class Ranks:
    """This process among the others, in torchrun's words, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device

    def __str__(self) -> str:
        return f"{self.world_size} x {self.device.type}"

    def gpu_memory(self) -> int:
        """Returns the bytes of the smallest GPU of all ranks, 0 without GPUs; to be called on every rank."""
        if self.device.type != "cuda":
            return 0
        memory = torch.tensor(torch.cuda.get_device_properties(self.device).total_memory, device=self.device)
        dist.all_reduce(memory, dist.ReduceOp.MIN)
        return int(memory)


def check_gpus() -> None:
    """Finds a launch of more processes than GPUs on a machine that has some; warns on one that has none.

    Raises:
        UserError: if the processes of this machine cannot each have a GPU.
    """
    if not torch.cuda.is_available():
        warn("no CUDA GPU was found: training on the CPU")
        return
    gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > gpus:
        raise UserError(
            f"{processes} processes were started on this machine, which has {gpus} CUDA GPU{'s' * (gpus > 1)}: "
            f"use --nproc_per_node {gpus}"
        )


def run_alone_without_torchrun() -> None:
    """Gives a process that no launcher started the environment of a run of one."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def leave() -> None:
    """Waits for the other ranks; the run is over.

    A gloo group is left to the end of the process. Destroyed here it could wait for ever: for its thread, which may be
    about to free a tensor of the last all-reduce and waits for Python's lock, which the destructor holds.
    """
    if dist.is_initialized():
        dist.barrier()
        if dist.get_backend() == dist.Backend.NCCL:
            dist.destroy_process_group()


def stop_early(name: str | None, step: int, steps: int) -> None:
    """Leaves a run that has just written a checkpoint because a signal asked it to stop.

    Raises:
        Stopped: once rank 0 has written, so that no launcher ends it while it does.
    """
    leave()
    raise Stopped(
        f"stopped by {name or 'a signal to another rank'} after step {step} of {steps}: "
        "to go on, repeat the command with --resume_from_checkpoint latest"
    )
