"""Do the diagnostics measure what can be computed by hand, and leave the model alone?"""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bit_mixup.diagnostics import adversarial_errors, attack, choose_opponents, in_between, jacobian_norms
from bit_mixup.errors import ConfigError, DataError
from bit_mixup.models import Normalize, load_bit

HALF = Normalize((0.5, 0.5, 0.5), (0.5, 0.25, 0.125))
CLASSES = 4


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Linear(torch.nn.Module):
    """Logits linear in the picture."""

    def __init__(self, size: int = 2, classes: int = CLASSES, seed: int = 1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(numbers(classes, 3 * size * size, seed=seed))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


@pytest.fixture(scope="module")
def bit(tiny_bit: Path) -> torch.nn.Module:
    return load_bit(str(tiny_bit), keep_head=True).double()


def test_opponents_are_of_another_class_and_random() -> None:
    labels = torch.arange(400) % 4
    opponents = choose_opponents(labels)
    assert (labels[opponents] != labels).all()
    assert len(opponents.unique()) > 200
    assert torch.equal(opponents, choose_opponents(labels))
    assert not torch.equal(opponents, choose_opponents(labels, seed=1))
    with pytest.raises(DataError, match="of one class"):
        choose_opponents(torch.zeros(5, dtype=torch.int64))


def test_in_between_of_a_linear_model_by_hand() -> None:
    model, images, labels = Linear(), numbers(30, 3, 2, 2), torch.arange(30) % 4
    found = in_between(model, images, labels, lams=(0.0, 0.3, 1.0), batch_size=7)
    opponents = choose_opponents(labels)
    weight = model.weight.detach()
    for place, lam in enumerate((0.0, 0.3, 1.0)):
        misses, norms = 0, 0.0
        for i in range(30):
            j = int(opponents[i])
            logits = weight @ (lam * images[i] + (1 - lam) * images[j]).flatten()
            misses += int(logits.argmax()) not in (int(labels[i]), int(labels[j]))
            target = lam * F.one_hot(labels[i], CLASSES).double() + (1 - lam) * F.one_hot(labels[j], CLASSES).double()
            norms += float((weight.T @ (logits.softmax(0) - target)).norm())
        assert found.miss_rate[place] == misses / 30
        assert found.gradient_norm[place] == pytest.approx(norms / 30, abs=1e-12)
    assert (found.lams, found.pairs) == ([0.0, 0.3, 1.0], 30)


def test_at_its_ends_a_pair_is_an_example() -> None:
    """There a miss is an error that happens not to be the other's class."""
    model, images, labels = Linear(classes=2), numbers(40, 3, 2, 2), torch.arange(40) % 2
    assert in_between(model, images, labels, lams=(0.0, 0.5, 1.0)).miss_rate == [0, 0, 0], "of two classes each is one of both"
    model = Linear(classes=50)
    errors = (model(images).argmax(1) != labels).double().mean()
    assert in_between(model, images, labels, lams=(1.0,)).miss_rate[0] <= float(errors)


def test_jacobian_norms_of_a_linear_model() -> None:
    model, images = Linear(), numbers(5, 3, 2, 2)
    exact = float(model.weight.detach().norm())
    torch.testing.assert_close(jacobian_norms(model, images), torch.full((5,), exact, dtype=torch.float64))
    wide = Linear(classes=200)
    estimate = jacobian_norms(wide, numbers(40, 3, 2, 2), probes=32)
    assert float(estimate.square().mean().sqrt() / wide.weight.detach().norm()) == pytest.approx(1, abs=0.05)
    assert len(estimate.unique()) == 40, "each picture has probes of its own"


def test_attack_of_a_linear_model_is_the_worst_corner_of_the_ball() -> None:
    """One pixel of three channels: all eight corners can be tried."""
    model = Linear(size=1, classes=2)
    images, labels = numbers(6, 3, 1, 1) / 10, torch.tensor([0, 1, 0, 1, 0, 1])
    moved = attack(model, images, labels, normalize=HALF, epsilon=5.0)
    ball = 5 / 255 / torch.tensor(HALF.std, dtype=torch.float64)
    for i in range(6):
        corners = [images[i] + (torch.tensor(s) * ball).view(3, 1, 1) for s in itertools.product((-1, 1), repeat=3)]
        losses = [float(F.cross_entropy(model(c[None]), labels[i : i + 1]).detach()) for c in corners]
        worst = corners[losses.index(max(losses))]
        torch.testing.assert_close(moved[i], worst, atol=1e-12, rtol=0)


@given(st.floats(0.1, 60), st.integers(1, 12), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_attacks_stay_in_the_ball_and_between_black_and_white(epsilon: float, steps: int, seed: int) -> None:
    model = Linear(seed=seed)
    pixels = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (HALF.mean, HALF.std))
    moved = attack(model, (pixels - mean) / std, torch.arange(5) % 4, normalize=HALF, epsilon=epsilon, steps=steps)
    after = moved * std + mean
    assert float(after.min()) >= -1e-12
    assert float(after.max()) <= 1 + 1e-12
    assert float((after - pixels).abs().max()) <= epsilon / 255 + 1e-12


def test_steps_of_an_attack(bit: torch.nn.Module) -> None:
    images, labels = numbers(6, 3, 40, 40) / 3, torch.arange(6) % 4

    def loss(steps: int, epsilon: float) -> float:
        moved = attack(bit, images, labels, normalize=HALF, epsilon=epsilon, steps=steps)
        with torch.no_grad():
            return float(F.cross_entropy(bit(moved), labels))

    assert loss(10, 4.0) > loss(1, 4.0) > loss(1, 0.0)
    assert torch.equal(attack(bit, images, labels, normalize=HALF, epsilon=0.0), images)
    for epsilon, steps in ((-1.0, 1), (math.nan, 1), (4.0, 0)):
        with pytest.raises(ConfigError, match="epsilon of 0 or more"):
            attack(bit, images, labels, normalize=HALF, epsilon=epsilon, steps=steps)


def test_transferred_attacks_are_made_on_the_source() -> None:
    model, source = Linear(seed=1), Linear(seed=2)
    images = numbers(60, 3, 2, 2) / 5
    labels = model(images).argmax(1)
    white = adversarial_errors(model, images, labels, normalize=HALF, epsilon=16.0)
    black = adversarial_errors(model, images, labels, normalize=HALF, epsilon=16.0, source=source)
    assert white.clean == black.clean == 0
    moved = attack(source, images, labels, normalize=HALF, epsilon=16.0)
    assert black.fgsm == float((model(moved).argmax(1) != labels).double().mean())
    assert white.fgsm > black.fgsm
    assert (white.transferred, black.transferred) == (False, True)
    assert "not a defence" in white.as_dict()["caveat"]


def test_size_of_batches_has_no_say(bit: torch.nn.Module) -> None:
    images, labels = numbers(7, 3, 40, 40) / 3, torch.arange(7) % 4
    results = []
    for batch_size in (1, 3, 64):
        between = in_between(bit, images, labels, lams=(0.5,), batch_size=batch_size)
        norms = jacobian_norms(bit, images, batch_size=batch_size)
        estimated = jacobian_norms(bit, images, probes=3, batch_size=batch_size)
        moved = attack(bit, images, labels, normalize=HALF, epsilon=4.0, steps=2, batch_size=batch_size)
        results.append(torch.cat([torch.tensor(between.gradient_norm), norms, estimated, moved.flatten()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(results[0], results[2], atol=1e-9, rtol=1e-9)


def test_the_model_is_left_as_it_was(bit: torch.nn.Module) -> None:
    images, labels = numbers(4, 3, 40, 40), torch.arange(4)
    bit.train()
    first = next(bit.parameters())
    first.requires_grad_(False)
    with torch.no_grad():  # measures all the same
        in_between(bit, images, labels, lams=(0.5,))
        jacobian_norms(bit, images)
        adversarial_errors(bit, images, labels, normalize=HALF, steps=1)
    assert bit.training
    assert [parameter.requires_grad for parameter in bit.parameters()] == [False] + [True] * (len(list(bit.parameters())) - 1)
    assert all(parameter.grad is None for parameter in bit.parameters())
    with pytest.raises(RuntimeError):
        jacobian_norms(bit, torch.zeros(1, 5, 8, 8, dtype=torch.float64))
    assert bit.training
    assert not first.requires_grad
    first.requires_grad_()
