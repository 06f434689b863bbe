"""What does mixup do to a data set, before anything is trained?

Carratino, Cisse, Jenatton and Vert ("On Mixup Regularization", 2022, Theorem 1): training on mixed pairs is training on inputs
and labels that are shrunk toward their means by theta_bar, with structured noise on both. theta = max(lam, 1 - lam) is the
larger of the two weights of a pair. All of it has closed forms, in plain Python and SciPy: this file imports no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import digamma, poch, roots_jacobi, roots_legendre

from bit_mixup.errors import ConfigError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MixingMoments:
    """The law of theta, the larger weight of a mixed pair.

    Args:
        theta_bar: its mean, in [1/2, 1]; inputs and labels shrink by it.
        sigma2: its variance.
        gamma2: E (1 - theta)^2 = sigma2 + (1 - theta_bar)^2.
    """

    theta_bar: float
    sigma2: float
    gamma2: float


def check_alpha(alpha: float) -> float:
    """The alpha given; raises ConfigError unless it lies in [0, infinity]."""
    if math.isnan(alpha) or alpha < 0:
        raise ConfigError(f"mixup's alpha is {alpha}; it must be 0 (off) or positive (`inf` mixes half and half).")
    return alpha


def mixing_moments(alpha: float, *, probability: float = 1.0) -> MixingMoments:
    """Moments of theta for lam ~ Beta(alpha, alpha).

    theta_bar = 1/2 + 1 / (alpha 4^alpha B(alpha, alpha)), from the incomplete beta function at 1/2; and as (theta - 1/2)^2 is
    (lam - 1/2)^2, sigma2 = 1 / (4 (2 alpha + 1)) - (theta_bar - 1/2)^2. alpha 0 gives (1, 0, 0), infinity (1/2, 0, 1/4).

    Args:
        alpha: from 0 to infinity.
        probability: share of steps that mix at all; at the others theta is 1.

    Raises:
        ConfigError: alpha is negative, or probability outside of [0, 1].
    """
    check_alpha(alpha)
    if not 0 <= probability <= 1:
        raise ConfigError(f"probability is {probability}; it must lie in [0, 1].")
    if alpha == 0 or probability == 0:
        return MixingMoments(theta_bar=1.0, sigma2=0.0, gamma2=0.0)
    excess = 0.0 if math.isinf(alpha) else _excess(alpha)
    theta_bar = 0.5 + excess
    square = 0.0 if math.isinf(alpha) else 1 / (4 * (2 * alpha + 1))  # E (theta - 1/2)^2
    gamma2 = square - excess + 0.25  # E (1 - theta)^2 = E (1/2 - (theta - 1/2))^2
    mean = probability * theta_bar + 1 - probability
    return MixingMoments(theta_bar=mean, sigma2=max(probability * gamma2 - (1 - mean) ** 2, 0.0), gamma2=probability * gamma2)


def _excess(alpha: float) -> float:
    """theta_bar - 1/2 = Gamma(alpha + 1/2) / (2 sqrt(pi) Gamma(alpha + 1)).

    SciPy's ratio keeps its digits for any alpha; the difference of two logarithms has none left at alpha 1e16, and overflows.
    """
    return float(poch(alpha + 1, -0.5)) / (2 * math.sqrt(math.pi))


def theta_quadrature(alpha: float, *, nodes: int = 40) -> tuple[Floats, Floats]:
    """Values of theta in [1/2, 1] and weights that sum to 1: expectations over theta, without drawing.

    Gauss-Jacobi for the factor (1 - theta)^(alpha - 1) of the density, which is singular at 1 for alpha below 1; the other
    factor, theta^(alpha - 1), is smooth there and goes into the weights. Above alpha 32, where the density is next to normal and
    narrow, Gauss-Legendre on the part that holds all but 1e-16 of it.

    Raises:
        ConfigError: alpha is negative.
    """
    if check_alpha(alpha) == 0 or math.isinf(alpha):
        return np.array([1.0 if alpha == 0 else 0.5]), np.array([1.0])
    if alpha > 32:
        points, weights = roots_legendre(nodes)
        excess = (points + 1) / 2 * min(0.5, 3.1 / math.sqrt(alpha))
        theta, logs = 0.5 + excess, np.log(weights) + (alpha - 1) * np.log1p(-4 * excess**2)
    else:
        points, weights = roots_jacobi(nodes, alpha - 1, 0)
        theta = 0.75 + points / 4
        logs = np.log(weights) + (alpha - 1) * np.log(theta)
    scaled = np.exp(logs - logs.max())
    return theta, scaled / scaled.sum()


def label_entropy(alpha: float) -> float:
    """Mean entropy in nats of the two weights of a pair, E[-lam ln lam - (1 - lam) ln (1 - lam)].

    psi(2 alpha + 1) - psi(alpha + 1) with the digamma function psi; from 0 (alpha 0) to ln 2 (alpha infinity).
    """
    if math.isinf(check_alpha(alpha)):
        return math.log(2)
    return float(digamma(2 * alpha + 1) - digamma(alpha + 1))


def loss_floor(alpha: float, class_counts: Sequence[int]) -> float:
    """The least mean cross-entropy in nats that training on mixed pairs can reach: the mean entropy of mixed labels.

    A pair of different rows is of two classes with probability n / (n - 1) (1 - sum_k p_k^2); only its label has an entropy. It
    is a floor where no two pairs give the same mixed picture.

    Args:
        alpha: of mixup.
        class_counts: training examples of each class.

    Raises:
        ConfigError: there are fewer than two examples.
    """
    return _share_of_two_classes(class_counts) * label_entropy(alpha)


def _share_of_two_classes(class_counts: Sequence[int]) -> float:
    """Share of the pairs of different rows that are of two classes."""
    total = sum(class_counts)
    if total < 2:
        raise ConfigError(f"mixup needs two examples or more, but the counts of classes sum to {total}.")
    return 1 - sum(count * (count - 1) for count in class_counts) / (total * (total - 1))


def total_smoothing(theta_bar: float, label_smoothing: float) -> float:
    """The share of a label's weight that mixup and label smoothing take away together: 1 - (1 - smoothing) theta_bar.

    Mixup alone is label smoothing by 1 - theta_bar toward the class frequencies (Carratino et al., 2022).
    """
    return 1 - (1 - label_smoothing) * theta_bar


def best_train_accuracy(alpha: float, class_counts: Sequence[int]) -> float:
    """The most that training accuracy on mixed pairs of different rows can be, counted by the weight of the predicted label.

    It counts lam where the prediction is the first label and 1 - lam where it is the second: at best max(lam, 1 - lam), theta_bar
    on average, for a pair of two classes, and 1 for a pair of one class.

    Args:
        alpha: of mixup.
        class_counts: training examples of each class.

    Raises:
        ConfigError: there are fewer than two examples.
    """
    return 1 - _share_of_two_classes(class_counts) * (1 - mixing_moments(alpha).theta_bar)
