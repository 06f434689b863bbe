"""Does the calibration report see what is there, and nothing that is not?"""

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from bit_mixup import calibration, plots
from bit_mixup.calibration import (
    NoiseFloor,
    ReliabilityBins,
    expected_calibration_error_floor,
    fit_temperature,
    judge_gap,
    measure_calibration,
    reliability_bins,
)
from bit_mixup.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from bit_mixup.plots import figure_svg, reliability_diagram, save_figure

DRAWN_BINS = ReliabilityBins(
    edges=[0.0, 0.5, 1.0], count=[4, 3, 1], confidence=[0.3, 0.7, 1.0], accuracy=[0.5, 1 / 3, 1.0]
)  # and, with the bin of confidence 1 in its neighbour, [4, 4], [0.3, 0.775], [0.5, 0.5]


def sample(count: int, classes: int, *, seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits of a calibrated model, whose labels are drawn from its own softmax; `scale` multiplies the logits after that."""
    numbers = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=numbers, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=numbers)[:, 0]
    return scale * logits, labels


def errors_of(bins: ReliabilityBins) -> tuple[float, float]:
    """ECE and MCE of bins, by their definitions."""
    occupied = bins.occupied()
    return sum(share * abs(sure - right) for share, sure, right in occupied), max(
        abs(sure - right) for _, sure, right in occupied
    )


def two_class(predictions: list[tuple[float, bool]]) -> tuple[Tensor, Tensor]:
    """Probabilities (N, 2) and labels from pairs: the first class's probability, and whether the prediction is right."""
    first = torch.tensor([p for p, _ in predictions], dtype=torch.float64)
    probs = torch.stack([first, 1 - first], 1)
    predicted = probs.argmax(1)
    return probs, torch.where(torch.tensor([right for _, right in predictions]), predicted, 1 - predicted)


def test_bins_by_hand() -> None:
    probs, labels = two_class([(0.5, True), (0.51, False), (0.75, True), (0.1, True), (0.999, False), (1.0, True), (0.0, False)])
    bins = reliability_bins(probs, labels, num_bins=4)
    assert bins.edges == [0, 0.25, 0.5, 0.75, 1]
    assert bins.count == [0, 0, 2, 3, 2], "confidence on an edge belongs to the bin above, and 1 to a bin of its own"
    assert bins.confidence == [None, None, pytest.approx(0.505), pytest.approx((0.75 + 0.9 + 0.999) / 3), 1.0]
    assert bins.accuracy == [None, None, 0.5, pytest.approx(2 / 3), 0.5]
    shares, sure, right = zip(*bins.occupied(), strict=True)
    assert (shares, right) == ((2 / 7, 3 / 7, 2 / 7), (0.5, pytest.approx(2 / 3), 0.5))
    assert sure == tuple(bins.confidence[2:])


@pytest.mark.parametrize(("count", "classes"), [(1, 2), (7, 3), (300, 2), (400, 10), (2000, 37)])
@pytest.mark.parametrize("num_bins", [1, 10, 15, 40])
def test_errors_are_those_of_torchmetrics(count: int, classes: int, num_bins: int) -> None:
    logits, labels = sample(count, classes, seed=count, scale=0.7)
    probs = logits.softmax(1)
    confidence, predicted = probs.max(1)
    report = measure_calibration(logits, labels, num_bins=num_bins)
    reported = report.expected_calibration_error, report.maximum_calibration_error
    for ours, by_report, norm in zip(
        errors_of(reliability_bins(probs, labels, num_bins=num_bins)), reported, ("l1", "max"), strict=True
    ):
        double = float(binary_calibration_error(confidence, (predicted == labels).long(), n_bins=num_bins, norm=norm))
        single = float(multiclass_calibration_error(probs, labels, num_classes=classes, n_bins=num_bins, norm=norm))
        assert ours == pytest.approx(double, abs=1e-12)
        assert by_report == pytest.approx(double, abs=1e-12)
        assert ours == pytest.approx(single, abs=1e-5), "the multiclass function sums in single precision"


@given(st.lists(st.tuples(st.integers(0, 64), st.booleans()), min_size=1, max_size=60), st.sampled_from([1, 2, 4, 8, 16, 32]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_errors_are_those_of_torchmetrics_on_edges(predictions: list[tuple[int, bool]], num_bins: int) -> None:
    """Confidences in 64ths, which are exact in both precisions: many are 1, or on an edge of the bins."""
    probs, labels = two_class([(p / 64, right) for p, right in predictions])
    for ours, norm in zip(errors_of(reliability_bins(probs, labels, num_bins=num_bins)), ("l1", "max"), strict=True):
        theirs = multiclass_calibration_error(probs, labels, num_classes=2, n_bins=num_bins, norm=norm)
        assert ours == pytest.approx(float(theirs), abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_errors_are_those_of_torchmetrics_anywhere(predictions: list[tuple[float, bool]], num_bins: int) -> None:
    probs, labels = two_class(predictions)
    confidence, predicted = probs.max(1)
    for ours, norm in zip(errors_of(reliability_bins(probs, labels, num_bins=num_bins)), ("l1", "max"), strict=True):
        theirs = binary_calibration_error(confidence, (predicted == labels).long(), n_bins=num_bins, norm=norm)
        assert ours == pytest.approx(float(theirs), abs=1e-12)


def test_many_examples_do_not_drift() -> None:
    """50,000 confidences of 0.998, of which 100 are wrong: a running sum in single precision is off by more than 1e-4."""
    logits = torch.tensor([[math.log(0.998 / 0.002), 0.0]], dtype=torch.float64).expand(50_000, 2)
    labels = (torch.arange(50_000) < 100).long()
    assert measure_calibration(logits, labels).expected_calibration_error == pytest.approx(0, abs=1e-10)
    assert multiclass_calibration_error(logits.softmax(1), labels, num_classes=2) > 1e-4


def test_nearly_1_is_not_1() -> None:
    probs, labels = two_class([(1 - 1e-9, True), (0.95, False)])
    assert reliability_bins(probs, labels).count == [0] * 14 + [2, 0]
    assert measure_calibration(probs.log(), labels).maximum_calibration_error == pytest.approx(0.475)


def test_report_follows_the_definitions() -> None:
    logits, labels = sample(200, 5, seed=1, scale=1.7)
    report = measure_calibration(logits, labels)
    pairs = [(row, label) for row, label in zip(logits.softmax(1).tolist(), labels.tolist(), strict=True)]
    predictions = [(max(row), row.index(max(row)) == label) for row, label in pairs]
    held: dict[int, list[tuple[float, bool]]] = {}
    for sure, right in predictions:
        held.setdefault(int(sure * 15), []).append((sure, right))
    bins = [(len(inside), *(sum(values) / len(inside) for values in zip(*inside, strict=True))) for inside in held.values()]
    assert report.num_examples == 200
    assert report.accuracy == sum(right for _, right in predictions) / 200
    assert report.mean_confidence == pytest.approx(sum(sure for sure, _ in predictions) / 200, abs=1e-12)
    assert report.gap == pytest.approx(report.mean_confidence - report.accuracy, abs=1e-12)
    assert report.gap_error == pytest.approx(math.sqrt(sum(sure * (1 - sure) for sure, _ in predictions)) / 200, abs=1e-12)
    assert report.expected_calibration_error == pytest.approx(sum(n * abs(s - r) for n, s, r in bins) / 200, abs=1e-12)
    assert report.maximum_calibration_error == pytest.approx(max(abs(s - r) for _, s, r in bins), abs=1e-12)
    assert report.over_confidence == pytest.approx(sum(n * s * max(s - r, 0) for n, s, r in bins) / 200, abs=1e-12)
    assert any(s < r for _, s, r in bins), "some bin is under-confident, or the maximum in that sum would not matter"
    assert report.nll == pytest.approx(-sum(math.log(row[label]) for row, label in pairs) / 200, abs=1e-12)
    brier = sum((p - (k == label)) ** 2 for row, label in pairs for k, p in enumerate(row)) / 200
    assert report.brier == pytest.approx(brier, abs=1e-12)
    assert report.mean_entropy == pytest.approx(-sum(p * math.log(p) for row, _ in pairs for p in row) / 200, abs=1e-12)
    assert report.bins == reliability_bins(logits.softmax(1), labels)
    assert report.floor == expected_calibration_error_floor(logits.softmax(1).max(1).values)


@given(st.lists(st.tuples(st.tuples(*[st.floats(-40, 40)] * 3), st.integers(0, 2)), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_scores_stay_in_their_ranges_and_in_order(examples: list[tuple[tuple[float, float, float], int]]) -> None:
    report = measure_calibration(torch.tensor([row for row, _ in examples]), torch.tensor([label for _, label in examples]))
    slack = 1e-9
    assert abs(report.gap) <= report.expected_calibration_error + slack
    assert report.over_confidence <= report.expected_calibration_error + slack
    assert report.expected_calibration_error <= report.maximum_calibration_error + slack <= 1 + 2 * slack
    assert 0 <= report.brier <= 2 + slack
    assert 0 <= report.mean_entropy <= math.log(3) + slack
    assert report.nll >= 0
    assert 0 <= report.floor.mean <= 1
    assert sum(report.bins.count) == report.num_examples == len(examples)


def test_the_order_of_examples_does_not_matter() -> None:
    logits, labels = sample(300, 4, seed=2)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    first, second = (measure_calibration(logits[rows], labels[rows]).as_dict() for rows in (torch.arange(300), order))
    assert first.pop("floor") == second.pop("floor"), "to the bit"
    bins, other_bins = first.pop("bins"), second.pop("bins")
    assert bins["count"] == other_bins["count"]
    assert first.pop("verdict") == second.pop("verdict")
    assert first == pytest.approx(second, abs=1e-12)


def test_any_precision_and_gradient_will_do() -> None:
    logits, labels = sample(100, 4, seed=7)
    wanted = measure_calibration(logits.bfloat16(), labels)
    assert measure_calibration(logits.bfloat16().double().requires_grad_(), labels.int()) == wanted
    assert fit_temperature(logits.requires_grad_(), labels).num_examples == 100


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        ([[0.0, 0.0]], [1]),
        ([[1e5, 0.0], [0.0, 1e5]], [0, 0]),
        ([[1e5, 0.0, 0.0]], [0]),
        ([[7.0] * 3] * 5, [0, 1, 2, 0, 1]),
    ],
)
def test_degenerate_samples_give_plain_numbers(logits: list[list[float]], labels: list[int]) -> None:
    report = measure_calibration(torch.tensor(logits), torch.tensor(labels))
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False)) == report.as_dict()
    assert report.summary()
    json.dumps(fit_temperature(torch.tensor(logits), torch.tensor(labels)).__dict__, allow_nan=False)


def test_confidence_1_is_believed_until_it_is_wrong() -> None:
    logits = torch.tensor([[1e5, 0.0]] * 4)
    right = measure_calibration(logits, torch.zeros(4, dtype=torch.int64))
    assert (right.gap_error, right.floor, right.verdict) == (0, NoiseFloor(mean=0, upper=0), "not distinguishable")
    assert right.bins.count == [0] * 15 + [4]
    wrong = measure_calibration(logits, torch.tensor([0, 0, 0, 1]))
    assert (wrong.gap, wrong.brier, wrong.over_confidence, wrong.verdict) == (0.25, 0.5, 0.25, "over-confident")


def test_summary_puts_the_floor_beside_the_error() -> None:
    report = measure_calibration(*sample(50, 3, seed=0), num_bins=10)
    floor = NoiseFloor(mean=0.025, upper=0.035)
    report = replace(report, expected_calibration_error=0.0312, floor=floor, gap=-0.02, gap_error=0.01, verdict="under-confident")
    rows = dict(report.summary())
    assert rows["calibration error (10 bins)"] == "0.0312 (a calibrated model scores 0.0250 here, 95 % below 0.0350)"
    assert rows["confidence less accuracy"] == "-0.0200 +- 0.0100 (under-confident)"


def test_a_calibrated_model_is_rarely_accused() -> None:
    """1,000 samples of 500: the test at 5 % errs about 50 times, in both directions."""
    numbers = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(1000, 500, 5, generator=numbers, dtype=torch.float64)).softmax(2)
    draws = torch.rand(1000, 500, 1, generator=numbers, dtype=torch.float64)
    labels = (probs.cumsum(2)[:, :, :-1] <= draws).sum(2)
    confidence, predicted = probs.max(2)
    gaps = (confidence - (predicted == labels).double()).mean(1)
    gap_errors = (confidence * (1 - confidence)).sum(1).sqrt() / 500
    verdicts = [judge_gap(gap, error, 500) for gap, error in zip(gaps.tolist(), gap_errors.tolist(), strict=True)]
    assert 0.93 <= verdicts.count("not distinguishable") / 1000 <= 0.97
    assert verdicts.count("over-confident") >= 10
    assert verdicts.count("under-confident") >= 10


@pytest.mark.parametrize("count", [1, 2, 5, 20, 100])
def test_no_small_sample_is_accused_too_often(count: int) -> None:
    """The exact probability of a wrong verdict, where all confidences are equal and right predictions binomial."""
    for sure in (0.5, 0.6, 0.7, 0.8, 0.9, 0.94, 0.97, 0.99, 0.999):
        gap_error = math.sqrt(sure * (1 - sure) / count)
        accused = [k for k in range(count + 1) if judge_gap(sure - k / count, gap_error, count) != "not distinguishable"]
        assert sum(math.comb(count, k) * sure**k * (1 - sure) ** (count - k) for k in accused) <= 0.05


@pytest.mark.parametrize(("scale", "verdict"), [(2.0, "over-confident"), (0.5, "under-confident"), (1.0, "not distinguishable")])
def test_verdict_and_floor_see_a_fault(scale: float, verdict: str) -> None:
    report = measure_calibration(*sample(2000, 10, seed=3, scale=scale))
    assert report.verdict == verdict
    assert (report.expected_calibration_error < report.floor.upper) == (scale == 1)


def test_floor_is_near_the_closed_form() -> None:
    """Bins hold many predictions: the sum of their errors is nearly normal, with mean size sqrt(2 / pi * sum c (1 - c))."""
    confidence = sample(5000, 10, seed=4)[0].softmax(1).max(1).values
    for num_bins in (5, 15):
        index = (confidence * num_bins).long()
        variances = [float((confidence * (1 - confidence))[index == m].sum()) for m in range(num_bins)]
        expected = sum(math.sqrt(2 / math.pi * variance) for variance in variances) / 5000
        floor = expected_calibration_error_floor(confidence, num_bins=num_bins)
        assert floor.mean == pytest.approx(expected, rel=0.03)


def test_floor_of_one_prediction_is_known() -> None:
    """Right, with probability 0.8, it errs by 0.2, and else by 0.8."""
    floor = expected_calibration_error_floor(torch.tensor([0.8]), draws=20_000)
    assert floor.mean == pytest.approx(0.32, abs=4 * 0.24 / math.sqrt(20_000))
    assert floor.upper == pytest.approx(0.8)


def test_floor_is_a_function_of_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    confidence = sample(200, 10, seed=4)[0].softmax(1).max(1).values
    floor = expected_calibration_error_floor(confidence, draws=100)
    assert expected_calibration_error_floor(confidence, draws=100, seed=1) != floor
    logits, labels = sample(200, 10, seed=4)
    wanted = expected_calibration_error_floor(confidence, num_bins=5, seed=1)
    assert measure_calibration(logits, labels, num_bins=5, seed=1).floor == wanted
    monkeypatch.setattr(calibration, "DRAWN_AT_ONCE", 1_300)
    assert expected_calibration_error_floor(confidence, draws=100) == floor, "however many are drawn at once"


def test_calibrated_samples_stay_below_the_upper_floor_in_95_of_100() -> None:
    probs = sample(400, 6, seed=5)[0].softmax(1)
    floor = expected_calibration_error_floor(probs.max(1).values)
    labels = torch.multinomial(probs, 600, replacement=True, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([errors_of(reliability_bins(probs, drawn))[0] for drawn in labels.T], dtype=torch.float64)
    assert 0.92 <= float((scores <= floor.upper).double().mean()) <= 0.98
    assert float(scores.mean()) == pytest.approx(floor.mean, rel=0.04)


@pytest.mark.parametrize("scale", [0.05, 0.3, 4.0, 40.0])
def test_temperature_follows_the_scale_of_logits(scale: float) -> None:
    logits, labels = sample(2000, 6, seed=5)
    fit = fit_temperature(logits, labels)
    assert fit.temperature == pytest.approx(1, abs=0.06)
    assert (fit.bounded, fit.note) == (False, "")
    scaled = fit_temperature(scale * logits, labels)
    assert scaled.temperature == pytest.approx(scale * fit.temperature, rel=1e-6)
    assert scaled.nll_after == pytest.approx(fit.nll_after, abs=1e-9)
    shifted = fit_temperature(logits + 100 * torch.arange(2000)[:, None], labels)
    assert shifted.temperature == pytest.approx(fit.temperature, rel=1e-6), "the softmax knows no common offset"


@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_temperature_is_the_best_of_a_grid(scale: float) -> None:
    logits, labels = sample(150, 4, seed=6, scale=scale)
    fit = fit_temperature(logits, labels)
    nlls = {t: float(F.cross_entropy(logits / t, labels)) for t in (math.exp(k / 500) for k in range(-1500, 1500))}
    best = min(nlls, key=lambda t: nlls[t])
    assert fit.temperature == pytest.approx(best, rel=2e-3)
    assert fit.nll_after <= nlls[best] + 1e-12
    assert fit.nll_before == pytest.approx(nlls[1.0], abs=1e-12)
    assert fit.nll_after == pytest.approx(float(F.cross_entropy(logits / fit.temperature, labels)), abs=1e-12)
    assert "150 examples" in fit.note


@given(st.integers(0, 500), st.floats(0.02, 50))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_fit_never_loses_and_mends_the_scale(seed: int, scale: float) -> None:
    logits, labels = sample(40, 3, seed=seed, scale=scale)
    fit = fit_temperature(logits, labels)
    assert fit.nll_after <= fit.nll_before + 1e-12
    assert 0.01 - 1e-12 <= fit.temperature <= 100 + 1e-9
    assert fit_temperature(logits / fit.temperature, labels).temperature == pytest.approx(1, rel=1e-6) or fit.bounded


@pytest.mark.parametrize("size", [3.0, 1e5])
def test_temperature_of_one_sided_data_is_a_bound(size: float) -> None:
    classes = torch.arange(600) % 3
    logits = size * F.one_hot(classes, 3)
    for labels, temperature in ((classes, 0.01), ((classes + 1) % 3, 100.0)):
        fit = fit_temperature(logits, labels)
        assert fit.bounded
        assert fit.temperature == pytest.approx(temperature)
        assert "end of its range" in fit.note


def test_temperature_of_equal_logits_is_1() -> None:
    fit = fit_temperature(torch.full((5, 3), 0.1), torch.tensor([0, 1, 2, 0, 1]))
    assert (fit.temperature, fit.bounded) == (1.0, False)
    assert fit.nll_after == pytest.approx(math.log(3))


def test_note_names_few_examples_below_500() -> None:
    logits, labels = sample(500, 3, seed=8)
    assert fit_temperature(logits, labels).note == ""
    assert "499 examples" in fit_temperature(logits[1:], labels[1:]).note


@pytest.mark.parametrize("function", [measure_calibration, fit_temperature, reliability_bins])
def test_what_does_not_fit_is_refused(function: Callable[[Tensor, Tensor], object]) -> None:
    none, two = torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    for scores, labels in ((torch.zeros(0, 3), none), (torch.zeros(2, 1), two), (torch.zeros(3, 3), two), (torch.zeros(2), two)):
        with pytest.raises(DataError, match="do not fit"):
            function(scores, labels)
    for labels in (torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(DataError, match="from 0 to 2"):
            function(torch.zeros(2, 3), labels)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(NonFiniteError, match="example 1 "):
            function(torch.tensor([[0.0, 1.0], [bad, 1.0]]), two)


def test_what_is_no_probability_is_refused() -> None:
    with pytest.raises(DataError, match="softmax"):
        reliability_bins(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
    for confidences in (
        torch.tensor([0.5, 1.5]),
        torch.tensor([-0.1]),
        torch.tensor([math.nan]),
        torch.zeros(0),
        torch.zeros(2, 2),
    ):
        with pytest.raises(DataError, match="from 0 to 1"):
            expected_calibration_error_floor(confidences)
    with pytest.raises(ConfigError, match="num_bins is 0"):
        measure_calibration(torch.eye(2), torch.arange(2), num_bins=0)
    with pytest.raises(ConfigError, match="draws is 0"):
        expected_calibration_error_floor(torch.tensor([0.5]), draws=0)


def test_diagram_shows_the_bins() -> None:
    figure = reliability_diagram(DRAWN_BINS, title="digits")
    above, below = figure.axes
    figure.draw_without_rendering()
    assert not any(figure.legends[0].get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert above.get_title(loc="left") == "digits"
    assert [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in below.patches] == [(0, 0.5, 4), (0.5, 0.5, 4)]
    assert [text.get_text() for text in below.texts] == ["4", "4"]
    base, over, under = above.containers
    assert [bar.get_height() for bar in base] == pytest.approx([0.3, 0.5])
    assert [(bar.get_x(), bar.get_y(), bar.get_height()) for bar in over] == [(0.5, pytest.approx(0.5), pytest.approx(0.275))]
    assert [(bar.get_x(), bar.get_y(), bar.get_height()) for bar in under] == [(0, pytest.approx(0.5), pytest.approx(-0.2))]
    accuracy = above.collections[0].get_segments()
    assert [(line[0][0], line[1][0], line[0][1]) for line in accuracy] == [(0, 0.5, 0.5), (0.5, 1, pytest.approx(0.5))]
    assert above.get_legend_handles_labels()[1].count("calibrated") == 1
    assert above.get_shared_x_axes().joined(above, below)
    assert above.get_xlim() == (0, 1)


def test_diagram_of_empty_bins_and_large_counts() -> None:
    bins = ReliabilityBins(edges=[0.0, 0.5, 1.0], count=[0, 9999, 12_345], confidence=[None, 0.9, 1.0], accuracy=[None, 1.0, 1.0])
    _, below = reliability_diagram(bins, title="").axes
    assert [text.get_text() for text in below.texts] == ["22k"]
    assert below.patches[0].get_x() == 0.5
    assert below.get_ylim()[1] > 23_000, "there is room for the number above the bar"
    above, _ = reliability_diagram(replace(bins, count=[0, 9999, 0], confidence=[None, 0.9, None]), title="").axes
    assert [bar.get_height() for bar in above.containers[0]] == pytest.approx([0.9]), "an empty bin adds nothing to its neighbour"


def test_figures_are_files_of_the_same_bytes_every_time(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    for suffix in (".png", ".svg"):
        first, second, third = (tmp_path / "new" / f"{name}{suffix}" for name in "abc")
        figure = reliability_diagram(DRAWN_BINS, title="digits")
        save_figure(figure, first)
        save_figure(figure, second)
        with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "none", "savefig.facecolor": "red"}):
            save_figure(reliability_diagram(DRAWN_BINS, title="digits"), third)
        assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    assert len(list((tmp_path / "new").iterdir())) == 6, "and nothing else is left"
    assert dict(matplotlib.rcParams) == before
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.size == (900, 900)
        assert "Software" not in image.info
    text = (tmp_path / "new" / "a.svg").read_text(encoding="utf-8")
    assert "dc:date" not in text
    assert matplotlib.__version__ not in text


def test_a_figure_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.svg"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", fail)
        with pytest.raises(CheckpointError, match="gone"):
            save_figure(Figure(), path)
    assert path.read_text() == "old"
    save_figure(Figure(), path.with_suffix(".PNG"))
    assert path.with_suffix(".PNG").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("title", ["<script>alert(1)</script> & co", r"$\frac$ costs 5", "--><b>", "a\x00b\x0b\nc", "x " * 300])
def test_titles_are_plain_text(title: str) -> None:
    figure = reliability_diagram(DRAWN_BINS, title=title)
    lines = figure.axes[0].get_title(loc="left").split("\n")
    assert all(line.isprintable() and len(line) <= 64 for line in lines)
    assert len(lines) <= 3
    assert title.startswith(lines[0]) or "\x00" in title
    svg = figure_svg(figure)
    assert svg.startswith("<svg")
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert "<script" not in svg
    assert "<b>" not in svg
    assert svg == figure_svg(reliability_diagram(DRAWN_BINS, title=title))


def test_figures_that_can_not_be_drawn_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.pdf", "a", ".png"):
        with pytest.raises(ConfigError, match="must end in"):
            save_figure(Figure(), tmp_path / name)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        reliability_diagram(DRAWN_BINS, title="")


def test_importing_plots_is_cheap_and_drawing_needs_no_window() -> None:
    program = """if True:
        import sys
        from types import SimpleNamespace
        from bit_mixup.plots import figure_svg, reliability_diagram
        assert not {"matplotlib", "torch"} & set(sys.modules)
        bins = SimpleNamespace(edges=[0.0, 1.0], count=[1, 0], confidence=[0.5, None], accuracy=[1.0, None])
        figure_svg(reliability_diagram(bins, title=""))
        assert "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)
