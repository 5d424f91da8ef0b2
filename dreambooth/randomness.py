"""Random draws that are a function of the seed, of what they are for, and of a number.

Nothing here has a state that advances: any process can make the draws of any sample, so that a run does not depend
on the number of ranks or of worker processes, and nothing has to be stored to go on with it.
"""

import secrets
from enum import IntEnum

import numpy as np
import torch.distributed as dist

MAX_SEED = 2**32 - 1


class Stream(IntEnum):
    """What a random draw is for; each has numbers of its own."""

    INSTANCE_ORDER = 1
    CLASS_ORDER = 2
    INSTANCE_SAMPLE = 3
    CLASS_SAMPLE = 4


def generator(seed: int, stream: Stream, number: int) -> np.random.Generator:
    """Returns the generator of (seed, stream, number).

    Philox is counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): seed and stream
    are its key, the number is the upper half of its counter, so no two generators ever overlap.
    """
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, number, 0]))


def shared_seed(seed: int | None) -> int:
    """Returns `seed`, or one that is drawn on rank 0 and the same on all ranks."""
    if seed is not None:
        return seed
    drawn = [secrets.randbits(32)]
    if dist.is_initialized():
        dist.broadcast_object_list(drawn, src=0)
    return drawn[0]
