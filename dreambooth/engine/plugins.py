"""All that is known here of ColossalAI's inside: faster steps of its sharding plugins, and where their shards lie.

What is overridden and read here has no public name. Where another version would train with wrong numbers, and not end
with an error, there is a check; what has changed since the version that this was written for is told at the start.
"""

import contextlib
import functools
import hashlib
import inspect
from importlib.metadata import version

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.amp.naive_amp.grad_scaler import DynamicGradScaler
from colossalai.amp.naive_amp.mixed_precision_mixin import FP16MixedPrecisionMixin
from colossalai.interface import OptimizerWrapper
from colossalai.zero.gemini import GeminiOptimizer, gemini_optimizer
from colossalai.zero.gemini.chunk import Chunk
from colossalai.zero.low_level import LowLevelZeroOptimizer
from torch.overrides import TorchFunctionMode

from dreambooth.command_line.console import RunError, warn
from dreambooth.engine.optimizer import AdamW, norm_of
from dreambooth.model.trainable import Shard


def other_colossalai(found: str) -> RunError:
    """Returns the error of a ColossalAI that does not do what is expected here; `found` says what it did."""
    return RunError(
        f"ColossalAI {version('colossalai')} {found}: this trainer builds on what another version does inside; "
        "install that of requirements.txt"
    )


warn_once = functools.cache(warn)

# Of the source of the classes that the rest of this file builds on, in ColossalAI 0.5.0.
SOURCES = {
    LowLevelZeroOptimizer: "0c842aaed52f3de2",
    GeminiOptimizer: "1f06236f23fa2594",
    Chunk: "7afc94a92d1b0b23",
    DynamicGradScaler: "63461e4a8dee27b7",
    FP16MixedPrecisionMixin: "9827a470096c3fe8",
}


def changed_inside() -> list[str]:
    """Returns the names of those classes whose source is another now."""
    return [kind.__name__ for kind, digest in SOURCES.items() if source_digest(kind) != digest]


def source_digest(kind: type) -> str:
    """Returns what tells one source of a class from another; empty where there is none to read."""
    try:
        return hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()[:16]
    except OSError:
        return ""


