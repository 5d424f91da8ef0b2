"""What is trained: the UNet, and with --train_text_encoder the text encoders, as one module."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from dreambooth.command_line.console import UserError, say
from dreambooth.command_line.limits import is_out_of_gpu_memory
from dreambooth.model.components import dropout_of
from dreambooth.model.family import Conditioning, Family
from dreambooth.model.libraries import checkpoint_activations, name_in_file
from dreambooth.model.lora import Adapters, adapter_weights, name_in_lora_file
from dreambooth.model.recording import Recording
from dreambooth.model.trainable import Trainable
from dreambooth.processes.ranks import from_all_ranks


class HalfGroupNorm(torch.nn.GroupNorm):
    """A group normalization that under autocast reads and writes half precision, as the layers around it do.

    Autocast would widen it to fp32, and with it what is kept for the backward pass. Mean and variance are in fp32
    either way: the kernel sees to that.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class HalfLayerNorm(torch.nn.LayerNorm):
    """The same for a layer normalization."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Denoiser(torch.nn.Module):
    """The UNet, and the text encoders if they are trained too.

    `trained` is what of it is trained: the weights that take gradients. Their names begin with the component that they
    belong to, such as "unet." or "text_encoder.".

    Args:
        family: of the model.
        adapters: that the components have, which then are what is trained; None where all of them is.
        components: by their names: "unet", and the text encoders whose prompts are not encoded before training.
    """

    def __init__(self, family: Family, *, adapters: Adapters | None = None, **components: torch.nn.Module):
        super().__init__()
        self.family, self.adapters = family, adapters
        for name, component in components.items():
            self.add_module(name, component)
        in_file = name_in_lora_file if adapters else name_in_file
        names = {
            f"{component}.{name}": f"{component}.{in_file(module, name)}"
            for component, module in components.items()
            for name in (adapter_weights(module) if adapters else dict(module.named_parameters()))
        }
        self.trained = Trainable(self, names)
        self.is_compiled = self.recomputes = False
        self.recording: Recording | None = None

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the UNet's prediction.

        Args:
            noisy_latents: (batch, channels, height, width), in the dtype of the weights.
            timesteps: (batch,), int64.
            conditioning: what the text encoders take, and what the UNet takes that does not come from them.

        Returns:
            Tensor of the shape of `noisy_latents`.
        """
        if self.recording is not None:
            return self.recording(noisy_latents, timesteps, conditioning)
        if self.trained.is_flat:
            self.trained.hand_out(noisy_latents.device.type)
        return self._predict(noisy_latents, timesteps, conditioning)

    def _predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        if text_encoders := self.text_encoders:
            conditioning = conditioning | self.family.encode(conditioning, text_encoders)
        return self.family.predict(self.unet, noisy_latents, timesteps, conditioning)

    @property
    def text_encoders(self) -> dict[str, torch.nn.Module]:
        """Those that are trained."""
        return {name: component for name, component in self.named_children() if name in self.family.text_encoders}

    def cast(self, dtype: torch.dtype, frozen: torch.dtype, *, anew: bool = False) -> None:
        """Has what is trained be of `dtype`, and what is frozen beside it of the dtype `frozen`.

        Frozen are a UNet beside adapters, and layers of a text encoder whose output nobody reads: they compute too.

        Args:
            anew: whether all that is trained gets new memory. What was of the dtype before may lie in a mapped file,
                where it begins at any place, and on the CPU the last bits of a product depend on that.
        """
        for parameter in self.parameters():
            trained = parameter.requires_grad
            parameter.data = parameter.data.to(dtype if trained else frozen, copy=anew and trained)

    def normalize_in_half(self) -> None:
        """Keeps autocast from widening normalizations to fp32."""
        half = {torch.nn.GroupNorm: HalfGroupNorm, torch.nn.LayerNorm: HalfLayerNorm}
        for module in self.modules():
            module.__class__ = half.get(type(module), type(module))

    def compile_blocks(self) -> None:
        """Compiles the UNet's residual and transformer blocks; those that are alike, once.

        As a whole the UNet would take longer to compile, and its gradients would come all at once, so that ranks could
        not share some while others are computed.
        """
        torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)  # shapes of a block
        for block in self.unet.modules():
            if isinstance(block, ResnetBlock2D | Transformer2DModel):
                block.compile(dynamic=False)
        self.is_compiled = True

    def record(
        self,
        inputs: tuple[Tensor, Tensor, Conditioning],
        *,
        dtype: torch.dtype,
        keep_free: int,
        insist: bool,
        besides: Callable[[], object] = lambda: None,
        **gradients: object,
    ) -> None:
        """Records the forward and backward pass as CUDA graphs, which `forward` then replays.

        To be done when the weights are on the GPU, where they have to stay in place.

        Args:
            inputs: what `forward` takes, of the shapes and dtypes of all that will follow.
            dtype: in which it computes.
            keep_free: bytes of the GPU's memory that the training is going to take besides.
            besides: does what else a step does on the GPU, for which there has to be the room too.
            insist: whether to raise an error where there is not the room; otherwise a line says so, and all is as
                before, on every rank if one has not the room.
            gradients: `in_place`, `accumulates` and `share` of `Recording`.

        Raises:
            RuntimeError: see above; torch's of memory, or a library's.
            UserError: if it is insisted on for a model that draws random numbers again as it recomputes.
        """
        from dreambooth.model.channels_last import keep_channels_last  # Triton is not there without a GPU

        if self.recomputes and self.draws:
            told = "dropout that is drawn again as activations are recomputed cannot be recorded"
            if insist:
                raise UserError(f"--cuda_graphs: {told}: leave it out, or --gradient_checkpointing")
            return say(f"CUDA graphs: none, {told}")
        undo = keep_channels_last(self.unet) if not self.is_compiled else None
        if self.adapters:  # weights that are trained are handed out so
            for parameter in self.unet.parameters():
                if parameter.ndim == 4 and not parameter.requires_grad:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.release()
        made: list[Recording] = []

        def try_out() -> None:
            made.append(Recording(self._predict, self.trained, *inputs, dtype=dtype, **gradients))

        if gradients.get("accumulates"):  # the sum, and what is added to it
            keep_free += 2 * sum(parameter.nbytes for parameter in self.trained.parameters())
        # Ranks that record how they share gradients wait for each other: before, they find out whether all can.
        has_room = functools.partial(_all_ranks_have_room, beside=keep_free, device=inputs[0].device, insist=insist)
        if has_room(try_out) and has_room(lambda: made[0].record()) and has_room(besides):
            self.recording = made.pop()
        else:
            while made:
                made.pop().release()
            if undo:
                undo()
            say("CUDA graphs: none, the GPU has not the room beside gradients and optimizer state")
        torch.cuda.empty_cache()

    @property
    def overwrites_gradients(self) -> bool:
        """Whether each backward pass writes over the gradients of the one before, which then have to stay."""
        return self.recording is not None and self.recording.in_place

    @property
    def shares_gradients(self) -> bool:
        """Whether a backward pass ends with gradients that ranks have shared."""
        return self.recording is not None and self.recording.share is not None

    def release(self) -> None:
        """Lets go of what is recorded."""
        if self.recording is not None:
            self.recording.release()
            self.recording = None

    def enable_gradient_checkpointing(self) -> None:
        """Makes the components recompute activations in the backward pass."""
        # The reentrant kind would go through the backward pass of the flat parameters once for each layer. Where
        # nothing is drawn there is no state of random numbers to go back to, and a graph could not.
        kind = {"use_reentrant": False, "preserve_rng_state": self.draws}
        checkpoint_activations(self.unet, kind)
        for text_encoder in self.text_encoders.values():
            text_encoder.gradient_checkpointing_enable(kind)
        self.recomputes = True

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers, for dropout."""
        return dropout_of(*self.children()) > 0


def _all_ranks_have_room(work: Callable[[], None], beside: int, device: torch.device, *, insist: bool) -> bool:
    """Does work that takes a GPU's memory while so many bytes are held beside it; returns whether all ranks could.

    Raises:
        RuntimeError: if this rank could not, and that is insisted on; or for another reason.
    """
    torch.cuda.empty_cache()  # of what setting up took
    rest, had_room = None, True
    try:
        rest = torch.empty(beside, dtype=torch.uint8, device=device)
        work()
    except RuntimeError as error:
        if insist or not is_out_of_gpu_memory(error):
            raise
        had_room = False
    del rest
    return all(from_all_ranks(had_room))
