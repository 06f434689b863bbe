"""Does a model's confidence mean what it says?

Confidence is the probability of the predicted class; a model is calibrated if, of the predictions made with confidence c, the
share c is right. The calibration errors come from torchmetrics. Here is what it lacks: what they are for a calibrated model on so
few examples, which way a model errs, and the temperature that mends it.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from bit_mixup.errors import ConfigError, DataError, NonFiniteError
from bit_mixup.sampling import Purpose, generator

NUM_BINS = 15  # as in table 1 of Guo et al., 2017
DRAWS = 1000  # samples of a calibrated model; about a second for 50,000 examples
DRAWN_AT_ONCE = 2**18  # random numbers, so that more draws take no more memory
CRITICAL = 1.959964  # standard errors that chance exceeds in 5 % of cases, on both sides together
COOLEST, HOTTEST = 0.01, 100.0  # temperatures between which one is sought
FEW_EXAMPLES = 500  # below this a fitted temperature is itself uncertain

Verdict = Literal["over-confident", "under-confident", "not distinguishable"]


@dataclass(frozen=True, kw_only=True)
class ReliabilityBins:
    """Predictions sorted by confidence into M bins of equal width, and one more for confidence 1.

    The rule is torchmetrics': bin m holds edges[m] <= confidence < edges[m + 1], so a confidence on an edge belongs to the bin
    above it, and confidence of exactly 1 has the last bin to itself. (Guo et al., 2017, section 2, close bins at the upper edge.)

    Args:
        edges: lower edge of each bin: 0, 1 / M, ..., 1, that is M + 1 numbers.
        count: predictions in each bin.
        confidence: their mean confidence, from 0 to 1; None for an empty bin.
        accuracy: share of them that is right, from 0 to 1; None for an empty bin.
    """

    edges: list[float]
    count: list[int]
    confidence: list[float | None]
    accuracy: list[float | None]

    def occupied(self) -> list[tuple[float, float, float]]:
        """Share of all predictions, mean confidence and accuracy of each bin that is not empty."""
        total = sum(self.count)
        return [
            (count / total, confidence, accuracy)
            for count, confidence, accuracy in zip(self.count, self.confidence, self.accuracy, strict=True)
            if confidence is not None and accuracy is not None
        ]


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """Expected calibration error that a calibrated model scores by chance, with given confidences on a sample of their number.

    Args:
        mean: over samples.
        upper: 95 % of samples stay below it.
    """

    mean: float
    upper: float


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """How far a model's confidence can be believed. Numbers are shares from 0 to 1 where no unit is given.

    Args:
        num_examples: N, measured on.
        accuracy: share of predictions that is right.
        mean_confidence: mean probability of the predicted class.
        gap: mean confidence less accuracy, from -1 to 1.
        gap_error: standard error of the gap of a calibrated model, sqrt(sum of c (1 - c)) / N over confidences c.
        verdict: whether the gap is more than chance explains, and which way.
        expected_calibration_error: mean distance of a bin's accuracy from its confidence, weighted by count (ECE; Guo et al.,
            2017, section 2).
        floor: the expected calibration error of a calibrated model.
        maximum_calibration_error: largest such distance (MCE; same place).
        over_confidence: mean of confidence * max(confidence - accuracy, 0) of bins, weighted by count (Thulasidasan et al.,
            2019).
        nll: mean negative log-likelihood, in nats.
        brier: mean squared distance between probabilities and label, from 0 to 2.
        mean_entropy: mean entropy of the predicted distributions, in nats, from 0 to log K.
        bins: what a reliability diagram shows.
    """

    num_examples: int
    accuracy: float
    mean_confidence: float
    gap: float
    gap_error: float
    verdict: Verdict
    expected_calibration_error: float
    floor: NoiseFloor
    maximum_calibration_error: float
    over_confidence: float
    nll: float
    brier: float
    mean_entropy: float
    bins: ReliabilityBins

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def summary(self) -> list[tuple[str, str]]:
        """Names and values for people, less accuracy and NLL, which any report of scores has."""
        floor = f"a calibrated model scores {self.floor.mean:.4f} here, 95 % below {self.floor.upper:.4f}"
        return [
            (f"calibration error ({len(self.bins.count) - 1} bins)", f"{self.expected_calibration_error:.4f} ({floor})"),
            ("largest calibration error of a bin", f"{self.maximum_calibration_error:.4f}"),
            ("confidence less accuracy", f"{self.gap:+.4f} +- {self.gap_error:.4f} ({self.verdict})"),
            ("over-confidence error", f"{self.over_confidence:.4f}"),
            ("Brier score", f"{self.brier:.4f}"),
            ("mean entropy (nats)", f"{self.mean_entropy:.4f}"),
        ]


def reliability_bins(probs: Tensor, labels: Tensor, *, num_bins: int = NUM_BINS) -> ReliabilityBins:
    """Sorts predictions into bins of confidence, in double precision.

    Args:
        probs: (N, K) in [0, 1].
        labels: (N,) whole numbers from 0 to K - 1.
        num_bins: M, 1 or more.

    Raises:
        ConfigError: num_bins is below 1.
        DataError: no examples, shapes that do not fit, a label that is no class, or numbers that are not probabilities.
        NonFiniteError: a probability is not a finite number.
    """
    probs, labels = _checked(probs, labels, name="probabilities")
    confidence, predicted = probs.max(1)
    _check_confidence(confidence)
    edges = _edges(num_bins)
    index = torch.bucketize(confidence, edges, right=True) - 1
    count = torch.bincount(index, minlength=len(edges))

    def means(values: Tensor) -> list[float | None]:
        sums = torch.zeros_like(edges).scatter_add_(0, index, values.double())
        return [total / size if size else None for total, size in zip(sums.tolist(), count.tolist(), strict=True)]

    return ReliabilityBins(
        edges=edges.tolist(), count=count.tolist(), confidence=means(confidence), accuracy=means(predicted == labels)
    )


def expected_calibration_error_floor(
    confidences: Tensor, *, num_bins: int = NUM_BINS, seed: int = 0, draws: int = DRAWS
) -> NoiseFloor:
    """Draws the expected calibration error of a calibrated model, whose predictions are right as often as they claim.

    Chance alone moves the accuracy of each bin, and the error takes absolute values: it is above 0 for every model, about
    sum over bins of sqrt(2 / pi * sum of c (1 - c)) / N where bins are large.

    Args:
        confidences: (N,) in [0, 1].
        num_bins: of the error.
        seed: of the draws.
        draws: of the whole sample.

    Raises:
        ConfigError: num_bins or draws is below 1, or a negative seed.
        DataError: no confidences, or some outside [0, 1].
    """
    if draws < 1:
        raise ConfigError(f"draws is {draws}; it must be at least 1.")
    _check_confidence(confidences)
    # In rising order a bin is a slice, and the order of examples has no say in what is drawn for them.
    sure = np.sort(confidences.detach().cpu().double().numpy())
    index = np.searchsorted(_edges(num_bins).numpy(), sure, side="right")
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    claimed = np.add.reduceat(sure, starts)
    rng = generator(seed, Purpose.CALIBRATION)
    rows = max(1, DRAWN_AT_ONCE // len(sure))
    errors = []
    for first in range(0, draws, rows):
        correct = rng.random((min(rows, draws - first), len(sure))) < sure
        right = np.add.reduceat(correct, starts, axis=1, dtype=np.int64)
        errors.append(np.abs(right - claimed).sum(1) / len(sure))
    scores = np.concatenate(errors)
    return NoiseFloor(mean=float(scores.mean()), upper=float(np.quantile(scores, 0.95)))


def judge_gap(gap: float, gap_error: float, num_examples: int) -> Verdict:
    """Whether mean confidence less accuracy is more than chance explains: a two-sided normal test at 5 %.

    The number of right predictions is whole, so the gap moves in steps of 1 / N; half a step is granted (continuity correction).
    Without it a single wrong prediction among a hundred very sure ones would count as proof.

    Args:
        gap: mean confidence less accuracy, from -1 to 1.
        gap_error: its standard error for a calibrated model.
        num_examples: N.
    """
    if abs(gap) - 0.5 / num_examples <= CRITICAL * gap_error:
        return "not distinguishable"
    return "over-confident" if gap > 0 else "under-confident"


def measure_calibration(logits: Tensor, labels: Tensor, *, num_bins: int = NUM_BINS, seed: int = 0) -> CalibrationReport:
    """Measures how far a model's confidence can be believed.

    Args:
        logits: (N, K) float, K at least 2.
        labels: (N,) whole numbers from 0 to K - 1.
        num_bins: of the calibration errors.
        seed: of the noise floor's draws.

    Raises:
        ConfigError: num_bins is below 1, or a negative seed.
        DataError: no examples, shapes that do not fit, or a label that is no class.
        NonFiniteError: a logit is not a finite number.
    """
    logits, labels = _checked(logits, labels, name="logits")
    probs = logits.softmax(1)
    confidence, predicted = probs.max(1)
    correct = predicted == labels
    bins = reliability_bins(probs, labels, num_bins=num_bins)
    gap = float((confidence - correct.double()).mean())
    gap_error = math.sqrt(float((confidence * (1 - confidence)).sum())) / len(labels)
    entropy: Tensor = torch.special.entr(probs).sum(1)
    return CalibrationReport(
        num_examples=len(labels),
        accuracy=float(correct.double().mean()),
        mean_confidence=float(confidence.mean()),
        gap=gap,
        gap_error=gap_error,
        verdict=judge_gap(gap, gap_error, len(labels)),
        expected_calibration_error=_calibration_error(confidence, correct, num_bins=num_bins, norm="l1"),
        floor=expected_calibration_error_floor(confidence, num_bins=num_bins, seed=seed),
        maximum_calibration_error=_calibration_error(confidence, correct, num_bins=num_bins, norm="max"),
        over_confidence=sum(share * sure * max(sure - right, 0.0) for share, sure, right in bins.occupied()),
        nll=float(F.cross_entropy(logits, labels)),
        brier=float((probs - F.one_hot(labels, logits.shape[1])).square().sum(1).mean()),
        mean_entropy=float(entropy.mean()),
        bins=bins,
    )


def _calibration_error(confidence: Tensor, correct: Tensor, *, num_bins: int, norm: Literal["l1", "max"]) -> float:
    """torchmetrics' calibration error of predictions (N,), in double precision.

    Its multiclass function does the same after a cast to single precision. There confidences above 1 - 3e-8 become 1 and leave
    their bin, and running sums drift: for 50,000 confidences of 0.998 by 5e-4, where chance rarely explains 4e-4.
    """
    return float(binary_calibration_error(confidence, correct.long(), n_bins=num_bins, norm=norm))


@dataclass(frozen=True, kw_only=True)
class TemperatureFit:
    """A temperature for logits, and what it gains on the examples that it was fitted on.

    Args:
        temperature: T, from 0.01 to 100: above 1 it makes a model less sure, below 1 surer.
        nll_before: mean negative log-likelihood at T = 1, in nats.
        nll_after: the same at the fitted T.
        num_examples: fitted on.
        bounded: T is the end of its range, and the best lies beyond: where all examples are right, the NLL falls with T for ever.
    """

    temperature: float
    nll_before: float
    nll_after: float
    num_examples: int
    bounded: bool

    @property
    def usable(self) -> float:
        """The temperature; 1 where it is the end of its range, for then the examples could not say which."""
        return 1.0 if self.bounded else self.temperature

    @property
    def note(self) -> str:
        """What to keep in mind about the fit, as sentences; empty where there is nothing."""
        notes = []
        if self.bounded:
            notes.append(
                f"The temperature {self.temperature:g} is the end of its range: right and wrong are too one-sided to fit it."
            )
        if self.num_examples < FEW_EXAMPLES:
            notes.append(
                f"The temperature was fitted on {self.num_examples:,} examples and is uncertain; hold out {FEW_EXAMPLES} or more."
            )
        return " ".join(notes)


def fit_temperature(logits: Tensor, labels: Tensor) -> TemperatureFit:
    """Fits T in softmax(logits / T) by maximum likelihood (Guo et al., 2017, eq. 9), on examples held out from training.

    Predicted classes stay as they are. With s = 1 / T the NLL is convex: its derivative is the mean over examples of
    E_q[z] - z_label, q = softmax(s z), and the derivative of that is the variance of z under q. So bisection of log s finds the
    minimum, whatever the logits. Where all logits of each example are equal every T is as good, and T is 1.

    Args:
        logits: (N, K) float, K at least 2.
        labels: (N,) whole numbers from 0 to K - 1.

    Raises:
        DataError: no examples, shapes that do not fit, or a label that is no class.
        NonFiniteError: a logit is not a finite number.
    """
    logits, labels = _checked(logits, labels, name="logits")
    margins = logits - logits.gather(1, labels[:, None])  # 0 for the label, so that the derivative is E_q of the margin

    def slope(log_scale: float) -> float:
        return float(((math.exp(log_scale) * margins).softmax(1) * margins).sum(1).mean())

    def nll(log_scale: float) -> float:
        return float((math.exp(log_scale) * margins).logsumexp(1).mean())

    log_scale, bounded = _rising_zero(slope, -math.log(HOTTEST), -math.log(COOLEST)) if margins.any() else (0.0, False)
    return TemperatureFit(
        temperature=math.exp(-log_scale),
        nll_before=nll(0.0),
        nll_after=nll(log_scale),
        num_examples=len(labels),
        bounded=bounded,
    )


def cross_fitted(logits: Tensor, labels: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Logits (N, K), each half of them divided by the temperature that was fitted on the other.

    Args:
        logits: (N, K) float.
        labels: (N,) whole numbers from 0 to K - 1.
        first: indices of one half.
        second: indices of the other; both together are all.
    """
    scaled = logits.clone()
    for own, other in ((first, second), (second, first)):
        scaled[own] /= fit_temperature(logits[other], labels[other]).usable
    return scaled


