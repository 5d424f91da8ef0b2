"""A UNet whose images have their channels last in memory, from its first layer to its last.

Convolutions on tensor cores want them so, and would move them before and after, each time. What stands between the
convolutions is made to keep them there: normalizations, and the way into transformer blocks and out. Its weights, and
what it computes, stay what they are.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from dreambooth.model.kernels import gated_gelu, group_norm, layer_norm, linear


class _GroupNorm(torch.nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps)


class _GroupNormSilu(torch.nn.GroupNorm):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps, shift=shift, silu=True)


class _ResnetBlock(ResnetBlock2D):
    """Its first convolution's bias and the embedding of the timestep go into the normalization that reads both."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        hidden = F.conv2d(self.norm1(x), self.conv1.weight, padding=self.conv1.padding)
        hidden = self.norm2(hidden, self.time_emb_proj(F.silu(temb)) + self.conv1.bias)
        hidden = self.conv2(self.dropout(hidden))
        return hidden + (x if self.conv_shortcut is None else _pointwise(self.conv_shortcut, x))


class _Transformer(Transformer2DModel):
    """Its projections are of each pixel alone, and images with the channels last are rows of pixels already."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        tokens = self.norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2)
        tokens = linear(tokens, self.proj_in.weight.flatten(1), self.proj_in.bias)
        return tokens, tokens.shape[-1]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        tokens = linear(hidden_states, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2) + residual


class _Geglu(GEGLU):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return gated_gelu(self.proj(hidden_states))


class _Linear(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _LayerNorm(torch.nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


def _pointwise(convolution: torch.nn.Conv2d, x: Tensor) -> Tensor:
    """Returns what a convolution of single pixels returns, as a matrix product."""
    rows = linear(x.permute(0, 2, 3, 1), convolution.weight.flatten(1), convolution.bias)
    return rows.permute(0, 3, 1, 2)


def _is_adapted(layer: torch.nn.Module | None) -> bool:
    """Whether a layer has an adapter beside its weight, which alone is not what it computes with."""
    return hasattr(layer, "base_layer")


def _is_plain(block: ResnetBlock2D) -> bool:
    """Whether a block is as those of Stable Diffusion: no change of size, SiLU, the timestep added."""
    return (
        not any(_is_adapted(layer) for layer in (block.conv1, block.conv2, block.conv_shortcut))
        and isinstance(block.nonlinearity, torch.nn.SiLU)
        and block.time_emb_proj is not None
        and block.time_embedding_norm == "default"
        and not block.skip_time_act
        and block.upsample is None
        and block.downsample is None
        and block.output_scale_factor == 1
        and (block.conv_shortcut is None or block.conv_shortcut.kernel_size == (1, 1))
    )


def keep_channels_last(unet: UNet2DConditionModel) -> Callable[[], None]:
    """Has a UNet on a GPU keep its images channels-last, if they come so; its weights should lie so as well.

    Returns:
        A function that makes it what it was before.
    """
    before = [(module, module.__class__) for module in unet.modules()]
    for module in unet.modules():
        if type(module) is ResnetBlock2D and _is_plain(module):
            module.__class__ = _ResnetBlock
            module.norm1.__class__ = module.norm2.__class__ = _GroupNormSilu
        elif type(module) is Transformer2DModel and module.is_input_continuous:
            if not (_is_adapted(module.proj_in) or _is_adapted(module.proj_out)):
                module.__class__ = _Transformer
            module.norm.__class__ = _GroupNorm
            for part in module.transformer_blocks.modules():
                # A weight that lies in a flat parameter is not an attribute for now; one that is left out is None.
                if getattr(part, "bias", True) is None:
                    continue
                if isinstance(part, torch.nn.LayerNorm):
                    part.__class__ = _LayerNorm
                elif type(part) is torch.nn.Linear:
                    part.__class__ = _Linear
        elif type(module) is GEGLU:
            module.__class__ = _Geglu
    activation = unet.conv_act
    if isinstance(unet.conv_norm_out, torch.nn.GroupNorm) and isinstance(activation, torch.nn.SiLU):
        unet.conv_norm_out.__class__ = _GroupNormSilu
        unet.conv_act = torch.nn.Identity()  # the module itself may be other layers' too, and other models'
    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm) and not isinstance(module, _GroupNorm | _GroupNormSilu):
            module.__class__ = _GroupNorm

    def undo() -> None:
        unet.conv_act = activation
        for module, kind in before:
            module.__class__ = kind

    return undo
