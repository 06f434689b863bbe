"""Does the study compare what it says, run only what is missing, and report the numbers of its runs?"""

import json
import math
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import mixup_study as study
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

import bit_mixup
from bit_mixup.calibration import fit_temperature
from bit_mixup.data import load_image_dataset
from bit_mixup.theory import best_train_accuracy

CLASSES, EXAMPLES = 4, 30
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of a few digits: 0 to 3, 8 to train on and 5 to test on."""
    folder = tmp_path_factory.mktemp("pictures")
    data = load_image_dataset("digits", examples_per_class=8)
    for split, part, count in (("train", data.train, 8), ("test", data.test, 5)):
        for label in range(4):
            place = folder / split / f"class {label}"
            place.mkdir(parents=True)
            for row in np.flatnonzero(part.labels == label)[:count].tolist():
                part.read([row])[0].save(place / f"{row}.png")
    return folder


def arguments(pictures: Path, tiny_bit: Path, folder: Path, *more: str) -> list[str]:
    return [
        *("--dataset", str(pictures), "--model", str(tiny_bit), "--folder", str(folder), "--steps", "4", "--seeds", "2"),
        *("--threads", "1", "--examples-per-class", "4", "--noisy-examples", "8", *more),
    ]


def test_runs_are_those_of_transfer_and_are_not_repeated(pictures: Path, tiny_bit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    asked = arguments(pictures, tiny_bit, folder, "--only", "erm", "mixup-1")
    study.main(asked)
    names = ["erm-0", "erm-1", "mixup-1-0", "mixup-1-1"]
    assert sorted(path.name for path in (folder / "runs").iterdir()) == names
    direct = bit_mixup.transfer(
        dataset=str(pictures), model=str(tiny_bit), examples_per_class=4, few_shot_seed=1, seed=1, steps=4, batch_size=64,
        base_lr=0.003, flip=False, resolution="model", mixup_alpha=1.0, threads=1, output_dir=tmp_path / "direct",
    )  # fmt: skip
    found = safetensors.torch.load_file(folder / "runs" / "mixup-1-1" / "scores" / "logits.safetensors")
    torch.testing.assert_close(found["raw"], direct.logits.double(), rtol=0, atol=0)
    torch.testing.assert_close(found["temperature"], direct.logits.double() / 0.75, rtol=1e-12, atol=0)
    assert float((found["eq15"] - found["temperature"]).abs().max()) > 0
    diagnosis = json.loads((folder / "runs" / "mixup-1-0" / "report.json").read_text())["diagnosis"]
    assert set(diagnosis) == {"examples", "in_between", "jacobian_norm", "adversarial", "transferred", "loss_parts"}
    assert diagnosis["transferred"]["from"] == str(folder / "source"), "pictures made to fool ERM of the same seed"
    assert not list((folder / "runs").glob("*/model")), "weights of finished runs are not kept"

    stamps = {name: (folder / "runs" / name / "report.json").stat().st_mtime_ns for name in names}
    for file in (folder / "runs" / "erm-1" / "scores").iterdir():  # as if killed before the scores were whole
        file.unlink()
    (folder / "runs" / "erm-1" / "scores").rmdir()
    study.main(asked)
    again = {name: (folder / "runs" / name / "report.json").stat().st_mtime_ns for name in names}
    assert [name for name in names if again[name] != stamps[name]] == ["erm-1"]


def test_bad_requests_are_refused(pictures: Path, tiny_bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.json").write_text(json.dumps({"dataset": "other"}))
    (tmp_path / "runs" / "erm-0" / "scores").mkdir(parents=True)
    for more, message in (
        ([], "holds a study of another setup"),
        (["--folder", str(tmp_path / "new"), "--only", "best"], "--only names no variant: best"),
        (["--seeds", "1"], "--seeds must be 2 or more"),
    ):
        with pytest.raises(SystemExit):
            study.main(arguments(pictures, tiny_bit, tmp_path, *more))
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"mixup_study\.py: error: .*nowhere"):
        study.main(arguments(tmp_path / "nowhere", tiny_bit, tmp_path / "new", "--only", "erm"))


def test_every_variant_is_a_request_that_the_toolkit_takes(tmp_path: Path, tiny_bit: Path) -> None:
    asked = Namespace(
        dataset="digits", model=str(tiny_bit), examples_per_class=4, noisy_examples=10, steps=100, seeds=5, base_lr=0.003,
        noisy_lr=0.01, scratch_lr=0.1, flip=False, threads=1, num_workers=0, folder=tmp_path,
    )  # fmt: skip
    found = study.variants(asked)
    assert len({variant.name for variant in found}) == len(found) == 43
    assert sum(variant.seeds for variant in found) == 151
    laws = set()
    for variant in found:
        options = study.options_of(asked, variant, 0)
        config = bit_mixup.TransferConfig(**options)
        laws.add((config.law(options["mixup_alpha"]), *(str(options.get(name)) for name in NOT_OF_THE_LAW)))
    assert len(laws) == len(found), "no two variants are the same"


NOT_OF_THE_LAW = ("steps", "weight_decay", "model", "corrupt_labels")


# ---- statistics


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Tables with effects of seeds, of examples, and of both: the interval holds 0 in 95 % of them, a little more or less."""
    rng = np.random.default_rng(0)
    for seeds, of_seed, of_example, most in ((5, 0.05, 0.3, 990), (3, 0.2, 0.1, 970), (5, 0.0, 0.5, 997)):
        held = 0
        for _ in range(1000):
            effects = of_seed * rng.standard_normal((seeds, 1)) + of_example * rng.standard_normal((1, 100))
            table = effects + 0.3 * rng.standard_normal((seeds, 100))
            difference = study.compare(table, np.zeros_like(table))
            held += abs(difference.mean) <= difference.detectable
        assert 930 <= held <= most, (seeds, of_seed, of_example, held)


