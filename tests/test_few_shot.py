"""Does the few-shot recipe keep its protocol?"""

import shutil
from pathlib import Path

import few_shot
import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pictures
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from bit_mixup import load_bit, load_image_dataset
from bit_mixup.images import View
from bit_mixup.storage import read_json, write_json

CLASSES = ("red", "green", "blue")


def write_pictures(folder: Path, *, seed: int, size: tuple[int, int] = (10, 8)) -> None:
    """A data set of noisy coloured pictures: 8 for each class to train on, 6 to test."""
    rng = np.random.default_rng(seed)
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    folder.mkdir(parents=True)
    for split, count in (("train", 8), ("test", 6)):
        labels = rng.permutation(np.repeat(np.arange(len(CLASSES)), count))
        pixels = rng.integers(0, 200, (len(labels), size[1], size[0], 3), dtype=np.uint8)
        pixels[np.arange(len(labels)), :, :, labels] += 55
        columns = {"image": [Pictures.fromarray(picture) for picture in pixels], "label": labels.tolist()}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set whose name ends as CIFAR-10's does."""
    folder = tmp_path_factory.mktemp("sets") / "cifar10"
    write_pictures(folder, seed=0)
    return folder


@pytest.fixture
def words(pictures: Path, tiny_bit: Path, tmp_path: Path) -> list[str]:
    """Arguments of a quick experiment of the two methods that need no training."""
    words = ["--dataset", str(pictures), "--model", str(tiny_bit), "--folder", str(tmp_path / "out")]
    return [*words, "--shots", "1", "4", "--seeds", "3", "--methods", "nearest", "ridge"]


def test_draws_are_balanced_and_kept(words: list[str], pictures: Path, tmp_path: Path) -> None:
    few_shot.main(words)
    path = tmp_path / "out" / "indices.json"
    saved, text = read_json(path), path.read_text()
    labels = load_image_dataset(str(pictures)).train.labels
    assert {shots: list(by_seed) for shots, by_seed in saved.items()} == {"1": ["0", "1", "2"], "4": ["0", "1", "2"]}
    for shots, by_seed in saved.items():
        for rows in by_seed.values():
            assert len(set(rows)) == len(rows)
            assert np.bincount(labels[rows]).tolist() == [int(shots)] * 3
    assert len({tuple(rows) for rows in saved["4"].values()}) == 3, "seeds draw different sets"
    few_shot.main(words)
    assert path.read_text() == text


