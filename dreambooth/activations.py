"""Activations that the backward pass makes again instead of having them kept.

A quarter of what a UNet keeps are results of elementwise functions whose arguments it keeps as well: of SiLU before
the convolutions of residual blocks, of GELU and of the product in the gated layers of transformer blocks. The memory
of such a result goes when the layer that reads it is done, and comes back, filled anew, when the backward pass of that
layer begins. The numbers are the same to the bit. It costs the host ten to thirty milliseconds a step, the GPU a few.
"""

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor


def discard_activations(unet: UNet2DConditionModel) -> None:
    """Has the UNet's layers discard what they read, where it is made again at little cost."""
    layers = [unet.conv_out]
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            layers += [block.conv1, block.conv2]
        elif isinstance(block, FeedForward):
            layers.append(block.net[-1])
    for layer in layers:
        layer.register_forward_hook(_discard_input)


def _discard_input(layer: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """A forward hook of a layer that is the only one to read its input."""
    recipes = _recipes(inputs[0])
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


def _recipes(result: Tensor) -> list[tuple[Tensor, Callable, tuple[Tensor, ...]]]:
    """Returns results that can be made again, each with the function and the arguments, in the order to make them.

    Args:
        result: an activation; autograd knows what made it.

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
            return [*_recipes(gate), (result, torch.ops.aten.mul.out, (hidden.detach(), gate.detach()))]
    return []
