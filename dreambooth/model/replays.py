"""A UNet that draws, each of its passes a CUDA graph that is replayed.

A pipeline's fifty steps launch the same work fifty times, and a host takes two to three times as long to launch it as
a GPU to do it. Recorded once, it is launched at once; see recording.py, which does so for training.
"""

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from dreambooth.model.recording import stream_to_record


def replay(unet: UNet2DConditionModel) -> None:
    """Has a UNet on a GPU record its pass for each size of its inputs, and replay it from then on.

    It keeps its images channels-last. What it returns is the same to rounding. Inputs that are no tensors, such as a
    scale of adapters, are not known to stay as they are: with them it computes as ever.

    Args:
        unet: in a pipeline, without gradients. Its weights have to stay where they are.
    """
    unet.forward = _Replays(unet)  # which a module's call looks up


def replay_no_more(unet: UNet2DConditionModel) -> None:
    """Has a UNet be as it was before `replay`, and lets go of what its graphs hold; does nothing without that."""
    if isinstance(unet.forward, _Replays):
        unet.forward.release()
        del unet.forward


class _Replays:
    """Takes the place of a UNet's `forward`, and takes its arguments."""

    def __init__(self, unet: UNet2DConditionModel):
        from dreambooth.model.channels_last import keep_channels_last  # Triton is not there without a GPU

        self.compute: Callable[..., UNet2DConditionOutput | tuple[Tensor]] = unet.forward
        for parameter in unet.parameters():  # first, as it may find no room, and need not be undone
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.undo = keep_channels_last(unet)
        self.passes: dict[tuple, _Pass] = {}
        self.pool = torch.cuda.graph_pool_handle()  # one for all: they take turns, and hand out copies

    def __call__(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *others: object, **named: object
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        conditions = named.get("added_cond_kwargs") or {}
        left = {name: value for name, value in named.items() if name not in ("added_cond_kwargs", "return_dict")}
        inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states} | conditions
        is_plain = not any(value is not None for value in (*others, *left.values()))
        if not (is_plain and all(isinstance(value, Tensor) for value in inputs.values())):
            return self.compute(sample, timestep, encoder_hidden_states, *others, **named)
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        if key not in self.passes:
            self.passes[key] = _Pass(self.compute, inputs, sample.device, self.pool)
        prediction = self.passes[key](inputs)
        return UNet2DConditionOutput(prediction) if named.get("return_dict", True) else (prediction,)

    def release(self) -> None:
        """Undoes all, and lets go of the graphs."""
        for one in self.passes.values():
            one.graph.reset()
        self.passes.clear()
        self.undo()


class _Pass:
    """A recorded pass, for inputs of certain sizes.

    Args:
        compute: the UNet's own `forward`.
        inputs: an example of them, by name.
        device: the GPU.
        pool: of memory.
    """

    def __init__(self, compute: Callable, inputs: dict[str, Tensor], device: torch.device, pool: tuple[int, int]):
        self.compute = compute
        # Where the graph reads them; a pipeline may have its timesteps on the CPU.
        self.inputs = {name: tensor.to(device, copy=True) for name, tensor in inputs.items()}
        self.graph, stream = torch.cuda.CUDAGraph(), stream_to_record()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # at first libraries choose and set up what they use
            self._predict()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.stream(torch.cuda.current_stream()):  # which a capture that fails may not come back to
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.prediction = self._predict()

    def _predict(self) -> Tensor:
        rest = dict(self.inputs)
        sample = rest.pop("sample").contiguous(memory_format=torch.channels_last)
        timestep, prompts = rest.pop("timestep"), rest.pop("encoder_hidden_states")
        return self.compute(sample, timestep, prompts, added_cond_kwargs=rest or None, return_dict=False)[0]

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        return self.prediction.clone(memory_format=torch.contiguous_format)  # the next replay writes over it
