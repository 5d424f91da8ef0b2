"""The denoiser and its optimizer in the hands of ColossalAI's Booster: steps, and their state in the ranks' shards."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.booster import Booster
from colossalai.interface import OptimizerWrapper
from torch.nn.parallel import DistributedDataParallel

from dreambooth.command_line.flags import TrainingFlags
from dreambooth.engine.offload import ORDINARY, Memory
from dreambooth.engine.optimizer import (
    adam_step,
    clip,
    load_torch_scaler,
    resume_lr_scheduler,
    resume_optimizer,
    state_bytes,
    state_slices,
)
from dreambooth.engine.plugins import grad_scaler, other_colossalai, shard_of, take_over
from dreambooth.engine.state import Checkpoint, Progress
from dreambooth.engine.strategy import Strategy
from dreambooth.model.denoiser import Conditioning, Denoiser
from dreambooth.model.precision import DTYPES
from dreambooth.model.recording import Share
from dreambooth.model.slices import Slice
from dreambooth.model.trainable import Piece
from dreambooth.processes.ranks import before_leaving


def share(gradients: torch.Tensor) -> dist.Work:
    """Begins to average gradients over the ranks, without a pass over them in which they are divided."""
    return dist.all_reduce(gradients, op=dist.ReduceOp.AVG, async_op=True)


def average(training: "BoosterTraining", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Does DDP's averaging of gradients over the ranks, unless that has been recorded with the backward pass."""
    gradients = bucket.buffer()
    if dist.get_world_size() > 1 and not training.denoiser.shares_gradients:
        return share(gradients).get_future().then(lambda done: done.value()[0])
    done = torch.futures.Future(devices=[gradients.device])
    done.set_result(gradients)
    return done


