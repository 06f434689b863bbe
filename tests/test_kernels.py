"""Does the fused kernel of GPUs give what normalisation and ReLU are by definition? Without a GPU, by Triton's interpreter.

On a GPU: `python -m pytest --noconftest tests/test_kernels.py`.
"""

import importlib
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers.norm_act import GroupNorm1Act, GroupNormAct
from timm.layers.std_conv import StdConv2d
from timm.models.resnetv2 import ResNetV2
from torch import Tensor

from bit_mixup import layers
from bit_mixup.layers import FusedGroupNorm, fused_norm, fused_norm_agrees, make_quick

pytest.importorskip("triton", reason="Triton does not come with torch here")

LAST = torch.channels_last
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [  # examples, channels, height, width, groups
    (2, 64, 5, 4, 32),
    (2, 192, 4, 3, 32),  # groups of 6 channels
    (2, 2048, 1, 2, 32),
    (3, 40, 7, 7, 1),
    (1, 48, 1, 1, 4),
    (2, 64, 12, 40, 8),  # more pixels than a program holds at a time, when a tile is small
]


@pytest.fixture(scope="module")
def kernels() -> Iterator[types.ModuleType]:
    """The module, compiled for the GPU or, without one, interpreted; with small tiles, so that small maps take several."""
    with pytest.MonkeyPatch.context() as patch:
        sys.modules.pop("bit_mixup.kernels", None)
        module = importlib.import_module("bit_mixup.kernels")
        patch.setattr(module, "_TILE", 1024)
        yield module
    del sys.modules["bit_mixup.kernels"]


def results(normalise: Any, shape: tuple[int, ...], dtype: torch.dtype, relu: bool, shift: float = 1.0) -> list[Tensor]:
    """Output and gradients in double precision, for maps whose mean is not 0."""
    n, c, h, w, groups = shape
    draws = torch.Generator().manual_seed(0)
    maps, given = (torch.randn(n, c, h, w, generator=draws).to(torch.bfloat16) for _ in range(2))
    weight, bias = torch.randn(2, c, generator=draws)
    exact = dtype == torch.float64
    x = (maps + shift).to(DEVICE, dtype).contiguous(memory_format=LAST).requires_grad_()
    scale, offset = (values.to(DEVICE, dtype if exact else torch.float32).requires_grad_() for values in (weight, bias))
    y = normalise(x, scale, offset, groups, 1e-5, relu)
    gradients = torch.autograd.grad(y, (x, scale, offset), given.to(DEVICE, dtype))
    return [values.detach().double() for values in (y, *gradients)]


def by_definition(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: bool) -> Tensor:
    parts = x.unflatten(1, (groups, -1))
    mean = parts.mean((2, 3, 4), keepdim=True)
    variance = ((parts - mean) ** 2).mean((2, 3, 4), keepdim=True)
    normed = ((parts - mean) / (variance + eps).sqrt()).flatten(1, 2)
    normed = normed * weight[:, None, None] + bias[:, None, None]
    return normed.clamp_min(0) if relu else normed


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_output_and_gradients_are_those_of_the_definition(
    kernels: types.ModuleType, shape: tuple[int, ...], dtype: torch.dtype, allowed: float, relu: bool
) -> None:
    wanted = results(by_definition, shape, torch.float64, relu)
    found = results(kernels.FusedGroupNorm.apply, shape, dtype, relu)
    for name, own, exact in zip(("y", "dx", "dw", "db"), found, wanted, strict=True):
        assert own.shape == exact.shape
        assert float((own - exact).norm()) <= (allowed if name in ("y", "dx") else 2e-6) * float(exact.norm()), name


def test_nothing_is_lost_where_means_are_large(kernels: types.ModuleType) -> None:
    """A mean of 2,000 beside a deviation of 1: the difference of squares would leave three digits of the variance."""
    shape = SHAPES[-1]
    wanted = results(by_definition, shape, torch.float64, False, shift=2000.0)
    found = results(kernels.FusedGroupNorm.apply, shape, torch.float32, False, shift=2000.0)
    assert float((found[0] - wanted[0]).norm()) <= 1e-3 * float(wanted[0].norm())


def test_maps_keep_their_form_and_what_is_not_a_number_is_not_hidden(kernels: types.ModuleType) -> None:
    x = torch.randn(1, 64, 3, 3).contiguous(memory_format=LAST).to(DEVICE)
    x[0, 5, 1, 1] = float("nan")
    y = kernels.FusedGroupNorm.apply(x, torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE), 32, 1e-5, True)
    assert y.is_contiguous(memory_format=LAST)
    assert y[0, 4:6].isnan().all()
    assert not y[0, :4].isnan().any()
    assert not y[0, 6:].isnan().any()


def test_a_kernel_that_errs_is_found_out(kernels: types.ModuleType) -> None:
    assert fused_norm_agrees(kernels.FusedGroupNorm, DEVICE)

    class Wrong(kernels.FusedGroupNorm):  # type: ignore[name-defined,misc]
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            y: Tensor = kernels.FusedGroupNorm.forward(ctx, *inputs)
            return y + 0.01

    assert not fused_norm_agrees(Wrong, DEVICE)


def test_where_it_can_not_be_used_torchs_own_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Triton finds no compiler: a warning, once, and the plain path."""
    broken = types.ModuleType("bit_mixup.kernels")
    monkeypatch.setitem(sys.modules, "bit_mixup.kernels", broken)  # which has no FusedGroupNorm
    fused_norm.cache_clear()
    with pytest.warns(UserWarning, match="normalisation and ReLU are not fused, and take more time: cannot import name"):
        assert fused_norm() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused_norm() is None
    fused_norm.cache_clear()


def learned(network: torch.nn.Module, pictures: Tensor, labels: Tensor) -> list[Tensor]:
    """Logits and all gradients, with convolutions in full fp32."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        logits = network(pictures)
        return [logits, *torch.autograd.grad(F.cross_entropy(logits, labels), list(network.parameters()))]


def test_a_whole_network_says_and_learns_the_same_through_it(kernels: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its normalisations are replaced, with one group or many; on a CPU the kernel is asked for by force."""
    monkeypatch.setattr(layers, "fused_norm", lambda: kernels.FusedGroupNorm)
    monkeypatch.setattr(layers, "on_gpu", lambda x: True)
    for norm in (GroupNorm1Act, GroupNormAct):
        torch.manual_seed(0)
        channels = (32, 32, 64, 64) if norm is GroupNorm1Act else (128, 128, 128, 128)
        args = {"channels": channels, "layers": (1, 1, 1, 1), "stem_chs": 32, "norm_layer": norm}
        plain = ResNetV2(num_classes=3, preact=True, stem_type="fixed", conv_layer=StdConv2d, **args)
        plain.to(DEVICE, memory_format=LAST)
        pictures, labels = torch.randn(2, 3, 64, 64).contiguous(memory_format=LAST), torch.tensor([0, 2])
        pictures, labels = pictures.to(DEVICE), labels.to(DEVICE)
        wanted = learned(plain, pictures, labels)
        replaced = make_quick(plain)
        norms = [module for module, _ in replaced if isinstance(module, FusedGroupNorm)]
        assert len(norms) == 3 * 4 + 1
        found = learned(plain, pictures, labels)
        for own, theirs in zip(found, wanted, strict=True):
            close = 1e-4 * float(theirs.detach().abs().max()) + 1e-5  # some gradients are 0 but for rounding
            torch.testing.assert_close(own, theirs, rtol=1e-3, atol=close)
