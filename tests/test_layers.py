"""Do BiT's layers say the same as timm's, forward and backward, however they are computed?"""

import copy
from collections.abc import Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.norm_act import GroupNormAct
from timm.layers.std_conv import StdConv2d
from torch import Tensor

from bit_mixup.layers import (
    FusedGroupNorm,
    KeptFilters,
    NarrowGroupNorm,
    QuickConv,
    QuickGroupNorm,
    make_quick,
    patches,
    quick_layers,
    standardise,
)

GROUPED = {"channels": (128, 128, 256, 512), "stem_chs": 32}  # 32 groups of 1 to 16 channels
LAST = torch.channels_last


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def model() -> torch.nn.Module:
    """A BiT with 32 groups, random weights that differ from timm's start, and a head of 3 classes, in double precision."""
    torch.manual_seed(0)
    built = timm.create_model("resnetv2_50x1_bit", num_classes=3, **GROUPED).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * noise(*parameter.shape, seed=parameter.numel()))
    return built


def gradients(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        yield name, parameter.grad


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize("form", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (4, 7, 1, 1), (1, 3, 7, 7)])
def test_filters_are_standardised_as_by_timm(shape: tuple[int, ...], form: torch.memory_format, eps: float) -> None:
    weight, given = noise(*shape).to(memory_format=form), noise(*shape, seed=1)
    found, wanted = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    own = standardise(found, eps)
    theirs = F.batch_norm(wanted.reshape(1, len(wanted), -1), None, None, training=True, momentum=0.0, eps=eps).reshape_as(wanted)
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-12)
    own.backward(given)
    theirs.backward(given)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-10, atol=1e-10)
    if eps == 1e-8:
        rows = own.detach().flatten(1)
        torch.testing.assert_close(rows.mean(1), torch.zeros(len(rows), dtype=torch.float64), atol=1e-12, rtol=0)
        torch.testing.assert_close(rows.var(1, unbiased=False), torch.ones(len(rows), dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_patches_are_what_a_filter_is_laid_over(kernel: int, stride: int, size: int) -> None:
    maps, weight = noise(2, 5, size, size + 1), noise(6, 5, kernel, kernel, seed=1)
    found = F.linear(patches(maps, kernel, stride), weight.permute(0, 2, 3, 1).flatten(1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, F.conv2d(maps, weight, stride=stride, padding=kernel // 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "stride", "size"), [(1, 1, 9), (1, 2, 9), (3, 1, 4), (3, 2, 8), (3, 1, 8), (7, 2, 8)])
def test_in_bf16_a_convolution_says_and_learns_what_torchs_does(kernel: int, stride: int, size: int) -> None:
    """As near to double precision as torch's own, forward and backward; small maps and 1 x 1 filters by a matrix product.

    With one exception: gradients by small maps under 3 x 3 filters are sums of nine that are rounded each.
    """
    maps, given = noise(4, 32, size, size, dtype=torch.bfloat16).contiguous(memory_format=LAST), None
    results = {}
    for kind, dtype in (("exact", torch.float64), ("torch", torch.bfloat16), ("quick", torch.bfloat16)):
        torch.manual_seed(0)
        conv = StdConv2d(32, 48, kernel, stride=stride, padding=kernel // 2, eps=1e-8).to(memory_format=LAST)
        conv = conv.double() if kind == "exact" else conv
        if kind == "quick":
            conv.__class__ = QuickConv
        x = maps.to(dtype).clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != "exact"):
            y = conv(x)
        given = noise(*y.shape, seed=1, dtype=torch.bfloat16) if given is None else given
        y.backward(given.to(y.dtype))
        results[kind] = [value.double() for value in (y.detach(), x.grad, conv.weight.grad)]
    for name, wanted, theirs, own in zip(("y", "dx", "dw"), *results.values(), strict=True):
        errors = [float((value - wanted).norm() / wanted.norm()) for value in (own, theirs)]
        assert errors[0] < (2.5 if (name, kernel) == ("dx", 3) else 1.2) * errors[1] + 1e-4, name
        assert errors[0] < 0.01


@pytest.mark.parametrize("size", [3, 40])  # below and above the size from which torch's own forward pass is used
def test_group_normalisation_has_the_gradients_of_its_definition(size: int) -> None:
    """Against torch's in double precision; and, for small maps, against finite differences."""
    maps, weight, bias = noise(2, 8, size, size).contiguous(memory_format=LAST), noise(8, seed=1), noise(8, seed=2)
    given = noise(2, 8, size, size, seed=3)
    results = []
    for normalise in (
        lambda x, w, b: NarrowGroupNorm.apply(x, w, b, 4, 1e-5),
        lambda x, w, b: F.group_norm(x, 4, w, b, 1e-5),
    ):
        inputs = [values.clone(memory_format=torch.preserve_format).requires_grad_() for values in (maps, weight, bias)]
        normed = normalise(*inputs)
        normed.backward(given)
        results.append([normed, *(values.grad for values in inputs)])
    for own, theirs in zip(*results, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-9)
    if size == 3:
        inputs = [values.requires_grad_() for values in (maps, weight, bias)]
        assert torch.autograd.gradcheck(lambda x, w, b: NarrowGroupNorm.apply(x, w, b, 4, 1e-5), inputs)


@pytest.mark.parametrize("size", [8, 32])
def test_in_bf16_it_is_as_near_to_double_precision_as_torch(size: int) -> None:
    """Both round what they give to 8 bits; ours rounds gradients twice more."""
    maps, given = (noise(4, 64, size, size, seed=s, dtype=torch.bfloat16).contiguous(memory_format=LAST) for s in (0, 1))
    weight, bias = 1 + 0.1 * noise(64, seed=2, dtype=torch.float32), noise(64, seed=3, dtype=torch.float32)

    def results(quick: bool, dtype: torch.dtype) -> list[Tensor]:
        norm = GroupNormAct(64, 32).to(torch.promote_types(dtype, torch.float32))
        with torch.no_grad():
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)
        if quick:
            norm.__class__ = QuickGroupNorm
        x = maps.to(dtype).clone(memory_format=torch.preserve_format).requires_grad_()
        y = norm(x)
        y.backward(given.to(dtype))
        assert x.grad is not None
        return [value.double() for value in (y.detach(), x.grad, norm.weight.grad, norm.bias.grad)]

    exact = results(False, torch.float64)
    own, theirs = results(True, torch.bfloat16), results(False, torch.bfloat16)
    for name, wanted, found, torchs, allowed in zip(
        ("y", "dx", "dw", "db"), exact, own, theirs, (1.2, 2.5, 1.2, 1.2), strict=True
    ):
        errors = [float((value - wanted).norm() / wanted.norm()) for value in (found, torchs)]
        assert errors[0] < max(allowed * errors[1], 1e-6), (name, errors)
        assert errors[0] < 0.01, (name, errors)


def test_the_quick_path_is_taken_where_it_was_measured_to_be_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 that lies channels last, with narrow groups; and nowhere else."""
    taken = []
    apply = NarrowGroupNorm.apply
    monkeypatch.setattr(NarrowGroupNorm, "apply", lambda *inputs: taken.append(inputs[0].shape) or apply(*inputs))
    for channels, dtype, form, wanted in (
        (64, torch.bfloat16, LAST, True),
        (64, torch.bfloat16, torch.contiguous_format, False),
        (64, torch.float32, LAST, False),
        (512, torch.bfloat16, LAST, False),
    ):
        norm = GroupNormAct(channels, 32)
        norm.__class__ = QuickGroupNorm
        taken.clear()
        norm(noise(2, channels, 4, 4, dtype=dtype).contiguous(memory_format=form))
        assert bool(taken) is wanted, (channels, dtype, form)


@pytest.mark.parametrize("form", [torch.contiguous_format, LAST])
def test_a_whole_network_says_and_learns_the_same(model: torch.nn.Module, form: torch.memory_format) -> None:
    pictures, labels = noise(4, 3, 40, 40).contiguous(memory_format=form), torch.tensor([0, 1, 2, 1])
    other = copy.deepcopy(model).to(memory_format=form)
    wanted = model(noise(4, 3, 40, 40))
    F.cross_entropy(wanted, labels).backward()
    with quick_layers(other):
        found = other(pictures)
        F.cross_entropy(found, labels).backward()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for (name, own), (_, theirs) in zip(gradients(other), gradients(model), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-8, atol=1e-8 * float(theirs.abs().max()), msg=name)


def test_in_bf16_a_whole_network_says_the_same_within_its_rounding(model: torch.nn.Module) -> None:
    """Against double precision: the quick layers must not add to what bf16 costs by more than a quarter. (Of gradients only those
    of the layers are compared: through 50 random layers bf16 leaves little of them, with timm's layers as well.)"""
    pictures = noise(16, 3, 64, 64)
    with torch.no_grad():
        exact = model(pictures)
        errors = {}
        for quick in (False, True):
            other = copy.deepcopy(model).float().to(memory_format=LAST)
            if quick:
                make_quick(other)
            with torch.autocast("cpu", torch.bfloat16):
                found = other(pictures.float().contiguous(memory_format=LAST)).double()
            errors[quick] = float((found - exact).norm() / exact.norm())
    assert errors[True] < 1.25 * errors[False]
    assert errors[True] < 0.3


def test_layers_are_put_back(model: torch.nn.Module) -> None:
    kinds = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    with quick_layers(model):
        assert {QuickConv, FusedGroupNorm} <= {type(module) for module in model.modules()}
        assert list(model.state_dict()) == names
        assert isinstance(model.stages[0].blocks[0].conv1, StdConv2d)
    assert [type(module) for module in model.modules()] == kinds
    with quick_layers(model, fused=False):
        assert {QuickConv, QuickGroupNorm} <= {type(module) for module in model.modules()}
    with quick_layers(model, norms=False):
        assert not any(isinstance(module, QuickGroupNorm) for module in model.modules())

    def fail() -> None:
        with quick_layers(model):
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert [type(module) for module in model.modules()] == kinds


def test_kept_filters_give_the_gradient_of_all_passes(model: torch.nn.Module) -> None:
    pictures, labels = noise(6, 3, 40, 40), torch.tensor([0, 1, 2, 1, 0, 2])
    model.stem.requires_grad_(False)  # as where a part of the model is trained alone
    F.cross_entropy(model(pictures), labels, reduction="sum").backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with quick_layers(model):
        with KeptFilters(model).for_passes(None):
            for some, theirs in zip(pictures.split((1, 3, 2)), labels.split((1, 3, 2)), strict=True):
                F.cross_entropy(model(some), theirs, reduction="sum").backward()
        for name, parameter in model.named_parameters():
            if name.startswith("stem."):
                assert parameter.grad is None
                continue
            theirs = wanted[name]
            assert theirs is not None
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-8, atol=1e-8 * float(theirs.abs().max()), msg=name)
        assert not any(module.kept is not None for module in model.modules() if isinstance(module, QuickConv))


def test_filters_are_not_kept_beyond_passes_that_fail(model: torch.nn.Module) -> None:
    with quick_layers(model):

        def fail() -> None:
            with KeptFilters(model).for_passes(None):
                model(noise(1, 3, 40, 40)).sum().backward()
                raise RuntimeError("no memory")

        with pytest.raises(RuntimeError, match="no memory"):
            fail()
        assert not any(module.kept is not None for module in model.modules() if isinstance(module, QuickConv))
        assert model.stages[0].blocks[0].conv1.weight.grad is None


def test_filters_are_rounded_once_for_all_passes(model: torch.nn.Module) -> None:
    """In half precision: the gradients of passes still add up in single precision."""
    model.float()
    with quick_layers(model), KeptFilters(model).for_passes(torch.bfloat16):
        kept = model.stages[0].blocks[0].conv1.kept
        assert kept is not None
        assert kept.dtype == torch.bfloat16
        for seed in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(noise(2, 3, 40, 40, seed=seed, dtype=torch.float32))
            logits.sum().backward()
    weight = model.stages[0].blocks[0].conv1.weight
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
