"""What a launcher has put into the environment of this process, read by one rule in both trainers."""

import os
from dataclasses import dataclass

from dreambooth.command_line.console import UserError

# What torchrun sets, and what PyTorch needs of it; a platform such as Kubeflow sets these alone.
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Its place among the processes of its machine, and their number.
LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Of mpirun, whose processes would each take themselves for a whole run.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# Engines that `accelerate launch` asks for by its configuration.
OTHER_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


@dataclass(frozen=True)
class Place:
    """Where among the processes of a run this one is, in torchrun's words."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def find_place() -> Place:
    """Reads this process's place from the environment; without a launcher's variables it is alone.

    Where LOCAL_RANK and LOCAL_WORLD_SIZE are missing, it is the only process of its machine. One of them alone does
    not tell how many there are, which all have to know alike.

    Raises:
        UserError: if the variables are not whole or contradict each other, or another engine is asked for.
    """
    for name, engine in OTHER_ENGINES.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on"):
            raise UserError(
                f"accelerate's configuration asks for {engine}, which this project does not use: launch without it; "
                "train_dreambooth_colossalai.py splits and offloads by --plugin and --placement"
            )
    mpi = [name for name in MPI_SIZES if os.environ.get(name, "1") != "1"]
    present = [name for name in (*NEEDED[:2], *LOCAL, *mpi) if os.environ.get(name)]
    if not present:
        return Place()
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"the environment has {', '.join(present)} of a launcher, but not {', '.join(missing)}: "
            "start with torchrun, which sets them all, or unset what is left over"
        )
    place = Place(**{name.lower(): _number(name) for name in (*NEEDED[:2], *LOCAL) if os.environ.get(name)})
    missing = [name for name in LOCAL if not os.environ.get(name)]
    if place.world_size > 1 and len(missing) == 1:
        raise UserError(
            f"the environment has {', '.join(present)} of a launcher, but not {missing[0]}: "
            "set it too, or start with torchrun, which sets them all"
        )
    _number("MASTER_PORT")
    for name, value, size in (
        ("RANK", place.rank, place.world_size),
        ("LOCAL_RANK", place.local_rank, place.local_world_size),
    ):
        if value >= size:
            raise UserError(f"the environment has {name}={value}, of {size} processes, which are counted from 0")
    return place


def _number(name: str) -> int:
    text = os.environ[name]
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise UserError(f"the environment has {name}={text}, which is not a whole number of at least 0")
    return value
