"""Is the network that we build from an original file the original network?

The forward pass below is written from google-research/big_transfer (bit_pytorch/models.py, commit 140de6e) as functions on the
arrays of an original .npz file; it shares no code with timm or bit_mixup.
"""

import itertools
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bit_mixup.models import load_bit
from bit_mixup.weights import find_weights

Arrays = dict[str, npt.NDArray[np.float32]]
DEPTHS, WIDTHS = (3, 4, 6, 3), (256, 512, 1024, 2048)  # of R50x1
CLASSES = 5
STD_EPS = 1e-10


def make_arrays() -> Arrays:
    """A random R50x1 in the original naming and layout; some filters vary so little that the eps shows."""
    numbers = np.random.default_rng(0)
    arrays: Arrays = {}

    def kernel(name: str, edge: int, inputs: int, outputs: int) -> None:
        values = numbers.standard_normal((edge, edge, inputs, outputs), dtype=np.float32)
        arrays[f"resnet/{name}/kernel"] = values * np.geomspace(1e-4, 1, outputs, dtype=np.float32) + np.float32(0.1)

    def norm(name: str, channels: int) -> None:
        arrays[f"resnet/{name}/gamma"] = numbers.uniform(0.5, 1.5, channels).astype(np.float32)
        arrays[f"resnet/{name}/beta"] = numbers.normal(0, 0.3, channels).astype(np.float32)

    kernel("root_block/standardized_conv2d", 7, 3, 64)
    inputs = 64
    for block, (depth, outputs) in enumerate(zip(DEPTHS, WIDTHS, strict=True), start=1):
        inner = outputs // 4
        for unit in range(1, depth + 1):
            place = f"block{block}/unit{unit:02}"
            norm(f"{place}/a/group_norm", inputs)
            kernel(f"{place}/a/standardized_conv2d", 1, inputs, inner)
            norm(f"{place}/b/group_norm", inner)
            kernel(f"{place}/b/standardized_conv2d", 3, inner, inner)
            norm(f"{place}/c/group_norm", inner)
            kernel(f"{place}/c/standardized_conv2d", 1, inner, outputs)
            if unit == 1:
                kernel(f"{place}/a/proj/standardized_conv2d", 1, inputs, outputs)
            inputs = outputs
    norm("group_norm", inputs)
    kernel("head/conv2d", 1, inputs, CLASSES)
    arrays["resnet/head/conv2d/bias"] = numbers.standard_normal(CLASSES, dtype=np.float32)
    return arrays


class Original:
    """BiT's ResNetV2 as functions of the original arrays, in fp64."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = {name: torch.from_numpy(array).double() for name, array in arrays.items()}
        self.read: set[str] = set()

    def take(self, name: str) -> Tensor:
        self.read.add(f"resnet/{name}")
        return self.arrays[f"resnet/{name}"]

    def conv(self, x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        weight = self.take(f"{name}/kernel").permute(3, 2, 0, 1)
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, (weight - mean) / torch.sqrt(variance + STD_EPS), stride=stride, padding=padding)

    def norm_relu(self, x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, self.take(f"{name}/gamma"), self.take(f"{name}/beta"), 1e-5).relu()

    def unit(self, x: Tensor, place: str, stride: int, project: bool) -> Tensor:
        out = self.norm_relu(x, f"{place}/a/group_norm")
        shortcut = self.conv(out, f"{place}/a/proj/standardized_conv2d", stride) if project else x
        out = self.conv(out, f"{place}/a/standardized_conv2d")
        out = self.conv(self.norm_relu(out, f"{place}/b/group_norm"), f"{place}/b/standardized_conv2d", stride, padding=1)
        out = self.conv(self.norm_relu(out, f"{place}/c/group_norm"), f"{place}/c/standardized_conv2d")
        return out + shortcut

    def __call__(self, images: Tensor) -> Tensor:
        x = self.conv(images, "root_block/standardized_conv2d", stride=2, padding=3)
        x = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=0.0), kernel_size=3, stride=2)
        for block, depth in enumerate(DEPTHS, start=1):
            for unit in range(1, depth + 1):
                first = unit == 1
                x = self.unit(x, f"block{block}/unit{unit:02}", stride=2 if first and block > 1 else 1, project=first)
        x = self.norm_relu(x, "group_norm").mean(dim=(2, 3))
        return x @ self.take("head/conv2d/kernel")[0, 0] + self.take("head/conv2d/bias")


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return make_arrays()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def logits(arrays: Arrays, images: Tensor) -> Tensor:
    original = Original(arrays)
    result = original(images)
    assert original.read == set(arrays), "the forward pass reads every array"
    assert len(arrays) == 1 + 16 * 9 + 4 + 2 + 2  # stem, units, projections, last norm, head
    return result


def relative(difference: Tensor, scale: Tensor) -> float:
    return float(difference.abs().max() / scale.abs().max())


def with_counters(arrays: Arrays) -> Arrays:
    """The same under the names of those published files whose convolutions are counted."""
    counter = itertools.count()
    return {
        re.sub(r"standardized_conv2d", lambda match: f"{match[0]}_{n}" if (n := next(counter)) else match[0], name): array
        for name, array in arrays.items()
    }


@pytest.mark.parametrize("counted", [False, True])
@torch.no_grad()
def test_logits_are_those_of_the_original(arrays: Arrays, images: Tensor, logits: Tensor, counted: bool, tmp_path: Path) -> None:
    named = with_counters(arrays) if counted else arrays
    assert len(named) == len(arrays)
    assert ("resnet/block1/unit01/b/standardized_conv2d_2/kernel" in named) == counted
    path = tmp_path / "BiT-M-R50x1.npz"
    np.savez(path, **named)
    found = find_weights(str(path))
    assert (found.architecture, found.interpolation) == ("resnetv2_50x1_bit", "bilinear")
    model = load_bit(str(path), keep_head=True, std_eps=STD_EPS).double().eval()
    assert model.num_classes == CLASSES
    assert relative(model(images) - logits, logits) < 1e-6
    if not counted:
        other = load_bit(str(path), keep_head=True).double().eval()  # timm's eps
        assert relative(other(images) - logits, logits) > 1e-4, "the eps matters here"
        fresh = load_bit(str(path), num_classes=CLASSES)
        assert not any(parameter.any() for parameter in fresh.get_classifier().parameters())
        assert torch.equal(fresh.stem.conv.weight, model.stem.conv.weight.float())