def test_difference_against_the_formula_by_hand() -> None:
    first = np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]])
    second = np.array([[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0], [9.0, 9.0, 9.0, 9.0]])
    found = study.compare(first, second)
    # Differences 1 0 0 1 and 0 1 0 0: row means 1/2 and 1/4, column means 1/2 1/2 0 1/2, residuals +-3/8 and +-5/8 ...
    rows, columns = 0.03125 / 2, 0.0625 / 4
    residual = (4 * 0.375**2 + 2 * 0.625**2 + 2 * 0.125**2) / 3 / 8
    expected = max(rows + columns - residual, rows)
    assert found.mean == 0.375
    assert found.detectable == pytest.approx(12.706204736 * math.sqrt(expected), rel=1e-9)
    additive = np.array([[0.0], [0.2]]) + np.array([[0.0, 1.0, 0.0, 0.5]])  # no residual: both variances count in full
    expected = 0.02 / 2 + 0.6875 / 3 / 4
    assert study.compare(additive, 0 * additive).detectable == pytest.approx(12.706204736 * math.sqrt(expected), rel=1e-9)


@pytest.mark.parametrize(
    ("mean", "better", "verdict"), [(0.3, True, "yes"), (-0.3, True, "no"), (0.3, False, "no"), (-0.3, False, "yes")]
)
def test_verdicts(mean: float, better: bool, verdict: str) -> None:
    assert study.Difference(mean, 0.2, better).verdict == verdict
    unclear = study.Difference(mean, 0.4, better).verdict
    assert unclear == "not distinguishable here (smallest detectable difference 0.4000)"
    alike = study.compare(np.ones((2, 3)), np.ones((2, 3)), better=better)
    assert alike.verdict == "not distinguishable here (the same on every example)"
    assert not study.compare(np.eye(2), 1 - np.eye(2)).same, "though the means are"


