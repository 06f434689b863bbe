"""Are the scores what their definitions say? Each against plain loops in double precision."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score

from bit_mixup.errors import DataError, NonFiniteError
from bit_mixup.evaluation import evaluate


@pytest.fixture(scope="module")
def scored() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Logits of 300 examples of 7 classes that know something, and labels that leave class 6 out."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (300,), generator=generator)
    logits = 2 * torch.randn(300, 7, generator=generator)
    logits[torch.arange(300), labels] += 2
    return logits, labels, [f"class {index}" for index in range(7)]


def test_scores_follow_their_definitions(scored: tuple[torch.Tensor, torch.Tensor, list[str]]) -> None:
    logits, labels, names = scored
    report = evaluate(logits, labels, names)
    rows, truth = logits.double().tolist(), labels.tolist()
    order = [sorted(range(7), key=lambda k, row=row: -row[k]) for row in rows]
    assert report.num_examples == 300
    assert report.accuracy == pytest.approx(sum(o[0] == y for o, y in zip(order, truth, strict=True)) / 300)
    assert report.top5_accuracy == pytest.approx(sum(y in o[:5] for o, y in zip(order, truth, strict=True)) / 300)
    nll = sum(math.log(sum(map(math.exp, row))) - row[y] for row, y in zip(rows, truth, strict=True)) / 300
    assert report.nll == pytest.approx(nll, rel=1e-9)
    predicted = [o[0] for o in order]
    assert report.macro_f1 == pytest.approx(f1_score(truth, predicted, average="macro"), rel=1e-6)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert report.balanced_accuracy == pytest.approx(balanced_accuracy_score(truth, predicted), rel=1e-6)
    assert report.class_support == {name: truth.count(k) for k, name in enumerate(names)}
    assert report.class_accuracy["class 6"] is None
    for k in range(6):
        hits = [p == y for p, y in zip(predicted, truth, strict=True) if y == k]
        assert report.class_accuracy[f"class {k}"] == pytest.approx(sum(hits) / len(hits))


def test_calibration_error_against_a_loop_over_bins(scored: tuple[torch.Tensor, torch.Tensor, list[str]]) -> None:
    logits, labels, names = scored[0][:60], scored[1][:60], scored[2]  # few enough for bins that err in either direction
    probs = logits.double().softmax(1).numpy()
    confidence, hit = probs.max(1), probs.argmax(1) == labels.numpy()
    errors = {}
    for bins in (10, 15):
        errors[bins] = 0.0
        for index in range(bins):
            inside = (confidence > index / bins) & (confidence <= (index + 1) / bins)
            if inside.any():
                errors[bins] += inside.sum() / 60 * abs(hit[inside].mean() - confidence[inside].mean())
    assert abs(errors[10] - errors[15]) > 1e-3
    assert evaluate(logits, labels, names).calibration.expected_calibration_error == pytest.approx(errors[15], abs=1e-6)


def test_the_order_of_examples_does_not_matter(scored: tuple[torch.Tensor, torch.Tensor, list[str]]) -> None:
    logits, labels, names = scored
    order = torch.from_numpy(np.random.default_rng(0).permutation(300))
    one, other = evaluate(logits, labels, names), evaluate(logits[order], labels[order], names)
    assert one.accuracy == other.accuracy
    assert one.nll == pytest.approx(other.nll, rel=1e-12)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_five_classes_or_fewer_have_no_top_5(num_classes: int) -> None:
    labels = torch.arange(num_classes)
    report = evaluate(torch.eye(num_classes), labels, [str(k) for k in range(num_classes)])
    assert report.top5_accuracy is None
    assert report.accuracy == 1
    assert "top-5" not in report.table()


def test_class_names_can_not_break_the_table() -> None:
    report = evaluate(torch.eye(2), torch.arange(2), ["<script>|`x`\n", "b"])
    lines = [line for line in report.table().splitlines() if "script" in line]
    assert len(lines) == 1
    assert "<script>" not in lines[0]
    assert lines[0].replace("\\|", "").count("|") == 4


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="do not fit together"):
        evaluate(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), ["a", "b", "c"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_not_scored(value: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [value, 0.0]])
    with pytest.raises(NonFiniteError, match="logits are not all finite numbers: there is nothing to score"):
        evaluate(logits, torch.tensor([0, 1]), ["a", "b"])
