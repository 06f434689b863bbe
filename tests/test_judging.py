"""Does a whole run say how its model should predict, what it learnt besides, and nothing that was not asked?"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import bit_mixup
from bit_mixup.cli import main
from bit_mixup.corruption import corrupt_labels
from bit_mixup.data import load_image_dataset
from bit_mixup.models import Normalize
from bit_mixup.sampling import Purpose, generator
from bit_mixup.theory import mixing_moments
from bit_mixup.unmixing import MixupRecord, RuleChoice, predict_by_rule


def read(folder: Path, name: str = "report.json") -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rich(tiny_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> bit_mixup.TransferResult:
    """A run with everything asked for."""
    return bit_mixup.transfer(
        dataset="digits", model=str(tiny_bit), examples_per_class=6, steps=6, batch_size=16, resize_size=48, crop_size=40,
        flip=False, threads=1, save_every=2, mixup_alpha=0.4, validation_fraction=0.25, prediction_rule="eq15", score_every=3,
        corrupt_labels=0.25, diagnostics=True, output_dir=tmp_path_factory.mktemp("rich") / "run",
    )  # fmt: skip


def test_the_rule_asked_for_is_applied_to_the_scores(rich: bit_mixup.TransferResult) -> None:
    report = read(rich.output_dir)
    assert report["prediction"]["rule"] == "eq15"
    assert set(report["prediction"]["held_out_nll"]) == {"raw", "eq15", "temperature", "unshrink", "fitted"}
    assert report["prediction"]["num_held_out"] == len(rich.plan.data.validation)
    labels = torch.from_numpy(rich.plan.data.test.labels)
    raw = bit_mixup.evaluate(rich.logits, labels, rich.plan.data.class_names)
    assert report["raw"]["nll"] == raw.nll
    assert rich.report.nll != raw.nll
    assert "Predicted by the rule eq15" in (rich.output_dir / "report.md").read_text(encoding="utf-8")


def test_the_record_stands_beside_the_weights(rich: bit_mixup.TransferResult) -> None:
    record = MixupRecord.load(rich.output_dir / "model")
    assert record is not None
    assert record.alpha == 0.4
    assert record.theta_bar == record.input_shrink == record.label_shrink == mixing_moments(0.4).theta_bar
    frequencies = np.bincount(rich.plan.data.train.labels, minlength=10) / len(rich.plan.data.train)
    np.testing.assert_allclose(record.class_frequencies, frequencies)
    assert record.mean_image is not None
    assert record.mean_image.shape == (3, 40, 40)
    assert RuleChoice.load(rich.output_dir / "model") == rich.choice
    again = bit_mixup.load_bit(str(rich.output_dir / "model"), keep_head=True)
    assert again.num_classes == 10, "a folder with a record is still a folder of weights"


def test_wrong_labels_are_trained_on_and_reported(rich: bit_mixup.TransferResult) -> None:
    report = read(rich.output_dir)["memorisation"]
    data = load_image_dataset("digits", examples_per_class=6, validation_fraction=0.25)
    expected = corrupt_labels(data.train.labels, 0.25, num_classes=10, seed=0)
    assert np.array_equal(rich.plan.data.train.labels, expected.labels)
    assert report["corrupted_examples"] == 15
    assert 0 <= report["error_on_real"] <= 1
    assert "15 training labels are replaced" in rich.plan.text()
    assert np.array_equal(rich.plan.data.validation.labels, data.validation.labels), "held-out labels stay as they are"


def test_diagnosed_runs_leave_a_reliability_diagram(rich: bit_mixup.TransferResult) -> None:
    with Image.open(rich.output_dir / "reliability.png") as picture:
        assert min(picture.size) > 500
        assert len(set(picture.convert("L").getdata())) > 20, "something is drawn"


def test_scores_on_the_way(rich: bit_mixup.TransferResult) -> None:
    rows = [json.loads(line) for line in (rich.output_dir / "scores.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    report = read(rich.output_dir)
    assert rows[-1]["accuracy"] == report["raw"]["accuracy"]
    assert report["best_test_error"] == min(1 - row["accuracy"] for row in rows)
    assert report["last_test_error"] == 1 - rows[-1]["accuracy"]


def test_what_was_held_out_is_no_test_of_what_was_taken_from_it(rich: bit_mixup.TransferResult) -> None:
    """eq15 was asked for: nothing was chosen. And the scores on the way are not by that rule."""
    for name in ("report.html", "report.md"):
        text = (rich.output_dir / name).read_text(encoding="utf-8")
        assert "Held out of the training split" in text
        assert "on these very examples" not in text
        assert "at last, of the model as it is" in text
    choices = {
        "auto": RuleChoice(rule="unshrink", temperature=1.0, why="the least ...", held_out_nll={}, num_held_out=9),
        "fitted": RuleChoice(rule="fitted", temperature=2.0, why="as asked. It is ...", held_out_nll={}, num_held_out=9),
        "unshrink": RuleChoice(rule="unshrink", temperature=1.0, why="as asked", held_out_nll={}, num_held_out=9),
    }
    owed = {name: choice.owed_to_held_out for name, choice in choices.items()}
    assert owed == {"auto": "the rule was chosen", "fitted": "the temperature was fitted", "unshrink": ""}


def test_diagnosis_is_reported_with_its_caveat(rich: bit_mixup.TransferResult) -> None:
    found = read(rich.output_dir)["diagnosis"]
    assert len(found["in_between"]["lams"]) == 11
    assert found["loss_parts"]["mixup"] == pytest.approx(
        sum(found["loss_parts"][n] for n in ("erm", "shrinkage", "perturbation"))
    )
    text = (rich.output_dir / "report.md").read_text(encoding="utf-8")
    assert "not a defence" in text
    table = [line for line in text.split("Between, around")[1].splitlines() if line.startswith("|")]
    assert len(table) == 2 + 11
    assert len({len(line) for line in table}) == 1, "the page shows it in letters of one width"


def test_transferred_attack_takes_a_model_of_the_same_classes(
    rich: bit_mixup.TransferResult, quick: dict[str, Any], tiny_bit: Path
) -> None:
    options = quick | {"diagnostics": True}
    result = bit_mixup.transfer(**options, attack_from=rich.output_dir / "model")
    found = read(result.output_dir)["diagnosis"]
    assert (found["transferred"]["transferred"], found["adversarial"]["transferred"]) == (True, False)
    images, labels = diagnosed_pictures(result)
    moved = bit_mixup.attack(rich.model.eval(), images, labels, normalize=Normalize.of(result.model), epsilon=4.0)
    with torch.no_grad():
        wrong = (result.model.eval()(moved).argmax(1) != labels).double().mean()
    assert found["transferred"]["fgsm"] == pytest.approx(float(wrong), abs=1e-12)
    assert found["transferred"]["from"] == str(rich.output_dir / "model")
    assert "With pictures made to fool" in (result.output_dir / "report.md").read_text(encoding="utf-8")
    with pytest.raises(bit_mixup.ConfigError, match=r"4 classes \(a, b, c, \.\.\.\), the data set has 10 classes"):
        bit_mixup.transfer(**options | {"overwrite": True}, attack_from=tiny_bit)
    with pytest.raises(bit_mixup.ConfigError, match="add --diagnostics"):
        bit_mixup.TransferConfig(dataset="digits", attack_from=str(tiny_bit))


def test_test_examples_of_one_class_have_nothing_between_them(quick: dict[str, Any]) -> None:
    digits = datasets.Dataset.from_list(
        [{"image": Image.new("L", (8, 8), 25 * i), "label": i % 2} for i in range(8)],
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}),
    )
    splits = datasets.DatasetDict({"train": digits, "test": digits.filter(lambda row: row["label"] == 0)})
    options = {"dataset": splits, "diagnostics": True, "steps": 2, "examples_per_class": None, "mixup_alpha": math.inf}
    result = bit_mixup.transfer(**quick | options)
    assert read(result.output_dir)["diagnosis"]["loss_parts"]["alpha"] == "inf"
    assert read(result.output_dir)["diagnosis"]["in_between"] is None
    assert "nothing lies between two" in (result.output_dir / "report.md").read_text(encoding="utf-8")


def diagnosed_pictures(result: bit_mixup.TransferResult) -> tuple[torch.Tensor, torch.Tensor]:
    """The sample of test pictures that a run's diagnosis looks at."""
    part = result.plan.data.test
    rows = generator(0, Purpose.DIAGNOSTICS, 1).permutation(len(part))[:256].tolist()
    pictures = np.stack([result.plan.view.evaluate(picture) for picture in part.read(rows)])
    return Normalize.of(result.model)(torch.from_numpy(pictures)), torch.from_numpy(part.labels[rows])


