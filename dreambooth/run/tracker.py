"""How a run is going: shown, logged and watched, without holding up the GPU."""

import gc
import math
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from dreambooth.command_line.console import RunError, first_line, progress, warn
from dreambooth.command_line.limits import host_memory_gib
from dreambooth.data.samples import DreamBoothDataset
from dreambooth.data.schedule import Schedule
from dreambooth.processes.ranks import Ranks
from dreambooth.processes.signals import StopRequest

GIB = 2**30
# So many steps later the host waits for a step's figures: long enough for the GPU to have them by then. Where a step
# takes longer than SLOW_S the host waits at once, which costs little then, so that a run can stop after it.
LAG, SLOW_S = 2, 4
# Checkpoints by time take no more than this share of it.
SHARE_OF_SAVING = 0.05
# With a loss scale, steps that overflow are skipped; so many in a row are not the scale's fault any more.
MAX_SKIPPED_IN_A_ROW = 25
NAMES_SHOWN = 8
SHOWN_AT_ONCE = (1, 10, 100)  # steps, in a log that has a line every half minute otherwise


def peak_memory_gib(device: torch.device, cuda_graphs: bool) -> float:
    """Returns the most memory that this process held for training: what torch allocated on a GPU, else on the host.

    What graphs allocate counts as free between their runs, though they keep it: with them, what torch has reserved.
    """
    if device.type == "cpu":
        return host_memory_gib("VmHWM")
    return (torch.cuda.max_memory_reserved if cuda_graphs else torch.cuda.max_memory_allocated)(device) / GIB


class Asked(NamedTuple):
    """What all ranks do after a step, alike.

    Args:
        stop: end the run, though it is not the last step, because a signal has asked one of the ranks.
        save: write a checkpoint, because it has been long since the last one.
    """

    stop: bool
    save: bool


