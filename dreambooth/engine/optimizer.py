"""AdamW and the learning rate, the same in both trainers."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from diffusers.optimization import get_scheduler
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR

from dreambooth.command_line.flags import OptimizerFlags
from dreambooth.data.schedule import Schedule
from dreambooth.engine.state import Checkpoint
from dreambooth.model.precision import no_kernels
from dreambooth.model.slices import Slice
from dreambooth.model.trainable import Piece

MANY = 64  # parameters, from which on one kernel for each is no longer worth it
# What AdamW keeps of a parameter besides the number of updates; that of bitsandbytes the moments in 8 bits and the
# scales of their blocks (of a small parameter the first two only, in fp32).
STATE = ("exp_avg", "exp_avg_sq")
STATE_8BIT = ("state1", "state2", "absmax1", "absmax2")


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, which can divide gradients as it reads them.

    `divisor`, a scalar, is for one step: what clips the gradients, say, which then costs no pass over them.
    """

    divisor: torch.Tensor | None = None
    zeros_like = staticmethod(torch.zeros_like)  # from where its moments have their memory

    @torch.no_grad()
    def step(self, closure=None):
        divisor, self.divisor = self.divisor, None
        parameters = [one for group in self.param_groups for one in group["params"] if one.grad is not None]
        skips = getattr(self, "found_inf", None) is not None  # torch's loss scale hands over whether it overflowed
        if skips or not has_kernels(*parameters):
            if divisor is not None:
                torch._foreach_div_([one.grad for one in parameters], divisor)
            return super().step(closure)
        for group in self.param_groups:
            self._step(group, divisor)

    def _step(self, group: dict, divisor: torch.Tensor | None) -> None:
        weights = [one for one in group["params"] if one.grad is not None]
        if not weights:
            return
        for one in weights:
            self.state[one] = self.state[one] or new_state(self, one)
        states = [self.state[one] for one in weights]
        torch._foreach_add_([state["step"] for state in states], 1)
        step = step_by_kernels(group, states[0]["step"], divisor)  # all are in the same one
        for one, state in zip(weights, states, strict=True):
            step(one, one.grad, *(state[name] for name in STATE))


def step_by_kernels(group: dict, step: torch.Tensor, divisor: torch.Tensor | None) -> Callable:
    """Returns a function of weights, gradients and moments that takes AdamW's step number `step` with our kernel."""
    from dreambooth.model.kernels import adamw  # Triton is not there without a GPU

    # In double precision, as a beta is close to 1.
    corrections = torch.stack([1 - beta ** step.double() for beta in group["betas"]]).float()
    settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
    return functools.partial(adamw, corrections=corrections, divisor=divisor, **settings)


def settings_of(group: dict) -> dict:
    """Returns the settings of an optimizer's group, as torch's function of AdamW takes them."""
    settings = {name: group[name] for name in ("lr", "eps", "weight_decay", "amsgrad", "maximize")}
    return settings | dict(zip(("beta1", "beta2"), group["betas"], strict=True))


@dataclass(frozen=True)
class Part:
    """Weights that follow each other in memory, and what becomes of them in a step.

    Args:
        masters: (elements,), float32; AdamW updates them.
        state: what AdamW keeps of them.
        gradient: (elements,), half precision: on the GPU, or in host memory if `working` is.
        working: (elements,), half precision: gets the new weights. In host memory it may be `gradient`; on the GPU
            it is None where somebody else copies them.
        gather: is called once `working` is whole: shares it among ranks, as `dist.all_gather_into_tensor` does.
    """

    masters: torch.Tensor
    state: dict[str, torch.Tensor]
    gradient: torch.Tensor
    working: torch.Tensor | None
    gather: Callable | None = None


