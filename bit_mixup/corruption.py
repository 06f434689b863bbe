"""What does a model do with labels that are known to be wrong?"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bit_mixup.errors import ConfigError
from bit_mixup.sampling import Purpose, generator

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class CorruptedLabels:
    """Labels some of which were replaced, known which.

    Args:
        labels: to train on, (N,).
        true_labels: before, (N,).
    """

    labels: Labels
    true_labels: Labels

    @property
    def corrupted(self) -> npt.NDArray[np.bool_]:
        """Where labels were replaced, (N,)."""
        return np.not_equal(self.labels, self.true_labels)


def check_fraction(fraction: float) -> None:
    """Raises ConfigError unless the share of labels to corrupt lies in [0, 1]."""
    if not 0 <= fraction <= 1:
        raise ConfigError(f"corrupt_labels is {fraction}; it must be a share of the labels, from 0 to 1.")


def corrupt_labels(labels: Labels, fraction: float, *, num_classes: int, seed: int) -> CorruptedLabels:
    """Replaces exactly round(fraction * N) labels, each by one of the other classes, all of them alike.

    Zhang et al. ("mixup", 2018, table 2) replace 20, 50 and 80 % by random noise; here the true class is left out of the noise,
    so that each replaced label is wrong.

    Args:
        labels: (N,) from 0 to K - 1; left as they are.
        fraction: from 0 to 1.
        num_classes: K, at least 2.
        seed: of the draw.

    Raises:
        ConfigError: the fraction is out of its range, or there is no other class.
    """
    check_fraction(fraction)
    if num_classes < 2:
        raise ConfigError("labels can only be corrupted where there are two classes or more.")
    rng = generator(seed, Purpose.CORRUPTION)
    rows = rng.permutation(len(labels))[: round(fraction * len(labels))]
    replaced = labels.copy()
    replaced[rows] = (labels[rows] + rng.integers(1, num_classes, size=len(rows))) % num_classes
    return CorruptedLabels(labels=replaced, true_labels=labels.copy())


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """What became of real and of corrupted training labels, as shares from 0 to 1.

    Args:
        corrupted_examples: how many labels were replaced.
        error_on_real: training error on the labels that were left.
        error_on_corrupted: training error on the replaced labels; high means that they were not memorised.
        error_on_true: error on the same examples by their true labels; low means that the model saw through the noise.
    """

    corrupted_examples: int
    error_on_real: float | None
    error_on_corrupted: float | None
    error_on_true: float | None

    def as_text(self) -> str:
        """In a sentence."""
        real, corrupted, true = (
            "-" if value is None else f"{value:.1%}"
            for value in (self.error_on_real, self.error_on_corrupted, self.error_on_true)
        )
        return (
            f"{self.corrupted_examples:,} training labels were replaced by wrong ones. Training error: {real} on real labels, "
            f"{corrupted} on wrong ones (high: not memorised), where {true} of the true labels are missed."
        )


def memorisation(predictions: Labels, labels: CorruptedLabels) -> Memorisation:
    """Compares predictions for training examples (N,) with their real and corrupted labels."""

    def error(wanted: Labels, where: npt.NDArray[np.bool_]) -> float | None:
        return float((predictions != wanted)[where].mean()) if where.any() else None

    corrupted = labels.corrupted
    return Memorisation(
        corrupted_examples=int(corrupted.sum()),
        error_on_real=error(labels.labels, ~corrupted),
        error_on_corrupted=error(labels.labels, corrupted),
        error_on_true=error(labels.true_labels, corrupted),
    )