class Tracker:
    """Shows and logs the figures of each step on rank 0, and tells all ranks alike when to stop.

    The figures are tensors on the device. Reading them would wait for the device, so each step only starts a copy to
    the host; what a step's figures say about the run counts LAG steps later, at the same step on every rank.

    Args:
        schedule: of the run.
        ranks: rank 0 shows.
        dataset: whose samples the run takes.
        folder: for TensorBoard, written on rank 0 only; None for none.
        first_step: steps done before, by the run that this one goes on with.
        save_minutes: after the last checkpoint, until one is to be written; 0 is never.
        cuda_graphs: whether steps are replayed from them, which counts for the memory that they take.
        skips: whether there is a loss scale, because of which steps may be skipped.
    """

    def __init__(
        self,
        schedule: Schedule,
        ranks: Ranks,
        dataset: DreamBoothDataset,
        *,
        folder: Path | None,
        first_step: int,
        save_minutes: float,
        cuda_graphs: bool,
        skips: bool,
    ):
        self.schedule = schedule
        self.device = ranks.device
        self.cuda_graphs = cuda_graphs
        self.world_size = ranks.world_size
        self.dataset = dataset
        self.skips = skips
        self.request = StopRequest()
        self.stop_since = self.save_since = self.failed_since = math.inf  # steps
        self.slow: set[int] = set()  # those that are not yet known to all
        self.save_every_s = 60 * save_minutes or math.inf
        self.save_due_at = math.inf  # on the clock of rank 0
        self.skipped = self.skipped_in_a_row = 0
        self.shown = ranks.rank == 0
        self.seconds_per_step = self.peak_memory_gib = self.peak_host_memory_gib = math.nan  # of the last step shown
        self.writer = None
        if self.shown and folder is not None:
            # Steps that an earlier run has logged in the folder, and that are taken again, are hidden.
            self.writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        self.progress = progress(schedule.steps, initial=first_step, desc="training", unit="step", shown=self.shown)
        self.pending: deque = deque()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.last_mark = self._mark()

    def __enter__(self) -> "Tracker":
        self.request.__enter__()
        # What is there now, stays: the collector would go through it in one of the steps, for up to half a second.
        gc.collect()
        gc.freeze()
        self.restart_clock()
        self.save_due_at = time.monotonic() + self.save_every_s
        return self

    def __exit__(self, *exception) -> None:
        self.request.__exit__()
        gc.unfreeze()
        self._close()

    def finish(self) -> None:
        """Waits for the figures of the last step; what follows, a signal does not interrupt.

        Raises:
            RunError: if figures are not finite.
        """
        self.request.heed()
        self.settle()
        self._close()

    def _close(self) -> None:
        self.progress.close()
        self._log(lambda writer: writer.close())

    def _log(self, write: Callable[[SummaryWriter], object]) -> None:
        """Has TensorBoard's writer write; from where it cannot any more on, the run goes on without."""
        if self.writer is None:
            return
        try:
            write(self.writer)
        except OSError as error:
            self.writer = None
            warn(f"no figures go to TensorBoard from here on: {first_line(error)}")

    def restart_clock(self) -> None:
        """Leaves the time since the last step out of the next one; `settle` has been called."""
        self.last_mark = self._mark()

    def saved(self, seconds: float) -> None:
        """Tells that a checkpoint has been written, and how long it took."""
        self.save_since = math.inf
        self.save_due_at = time.monotonic() + max(self.save_every_s, seconds / SHARE_OF_SAVING)

    def _mark(self):
        """Returns the present moment on the device's clock."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, earlier, later) -> float:
        return earlier.elapsed_time(later) / 1000 if self.device.type == "cuda" else later - earlier

    def step(self, step: int, *, loss: torch.Tensor, lr: float, grad_norm: torch.Tensor | float | None) -> Asked:
        """Takes the figures of `step`, counted from 1; to be called on every rank.

        Args:
            step: optimizer steps done.
            loss: scalar of this rank; the mean over the ranks is shown.
            lr: learning rate of the step.
            grad_norm: L2 norm of the gradients before clipping; None where it is not known, not finite where the step
                was skipped.

        Raises:
            RunError: if figures are not finite.
        """
        self.request.get_on()
        figures = torch.cat([loss.detach().float()[None], self._says()])
        if self.world_size > 1:
            dist.all_reduce(figures)
            figures /= self.world_size
        figures = torch.cat([figures, self._scalar(0 if grad_norm is None else grad_norm)[None]])
        if self.device.type == "cuda":
            figures = torch.empty(len(figures), pin_memory=True).copy_(figures, non_blocking=True)
        self.pending.append((step, figures, lr, grad_norm is not None, self._mark()))
        # By figures that all ranks have, whichever others this one has already.
        known = step - LAG if self.device.type == "cuda" else step
        self._take(known)
        if known in self.slow:
            self.slow.remove(known)
            known = step
            self._take(known)
        if self.failed_since <= known:
            raise self._failure()
        stop = self.stop_since <= known and step < self.schedule.steps
        if stop:
            self.request.heed()
        return Asked(stop, self.save_since <= known)

    def _says(self) -> torch.Tensor:
        """Returns what counts for all if one rank says so: stop; on rank 0 also save, and that steps are slow."""
        on_gpu = self.device.type == "cuda"
        due, slow = time.monotonic() >= self.save_due_at, self.seconds_per_step > SLOW_S
        says = torch.tensor([bool(self.request), self.shown and due, self.shown and slow], pin_memory=on_gpu)
        return says.to(self.device, torch.float32, non_blocking=True)

    def _scalar(self, value: torch.Tensor | float) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.detach().float().to(self.device)
        return torch.full((), float(value), device=self.device)

    def settle(self) -> None:
        """Waits for the figures of all steps so far; to be called on every rank, before anything is saved.

        Raises:
            RunError: if figures are not finite.
        """
        self._take(math.inf)
        if self.failed_since < math.inf:
            raise self._failure()
        self._log(lambda writer: writer.flush())

    def show_images(self, name: str, images: np.ndarray, step: int) -> None:
        """Logs images after `step`.

        Args:
            name: under which they are shown.
            images: (images, height, width, 3), uint8.
            step: optimizer steps done.
        """
        self._log(lambda writer: writer.add_images(name, images, step, dataformats="NHWC"))

    def _take(self, last: float) -> None:
        """Takes the figures that have arrived, and waits for those up to step `last`."""
        while self.pending:
            step, figures, lr, has_norm, mark = self.pending[0]
            if self.device.type == "cuda" and not mark.query():
                if step > last:
                    return
                mark.synchronize()
            self.pending.popleft()
            loss, stop, save, slow, grad_norm = figures.tolist()
            self.stop_since = min(self.stop_since, step if stop else math.inf)
            self.save_since = min(self.save_since, step if save else math.inf)
            self.slow |= {step} if slow else set()
            self._watch(step, loss, grad_norm)
            if self.shown:
                self._show(step, {"loss": loss, "lr": lr} | ({"grad_norm": grad_norm} if has_norm else {}), mark)
            self.last_mark = mark

    def _watch(self, step: int, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if not self.skips or self.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            self.failed_since = min(self.failed_since, step)

    def _failure(self) -> RunError:
        step, total = self.failed_since, self.schedule.total_batch
        samples = range((step - 1) * total, step * total)
        names = sorted(
            {os.path.basename(one.photos[one.place_of(n)].name) for one in self.dataset.sets for n in samples}
        )
        names[NAMES_SHOWN:] = ["..."] * (len(names) > NAMES_SHOWN)
        what = (
            f"{MAX_SKIPPED_IN_A_ROW + 1} steps in a row overflowed, the last of them step {step}"
            if self.skips
            else f"the loss or the gradient of step {step} is not finite"
        )
        return RunError(
            f"{what} (samples {samples[0]} to {samples[-1]}: {', '.join(names)}); nothing was saved since. "
            "Try a lower --learning_rate, or another --mixed_precision"
        )

    def _show(self, step: int, figures: dict[str, float], mark) -> None:
        images = self.schedule.total_batch * self.dataset.examples_per_sample
        self.seconds_per_step = self._seconds(self.last_mark, mark)
        self.peak_memory_gib = peak_memory_gib(self.device, self.cuda_graphs)
        self.peak_host_memory_gib = host_memory_gib("VmHWM")
        figures["images_per_second"] = images / self.seconds_per_step
        figures["peak_memory_gib"] = self.peak_memory_gib
        figures["peak_host_memory_gib"] = self.peak_host_memory_gib
        for name, value in figures.items():
            self._log(lambda writer, name=name, value=value: writer.add_scalar(name, value, step))
        self.progress.set_postfix_str(
            f"loss {figures['loss']:.4f}, lr {figures['lr']:.2e}, "
            f"{figures['images_per_second']:.1f} images/s, peak {figures['peak_memory_gib']:.1f} GiB"
            + (f", {self.skipped} skipped" if self.skipped else ""),
            refresh=False,
        )
        self.progress.update()
        if self.progress.n - self.progress.initial in SHOWN_AT_ONCE:
            self.progress.refresh()