class DeviceAdamW:
    """Steps of AdamW on a GPU that read gradients in half precision, and write the weights in half precision too."""

    @torch.no_grad()
    def step(self, parts: list[Part], group: dict, divisor: torch.Tensor | None) -> None:
        """Updates some parts; on every rank in the same order. What a part shares is on its way during the next.

        Args:
            parts: on the GPU.
            group: of the optimizer, with its settings.
            divisor: by what the gradients are divided, a scalar, float32, there or in host memory; None for nothing.
        """
        if divisor is not None and parts:
            divisor = divisor.to(parts[0].masters.device, non_blocking=True)
        kernels, update, shared = has_kernels(*(part.masters for part in parts)), None, []
        for part in parts:
            moments = [part.state[name] for name in STATE]
            if kernels:
                part.state["step"] += 1
                update = update or step_by_kernels(group, part.state["step"], divisor)
                update(part.masters, part.gradient, *moments, half=part.working)
            else:
                tensors = [[one] for one in (part.masters, part.gradient.float(), *moments)]
                adamw(*tensors, [], [part.state["step"]], fused=True, grad_scale=divisor, **settings_of(group))
                if part.working is not None:
                    part.working.copy_(part.masters)
            if part.gather:
                shared.append(part.gather(async_op=True))
        for work in filter(None, shared):
            work.wait()


def has_kernels(*parameters: torch.Tensor) -> bool:
    """Whether kernels of our own serve some parameters: large ones on GPUs, which are few."""
    return (
        no_kernels() is None
        and 0 < len(parameters) <= MANY
        and all(one.is_cuda and one.dtype == torch.float32 and one.is_contiguous() for one in parameters)
    )


def norm_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Returns the L2 norm of all elements of some tensors: a scalar, float32."""
    if no_kernels() or len(tensors) > MANY or not all(one.is_cuda and one.is_contiguous() for one in tensors):
        return torch.stack(torch._foreach_norm(tensors, 2, torch.float32)).square().sum().sqrt()
    from dreambooth.model.kernels import norm  # Triton is not there without a GPU

    return norm(tensors)


@torch.no_grad()
def clip(optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    """Has gradients be clipped to a norm of `max_norm`, 0 for any, at the latest when the optimizer takes its step.

    Returns:
        Their L2 norm before: a scalar.
    """
    parameters = [one for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
    if not (isinstance(optimizer, AdamW) and has_kernels(*parameters)):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    found = norm_of([one.grad for one in parameters])
    if max_norm:
        # In fp16 the norm may be no number, in a step that is skipped. It must not get to where nothing overwrites it.
        optimizer.divisor = ((found + 1e-6) / max_norm).clamp(min=1).nan_to_num(nan=1.0)
    return found


def adamw_settings(flags: OptimizerFlags, schedule: Schedule) -> dict:
    """Returns the settings of AdamW, as keyword arguments of torch's."""
    return {
        "lr": flags.learning_rate * (schedule.total_batch if flags.scale_lr else 1),
        "betas": (flags.adam_beta1, flags.adam_beta2),
        "eps": flags.adam_epsilon,
        "weight_decay": flags.adam_weight_decay,
    }


def build_adamw(
    flags: OptimizerFlags, parameters: Iterable[torch.nn.Parameter], schedule: Schedule
) -> torch.optim.Optimizer:
    """Returns AdamW, or with --use_8bit_adam that of bitsandbytes.

    The latter keeps the moments of large parameters in 8 bits (Dettmers et al., arXiv 2110.02861).
    """
    if flags.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit  # only where it is wanted

        return AdamW8bit(parameters, **adamw_settings(flags, schedule))
    return AdamW(parameters, fused=True, **adamw_settings(flags, schedule))


