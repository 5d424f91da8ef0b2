"""Triton kernels for what libraries do in many passes over memory: each reads what it needs once, or twice.

- group normalization, with the SiLU after it and a shift of each channel before it, where the channels are last in
  memory, as convolutions want them (the library's would move them first, and back);
- the gated GELU of transformer blocks, and backward passes of layer normalizations and of linear layers' biases;
- the copy of a convolution's weights between the order of their files and channels-last;
- the norm of the gradients, and AdamW, which divides them by what clips them.

Sums are in float32. Everything else is as PyTorch has it, to rounding; tests compare with it in float64.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

ROWS, CHANNELS = 128, 64  # of the tile that a program works on
# Of the sums that a program adds up at a time; channels more than usual, so that one kernel serves all.
PARTS, PER_GROUP = 32, 128


@triton.jit
def _tile(x, shift, size, channels, parts, SHIFTED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Returns this program's image, channels and tile of x, shifted; where the tile lies; and what of it is there."""
    n, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = part * ROWS + tl.arange(0, ROWS)
    there = (row < size)[:, None] & (c < channels)[None, :]
    where = (n.to(tl.int64) * size + row)[:, None] * channels + c[None, :]
    tile = tl.load(x + where, there, 0.0).to(tl.float32)
    if SHIFTED:
        tile += tl.load(shift + n * channels + c, c < channels, 0.0).to(tl.float32)[None, :]
    return n, c, tile, where, there


