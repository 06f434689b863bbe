"""Does a comparison pair the right examples, and call different what is?"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import ask_page, needs_chromium

from bit_mixup.cli import main as command
from bit_mixup.comparison import compare_runs, mcnemar, render_comparison
from bit_mixup.errors import CheckpointError, ConfigError
from bit_mixup.outcomes import Outcomes


def write(folder: Path, right: Any, *, labels: Any = None, digests: list[str] | None = None, nll: Any = None) -> Path:
    """A folder with the predictions of a run that is right for some of its examples."""
    right = np.asarray(right)
    labels = np.zeros(len(right), dtype=np.int64) if labels is None else np.asarray(labels)
    folder.mkdir()
    Outcomes(
        class_names=("cat", "dog"),
        ids=[f"test row {row}" for row in range(len(right))],
        digests=digests or [f"{row:016x}" for row in range(len(right))],
        labels=labels,
        predicted=np.where(right, labels, 1 - labels),
        confidence=np.full(len(right), 0.75),
        nll=np.where(right, 0.25, 1.5) if nll is None else np.asarray(nll, dtype=float),
    ).save(folder / "predictions.csv")
    return folder


def test_mcnemar_is_a_binomial_test_on_what_one_of_two_has_right() -> None:
    """Against the sum of the binomial's tails: 1 / 9 split of ten, and the small table of Fay's exact2x2 package (p = 0.5811)."""
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(5, 5) == 1
    assert mcnemar(0, 0) == 1
    tail = sum(math.comb(13, k) for k in range(6)) / 2**13
    assert mcnemar(5, 8) == pytest.approx(2 * tail)
    assert mcnemar(8, 5) == mcnemar(5, 8)


def test_numbers_by_hand(tmp_path: Path) -> None:
    """20 examples: 10 both right, 6 this alone, 1 the first alone, 3 both wrong."""
    first = write(tmp_path / "first", [True] * 10 + [False] * 6 + [True] + [False] * 3)
    this = write(tmp_path / "this", [True] * 16 + [False] * 4)
    one, other = compare_runs([first, this]).runs
    assert (one.accuracy, other.accuracy) == (11 / 20, 16 / 20)
    assert (one.accuracy_difference, one.mcnemar, one.verdict) == (None, None, None)
    assert (other.only_first, other.only_this) == (1, 6)
    assert other.mcnemar == pytest.approx(2 * (1 + 7) / 2**7)
    assert other.verdict == "not distinguishable"
    assert other.accuracy_difference is not None
    assert other.nll_difference is not None
    assert other.accuracy_difference.mean == pytest.approx(5 / 20)
    assert other.nll_difference.mean == pytest.approx(-1.25 * 5 / 20)
    # The bootstrap's interval is near the normal one: mean and standard error of the paired differences.
    error = np.std([1] * 6 + [-1] + [0] * 13) / 20**0.5
    assert other.accuracy_difference.low == pytest.approx(5 / 20 - 1.96 * error, abs=0.05)
    assert other.accuracy_difference.high == pytest.approx(5 / 20 + 1.96 * error, abs=0.05)


def test_intervals_hold_the_truth_as_often_as_they_say(tmp_path: Path) -> None:
    """Of 100 pairs that differ by a known mean about 95 intervals hold it; of equal ones McNemar calls about 5 different."""
    rng = np.random.default_rng(0)
    held = called = 0
    for trial in range(100):
        folder = tmp_path / str(trial)
        folder.mkdir()
        nll = rng.exponential(size=200)
        first = write(folder / "a", rng.random(200) < 0.8, nll=nll)
        this = write(folder / "b", rng.random(200) < 0.8, nll=nll + 0.1 + rng.normal(0, 0.5, 200).clip(-0.1 - nll, None))
        found = compare_runs([first, this], resamples=400, seed=trial).runs[1]
        assert found.nll_difference is not None
        truth = 0.1 + _clipping_gain(rng)
        held += found.nll_difference.low <= truth <= found.nll_difference.high
        called += found.verdict != "not distinguishable"
    assert 85 <= held <= 100
    assert called <= 12


def _clipping_gain(rng: np.random.Generator) -> float:
    """What keeping NLLs above 0 adds to the mean difference, by a large sample."""
    nll = rng.exponential(size=200_000)
    return float(rng.normal(0, 0.5, 200_000).clip(-0.1 - nll, None).mean())


def test_a_better_and_a_worse_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base = rng.random(500) < 0.7
    first = write(tmp_path / "first", base)
    better = write(tmp_path / "better", base | (rng.random(500) < 0.3))
    worse = write(tmp_path / "worse", base & (rng.random(500) < 0.8))
    same = write(tmp_path / "same", base)
    comparison = compare_runs([first, better, worse, same])
    assert [run.verdict for run in comparison.runs] == [None, "better", "worse", "not distinguishable"]
    nll = [run.nll_difference.verdict for run in comparison.runs[1:] if run.nll_difference]
    assert nll == ["better", "worse", "not distinguishable"]
    assert "Of 3 runs as good as the first" in comparison.caveat
    assert compare_runs([first, better, worse, same]) == comparison
    assert compare_runs([first, better], seed=1).runs[1].accuracy_difference != comparison.runs[1].accuracy_difference


def test_the_doors_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)
    first, this = write(tmp_path / "a<b>", rng.random(50) < 0.5), write(tmp_path / "this", rng.random(50) < 0.9)
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    command(["compare", str(first), str(this), "--html", str(page), "--json", str(numbers), "--resamples", "500"])
    said, comparison = capsys.readouterr().out, compare_runs([first, this], resamples=500)
    assert comparison.table() in said
    accuracies, losses, _ = comparison.table().split("\n\n")
    assert len(accuracies.splitlines()) == len(losses.splitlines()) == 3
    assert accuracies.endswith(str(comparison.runs[1].verdict))
    assert comparison.runs[1].nll_difference
    assert losses.endswith(comparison.runs[1].nll_difference.verdict)
    found = json.loads(numbers.read_text())
    assert found == json.loads(json.dumps(comparison.as_dict()))
    assert found["runs"][1]["verdict"] == comparison.runs[1].verdict
    text = page.read_text(encoding="utf-8")
    assert f"{comparison.runs[1].mcnemar:.3g}" in text
    assert "a&lt;b&gt;" in text
    assert "a<b>" not in text
    assert render_comparison(comparison, command="x").count("<tr>") == 6


SORTED = """
const rows = (id, n) => [...document.querySelectorAll(`#${id} tbody tr`)].map((row) => row.cells[n].dataset.value);
const heading = (id, n) => document.querySelectorAll(`#${id} th button`)[n];
const seen = {shown: [...document.querySelectorAll(".scroll")].every((box) => box.scrollWidth <= box.clientWidth)};
heading("accuracy", 2).click();
seen.rising = rows("accuracy", 2);
heading("nll", 1).click(); heading("nll", 1).click();
seen.falling = rows("nll", 1);
"""


@pytest.mark.slow
@needs_chromium
def test_the_page_works_in_a_browser(tmp_path: Path) -> None:
    """All columns are in sight on a usual screen, the verdicts at the end of them included."""
    rng = np.random.default_rng(3)
    runs = [write(tmp_path / f"a-run-of-some-name-{share}", rng.random(400) < share) for share in (0.7, 0.9, 0.5, 0.72)]
    comparison = compare_runs(runs, resamples=200)
    page = tmp_path / "page.html"
    page.write_text(render_comparison(comparison, command="bit-mixup compare a b --html page.html"), encoding="utf-8")
    seen = ask_page(page, tmp_path, SORTED)
    assert seen["shown"]
    gains = sorted(run.accuracy_difference.mean for run in comparison.runs if run.accuracy_difference)
    assert [float(value) for value in seen["rising"] if value] == pytest.approx(gains)
    assert seen["rising"][-1] == "", "the first run has no difference and stands last"
    assert [float(value) for value in seen["falling"]] == pytest.approx(
        sorted((run.nll for run in comparison.runs), reverse=True)
    )


def other_picture(folder: Path) -> list[Path]:
    return [write(folder / "a", [True] * 3), write(folder / "b", [True] * 3, digests=["0" * 16, "f" * 16, "0" * 15 + "2"])]


def other_label(folder: Path) -> list[Path]:
    return [write(folder / "a", [True] * 3), write(folder / "b", [True] * 3, labels=[0, 0, 1])]


def unfinished(folder: Path) -> list[Path]:
    (folder / "b").mkdir()
    return [write(folder / "a", [True]), folder / "b"]


BAD = {
    "one run": (lambda f: compare_runs([write(f / "a", [True])]), ConfigError, "two runs at least"),
    "a run twice": (lambda f: compare_runs([write(f / "a", [True]), f / "b" / ".." / "a"]), ConfigError, "named twice"),
    "few resamples": (lambda f: compare_runs(other_label(f), resamples=9), ConfigError, "resamples is 9"),
    "no predictions": (lambda f: compare_runs(unfinished(f)), CheckpointError, "b holds no predictions.csv"),
    "an empty table": (
        lambda f: compare_runs([write(f / "a", []), write(f / "b", [True])]), CheckpointError, "holds no predictions",
    ),
    "another number": (
        lambda f: compare_runs([write(f / "a", [True]), write(f / "b", [True] * 2)]), CheckpointError, "scored 1 test.* 2",
    ),
    "another picture": (lambda f: compare_runs(other_picture(f)), CheckpointError, "test example 1 .*another picture"),
    "another label": (lambda f: compare_runs(other_label(f)), CheckpointError, 'example 2 .*labelled "dog", but "cat" in'),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_compared_is_refused(tmp_path: Path, case: str) -> None:
    ask, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ask(tmp_path)
