"""The room that a run takes on the disk: told by a dry run, and asked for before a real one spends any time."""

import contextlib
import errno
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from dreambooth.command_line.console import ToldByRank0, UserError, is_rank_0, say, warn
from dreambooth.command_line.flags import OutputFlags
from dreambooth.data.schedule import Schedule
from dreambooth.engine.disk import DiskMemory
from dreambooth.processes.environment import find_place
from dreambooth.processes.ranks import Ranks, from_all_ranks
from dreambooth.run.checkpoint import check_names, list_checkpoints, step_of
from dreambooth.run.folders import readable

# More checkpoints than that are not counted, so that counting takes no time: of real models they fit on no disk.
MOST_CHECKPOINTS = 100_000
# Seconds that the disk of --offload_dir may add to a step without a word: of 400 steps it makes an hour more.
SLOW_S = 10


@dataclass(frozen=True)
class Room:
    """What a run writes into its output folder, in bytes.

    Args:
        checkpoint: one of its checkpoints.
        written, kept: how many checkpoints it writes, and how many of all are there at its end.
        pipeline: the trained pipeline.
        needed: the most that is there at a time, beyond what is there now.
        free: on the disk.
        result: what messages call the trained pipeline.
    """

    checkpoint: int
    written: int
    kept: int
    pipeline: int
    needed: int
    free: int
    result: str = "pipeline"

    def __str__(self) -> str:
        result = f"the {self.result} of {readable(self.pipeline)}"
        if not self.written:
            return f"{readable(self.needed)} for {result}"
        checkpoints = f"{self.written} checkpoint{'' if self.written == 1 else 's'} of {readable(self.checkpoint)}"
        kept = f", of which {self.kept} stay{'s' * (self.kept == 1)}," if self.kept < self.written else ""
        return f"{readable(self.needed)} for {checkpoints}{kept} and {result}"


@dataclass(frozen=True)
class Sizes:
    """Of what a run writes, in bytes: a checkpoint, and the trained pipeline; and what messages call the latter."""

    checkpoint: int
    pipeline: int
    result: str = "pipeline"

    @classmethod
    def of(
        cls,
        components: Mapping[str, torch.nn.Module],
        trained: Collection[str],
        *,
        use_8bit_adam: bool = False,
        of_pipeline: int = 4,
    ) -> "Sizes":
        """Returns them for a pipeline whose `components` of the names `trained` are trained.

        A checkpoint has fp32 weights, with their two moments, in fp32 or in a byte each; a pipeline `of_pipeline`
        bytes of each weight.
        """
        weights = {name: sum(one.numel() for one in module.parameters()) for name, module in components.items()}
        of_a_weight = 4 + (2 if use_8bit_adam else 8)
        return cls(of_a_weight * sum(weights[name] for name in trained), of_pipeline * sum(weights.values()))

    @classmethod
    def of_adapters(cls, weights: int, *, files: int) -> "Sizes":
        """Returns them for so many weights of adapters, in fp32 with their moments, which are saved in `files`."""
        return cls(12 * weights, 4 * weights * files, "LoRA")


