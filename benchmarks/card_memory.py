"""How much memory of a GPU a program takes, as nvidia-smi sees it."""

import contextlib
import subprocess
import threading
from collections.abc import Sequence

MIB_PER_GIB = 1024
POLLED_EVERY_S = 0.2


class CardMemory:
    """Asks nvidia-smi, time and again while it is entered, how much memory of a GPU is in use.

    That counts what a process takes beside torch's allocator too, and is the same for all programs.

    Args:
        gpus: names of GPUs, of which the first is asked for; none on a machine without.
    """

    def __init__(self, gpus: Sequence[str]):
        self.gpus = gpus
        self.ended = threading.Event()
        self.used: list[int] = []  # MiB
        self.thread = threading.Thread(target=self._poll, daemon=True)

    def _poll(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        query.append(f"--id={self.gpus[0]}")
        while not self.ended.is_set():
            with contextlib.suppress(OSError, ValueError):  # one answer that does not come is not missed
                self.used.append(int(subprocess.run(query, capture_output=True, text=True).stdout))
            self.ended.wait(POLLED_EVERY_S)

    def __enter__(self) -> "CardMemory":
        if self.gpus:
            self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()

    @property
    def peak_gib(self) -> float | None:
        """The most that was in use beyond what others use: the least; None where nobody answered.

        At its start a command has nothing on the card, while the one before it may still be leaving.
        """
        return (max(self.used) - min(self.used)) / MIB_PER_GIB if self.used else None
