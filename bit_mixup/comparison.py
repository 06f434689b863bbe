"""Is one run better than another by more than chance explains?

Runs that scored the same test examples are compared example by example: the difference of two means over the same examples varies
far less than either mean. What is asked is how it would fall out on other examples of the same kind, with these very models; how
another seed would fall out takes runs with other seeds.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bit_mixup.errors import CheckpointError, ConfigError, shown
from bit_mixup.evaluation import share_interval
from bit_mixup.outcomes import Outcomes
from bit_mixup.report import render_page
from bit_mixup.runs import RunFolder
from bit_mixup.sampling import Purpose, generator

Floats = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "not distinguishable"]
LEVEL = 0.05  # of the tests, and 1 less the confidence of the intervals
BOOTSTRAP_NUMBERS = 2**22  # drawn at a time


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A run less the first one, on the same examples.

    Args:
        mean: of the difference.
        low: of its 95 % bootstrap interval.
        high: of the same.
        better: whether more is better (accuracy) or less (NLL).
    """

    mean: float
    low: float
    high: float
    better: Literal["more", "less"]

    @property
    def verdict(self) -> Verdict:
        """Better or worse where the interval lies on one side of 0."""
        if self.low <= 0 <= self.high:
            return "not distinguishable"
        return "better" if (self.mean > 0) == (self.better == "more") else "worse"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A run beside the first one.

    Args:
        name: of its folder.
        accuracy: of the run.
        accuracy_interval: its 95 % interval (Wilson, 1927).
        nll: mean negative log-likelihood in nats.
        accuracy_difference: None for the first run.
        nll_difference: None for the first run.
        only_first: examples that the first run alone has right.
        only_this: examples that this run alone has right.
        mcnemar: p-value of McNemar's exact test: how likely so uneven a split of these examples would be if both were as good
            (McNemar, 1947; a two-sided binomial test). None for the first run.
    """

    name: str
    accuracy: float
    accuracy_interval: tuple[float, float]
    nll: float
    accuracy_difference: Difference | None
    nll_difference: Difference | None
    only_first: int
    only_this: int
    mcnemar: float | None

    @property
    def verdict(self) -> Verdict | None:
        """By McNemar's test on accuracy; None for the first run."""
        if self.mcnemar is None:
            return None
        if self.mcnemar >= LEVEL:
            return "not distinguishable"
        return "better" if self.only_this > self.only_first else "worse"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs beside each other.

    Args:
        num_examples: that all have scored.
        runs: the first is what the others are compared with.
        resamples: of the bootstrap.
    """

    num_examples: int
    runs: tuple[Compared, ...]
    resamples: int

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        verdicts = [{"verdict": run.verdict} for run in self.runs]
        return asdict(self) | {"runs": [asdict(run) | more for run, more in zip(self.runs, verdicts, strict=True)]}

    def table(self) -> str:
        """For a terminal: accuracy, and below it the negative log-likelihood."""
        width = max(3, *(len(shown(run.name)) for run in self.runs))
        accuracies = [f"{'run':<{width}}  {'accuracy':>8}  {'difference (95 % interval)':<28}  {'only first / this':<17}  "
                      f"{'McNemar p':<9}  verdict"]  # fmt: skip
        losses = [f"{'run':<{width}}  {'NLL':>8}  {'difference (95 % interval)':<28}  verdict"]
        for run in self.runs:
            accuracy, nll = run.accuracy_difference, run.nll_difference
            name, gained, split, chance, lost, verdicts = shown(run.name), "", "", "", "", ("the first", "the first")
            if accuracy and nll:
                gained = f"{accuracy.mean:+.2%} ({accuracy.low:+.2%} to {accuracy.high:+.2%})"
                split, chance = f"{run.only_first} / {run.only_this}", f"{run.mcnemar:.3g}"
                lost = f"{nll.mean:+.4f} ({nll.low:+.4f} to {nll.high:+.4f})"
                verdicts = (str(run.verdict), nll.verdict)
            accuracies.append(f"{name:<{width}}  {run.accuracy:>8.2%}  {gained:<28}  {split:<17}  {chance:<9}  {verdicts[0]}")
            losses.append(f"{name:<{width}}  {run.nll:>8.4f}  {lost:<28}  {verdicts[1]}")
        return "\n".join([*accuracies, "", *losses, "", self.caveat])

    @property
    def caveat(self) -> str:
        """What the numbers mean, in a sentence or two."""
        text = (
            f"{self.num_examples:,} test examples, the same for all. Intervals are of the difference on other examples of their "
            "kind, with these models; another seed is another model."
        )
        others = len(self.runs) - 1
        if others > 1:
            text += f" Of {others} runs as good as the first, each passes for different with a probability of {LEVEL:.0%}."
        return text


def compare_runs(folders: Sequence[Path], *, resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Compares runs with the first of them, on the same test examples.

    Args:
        folders: of two or more runs or evaluations.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ConfigError: fewer than two folders, one twice, or resamples below 100.
        CheckpointError: a folder holds no predictions, or those of other examples.
    """
    if len(folders) < 2:
        raise ConfigError("compare needs two runs at least: give their folders.")
    twice = next(
        (folder for place, folder in enumerate(folders) if folder.resolve() in {f.resolve() for f in folders[:place]}), None
    )
    if twice is not None:
        raise ConfigError(f"{twice} is named twice; a run does not differ from itself.")
    if resamples < 100:
        raise ConfigError(f"resamples is {resamples}; it must be at least 100 (10,000 is usual).")
    outcomes = [_outcomes(folder) for folder in folders]
    for folder, other in zip(folders[1:], outcomes[1:], strict=True):
        _check_same_examples(folders[0], outcomes[0], folder, other)
    compared = [_compared(str(folder), outcomes[0], one, resamples, seed) for folder, one in zip(folders, outcomes, strict=True)]
    return Comparison(num_examples=len(outcomes[0]), runs=tuple(compared), resamples=resamples)


