"""The room that a run takes on the disk: told by a dry run, and asked for before a real one spends any time."""

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from dreambooth.command_line.console import UserError, is_rank_0
from dreambooth.command_line.flags import OutputFlags
from dreambooth.data.schedule import Schedule
from dreambooth.run.checkpoint import check_names, list_checkpoints, step_of
from dreambooth.run.folders import readable
from dreambooth.run.output import bytes_of

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


def checkpoint_size(weights: int, use_8bit_adam: bool) -> int:
    """Returns the bytes of a checkpoint: in fp32 each weight and its two moments; or the moments in a byte each."""
    return (4 + (2 if use_8bit_adam else 8)) * weights


def room_of(flags: OutputFlags, schedule: Schedule, *, first_step: int, checkpoint: int, pipeline: int) -> Room:
    """Returns the room of a run whose pipeline is staged beside an earlier one's, as its checkpoints are.

    Args:
        flags: name the folder, and say how many checkpoints there are.
        schedule: of the run.
        first_step: steps that an earlier run has done.
        checkpoint, pipeline: their bytes.
    """
    output_dir = Path(flags.output_dir)
    steps = range((first_step // flags.save_steps + 1) * flags.save_steps, schedule.steps + 1, flags.save_steps)
    kept = {step_of(folder): _size(folder) for folder in list_checkpoints(output_dir)}  # the oldest first
    taken = most = 0
    for step in islice(steps, MOST_CHECKPOINTS):
        most = max(most, taken + checkpoint)
        taken += checkpoint - kept.pop(step, 0)
        kept[step] = checkpoint
        while len(kept) > (flags.checkpoints_total_limit or len(kept)):
            taken -= kept.pop(next(iter(kept)))
    return Room(
        checkpoint=checkpoint,
        written=len(steps),
        kept=len(kept),
        pipeline=pipeline,
        needed=max(most, taken + pipeline),
        free=shutil.disk_usage(_existing(output_dir)).free,
    )


def check_room(
    flags: OutputFlags,
    schedule: Schedule,
    *,
    first_step: int,
    components: Mapping[str, torch.nn.Module],
    trained: Collection[str],
    use_8bit_adam: bool = False,
    dry_run: bool = False,
) -> int:
    """Finds what would keep a run from writing its checkpoints and its pipeline; on rank 0.

    Args:
        flags: as of `room_of`.
        schedule: of the run.
        first_step: steps that an earlier run has done.
        components: of the pipeline, in fp32, by their names.
        trained: names of those that are trained.
        use_8bit_adam: by which optimizer.
        dry_run: whether the room is told at its end instead.

    Returns:
        The bytes of the pipeline.

    Raises:
        UserError: if something of another program's is where a checkpoint goes, or the disk has too little room.
    """
    pipeline = bytes_of(components.values())
    if not is_rank_0():
        return pipeline
    check_names(Path(flags.output_dir), first_step, schedule.steps)
    if dry_run:
        return pipeline
    weights = sum(parameter.numel() for name in trained for parameter in components[name].parameters())
    size = checkpoint_size(weights, use_8bit_adam)
    room = room_of(flags, schedule, first_step=first_step, checkpoint=size, pipeline=pipeline)
    if room.free < room.needed:
        raise UserError(too_little(flags.output_dir, room))
    return pipeline


def has_room_to_spare(flags: OutputFlags, schedule: Schedule, *, step: int, checkpoint: int, pipeline: int) -> bool:
    """Returns whether a checkpoint that no flag asks for leaves room for all that is to be written after `step`.

    Its arguments are those of `room_of`.
    """
    room = room_of(flags, schedule, first_step=step, checkpoint=checkpoint, pipeline=pipeline)
    return room.free >= room.needed + room.checkpoint


def too_little(output_dir: str, room: Room) -> str:
    """Returns what to say where the disk has too little room."""
    fewer = ", or write fewer checkpoints (--save_steps, --checkpoints_total_limit)" if room.written else ""
    return (
        f"--output_dir {output_dir}: the run needs {room}, and {readable(room.free)} are free: "
        f"make room, name a folder of another disk{fewer}"
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _existing(folder: Path) -> Path:
    """Returns the folder, or the one in which it would be made."""
    folder = folder.absolute()
    return folder if folder.exists() else _existing(folder.parent)
