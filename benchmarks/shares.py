"""Runs that each have a share of the machine to themselves: some of its GPUs, and as large a part of its cores.

So a run with one GPU of eight has what it would have on a machine of one, and may go on beside others.
"""

import concurrent.futures
import contextlib
import functools
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent


class Processes:
    """Those that run; when they are ended, no other may begin."""

    def __init__(self):
        self._running: set[subprocess.Popen] = set()
        self._are_over = False

    @contextlib.contextmanager
    def started(self, words: Sequence, **options):
        """Starts a process, as subprocess.Popen does; when the context ends, all that it has started is ended."""
        if self._are_over:
            raise concurrent.futures.CancelledError
        process = subprocess.Popen([str(word) for word in words], **options)
        self._running.add(process)
        try:
            yield process
        finally:
            end_all(process)
            self._running.remove(process)

    def end(self) -> None:
        """Ends all."""
        self._are_over = True
        for process in list(self._running):
            end_all(process)


def end_all(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started, which launchers put into sessions of their own."""
    if process.poll() is not None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.kill()
    process.wait()


@dataclass(frozen=True)
class Share:
    """What of the machine a run has.

    Args:
        gpus: by the names that CUDA and nvidia-smi have for them; none on a machine without GPUs.
        cores: of the CPU, by their numbers.
        processes: that run, in this share and in others.
    """

    gpus: tuple[str, ...]
    cores: tuple[int, ...]
    processes: Processes = field(default_factory=Processes, compare=False)

    def run(self, words: Sequence, limit_s: float, **outputs) -> subprocess.CompletedProcess:
        """Runs a command in the project's folder.

        Args:
            words: of the command.
            limit_s: seconds that it may take.
            outputs: "stdout" and "stderr", as of subprocess.Popen; what is not named is in the result.

        Raises:
            subprocess.TimeoutExpired: if it takes longer; by then it has been ended.
        """
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | outputs
        options |= {"stdin": subprocess.DEVNULL, "text": True, "errors": "replace", "cwd": ROOT}
        options["preexec_fn"] = functools.partial(os.sched_setaffinity, 0, self.cores)
        if self.gpus:
            options["env"] = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
        with self.processes.started(words, **options) as process:
            said = process.communicate(timeout=limit_s)
        return subprocess.CompletedProcess(words, process.returncode, *said)


def shares() -> list[Share]:
    """Returns the shares of runs with one GPU each; a single one, of all cores, where there is no GPU."""
    processes = Processes()
    gpus = [f"GPU-{torch.cuda.get_device_properties(n).uuid}" for n in range(torch.cuda.device_count())]
    cores = sorted(os.sched_getaffinity(0))
    if not gpus:
        return [Share((), tuple(cores), processes)]
    each = max(1, len(cores) // len(gpus))
    return [Share((gpu,), tuple(cores[n * each : (n + 1) * each] or cores), processes) for n, gpu in enumerate(gpus)]


def joined(parts: Sequence[Share]) -> Share:
    """Returns the share of a run that has all of these."""
    gpus, cores = ([one for part in parts for one in getattr(part, name)] for name in ("gpus", "cores"))
    return Share(tuple(gpus), tuple(cores), parts[0].processes)


@dataclass(frozen=True)
class Job:
    """What is to be done with a share of the machine.

    Args:
        gpus: how many; on a machine without GPUs it has all that there is.
        work: is called with the share.
    """

    gpus: int
    work: Callable[[Share], None]


def carry_out(jobs: Sequence[Job], parts: Sequence[Share], *, side_by_side: bool) -> None:
    """Does jobs in their order: one after another, or each as soon as there are the GPUs for it.

    One that waits for GPUs is not overtaken. An exception ends all that runs, and is raised.
    """
    wanted = [job.gpus if parts[0].gpus else 1 for job in jobs]
    assert max(wanted, default=0) <= len(parts)
    if not side_by_side:
        for job, count in zip(jobs, wanted, strict=True):
            job.work(joined(parts[:count]))
        return
    free, waiting = list(parts), list(zip(jobs, wanted, strict=True))
    taken: dict[concurrent.futures.Future, Sequence[Share]] = {}
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        try:
            while waiting or taken:
                while waiting and waiting[0][1] <= len(free):
                    job, count = waiting.pop(0)
                    mine, free = free[:count], free[count:]
                    taken[pool.submit(job.work, joined(mine))] = mine
                for done in concurrent.futures.wait(taken, return_when=concurrent.futures.FIRST_COMPLETED).done:
                    free += taken.pop(done)
                    done.result()
        except BaseException:
            parts[0].processes.end()
            raise
