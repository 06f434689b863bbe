"""Do the closed forms of mixup agree with integrals, with draws and with one another?"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import betainc

from bit_mixup.errors import ConfigError
from bit_mixup.mixup import draw_lam
from bit_mixup.theory import best_train_accuracy, label_entropy, loss_floor, mixing_moments, theta_quadrature, total_smoothing

ALPHAS = (0.05, 0.1, 0.2, 0.25, 0.4, 0.5, 0.75, 1.0, 2.0, 8.0, 32.0)
# theta_bar, sigma^2 and gamma^2, by integration with another program and by 4 million draws
TABLE = {
    0.1: (0.941576, 0.013344, 0.016758),
    0.4: (0.839758, 0.023454, 0.049131),
    1.0: (0.75, 1 / 48, 1 / 12),
    2.0: (0.6875, 0.014844, 0.1125),
    8.0: (0.598190, 0.005065, 0.166516),
    32.0: (0.549673, 0.001379, 0.204173),
}


def expectation(function: Callable[[float], float], alpha: float) -> float:
    """E f(theta) by adaptive integration; below alpha 1 in t = (2 (1 - theta))^alpha, in which the density has no singularity."""

    def integrate(values: Callable[[float], float]) -> float:
        return quad(values, 0, 1, epsabs=1e-14, epsrel=1e-13, limit=400)[0]

    def theta(t: float) -> float:
        return 1 - (t ** (1 / alpha) if alpha < 1 else t) / 2

    def density(t: float) -> float:
        return theta(t) ** (alpha - 1) if alpha < 1 else (4 * theta(t) * (1 - theta(t))) ** (alpha - 1)

    return integrate(lambda t: function(theta(t)) * density(t)) / integrate(density)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_moments_are_the_integrals(alpha: float) -> None:
    moments = mixing_moments(alpha)
    assert moments.theta_bar == pytest.approx(1 - betainc(alpha + 1, alpha, 0.5), abs=1e-12)
    assert moments.theta_bar == pytest.approx(expectation(lambda theta: theta, alpha), abs=1e-10)
    assert moments.gamma2 == pytest.approx(expectation(lambda theta: (1 - theta) ** 2, alpha), abs=1e-10)
    assert moments.sigma2 == pytest.approx(expectation(lambda theta: (theta - moments.theta_bar) ** 2, alpha), abs=1e-10)


@pytest.mark.parametrize("alpha", TABLE)
def test_moments_are_those_of_the_table(alpha: float) -> None:
    moments = mixing_moments(alpha)
    assert (moments.theta_bar, moments.sigma2, moments.gamma2) == pytest.approx(TABLE[alpha], abs=1e-6)


def test_moments_of_no_mixing_and_of_midpoints() -> None:
    none, half = mixing_moments(0), mixing_moments(math.inf)
    assert (none.theta_bar, none.sigma2, none.gamma2) == (1, 0, 0)
    assert (half.theta_bar, half.sigma2, half.gamma2) == (0.5, 0, 0.25)
    assert mixing_moments(1e-8).theta_bar == pytest.approx(1 - 1e-8 * math.log(2), abs=1e-14)
    assert mixing_moments(1e6).theta_bar == pytest.approx(0.5 + 1 / (2 * math.sqrt(math.pi * 1e6)), rel=1e-6)


def test_moments_of_a_law_that_mixes_now_and_then() -> None:
    whole, part = mixing_moments(0.7), mixing_moments(0.7, probability=0.3)
    assert part.theta_bar == pytest.approx(0.3 * whole.theta_bar + 0.7)
    second = 0.3 * (whole.sigma2 + whole.theta_bar**2) + 0.7
    assert part.sigma2 == pytest.approx(second - part.theta_bar**2, abs=1e-15)
    assert part.gamma2 == pytest.approx(0.3 * whole.gamma2)


@given(st.floats(1e-6, 1e4))
@settings(max_examples=200, deadline=None)
def test_moments_hold_together(alpha: float) -> None:
    moments = mixing_moments(alpha)
    assert 0.5 <= moments.theta_bar <= 1
    assert 0 <= moments.sigma2 <= 1 / 16
    assert moments.gamma2 == pytest.approx(moments.sigma2 + (1 - moments.theta_bar) ** 2, abs=1e-12)
    assert mixing_moments(alpha * 1.01).theta_bar < moments.theta_bar


@pytest.mark.parametrize("alpha", ALPHAS)
def test_quadrature_integrates_what_is_smooth(alpha: float) -> None:
    theta, weights = theta_quadrature(alpha, nodes=30)
    assert weights.sum() == pytest.approx(1, abs=1e-14)
    assert ((theta > 0.5) & (theta < 1)).all()
    for function in (np.exp, np.sin, lambda t: t**3, lambda t: np.log(t)):
        assert (function(theta) * weights).sum() == pytest.approx(expectation(function, alpha), abs=1e-10)


def test_quadrature_of_no_mixing_and_of_midpoints_is_one_point() -> None:
    assert [values.tolist() for values in theta_quadrature(0)] == [[1.0], [1.0]]
    assert [values.tolist() for values in theta_quadrature(math.inf)] == [[0.5], [1.0]]


def test_moments_are_those_of_the_weights_that_training_draws() -> None:
    draws = np.array([draw_lam(0.4, seed=1, index=index) for index in range(20_000)])
    theta = np.maximum(draws, 1 - draws)
    moments = mixing_moments(0.4)
    assert theta.mean() == pytest.approx(moments.theta_bar, abs=4 * math.sqrt(moments.sigma2 / len(theta)))
    assert theta.var() == pytest.approx(moments.sigma2, rel=0.03)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_entropy_of_labels_is_the_integral(alpha: float) -> None:
    def entropy(theta: float) -> float:
        return float(torch.special.entr(torch.tensor([theta, 1 - theta], dtype=torch.float64)).sum())

    assert label_entropy(alpha) == pytest.approx(expectation(entropy, alpha), abs=1e-8)
    psi = torch.special.digamma(torch.tensor([2 * alpha + 1, alpha + 1], dtype=torch.float64))
    assert label_entropy(alpha) == pytest.approx(float(psi[0] - psi[1]), abs=1e-12)


def test_entropy_of_labels_goes_from_zero_to_one_bit() -> None:
    assert label_entropy(0) == 0
    assert label_entropy(1) == pytest.approx(0.5)
    assert label_entropy(math.inf) == math.log(2)


def test_loss_floor_is_the_mean_over_all_pairs_of_rows() -> None:
    counts = [5, 2, 1]
    labels = [0] * 5 + [1] * 2 + [2]
    pairs = [(i, j) for i in range(8) for j in range(8) if i != j]
    share = sum(labels[i] != labels[j] for i, j in pairs) / len(pairs)
    assert loss_floor(0.4, counts) == pytest.approx(share * label_entropy(0.4), abs=1e-14)
    assert loss_floor(1.0, [7, 0]) == 0, "a single class has nothing to mix"
    assert loss_floor(0.0, counts) == 0


def test_smoothings_compose() -> None:
    y = np.eye(4)[2]
    centre = np.full(4, 0.25)
    smoothed = 0.9 * y + 0.1 * centre
    both = centre + 0.75 * (smoothed - centre)
    lost = total_smoothing(0.75, 0.1)
    np.testing.assert_allclose(both, (1 - lost) * y + lost * centre, atol=1e-15)
    assert total_smoothing(0.75, 0) == 0.25


def test_best_training_accuracy_against_a_loop_over_pairs() -> None:
    labels = [0] * 5 + [1] * 2 + [2]
    pairs = [(i, j) for i in range(8) for j in range(8) if i != j]
    lams = (np.arange(2000) + 0.5) / 2000  # alpha 1: uniform
    best = np.mean([1.0 if labels[i] == labels[j] else np.maximum(lams, 1 - lams).mean() for i, j in pairs])
    assert best_train_accuracy(1.0, [5, 2, 1]) == pytest.approx(best, abs=1e-12)
    assert best_train_accuracy(1.0, [1, 1]) == 0.75
    assert best_train_accuracy(0.4, [7, 0]) == 1


@pytest.mark.parametrize("alpha", [8.0, 31.9, 32.1, 100.0, 1e3, 1e4, 1e6])
def test_a_few_nodes_suffice_for_any_alpha(alpha: float) -> None:
    theta, weights = theta_quadrature(alpha, nodes=8)
    assert float(theta @ weights) == pytest.approx(mixing_moments(alpha).theta_bar, abs=2e-3)
    theta, weights = theta_quadrature(alpha, nodes=40)
    assert float(theta @ weights) == pytest.approx(mixing_moments(alpha).theta_bar, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixing_moments(-1), "alpha is -1"),
        (lambda: mixing_moments(math.nan), "alpha is nan"),
        (lambda: mixing_moments(1, probability=1.5), "probability is 1.5"),
        (lambda: theta_quadrature(-1), "alpha is -1"),
        (lambda: label_entropy(-1), "alpha is -1"),
        (lambda: loss_floor(1, [1]), "two examples"),
        (lambda: best_train_accuracy(1, [0, 1]), "two examples"),
    ],
)
def test_values_out_of_range_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
