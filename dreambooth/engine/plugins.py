"""All that is known here of ColossalAI's inside: faster steps of its sharding plugins, and where their shards lie.

What is overridden and read here has no public name. Where another version would train with wrong numbers, and not end
with an error, there is a check; what has changed since the version that this was written for is told at the start.
"""

import contextlib
import functools
import hashlib
import inspect
import logging
from collections.abc import Iterator
from importlib.metadata import version

import torch
import torch.distributed as dist
from colossalai._analyzer._subclasses import _meta_registration
from colossalai.accelerator import get_accelerator
from colossalai.amp.naive_amp.grad_scaler import DynamicGradScaler
from colossalai.amp.naive_amp.mixed_precision_mixin import FP16MixedPrecisionMixin
from colossalai.interface import OptimizerWrapper
from colossalai.zero.gemini import GeminiOptimizer, gemini_optimizer
from colossalai.zero.gemini.chunk import Chunk
from colossalai.zero.low_level import LowLevelZeroOptimizer
from colossalai.zero.low_level.bookkeeping import BucketStore, GradientStore

from dreambooth.command_line.console import RunError, warn
from dreambooth.engine.offload import HostAdamW, Memory, StreamedAdamW
from dreambooth.engine.optimizer import AdamW, DeviceAdamW, Part, new_state, norm_of, steps_since_growth
from dreambooth.model.trainable import Shard


def other_colossalai(found: str) -> RunError:
    """Returns the error of a ColossalAI that does not do what is expected here; `found` says what it did."""
    return RunError(
        f"ColossalAI {version('colossalai')} {found}: this trainer builds on what another version does inside; "
        "install that of requirements.txt"
    )


