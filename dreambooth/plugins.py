"""What ColossalAI's sharding plugins do in a step, where it can be done in less time."""

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.interface import OptimizerWrapper
from colossalai.zero.gemini import gemini_optimizer
from colossalai.zero.low_level import LowLevelZeroOptimizer
from torch.overrides import TorchFunctionMode


def in_host_memory(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a copy in host memory: pinned, where there is a GPU.

    Memory of the ordinary kind would be asked of the operating system in each step, page by page, which takes many
    times as long as the copy. Pinned memory torch keeps for the next, and GPUs copy to and from it faster.
    """
    return torch.empty(tensor.shape, dtype=dtype, pin_memory=torch.cuda.is_available()).copy_(tensor)


class OffloadThroughPinnedMemory(TorchFunctionMode):
    """Within it, a plugin's `tensor.to(torch.device("cpu"))` of what is on a GPU is `in_host_memory`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and args[0].is_cuda and args[1:] == (torch.device("cpu"),):
            return in_host_memory(args[0], args[0].dtype)
        return func(*args, **(kwargs or {}))


class ShardAdamW(torch.optim.AdamW):
    """torch's fused AdamW for the shards that Gemini hands out: fp32 weights with half-precision gradients.

    Gemini leaves the division of the gradients, for clipping and by the loss scale, to the optimizer: it calls
    `step(div_scale=...)`. ColossalAI has optimizers for that, whose kernels are compiled at their first use; this one
    needs no compiler, and works on GPUs and in host memory.
    """

    num_fp32_shards_per_param = 4  # weight, gradient, two moments: by which Gemini finds room for them
    div_scale = -1.0  # not above 0: no division

    def step(self, closure=None, div_scale: float = -1.0):
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


class AheadZeroOptimizer(LowLevelZeroOptimizer):
    """low_level_zero's optimizer of one group of parameters, whose host need not wait for the GPU in a step in bf16.

    ColossalAI's waits for the backward pass to end, and then for the norm of the gradients, to decide whether they are
    to be clipped; meanwhile the host launches nothing, and afterwards the GPU has nothing to do until it has. Here the
    GPU clips by a norm that the host does not know. In fp16 the host waits to know whether the step is to be skipped,
    and where it updates the weights itself, for the gradients.
    """

    def backward(self, loss: torch.Tensor, inputs=None, retain_graph: bool = False) -> None:
        self.mixed_precision_mixin.pre_backward(loss).backward(inputs=inputs, retain_graph=retain_graph)
        if self.require_grad_sync:
            self._reduce_grad(self._partition_grads)
            for bucket in self.pg_to_bucket_store.values():  # each in its own stream
                get_accelerator().current_stream().wait_stream(bucket.comm_stream)

    def _compute_grad_norm(self, dp_pg: dist.ProcessGroup, gradients: list[torch.Tensor], norm_type: int = 2) -> float:
        """Keeps the norm, with the loss scale in it, for `_unscale_and_clip_grads`, which ignores what is returned."""
        squares = torch.stack(torch._foreach_norm(gradients, norm_type, torch.float32)).square().sum()
        dist.all_reduce(squares, group=dp_pg)
        self._scaled_norm = squares.sqrt()
        return 0.0

    def _unscale_and_clip_grads(self, shards: list[torch.Tensor], total_norm: float) -> None:
        self._current_grad_norm = self._scaled_norm
        divisor = self.mixed_precision_mixin.get_grad_div_scale()
        if self._clip_grad_norm > 0:
            excess = (self._scaled_norm / divisor + 1e-6) / self._clip_grad_norm
            divisor = (divisor * excess.clamp(min=1)).to(shards[0].device)
        torch._foreach_div_(shards, divisor)


def keep_host_ahead(optimizer: OptimizerWrapper) -> None:
    """Has low_level_zero's optimizer be the one above; its plugin has no place to name it."""
    if isinstance(optimizer, LowLevelZeroOptimizer):
        assert optimizer.num_param_groups == 1
        optimizer.__class__ = AheadZeroOptimizer
