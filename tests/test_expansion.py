"""Is mixup's loss what the theory says: exactly by Theorem 1, to second order by Theorem 2?"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

from bit_mixup.expansion import DataMeans, decompose_loss, noise_covariances, quadratic_term, shrink
from bit_mixup.models import forward, load_bit
from bit_mixup.theory import mixing_moments, theta_quadrature

ALPHAS = (0.05, 0.4, 1.0, 8.0)
COUNT, INPUTS, CLASSES = 9, 6, 3


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(curvature: float = 1.0, scale: float = 1.0) -> torch.nn.Module:
    """A small random network whose logits are linear in the input at curvature 0, as a map of pictures (N, 1, 2, 3)."""
    first, second, linear = numbers(8, INPUTS, seed=1), numbers(CLASSES, 8, seed=2), numbers(CLASSES, INPUTS, seed=3)

    class Small(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            x = images.flatten(1)
            return scale * (x @ linear.T / 2 + curvature * torch.tanh(x @ first.T / 2) @ second.T)

    return Small()


def data() -> tuple[Tensor, Tensor, Tensor, DataMeans]:
    """Pictures, labels, targets and their means, classes unequal."""
    images = numbers(COUNT, 1, 2, 3, seed=4) + 0.5
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    targets = F.one_hot(labels, CLASSES).double()
    return images, labels, targets, DataMeans(image=images.mean(0), label=targets.mean(0))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * logits.log_softmax(-1)).sum(-1)


def mixup_risk(model: torch.nn.Module, alpha: float) -> float:
    """The loss on all mixed pairs (Zhang et al., 2018), by quadrature over lam on both sides of one half."""
    images, _, targets, _ = data()
    theta, weights = theta_quadrature(alpha, nodes=60)
    total = 0.0
    for value, weight in zip(theta, weights, strict=True):
        for lam in (value, 1 - value):  # lam is theta or 1 - theta, each half of the time
            for i in range(COUNT):
                mixed = [lam * v[i] + (1 - lam) * v for v in (images, targets)]
                total += weight / 2 * float(cross_entropy(model(mixed[0]), mixed[1]).mean()) / COUNT
    return total


def theorem_1(model: torch.nn.Module, alpha: float) -> float:
    """The same as noise around modified data."""
    images, _, targets, means = data()
    moments = mixing_moments(alpha)
    theta, weights = theta_quadrature(alpha, nodes=60)
    inputs, outputs = (shrink(v, m, moments.theta_bar) for v, m in ((images, means.image), (targets, means.label)))
    total = 0.0
    for value, weight in zip(theta, weights, strict=True):
        for i in range(COUNT):
            noises = [
                (value - moments.theta_bar) * v[i] + (1 - value) * v - (1 - moments.theta_bar) * m
                for v, m in ((images, means.image), (targets, means.label))
            ]
            loss = cross_entropy(model(inputs[i] + noises[0]), outputs[i] + noises[1]).mean()
            total += weight * float(loss) / COUNT
    return total


@pytest.mark.parametrize("alpha", ALPHAS)
def test_theorem_1(alpha: float) -> None:
    model = network()
    assert theorem_1(model, alpha) == pytest.approx(mixup_risk(model, alpha), abs=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_noise_of_theorem_1_has_mean_zero_and_the_three_covariances(alpha: float) -> None:
    images, _, targets, means = data()
    a, b = (images - means.image).flatten(1), targets - means.label
    moments = mixing_moments(alpha)
    theta, weights = theta_quadrature(alpha, nodes=12)  # polynomials: exact; fewer nodes, less rounding
    a_raw, b_raw = images.flatten(1), targets  # with their means, which are not the function's business
    for i in range(COUNT):
        delta, eps = (
            torch.stack([(t - moments.theta_bar) * v[i] + (1 - t) * v for t in theta]) for v in (a, b)
        )  # (nodes, partners, dimensions)
        share = torch.tensor(weights)[:, None] / COUNT
        for noise in (delta, eps):
            assert (noise * share[..., None]).sum((0, 1)).abs().max() < 1e-12
        pairs = ((delta, delta, a_raw, a_raw), (eps, eps, b_raw, b_raw), (delta, eps, a_raw, b_raw))
        for first, second, own, other in pairs:
            covariance = torch.einsum("tj,tjp,tjq->pq", share, first, second)
            torch.testing.assert_close(covariance, noise_covariances(own, other, moments)[i], atol=1e-12, rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_parts_of_the_loss_add_up_to_mixup(alpha: float) -> None:
    images, labels, targets, means = data()
    model = network()
    parts = decompose_loss(model, images, labels, means, alpha=alpha, nodes=60)
    assert parts.mixup == pytest.approx(mixup_risk(model, alpha), abs=1e-12)
    assert parts.erm == pytest.approx(float(cross_entropy(model(images), targets).mean()), abs=1e-14)
    assert parts.erm + parts.shrinkage + parts.perturbation == pytest.approx(parts.mixup, abs=1e-14)
    assert parts.as_dict().keys() == {"erm", "shrinkage", "perturbation", "mixup", "floor"}


def test_a_few_shifts_estimate_the_parts_and_leave_the_example_itself_out() -> None:
    images, labels, _, means = data()
    model = network()
    all_others = decompose_loss(model, images, labels, means, alpha=0.4, shifts=COUNT - 1)
    with_itself = decompose_loss(model, images, labels, means, alpha=0.4)
    assert with_itself.mixup == pytest.approx((all_others.erm + (COUNT - 1) * all_others.mixup) / COUNT, abs=1e-12)
    few = decompose_loss(model, images, labels, means, alpha=0.4, shifts=3)
    assert few.mixup != all_others.mixup
    assert few.mixup == pytest.approx(all_others.mixup, rel=0.3)
    for batch_size in (1, 4):
        again = decompose_loss(model, images, labels, means, alpha=0.4, batch_size=batch_size)
        assert again.as_dict() == pytest.approx(with_itself.as_dict(), abs=1e-12)
    alone = decompose_loss(model, images[:1], labels[:1], means, alpha=0.4, shifts=4)
    assert alone.mixup == pytest.approx(alone.erm, abs=1e-12), "an only example is its own partner"


@pytest.mark.parametrize("shifts", [None, 2, COUNT - 1])
def test_a_model_that_knows_every_mixed_label_reaches_the_floor(shifts: int | None) -> None:
    """Its inputs are the targets themselves, and its softmax gives them back."""
    _, labels, targets, means = data()

    def perfect(inputs: Tensor) -> Tensor:
        return inputs.clamp(min=1e-300).log()

    parts = decompose_loss(perfect, targets, labels, replace(means, image=means.label), alpha=0.4, nodes=40, shifts=shifts)
    assert parts.mixup == pytest.approx(parts.floor, abs=1e-3)  # the entropy is not smooth at 1: quadrature is less exact
    assert 0 < parts.floor < parts.mixup + 1e-3


def test_second_derivatives_of_a_bit_are_not_zero(tiny_bit: object) -> None:
    """So R2 of theorem 2 is not either: its logits do not change with the scale of x, and from that f''[x, v] = -f'[v]."""
    model = load_bit(str(tiny_bit), keep_head=True).double().eval()
    images, direction = numbers(2, 3, 40, 40, seed=7), numbers(2, 3, 40, 40, seed=8)

    def slope(inputs: Tensor) -> Tensor:
        return jvp(lambda x: forward(model, x), (inputs,), (direction,))[1]

    with torch.no_grad():
        first = slope(images)
        _, second = jvp(slope, (images,), (images,))
    assert first.abs().max() > 1e-4
    torch.testing.assert_close(second, -first, atol=1e-4 * float(first.abs().max()), rtol=0)