# Of the source of the classes that the rest of this file builds on, in ColossalAI 0.5.0.
SOURCES = {
    LowLevelZeroOptimizer: "0c842aaed52f3de2",
    BucketStore: "0105c02392e25d44",
    GradientStore: "bc13ac9887f74919",
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


def let_convolutions_compile() -> None:
    """Mends what ColossalAI, once imported, has torch believe of the shapes of a convolution's gradients.

    It asks for that of the bias also where torch, which computes it otherwise, has none: its compiler fails then.
    """
    new = functools.partial(_meta_registration.orig_empty, device="meta")
    _meta_registration.new = lambda shape, *more, **how: new(() if shape is None else shape, *more, **how)


class ShardAdamW(torch.optim.AdamW):
    """torch's fused AdamW for the shards that Gemini hands out: fp32 weights with half-precision gradients.

    Gemini leaves the division of the gradients, for clipping and by the loss scale, to the optimizer: it calls
    `step(div_scale=...)`. ColossalAI has optimizers for that, whose kernels are compiled at their first use; this one
    needs no compiler, and works on GPUs and in host memory. There it also writes the weights in half precision. Nor is
    there a copy of all gradients in fp32.
    """

    num_fp32_shards_per_param = 4  # weight, gradient, two moments: by which Gemini finds room for them
    zeros_like = staticmethod(torch.zeros_like)  # from where its moments have their memory
    host: HostAdamW | None = None  # what updates shards in host memory
    in_half: dict[torch.Tensor, torch.Tensor] = {}  # where the weights of those are to be written in half precision
    updates = DeviceAdamW()  # the others

    def step(self, closure=None, div_scale: float | None = None):
        """Divides by `div_scale`, if it is above 0, and takes a step."""
        if div_scale is None:
            raise other_colossalai("did not say by what the gradients are to be divided")
        divisor = torch.tensor(div_scale) if div_scale > 0 else None
        for group in self.param_groups:
            in_host_memory, others = [], []
            for shard in group["params"]:
                (in_host_memory if shard in self.in_half else others).append(self._part(shard))
            self.host.step(in_host_memory, group, divisor)
            self.updates.step(others, group, divisor)
        self.has_stepped = True

    def _part(self, shard: torch.nn.Parameter) -> Part:
        """Returns a shard, which gives its gradient up; on a GPU Gemini copies the new weights itself."""
        gradient, shard.grad, state = shard.grad, None, self.state[shard]
        state |= {} if state else new_state(self, shard.detach())
        return Part(shard.detach(), state, gradient, self.in_half.get(shard))


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
        """Takes up what `state` has returned, or that of torch's scaler, which counts no overflows."""
        self.scale.fill_(state["scale"])
        # It grows at the very step, and torch's counts further.
        known = state | {"_growth_step": min(steps_since_growth(state), self._growth_interval - 1)}
        for name in self.COUNTERS:
            setattr(self, name, known.get(name, getattr(self, name)))

    def update(self, overflow: bool) -> None:
        self.overflow = overflow

    def end_step(self) -> None:
        if self.overflow is None:
            raise other_colossalai("did not say whether the gradients overflowed")
        super().update(self.overflow)
        self.overflow = None


class InPlaceBucket(BucketStore):
    """low_level_zero's bucket, which has the gradient of a flat parameter shared where it lies.

    ColossalAI's copies what is in a bucket, to put what belongs to the same rank side by side. A single gradient is so
    already. Where gradients stay in place for a recording, the copies would take as much of the GPU again.
    """

    def get_flatten_grad(self) -> torch.Tensor:
        """Returns (elements of all gradients,): the part of each rank after that of the one before."""
        slices = [one for of_rank in self.get_grad().values() for one in of_rank]
        first = slices[0]
        lie_so = [one.data_ptr() - first.data_ptr() for one in slices]
        if lie_so != [number * first.nbytes for number in range(len(slices))] or len(slices) != self.world_size:
            return super().get_flatten_grad()
        return first.as_strided([len(slices) * first.numel()], [1])


class AheadZeroOptimizer(LowLevelZeroOptimizer):
    """low_level_zero's optimizer of one group of parameters, whose host need not wait for the GPU in a step in bf16.

    ColossalAI's waits for the backward pass to end, and then for the norm of the gradients, to decide whether they are
    to be clipped; meanwhile the host launches nothing, and afterwards the GPU has nothing to do until it has. Here the
    GPU clips by a norm that the host does not know. In fp16 the host waits to know whether the step is to be skipped,
    and where it updates the weights itself, for the gradients. Nor is there a copy of all gradients in fp32, which
    ColossalAI's makes before it updates a weight.
    """

    updates: DeviceAdamW | StreamedAdamW  # the master weights: on the GPU, or in host memory

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
        if self.mixed_precision_mixin.should_skip_step():
            self.zero_grad()
            return
        parts = [self._part(*one) for one in zip(self._working_param_groups[0], self._masters, strict=True)]
        (store,) = self.pg_to_grad_store.values()
        squares = norm_of([part.gradient for part in parts]).square()
        dist.all_reduce(squares, group=store.torch_pg)
        divisor = self._divisor(squares.sqrt())
        self.updates.step(parts, self.optim.param_groups[0], divisor)

    @property
    def _masters(self) -> list[torch.Tensor]:
        return self._master_param_groups_of_current_rank[0]

    def _part(self, weights: torch.nn.Parameter, masters: torch.Tensor) -> Part:
        """Returns this rank's part of a parameter and of its gradient."""
        store = self.pid_to_grad_store[id(weights)]
        rank, ranks = store.local_rank, store.world_size
        gradients = store.get_partitioned_gradients_by_param_id(0, id(weights))
        whole = self._working_param_to_padded_working_param[weights]
        if [one.numel() for one in gradients] != ranks * [masters.numel()]:
            raise other_colossalai("has split the gradients among ranks in an unknown way")
        if whole.data_ptr() != weights.data_ptr():
            raise other_colossalai("has the weights that are computed with elsewhere")
        own = whole[rank * masters.numel() : (rank + 1) * masters.numel()]
        state = self.optim.state[masters]
        state |= {} if state else new_state(self.optim, masters)
        share = functools.partial(dist.all_gather_into_tensor, whole, own, group=store.torch_pg) if ranks > 1 else None
        return Part(masters, state, gradients[rank], own, share)

    def _divisor(self, norm: torch.Tensor) -> torch.Tensor | None:
        """Returns by what the gradients are to be divided, a scalar; None for nothing.

        Args:
            norm: theirs, of all ranks, with the loss scale in it.
        """
        self._current_grad_norm = norm
        divisor = self.mixed_precision_mixin.get_grad_div_scale()
        if self._clip_grad_norm > 0:
            excess = (norm / divisor + 1e-6) / self._clip_grad_norm
            return divisor * excess.clamp(min=1)
        return None if divisor == 1 else torch.full((), divisor, device=norm.device)


class LastingChunk(Chunk):
    """Gemini's chunk, whose memory goes to nobody else before each stream is done with it.

    Gemini shares gradients in a stream of its own. As soon as it has asked for that it frees what this stream is going
    to read, which belongs to the stream that computes: the next tensor may be laid over it, and where a card is full
    its pages are taken away. Once torch's collectives saw to it that this had to wait. Now they hold on to the tensor,
    which Gemini leaves without memory.
    """

    def access_chunk(self, async_access: bool = False) -> dist.Work | None:
        self._is_used_here()
        return super().access_chunk(async_access)

    def release_chunk(self) -> None:
        self._is_used_here()
        super().release_chunk()

    def reduce(self, async_op: bool = False) -> None:
        """Shares the gradients, in the stream in which it is called: there Gemini would wait for the end at once."""
        self._is_used_here()
        super().reduce()

    def init_grad_chunk(self) -> Chunk:
        if self.grad_chunk is not None:
            self.grad_chunk._is_used_here()
        made = super().init_grad_chunk()
        made.__class__ = LastingChunk
        return made

    def _is_used_here(self) -> None:
        """Has the memory wait for what the current stream has been given to do when it is freed."""
        for tensor in (self.cuda_global_chunk, self.cuda_shard):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream())


