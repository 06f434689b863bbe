"""Does the VTAB recipe learn from the right examples, by the right views, once, and say what it could not do?"""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vtab
from datasets import ClassLabel, Dataset, Features, Image
from hub import Files, LoopbackHub
from PIL import Image as Pictures

from bit_mixup.errors import ConfigError, DataError
from bit_mixup.storage import read_json

SPLITS = ("train", "validation", "test")
SVHN = "clip-benchmark/wds_vtab-svhn"
LOCATION = "clip-benchmark/wds_vtab-dsprites_label_x_position"
SUN = "dpdl-benchmark/sun397"
QUICK = "--resolution model --steps 4 --batch-size 8 --threads 1".split()
OURS = ("svhn", "sun397", "dsprites-location")


def picture(split: str, row: int, kind: str = "png") -> bytes:
    """A picture whose colour says of which split and row it is."""
    file = io.BytesIO()
    Pictures.new("RGB", (6, 6), (SPLITS.index(split), *divmod(row, 256))).save(file, kind, lossless=True)
    return file.getvalue()


def origin(encoded: dict[str, Any]) -> tuple[str, int]:
    """The split and row that a picture says it is of."""
    split, high, low = Pictures.open(io.BytesIO(encoded["bytes"])).convert("RGB").getpixel((0, 0))
    return SPLITS[split], 256 * high + low


def tables(counts: dict[str, int], classes: int) -> Files:
    """A data set in parquet; the label of row r is r modulo the number of classes."""
    features = Features({"image": Image(), "label": ClassLabel(names=[f"kind {number}" for number in range(classes)])})
    files: dict[str, bytes | Path] = {}
    for split, count in counts.items():
        pictures = [{"bytes": picture(split, row), "path": None} for row in range(count)]
        table = io.BytesIO()
        columns = {"image": pictures, "label": [row % classes for row in range(count)]}
        Dataset.from_dict(columns, features=features).to_parquet(table)
        files[f"data/{split}-00000-of-00001.parquet"] = table.getvalue()
    return files