def exact_term(model: torch.nn.Module, alpha: float) -> float:
    """R1 + R3 as a mean over all partners: a mean over all cyclic shifts, the example itself among them."""
    images, _, targets, means = data()
    moments = mixing_moments(alpha)
    shifts = [torch.arange(COUNT).roll(-shift) for shift in range(COUNT)]
    terms = [quadratic_term(model, images, targets, means, moments, partners)[1] for partners in shifts]
    return float(sum(terms)) / COUNT**2


def second_order(model: torch.nn.Module, alpha: float) -> float:
    """R1 + R3 from the definition, by finite differences: Jacobians J, traces tr(H J S_xx J^T) / 2 - tr(S_xy^T ...)."""
    images, _, targets, means = data()
    a, b = (images - means.image).flatten(1), targets - means.label
    moments = mixing_moments(alpha)
    total, step = 0.0, 1e-5
    for i in range(COUNT):
        modified = shrink(images[i], means.image, moments.theta_bar)
        steps = step * torch.eye(INPUTS, dtype=torch.float64).view(INPUTS, 1, 2, 3)
        jacobian = ((model(modified + steps) - model(modified - steps)) / (2 * step)).T  # (classes, inputs)
        probs = model(modified[None]).softmax(1)[0]
        hessian = probs.diag() - torch.outer(probs, probs)
        s_xx = moments.sigma2 * torch.outer(a[i], a[i]) + moments.gamma2 * a.T @ a / COUNT
        s_xy = moments.sigma2 * torch.outer(a[i], b[i]) + moments.gamma2 * a.T @ b / COUNT
        total += float((hessian @ jacobian @ s_xx @ jacobian.T).trace() / 2 - (jacobian @ s_xy).trace()) / COUNT
    return total


@pytest.mark.parametrize("alpha", ALPHAS)
def test_quadratic_term_is_that_of_theorem_2(alpha: float) -> None:
    model = network()
    assert exact_term(model, alpha) == pytest.approx(second_order(model, alpha), abs=1e-8)