def test_a_resumed_run_scores_as_one_that_was_not_interrupted(rich: bit_mixup.TransferResult, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(rich.output_dir, folder)
    shutil.rmtree(folder / "checkpoints" / "step_000006")
    shutil.rmtree(folder / "model")
    before = (folder / "scores.jsonl").read_text()
    config = bit_mixup.TransferConfig.from_json(folder / "config.json")
    options = {name: value for name, value in vars(config).items() if name not in ("dataset", "output_dir", "resume")}
    again = bit_mixup.transfer(dataset="digits", output_dir=folder, resume=True, **options)
    assert (folder / "scores.jsonl").read_text() == before
    assert torch.equal(again.logits, rich.logits)


@pytest.mark.parametrize("law", [{"mixup_partner": "neighbours"}, {"mixup_partner": "same_class"}, {"mixup_form": "approximate"},
                                 {"mixup_stage": 2}])  # fmt: skip
def test_laws_through_a_whole_run(law: dict[str, Any], quick: dict[str, Any]) -> None:
    options = quick | {"mixup_alpha": 1.0} | law
    first = bit_mixup.transfer(**options)
    plain = bit_mixup.transfer(**quick | {"mixup_alpha": 1.0, "output_dir": quick["output_dir"] / "plain"})
    second = bit_mixup.transfer(**options | {"output_dir": quick["output_dir"] / "again"})
    assert torch.equal(first.logits, second.logits)
    assert not torch.equal(first.logits, plain.logits)
    assert first.choice.rule == "raw"
    assert first.record.alpha == 1.0


def test_nothing_is_undone_unasked(quick: dict[str, Any]) -> None:
    result = bit_mixup.transfer(**quick | {"mixup_alpha": 1.0})
    labels = torch.from_numpy(result.plan.data.test.labels)
    assert result.report == bit_mixup.evaluate(result.logits, labels, result.plan.data.class_names)
    report = read(result.output_dir)
    assert (report["prediction"]["rule"], report["raw"], report["memorisation"], report["diagnosis"]) == ("raw", None, None, None)
    assert not (result.output_dir / "scores.jsonl").exists()
    scores = predict_by_rule("eq15", result.logits, result.logits, result.record)
    assert not torch.equal(scores, result.logits), "though there would be something"


def test_plan_says_what_mixing_amounts_to(quick: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dataset", "digits", "--model", str(quick["model"]), "--mixup-alpha", "1"]
    main(["plan", *options])
    text = capsys.readouterr().out
    assert "theta_bar 0.7500" in text
    assert "smoothing by 0.2500" in text
    assert "accuracy can reach 77.5% and the loss 0.4504 at best" in text  # a half times the share of pairs of two classes
    for flags, says, silent in (
        (["--mixup-of", "labels"], "a label keeps 75.0%", "accuracy can reach"),
        (["--mixup-of", "inputs"], "a picture keeps 75.0%", "smoothing by"),
        (["--mixup-stage", "2"], "a picture after stage 2 keeps 75.0%", "a picture keeps"),
        (["--mixup-form", "approximate"], "9 times as long", "one weight for each"),
    ):
        main(["plan", *options, *flags])
        text = capsys.readouterr().out
        assert says in text
        assert silent not in text
    main(["plan", *options, "--label-smoothing", "0.1"])
    assert "together 0.325" in capsys.readouterr().out
    main(["plan", *options[:4], "--label-smoothing", "0.1"])
    assert "labels smoothed by 0.1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mixup-partner", "same_class"], "mixup_partner is same_class, but nothing is mixed"),
        (["--mixup-alpha", "1", "--mixup-stage", "9"], "mixup_stage is 9"),
        (["--label-smoothing", "1"], "label_smoothing is 1"),
        (["--corrupt-labels", "1.5"], "corrupt_labels is 1.5"),
        (["--score-every", "0"], "score_every is 0"),
        (["--prediction-rule", "fitted"], "validation-fraction"),
        (["--prediction-rule", "eq15"], "eq15 undoes"),
    ],
)
def test_requests_that_make_no_sense_stop_before_training(
    flags: list[str], message: str, quick: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dataset", "digits", "--model", str(quick["model"]), "--output-dir", str(quick["output_dir"]), *flags]
    with pytest.raises(SystemExit) as stop:
        main(["fine-tune", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not quick["output_dir"].exists()
