"""Work in threads of this process, on what lets go of Python's lock: reading and decoding images; and torch's own."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from dreambooth.command_line.console import is_rank_0, progress
from dreambooth.processes.environment import Place

Item, Result = TypeVar("Item"), TypeVar("Result")
MAX_THREADS = 16  # each may hold a photo of 100 MB
SHOWN_FROM = 500  # items, which are done in a moment below that


def cores_of(place: Place) -> int:
    """Returns how many of the cores that this machine's processes may use are one process's share."""
    return max(1, len(os.sched_getaffinity(0)) // place.local_world_size)


@contextlib.contextmanager
def cores_left_over() -> Iterator[None]:
    """Within it torch has half of its threads on the CPU.

    They wait for each other after each operation: one whose core another process takes, such as the compiler of
    kernels, holds up all.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def ahead(items: Iterator[Item], count: int = 2) -> Iterator[Item]:
    """Yields `items`, taken from their iterator in a thread, up to `count` before anyone asks for them."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        taken = deque(pool.submit(next, items, end) for _ in range(count))
        while (item := taken.popleft().result()) is not end:
            taken.append(pool.submit(next, items, end))
            yield item


def in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], *, threads: int, desc: str | None = None
) -> Iterator[Result]:
    """Yields `work` of each item in order, done in threads a little ahead of who asks, so that memory has a limit.

    Args:
        work: its first error in the order of the items is raised.
        items: what is worked on.
        threads: at most MAX_THREADS of them.
        desc: of the progress, which many items show on rank 0; None shows none.
    """
    threads = min(threads, MAX_THREADS)
    shown = desc is not None and is_rank_0() and len(items) >= SHOWN_FROM
    ahead: deque[Future] = deque()
    most_ahead = 2 * threads
    with (
        ThreadPoolExecutor(threads) as pool,
        progress(len(items), desc=desc or "", unit="image", shown=shown) as bar,
    ):
        try:
            for number in range(len(items) + most_ahead):
                if number < len(items):
                    ahead.append(pool.submit(work, items[number]))
                if number >= most_ahead:
                    yield ahead.popleft().result()
                    bar.update()
        finally:
            for future in ahead:
                future.cancel()
