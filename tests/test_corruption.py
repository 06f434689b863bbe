"""Are labels corrupted as asked, and is memorisation counted right?"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bit_mixup.corruption import CorruptedLabels, corrupt_labels, memorisation
from bit_mixup.errors import ConfigError


@given(st.integers(2, 12), st.integers(0, 80), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_exactly_the_share_asked_for_is_wrong(classes: int, count: int, fraction: float, seed: int) -> None:
    labels = np.arange(count) % classes
    before = labels.copy()
    noisy = corrupt_labels(labels, fraction, num_classes=classes, seed=seed)
    assert int(noisy.corrupted.sum()) == round(fraction * count)
    assert np.array_equal(labels, before)
    assert np.array_equal(noisy.true_labels, before)
    assert ((noisy.labels >= 0) & (noisy.labels < classes)).all()
    again = corrupt_labels(labels, fraction, num_classes=classes, seed=seed)
    assert np.array_equal(again.labels, noisy.labels)


def test_wrong_labels_are_spread_over_the_other_classes() -> None:
    labels = np.zeros(9_000, dtype=np.int64)
    noisy = corrupt_labels(labels, 1.0, num_classes=10, seed=0)
    counts = np.bincount(noisy.labels, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 850
    other = corrupt_labels(labels, 1.0, num_classes=10, seed=1)
    assert not np.array_equal(noisy.labels, other.labels)


def test_memorisation_by_hand() -> None:
    labels = CorruptedLabels(labels=np.array([0, 1, 2, 0, 1, 2]), true_labels=np.array([0, 1, 2, 1, 2, 0]))
    found = memorisation(np.array([0, 1, 0, 0, 2, 1]), labels)
    assert found.corrupted_examples == 3
    assert found.error_on_real == pytest.approx(1 / 3)
    assert found.error_on_corrupted == pytest.approx(2 / 3)
    assert found.error_on_true == pytest.approx(2 / 3)
    assert "3 training labels" in found.as_text()
    learnt_by_heart = memorisation(labels.labels, labels)
    assert (learnt_by_heart.error_on_real, learnt_by_heart.error_on_corrupted, learnt_by_heart.error_on_true) == (0, 0, 1)


def test_without_corruption_there_is_nothing_to_memorise() -> None:
    labels = corrupt_labels(np.array([0, 1]), 0.0, num_classes=2, seed=0)
    found = memorisation(np.array([0, 0]), labels)
    assert (found.error_on_real, found.error_on_corrupted) == (0.5, None)
    assert "- on wrong ones" in found.as_text()


def test_what_can_not_be_corrupted_is_refused() -> None:
    for fraction in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="corrupt_labels"):
            corrupt_labels(np.array([0, 1]), fraction, num_classes=2, seed=0)
    with pytest.raises(ConfigError, match="two classes"):
        corrupt_labels(np.array([0, 0]), 0.5, num_classes=1, seed=0)
