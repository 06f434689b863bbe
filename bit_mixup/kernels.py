"""Group normalisation and ReLU in one pass over feature maps, for GPUs: the rest of what a BiT has and other networks lack.

torch's own kernels on a GPU copy maps that lie channels last to another order and back, and under autocast they compute in fp32,
and keep that. These take the maps as they lie and as they are; sums are in fp32. They are written in Triton's language, so this
module can be imported only where Triton is installed (`bit_mixup.layers.fused_norm` says whether they can be used).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# Triton reads the functions below, and resolves their annotations: they have none but its own.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LINES = 64, 16  # channels that a program takes at least where groups are narrower; the second where programs would be few
_FEW = 264  # programs: two for each multiprocessor of the GPUs this was measured on
_TILE = 16384  # numbers that a program holds at once
_EACH = 64  # of them in each thread


@triton.jit
def _spread(values, member):
    """Numbers of groups as numbers of their channels."""
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@triton.jit
def _gather(values, member):
    """Sums by group of numbers of channels."""
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@triton.jit
def _forward(
    x_pointer,
    y_pointer,
    weight_pointer,
    bias_pointer,
    mean_pointer,
    rstd_pointer,
    pixels,
    channels,
    groups,
    eps,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RELU: tl.constexpr,
):
    """Of one example some whole groups: first their means and variances, then what follows from them."""
    example, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS
    column = tl.arange(0, COLUMNS)
    channel = first * WIDTH + column
    inside = (column < GROUPS * WIDTH) & (channel < channels)
    group = tl.arange(0, GROUPS)
    member = (column[:, None] // WIDTH == group[None, :]) & inside[:, None]
    start = example * pixels * channels
    # Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, eq. 2.1: of
    # chunks of rows, so that nothing is lost where means are large.
    count = tl.zeros((1,), tl.float32)
    mean = tl.zeros((GROUPS,), tl.float32)
    squares = tl.zeros((GROUPS,), tl.float32)
    for begin in range(0, pixels, ROWS):
        row = begin + tl.arange(0, ROWS)
        mask = (row < pixels)[:, None] & inside[None, :]
        x = tl.load(x_pointer + start + row[:, None] * channels + channel[None, :], mask, other=0.0).to(tl.float32)
        added = (tl.minimum(pixels - begin, ROWS) * WIDTH).to(tl.float32)
        own_mean = _gather(tl.sum(x, axis=0), member) / added
        centred = tl.where(mask, x - _spread(own_mean, member)[None, :], 0.0)
        own_squares = _gather(tl.sum(centred * centred, axis=0), member)
        total = count + added
        step = own_mean - mean
        mean += step * (added / total)
        squares += own_squares + step * step * (count * added / total)
        count = total
    rstd = 1.0 / tl.sqrt(squares / count + eps)
    kept = first + group < groups
    tl.store(mean_pointer + example * groups + first + group, mean, kept)
    tl.store(rstd_pointer + example * groups + first + group, rstd, kept)
    scale = tl.load(weight_pointer + channel, inside, other=0.0).to(tl.float32) * _spread(rstd, member)
    bias = tl.load(bias_pointer + channel, inside, other=0.0).to(tl.float32)
    centre = _spread(mean, member)
    for begin in range(0, pixels, ROWS):
        row = begin + tl.arange(0, ROWS)
        mask = (row < pixels)[:, None] & inside[None, :]
        place = start + row[:, None] * channels + channel[None, :]
        x = tl.load(x_pointer + place, mask, other=0.0).to(tl.float32)
        y = (x - centre[None, :]) * scale[None, :] + bias[None, :]
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)  # NaN stays
        tl.store(y_pointer + place, y.to(y_pointer.dtype.element_ty), mask)


@triton.jit
def _backward(
    x_pointer,
    given_pointer,
    dx_pointer,
    weight_pointer,
    bias_pointer,
    mean_pointer,
    rstd_pointer,
    sums_pointer,
    pixels,
    channels,
    groups,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RELU: tl.constexpr,
):
    """Of one example some whole groups: first the sums that gradients by weights, biases and maps are made of, then the last."""
    example, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS
    column = tl.arange(0, COLUMNS)
    channel = first * WIDTH + column
    inside = (column < GROUPS * WIDTH) & (channel < channels)
    group = tl.arange(0, GROUPS)
    member = (column[:, None] // WIDTH == group[None, :]) & inside[:, None]
    start = example * pixels * channels
    kept = first + group < groups
    mean = _spread(tl.load(mean_pointer + example * groups + first + group, kept, other=0.0), member)
    rstd = _spread(tl.load(rstd_pointer + example * groups + first + group, kept, other=0.0), member)
    weight = tl.load(weight_pointer + channel, inside, other=0.0).to(tl.float32)
    scale = weight * rstd
    bias = tl.load(bias_pointer + channel, inside, other=0.0).to(tl.float32)
    totals = tl.zeros((COLUMNS,), tl.float32)
    products = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, pixels, ROWS):
        row = begin + tl.arange(0, ROWS)
        mask = (row < pixels)[:, None] & inside[None, :]
        place = start + row[:, None] * channels + channel[None, :]
        centred = tl.load(x_pointer + place, mask, other=0.0).to(tl.float32) - mean[None, :]
        given = tl.load(given_pointer + place, mask, other=0.0).to(tl.float32)
        if RELU:  # which is on where the forward pass, by the same operations, had it on
            given = tl.where(centred * scale[None, :] + bias[None, :] > 0.0, given, 0.0)
        totals += tl.sum(given, axis=0)
        products += tl.sum(given * centred, axis=0)
    products *= rstd
    tl.store(sums_pointer + example * 2 * channels + channel, products, inside)
    tl.store(sums_pointer + (example * 2 + 1) * channels + channel, totals, inside)
    # dx = rstd (w g - mean of w g - normalised x times the mean of w g times normalised x)
    count = pixels * (WIDTH * 1.0)
    of_x = -_spread(_gather(products * weight, member), member) / count * rstd * rstd
    rest = -_spread(_gather(totals * weight, member), member) / count * rstd
    for begin in range(0, pixels, ROWS):
        row = begin + tl.arange(0, ROWS)
        mask = (row < pixels)[:, None] & inside[None, :]
        place = start + row[:, None] * channels + channel[None, :]
        centred = tl.load(x_pointer + place, mask, other=0.0).to(tl.float32) - mean[None, :]
        given = tl.load(given_pointer + place, mask, other=0.0).to(tl.float32)
        if RELU:
            given = tl.where(centred * scale[None, :] + bias[None, :] > 0.0, given, 0.0)
        dx = given * scale[None, :] + centred * of_x[None, :] + rest[None, :]
        tl.store(dx_pointer + place, dx.to(dx_pointer.dtype.element_ty), mask)


def _blocks(x: Tensor, groups: int) -> dict[str, int]:
    """How much of an example's maps a program takes: groups, channels and, at a time, pixels; and its warps."""
    examples, channels, height, width = x.shape
    each = channels // groups
    line = _LINES[examples * channels < _FEW * _LINES[0]]
    some = 1
    while some * 2 * each <= line and some * 2 <= groups:
        some *= 2
    columns = triton.next_power_of_2(some * each)
    rows = max(1, min(_TILE // columns, triton.next_power_of_2(height * width)))
    warps = max(1, min(8, rows * columns // (32 * _EACH)))
    return {"WIDTH": each, "GROUPS": some, "ROWS": rows, "COLUMNS": columns, "num_warps": warps}


class FusedGroupNorm(torch.autograd.Function):
    """Group normalisation (Wu and He, "Group Normalization", 2018, eqs. 1 to 6), and ReLU after it, where channels lie last.

    Kept for the backward pass are the maps as they came, and two numbers for each example and group. No sum depends on the order
    in which the device happens to work: the same input gives the same bits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: bool) -> Tensor:
        """Normalised maps (N, C, H, W) of maps `x`, weights and biases (C,), in the precision of `x`."""
        n, c, h, w = x.shape
        y = torch.empty_like(x)
        mean, rstd = torch.empty(2, n, groups, dtype=torch.float32, device=x.device)
        blocks = _blocks(x, groups)
        grid = n, triton.cdiv(groups, blocks["GROUPS"])
        _forward[grid](x, y, weight, bias, mean, rstd, h * w, c, groups, eps, RELU=relu, **blocks)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.relu = relu
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        """Gradients by maps, weights and biases."""
        x, weight, bias, mean, rstd = ctx.saved_tensors
        (n, c, h, w), groups = x.shape, mean.shape[1]
        given = gradients[0].contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        sums = torch.empty(n, 2, c, dtype=torch.float32, device=x.device)
        blocks = _blocks(x, groups)
        grid = n, triton.cdiv(groups, blocks["GROUPS"])
        _backward[grid](x, given, dx, weight, bias, mean, rstd, sums, h * w, c, groups, RELU=ctx.relu, **blocks)
        of_weight, of_bias = sums.sum(0).to(weight.dtype)
        return dx, of_weight, of_bias, None, None, None
