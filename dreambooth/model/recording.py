"""A denoiser's forward and backward pass, recorded as CUDA graphs: all that the host would launch, at once.

The weights are handed out within the recording, in the dtype and memory layout that the layers want, and each weight's
gradient goes to its place as soon as it is there. So the gradients of all weights exist once, and ranks share those of
some weights while others are computed.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dreambooth.command_line.console import UserError, warn
from dreambooth.command_line.flags import TrainingFlags
from dreambooth.model.family import Conditioning
from dreambooth.model.libraries import CHECKPOINTING_TAKES_A_FUNCTION
from dreambooth.model.precision import no_kernels
from dreambooth.model.trainable import Trainable, Weight
from dreambooth.processes.ranks import from_all_ranks

SMALL = 2**16  # elements of a weight, up to which its gradient waits for others
# Begins to share a tensor among the ranks, and returns what has the GPU wait until that is done.
Share = Callable[[Tensor], Callable[[], object]]


def records(flags: TrainingFlags, *, spares_memory: bool = False) -> bool:
    """Returns whether the denoiser is to be recorded, where the GPU has the room.

    Args:
        flags: of the run.
        spares_memory: whether the run is to need little GPU memory, at the price of time; then only on demand.

    Raises:
        UserError: if --cuda_graphs insists on what cannot be had.
    """
    insists = flags.cuda_graphs == "on"
    if flags.cuda_graphs == "off" or (spares_memory and not insists):
        return False
    reason = _cannot_record(flags)
    if insists and reason:
        raise UserError(f"--cuda_graphs {reason}")
    return reason is None


def all_ranks_record(recorded: bool) -> bool:
    """Returns whether all ranks are to record: recorded steps share gradients otherwise than others.

    To be called on every rank. Of several machines one may lack a compiler.

    Args:
        recorded: what `records` has returned on this rank.
    """
    able = from_all_ranks(recorded)
    if any(able) and not all(able):
        warn(
            f"rank {able.index(False)} cannot record steps, so no rank does, and they are slower: its machine may "
            "lack a C compiler or Python's headers, which Triton needs"
        )
    return all(able)


@functools.cache
def stream_to_record() -> torch.cuda.Stream:
    """Returns the one in which all is recorded: libraries keep memory for each that they have worked in."""
    return torch.cuda.Stream()


def _cannot_record(flags: TrainingFlags) -> str | None:
    """Returns why this machine cannot record a denoiser; None if it can."""
    if reason := no_kernels():
        return reason
    if flags.gradient_checkpointing and not CHECKPOINTING_TAKES_A_FUNCTION:
        return "cannot record --gradient_checkpointing with this release of diffusers: leave one of them out"
    return None


class Recording:
    """Calls of a function that predicts, and their backward passes, as graphs that are replayed.

    Inputs are copied to where the graphs read them, so that all have to be of the shapes of the recording. A
    prediction, and gradients that are handed on, are the graphs' own memory: the next replay overwrites them.

    Making one takes a first pass, which shares nothing with other ranks, and shows whether there is the room. `record`
    makes the graphs.

    Args:
        predict: takes latents, timesteps and conditioning, and returns a prediction; it reads the weights where their
            owners have them.
        trained: the weights, whole, on the GPU, where they have to stay in place.
        noisy_latents, timesteps, conditioning: an example of the inputs.
        dtype: in which the denoiser computes.
        in_place: whether the parameters' gradients are there and stay: then each backward pass overwrites them.
            Otherwise it hands them on to autograd.
        accumulates: whether gradients of several backward passes are added up, so that each needs memory of its own.
        share: what shares a parameter's gradient among the ranks as soon as it is whole, which is recorded too; None
            where that is done afterwards, or by nobody.

    Raises:
        torch.OutOfMemoryError: if the GPU has not the room; then nothing is changed.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, Tensor, Conditioning], Tensor],
        trained: Trainable,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        *,
        dtype: torch.dtype,
        in_place: bool = False,
        accumulates: bool = False,
        share: Share | None = None,
    ):
        self.predict, self.trained, self.dtype = predict, trained, dtype
        self.in_place, self.accumulates, self.share = in_place, accumulates, share
        self.parameters = trained.parameters()
        self.inputs = {"noisy_latents": noisy_latents.clone(), "timesteps": timesteps.clone()} | {
            name: tensor.clone() for name, tensor in conditioning.items()
        }
        # Zeros stay where a flat parameter has no weight.
        self.gradients = [
            parameter.grad if in_place else torch.zeros_like(parameter, requires_grad=False)
            for parameter in self.parameters
        ]
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.is_recorded, self.stream = False, stream_to_record()
        with self._all_put_back(), self._beside_others():  # at first libraries choose and set up what they use
            prediction = self._forward()
            self._backward(prediction, torch.zeros_like(prediction))
            del prediction

    def record(self) -> None:
        """Makes the graphs; on all ranks that share gradients, or on none.

        Raises:
            torch.OutOfMemoryError: if the GPU has not the room; then nothing is changed.
        """
        capture = {"stream": self.stream, "capture_error_mode": "thread_local"}
        with self._all_put_back():
            if self.share:
                with self._beside_others():  # what sharing sets up at first cannot be recorded
                    for whole in self.gradients:
                        self.share(whole)()
            with torch.cuda.graph(self.forward_graph, **capture):
                prediction = self._forward()
            self.gradient = torch.zeros_like(prediction)
            with torch.cuda.graph(self.backward_graph, pool=self.forward_graph.pool(), **capture):
                self._backward(prediction, self.gradient, self.share)
            self.prediction = prediction.detach()
        self.is_recorded = True

    @contextlib.contextmanager
    def _all_put_back(self) -> Iterator[None]:
        """Afterwards weights are where they were, and the memory is free that is not the graphs' own."""
        try:
            yield
        finally:
            self._take_back()
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _beside_others(self) -> Iterator[None]:
        """Within it work goes into the stream that is recorded, after all before it and before all after it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def _forward(self) -> Tensor:
        """Hands out the weights as leaves of autograd, and predicts."""
        alike: list[tuple[Tensor, Tensor]] = []
        for weight, value in itertools.chain(*self._places(self.parameters)):
            leaf = _place_for(value, self.dtype)
            if leaf.stride() != value.stride():
                _copy(leaf, value)
            elif leaf.dtype != value.dtype:
                alike.append((leaf, value))
            weight.owner.__dict__[weight.attribute] = leaf
        if alike:
            torch._foreach_copy_(*map(list, zip(*alike, strict=True)))
        for weight in self.trained:
            weight.owner.__dict__[weight.attribute].requires_grad_()
        inputs = {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.inputs.items()
        }
        noisy_latents = inputs.pop("noisy_latents").contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", enabled=False):
            return self.predict(noisy_latents, inputs.pop("timesteps"), inputs)

    def _backward(self, prediction: Tensor, gradient: Tensor, share: Share | None = None) -> None:
        """Goes back to the weights, and puts their gradients where they belong, from where ranks share them."""
        places = self._places(self.gradients)
        if share:
            shares = [functools.partial(share, whole) for whole in self.gradients]
            arrivals = [_Arrival(*of_one) for of_one in zip(places, shares, strict=True)]
        else:
            arrivals = [_Arrival(list(itertools.chain(*places)))]
        torch.autograd.backward(prediction, gradient)
        for arrival in arrivals:
            arrival.end()
        self._take_back()

    def _take_back(self) -> None:
        for weight in self.trained:
            weight.owner.__dict__.pop(weight.attribute, None)

    def _places(self, tensors: list[Tensor]) -> list[list[tuple[Weight, Tensor]]]:
        """Returns each weight with its elements in tensors that are laid out as the parameters are, for each one."""
        return [
            [
                (weight, tensor.detach().view(-1)[weight.offset :][: weight.shape.numel()].view(weight.shape))
                for weight in weights
            ]
            for tensor, weights in zip(tensors, self.trained.by_parameter, strict=True)
        ]

    def release(self) -> None:
        """Lets go of the graphs, and of all that they hold; it cannot be called any more."""
        if self.is_recorded:
            self.forward_graph.reset()
            self.backward_graph.reset()

    def __call__(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns a prediction, as the recorded function would."""
        for name, tensor in ({"noisy_latents": noisy_latents, "timesteps": timesteps} | conditioning).items():
            self.inputs[name].copy_(tensor)
        return _Replay.apply(self, *self.parameters)