class WritingGeminiOptimizer(GeminiOptimizer):
    """Gemini's optimizer, where AdamW writes the weights in half precision, if their fp32 masters are in host memory.

    It writes them where the GPU fetches them from, and where their gradients came to. ColossalAI's has the GPU fetch
    the masters instead, twice the bytes, make the weights of them, and bring these back.

    A step that is skipped ends an accumulation as any other does. After ColossalAI's the next gradients would be added
    to those that overflowed, and overflow too.
    """

    def step(self, *args: object, **more: object) -> object:
        done = super().step(*args, **more)
        self.module.chunk_manager.accumulating_grads = False
        return done

    def _set_grad_ptr(self) -> None:
        super()._set_grad_ptr()
        self.optim.in_half = {}
        for shard, chunk in self.param_to_chunk16.items():
            if chunk.paired_chunk.device_type != "cpu":
                continue
            if chunk.device_type != "cpu" or not chunk.pin_memory:
                raise other_colossalai("keeps weights on a GPU whose masters are in host memory")
            begin, end = self.param_to_range[shard]
            self.optim.in_half[shard] = chunk.payload[begin:end]
        self.optim.has_stepped = False

    def _update_fp16_params(self) -> None:
        super()._update_fp16_params()  # marks weights in host memory as older than their masters
        if not self.optim.has_stepped:
            return  # in fp16 a step may be skipped: gradients are where the weights would be
        for shard in self.optim.in_half:
            chunk = self.param_to_chunk16[shard]
            chunk.optim_sync_flag = chunk.cpu_vis_flag = True


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


@contextlib.contextmanager
def masters_in(memory: Memory) -> Iterator[None]:
    """Has the master weights that a sharding plugin makes within it in host memory lie in `memory`.

    None of them stays elsewhere while others are made. They are not pinned: no GPU copies from them.
    """
    create, close = LowLevelZeroOptimizer._create_master_param_current_rank, Chunk.close_chunk

    def create_one_by_one(self, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
        masters = []
        for parameter in parameters:
            (made,) = create(self, [parameter])
            if self._cpu_offload:
                del self.master_to_working_param[id(made)]
                made = memory.take(made)
                self.link_master_and_working_param(made, parameter)
            masters.append(made)
        return masters

    def close_in_memory(self) -> None:
        of_masters = self.dtype == torch.float32
        self.pin_memory = self.pin_memory and not of_masters
        close(self)
        if of_masters and self.cpu_shard is not None:
            self.cpu_shard = memory.take(self.cpu_shard)

    LowLevelZeroOptimizer._create_master_param_current_rank, Chunk.close_chunk = create_one_by_one, close_in_memory
    try:
        yield
    finally:
        LowLevelZeroOptimizer._create_master_param_current_rank, Chunk.close_chunk = create, close


def take_over(optimizer: OptimizerWrapper, memory: Memory) -> None:
    """Has a sharding plugin's optimizer and loss scale be those above; the plugins have no place to name them.

    Args:
        optimizer: as the plugin has made it within `masters_in(memory)`.
        memory: for what it keeps in host memory.
    """
    if changed := changed_inside():
        warn(
            f"ColossalAI {version('colossalai')} is not the 0.5.0 that this trainer was written for, inside "
            f"{', '.join(changed)}: watch the first steps, or install that of requirements.txt"
        )
    if isinstance(optimizer, LowLevelZeroOptimizer):
        assert optimizer.num_param_groups == 1 and isinstance(optimizer.optim, AdamW)
        optimizer.__class__ = AheadZeroOptimizer
        for bucket in optimizer.pg_to_bucket_store.values():
            bucket.__class__ = InPlaceBucket
        if optimizer._cpu_offload:
            (device,) = {weights.device for weights in optimizer._working_param_groups[0]}
            optimizer.updates = StreamedAdamW(device, optimizer.dtype, memory)
        else:
            optimizer.updates = DeviceAdamW()
        offloaded = optimizer._masters if optimizer._cpu_offload else []
    else:
        optimizer.__class__ = WritingGeminiOptimizer
        # Gemini's own logger looks for the source of every function on the stack, at each backward pass, for a line
        # that is not shown.
        optimizer.module._logger = logging.getLogger("colossalai")
        optimizer.optim.host = HostAdamW(memory)
        offloaded = []
        for chunk in optimizer.chunk16_set:
            chunk.__class__ = LastingChunk
        for chunk in {chunk.paired_chunk for chunk in optimizer.chunk16_set}:
            if chunk.device_type == "cpu":
                # Those that Gemini has made on the GPU, and moved away from there later.
                chunk.cpu_shard = chunk.cpu_shard if memory.holds(chunk.cpu_shard) else memory.take(chunk.cpu_shard)
                offloaded.append(chunk.payload)
    if not all(memory.holds(masters) for masters in offloaded):
        raise other_colossalai("makes master weights in an unknown way")
    optimizer.optim.zeros_like = memory.zeros_like
    if scaler := grad_scaler(optimizer):
        scaler.__class__ = HeldGradScaler