@triton.jit(do_not_specialize=["size", "parts"])
def _moments(
    x, shift, moments, size, channels, parts, SHIFTED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Mean, and sum of squared differences from it, of each channel over some rows."""
    _, c, tile, _, there = _tile(x, shift, size, channels, parts, SHIFTED, ROWS, CHANNELS)
    count = tl.minimum(size - tl.program_id(0) % parts * ROWS, ROWS)
    mean = tl.sum(tl.where(there, tile, 0.0), 0) / count
    apart = tl.where(there, tile - mean[None, :], 0.0)
    where = tl.program_id(0) * 2 * channels + c
    tl.store(moments + where, mean, c < channels)
    tl.store(moments + where + channels, tl.sum(apart * apart, 0), c < channels)


@triton.jit(do_not_specialize=["size", "parts", "per_group"])
def _moments_of_groups(
    moments, mean, rstd, size, channels, parts, per_group, eps,
    ROWS: tl.constexpr, PARTS: tl.constexpr, PER_GROUP: tl.constexpr,
):  # fmt: skip
    """Mean and reciprocal deviation of each group, from those of its channels and parts (Chan et al., 1979)."""
    groups = channels // per_group
    n, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    c = tl.arange(0, PER_GROUP)
    of_channel = moments + group * per_group + c
    total = size * per_group
    sums = tl.zeros([PER_GROUP], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        there = (part < parts)[:, None] & (c < per_group)[None, :]
        count = tl.where(there, tl.minimum(size - part * ROWS, ROWS)[:, None], 0).to(tl.float32)
        where = (n * parts + part)[:, None] * 2 * channels
        sums += tl.sum(count * tl.load(of_channel[None, :] + where, there, 0.0), 0)
    of_group = tl.sum(sums, 0) / total
    sums = tl.zeros([PER_GROUP], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        there = (part < parts)[:, None] & (c < per_group)[None, :]
        count = tl.where(there, tl.minimum(size - part * ROWS, ROWS)[:, None], 0).to(tl.float32)
        where = (n * parts + part)[:, None] * 2 * channels
        apart = tl.load(of_channel[None, :] + where, there, 0.0) - of_group
        squares = tl.load(of_channel[None, :] + where + channels, there, 0.0)
        sums += tl.sum(squares + count * apart * apart, 0)
    squares = tl.sum(sums, 0)
    tl.store(mean + tl.program_id(0), of_group)
    tl.store(rstd + tl.program_id(0), 1 / tl.sqrt(squares / total + eps))


@triton.jit
def _of_channels(weight, bias, mean, rstd, n, c, channels, per_group):
    """Returns weight and bias of some channels, and mean and reciprocal deviation of their groups."""
    group = n * (channels // per_group) + c // per_group
    there = c < channels
    return (
        tl.load(weight + c, there, 0.0).to(tl.float32)[None, :],
        tl.load(bias + c, there, 0.0).to(tl.float32)[None, :],
        tl.load(mean + group, there, 0.0)[None, :],
        tl.load(rstd + group, there, 0.0)[None, :],
    )


@triton.jit(do_not_specialize=["size", "parts", "per_group"])
def _normalize(
    x, shift, weight, bias, mean, rstd, out, size, channels, parts, per_group,
    SHIFTED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n, c, tile, where, there = _tile(x, shift, size, channels, parts, SHIFTED, ROWS, CHANNELS)
    w, b, m, r = _of_channels(weight, bias, mean, rstd, n, c, channels, per_group)
    y = (tile - m) * r * w + b
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(out + where, y, there)


@triton.jit
def _gradient_of_y(gradient, where, there, x_hat, w, b, SILU: tl.constexpr):
    """Returns the gradient of what the normalization returns, from that of what SiLU makes of it."""
    dy = tl.load(gradient + where, there, 0.0).to(tl.float32)
    if SILU:
        y = x_hat * w + b
        sigmoid = tl.sigmoid(y)
        dy *= sigmoid * (1 + y * (1 - sigmoid))
    return dy


@triton.jit(do_not_specialize=["size", "parts", "per_group"])
def _gradient_sums(
    x, shift, weight, bias, mean, rstd, gradient, sums, size, channels, parts, per_group,
    SHIFTED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of each channel over some rows: of the gradient of y, of that times x_hat, and of x_hat."""
    n, c, tile, where, there = _tile(x, shift, size, channels, parts, SHIFTED, ROWS, CHANNELS)
    w, b, m, r = _of_channels(weight, bias, mean, rstd, n, c, channels, per_group)
    x_hat = tl.where(there, (tile - m) * r, 0.0)
    dy = _gradient_of_y(gradient, where, there, x_hat, w, b, SILU)
    where = tl.program_id(0) * 3 * channels + c
    tl.store(sums + where, tl.sum(dy, 0), c < channels)
    tl.store(sums + where + channels, tl.sum(dy * x_hat, 0), c < channels)
    tl.store(sums + where + 2 * channels, tl.sum(x_hat, 0), c < channels)


@triton.jit(do_not_specialize=["size", "parts", "per_group"])
def _gradients_of_channels(
    sums, weight, rstd, of_groups, of_channels, size, channels, parts, per_group,
    PARTS: tl.constexpr, PER_GROUP: tl.constexpr,
):  # fmt: skip
    """Of each image: of its groups the means by which x's gradient is centred; of its channels what parameters get.

    The gradient of a channel's shift is the sum of those of its pixels, which follows from sums that are there.
    """
    groups = channels // per_group
    n, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    c = group * per_group + tl.arange(0, PER_GROUP)
    inside = tl.arange(0, PER_GROUP) < per_group
    of_y = tl.zeros([PER_GROUP], tl.float32)
    of_product = tl.zeros([PER_GROUP], tl.float32)
    of_x_hat = tl.zeros([PER_GROUP], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        there = (part < parts)[:, None] & inside[None, :]
        where = (n * parts + part)[:, None] * 3 * channels + c[None, :]
        of_y += tl.sum(tl.load(sums + where, there, 0.0), 0)
        of_product += tl.sum(tl.load(sums + where + channels, there, 0.0), 0)
        of_x_hat += tl.sum(tl.load(sums + where + 2 * channels, there, 0.0), 0)
    # Triton 3.1 aborts where what a loop has added up is used more than once.
    of_y, of_product, of_x_hat = of_y + 0.0, of_product + 0.0, of_x_hat + 0.0
    w = tl.load(weight + c, inside, 0.0).to(tl.float32)
    total = size * per_group
    mean_y, mean_product = tl.sum(w * of_y, 0) / total, tl.sum(w * of_product, 0) / total
    tl.store(of_groups + tl.program_id(0) * 2, mean_y)
    tl.store(of_groups + tl.program_id(0) * 2 + 1, mean_product)
    of_shift = tl.load(rstd + tl.program_id(0)) * (w * of_y - size * mean_y - of_x_hat * mean_product)
    where = n * 3 * channels + c
    tl.store(of_channels + where, of_product, inside)
    tl.store(of_channels + where + channels, of_y, inside)
    tl.store(of_channels + where + 2 * channels, of_shift, inside)


@triton.jit(do_not_specialize=["size", "parts", "per_group"])
def _gradient_of_x(
    x, shift, weight, bias, mean, rstd, of_groups, gradient, out, size, channels, parts, per_group,
    SHIFTED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n, c, tile, where, there = _tile(x, shift, size, channels, parts, SHIFTED, ROWS, CHANNELS)
    w, b, m, r = _of_channels(weight, bias, mean, rstd, n, c, channels, per_group)
    of_group = of_groups + 2 * (n * (channels // per_group) + c // per_group)
    mean_y = tl.load(of_group, c < channels, 0.0)[None, :]
    mean_product = tl.load(of_group + 1, c < channels, 0.0)[None, :]
    x_hat = (tile - m) * r
    dy = _gradient_of_y(gradient, where, there, x_hat, w, b, SILU)
    tl.store(out + where, r * (w * dy - mean_y - x_hat * mean_product), there)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, weight, bias, groups, eps, silu):
        images, channels, height, width = x.shape
        size, per_group = height * width, channels // groups
        parts = triton.cdiv(size, ROWS)
        grid = (images * parts, triton.cdiv(channels, CHANNELS))
        tiles = {"ROWS": ROWS, "CHANNELS": CHANNELS, "num_warps": 8}
        moments = x.new_empty(images * parts, 2, channels, dtype=torch.float32)
        mean, rstd = x.new_empty(2, images, groups, dtype=torch.float32)
        out = torch.empty_like(x)
        shifted = shift is not None
        _moments[grid](x, shift, moments, size, channels, parts, SHIFTED=shifted, **tiles)
        widths = {"PARTS": PARTS, "PER_GROUP": max(PER_GROUP, triton.next_power_of_2(per_group))}
        _moments_of_groups[(images * groups,)](
            moments, mean, rstd, size, channels, parts, per_group, eps, ROWS=ROWS, **widths
        )
        _normalize[grid](
            x, shift, weight, bias, mean, rstd, out, size, channels, parts, per_group,
            SHIFTED=shifted, SILU=silu, **tiles,
        )  # fmt: skip
        ctx.save_for_backward(x, shift, weight, bias, mean, rstd)
        ctx.silu, ctx.grid, ctx.tiles, ctx.widths = silu, grid, tiles, widths
        ctx.sizes = size, channels, parts, per_group
        return out

    @staticmethod
    def backward(ctx, gradient):
        x, shift, weight, bias, mean, rstd = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        (images, groups), (size, channels, parts, per_group) = mean.shape, ctx.sizes
        kinds = {"SHIFTED": shift is not None, "SILU": ctx.silu}
        sums = x.new_empty(images * parts, 3, channels, dtype=torch.float32)
        of_channels = x.new_empty(images, 3, channels, dtype=torch.float32)
        of_groups = x.new_empty(images, groups, 2, dtype=torch.float32)
        of_x = torch.empty_like(x)
        _gradient_sums[ctx.grid](
            x, shift, weight, bias, mean, rstd, gradient, sums, size, channels, parts, per_group, **kinds, **ctx.tiles
        )
        _gradients_of_channels[(images * groups,)](
            sums, weight, rstd, of_groups, of_channels, size, channels, parts, per_group, **ctx.widths
        )
        _gradient_of_x[ctx.grid](
            x, shift, weight, bias, mean, rstd, of_groups, gradient, of_x, size, channels, parts, per_group,
            **kinds, **ctx.tiles,
        )  # fmt: skip
        of_weight, of_bias = of_channels[:, :2].sum(0).to(weight.dtype)
        of_shift = None if shift is None else of_channels[:, 2].to(shift.dtype)
        return of_x, of_shift, of_weight, of_bias, None, None, None


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Returns the group normalization (Wu and He, arXiv 1803.08494) of x + shift, or silu of it.

    Args:
        x: (images, channels, height, width), on a GPU; is made channels-last in memory if it is not.
        weight, bias: (channels,), contiguous.
        groups: that divide the channels.
        eps: what is added to the variance.
        shift: (images, channels), contiguous; None for none.
        silu: whether SiLU follows.

    Returns:
        Tensor of the shape and dtype of x, channels-last.
    """
    return _GroupNorm.apply(x.contiguous(memory_format=torch.channels_last), shift, weight, bias, groups, eps, silu)


@triton.jit(do_not_specialize=["rows", "programs"])
def _gradients_of_layer_norm(
    x, weight, mean, rstd, gradient, out, sums, rows, width, programs, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """The gradient of x, and this program's share of those of weight and bias."""
    c = tl.arange(0, WIDTH)
    w = tl.load(weight + c, c < width, 0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros([ROWS, WIDTH], tl.float32)
    of_bias = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & (c < width)[None, :]
        where = row.to(tl.int64)[:, None] * width + c[None, :]
        r = tl.load(rstd + row, row < rows, 0.0)[:, None]
        x_hat = (tl.load(x + where, there, 0.0).to(tl.float32) - tl.load(mean + row, row < rows, 0.0)[:, None]) * r
        x_hat = tl.where(there, x_hat, 0.0)
        dy = tl.load(gradient + where, there, 0.0).to(tl.float32)
        of_weight += dy * x_hat
        of_bias += dy
        mean_y, mean_product = tl.sum(w * dy, 1) / width, tl.sum(w * dy * x_hat, 1) / width
        tl.store(out + where, r * (w * dy - mean_y[:, None] - x_hat * mean_product[:, None]), there)
    where = tl.program_id(0) * 2 * width + c
    tl.store(sums + where, tl.sum(of_weight, 0), c < width)
    tl.store(sums + where + width, tl.sum(of_bias, 0), c < width)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        out, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean.float(), rstd.float())  # which they are on a GPU, whatever x is
        return out

    @staticmethod
    def backward(ctx, gradient):
        x, weight, mean, rstd = ctx.saved_tensors
        gradient, of_x, width = gradient.contiguous(), torch.empty_like(x), weight.numel()
        rows, tile = x.numel() // width, max(1, 4096 // triton.next_power_of_2(width))
        programs = min(triton.cdiv(rows, tile), 4 * multiprocessors(x.device))
        sums = x.new_empty(programs, 2, width, dtype=torch.float32)
        _gradients_of_layer_norm[(programs,)](
            x, weight, mean, rstd, gradient, of_x, sums, rows, width, programs,
            ROWS=tile, WIDTH=triton.next_power_of_2(width), num_warps=8,
        )  # fmt: skip
        of_weight, of_bias = sums.sum(0).to(weight.dtype)
        return of_x, of_weight, of_bias, None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Returns how many multiprocessors a GPU has; of Triton's interpreter, one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns the layer normalization (Ba et al., arXiv 1607.06450) of the last dimension.

    Args:
        x: (..., width), on a GPU.
        weight, bias: (width,), contiguous, of the dtype of x.
        eps: what is added to the variance.

    Returns:
        Tensor of the shape and dtype of x.
    """
    return _LayerNorm.apply(x.contiguous(), weight, bias, eps)


@triton.jit(do_not_specialize=["rows", "programs"])
def _column_sums(x, sums, rows, width, programs, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    found = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & (c < width)[None, :]
        found += tl.load(x + row.to(tl.int64)[:, None] * width + c[None, :], there, 0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0) * width + c, tl.sum(found, 0), c < width)


def column_sums(x: Tensor) -> Tensor:
    """Returns the sums over the rows of x, (rows, width), contiguous, on a GPU: (width,), float32."""
    (rows, width), tile, columns = x.shape, 64, 64
    programs = min(triton.cdiv(rows, tile), 16)
    sums = x.new_empty(programs, width, dtype=torch.float32)
    _column_sums[(programs, triton.cdiv(width, columns))](
        x, sums, rows, width, programs, ROWS=tile, WIDTH=columns, num_warps=8
    )
    return sums.sum(0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        of_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        return gradient @ weight, of_weight, column_sums(rows).to(weight.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns x @ weight.T + bias; what is faster here is the gradient of the bias, a sum over many rows.

    Args:
        x: (..., in), on a GPU.
        weight, bias: (out, in) and (out,), of the dtype of x.

    Returns:
        (..., out), of the same dtype.
    """
    if not (weight.requires_grad or bias.requires_grad):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


@triton.jit
def _gelu(x):
    """Returns GELU of x, exact, and its derivative."""
    below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit(do_not_specialize=["total"])
def _gated(both, out, total, width, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    where = number // width * 2 * width + number % width
    hidden = tl.load(both + where, number < total, 0.0).to(tl.float32)
    gate, _ = _gelu(tl.load(both + where + width, number < total, 0.0).to(tl.float32))
    tl.store(out + number, hidden * gate, number < total)


@triton.jit(do_not_specialize=["total"])
def _gradient_of_gated(both, gradient, out, total, width, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    where = number // width * 2 * width + number % width
    hidden = tl.load(both + where, number < total, 0.0).to(tl.float32)
    gate, slope = _gelu(tl.load(both + where + width, number < total, 0.0).to(tl.float32))
    dy = tl.load(gradient + number, number < total, 0.0).to(tl.float32)
    tl.store(out + where, dy * gate, number < total)
    tl.store(out + where + width, dy * hidden * slope, number < total)


class _GatedGelu(torch.autograd.Function):
    BLOCK = 1024

    @staticmethod
    def forward(ctx, both):
        width = both.shape[-1] // 2
        out = both.new_empty(*both.shape[:-1], width)
        blocks = triton.cdiv(out.numel(), _GatedGelu.BLOCK)
        _gated[(blocks,)](both, out, out.numel(), width, BLOCK=_GatedGelu.BLOCK)
        ctx.save_for_backward(both)
        return out

    @staticmethod
    def backward(ctx, gradient):
        (both,) = ctx.saved_tensors
        gradient, of_both = gradient.contiguous(), torch.empty_like(both)
        blocks = triton.cdiv(gradient.numel(), _GatedGelu.BLOCK)
        _gradient_of_gated[(blocks,)](
            both, gradient, of_both, gradient.numel(), gradient.shape[-1], BLOCK=_GatedGelu.BLOCK
        )
        return of_both


def gated_gelu(both: Tensor) -> Tensor:
    """Returns the first half of each row times GELU of the second (Shazeer, arXiv 2002.05202).

    Args:
        both: (..., 2 * width), on a GPU.

    Returns:
        (..., width), of the same dtype.
    """
    return _GatedGelu.apply(both.contiguous())


@triton.jit
def _permute(source, target, inner, taps, source_inner, source_tap, target_inner, target_tap,
             BLOCK: tl.constexpr, TAPS: tl.constexpr):  # fmt: skip
    i, tap = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, TAPS)
    there = (i < inner)[:, None] & (tap < taps)[None, :]
    first = tl.program_id(0).to(tl.int64) * inner * taps
    values = tl.load(source + first + i[:, None] * source_inner + tap[None, :] * source_tap, there)
    tl.store(target + first + i[:, None] * target_inner + tap[None, :] * target_tap, values, there)


def copy_weight(target: Tensor, source: Tensor) -> None:
    """Copies a convolution's weights between memory layouts and dtypes.

    Args:
        target, source: (out, in, height, width), on a GPU, each contiguous or channels-last.
    """
    outer, inner, height, width = source.shape
    block = 64
    _permute[(outer, triton.cdiv(inner, block))](
        source, target, inner, height * width, source.stride(1), source.stride(3), target.stride(1), target.stride(3),
        BLOCK=block, TAPS=triton.next_power_of_2(height * width),
    )  # fmt: skip


@triton.jit(do_not_specialize=["total"])
def _squares(x, sums, total, BLOCK: tl.constexpr, TIMES: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * BLOCK * TIMES + tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.float32)
    for _ in range(TIMES):
        values = tl.load(x + number, number < total, 0.0).to(tl.float32)
        found += values * values
        number += BLOCK
    tl.store(sums + tl.program_id(0), tl.sum(found, 0))


def norm(tensors: list[Tensor]) -> Tensor:
    """Returns the L2 norm of all elements of some tensors, contiguous ones on a GPU: a scalar, float32."""
    block, times = 1024, 8
    counts = [triton.cdiv(tensor.numel(), block * times) for tensor in tensors]
    sums = tensors[0].new_empty(sum(counts), dtype=torch.float32)
    for tensor, part in zip(tensors, sums.split(counts), strict=True):
        _squares[(len(part),)](tensor, part, tensor.numel(), BLOCK=block, TIMES=times)
    return sums.sum().sqrt()


@triton.jit(do_not_specialize=["total"])
def _adamw(
    weights, gradients, means, squares, half, divisor, corrections, total, lr, of_gradient, of_its_square, eps, decay,
    HALVED: tl.constexpr, DIVIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = number < total
    gradient = tl.load(gradients + number, there, 0.0).to(tl.float32)
    if DIVIDED:
        gradient /= tl.load(divisor)
    mean, square = tl.load(means + number, there, 0.0), tl.load(squares + number, there, 0.0)
    mean += of_gradient * (gradient - mean)
    square += of_its_square * (gradient * gradient - square)
    of_mean, of_square = tl.load(corrections), tl.load(corrections + 1)
    weight = tl.load(weights + number, there, 0.0)
    weight *= 1 - lr * decay
    weight -= lr / of_mean * mean / (tl.sqrt(square) / tl.sqrt(of_square) + eps)
    tl.store(weights + number, weight, there)
    if HALVED:
        tl.store(half + number, weight, there)
    tl.store(means + number, mean, there)
    tl.store(squares + number, square, there)


def adamw(
    weights: Tensor,
    gradients: Tensor,
    means: Tensor,
    squares: Tensor,
    corrections: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    divisor: Tensor | None = None,
    half: Tensor | None = None,
) -> None:
    """Takes a step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) in one pass over its tensors.

    Args:
        weights, means, squares: float32, contiguous, on a GPU; they are changed.
        gradients: of the same size, any float dtype.
        corrections: float32, 1 - beta ** step for each of the betas, with the step that is taken.
        lr, betas, eps, weight_decay: as of torch's AdamW.
        divisor: scalar, float32, by which the gradients are divided as they are read; None for none.
        half: of the same size, any float dtype: gets the weights too; None for none.
    """
    block = 1024
    shares = (1 - beta for beta in betas)  # taken in double precision, as a beta is close to 1
    _adamw[(triton.cdiv(weights.numel(), block),)](
        weights, gradients, means, squares, half, divisor, corrections, weights.numel(), lr, *shares, eps,
        weight_decay, HALVED=half is not None, DIVIDED=divisor is not None, BLOCK=block,
    )  # fmt: skip