def test_term_comes_with_the_logits_of_the_modified_pictures() -> None:
    images, _, targets, means = data()
    moments = mixing_moments(0.4)
    logits, _ = quadratic_term(network(), images, targets, means, moments, torch.arange(COUNT).roll(1))
    torch.testing.assert_close(logits, network()(shrink(images, means.image, moments.theta_bar)), atol=1e-14, rtol=0)


def error_of_the_expansion(curvature: float, scale: float, alpha: float) -> tuple[float, float]:
    """|mixup - (modified data + quadratic term)|, and what the quadratic term is an approximation to."""
    images, labels, _, means = data()
    model = network(curvature, scale)
    parts = decompose_loss(model, images, labels, means, alpha=alpha, nodes=60)
    return abs(parts.perturbation - exact_term(model, alpha)), abs(parts.perturbation)


def test_expansion_gets_exact_as_the_model_gets_linear_and_its_logits_small() -> None:
    errors = [error_of_the_expansion(0.0, scale, 0.4)[0] for scale in (1, 0.5, 0.25, 0.125)]
    ratios = [before / after for before, after in itertools.pairwise(errors)]
    assert all(ratio > 5 for ratio in ratios), "third order in the scale or better"
    shares = [error / whole for error, whole in (error_of_the_expansion(c, 0.1, 1.0) for c in (1.0, 0.3, 0.1, 0.03))]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.05


def test_expansion_is_exact_for_a_linear_model_with_squared_loss() -> None:
    """There it has R4 as well; everything is a moment of first or second order."""
    images, _, targets, means = data()
    inputs = images.flatten(1)
    a, b = inputs - means.image.flatten(), targets - means.label
    weight = numbers(CLASSES, INPUTS, seed=5)
    for alpha in ALPHAS:
        moments = mixing_moments(alpha)
        theta, weights = theta_quadrature(alpha, nodes=12)
        risk = sum(
            w * float(((t * b[i] + (1 - t) * b) - (t * a[i] + (1 - t) * a) @ weight.T).square().sum(1).mean()) / 2 / COUNT
            for t, w in zip(theta, weights, strict=True)
            for i in range(COUNT)
        )
        first = moments.theta_bar**2 * (b - a @ weight.T).square().sum(1).mean() / 2
        # R1 + R3 + R4 with l_uu = l_yy = I and l_uy = -I; R2 is 0, for the model is linear.
        xx, xy, yy = (
            noise_covariances(v, w, moments).mean(0) for v, w in ((inputs, inputs), (inputs, targets), (targets, targets))
        )
        noise = (weight @ xx @ weight.T).trace() / 2 - (weight @ xy).trace() + yy.trace() / 2
        assert float(first + noise) == pytest.approx(risk, rel=1e-12)


def test_term_of_a_real_bit_is_that_of_finite_differences(tiny_bit: object) -> None:
    """Through weight standardisation, GroupNorm and max-pooling; ReLU's kinks ask for a small step."""
    model = load_bit(str(tiny_bit), keep_head=True).double().eval()
    images = numbers(4, 3, 40, 40, seed=7)
    targets = F.one_hot(torch.arange(4), 4).double()
    means = DataMeans(image=images.mean(0), label=targets.mean(0))
    moments, partners, step = mixing_moments(0.4), torch.tensor([1, 2, 3, 0]), 1e-7
    with torch.no_grad():
        logits, term = quadratic_term(lambda x: forward(model, x), images, targets, means, moments, partners)
        modified, a, b = shrink(images, means.image, moments.theta_bar), images - means.image, targets - means.label
        expected, probs = 0.0, logits.softmax(1)
        for share, direction, label in ((moments.sigma2, a, b), (moments.gamma2, a[partners], b[partners])):
            q = (model(modified + step * direction) - model(modified - step * direction)) / (2 * step)
            form = ((probs * q**2).sum(1) - (probs * q).sum(1) ** 2) / 2 - (label * q).sum(1)
            expected += share * float(form.sum())
    assert math.isfinite(float(term))
    assert float(term) == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(expected)


def test_entropy_of_a_linear_classifier_is_its_loss() -> None:
    """At the optimum of a linear model with bias the mean entropy of predictions is the mean cross-entropy to its targets, so
    smoothed labels make predictions less sure (Carratino et al., 2022)."""
    images, _, targets, means = data()
    x = torch.cat([images.flatten(1), torch.ones(COUNT, 1, dtype=torch.float64)], 1)
    entropies = []
    for theta_bar in (0.94, 0.75):
        wanted = shrink(targets, means.label, theta_bar)
        weight = torch.zeros(CLASSES, INPUTS + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure(weight: Tensor = weight, wanted: Tensor = wanted, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(x @ weight.T, wanted).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        probs = (x @ weight.detach().T).softmax(1)
        entropy = float(torch.special.entr(probs).sum(1).mean())
        assert entropy == pytest.approx(float(closure().detach()), abs=1e-6)
        entropies.append(entropy)
    assert entropies[1] > entropies[0]