def _rising_zero(function: Callable[[float], float], low: float, high: float) -> tuple[float, bool]:
    """Where a rising function crosses 0, to 1e-10; or the end of the range that is nearest to it, and True."""
    if function(high) <= 0:
        return high, True
    if function(low) >= 0:
        return low, True
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2, False


def _edges(num_bins: int) -> Tensor:
    """Lower edges of the bins, (num_bins + 1,), to the bit as torchmetrics makes them."""
    if num_bins < 1:
        raise ConfigError(f"num_bins is {num_bins}; it must be at least 1 ({NUM_BINS} is usual).")
    return torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)


def _check_confidence(confidence: Tensor) -> None:
    if confidence.ndim != 1 or not len(confidence) or not ((confidence >= 0) & (confidence <= 1)).all():
        raise DataError(
            f"confidences of shape {tuple(confidence.shape)} are not one or more numbers from 0 to 1. "
            "They are the largest probability of each example: apply softmax to logits first."
        )


def _checked(scores: Tensor, labels: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
    """Scores (N, K) in double precision and labels (N,), both on the CPU and without gradient."""
    if scores.ndim != 2 or scores.shape[1] < 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise DataError(
            f"{name} {tuple(scores.shape)} and labels {tuple(labels.shape)} do not fit: expected (N, K) and (N,), with one "
            "example and two classes at least."
        )
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise DataError(
            f"labels are not all whole numbers from 0 to {scores.shape[1] - 1}: give the index of each example's class."
        )
    finite = scores.isfinite().all(1)
    if not finite.all():
        raise NonFiniteError(
            f"the {name} of example {int(finite.logical_not().nonzero()[0])} are not finite numbers: there is no confidence to "
            "measure. Look for where training began to diverge."
        )
    return scores.detach().cpu().double(), labels.cpu().long()
