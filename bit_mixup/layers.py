"""How do BiT's own layers take less time, and say the same?

A BiT spends a good part of a training step on what other networks lack: filters that are standardised in each pass, and group
normalisation. timm computes both by operations that were made for something else. Here are the same formulas by operations that
fit; for the time of a training run they take the place of timm's, with the same weights under the same names.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm_act import GroupNorm1Act, GroupNormAct
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn

_aten: Any = torch.ops.aten
SMALL_MAP = 16  # pixels up to which 3 x 3 filters are applied as a matrix product
WIDE_GROUP = 16  # channels of a group from which torch's group normalisation in channels last works on whole vectors
WIDEST_GROUP = 4096  # channels of a group up to which the fused kernel holds one pixel of it at a time
LARGE_MAP = 1024  # pixels from which torch's forward pass does so for narrow groups, too


def standardise(weight: Tensor, eps: float) -> Tensor:
    """Filters (O, I, H, W), each with mean 0 and variance 1: (w - mean) / sqrt(variance + eps).

    Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", 2019, eqs. 10 and 11; eps
    stands under the root, as in timm. It is layer normalisation over the numbers of a filter. timm calls batch normalisation for
    it, which takes three times as long.
    """
    if weight.is_contiguous(memory_format=torch.channels_last):
        rows = weight.permute(0, 2, 3, 1)
        return F.layer_norm(rows, rows.shape[1:], eps=eps).permute(0, 3, 1, 2)
    return F.layer_norm(weight, weight.shape[1:], eps=eps)


class QuickConv(StdConv2d):
    """A convolution with standardised filters, which may be kept for several passes (`KeptFilters`)."""

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """As timm's."""
        weight = standardise(self.weight, self.eps) if self.kept is None else self.kept
        if is_bf16_channels_last(x) and self._suits_product(x):
            rows = patches(x, self.kernel_size[0], self.stride[0])
            return F.linear(rows, weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def _suits_product(self, x: Tensor) -> bool:
        """Whether a matrix product of patches by filters takes less time than torch's convolution, in bf16.

        It always does for 1 x 1 filters, for 3 x 3 filters where the maps that come out are small: 0.6 to 0.9 of the time.
        """
        if self.groups != 1 or self.dilation != (1, 1) or self.stride[0] != self.stride[1]:
            return False
        if self.kernel_size == (1, 1):
            return self.padding == (0, 0)
        edges = ((edge + 2 - 3) // self.stride[0] + 1 for edge in x.shape[2:])
        return self.kernel_size == (3, 3) and self.padding == (1, 1) and math.prod(edges) <= SMALL_MAP


def patches(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    """What a filter of 1 x 1 or 3 x 3 (with one pixel of zeros around maps (N, C, H, W)) is laid over, (N, H', W', k k C)."""
    pixels = x.permute(0, 2, 3, 1)
    if kernel_size == 1:
        return pixels[:, ::stride, ::stride]
    height, width = ((edge - 1) // stride * stride + 1 for edge in x.shape[2:])
    padded = F.pad(pixels, (0, 0, 1, 1, 1, 1))
    shifted = [
        padded[:, row : row + height : stride, column : column + width : stride] for row in range(3) for column in range(3)
    ]
    return torch.cat(shifted, dim=-1)


class QuickGroupNorm(GroupNormAct):
    """Group normalisation and activation, quick also where bf16 pictures lie channels last and groups are narrow."""

    fused = False  # whether on a GPU both are one kernel

    def forward(self, x: Tensor) -> Tensor:
        """As timm's."""
        normed: Any
        if self.fused and on_gpu(x) and (fused := fused_norm()) is not None and self._suits_fused(x):
            normed = fused.apply(x, self.weight, self.bias, self.num_groups, self.eps, isinstance(self.act, nn.ReLU))
            return normed  # type: ignore[no-any-return]
        if x.shape[1] // self.num_groups < WIDE_GROUP and is_bf16_channels_last(x):
            normed = NarrowGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        else:
            normed = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        activated: Tensor = self.act(self.drop(normed))
        return activated

    def _suits_fused(self, x: Tensor) -> bool:
        plain = isinstance(self.act, nn.ReLU | nn.Identity) and isinstance(self.drop, nn.Identity)
        known = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.is_contiguous(memory_format=torch.channels_last)
        return plain and known and x.shape[1] // self.num_groups <= WIDEST_GROUP


class FusedGroupNorm(QuickGroupNorm):
    """Group normalisation and activation by one kernel, where there is a GPU that Triton compiles for."""

    fused = True


def on_gpu(x: Tensor) -> bool:
    """Whether Triton compiles for where these maps are."""
    return x.is_cuda


@cache
def fused_norm() -> Any:
    """`bit_mixup.kernels.FusedGroupNorm` where it works here; None, after a warning, where it does not.

    It is tried once in a process, on a GPU and beside torch's own: Triton comes with torch for some systems alone, and wants a
    compiler at its first use.
    """
    try:
        from bit_mixup.kernels import FusedGroupNorm as Kernels

        said = "" if fused_norm_agrees(Kernels, torch.device("cuda")) else "its results are not torch's"
    except Exception as error:
        said = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    if said:
        warnings.warn(f"normalisation and ReLU are not fused, and take more time: {said}", stacklevel=2)
        return None
    return Kernels


def fused_norm_agrees(kernels: Any, device: torch.device) -> bool:
    """Whether it gives what torch's own gives, forward and backward, on small maps."""
    draws = torch.Generator().manual_seed(0)
    maps, given = (torch.randn(2, 12, 5, 3, generator=draws) + 1 for _ in range(2))
    weight, bias = torch.randn(2, 12, generator=draws)
    results = []
    with torch.enable_grad(), torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        for own in (True, False):
            inputs = [values.to(device).requires_grad_() for values in (maps, weight, bias)]
            x = inputs[0].contiguous(memory_format=torch.channels_last)
            _, scale, shift = inputs
            y = kernels.apply(x, scale, shift, 4, 1e-5, True) if own else F.group_norm(x, 4, scale, shift, 1e-5).relu()
            results.append([y, *torch.autograd.grad(y, inputs, given.to(device))])
    return all(torch.allclose(found, wanted, rtol=1e-4, atol=1e-4) for found, wanted in zip(*results, strict=True))


def is_bf16_channels_last(x: Tensor) -> bool:
    """Whether feature maps (N, C, H, W) are of a kind for which torch's own kernels are not the quickest.

    Measured for the layers of R50x1 at 128 pixels on CPUs: with fewer than 16 channels a group torch's
    group normalisation takes two to ten times as long as `NarrowGroupNorm`, and where maps are small its 1 x 1 convolution up to
    four times as long as a matrix product. Neither holds in fp32.
    """
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)


class NarrowGroupNorm(torch.autograd.Function):
    """Group normalisation (Wu and He, "Group Normalization", 2018, eqs. 1 to 6) of feature maps that lie channels last.

    What it needs are sums over the pixels of each example and channel, and affine maps by example and channel. Batch
    normalisation has kernels for both that work on whole vectors of channels: its backward pass by weight and bias gives the
    sums, its forward pass in evaluation the maps. Example by example the maps stay in the cache between the two. Sums are taken
    in fp32; each affine map rounds to bf16 once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        """Normalised maps (N, C, H, W) of maps `x`, weights and biases (C,)."""
        n, c, h, w = x.shape
        width, count = c // groups, c // groups * h * w
        if h * w >= LARGE_MAP:
            y, mean, rstd = torch.native_group_norm(x, weight, bias, n, c, h * w, groups, eps)
            mean, rstd = (values.to(torch.promote_types(x.dtype, torch.float32)) for values in (mean, rstd))
        else:
            squares, totals = _sums(x, x)
            mean = totals.view(n, groups, width).sum(2) / count
            rstd = (squares.view(n, groups, width).sum(2) / count - mean**2).clamp_min(0).add(eps).rsqrt()
            scale = (rstd[..., None] * weight.view(groups, width)).view(n, c)
            shift = bias - mean.repeat_interleave(width, 1) * scale
            y = torch.empty_like(x)
            for index, maps in enumerate(x.split(1)):
                y[index : index + 1] = _affine(maps, scale[index], shift[index])
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients by maps, weights and biases."""
        x, weight, mean, rstd = ctx.saved_tensors
        (n, c, h, w), groups = x.shape, mean.shape[1]
        width, count = c // groups, c // groups * h * w
        given = gradients[0].contiguous(memory_format=torch.channels_last)
        products, totals = (sums.view(n, groups, width) for sums in _sums(given, x))
        centred = (products - totals * mean[..., None]) * rstd[..., None]  # of the normalised maps in place of x
        scale = weight.view(groups, width)
        # dx = rstd (w g - mean of w g - normalised x times the mean of w g times normalised x), as an affine map of g and of x
        of_x = -((centred * scale).sum(2) * rstd**2) / count
        rest = -of_x * mean - (totals * scale).sum(2) * rstd / count
        of_given = (rstd[..., None] * scale).view(n, c)
        of_x, rest = (values.repeat_interleave(width, 1) for values in (of_x, rest))
        dx, nothing = torch.empty_like(x), torch.zeros_like(rest[0])
        for index, (maps, slopes) in enumerate(zip(x.split(1), given.split(1), strict=True)):
            parts = _affine(slopes, of_given[index], rest[index]), _affine(maps, of_x[index], nothing)
            torch.add(*parts, out=dx[index : index + 1])
        return dx, centred.sum(0).view(c).to(weight.dtype), totals.sum(0).view(c).to(weight.dtype), None, None


def _sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over pixels of a b and of a, (N, C) each and fp32 at least, for maps (N, C, H, W)."""
    one = torch.ones(a.shape[1], dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
    zero = torch.zeros_like(one)
    pairs = [
        _aten.native_batch_norm_backward(g, x, one, None, None, zero, one, True, 0.0, [False, True, True])[1:]
        for g, x in zip(a.split(1), b.split(1), strict=True)
    ]
    products, totals = (torch.stack(rows) for rows in zip(*pairs, strict=True))
    return products, totals


def _affine(maps: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Maps (1, C, H, W) times a number for each channel, and another added, (C,) both, fp32 at least."""
    normed: Tensor = _aten.native_batch_norm(
        maps, scale, shift, torch.zeros_like(scale), torch.ones_like(scale), False, 0.0, 0.0
    )[0]
    return normed


@contextmanager
def quick_layers(model: nn.Module, *, norms: bool = True, fused: bool = True) -> Iterator[None]:
    """Puts these layers in the place of timm's for a while; weights stay where they are, and so do their names.

    Args:
        model: built by timm.
        norms: also of group normalisation, whose backward pass can not be differentiated once more here.
        fused: on a GPU group normalisation and activation by one kernel.
    """
    replaced = make_quick(model, norms=norms, fused=fused)
    try:
        yield
    finally:
        for module, kind in replaced:
            module.__class__ = kind


def make_quick(model: nn.Module, *, norms: bool = True, fused: bool = True) -> list[tuple[nn.Module, type]]:
    """Puts these layers in the place of timm's; gives those that were replaced, and what they were."""
    norm = FusedGroupNorm if fused else QuickGroupNorm
    replacements: dict[type, type] = {StdConv2d: QuickConv} | ({GroupNormAct: norm, GroupNorm1Act: norm} if norms else {})
    replaced = [(module, type(module)) for module in model.modules() if type(module) in replacements]
    for module, kind in replaced:
        module.__class__ = replacements[kind]
    return replaced


class KeptFilters:
    """Standardised filters of a step that has several backward passes: computed once before them, differentiated once after them.

    The passes add up the gradients by the standardised filters; differentiating their sum is, but for rounding, adding up
    what each pass would have differentiated itself.

    Args:
        model: inside of `quick_layers`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._convs = [module for module in model.modules() if isinstance(module, QuickConv)]

    @contextmanager
    def for_passes(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Keeps the filters while the block runs, and hands their gradients on to the weights when it ends well.

        Args:
            dtype: that the convolutions of single precision weights compute in, as autocast has it; None for that of the weights.
        """
        made = [standardise(conv.weight, conv.eps) for conv in self._convs]
        leaves = [filters.detach().requires_grad_(filters.requires_grad) for filters in made]
        for conv, leaf in zip(self._convs, leaves, strict=True):
            conv.kept = leaf.to(dtype) if dtype is not None and leaf.dtype == torch.float32 else leaf
        try:
            yield
        finally:
            for conv in self._convs:
                conv.kept = None
        trained = [(filters, leaf.grad) for filters, leaf in zip(made, leaves, strict=True) if leaf.grad is not None]
        if trained:
            torch.autograd.backward([filters for filters, _ in trained], [gradient for _, gradient in trained])