def test_more_draws_may_follow_but_not_other_ones(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few_shot.main(words)
    path = tmp_path / "out" / "indices.json"
    before = read_json(path)
    few_shot.main([*words, "--seeds", "4", "--shots", "2"])
    after = read_json(path)
    assert list(after["2"]) == ["0", "1", "2", "3"]
    assert {shots: after[shots] for shots in before} == before
    after["4"]["1"][0] += 1
    write_json(path, after)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        few_shot.main(words)
    assert "4 a class and seed 1" in capsys.readouterr().err


def test_finished_scores_are_read_not_repeated(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = few_shot.main(words)["methods"]["ridge"]["4"]["scores"]
    path = tmp_path / "out" / "scores" / "ridge-4-1.json"
    write_json(path, read_json(path) | {"accuracy": 0.98765})
    (tmp_path / "out" / "scores" / "ridge-4-2.json").unlink()
    capsys.readouterr()
    entry = few_shot.main(words)["methods"]["ridge"]["4"]
    assert entry["scores"] == [first[0], 0.98765, first[2]]
    assert entry["max"] == 0.98765
    shown = capsys.readouterr().out
    assert shown.count("a class, seed") == 1, "only the missing score is computed"
    assert "/ 0.988 |" in shown
    assert "/ 0.988 |" in (tmp_path / "out" / "table.md").read_text()


def test_a_folder_belongs_to_one_experiment(
    words: list[str], pictures: Path, tiny_bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few_shot.main(words)
    other = tmp_path / "other"
    shutil.copytree(tiny_bit, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    write_pictures(tmp_path / "cifar10", seed=1)
    for change, names in (
        (["--model", str(other)], ["model", "weights"]),
        (["--dataset", str(tmp_path / "cifar10")], ["dataset", "rows", "pictures"]),
        (["--steps", "3", "--no-flip"], ["steps", "flip"]),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            few_shot.main([*words, *change])
        error = capsys.readouterr().err
        assert [line.split(":")[0].strip() for line in error.splitlines()[1:-1]] == names
        assert "choose another --folder" in error
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        few_shot.main([*words, "--folder", str(tmp_path / "mine")])
    assert "holds no experiment of this kind" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_ridge_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    train, test, labels = rng.normal(size=(12, 5)) + 1, rng.normal(size=(200, 5)) + 1, np.repeat([0, 1, 2], [7, 4, 1])
    predicted = few_shot.ridge_labels(train, labels, test)
    x, z = normalize(train), normalize(test)
    augmented = np.hstack([x, np.ones((12, 1))])  # the intercept is a weight without a penalty
    penalties = np.diag([few_shot.PENALTY] * 5 + [0.0])
    weights = np.linalg.solve(augmented.T @ augmented + penalties, augmented.T @ (2 * np.eye(3)[labels] - 1))
    assert (predicted == (np.hstack([z, np.ones((200, 1))]) @ weights).argmax(1)).all()
    assert (predicted == RidgeClassifier(alpha=few_shot.PENALTY).fit(x, labels).predict(z)).all()
    assert (predicted != few_shot.ridge_labels(train, labels, test, penalty=1000.0)).any(), "the penalty has a say"


def test_nearest_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (count, 48), dtype=np.uint8) for count in (30, 2500))
    labels = rng.integers(0, 7, 30)
    expected = KNeighborsClassifier(1).fit(train.astype(float), labels).predict(test.astype(float))
    assert (few_shot.nearest_labels(train, labels, test) == expected).all()


def test_pictures_are_compared_at_their_own_size_where_it_is_small(pictures: Path, tmp_path: Path) -> None:
    part = load_image_dataset(str(pictures)).test
    assert few_shot.pixel_size(part) == (10, 8)
    assert (few_shot.pixels(part, (10, 8)) == np.stack([np.asarray(picture).ravel() for picture in part.read(range(18))])).all()
    write_pictures(tmp_path / "large", seed=0, size=(33, 20))
    assert few_shot.pixel_size(load_image_dataset(str(tmp_path / "large")).test) == (32, 32)


def test_features_are_those_of_timm(pictures: Path, tiny_bit: Path) -> None:
    part = load_image_dataset(str(pictures)).test
    view = View(resize_size=48, crop_size=40, flip=False, interpolation="bilinear")
    found = few_shot.features(part, load_bit(str(tiny_bit), num_classes=3).eval(), view)
    model = timm.create_model(f"local-dir:{tiny_bit}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.no_grad():
        expected = model(torch.stack([transform(picture) for picture in part.read(range(len(part)))]))
    torch.testing.assert_close(torch.from_numpy(found), expected)


def test_fine_tuning_leaves_scores_table_and_plot(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = [*words, "--methods", *few_shot.METHODS, "--shots", "2", "--seeds", "2", "--scratch-rates", "0.01", "0.3"]
    words += ["--steps", "2", "--batch-size", "8"]
    results = few_shot.main(words)
    assert {method: list(by) for method, by in results["methods"].items()} == {method: ["2"] for method in few_shot.METHODS}
    assert len(list((out / "scores").iterdir())) == 2 * 5
    assert results["methods"]["scratch"]["2"]["rate"] in (0.01, 0.3)
    shown = capsys.readouterr().out
    table = (out / "table.md").read_text()
    assert table in shown
    for method, by in results["methods"].items():
        low, middle, high = (by["2"][key] for key in ("min", "median", "max"))
        assert (low, middle, high) == (min(by["2"]["scores"]), np.median(by["2"]["scores"]), max(by["2"]["scores"])), method
        assert f" | {low:.3f} / **{middle:.3f}** / {high:.3f} |" in table
    assert read_json(out / "results.json") == results
    with Pictures.open(out / "few_shot.png") as plot:
        assert plot.size[0] > 800
    run = out / "runs" / "pretrained-2-1"
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "plan.json",
        "predictions.csv",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert read_json(run / "plan.json")["rows"] == read_json(out / "indices.json")["2"]["1"]
    # A run that was finished, but whose score was not yet kept, is not trained again.
    write_json(run / "report.json", read_json(run / "report.json") | {"accuracy": 0.125})
    (out / "scores" / "pretrained-2-1.json").unlink()
    assert few_shot.main(words)["methods"]["pretrained"]["2"]["scores"][1] == 0.125


def test_the_authors_figures_stand_beside_cifar(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few_shot.main(words)
    shown = capsys.readouterr().out
    assert "| BiT-M R50x1 | 0.458 / **0.579** / 0.657 | 0.803 / **0.823** / 0.849 |" in shown
    assert "README of google-research/big_transfer" in shown
    assert few_shot.published("uoft-cs/CIFAR100")["BiT-M R152x2"][5] == pytest.approx((0.703, 0.720, 0.723))
    assert few_shot.published("digits") == few_shot.published("cifar10-c") == {}
    for by_model in few_shot.PUBLISHED.values():
        for by_shots in by_model.values():
            assert all(list(figures) == sorted(figures) for figures in by_shots.values())


def test_what_makes_no_sense_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, message in (
        (["--seeds", "0"], "at least 1"),
        (["--shots", "9"], "has only 8"),
        (["--model", "nothing"], "nothing"),
    ):
        with pytest.raises(SystemExit, match="2"):
            few_shot.main([*words, *wrong])
        assert message in capsys.readouterr().err
