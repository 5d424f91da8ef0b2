"""How the processes of a run find each other, agree, and part."""

import datetime
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from dreambooth.command_line.console import RunError, Stopped, ToldByRank0, UserError, warn
from dreambooth.processes.environment import Place, find_place

Found = TypeVar("Found")
# How long a rank waits for another one: in a collective of a step, where whoever takes that long has hung; and where
# ranks meet that have worked each for itself, as while class images are generated, or while one saves.
IN_A_STEP, APART = datetime.timedelta(minutes=30), datetime.timedelta(hours=24)
# Network file systems show other machines a new file after up to a minute.
APPEARS_WITHIN_S = 90
_meeting_places: list[dist.ProcessGroup] = []  # the group in which ranks meet and tell each other what they know
_ends: list[Callable[[], object]] = []  # what is to be done before they part


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


def on_one_machine() -> bool:
    """Whether all processes of the run are of this machine, and see the same files."""
    place = find_place()
    return place.local_world_size == place.world_size


def check_gpus(place: Place) -> None:
    """Finds a launch of more processes than GPUs on a machine that has some; warns on one that has none.

    Raises:
        UserError: if the processes of this machine cannot each have a GPU.
    """
    if not torch.cuda.is_available():
        warn("no CUDA GPU was found: training on the CPU")
        return
    gpus, processes = torch.cuda.device_count(), place.local_world_size
    if processes > gpus:
        raise UserError(
            f"{processes} processes were started on this machine, which has {gpus} CUDA GPU{'s' * (gpus > 1)}: "
            f"use --nproc_per_node {gpus}"
        )


def join(place: Place) -> Ranks:
    """Joins the process group, NCCL on GPUs and gloo on the CPU; one that is there already is used.

    A process that is alone has a group of its own, since ColossalAI's plugins want one.

    Raises:
        UserError: if the group that is there is another one, or the port is taken at which ranks would meet.
    """
    check_gpus(place)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if place.world_size > 1:  # accelerate and torch read these too
        os.environ |= {"LOCAL_RANK": str(place.local_rank), "LOCAL_WORLD_SIZE": str(place.local_world_size)}
    if not dist.is_initialized():
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        try:
            where = alone if place.world_size == 1 else _where_to_meet()
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=IN_A_STEP, **where)
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                raise
            port = os.environ["MASTER_PORT"]
            raise UserError(
                f"port {port} of this machine, at which the processes are to meet, is another program's: "
                "name another one, as torchrun's --master_port or MASTER_PORT"
            ) from error
    found = dist.get_rank(), dist.get_world_size()
    if found != (place.rank, place.world_size):
        raise UserError(
            f"this process is rank {found[0]} of {found[1]} in the process group that is there already, "
            f"and rank {place.rank} of {place.world_size} by its environment"
        )
    _meeting_places[:] = _meeting_places or [dist.new_group(backend="gloo", timeout=APART)]
    return Ranks(*found, device)


def _where_to_meet() -> dict:
    """Returns the arguments of init_process_group by which ranks find each other, as torchrun has it.

    torch 2.14 looks into the store of the attempt before where torchrun starts processes again, and finds the
    addresses of some that are gone.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0":
        return {}
    store, rank, world_size = next(dist.rendezvous("env://", timeout=IN_A_STEP))
    return {"store": dist.PrefixStore(f"attempt {attempt}", store), "rank": rank, "world_size": world_size}


def meet() -> None:
    """Waits for the other ranks, which may have worked each for itself, however long it takes."""
    if _meeting_places:
        dist.barrier(group=_meeting_places[0])


def from_rank_0(find: Callable[[], Found]) -> Found:
    """Returns on all ranks what `find` returns on rank 0, so that none goes by what it alone has found.

    Raises:
        Exception: as `find` does, on rank 0.
        ToldByRank0: then, on the others.
    """
    if not _meeting_places:
        return find()
    answer: list = [None, None]  # what was found, and the exit status where that failed
    if dist.get_rank() == 0:
        try:
            answer[0] = find()
        except Exception as error:
            status = error.status if isinstance(error, UserError) else RunError.status
            dist.broadcast_object_list([None, status], src=0, group=_meeting_places[0])
            raise
    dist.broadcast_object_list(answer, src=0, group=_meeting_places[0])
    found, status = answer
    if status:
        raise ToldByRank0(status)
    return found


def from_all_ranks(value: Found) -> list[Found]:
    """Returns what each rank has, by rank; to be called on every rank."""
    if not _meeting_places:
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_meeting_places[0])
    return values


def in_turns(count: int) -> Iterator[int]:
    """Yields the numbers below `count`, each on the rank that asks first; to be called on every rank."""
    if not _meeting_places or dist.get_world_size() == 1:
        yield from range(count)
        return
    key = from_rank_0(lambda: f"turns-{secrets.token_hex(8)}")
    store = _get_default_store()
    while (turn := store.add(key, 1) - 1) < count:
        yield turn


def compare(what: str, find: Callable[[], object]) -> None:
    """Sees to it that all ranks have found the same; to be called on every rank.

    Args:
        what: names the value in the message.
        find: returns anything that JSON can say, or that has a text of its own; not called where there is one rank.

    Raises:
        UserError: naming the ranks that differ from rank 0.
    """
    if not _meeting_places or dist.get_world_size() == 1:
        return
    digest = hashlib.sha256(json.dumps(find(), sort_keys=True, default=str).encode()).hexdigest()
    digests = from_all_ranks(digest)
    others = [str(rank) for rank, one in enumerate(digests) if one != digests[0]]
    if others:
        raise UserError(
            f"rank {', '.join(others)} found other {what} than rank 0: give all processes the same command, and on "
            "several machines folders of a file system that they share"
        )


def until_found(find: Callable[[], Found]) -> Found:
    """Returns what `find` returns; on other ranks than 0 it tries again for a while, as a file may be late to appear.

    Raises:
        UserError: as `find` does at last.
    """
    limit = time.monotonic() + APPEARS_WITHIN_S
    while dist.is_initialized() and dist.get_rank() > 0 and time.monotonic() < limit:
        try:
            return find()
        except UserError:
            time.sleep(1)
    return find()


def before_leaving(end: Callable[[], object]) -> None:
    """Has `end` called when the run is over: of what holds on to the connection of the ranks, such as a CUDA graph."""
    _ends.append(end)


def leave() -> None:
    """Waits for the other ranks; the run is over.

    A gloo group is left to the end of the process. Destroyed here it could wait for ever: for its thread, which may be
    about to free a tensor of the last all-reduce and waits for Python's lock, which the destructor holds.
    """
    meet()
    while _ends:
        _ends.pop()()
    if _meeting_places and dist.get_backend() == dist.Backend.NCCL:
        _meeting_places.clear()
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
