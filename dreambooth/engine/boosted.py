"""The denoiser and its optimizer in the hands of ColossalAI's Booster: steps, and all state out of the shards."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.booster import Booster
from colossalai.interface import OptimizerWrapper
from torch.nn.parallel import DistributedDataParallel

from dreambooth.engine.optimizer import adam_step, optimizer_state, resume_lr_scheduler, resume_optimizer, state_names
from dreambooth.engine.plugins import grad_scaler, in_host_memory, other_colossalai, shard_of, take_over
from dreambooth.engine.state import Checkpoint, Progress
from dreambooth.engine.strategy import Strategy
from dreambooth.model.denoiser import Denoiser, Part


@dataclass
class Boosted:
    """The denoiser and its optimizer as Booster returned them, and the module that was boosted.

    A sharding plugin computes in a half-precision copy of the weights; the fp32 master weights, which are the model,
    lie in its optimizer, each rank holding a part.
    """

    strategy: Strategy
    booster: Booster
    denoiser: Denoiser
    model: torch.nn.Module
    optimizer: OptimizerWrapper
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    max_grad_norm: float

    def __post_init__(self) -> None:
        if self.strategy.shards:
            take_over(self.optimizer)

    def no_sync(self) -> contextlib.AbstractContextManager:
        """Returns the context of all batches of a step but the last, after which alone ranks share their gradients.

        Gemini has no place for gradients that are not shared: it shares those of each batch, and adds up its shard.
        """
        if self.strategy.plugin == "gemini":
            return contextlib.nullcontext()
        if self.strategy.shards:
            return self.optimizer.no_sync()
        # Booster's own looks for it in the outermost wrapper only, which in fp16 is another one.
        return next(part for part in self.model.modules() if isinstance(part, DistributedDataParallel)).no_sync()

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
            self.optimizer.step()
            norm = self._norm_of_sharded_gradients()
        else:
            norm = self._clip()
            self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return norm

    def _clip(self) -> torch.Tensor:
        if self.strategy.precision == "fp16":
            self.optimizer.unscale_grad()
        return torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.max_grad_norm or math.inf)

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

    def _parts(self) -> Iterator[Part]:
        """Yields this rank's parts, in the same order on all ranks; a part may be empty."""
        if not self.strategy.shards:
            yield from self.denoiser.parts()
            return
        for parameter, pieces in zip(self.denoiser.parameters(), self.denoiser.pieces, strict=True):
            shard = shard_of(self.optimizer, parameter)
            for piece in pieces:
                yield piece.part(*shard)

    @property
    def _adamw(self) -> torch.optim.AdamW:
        """The optimizer inside the plugin's wrappers, of which torch_ddp_fp16 has two."""
        optimizer = self.optimizer
        while isinstance(optimizer, OptimizerWrapper):
            optimizer = optimizer.optim
        return optimizer

    def pin_master_weights(self) -> None:
        """Moves low_level_zero's master weights, which are in host memory, to where GPUs copy faster from."""
        for parameter in self.denoiser.parameters():
            shard, *_ = shard_of(self.optimizer, parameter)
            shard.data = in_host_memory(shard, shard.dtype)

    @torch.no_grad()
    def load_master_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Sets the fp32 master weights of a sharding plugin, which has made its own out of the half-precision copy.

        Args:
            weights: fp32 tensors by their names.

        Raises:
            RunError: on all ranks, if those that the plugin has made lie elsewhere than is known here.
        """
        if not self.strategy.shards:
            return
        device = get_accelerator().get_current_device()
        names, found = [], []
        for part in self._parts():
            own = part.of(part.tensor)
            exact = weights[part.name].flatten()[part.first : part.last].to(own.device)
            rounded = exact.to(self.strategy.weights_dtype).float()
            names.append(part.name)
            found.append(own.isclose(rounded, rtol=0, atol=0, equal_nan=True).sum().to(device))
            own.copy_(exact)
        found = torch.stack(found)
        dist.all_reduce(found)
        for name, elements in zip(names, found.tolist(), strict=True):
            if elements != self.denoiser.shapes[name].numel():
                raise other_colossalai(f"has split the weights among ranks in an unknown way, as {name} shows")

    @torch.no_grad()
    def _gather(self, tensor_of: Callable[[Part], torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Puts the parts of all ranks together on rank 0, on the CPU; to be called on every rank.

        Args:
            tensor_of: returns a tensor in fp32 that is laid out as the `tensor` of a part that is not empty, or None,
                which stands for zeros.

        Returns:
            Tensors by the names of the weights; an empty dict on other ranks than 0.
        """
        device = get_accelerator().get_current_device()
        gathered = {}
        for part in self._parts():
            tensor = tensor_of(part) if part.first < part.last else None
            shape = self.denoiser.shapes[part.name]
            # As integers, the sum of all parts and zeros elsewhere is each part, to the sign of a zero.
            whole = torch.zeros(shape.numel(), dtype=torch.int32, device=device)
            if tensor is not None:
                whole[part.first : part.last] = part.of(tensor).view(torch.int32).to(device)
            dist.reduce(whole, dst=0)
            if dist.get_rank() == 0:
                gathered[part.name] = whole.view(torch.float32).view(shape).cpu()
        return gathered

    def weights(self) -> dict[str, torch.Tensor]:
        """Returns the fp32 master weights on the CPU, by name; on other ranks than 0 nothing. To be called on all."""
        if self.strategy.shards:
            return self._gather(lambda part: part.tensor)
        return {name: weight.cpu() for name, weight in self.denoiser.weights().items()} if dist.get_rank() == 0 else {}

    def progress(self, step: int) -> Progress:
        """Returns how far the run is after `step`; to be called on every rank."""
        return Progress(
            step=step,
            adam_step=adam_step(self._adamw),
            optimizer=self._optimizer_state(),
            lr_scheduler=self.lr_scheduler.state_dict(),
            grad_scaler=self._grad_scaler_state(),
        )

    def _optimizer_state(self) -> dict[tuple[str, str], torch.Tensor]:
        adamw = self._adamw
        if not self.strategy.shards:
            return optimizer_state(adamw, self.denoiser) if dist.get_rank() == 0 else {}
        gathered = {
            name: self._gather(lambda part, name=name: adamw.state[part.state_key].get(name))
            for name in state_names(adamw)
        }
        return {(name, weight): tensor for name, of_name in gathered.items() for weight, tensor in of_name.items()}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Takes up a checkpoint's optimizer state, learning rate schedule and loss scale, beside its weights."""
        resume_optimizer(self._adamw, self._parts(), checkpoint)
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
            self.optimizer.scaler.load_state_dict(state)
            return
        grad_scaler(self.optimizer).load_state(state)