def _outcomes(folder: Path) -> Outcomes:
    path = RunFolder(folder).predictions
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {path.name}: it is no finished run or evaluation. `bit-mixup evaluate` makes one."
        )
    outcomes = Outcomes.load(path)
    if not len(outcomes):
        raise CheckpointError(f"{path} holds no predictions. Evaluate the run anew with `bit-mixup evaluate`.")
    return outcomes


def _check_same_examples(first: Path, one: Outcomes, second: Path, other: Outcomes) -> None:
    if len(one) != len(other):
        raise CheckpointError(
            f"{first} scored {len(one):,} test examples, {second} {len(other):,}. Only runs on the same examples can be "
            "compared: `bit-mixup evaluate RUN --dataset ...` scores both on one data set."
        )
    labels = [[outcomes.class_names[label] for label in outcomes.labels] for outcomes in (one, other)]
    rows = zip(one.digests, other.digests, *labels, strict=True)
    for row, (digest, its_digest, label, its_label) in enumerate(rows):
        if digest != its_digest or label != its_label:
            told = "another picture than" if digest != its_digest else f'labelled "{its_label}", but "{label}"'
            raise CheckpointError(
                f"{second}: test example {row} ({other.ids[row]}) is {told} in {first} ({one.ids[row]}). Only runs on the "
                "same examples can be compared: `bit-mixup evaluate RUN --dataset ...` scores both on one data set."
            )


def _compared(name: str, first: Outcomes, this: Outcomes, resamples: int, seed: int) -> Compared:
    right, was_right = this.correct, first.correct
    paired = this is not first
    only_first, only_this = int((was_right & ~right).sum()), int((right & ~was_right).sum())
    gained = right.astype(np.float64) - was_right
    return Compared(
        name=name,
        accuracy=float(right.mean()),
        accuracy_interval=share_interval(int(right.sum()), len(right)),
        nll=float(this.nll.mean()),
        accuracy_difference=_difference(gained, "more", resamples, seed) if paired else None,
        nll_difference=_difference(this.nll - first.nll, "less", resamples, seed) if paired else None,
        only_first=only_first,
        only_this=only_this,
        mcnemar=mcnemar(only_first, only_this) if paired else None,
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """p-value of McNemar's exact test (McNemar, 1947): two-sided binomial, on the examples that only one of two has right."""
    from scipy.stats import binomtest  # takes a second to import

    total = only_first + only_second
    return float(binomtest(only_first, total, 0.5).pvalue) if total else 1.0


def _difference(values: Floats, better: Literal["more", "less"], resamples: int, seed: int) -> Difference:
    """Mean of paired differences (N,), with a percentile bootstrap interval over examples (Efron, 1979)."""
    from scipy.stats import bootstrap

    mean = float(values.mean())
    if len(values) == 1 or not np.ptp(values):  # nothing varies: nothing to draw
        return Difference(mean=mean, low=mean, high=mean, better=better)
    interval = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, BOOTSTRAP_NUMBERS // len(values)),
        confidence_level=1 - LEVEL,
        method="percentile",
        rng=generator(seed, Purpose.BOOTSTRAP),
    ).confidence_interval
    return Difference(mean=mean, low=float(interval.low), high=float(interval.high), better=better)


def render_comparison(comparison: Comparison, *, command: str) -> str:
    """A page of the comparison, as HTML without anything outside of it."""
    return render_page("compare.html.j2", title=f"{len(comparison.runs)} runs compared", command=command, comparison=comparison)
