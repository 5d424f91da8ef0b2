"""A model in one file, with the names that the weights of Stable Diffusion had when it was published.

Web interfaces and node editors read such files. The way back is in diffusers: `from_single_file`.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OF_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OF_VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}
# Of OpenCLIP's text encoders, in which query, key and value are one matrix.
OF_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
Renamed = Iterable[tuple[str, Tensor]]


def _replaced(name: str, names: Mapping[str, str]) -> str:
    """Returns a name in which whole words, dots between them, are replaced by others."""
    for word, other in names.items():
        name = re.sub(rf"(?<![^.]){re.escape(word)}(?![^.])", other, name)
    return name


def _of_unet(name: str, layers: int) -> str:
    """Returns the original name of a UNet's weight; `layers` is its configuration's layers_per_block."""
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        way, kind, rest = found[1], found[3], found[5]
        block, layer = int(found[2]), int(found[4])
        if way == "down":
            number, place = 1 + block * (layers + 1) + layer, {"resnets": 0, "attentions": 1}.get(kind, 0)
            if kind == "downsamplers":
                number, rest = (block + 1) * (layers + 1), rest.replace("conv", "op", 1)
            name = f"input_blocks.{number}.{place}.{rest}"
        else:
            number, place = block * (layers + 1) + layer, {"resnets": 0, "attentions": 1}.get(kind)
            if kind == "upsamplers":  # at the end of what the last layer of the block is
                number, place = block * (layers + 1) + layers, "upsampler"
            name = f"output_blocks.{number}.{place}.{rest}"
        return _replaced(name, RESNET) if kind == "resnets" else name
    name = _replaced(name, OF_UNET)
    return _replaced(name, RESNET) if re.match(r"middle_block\.[02]\.", name) else name


def of_unet(weights: Mapping[str, Tensor], layers: int) -> Renamed:
    """Yields the weights of a UNet by their original names."""
    for name, tensor in weights.items():
        original = _of_unet(name, layers)
        if ".upsampler." in original:  # it follows attention, where there is some
            block = name.split(".")[1]
            attends = any(one.startswith(f"up_blocks.{block}.attentions.") for one in weights)
            original = original.replace(".upsampler.", ".2." if attends else ".1.")
        yield f"model.diffusion_model.{original}", tensor


def of_vae(weights: Mapping[str, Tensor], blocks: int) -> Renamed:
    """Yields the weights of a VAE by their original names; `blocks` are those of each of its halves."""
    for name, tensor in weights.items():
        original = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        original = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", original)

        def from_the_other_end(found: re.Match) -> str:
            inner = "block" if found[2] == "resnets" else "upsample"
            return f"up.{blocks - 1 - int(found[1])}.{inner}"

        original = re.sub(r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)", from_the_other_end, original)
        original = _replaced(original, OF_VAE)
        if "mid.attn_1" in original and tensor.ndim == 2:  # a convolution of single pixels then
            tensor = tensor[:, :, None, None]
        yield f"first_stage_model.{original}", tensor


def of_clip(weights: Mapping[str, Tensor], prefix: str) -> Renamed:
    """Yields the weights of OpenAI's text encoder by their original names, which transformers has kept."""
    for name, tensor in weights.items():
        yield f"{prefix}transformer.{name}", tensor


def of_open_clip(weights: Mapping[str, Tensor], prefix: str) -> Renamed:
    """Yields the weights of one of OpenCLIP's text encoders by their original names.

    A projection that is not read, that of Stable Diffusion 2, is there all the same: readers take its size for that of
    a query.
    """
    if "text_projection.weight" not in weights:
        width = weights["text_model.final_layer_norm.weight"]
        yield f"{prefix}model.text_projection", torch.eye(len(width), dtype=width.dtype)
    for name, tensor in weights.items():
        if found := re.search(r"^(.*self_attn)\.([qkv])_proj\.(weight|bias)$", name):
            if found[2] == "q":
                parts = [weights[f"{found[1]}.{letter}_proj.{found[3]}"] for letter in "qkv"]
                attention = _replaced(found[1], OF_OPEN_CLIP).removesuffix("self_attn")
                yield f"{prefix}model.{attention}attn.in_proj_{found[3]}", torch.cat(parts)
        elif name == "text_projection.weight":
            yield f"{prefix}model.text_projection", tensor.T
        elif not name.endswith("position_ids"):  # which follow from their number
            yield f"{prefix}model.{_replaced(name, OF_OPEN_CLIP)}", tensor