@dataclass
class BoosterTraining:
    """The denoiser and its optimizer as Booster returned them, and the module that was boosted.

    A sharding plugin computes in a half-precision copy of the weights; the fp32 master weights, which are the model,
    lie in its optimizer, each rank holding a part; what is in host memory lies in `memory`. `accumulates` is whether a
    step has several batches.
    """

    strategy: Strategy
    booster: Booster
    denoiser: Denoiser
    model: torch.nn.Module
    optimizer: OptimizerWrapper
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    max_grad_norm: float
    accumulates: bool
    memory: Memory = ORDINARY

    def __post_init__(self) -> None:
        if self.strategy.shards:
            take_over(self.optimizer, self.memory)
        elif torch.cuda.is_available():
            self._ddp.register_comm_hook(self, average)

    def record(
        self,
        inputs: tuple[torch.Tensor, torch.Tensor, Conditioning],
        flags: TrainingFlags,
        besides: Callable[[], object],
    ) -> None:
        """Records the denoiser as CUDA graphs, where the GPU has the room; before anything is resumed.

        Args:
            inputs, besides: as of `Denoiser.record`.
            flags: of the run.
        """
        in_place = not (self.strategy.shards or self.accumulates)
        if in_place:
            self._lay_out_gradients()
        self.denoiser.record(
            inputs,
            dtype=DTYPES[self.strategy.precision],
            keep_free=self._optimizer_bytes(),
            insist=flags.cuda_graphs == "on",
            besides=besides,
            in_place=in_place,
            accumulates=self.accumulates,
            share=self._share_of(in_place),
        )
        before_leaving(self.denoiser.release)

    def _share_of(self, in_place: bool) -> Share | None:
        """Returns what is recorded to share gradients, where DDP would begin when all of them are there.

        Many small parameters are left to DDP, which shares them in buckets.
        """
        if in_place and self.denoiser.trained.is_flat and dist.get_world_size() > 1:
            return lambda gradients: share(gradients).wait
        return None

    def _lay_out_gradients(self) -> None:
        """Gives each parameter its gradient, zeros, where DDP is going to share it.

        DDP lays them out once more after the first backward pass that it has seen, when the second begins. It asks who
        gets a gradient, not of what: so these passes need not be the denoiser's own.
        """
        self.denoiser.forward = lambda: torch.stack([one.sum() for one in self.denoiser.trained.parameters()]).sum()
        try:
            for _ in range(2):
                self.backward(self.model() * 0)
                self.optimizer.zero_grad(set_to_none=False)
        finally:
            del self.denoiser.forward

    def _optimizer_bytes(self) -> int:
        """Returns how much GPU memory a step takes on this rank when gradients are there: AdamW's state."""
        if self.strategy.zero_offloads:
            return 0
        return state_bytes(self._adamw, sum(piece.last - piece.first for piece in self._pieces()))

    def no_sync(self) -> contextlib.AbstractContextManager:
        """Returns the context of all batches of a step but the last, after which alone ranks share their gradients.

        Gemini has no place for gradients that are not shared: it shares those of each batch, and adds up its shard.
        """
        if self.strategy.plugin == "gemini":
            return contextlib.nullcontext()
        if self.strategy.shards:
            return self.optimizer.no_sync()
        # Booster's own looks for it in the outermost wrapper only, which in fp16 is another one.
        return self._ddp.no_sync()

    @property
    def _ddp(self) -> DistributedDataParallel:
        return next(part for part in self.model.modules() if isinstance(part, DistributedDataParallel))

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss` to that of the step."""
        self.booster.backward(loss, self.optimizer)

    def update(self) -> torch.Tensor | float | None:
        """Takes an optimizer step down the gradient, and clears it.

        Returns:
            The L2 norm of the gradients over all ranks before clipping; None where a sharding plugin does not clip;
            not finite where the loss scale of fp16 was too high and the step was skipped.
        """
        if self.strategy.shards:
            # Which clips: low_level_zero in AheadZeroOptimizer._unscale_and_clip_grads, gemini by what it has
            # ShardAdamW divide the gradients by.
            self.optimizer.step()
            norm = self._norm_of_sharded_gradients()
        else:
            norm = self._clip()
            self.optimizer.step()
        self.lr_scheduler.step()
        if not self.denoiser.overwrites_gradients:
            # What adds up outside DDP's buckets would need memory besides; zeros stay in them.
            self.optimizer.zero_grad(set_to_none=self.strategy.shards or not self.accumulates)
        return norm

    def _clip(self) -> torch.Tensor:
        if self.strategy.precision == "fp16":
            self.optimizer.unscale_grad()
        return clip(self._adamw, self.max_grad_norm)

    def _norm_of_sharded_gradients(self) -> torch.Tensor | float | None:
        """Returns the norm that the plugin found when it clipped, without the loss scale that is in it in fp16."""
        norm = self.optimizer.get_grad_norm()
        if scaler := grad_scaler(self.optimizer):
            overflow, scale = scaler.overflow, scaler.scale.item()
            scaler.end_step()
            if overflow:
                return math.nan
            norm = norm / scale
        return norm if self.max_grad_norm else None

    def _pieces(self) -> Iterator[Piece]:
        """Yields what this rank holds of each weight."""
        if not self.strategy.shards:
            return self.denoiser.trained.pieces()
        return self.denoiser.trained.pieces(functools.partial(shard_of, self.optimizer))

    @property
    def _adamw(self) -> torch.optim.AdamW:
        """The optimizer inside the plugin's wrappers, of which torch_ddp_fp16 has two."""
        optimizer = self.optimizer
        while isinstance(optimizer, OptimizerWrapper):
            optimizer = optimizer.optim
        return optimizer

    @torch.no_grad()
    def load_master_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Sets the fp32 master weights of a sharding plugin, which has made its own out of the half-precision copy.

        Args:
            weights: by their names. This rank reads what it holds of them, from the files that they are mapped from;
                they are taken out, so that the files are mapped no longer than that.

        Raises:
            RunError: on all ranks, if those that the plugin has made lie elsewhere than is known here.
        """
        device = get_accelerator().get_current_device()
        found = []
        for piece in self._pieces():
            own = piece.of(piece.shard.tensor)
            exact = weights.pop(piece.weight.name).flatten()[piece.first : piece.last].to(own.device, torch.float32)
            rounded = exact.to(self.strategy.weights_dtype).float()
            found.append(own.isclose(rounded, rtol=0, atol=0, equal_nan=True).sum().to(device))
            own.copy_(exact)
        found = torch.stack(found)
        dist.all_reduce(found)
        for weight, elements in zip(self.denoiser.trained, found.tolist(), strict=True):
            if elements != weight.shape.numel():
                raise other_colossalai(f"has split the weights among ranks in an unknown way, as {weight.name} shows")

    def weights(self) -> list[Slice]:
        """Returns what this rank holds of the fp32 weights, and those that are frozen."""
        return [piece.slice_of(piece.shard.tensor) for piece in self._pieces()] + self.denoiser.trained.frozen()

    def optimizer_state(self) -> list[Slice]:
        """Returns what it holds of AdamW's state."""
        return state_slices(self._adamw, self._pieces())

    def progress(self) -> Progress:
        """Returns how far the run is."""
        return Progress(adam_step(self._adamw), self.lr_scheduler.state_dict(), self._grad_scaler_state())

    def resume(self, checkpoint: Checkpoint) -> None:
        """Takes up a checkpoint's optimizer state, learning rate schedule and loss scale, beside its weights."""
        resume_optimizer(self._adamw, self._pieces(), checkpoint)
        resume_lr_scheduler(self.lr_scheduler, checkpoint.lr_scheduler)
        self._load_grad_scaler_state(checkpoint.grad_scaler)

    def _grad_scaler_state(self) -> dict:
        """Returns the state of fp16's loss scale."""
        if self.strategy.precision != "fp16":
            return {}
        if not self.strategy.shards:
            return self.optimizer.scaler.state_dict()
        return grad_scaler(self.optimizer).state()

    def _load_grad_scaler_state(self, state: dict) -> None:
        if self.strategy.precision != "fp16" or not state:
            return
        if not self.strategy.shards:
            load_torch_scaler(self.optimizer.scaler, state)
            return
        grad_scaler(self.optimizer).load_state(state)