def room_of(flags: OutputFlags, schedule: Schedule, sizes: Sizes, *, first_step: int) -> Room:
    """Returns the room of a run whose pipeline is staged beside an earlier one's, as its checkpoints are.

    Args:
        flags: name the folder, and say how many checkpoints there are.
        schedule: of the run.
        sizes: of what it writes.
        first_step: steps that an earlier run has done.
    """
    output_dir = Path(flags.output_dir)
    steps = range((first_step // flags.save_steps + 1) * flags.save_steps, schedule.steps + 1, flags.save_steps)
    kept = {step_of(folder): _size(folder) for folder in list_checkpoints(output_dir)}  # the oldest first
    taken = most = 0
    for step in islice(steps, MOST_CHECKPOINTS):
        most = max(most, taken + sizes.checkpoint)
        taken += sizes.checkpoint - kept.pop(step, 0)
        kept[step] = sizes.checkpoint
        while len(kept) > (flags.checkpoints_total_limit or len(kept)):
            taken -= kept.pop(next(iter(kept)))
    return Room(
        checkpoint=sizes.checkpoint,
        written=len(steps),
        kept=len(kept),
        pipeline=sizes.pipeline,
        needed=max(most, taken + sizes.pipeline),
        free=shutil.disk_usage(_existing(output_dir)).free,
        result=sizes.result,
    )


def check_room(
    flags: OutputFlags, schedule: Schedule, sizes: Sizes, *, first_step: int, dry_run: bool = False
) -> None:
    """Finds what would keep a run from writing its checkpoints and its pipeline; on rank 0.

    Args:
        flags, schedule, sizes, first_step: as of `room_of`.
        dry_run: whether the room is told at its end instead.

    Raises:
        UserError: if something of another program's is where a checkpoint goes, or the disk has too little room.
    """
    if not is_rank_0():
        return
    check_names(Path(flags.output_dir), first_step, schedule.steps)
    room = room_of(flags, schedule, sizes, first_step=first_step)
    if room.free < room.needed and not dry_run:
        raise UserError(too_little(flags.output_dir, room))


def reserve(folder: str, size: int, ranks: Ranks) -> DiskMemory:
    """Reserves the room of --offload_dir on the disk, and tells how fast that is; to be called on every rank.

    Args:
        folder: that `check_folder` has found good.
        size: of fp32 weights and optimizer state, in bytes, of which each rank holds its share.
        ranks: of the run.

    Raises:
        UserError: on rank 0, if some rank has too little room.
        ToldByRank0: then, on the others.
    """
    memory, share = DiskMemory(Path(folder)), -(-size // ranks.world_size)
    # Before any process takes its share: those for whom there is room would leave none to other programs.
    together = share * find_place().local_world_size
    _agree_on_room(folder, share, None if together <= shutil.disk_usage(folder).free else os.strerror(errno.ENOSPC))
    rate, problem = 0.0, None
    try:
        rate = memory.reserve(share)
    except OSError as error:
        problem = error.strerror
    _agree_on_room(folder, share, problem)
    say(f"{readable(share)} of each process in {folder}, a disk that writes {readable(int(rate))}/s")
    # What stays in memory from one step to the next is not read again, but all else is, and written.
    beyond = share - available_memory() / find_place().local_world_size
    if beyond / rate > SLOW_S:
        warn(
            f"--offload_dir {folder}: {readable(int(beyond))} do not fit into memory, so that each step takes at "
            f"least {beyond / rate:.0f} s; a faster disk or more processes on more machines take less"
        )
    return memory


def _agree_on_room(folder: str, share: int, problem: str | None) -> None:
    """Ends the run on all ranks if one has a problem with its share of --offload_dir, a disk of its own machine."""
    told = problem and f"{readable(shutil.disk_usage(folder).free)} are free: {problem}"
    if found := [one for one in from_all_ranks(told) if one]:
        if not is_rank_0():
            raise ToldByRank0(UserError.status)
        raise UserError(f"--offload_dir {folder}: each process needs {readable(share)} there, and {found[0]}")


def available_memory() -> int:
    """Returns how many bytes this machine's memory could hold besides; 0 where it does not say."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as file:
        return 1024 * int(next(line for line in file if line.startswith("MemAvailable:")).split()[1])
    return 0


def has_room_to_spare(flags: OutputFlags, schedule: Schedule, sizes: Sizes, *, step: int) -> bool:
    """Returns whether a checkpoint that no flag asks for leaves room for all that is to be written after `step`."""
    room = room_of(flags, schedule, sizes, first_step=step)
    return room.free >= room.needed + room.checkpoint


def too_little(output_dir: str, room: Room) -> str:
    """Returns what to say where the disk has too little room."""
    helps = ["make room", "name a folder of another disk"]
    if room.written:
        helps.append("write fewer checkpoints (--save_steps, --checkpoints_total_limit)")
    told = f"--output_dir {output_dir}: the run needs {room}, and {readable(room.free)} are free"
    return f"{told}: {', '.join(helps[:-1])} or {helps[-1]}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _existing(folder: Path) -> Path:
    """Returns the folder, or the one in which it would be made."""
    folder = folder.absolute()
    return folder if folder.exists() else _existing(folder.parent)