def webdataset(counts: dict[str, int], classes: int) -> Files:
    """The same as the hub's WebDatasets have it: shards of pictures and labels, and how many shards there are."""
    files: dict[str, bytes | Path] = {}
    for split, count in counts.items():
        shard = io.BytesIO()
        with tarfile.open(fileobj=shard, mode="w") as tar:
            for row in range(count):
                for ending, content in (("cls", str(row % classes).encode()), ("webp", picture(split, row, "webp"))):
                    member = tarfile.TarInfo(f"s{row:07d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        files[f"{split}/0.tar"] = shard.getvalue()
        files[f"{split}/nshards.txt"] = b"1"
    return files


@pytest.fixture(scope="module", autouse=True)
def sets(hub: LoopbackHub) -> None:
    """Stand-ins of three tasks' sets: one of classes, one of labels to be joined, one with a validation split."""
    hub.add_dataset(SVHN, webdataset({"train": 1100, "test": 20}, 10))
    hub.add_dataset(LOCATION, webdataset({"train": 1040, "test": 64}, 32))
    hub.add_dataset(SUN, tables({"train": 900, "validation": 260, "test": 30}, 397))


def words(folder: Path, model: Path, tasks: Sequence[str], *more: str) -> list[str]:
    """Arguments of a quick experiment."""
    return ["--folder", str(folder), "--model", str(model), "--tasks", *tasks, *QUICK, *more]


@pytest.fixture(scope="module")
def finished(tiny_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three finished tasks."""
    folder = tmp_path_factory.mktemp("vtab") / "out"
    vtab.main(words(folder, tiny_bit, OURS))
    return folder


def test_the_tasks_are_vtabs_and_the_papers() -> None:
    counts = {group: len([task for task in vtab.TASKS if task.group == group]) for group in (*vtab.GROUPS["vtab"], "Paper")}
    assert counts == {"Natural": 7, "Specialized": 4, "Structured": 8, "Paper": 5}
    assert len(vtab.BY_NAME) == len(vtab.TASKS) == 24
    assert len(vtab.Protocol().chosen) == 19
    assert {task.name for task in vtab.TASKS if not task.flip} == {
        "dsprites-orientation",
        "dsprites-location",
        "smallnorb-azimuth",
    }
    assert {task.name for task in vtab.TASKS if not task.crop} == {
        "clevr-count",
        "clevr-distance",
        "dmlab",
        "kitti-distance",
        "dsprites-location",
    }
    official = [task.lists for task in vtab.TASKS if task.group != "Paper"]
    assert len(set(official)) == 19
    assert None not in official


def test_a_thousand_examples_of_the_right_splits(finished: Path) -> None:
    wanted = {"svhn": {"train": 1000}, "dsprites-location": {"train": 1000}, "sun397": {"train": 800, "validation": 200}}
    for name, counts in wanted.items():
        task, score = vtab.BY_NAME[name], read_json(finished / "scores" / f"{name}.json")
        examples = vtab.from_hub(task, seed=0)
        train = [origin(encoded) for encoded in examples.splits["train"]["image"]]
        assert len(train) == len(set(train)) == 1000
        drawn = {split: sorted(row for of, row in train if of == split) for split in counts}
        assert {split: len(rows) for split, rows in drawn.items()} == counts
        assert score["rows"] == drawn, "the same draw each time"
        assert score["train_examples"] == read_json(finished / "runs" / name / "plan.json")["resolved"]["data"]["train_examples"]
        stored = task.stored or task.classes
        test = [origin(encoded) for encoded in examples.splits["test"]["image"]]
        assert test == [("test", row) for row in range(len(test))]
        for split, rows in (("train", train), ("test", test)):
            expected = [int(row % stored // (stored / task.classes)) for _, row in rows]
            assert examples.splits[split]["label"][:] == expected
        other = vtab.from_hub(task, seed=1)
        assert {origin(encoded) for encoded in other.splits["train"]["image"]} != set(train)


def test_labels_are_joined_as_in_vtab() -> None:
    # floordiv of the value by the quotient, in task_adaptation/data/dsprites.py
    for name, stored in (("dsprites-location", 32), ("dsprites-orientation", 40)):
        split = Dataset.from_dict({"cls": list(range(stored))})
        joined = vtab.labels_of(vtab.BY_NAME[name], split, "train", "cls")
        assert joined.tolist() == [int(value // (stored / 16)) for value in range(stored)]
        assert np.unique(joined).tolist() == list(range(16))


def test_class_names_of_the_set_are_kept(finished: Path) -> None:
    names = read_json(finished / "runs" / "sun397" / "plan.json")["resolved"]["data"]["class_names"]
    assert names == [f"kind {number}" for number in range(397)], "also of classes that none of the 1,000 has"
    names = read_json(finished / "runs" / "dsprites-location" / "plan.json")["resolved"]["data"]["class_names"]
    assert names == [str(number) for number in range(16)]


def test_exceptions_reach_the_plan(finished: Path) -> None:
    def view(name: str) -> tuple[int, int, bool]:
        resolved = read_json(finished / "runs" / name / "plan.json")["resolved"]
        return resolved["hyper"]["resize_size"], resolved["hyper"]["crop_size"], resolved["flip"]

    assert view("svhn") == (48, 40, True)
    assert view("dsprites-location") == (40, 40, False)
    shown = (finished / "table.md").read_text()
    assert "| 48 → 40 |" in shown
    assert "| 40, no crop, no flip |" in shown


def test_the_rule_decides_the_size_without_a_crop(tiny_bit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arguments = [*words(folder, tiny_bit, ["dsprites-location"]), "--resolution", "rule", "--steps", "1", "--batch-size", "2"]
    vtab.main(arguments)
    hyper = read_json(folder / "runs" / "dsprites-location" / "plan.json")["resolved"]["hyper"]
    assert (hyper["resize_size"], hyper["crop_size"]) == (128, 128), "the rule's crop for small pictures"


def test_table_shows_ours_beside_the_published_figures(finished: Path) -> None:
    shown, results = (finished / "table.md").read_text(), read_json(finished / "results.json")
    scores = {name: read_json(finished / "runs" / name / "report.json")["accuracy"] for name in OURS}
    assert {name: entry["accuracy"] for name, entry in results["tasks"].items()} == scores
    for name, accuracy in scores.items():
        assert f"| {name} | 1,000 drawn | " in shown
        assert f" | {100 * accuracy:.2f} | " in next(line for line in shown.splitlines() if line.startswith(f"| {name} |"))
    natural = (scores["svhn"] + scores["sun397"]) / 2
    assert f"| Natural | mean of 2 of 7 |  |  | **{100 * natural:.2f}** |  | 80.29 |  | 80.77 |" in shown
    assert results["means"]["Natural"] == {"mean": natural, "tasks": 2, "of": 7}
    assert f"| VTAB-1k | mean of 3 of 19 |  |  | **{100 * sum(scores.values()) / 3:.2f}** |  | 72.65 |  | 73.51 |" in shown
    assert "Specialized" not in shown, "no mean of nothing"
    assert "README of google-research/big_transfer" in shown


def test_published_figures_agree_with_their_mean() -> None:
    for figures in (figures for figures in vtab.PUBLISHED.values() if vtab.MEAN in figures):
        mean = (7 * figures["Natural"] + 4 * figures["Specialized"] + 8 * figures["Structured"]) / 19
        assert mean == pytest.approx(figures[vtab.MEAN], abs=0.02)
    known = {*vtab.BY_NAME, *vtab.GROUPS["vtab"], vtab.MEAN}
    assert {name for figures in vtab.PUBLISHED.values() for name in figures} <= known


def test_finished_tasks_are_not_repeated(finished: Path, tiny_bit: Path, hub: LoopbackHub) -> None:
    files = [path for path in finished.rglob("*") if path.is_file() and path.name not in ("results.json", "table.md")]
    before = {path: path.stat().st_mtime_ns for path in files}
    table = (finished / "table.md").read_text()
    hub.requests.clear()
    vtab.main(words(finished, tiny_bit, ["svhn"]))
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert hub.requests == []
    assert (finished / "table.md").read_text() == table, "tasks of an earlier start stay in the table"
    assert not (finished / "runs" / "svhn" / "checkpoints").exists()


def test_an_interrupted_task_goes_on(tiny_bit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arguments = words(folder, tiny_bit, ["svhn"], "--keep-models")
    first = vtab.main(arguments)
    run = folder / "runs" / "svhn"
    metrics = (run / "metrics.jsonl").read_text()
    (folder / "scores" / "svhn.json").unlink()
    (run / "report.json").unlink()
    second = vtab.main(arguments)
    assert (run / "metrics.jsonl").read_text() == metrics, "no step was taken again"
    assert second["tasks"]["svhn"]["accuracy"] == first["tasks"]["svhn"]["accuracy"]


def test_what_can_not_be_had_is_listed(
    tiny_bit: Path, tmp_path: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    hub.add_dataset("clip-benchmark/wds_vtab-pcam", webdataset({"train": 20, "test": 8}, 3))
    with pytest.raises(SystemExit, match="1"):
        vtab.main(words(folder, tiny_bit, ["svhn", "eurosat", "kitti-distance", "patch-camelyon"]))
    shown, results = (folder / "table.md").read_text(), read_json(folder / "results.json")
    assert shown in capsys.readouterr().out
    assert list(results["tasks"]) == ["svhn"], "the others do not keep it from being run"
    assert "| eurosat |  |  |  | failed |" in shown
    assert '- eurosat: could not be fetched: data set "clip-benchmark/wds_vtab-eurosat":' in shown
    assert "- kitti-distance: could not be fetched: not confirmed: no search found" in shown
    assert 'wds_vtab-pcam train row 2 has the label 2 in "cls", not one of 0 to 1' in results["failures"]["patch-camelyon"]


def write_lists(folder: Path) -> None:
    """The official examples of kitti-distance, but few of them, as the archive has them."""
    for split, count in (("train800val200", 16), ("test", 8)):
        (folder / "kitti" / "images" / split).mkdir(parents=True)
        lines = [f"images/{split}/{row:06d}.png {row % 4}" for row in range(count)]
        for row, line in enumerate(lines):
            (folder / "kitti" / line.split(" ")[0]).write_bytes(picture("train", row))
        (folder / "kitti" / f"{split}.txt").write_text("\n".join(lines) + "\n")


def test_official_examples_are_read_from_lists(tiny_bit: Path, tmp_path: Path, hub: LoopbackHub) -> None:
    write_lists(tmp_path / "lists")
    hub.requests.clear()
    arguments = words(tmp_path / "out", tiny_bit, ["kitti-distance"], "--lists", str(tmp_path / "lists"))
    results = vtab.main(arguments)
    assert hub.requests == []
    score = results["tasks"]["kitti-distance"]
    assert (score["examples"], score["train_examples"], score["test_examples"]) == ("official", 16, 8)
    assert (score["resize_size"], score["crop_size"], score["flip"]) == (40, 40, True)
    assert "| kitti-distance | 16 official | 8 | 40, no crop |" in (tmp_path / "out" / "table.md").read_text()


def test_lists_that_can_not_be_used_are_refused(tmp_path: Path) -> None:
    task = vtab.BY_NAME["kitti-distance"]
    with pytest.raises(DataError, match=r"train800val200\.txt is missing: --lists names the folder"):
        vtab.from_lists(task, tmp_path)
    write_lists(tmp_path)
    path = tmp_path / "kitti" / "test.txt"
    for line, message in (("images/test/000000.png 4", "a label from 0 to 3"), ("images/gone.png 1", "gone.png is missing")):
        path.write_text(f"images/test/000001.png 1\n{line}\n")
        with pytest.raises(DataError, match=rf"test\.txt line 2: .*{message}"):
            vtab.from_lists(task, tmp_path)


def test_a_folder_belongs_to_one_experiment(finished: Path, tiny_bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        vtab.main([*words(finished, tiny_bit, ["svhn"]), "--seed", "1"])
    assert "seed: 0 -> 1" in capsys.readouterr().err


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r'no "eurosta" \(did you mean "eurosat"\?\)'):
        vtab.Protocol(tasks=("eurosta",))
    with pytest.raises(ConfigError, match="names none"):
        vtab.Protocol(tasks=())


def test_list_names_where_each_task_is_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert vtab.main(["--list"]) == {}
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| task")]
    assert len(rows) == 24
    assert f"| {LOCATION} | train[1000]; test | webp, cls | dsprites_loc | crop, flip |" in next(r for r in rows if LOCATION in r)
    assert f"| {SUN} | train[800] + validation[200]; test | image, label |" in next(row for row in rows if SUN in row)
    assert [row for row in rows if "not confirmed" in row] == [next(row for row in rows if "| kitti-distance |" in row)]
