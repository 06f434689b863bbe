"""Is the report whole, true, harmless whatever classes are called, and does it work in a browser?"""

import base64
import io
import json
import re
import shlex
import subprocess
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import ask_page, brightness, needs_chromium, run_chromium
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from scipy.special import betaincinv
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

import bit_mixup
from bit_mixup.cli import _configuration
from bit_mixup.config import DistillConfig, PretrainConfig, RunConfig, TransferConfig
from bit_mixup.errors import CheckpointError
from bit_mixup.evaluation import evaluate, share_interval
from bit_mixup.outcomes import Outcomes
from bit_mixup.repeating import command_line, facts, git_state
from bit_mixup.report import COLUMN_LETTERS, MATRIX_CLASSES
from bit_mixup.scoring import write_evaluation
from bit_mixup.workflow import TransferResult

DASH = "\u2013"
EVIL = "<script>document.title='taken over'</script>"
ODD = ['"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "a\x1b[31m\u202eb", "naïve, ünïcode 猫"]


def shapes(names: list[str], size: int = 24, each: int = 6) -> DatasetDict:
    """Synthetic pictures: noise around a shade for each class."""
    rng = np.random.default_rng(0)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})

    def split(count: int) -> Dataset:
        labels = [label for label in range(len(names)) for _ in range(count)]
        noise = rng.integers(0, 60, (len(labels), size, size, 3))
        shades = (np.array(labels) * 180 // len(names))[:, None, None, None]
        pictures = [Image.fromarray((shade + one).astype(np.uint8)) for shade, one in zip(shades, noise, strict=True)]
        return Dataset.from_dict({"image": pictures, "label": labels}, features=features)

    return DatasetDict({"train": split(each), "test": split(3)})


def run_on(data: DatasetDict, tiny_bit: Path, folder: Path, **more: Any) -> TransferResult:
    sizes = {"resize_size": 48, "crop_size": 40, "steps": 4, "batch_size": 16, "save_every": 4, "threads": 1}
    return bit_mixup.transfer(dataset=data, model=str(tiny_bit), output_dir=folder, **sizes | more)


@pytest.fixture(scope="module")
def few(tiny_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> TransferResult:
    """A run with mixup on five classes of unpleasant names."""
    mixing = {"mixup_alpha": 0.5, "prediction_rule": "unshrink", "score_every": 2, "diagnostics": True}
    return run_on(shapes([EVIL, *ODD]), tiny_bit, tmp_path_factory.mktemp("few") / "run", **mixing)


@pytest.fixture(scope="module")
def many(tiny_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> TransferResult:
    """A run on more classes than a matrix has room for, of larger pictures."""
    names = [f"class {index:02}" for index in range(MATRIX_CLASSES + 10)]
    return run_on(shapes(names, size=80, each=2), tiny_bit, tmp_path_factory.mktemp("many") / "run")


class Page(HTMLParser):
    """Tables as rows of texts, pictures, text outside of scripts, and the tags that were opened."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._rows: list[list[str]] = []
        self._in: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = []
            self.tables[str(dict(attrs).get("id", f"table {len(self.tables)}"))] = self._rows
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        if tag not in ("meta", "img", "br"):
            self._in.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._in or "style" in self._in:
            return
        self.text += data
        if {"td", "th"} & set(self._in):
            self._rows[-1][-1] += data.strip()

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_an_accuracy_has_its_interval() -> None:
    """Wilson's bounds are where a score test just does not refuse; Clopper and Pearson's are wider."""
    for count, total in ((0, 20), (3, 20), (190, 200), (200, 200)):
        low, high = share_interval(count, total)
        for bound in (low, high):
            if 0 < bound < 1:
                assert abs(count / total - bound) / (bound * (1 - bound) / total) ** 0.5 == pytest.approx(1.959964, abs=1e-5)
        assert 0 <= low <= count / total <= high <= 1
    assert share_interval(0, 20)[0] == 0
    assert share_interval(200, 200)[1] == 1
    assert share_interval(3, 20)[1] < betaincinv(4, 17, 0.975)


def test_precision_recall_and_f1_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    labels, logits = rng.integers(0, 5, 60), rng.normal(size=(60, 7))
    logits[:, 6] = -9  # neither present nor predicted
    report = evaluate(torch.from_numpy(logits), torch.from_numpy(labels), [str(index) for index in range(7)])
    expected = precision_recall_fscore_support(labels, logits.argmax(1), labels=range(7), zero_division=0)
    for index in range(7):
        found = (report.class_precision[str(index)], report.class_accuracy[str(index)], report.class_f1[str(index)])
        predicted, present = (logits.argmax(1) == index).any(), (labels == index).any()
        known = (predicted, present, predicted or present)
        for value, reference, is_known in zip(found, expected[:3], known, strict=True):
            assert value == (pytest.approx(reference[index], abs=1e-6) if is_known else None)


@pytest.mark.parametrize("which", ["few", "many"])
def test_the_page_says_what_the_run_measured(which: str, request: pytest.FixtureRequest) -> None:
    run: TransferResult = request.getfixturevalue(which)
    page, report = Page(run.output_dir / "report.html"), run.report
    outcomes = Outcomes.load(run.output_dir / "predictions.csv")
    assert f"{report.accuracy:.2%}" in page.text
    assert "95 % interval {:.2%} to {:.2%}".format(*report.accuracy_interval) in page.text
    header, *rows = page.tables["classes"]
    assert header == ["class", "precision", "recall", "F1", "support"]
    assert len(rows) == len(report.class_support)
    for row, name in zip(rows, report.class_support, strict=True):
        values = (report.class_precision[name], report.class_accuracy[name], report.class_f1[name])
        assert row[1:4] == [DASH if value is None else f"{value:.2%}" for value in values]
        assert row[4] == str(report.class_support[name])
    for heading, lines in run.plan.sections():
        assert heading in page.text
        for line in lines:
            assert re.sub(r"\s", "", line.split("<")[0].split('"')[0]) in re.sub(r"\s", "", page.text)
    shown = [one for one in page.of("img") if one["src"]]
    wrong = int((~outcomes.correct).sum())
    assert len(shown) == min(12, wrong) + min(12, len(outcomes) - wrong)
    for one, index in zip(shown, outcomes.surest_mistakes(12), strict=False):
        png = base64.b64decode(str(one["src"]).removeprefix("data:image/png;base64,"))
        original = run.plan.data.test.read([index])[0]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(original))
        assert (one.get("class") == "small") == (which == "few")
    confidences = outcomes.confidence[outcomes.surest_mistakes(12)]
    assert list(confidences) == sorted(outcomes.confidence[~outcomes.correct], reverse=True)[:12]
    confidences = outcomes.confidence[outcomes.least_sure_hits(12)]
    assert list(confidences) == sorted(outcomes.confidence[outcomes.correct])[:12]


def test_what_was_measured_besides_is_shown(few: TransferResult) -> None:
    page = Page(few.output_dir / "report.html")
    diagnosis = json.loads((few.output_dir / "report.json").read_text())["diagnosis"]
    between = diagnosis["in_between"]
    table = next(rows for rows in page.tables.values() if "neither is predicted" in rows[0])
    columns = zip(between["lams"], between["miss_rate"], between["gradient_norm"], strict=True)
    assert table[1:] == [[f"{lam:.1f}", f"{miss:.1%}", f"{norm:.4f}"] for lam, miss, norm in columns]
    assert f"Norm of the logits' Jacobian, mean: {diagnosis['jacobian_norm']:.4f}" in page.text
    scores = [json.loads(line) for line in (few.output_dir / "scores.jsonl").read_text().splitlines()]
    assert f"{1 - scores[-1]['accuracy']:.2%} at last, of the model as it is." in page.text


def test_few_classes_have_a_matrix_and_many_a_list(few: TransferResult, many: TransferResult) -> None:
    for run in (few, many):
        outcomes = Outcomes.load(run.output_dir / "predictions.csv")
        names, page = list(run.plan.data.class_names), Page(run.output_dir / "report.html")
        labels = [names.index(outcomes.class_names[label]) for label in outcomes.labels]
        predicted = [names.index(outcomes.class_names[label]) for label in outcomes.predicted]
        expected = confusion_matrix(labels, predicted, labels=range(len(names)))
        if run is few:
            matrix = next(rows for rows in page.tables.values() if rows[0][:2] == ["", "1"])
            found = [[int(cell or 0) for cell in row[1:]] for row in matrix[1:]]
            assert found == expected.tolist()
            # One of the names is too long to stand above a column: columns have the numbers of rows.
            assert max(map(len, names)) > COLUMN_LETTERS
            assert matrix[0] == ["", *(str(number + 1) for number in range(len(names)))]
            assert [row[0].split(". ")[0] for row in matrix[1:]] == matrix[0][1:]
            continue
        np.fill_diagonal(expected, 0)
        rows = [(names.index(row[0]), names.index(row[1]), int(row[2])) for row in page.tables["pairs"][1:]]
        assert rows
        assert [count for _, _, count in rows] == sorted(expected.ravel(), reverse=True)[: len(rows)]
        assert all(expected[label, other] == count for label, other, count in rows)


def test_names_are_text(few: TransferResult) -> None:
    page = Page(few.output_dir / "report.html")
    assert len(page.of("script")) == 1
    assert all(str(one["src"]).startswith("data:image/png;base64,") for one in page.of("img"))
    assert EVIL in page.text
    assert "{{ 7 * 7 }}" in page.text
    text = (few.output_dir / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b[31m\\u202eb" in page.text


def test_the_page_needs_nothing_from_outside(few: TransferResult, many: TransferResult) -> None:
    for run in (few, many):
        text = (run.output_dir / "report.html").read_text(encoding="utf-8")
        page = Page(run.output_dir / "report.html")
        assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
        assert not re.findall(r"url\((?!#)|@import|\bfetch\(|XMLHttpRequest", text)
        assert [one for one in page.of("meta") if "default-src 'none'" in str(one.get("content"))]
        for _, attributes in page.tags:
            for name in ("src", "href", "action", "srcset"):
                assert str(attributes.get(name) or "#").startswith(("data:", "#"))


def test_charts_take_the_readers_colours(few: TransferResult) -> None:
    text = (few.output_dir / "report.html").read_text(encoding="utf-8")
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == 3  # training, raw, unshrink
    for chart in charts:
        assert "currentColor" in chart
        assert not re.findall(r'(?:: |=")#[0-9a-fA-F]{6}', chart), "each colour has a light and a dark form"
        assert set(re.findall(r"var\((--\w+)\)", chart)) <= set(re.findall(r"(--\w+): #", text))
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_same_run_writes_the_same_page(few: TransferResult, tiny_bit: Path, tmp_path: Path) -> None:
    mixing = {"mixup_alpha": 0.5, "prediction_rule": "unshrink", "score_every": 2, "diagnostics": True}
    again = run_on(shapes([EVIL, *ODD]), tiny_bit, tmp_path / "run", **mixing)
    pages = []
    for run in (few, again):
        text = (run.output_dir / "report.html").read_text(encoding="utf-8").replace(str(run.output_dir), "RUN")
        pages.append(re.sub(r"memory-[0-9a-f]+|fingerprint [0-9a-f]+", "", text))
    assert pages[0] == pages[1]


OPTIONS: list[tuple[type[RunConfig], dict[str, Any]]] = [
    (TransferConfig, {"dataset": "digits"}),
    (TransferConfig, {"dataset": "a folder/with 'quotes' $HOME", "flip": False, "steps": 7, "decay_steps": (2, 3), "seed": 3}),
    (TransferConfig, {"dataset": "x", "mixup_alpha": float("inf"), "micro_batch": "auto", "diagnostics": True, "resume": True}),
    (TransferConfig, {"dataset": "x", "micro_batch": 8, "base_lr": 1e-05, "std_eps": 1e-10, "output_dir": Path("a b")}),
    (PretrainConfig, {"dataset": "x", "test_split": "val", "epochs": 2.5, "distort": True, "overwrite": True}),
    (DistillConfig, {"dataset": "x", "teacher": "runs/t/model", "temperature": 2.0, "mixup_lam": "example"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_the_command_asks_for_the_same(kind: type[RunConfig], options: dict[str, Any]) -> None:
    config = kind(**options)
    program, command, *flags = shlex.split(command_line(config))
    assert program == "bit-mixup"
    assert command == {"TransferConfig": "fine-tune", "PretrainConfig": "pretrain", "DistillConfig": "distill"}[kind.__name__]
    assert _configuration(flags, kind, prog="x").as_json() == config.as_json()
    assert len(flags) <= 2 * len(options) + 1


def test_what_it_takes_to_repeat_a_run(few: TransferResult) -> None:
    page = Page(few.output_dir / "report.html")
    plan = json.loads((few.output_dir / "plan.json").read_text())
    assert command_line(few.plan.config) in page.text
    assert "<span>--mixup-alpha 0.5</span>" in (few.output_dir / "report.html").read_text(encoding="utf-8"), "lines break between"
    for name, value in facts(plan, few.plan.config.seed):
        assert name in page.text
        assert value in page.text
    assert f"torch {version('torch')}" in page.text
    root = Path(bit_mixup.__file__).parents[1]
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        assert str(git_state()).startswith(head[:12])
        assert plan["environment"]["git"] == git_state()


def test_outcomes_come_back_from_their_table(few: TransferResult, tmp_path: Path) -> None:
    outcomes = Outcomes.load(few.output_dir / "predictions.csv")
    outcomes.save(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (few.output_dir / "predictions.csv").read_bytes()
    assert len(outcomes) == few.report.num_examples
    assert outcomes.correct.mean() == few.report.accuracy
    assert float(outcomes.nll.mean()) == pytest.approx(few.report.nll, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "its first line must be"),
        ("id,digest,label,predicted,confidence,nll\nx,y,z\n", "line 2"),
        ("id,digest,label,predicted,confidence,nll\nx,y,z,z,0.5,0.1\nx,y,z,z,much,0.1\n", "line 3"),
        (None, "can not be read"),
    ],
)
def test_a_broken_table_is_explained(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "predictions.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Outcomes.load(path)


CLICKS = """
const column = (n) => [...document.querySelectorAll("#classes tbody tr")].map((row) => row.cells[n].dataset.value);
const heading = (n) => document.querySelectorAll("#classes th button")[n];
const seen = {title: document.title, start: column(4), command: document.getElementById("command").innerText};
for (const n of [0, 2, 4]) { heading(n).click(); seen["up" + n] = column(n); heading(n).click(); seen["down" + n] = column(n); }
seen.sort = heading(4).parentElement.getAttribute("aria-sort");
seen.wide = document.documentElement.scrollWidth <= document.documentElement.clientWidth;
"""


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1100, 500])
@pytest.mark.parametrize("which", ["few", "many"])
def test_the_page_works_in_a_browser(which: str, width: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run: TransferResult = request.getfixturevalue(which)
    seen = ask_page(run.output_dir / "report.html", tmp_path, CLICKS, width=width)
    assert seen["title"].endswith("fine-tuned")
    assert seen["wide"], "the page is wider than its window"
    assert seen["command"] == command_line(run.plan.config), "what is copied is what was typed"
    assert seen["sort"] == "descending"
    for n in (2, 4):
        up, down = ([float(value) for value in seen[way + str(n)] if value] for way in ("up", "down"))
        assert up == sorted(up)
        assert down == sorted(up, reverse=True)
        assert len(up) == len([value for value in seen[f"up{n}"] if value])
    assert which == "few" or sorted(seen["up0"]) == sorted(run.report.class_support)  # odd names are shown with escapes
    assert seen["up0"] == seen["down0"][::-1]


@pytest.mark.slow
@needs_chromium
def test_the_page_of_an_evaluation_works_in_a_browser(few: TransferResult, tmp_path: Path) -> None:
    classifier = bit_mixup.load(few.output_dir)
    evaluation = bit_mixup.evaluate_model(classifier, shapes([EVIL, *ODD])["test"])
    write_evaluation(classifier, evaluation, tmp_path / "evaluation", command="bit-mixup evaluate")
    seen = ask_page(tmp_path / "evaluation" / "report.html", tmp_path, CLICKS)
    assert seen["wide"]
    assert "taken over" not in seen["title"].split(" on ")[0]


@pytest.mark.slow
@needs_chromium
def test_the_page_is_dark_for_who_wants_it(few: TransferResult, tmp_path: Path) -> None:
    page = few.output_dir / "report.html"
    assert brightness(page, tmp_path, dark=False) > 220
    assert brightness(page, tmp_path, dark=True) < 70


@pytest.mark.slow
@needs_chromium
def test_what_scrolls_on_a_screen_is_whole_on_paper(many: TransferResult, tmp_path: Path) -> None:
    text = (many.output_dir / "report.html").read_text(encoding="utf-8")
    sheets = []
    for times in (1, 20):  # 30 and 600 classes
        rows = re.search(r'id="classes">.*?<tbody>\n(.*?)</tbody>', text, re.DOTALL)
        assert rows
        page, paper = tmp_path / f"{times}.html", tmp_path / f"{times}.pdf"
        page.write_text(text.replace(rows[1], rows[1] * times), encoding="utf-8")
        run_chromium(page, tmp_path, f"--print-to-pdf={paper}")
        sheets.append(len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes())))
    assert 2 <= sheets[0] <= 9
    assert sheets[1] >= sheets[0] + 8
