"""Activations that the backward pass makes again instead of having them kept.

A third of what a UNet keeps follows at little cost from what it keeps as well: the results of SiLU before the
convolutions of residual blocks, and in transformer blocks those of layer normalizations, of GELU and of the product
with the gate. The memory of such a result goes when the layer that reads it is done, and comes back, filled anew, when
the backward pass of that layer begins. The numbers are the same to the bit.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor


class CopyingLayerNorm(torch.nn.LayerNorm):
    """A layer normalization that computes with a copy of its weights, which autograd keeps.

    Of the weights themselves Gemini lets go after each use. They are copied in one operation, as it fetches them for
    each anew; its own type of tensor, whose every use would go through Python, ends here.
    """

    def forward(self, x: Tensor) -> Tensor:
        copies = torch.stack((self.weight, self.bias))
        with torch._C.DisableTorchFunctionSubclass():
            weight, bias = copies.unbind()
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def discard_activations(unet: UNet2DConditionModel) -> None:
    """Has the UNet's layers discard what they read, where it is made again at little cost."""
    readers = [unet.conv_out]
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            readers += [block.conv1, block.conv2]
        elif isinstance(block, BasicTransformerBlock):
            readers.append(block.ff.net[-1])
            for norm, reader in ((block.norm1, block.attn1), (block.norm2, block.attn2), (block.norm3, block.ff)):
                norm.__class__ = CopyingLayerNorm
                reader.register_forward_hook(functools.partial(_discard_input, eps=norm.eps))
    for reader in readers:
        reader.register_forward_hook(_discard_input)


def _discard_input(
    reader: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor, eps: float | None = None
) -> None:
    """A forward hook of a layer that is the only one to read its input; `eps` is that of a normalization before it."""
    recipes = _recipes(inputs[0], eps)
    if not recipes:
        return
    discarded = []
    for result, function, arguments in recipes:
        memory = result.untyped_storage()
        # The alias does not count as a change of the result, which autograd would not have.
        discarded.append((memory, memory.nbytes(), result.data, function, arguments))
        memory.resize_(0)

    def make_again(gradient: Tensor) -> None:
        for memory, size, alias, function, arguments in discarded:
            memory.resize_(size)
            function(*arguments, out=alias)
        discarded.clear()  # autograd keeps this function until the loss goes, and with it would keep the memory

    output.register_hook(make_again)


def _recipes(result: Tensor, eps: float | None) -> list[tuple[Tensor, Callable, tuple[Tensor, ...]]]:
    """Returns results that can be made again, each with the function and the arguments, in the order to make them.

    Args:
        result: an activation; autograd knows what made it.
        eps: of a layer normalization, which autograd does not know.

    Returns:
        `result` and what it was made of, as far as it can be made again out of what the backward pass needs anyway.
    """
    node = result.grad_fn
    match type(node).__name__:
        case "SiluBackward0":
            return [(result, torch.ops.aten.silu.out, (node._saved_self.detach(),))]
        case "GeluBackward0":
            return [(result, torch.ops.aten.gelu.out, (node._saved_self.detach(),))]
        case "MulBackward0":
            hidden, gate = node._saved_self, node._saved_other
            return [*_recipes(gate, eps), (result, torch.ops.aten.mul.out, (hidden.detach(), gate.detach()))]
        case "NativeLayerNormBackward0":
            arguments = (node._saved_input.detach(), node._saved_weight.detach(), node._saved_bias.detach())
            return [(result, functools.partial(_layer_norm, eps=eps), arguments)]
    return []


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, out: Tensor) -> None:
    out.copy_(F.layer_norm(x, weight.shape, weight, bias, eps))
