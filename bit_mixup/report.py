"""What does a person look at after a run?

One page without anything outside of it: it opens by double click, prints, follows the reader's light or dark colours, and
whatever classes and files are called is text in it.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from bit_mixup.errors import shown
from bit_mixup.evaluation import EvaluationReport
from bit_mixup.outcomes import EncodedExamples, Outcomes
from bit_mixup.plots import figure_svg, reliability_diagram, training_curves
from bit_mixup.unmixing import RuleChoice

TEMPLATES = Path(__file__).parent / "templates"
MATRIX_CLASSES = 20  # more are too many for a matrix: the pairs that are confused most are listed
COLUMN_LETTERS = 24  # that fit above a column of the matrix; longer names get numbers
LISTED_PAIRS = 30
SHOWN_PICTURES = 12
THUMBNAIL = 160  # pixels
SMALL_PICTURE = 64  # pixels; below, pixels are shown as squares


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportPage:
    """All that a report shows.

    Args:
        title: of the page.
        subtitle: a line below it.
        scored: what the examples are, such as "test examples".
        report: scores by the chosen prediction rule.
        raw: scores of the model as it is; the same, where that is the rule.
        choice: the prediction rule.
        outcomes: for each example, by the chosen rule.
        examples: for thumbnails.
        decided: heading of the sections.
        sections: what was decided and why: headings, and lines under each.
        metrics: of each training step, where they are known.
        scores: on the way, where they were asked for.
        findings: of the doctor, as plain values.
        more: headings and text, which may hold tables in Markdown, for what a run measured besides.
        command: that repeats it.
        facts: names and values of what else it takes to repeat it.
    """

    title: str
    subtitle: str
    scored: str
    report: EvaluationReport
    raw: EvaluationReport
    choice: RuleChoice
    outcomes: Outcomes
    examples: EncodedExamples
    decided: str
    sections: Sequence[tuple[str, Sequence[str]]]
    metrics: Sequence[dict[str, Any]]
    scores: Sequence[dict[str, Any]]
    findings: Sequence[dict[str, Any]]
    more: Sequence[tuple[str, str]]
    command: str
    facts: Sequence[tuple[str, str]]


def render_report(page: ReportPage) -> str:
    """The page as HTML."""
    report, outcomes = page.report, page.outcomes
    rules = [("raw (the model as it is)", page.raw)]
    if page.choice.rule != "raw":
        rules.append((page.choice.rule, report))
    charts = [(name, reliability_diagram(one.calibration.bins, title=name)) for name, one in rules]
    few = len(outcomes.class_names) <= MATRIX_CLASSES
    counts = outcomes.confusion() if few else None
    return render_page(
        "report.html.j2",
        title=page.title,
        command=page.command,
        facts=page.facts,
        page=page,
        report=report,
        verdict=_verdict(report),
        curves=figure_svg(training_curves(page.metrics, page.scores), themed=True) if page.metrics else None,
        rules=rules,
        diagrams=[(name, figure_svg(chart, themed=True)) for name, chart in charts],
        classes=[
            (name, (report.class_precision[name], report.class_accuracy[name], report.class_f1[name]), support)
            for name, support in report.class_support.items()
        ],
        confusion=_matrix(counts, outcomes.class_names) if counts is not None else None,
        pairs=None if few else _pairs(outcomes),
        galleries=_galleries(outcomes, page.examples),
        more=[(heading, _parts(text)) for heading, text in page.more],
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingPage:
    """What is shown of a run that trained a model to transfer from.

    Args:
        title: of the page.
        subtitle: a line below it.
        headline: figures, and what they are.
        decided: heading of the sections.
        sections: what was decided: headings, and lines under each.
        metrics: of each step.
        scores: names and values, where there was something to score.
        command: that repeats it.
        facts: names and values of what else it takes to repeat it.
    """

    title: str
    subtitle: str
    headline: Sequence[tuple[str, str]]
    decided: str
    sections: Sequence[tuple[str, Sequence[str]]]
    metrics: Sequence[dict[str, Any]]
    scores: Sequence[tuple[str, str]]
    command: str
    facts: Sequence[tuple[str, str]]


def render_training(page: TrainingPage) -> str:
    """The page as HTML."""
    curves = figure_svg(training_curves(page.metrics), themed=True)
    return render_page("training.html.j2", title=page.title, command=page.command, facts=page.facts, page=page, curves=curves)


def render_page(template: str, *, title: str, command: str, facts: Sequence[tuple[str, str]] = (), **values: Any) -> str:
    """A page from one of the package's templates. Whatever is not a number of ours is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: shown(value, keep="\n") if type(value) is str else value,
    )
    css, script = (TEMPLATES / name for name in ("page.css", "page.js"))
    return environment.get_template(template).render(
        percent=lambda share: f"{share:.2%}",
        command_parts=lambda command: re.split(r" (?=--)", command),  # lines break between options, not at their hyphens
        css=Markup(css.read_text(encoding="utf-8")),
        script=Markup(script.read_text(encoding="utf-8")),
        title=title,
        command=command,
        facts=facts,
        **values,
    )


