"""The room that a run takes on the disk: told by a dry run, and asked for before a real one spends any time."""

import argparse
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from dreambooth.command_line.console import UserError, is_rank_0
from dreambooth.data.schedule import Schedule
from dreambooth.run.checkpoint import check_names, list_checkpoints, step_of
from dreambooth.run.folders import readable

# More checkpoints than that are not counted, so that counting takes no time: of real models they fit on no disk.
MOST_CHECKPOINTS = 100_000


@dataclass(frozen=True)
class Room:
    """What a run writes into its output folder, in bytes.

    Args:
        checkpoint: one of its checkpoints.
        written, kept: how many checkpoints it writes, and how many of all are there at its end.
        pipeline: the trained pipeline.
        needed: the most that is there at a time, beyond what is there now.
        free: on the disk.
    """

    checkpoint: int
    written: int
    kept: int
    pipeline: int
    needed: int
    free: int

    def __str__(self) -> str:
        checkpoints = f"{self.written} checkpoint{'' if self.written == 1 else 's'} of {readable(self.checkpoint)}"
        kept = f", of which {self.kept} stay{'s' * (self.kept == 1)}," if self.kept < self.written else ""
        return f"{readable(self.needed)} for {checkpoints}{kept} and the pipeline of {readable(self.pipeline)}"


def room_of(args: argparse.Namespace, schedule: Schedule, *, first_step: int, weights: int, pipeline: int) -> Room:
    """Returns the room of a run whose pipeline is staged beside an earlier one's, as its checkpoints are.

    Args:
        args: the flags.
        schedule: of the run.
        first_step: steps that an earlier run has done.
        weights: how many are trained.
        pipeline: its bytes.
    """
    output_dir = Path(args.output_dir)
    # In fp32 each weight and its two moments; or the moments in a byte each.
    size = (4 + (2 if args.use_8bit_adam else 8)) * weights
    steps = range((first_step // args.save_steps + 1) * args.save_steps, schedule.steps + 1, args.save_steps)
    kept = {step_of(folder): _size(folder) for folder in list_checkpoints(output_dir)}  # the oldest first
    taken = most = 0
    for step in islice(steps, MOST_CHECKPOINTS):
        most = max(most, taken + size)
        taken += size - kept.pop(step, 0)
        kept[step] = size
        while len(kept) > (args.checkpoints_total_limit or len(kept)):
            taken -= kept.pop(next(iter(kept)))
    return Room(
        checkpoint=size,
        written=len(steps),
        kept=len(kept),
        pipeline=pipeline,
        needed=max(most, taken + pipeline),
        free=shutil.disk_usage(_existing(output_dir)).free,
    )


def check_room(
    args: argparse.Namespace,
    schedule: Schedule,
    *,
    first_step: int,
    components: Mapping[str, torch.nn.Module],
    trained: Collection[str],
) -> int:
    """Finds what would keep a run from writing its checkpoints and its pipeline; on rank 0.

    Args:
        args: the flags.
        schedule: of the run.
        first_step: steps that an earlier run has done.
        components: of the pipeline, by their names; in fp32 their weights take four bytes each.
        trained: names of those that are trained.

    Returns:
        The bytes of the pipeline.

    Raises:
        UserError: if something of another program's is where a checkpoint goes, or the disk has too little room.
    """
    pipeline = sum(4 * parameter.numel() for one in components.values() for parameter in one.parameters())
    if not is_rank_0():
        return pipeline
    check_names(Path(args.output_dir), first_step, schedule.steps)
    if args.dry_run:
        return pipeline  # it tells
    weights = sum(parameter.numel() for name in trained for parameter in components[name].parameters())
    room = room_of(args, schedule, first_step=first_step, weights=weights, pipeline=pipeline)
    if room.free < room.needed:
        raise UserError(too_little(args, room))
    return pipeline


def has_room_to_spare(args: argparse.Namespace, schedule: Schedule, *, step: int, weights: int, pipeline: int) -> bool:
    """Returns whether a checkpoint that no flag asks for leaves room for all that is still to be written.

    Args:
        args: the flags.
        schedule: of the run.
        step: optimizer steps done.
        weights: how many are trained.
        pipeline: its bytes.
    """
    room = room_of(args, schedule, first_step=step, weights=weights, pipeline=pipeline)
    return room.free >= room.needed + room.checkpoint


def too_little(args: argparse.Namespace, room: Room) -> str:
    """Returns what to say where the disk has too little room."""
    fewer = ", or write fewer checkpoints (--save_steps, --checkpoints_total_limit)" if room.written else ""
    return (
        f"--output_dir {args.output_dir}: the run needs {room}, and {readable(room.free)} are free: "
        f"make room, name a folder of another disk{fewer}"
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _existing(folder: Path) -> Path:
    """Returns the folder, or the one in which it would be made."""
    folder = folder.absolute()
    return folder if folder.exists() else _existing(folder.parent)
