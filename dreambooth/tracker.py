"""How a run is going: one progress bar and TensorBoard scalars, without holding up the GPU."""

import argparse
import resource
import time
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dreambooth.ranks import Ranks
from dreambooth.schedule import Schedule

GIB = 2**30


def peak_host_memory_gib() -> float:
    """Returns the largest resident set that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def peak_memory_gib(device: torch.device) -> float:
    """Returns the most memory that this process held for training: what torch allocated on a GPU, else on the host."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else peak_host_memory_gib()


class Tracker:
    """Shows and logs the figures of each step on rank 0.

    The loss is a tensor on the device. Reading it would wait for the device, so each step only starts a copy to the
    host and shows the steps whose copy has arrived; leaving the context waits for the last ones.

    Args:
        args: names the TensorBoard folder, which is written on rank 0 only.
        schedule: of the run.
        ranks: rank 0 shows; the others only take part in averaging.
        first_step: steps done before, by the run that this one goes on with.
        images_per_step: images that go through the UNet in a step, over all ranks.
    """

    def __init__(
        self, args: argparse.Namespace, schedule: Schedule, ranks: Ranks, first_step: int, images_per_step: int
    ):
        self.device = ranks.device
        self.world_size = ranks.world_size
        self.images_per_step = images_per_step
        shown = ranks.rank == 0
        # What the earlier run logged after its checkpoint is hidden: those steps are taken again.
        folder = str(Path(args.output_dir, args.logging_dir))
        self.writer = SummaryWriter(folder, purge_step=first_step + 1 if first_step else None) if shown else None
        self.progress = tqdm(total=schedule.steps, initial=first_step, desc="training", unit="step", disable=not shown)
        self.pending: deque = deque()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.last_mark = self._mark()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _mark(self):
        """Returns the present moment on the device's clock."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, earlier, later) -> float:
        return earlier.elapsed_time(later) / 1000 if self.device.type == "cuda" else later - earlier

    def step(self, step: int, *, loss: torch.Tensor, lr: float, grad_norm: torch.Tensor | float | None) -> None:
        """Takes the figures of `step`, counted from 1; to be called on every rank.

        Args:
            step: optimizer steps done.
            loss: scalar of this rank; the mean over the ranks is shown.
            lr: learning rate of the step.
            grad_norm: L2 norm of the gradients before clipping, or None where it is not known.
        """
        loss = loss.detach().float().clone()
        if self.world_size > 1:
            dist.all_reduce(loss)
            loss /= self.world_size
        if self.writer is None:
            return
        figures = {"loss": self._to_host(loss), "lr": lr}
        if grad_norm is not None:
            figures["grad_norm"] = self._to_host(grad_norm)
        self.pending.append((step, figures, self._mark()))
        self._show_arrived()

    def _to_host(self, figure: torch.Tensor | float) -> torch.Tensor | float:
        """Starts to copy a scalar to the host; its value is there once a mark made later has passed."""
        if self.device.type != "cuda" or not isinstance(figure, torch.Tensor):
            return figure
        return torch.empty((), pin_memory=True).copy_(figure.detach(), non_blocking=True)

    def _show_arrived(self) -> None:
        while self.pending and (self.device.type != "cuda" or self.pending[0][-1].query()):
            step, figures, mark = self.pending.popleft()
            figures["images_per_second"] = self.images_per_step / self._seconds(self.last_mark, mark)
            figures["peak_memory_gib"] = peak_memory_gib(self.device)
            figures["peak_host_memory_gib"] = peak_host_memory_gib()
            self.last_mark = mark
            for name, value in figures.items():
                self.writer.add_scalar(name, float(value), step)
            self.progress.set_postfix_str(
                f"loss {float(figures['loss']):.4f}, lr {figures['lr']:.2e}, "
                f"{figures['images_per_second']:.1f} images/s, peak {figures['peak_memory_gib']:.1f} GiB",
                refresh=False,
            )
            self.progress.update()

    def close(self) -> None:
        """Shows the steps that are still on their way."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._show_arrived()
        self.progress.close()
        if self.writer is not None:
            self.writer.close()