def in_host_memory(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a copy in host memory: pinned, where there is a GPU.

    Memory of the ordinary kind would be asked of the operating system in each step, page by page, which takes many
    times as long as the copy. Pinned memory torch keeps for the next, and GPUs copy to and from it faster.
    """
    return torch.empty(tensor.shape, dtype=dtype, pin_memory=torch.cuda.is_available()).copy_(tensor)


class OffloadThroughPinnedMemory(TorchFunctionMode):
    """Within it, a plugin's `tensor.to(torch.device("cpu"))` is `in_host_memory`."""

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and args[1:] == (torch.device("cpu"),):
            self.copies += 1
            return in_host_memory(args[0], args[0].dtype)
        return func(*args, **(kwargs or {}))


class ShardAdamW(torch.optim.AdamW):
    """torch's fused AdamW for the shards that Gemini hands out: fp32 weights with half-precision gradients.

    Gemini leaves the division of the gradients, for clipping and by the loss scale, to the optimizer: it calls
    `step(div_scale=...)`. ColossalAI has optimizers for that, whose kernels are compiled at their first use; this one
    needs no compiler, and works on GPUs and in host memory.
    """

    num_fp32_shards_per_param = 4  # weight, gradient, two moments: by which Gemini finds room for them

    def step(self, closure=None, div_scale: float | None = None):
        """Divides by `div_scale`, if it is above 0, and takes a step."""
        if div_scale is None:
            raise other_colossalai("did not say by what the gradients are to be divided")
        self.div_scale = div_scale
        return super().step(closure)

    def _init_group(self, group: dict, params: list, grads: list, *others):
        """Gathers a group's tensors, as torch's optimizers do; the gradients in fp32."""
        found = super()._init_group(group, params, grads, *others)
        grads[:] = [in_host_memory(grad, torch.float32) if grad.is_cpu else grad.float() for grad in grads]
        if self.div_scale > 0:
            torch._foreach_div_(grads, self.div_scale)
        return found


gemini_optimizer._AVAIL_OPTIM_LIST.add(ShardAdamW)  # Gemini takes the exact types of this set only


class HeldGradScaler(DynamicGradScaler):
    """The loss scale of fp16, which stays what it is until a step is over.

    ColossalAI's may grow before the gradients are divided by it: in such a step they, and the norm that decides
    whether they are clipped, would be half of what they are.
    """

    overflow: bool | None = None  # whether the gradients of the step in hand did; None before it is known
    COUNTERS = ("_growth_step", "_hysteresis_step")

    def state(self) -> dict:
        """Returns what it is made of; ColossalAI's own `state_dict` leaves the counters out."""
        return {"scale": self.scale.item()} | {name: getattr(self, name) for name in self.COUNTERS}

    def load_state(self, state: dict) -> None:
        """Takes up what `state` has returned."""
        self.scale.fill_(state["scale"])
        for name in self.COUNTERS:
            setattr(self, name, state[name])

    def update(self, overflow: bool) -> None:
        self.overflow = overflow

    def end_step(self) -> None:
        if self.overflow is None:
            raise other_colossalai("did not say whether the gradients overflowed")
        super().update(self.overflow)
        self.overflow = None


class AheadZeroOptimizer(LowLevelZeroOptimizer):
    """low_level_zero's optimizer of one group of parameters, whose host need not wait for the GPU in a step in bf16.

    ColossalAI's waits for the backward pass to end, and then for the norm of the gradients, to decide whether they are
    to be clipped; meanwhile the host launches nothing, and afterwards the GPU has nothing to do until it has. Here the
    GPU clips by a norm that the host does not know. In fp16 the host waits to know whether the step is to be skipped,
    and where it updates the weights itself, for the gradients.
    """

    def backward(self, loss: torch.Tensor, inputs=None, retain_graph: bool = False) -> None:
        overlaps = self._overlap_communication
        super().backward(loss, inputs, retain_graph)
        self._overlap_communication = overlaps

    def _reduce_grad(self, partition_grad: bool) -> None:
        """Shares the gradients among ranks; the GPU waits for them, and `backward` is told that the host need not."""
        super()._reduce_grad(partition_grad)
        for bucket in self.pg_to_bucket_store.values():  # each in its own stream
            get_accelerator().current_stream().wait_stream(bucket.comm_stream)
        self._overlap_communication = False

    def step(self, closure=None) -> None:
        self._scaled_norm, self._has_clipped = None, False
        with OffloadThroughPinnedMemory() if self._cpu_offload else contextlib.nullcontext() as offload:
            super().step(closure)
        scaler = grad_scaler(self)
        if scaler and scaler.overflow:  # the step was skipped
            return
        if not self._has_clipped:
            raise other_colossalai("did not have the gradients clipped")
        if self._cpu_offload and not offload.copies:
            warn_once(
                f"ColossalAI {version('colossalai')} does not move gradients as that of requirements.txt does: "
                "--placement cpu takes longer than it need"
            )

    def _compute_grad_norm(self, dp_pg: dist.ProcessGroup, gradients: list[torch.Tensor], norm_type: int = 2) -> float:
        """Keeps the norm, with the loss scale in it, for `_unscale_and_clip_grads`, which ignores what is returned."""
        squares = norm_of(gradients).square()
        dist.all_reduce(squares, group=dp_pg)
        self._scaled_norm = squares.sqrt()
        return 0.0

    def _unscale_and_clip_grads(self, shards: list[torch.Tensor], total_norm: float) -> None:
        if self._scaled_norm is None:
            raise other_colossalai("did not have the norm of the gradients computed")
        self._current_grad_norm = self._scaled_norm
        divisor = self.mixed_precision_mixin.get_grad_div_scale()
        if self._clip_grad_norm > 0:
            excess = (self._scaled_norm / divisor + 1e-6) / self._clip_grad_norm
            divisor = (divisor * excess.clamp(min=1)).to(shards[0].device)
        elif divisor != 1:
            divisor = torch.full((), divisor, device=shards[0].device)
        else:
            divisor = None
        self.optim.divisor = divisor  # AdamW divides by it as it reads the shards
        self._has_clipped = True


def grad_scaler(optimizer: OptimizerWrapper) -> DynamicGradScaler | None:
    """Returns the loss scale of a sharding plugin's optimizer; None in bf16, which has none."""
    zero = isinstance(optimizer, LowLevelZeroOptimizer)
    return getattr(optimizer.mixed_precision_mixin if zero else optimizer.mix_precision_mixin, "grad_scaler", None)


def shard_of(optimizer: OptimizerWrapper, parameter: torch.nn.Parameter) -> Shard:
    """Returns this rank's fp32 master weights of a parameter; where it holds none of it, an empty shard."""
    if isinstance(optimizer, LowLevelZeroOptimizer):
        masters = optimizer.working_to_master_param[id(parameter)]
        return Shard(masters, dist.get_rank() * masters.numel(), masters)
    number = next(number for number, real in optimizer.id_to_real_params.items() if real is parameter)
    if number not in optimizer.id_to_fake_params:
        return Shard(torch.empty(0), 0, None)
    fake = optimizer.id_to_fake_params[number]  # what stands for it in AdamW
    begin, first, size = optimizer.get_offsets(number)
    masters = optimizer.param_to_chunk16[fake].paired_chunk.payload
    return Shard(masters[begin : begin + size], first, fake)


def take_over(optimizer: OptimizerWrapper) -> None:
    """Has a sharding plugin's optimizer and loss scale be those above; the plugins have no place to name them."""
    if changed := changed_inside():
        warn(
            f"ColossalAI {version('colossalai')} is not the 0.5.0 that this trainer was written for, inside "
            f"{', '.join(changed)}: watch the first steps, or install that of requirements.txt"
        )
    if isinstance(optimizer, LowLevelZeroOptimizer):
        assert optimizer.num_param_groups == 1 and isinstance(optimizer.optim, AdamW)
        optimizer.__class__ = AheadZeroOptimizer
    if scaler := grad_scaler(optimizer):
        scaler.__class__ = HeldGradScaler