class _Arrival:
    """Gradients that a backward pass brings one after another, and that go to their places.

    Args:
        places: of the gradients, by their weights, which are handed out.
        share: what is to be done once all of them are there; see `Share`.
    """

    def __init__(self, places: list[tuple[Weight, Tensor]], share: Callable[[], Callable] | None = None):
        self.missing, self.share, self.wait = len(places), share, None
        self.small: list[tuple[Tensor, Tensor]] = []
        for weight, place in places:
            leaf = weight.owner.__dict__[weight.attribute]
            leaf.register_post_accumulate_grad_hook(functools.partial(self._put, place))

    def _put(self, place: Tensor, leaf: Tensor) -> None:
        found, leaf.grad = leaf.grad, None
        if found.numel() <= SMALL:
            self.small.append((place, found))
        else:
            _copy(place, found)
        self.missing -= 1
        if not self.missing:
            self._complete()

    def _complete(self) -> None:
        if self.small:
            torch._foreach_copy_(*map(list, zip(*self.small, strict=True)))
            self.small.clear()
        if self.share:
            self.wait = self.share()

    def end(self) -> None:
        """Ends what is under way, when the backward pass is over; a weight may have had no gradient."""
        if self.missing:
            self._complete()
        if self.wait:
            self.wait()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recording: Recording, *parameters: Tensor) -> Tensor:
        ctx.recording = recording
        recording.forward_graph.replay()
        return recording.prediction.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        recording = ctx.recording
        recording.gradient.copy_(gradient)
        recording.backward_graph.replay()
        if recording.in_place:
            return None, *(None for _ in recording.gradients)
        # As tensors that nobody else has, so that autograd takes them as they are.
        own = Tensor.clone if recording.accumulates else Tensor.detach
        return None, *map(own, recording.gradients)


def _place_for(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns memory for a weight as layers want it: in a dtype, and that of a convolution channels-last.

    It is the weight's own, without its gradient, where nothing differs.
    """
    if weight.ndim == 4 and weight.shape[2:].numel() > 1:
        return torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last)
    return weight.detach() if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype)


def _copy(target: Tensor, source: Tensor) -> None:
    """Copies a weight, or its gradient, between dtypes and memory layouts."""
    if target.stride() == source.stride():
        target.copy_(source)
    else:
        from dreambooth.model.kernels import copy_weight  # Triton is not there without a GPU

        copy_weight(target, source)