def state_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Returns the names of the tensors that an AdamW keeps of a parameter."""
    return STATE if isinstance(optimizer, torch.optim.AdamW) else STATE_8BIT


def adam_step(optimizer: torch.optim.Optimizer) -> int:
    """Returns how many updates an AdamW has made of the parameters that this rank holds."""
    return max((int(state["step"]) for state in optimizer.state.values() if state), default=0)


def state_slices(optimizer: torch.optim.Optimizer, pieces: Iterable[Piece]) -> list[Slice]:
    """Returns what an AdamW keeps of the weights that this rank holds, as "exp_avg.NAME" and so on.

    Before its first update torch's counts as having kept zeros, from which it begins. That of bitsandbytes keeps its
    state in tensors of other shapes than the weights, which are whole on every rank.
    """
    slices = []
    for piece in pieces:
        state = optimizer.state.get(piece.shard.state_key, {})
        for name in state_names(optimizer):
            prefix = f"{name}."
            if isinstance(optimizer, torch.optim.AdamW):
                # Zeros of the piece alone: the shard may be a flat parameter, with hundreds of pieces.
                before = piece.slice_of(piece.shard.tensor, prefix)
                kept = piece.of(state[name]) if name in state else torch.zeros_like(before.values)
                slices.append(replace(before, values=kept))
            elif name in state:
                kept = state[name]
                slices.append(Slice(f"{prefix}{piece.weight.name}", kept.shape, 0, kept.flatten(), True))
    return slices


def new_state(optimizer: torch.optim.AdamW, masters: torch.Tensor, step: int = 0) -> dict[str, torch.Tensor]:
    """Returns what our AdamWs keep of fp32 weights at the beginning, after so many updates of others."""
    moments = {name: optimizer.zeros_like(masters, dtype=torch.float32) for name in STATE}
    return {"step": torch.tensor(float(step), device=masters.device)} | moments


@torch.no_grad()
def resume_optimizer(optimizer: torch.optim.Optimizer, pieces: Iterable[Piece], checkpoint: Checkpoint) -> None:
    """Gives an AdamW that has not begun the state of a checkpoint.

    Args:
        optimizer: torch's, or that of bitsandbytes.
        pieces: what this rank holds of the weights; all whole for the latter, each in a parameter of its own.
        checkpoint: of any number of ranks.
    """
    for piece in pieces:
        names = state_names(optimizer)
        kept = checkpoint.optimizer_state(piece.weight.name, names) if piece.first < piece.last else {}
        if not kept:
            continue
        state, tensor = optimizer.state[piece.shard.state_key], piece.shard.tensor
        if not isinstance(optimizer, torch.optim.AdamW):
            state |= _state_8bit(optimizer, kept, tensor.device) | {"step": checkpoint.adam_step}
            continue
        if not state:
            state |= new_state(optimizer, tensor, checkpoint.adam_step)
        for name, earlier in kept.items():
            piece.of(state[name]).copy_(earlier.flatten()[piece.first : piece.last])


def _state_8bit(optimizer: torch.optim.Optimizer, kept: dict[str, torch.Tensor], device: torch.device) -> dict:
    state = {name: tensor.to(device) for name, tensor in kept.items()}
    if "absmax1" in state:  # the values that the 8 bits stand for
        optimizer.fill_qmap()
        maps = optimizer.name2qmap
        state |= {"qmap1": maps["dynamic"].to(device), "qmap2": maps["udynamic"].to(device)}
    return state


def state_bytes(optimizer: torch.optim.Optimizer, weights: int) -> int:
    """Returns how much memory an AdamW takes for its state of so many weights."""
    return weights * (8 if isinstance(optimizer, torch.optim.AdamW) else 2)


def build_lr_scheduler(flags: OptimizerFlags, optimizer: torch.optim.Optimizer, schedule: Schedule) -> LambdaLR:
    """Returns the scheduler of --lr_scheduler; to be stepped once per optimizer step, on any number of ranks."""
    return get_scheduler(
        flags.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=flags.lr_warmup_steps,
        num_training_steps=schedule.steps,
        num_cycles=flags.lr_num_cycles,
        power=flags.lr_power,
    )


def steps_since_growth(state: dict) -> int:
    """Returns how many steps in a row had not overflowed, in the state of a loss scaler: ColossalAI's, or torch's."""
    return state["_growth_step"] if "_growth_step" in state else state["_growth_tracker"]


def load_torch_scaler(scaler: torch.amp.GradScaler, state: dict) -> None:
    """Has torch's loss scaler go on where another one was, or ColossalAI's."""
    taken = {"scale": state["scale"], "_growth_tracker": steps_since_growth(state)}
    scaler.load_state_dict(scaler.state_dict() | taken)


def resume_lr_scheduler(lr_scheduler: LambdaLR, state: dict) -> None:
    """Puts a new scheduler where another one was, with its own learning rates and their course."""
    rates, factors = lr_scheduler.base_lrs, lr_scheduler.lr_lambdas
    now = [rate * factor(state["last_epoch"]) for rate, factor in zip(rates, factors, strict=True)]
    lr_scheduler.load_state_dict(state | {"base_lrs": rates, "_last_lr": now})
    for group, lr in zip(lr_scheduler.optimizer.param_groups, now, strict=True):
        group["lr"] = lr