def _parts(text: str) -> list[tuple[list[str], list[list[str]] | None]]:
    """Paragraphs of a text of ours: lines, and cells where these lines are a table in Markdown."""
    found: list[tuple[list[str], list[list[str]] | None]] = []
    for paragraph in text.strip().split("\n\n"):
        lines = paragraph.splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.strip("|-: ")]
        found.append((lines, cells if lines[0].startswith("|") else None))
    return found


def _verdict(report: EvaluationReport) -> str:
    calibration = report.calibration
    said = {
        "not distinguishable": "Its confidence can not be told apart from that of a calibrated model",
        "over-confident": "It is surer than it is right",
        "under-confident": "It is more often right than it is sure",
    }[calibration.verdict]
    return (
        f"{said}: it says {calibration.mean_confidence:.2%} on average and is right in {calibration.accuracy:.2%}, a difference "
        f"of {calibration.gap:+.4f} where chance explains ± {calibration.gap_error:.4f} (one standard error)."
    )


def _matrix(counts: Any, names: Sequence[str]) -> dict[str, Any]:
    """The confusion matrix: counts, and how strongly to colour each, by the share of its row."""
    totals, longest = counts.sum(1), max(map(len, names))
    numbered = longest > COLUMN_LETTERS
    rows = [
        {
            "name": name,
            "head": f"{row + 1}. {name}" if numbered else name,
            "column": str(row + 1) if numbered else name,
            "cells": [
                {"count": count, "right": row == column, "shade": round(12 + 48 * count / totals[row]) if count else 0}
                for column, count in enumerate(counts[row].tolist())
            ],
        }
        for row, name in enumerate(names)
    ]
    return {"rows": rows, "numbered": numbered, "upright": longest > 4 and not numbered}


def _pairs(outcomes: Outcomes) -> list[dict[str, Any]]:
    """The pairs of label and other prediction that occur most often."""
    wrong = ~outcomes.correct
    found, counts = np.unique(np.stack([outcomes.labels[wrong], outcomes.predicted[wrong]]), axis=1, return_counts=True)
    support = np.bincount(outcomes.labels, minlength=len(outcomes.class_names))
    order = np.argsort(-counts, kind="stable")[:LISTED_PAIRS]
    names = outcomes.class_names
    return [
        {
            "label": names[found[0, place]],
            "predicted": names[found[1, place]],
            "count": int(counts[place]),
            "share": float(counts[place] / support[found[0, place]]),
        }
        for place in order
    ]


def _galleries(outcomes: Outcomes, examples: EncodedExamples) -> list[tuple[str, str, list[dict[str, Any]]]]:
    mistakes, hits = outcomes.surest_mistakes(SHOWN_PICTURES), outcomes.least_sure_hits(SHOWN_PICTURES)
    wrong = int((~outcomes.correct).sum())
    found = [
        (
            "Surest mistakes",
            f"Wrong with the highest confidence, {len(mistakes)} of {wrong:,}. Look here for wrong labels, too.",
            mistakes,
        ),
        ("Least sure hits", f"Right with the lowest confidence, {len(hits)} of {len(outcomes) - wrong:,}.", hits),
    ]
    return [(heading, text, [_thumb(outcomes, examples, i) for i in chosen]) for heading, text, chosen in found if chosen]


def _thumb(outcomes: Outcomes, examples: EncodedExamples, index: int) -> dict[str, Any]:
    picture = examples.read([index])[0]
    small = max(picture.size) < SMALL_PICTURE
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    with io.BytesIO() as file:
        picture.save(file, format="png")
        png = base64.b64encode(file.getvalue()).decode("ascii")
    names = outcomes.class_names
    return {
        "png": png,
        "small": small,
        "name": outcomes.ids[index],
        "label": names[outcomes.labels[index]],
        "predicted": names[outcomes.predicted[index]],
        "confidence": float(outcomes.confidence[index]),
        "right": bool(outcomes.correct[index]),
    }