def test_each_half_is_scaled_by_the_temperature_of_the_other() -> None:
    labels = torch.arange(40) % 4
    noise = 3 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = noise + 2 * F.one_hot(labels, 4)
    scaled = study.cross_fitted(logits, labels)
    for half in (0, 1):
        temperature = fit_temperature(logits[1 - half :: 2], labels[1 - half :: 2]).temperature
        assert 0.1 < temperature < 50
        torch.testing.assert_close(scaled[half::2], logits[half::2] / temperature)
    right = 9 * F.one_hot(labels, 4).double()
    assert torch.equal(study.cross_fitted(right, labels), right), "examples that are all right say nothing"


# ---- report


def write_runs(folder: Path, chosen: list[study.Variant]) -> dict[str, dict[str, Tensor]]:
    """What finished runs leave behind, with random logits."""
    labels = torch.arange(EXAMPLES) % CLASSES
    written = {}
    for number, (variant, seed) in enumerate((v, s) for v in chosen for s in range(v.seeds)):
        own = torch.Generator().manual_seed(number)
        noise = 2 * torch.randn(EXAMPLES, CLASSES, generator=own, dtype=torch.float64)
        raw = noise + F.one_hot(labels, CLASSES).double()
        logits = {"raw": raw, "eq15": raw / 0.7, "temperature": raw / 0.75, "unshrink": raw / 0.8}
        place = folder / "runs" / f"{variant.name}-{seed}"
        (place / "scores").mkdir(parents=True)
        safetensors.torch.save_file(logits, place / "scores" / "logits.safetensors")
        safetensors.torch.save_file({"labels": labels}, place / "scores" / "labels.safetensors")
        attacked = {"clean": 0.1, "fgsm": 0.5, "iterative_fgsm": 0.75, "caveat": "No proof of anything."}
        between = {"lams": [0.0, 0.5, 1.0], "miss_rate": [0.1, 0.3, 0.1], "gradient_norm": [1.0, 2.0, 1.0], "pairs": 30}
        diagnosis = {"in_between": between, "jacobian_norm": 2.5, "adversarial": attacked, "transferred": attacked}
        facts: dict[str, Any] = {"variant": variant.name, "seed": seed, "threads": 1, "seconds": 60.0}
        (place / "scores" / "facts.json").write_text(json.dumps(facts))
        error = 0.01 * number
        memorised = {"error_on_real": error, "error_on_corrupted": 1 - error}
        report = {"best_test_error": error, "last_test_error": 2 * error, "memorisation": memorised, "diagnosis": diagnosis}
        (place / "report.json").write_text(json.dumps(report))
        written[f"{variant.name}-{seed}"] = {"logits": raw, "labels": labels}
    return written


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A study whose runs are all done; its data set has a name that is bad for HTML."""
    folder = tmp_path_factory.mktemp("reported")
    asked = Namespace(steps=100, seeds=2, noisy_examples=50, noisy_lr=0.01, scratch_lr=0.1)
    written = write_runs(folder, study.variants(asked))
    report = study.main(["--folder", str(folder), "--dataset", "<script>alert(1)</script>", "--seeds", "2"])
    assert report == folder / "report.html"
    return folder, written


def test_every_number_of_the_tables_is_that_of_its_run_folders(
    reported: tuple[Path, dict[str, dict[str, Tensor]]],
) -> None:
    folder, written = reported
    html, results = (folder / "report.html").read_text(encoding="utf-8"), json.loads((folder / "results.json").read_text())
    assert set(results["runs"]) == set(written)
    by_variant: dict[str, list[tuple[float, float]]] = {}
    for name, run in written.items():
        accuracy = float((run["logits"].argmax(1) == run["labels"]).double().mean())
        nll = float(F.cross_entropy(run["logits"], run["labels"]))
        assert results["runs"][name]["accuracy"] == pytest.approx(accuracy, abs=1e-12)
        assert results["runs"][name]["nll"] == pytest.approx(nll, abs=1e-12)
        by_variant.setdefault(name.rpartition("-")[0], []).append((accuracy, nll))
    assert len(results["variants"]) == len(by_variant)
    for row in results["variants"]:
        scores = np.array(by_variant[re.sub(r"-0( .*)?$", "", row["folder"])])
        (accuracy, nll), spread = scores.mean(0), scores.std(0, ddof=1)
        assert row["accuracy"] == f"{accuracy:.4f} ± {spread[0]:.4f}"
        assert row["nll"] == f"{nll:.4f} ± {spread[1]:.4f}"
        assert f'<td class="number">{row["accuracy"]}</td><td class="number">{row["nll"]}</td>' in html
    erm, mixed = (np.array([written[f"{name}-{s}"]["logits"].argmax(1) == written["erm-0"]["labels"] for s in (0, 1)])
                  for name in ("erm", "mixup-1"))  # fmt: skip
    first = results["answers"][0]
    assert first["differences"]["accuracy"]["mean"] == pytest.approx(mixed.mean() - erm.mean(), abs=1e-12)
    assert len(results["answers"]) == 10
    for answer in results["answers"]:
        assert answer["verdict"] in html.replace("&#39;", "'")


def test_report_needs_nothing_else_and_trusts_no_name(reported: tuple[Path, dict[str, dict[str, Tensor]]]) -> None:
    html = (reported[0] / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", html)
    assert "@import" not in html
    assert html.count('src="data:image/png;base64,') == 7
    assert "No proof of anything." in html
    assert "--noisy-lr 0.01" in html


@pytest.mark.slow
def test_a_whole_study(pictures: Path, tiny_bit: Path, tmp_path: Path) -> None:
    report = study.main(arguments(pictures, tiny_bit, tmp_path / "study"))
    assert len(list((tmp_path / "study" / "runs").glob("*/scores/facts.json"))) == 118
    assert "118 runs" in report.read_text(encoding="utf-8")


def test_figures_of_the_page_are_those_of_the_committed_study() -> None:
    page, results = (DOCS / "mixup.md").read_text(encoding="utf-8"), json.loads((DOCS / "mixup_study.json").read_text())
    variants = {row["label"]: row for row in results["variants"]}
    rules = {(row["alpha"], row["rule"]): row for row in results["rules"]}

    def near(text: str) -> Any:
        """A mean with its spread, to the three places of the page."""
        return pytest.approx(float(text.split(" ")[0]), abs=5.6e-4)

    table = re.findall(r"^\| (0 \(ERM\)|[\d.]+|inf) \| (\.\d+) \| (\.\d+) \| ([+-]\.\d+) \| (\.\d+)? ?\|$", page, re.MULTILINE)
    assert len(table) == 7
    for alpha, accuracy, nll, gap, fitted in table:
        row = variants["ERM" if alpha.startswith("0 ") else f"mixup, alpha {alpha}"]
        assert [float(accuracy), float(nll), float(gap)] == [near(row["accuracy"]), near(row["nll"]), near(row["gap"])]
        assert alpha.startswith("0 ") or float(fitted) == near(rules[alpha, "fitted"]["nll"])
    scores = re.findall(r"^\| ([\d.]+|inf) \| (\.\d+) \| (\.\d+) \| (\.\d+) \| (\.\d+) \| (\.\d+) \|$", page, re.MULTILINE)
    assert len(scores) == 4
    for alpha, *by_rule in scores:
        names = ("raw", "eq15", "temperature", "unshrink", "fitted")
        assert [float(value) for value in by_rule] == [near(rules[alpha, name]["nll"]) for name in names]
    closed = re.findall(r"^\| ([\d.]+|inf)(?: \(.*?\))? \| (\.\d+) \| (\.\d+) \| (\.\d+) \| (\.\d+) \|$", page, re.MULTILINE)
    assert len(closed) == 6
    for alpha, *values in closed:
        theta_bar = bit_mixup.mixing_moments(float(alpha)).theta_bar
        floor = bit_mixup.loss_floor(float(alpha), [100] * 10)
        accuracy = best_train_accuracy(float(alpha), [100] * 10)
        assert [float(value) for value in values] == pytest.approx([theta_bar, 1 - theta_bar, accuracy, floor], abs=5.1e-4)
