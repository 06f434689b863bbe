"""Does a saved model predict what its run did, whatever it is asked about, and does it say what it can not read?"""

import csv
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageFile

import bit_mixup
from bit_mixup.cli import main as command
from bit_mixup.errors import CheckpointError, ConfigError, DataError, WeightsError
from bit_mixup.outcomes import Outcomes
from bit_mixup.pictures import find_pictures
from bit_mixup.repeating import present_facts
from bit_mixup.workflow import TransferResult

RULES = ("raw", "eq15", "temperature", "unshrink", "fitted")


def options(tiny_bit: Path, folder: Path) -> dict[str, Any]:
    sizes = {"resize_size": 48, "crop_size": 40, "steps": 4, "batch_size": 16, "save_every": 4}
    return {"dataset": "digits", "model": str(tiny_bit), "flip": False, "threads": 1, "output_dir": folder, **sizes}


@pytest.fixture(scope="module")
def run(tiny_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> TransferResult:
    """A run with mixup and held-out examples, so that each rule has something to do."""
    folder = tmp_path_factory.mktemp("classifier") / "run"
    mixing = {"mixup_alpha": 0.5, "validation_fraction": 0.1, "prediction_rule": "unshrink", "base_lr": 0.05}
    return bit_mixup.transfer(**options(tiny_bit, folder), **mixing)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 test digits as files, in two folders."""
    folder = tmp_path_factory.mktemp("pictures")
    digits = bit_mixup.load_image_dataset("digits").test
    for index, picture in enumerate(digits.read(range(12))):
        place = folder / ("first" if index < 6 else "second")
        place.mkdir(exist_ok=True)
        picture.save(place / f"{index:02}.png")
    return folder


def with_rule(run: TransferResult, rule: str, folder: Path) -> Path:
    """A copy of the run's folder whose model predicts by another rule."""
    shutil.copytree(run.output_dir, folder, ignore=shutil.ignore_patterns("checkpoints"))
    chosen = json.loads((folder / "model" / "prediction.json").read_text())
    temperature = 1.7 if rule == "fitted" else 1.0
    (folder / "model" / "prediction.json").write_text(json.dumps(chosen | {"rule": rule, "temperature": temperature}))
    return folder


@pytest.mark.parametrize("rule", RULES)
def test_a_saved_model_predicts_by_its_rule(run: TransferResult, tmp_path: Path, rule: str) -> None:
    """Against logits of timm's own copy of the model and formulas written out here."""
    classifier = bit_mixup.load(with_rule(run, rule, tmp_path / rule))
    test = run.plan.data.test
    images = np.stack([run.plan.view.evaluate(picture) for picture in test.read(range(32))])
    record = run.record
    assert record.mean_image is not None
    shares, centre, mean = record.label_shrink, record.label_centre, record.mean_image.double()
    model = timm.create_model(f"local-dir:{run.output_dir / 'model'}", pretrained=True).eval()

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(((pixels - 0.5) / 0.5).float()).double()

    pixels = torch.from_numpy(images).double() / 255
    shrunk = logits(record.input_shrink * pixels + (1 - record.input_shrink) * mean)
    plain = logits(pixels)
    undone = (centre + (shrunk.softmax(1) - centre) / shares).clamp(1e-6, 1)
    expected = {
        "raw": plain.softmax(1),
        "eq15": ((shrunk - (1 - shares) * centre) / shares).softmax(1),
        "temperature": (plain / shares).softmax(1),
        "unshrink": undone / undone.sum(1, keepdim=True),
        "fitted": (plain / 1.7).softmax(1),
    }
    found = classifier.predict(test.read(range(32)))
    assert classifier.choice.rule == rule
    by_class = [dict(zip(one.classes, one.probabilities, strict=True)) for one in found]
    table = torch.tensor([[row[name] for name in classifier.label_names] for row in by_class])
    torch.testing.assert_close(table.double(), expected[rule], rtol=0, atol=2e-6)
    others = [name for name in RULES if name not in (rule, "raw")]
    assert all((expected[rule] - expected[name]).abs().max() > 1e-4 for name in others)


@pytest.mark.parametrize("door", ["run", "model", "relative"])
def test_the_classifier_scores_as_its_run_did(run: TransferResult, door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.output_dir.parent)
    place = {"run": run.output_dir, "model": run.output_dir / "model", "relative": Path(run.output_dir.name)}[door]
    found = bit_mixup.evaluate_model(bit_mixup.load(place))
    then = Outcomes.load(run.output_dir / "predictions.csv")
    assert found.report.accuracy == run.report.accuracy
    assert found.report.nll == pytest.approx(run.report.nll, abs=1e-6)
    np.testing.assert_allclose(found.outcomes.nll, then.nll, atol=1e-5)
    np.testing.assert_array_equal(found.outcomes.labels, then.labels)
    assert found.outcomes.ids == then.ids
    assert found.outcomes.digests == then.digests
    assert then.nll.mean() == pytest.approx(run.report.nll, abs=1e-6)
    assert then.correct.mean() == run.report.accuracy


def as_opened(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        picture.load()
        return picture


def test_doors_for_pictures_agree(run: TransferResult, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = bit_mixup.load(run.output_dir)
    files = sorted(pictures.rglob("*.png"))
    opened = [as_opened(file) for file in files]
    expected = classifier.predict(files)
    assert len({one.probabilities for one in expected}) > 1
    monkeypatch.chdir(pictures)
    doors = {
        "paths as text": [str(file) for file in files],
        "PIL": opened,
        "arrays": [np.asarray(picture.convert("RGB")) for picture in opened],
        "a folder": find_pictures([str(pictures)]),
        "a glob": find_pictures([str(pictures / "**" / "*.png")]),
        "names in turn": find_pictures(["first", "second/*.png", "first/00.png"]),
        "the data set": find_pictures(["digits"]),
    }
    for door, images in doors.items():
        found = classifier.predict(images)[:12]
        assert [one.classes for one in found] == [one.classes for one in expected], door
        probabilities = [one.probabilities for one in found]
        np.testing.assert_allclose(probabilities, [one.probabilities for one in expected], atol=2e-6, err_msg=door)
    assert [one.id for one in expected] == [str(file) for file in files]
    alone = classifier.predict(files[3])
    assert [one.classes for one in alone] == [expected[3].classes]
    assert classifier.predict([]) == []


def test_batches_and_workers_do_not_matter(run: TransferResult, pictures: Path) -> None:
    classifier, files = bit_mixup.load(run.output_dir), sorted(pictures.rglob("*.png"))
    (pictures / "second" / "zz.png").write_bytes(b"no picture")
    try:
        files = find_pictures([str(pictures)])
        plain = classifier.predict(files)
        for batch_size, workers in ((1, 0), (5, 0), (4, 2)):
            found = classifier.predict(files, batch_size=batch_size, num_workers=workers)
            assert [(one.id, one.classes, one.error) for one in found] == [(one.id, one.classes, one.error) for one in plain]
    finally:
        (pictures / "second" / "zz.png").unlink()
    assert "zz.png" in str(plain[-1].error)
    assert plain[-1].label is None


def test_unreadable_files_are_listed_and_the_rest_is_done(
    run: TransferResult, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(pictures / "first", folder)
    whole = (folder / "02.png").read_bytes()
    (folder / "02.png").write_bytes(whole[: len(whole) // 2])
    (folder / "03\x1b[31m.png").write_bytes(b"")
    table = tmp_path / "out.csv"
    with pytest.raises(SystemExit) as stopped:
        command(["predict", str(run.output_dir), str(folder), "--output", str(table), "--top", "2"])
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert "2 of 7 could not be read" in said.err
    assert "02.png" in said.err
    assert "\x1b[31m" not in said.err + said.out
    assert "UNREADABLE" in said.out
    rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))
    expected = bit_mixup.load(run.output_dir).predict(sorted(folder.iterdir()), top=2)
    assert [row["id"] for row in rows] == [one.id for one in expected]
    for row, one in zip(rows, expected, strict=True):
        assert (row["error"] == "") == (one.error is None)
        if one.error is None:
            assert (row["class_1"], row["class_2"]) == one.classes
            assert (float(row["probability_1"]), float(row["probability_2"])) == pytest.approx(one.probabilities, abs=1e-6)


def test_json_lines_say_the_same(run: TransferResult, pictures: Path, tmp_path: Path) -> None:
    table = tmp_path / "out.jsonl"
    command(["predict", str(run.output_dir), str(pictures), "--output", str(table), "--top", "3"])
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    expected = bit_mixup.load(run.output_dir).predict(find_pictures([str(pictures)]), top=3)
    assert [row["id"] for row in rows] == [one.id for one in expected]
    assert [tuple(found["class"] for found in row["classes"]) for row in rows] == [one.classes for one in expected]
    assert all(row["error"] is None for row in rows)


def test_a_data_set_is_predicted_without_labels(run: TransferResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a saved data set with a split of that name and no labels."""
    digits = bit_mixup.load_image_dataset("digits").test
    encoded = [{"bytes": one["bytes"], "path": None} for one in digits.encoded(range(5))]
    unlabelled = Dataset.from_dict({"picture": encoded, "note": list("abcde")}).cast_column("picture", ImageFeature())
    DatasetDict({"train": unlabelled.select([0]), "new": unlabelled}).save_to_disk(tmp_path / "saved")
    asked = ["--split", "new", "--image-column", "picture", "--top", "1"]
    command(["predict", str(run.output_dir), str(tmp_path / "saved"), *asked])
    lines = [line for line in capsys.readouterr().out.splitlines() if "new row" in line]
    expected = bit_mixup.load(run.output_dir).predict(digits.read(range(5)), top=1)
    assert [line.split("  ")[1].rsplit(" ", 1)[0] for line in lines] == [one.label for one in expected]


def test_evaluate_writes_a_report_of_any_data_set(
    run: TransferResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some classes alone, in another order and with labels as names, as another data set may have them."""
    digits = bit_mixup.load_image_dataset("digits").test
    rows = np.flatnonzero(np.isin(digits.labels, (3, 7)))[:20].tolist()
    names = ["7", "3"]
    labels = [names.index(str(digits.labels[row])) for row in rows]
    features = Features({"image": ImageFeature(), "kind": ClassLabel(names=names), "other": Value("string")})
    some = Dataset.from_dict({"image": digits.encoded(rows), "kind": labels, "other": ["x"] * 20}, features=features)
    DatasetDict({"elsewhere": some}).save_to_disk(tmp_path / "two")
    arguments = ["evaluate", str(run.output_dir), "--dataset", str(tmp_path / "two"), "--threads", "1"]
    command([*arguments, "--output-dir", str(tmp_path / "report")])
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    then = Outcomes.load(run.output_dir / "predictions.csv")
    assert report["num_examples"] == 20
    assert report["accuracy"] == then.correct[rows].mean()
    assert report["nll"] == pytest.approx(then.nll[rows].mean(), abs=1e-5)
    assert report["raw"]["nll"] != report["nll"]
    assert str(tmp_path / "report" / "report.html") in said
    assert "bit-mixup evaluate" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        command([*arguments, "--output-dir", str(tmp_path / "report")])
    assert "holds an evaluation already" in capsys.readouterr().err
    command([*arguments, "--output-dir", str(tmp_path / "report"), "--overwrite", "--rule", "raw"])
    assert json.loads((tmp_path / "report" / "report.json").read_text())["raw"] is None


def test_an_evaluation_that_is_there_is_told_before_pictures_are_decoded(
    run: TransferResult, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_rule(run, "raw", tmp_path / "run")
    command(["evaluate", str(folder), "--split", "train"])
    said = capsys.readouterr().out
    assert "NOTE: the model was trained on examples of this split" in said
    page = (folder / "evaluations" / "digits-train" / "report.html").read_text(encoding="utf-8")
    assert "the model was trained on examples of this split" in page
    assert "digits (train): 1,000 examples, 10 of the model&#39;s 10 classes" in page
    for name, value in present_facts("cpu"):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page, "what it was scored with, beside what it was trained with"
    decoded: list[int] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", lambda picture: decoded.append(1))
    with pytest.raises(SystemExit):
        command(["evaluate", str(folder), "--split", "train"])
    assert "holds an evaluation already" in capsys.readouterr().err
    assert not decoded
    monkeypatch.undo()
    command(["evaluate", str(folder)])
    assert "NOTE" not in capsys.readouterr().out


def test_other_versions_are_told(run: TransferResult, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "model"
    shutil.copytree(run.output_dir / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    bit_mixup.load(folder)
    assert caplog.text == ""
    patched = {**config["versions"], "timm": config["versions"]["timm"] + ".post1", "numpy": "0.1"}  # fixes, and what is not used
    (folder / "config.json").write_text(json.dumps(config | {"versions": patched}))
    bit_mixup.load(folder)
    assert caplog.text == ""
    (folder / "config.json").write_text(json.dumps(config | {"versions": config["versions"] | {"pillow": "9.1.0"}}))
    with caplog.at_level(logging.WARNING):
        bit_mixup.load(folder)
    assert "pillow 9.1.0 ->" in caplog.text
    assert "decoding and resizing" in caplog.text
    assert "torch" not in caplog.text


def test_models_of_other_tools_predict_as_they_are(tiny_bit: Path, tmp_path: Path) -> None:
    """timm's own folder: without versions, rule or record; here without names, too."""
    folder = tmp_path / "plain"
    shutil.copytree(tiny_bit, folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("label_names", "versions", "std_eps"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    classifier = bit_mixup.load(folder)
    assert classifier.label_names == ("class 0", "class 1", "class 2", "class 3")
    assert (classifier.choice.rule, classifier.record, classifier.run) == ("raw", None, None)
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        expected = model(((torch.from_numpy(picture).permute(2, 0, 1)[None] / 255) - 0.5) / 0.5).softmax(1)[0]
    found = classifier.predict(picture)[0]
    assert found.probabilities == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-6)


def broken_rule(run: TransferResult, folder: Path) -> Path:
    shutil.copytree(run.output_dir / "model", folder)
    (folder / "mixup.json").unlink()
    return folder


def no_names(run: TransferResult, folder: Path) -> Path:
    shutil.copytree(run.output_dir / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"label_names": ["one"]}))
    return folder


def occupied(folder: Path) -> Path:
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    return folder


BAD = {
    "a name of nothing": (lambda run, tmp: find_pictures([str(tmp / "nowhere.png")]), DataError, "there is no such file"),
    "a glob of nothing": (lambda run, tmp: find_pictures([str(tmp / "*.png")]), DataError, "nothing that matches"),
    "no names": (lambda run, tmp: find_pictures([]), DataError, "no pictures were named"),
    "an empty folder": (lambda run, tmp: find_pictures([str(occupied(tmp / "a")), "x"]), DataError, "no picture files"),
    "a data set beside files": (lambda run, tmp: find_pictures([str(table(tmp)), "x.png"]), DataError, "must be named alone"),
    "a split of files": (lambda run, tmp: find_pictures([str(picture(tmp))], split="test"), DataError, 'split "test" belongs'),
    "no classes asked": (lambda run, tmp: bit_mixup.load(run.output_dir).predict([], top=0), ConfigError, "top is 0"),
    "batches of nothing": (lambda run, tmp: bit_mixup.load(run.output_dir).predict([], batch_size=0), ConfigError, "batch_size"),
    "another rule": (lambda run, tmp: bit_mixup.load(run.output_dir, rule="best"), ConfigError, 'rule "best"'),
    "a rule without record": (lambda run, tmp: bit_mixup.load(broken_rule(run, tmp / "m")), CheckpointError, "needs mixup.json"),
    "names of other classes": (lambda run, tmp: bit_mixup.load(no_names(run, tmp / "m")), WeightsError, "names 1 class"),
    "no data set known": (lambda run, tmp: score(run.output_dir / "model", tmp), ConfigError, "give --dataset"),
    "a column without data set": (lambda run, tmp: score_column(run), ConfigError, "--label-column"),
    "a foreign class": (lambda run, tmp: foreign(run), DataError, 'the class "eleven", which the model does not know'),
}  # fmt: skip


def table(folder: Path) -> Path:
    (folder / "t.csv").write_text("image,label\na.png,x\n")
    return folder / "t.csv"


def picture(folder: Path) -> Path:
    Image.new("RGB", (4, 4)).save(folder / "p.png")
    return folder / "p.png"


def score(model: Path, folder: Path) -> None:
    shutil.copytree(model, folder / "alone")
    bit_mixup.evaluate_model(bit_mixup.load(folder / "alone"))


def score_column(run: TransferResult) -> None:
    bit_mixup.evaluate_model(bit_mixup.load(run.output_dir), label_column="x")


def foreign(run: TransferResult) -> None:
    pictures = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in range(4)]
    data = Dataset.from_dict({"image": pictures, "label": ["1", "eleven"] * 2})
    bit_mixup.evaluate_model(bit_mixup.load(run.output_dir), data)


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_explained(run: TransferResult, tmp_path: Path, case: str) -> None:
    ask, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ask(run, tmp_path)


@pytest.mark.parametrize("odd", [np.zeros((3, 3, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4), np.uint8), 7])
def test_pictures_of_other_kinds_are_told(run: TransferResult, odd: Any) -> None:
    found = bit_mixup.load(run.output_dir).predict([odd, np.zeros((4, 4), np.uint8)])
    assert "expected a path, a picture of PIL, or an array (H, W, 3)" in str(found[0].error)
    assert found[1].error is None


def test_data_of_a_run_that_are_gone(run: TransferResult, tmp_path: Path) -> None:
    for dataset, message in (("memory-abc", "was in memory and is gone"), (str(tmp_path / "data"), "has other classes now")):
        folder = tmp_path / dataset[-3:]
        shutil.copytree(run.output_dir, folder, ignore=shutil.ignore_patterns("checkpoints"))
        asked = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(asked | {"dataset": dataset, "validation_fraction": 0.0}))
        for kind in ("x", "y"):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            for shade in range(5):
                Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / "data" / kind / f"{shade}.png")
        classifier = bit_mixup.load(folder)
        with pytest.raises((ConfigError, DataError), match=message):
            bit_mixup.evaluate_model(classifier)


def test_a_picture_that_is_broken_stops_an_evaluation(run: TransferResult) -> None:
    """A score on the rest would be one of other examples."""
    digits = bit_mixup.load_image_dataset("digits").test
    encoded = [{"bytes": one["bytes"], "path": None} for one in digits.encoded(range(3))] + [{"bytes": b"no", "path": None}]
    data = Dataset.from_dict({"image": encoded, "label": ["1", "2", "1", "2"]}).cast_column("image", ImageFeature(decode=False))
    classifier = bit_mixup.load(run.output_dir)
    with pytest.raises(DataError, match="train row 3"):
        bit_mixup.evaluate_model(classifier, data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x.txt"], ".csv or .jsonl"),
        (["--threads", "0"], "threads"),
        (["--top", "0"], "top is 0"),
    ],
)
def test_bad_options_of_predict(
    run: TransferResult, pictures: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(["predict", str(run.output_dir), str(pictures), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_evaluation_does_not_write_into_other_folders(
    run: TransferResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (occupied(tmp_path / "mine"), run.output_dir):
        with pytest.raises(SystemExit):
            command(["evaluate", str(run.output_dir), "--output-dir", str(place), "--overwrite"])
        assert "holds no evaluation" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
