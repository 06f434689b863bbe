"""Does the VTAB recipe train on the right examples in the right way, and does it tell what it could not do?

On stand-ins of its sets, from the loopback hub.
"""

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import vtab
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from hub import Fault, LoopbackHub
from PIL import Image
from safetensors.torch import load_file, save_file

from bit_mixup.errors import DataError

SPLITS = {"train800": 8, "val200": 4, "train800val200": 24, "test": 10, "train": 12}
COMMIT = "d" * 40


def publish(
    hub: LoopbackHub, name: str, classes: int, folder: Path, *, skipped: tuple[str, ...] = (), numbers: bool = False
) -> None:
    """A stand-in of one of VTAB's tasks: noise, with the splits, columns and classes of the real one, or with plain numbers."""
    draw = np.random.default_rng(0)
    files: dict[str, bytes | Path] = {}
    for split, count in SPLITS.items():
        if split in skipped:
            continue
        pictures = [Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(count)]
        columns = {"image": pictures, "label": [index % classes for index in range(count)]}
        label = Value("int64") if numbers else ClassLabel(num_classes=classes)
        features = Features({"image": ImageFeature(), "label": label})
        path = folder / f"{name}-{split}.parquet"
        Dataset.from_dict(columns, features=features).to_parquet(path)
        files[f"data/{split}-00000-of-00001.parquet"] = path
    hub.add_dataset(f"somebody/vtab_{name}", files, commit=COMMIT)


@pytest.fixture(scope="module")
def asked(tiny_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    short = ["--steps", "2", "--batch-size", "8", "--threads", "1", "--resolution", "model", "--keep-models"]
    folder = tmp_path_factory.mktemp("vtab") / "out"
    return ["--model", str(tiny_bit), "--user", "somebody", "--folder", str(folder), *short]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> LoopbackHub:
    from conftest import HUB

    folder = tmp_path_factory.mktemp("sets")
    for name, classes in (("eurosat", 10), ("clevr_count", 8), ("dsprites_location", 16), ("smallnorb_azimuth", 18)):
        publish(HUB, name, classes, folder)
    publish(HUB, "svhn", 10, folder, skipped=("test",))
    publish(HUB, "dtd", 5, folder)  # 47 are expected
    return HUB


def test_the_benchmark_is_whole() -> None:
    groups = [[name for name, task in vtab.TASKS.items() if task.group == group] for group in vtab.GROUPS]
    assert [len(names) for names in groups] == [7, 4, 8, 5]
    of_19 = {name: task for name, task in vtab.TASKS.items() if task.group != "paper"}
    assert {name for name, task in of_19.items() if not task.flip} == {
        "dsprites_location",
        "dsprites_orientation",
        "smallnorb_azimuth",
    }
    assert {name for name, task in of_19.items() if not task.crop} == {
        "clevr_count", "clevr_distance", "dmlab", "kitti_distance", "dsprites_location",
    }  # fmt: skip
    makefile = (Path(vtab.__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for task in (task for task in vtab.TASKS.values() if task.group == "paper"):
        image, label, train, test = task.columns
        words = (
            f"--dataset {task.repository} --image-column {image} --label-column {label} --train-split {train} --test-split {test}"
        )
        assert words in makefile, "the paper's sets are those of make fine-tune-..."


def test_means_count_each_task_once() -> None:
    scores = {name: {"accuracy": index / 100} for index, name in enumerate(vtab.TASKS)}
    found = vtab.means(scores)
    assert found["natural"] == (pytest.approx(0.03), 7, 7)
    assert found["specialized"] == (pytest.approx(0.085), 4, 4)
    assert found["structured"] == (pytest.approx(0.145), 8, 8)
    assert found["VTAB"] == (pytest.approx(0.09), 19, 19), "of tasks, not of groups"
    assert "natural" not in vtab.means({})


def test_stand_ins_are_trained_on_as_the_benchmark_says(
    published: LoopbackHub, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["eurosat", "clevr_count", "dsprites_location", "smallnorb_azimuth"]
    published.requests.clear()
    vtab.main(["--tasks", *names, *asked])
    fetched = {
        re.sub(r".*/data%2F|.*/data/", "", path) for method, path in published.requests if method == "GET" and ".parquet" in path
    }
    assert {name.split("-")[0] for name in fetched} == {"train800val200", "test"}, "other splits are not fetched"
    folder = Path(asked[asked.index("--folder") + 1])
    results = json.loads((folder / "results.json").read_text())
    assert set(results["scores"]) == set(names)
    for name, score in results["scores"].items():
        task = vtab.TASKS[name]
        plan = json.loads((folder / "runs" / name / "plan.json").read_text())["resolved"]
        assert (plan["data"]["train_examples"], plan["data"]["test_examples"]) == (24, 10)
        assert len(plan["data"]["class_names"]) == task.classes
        assert plan["flip"] is task.flip
        assert (plan["hyper"]["resize_size"], plan["hyper"]["crop_size"]) == ((48, 40) if task.crop else (40, 40))
        assert score["revision"] == COMMIT
        assert score["accuracy"] == json.loads((folder / "runs" / name / "report.json").read_text())["accuracy"]
    table = (folder / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "(1 of 4 tasks: not comparable) |  | 85.75 |  | 85.67 |" in table
    assert "(4 of 19 tasks: not comparable) |  | 72.65 |  | 73.51 |" in table


def test_what_is_done_is_not_done_again(published: LoopbackHub, asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(asked[asked.index("--folder") + 1])
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}
    published.requests.clear()
    vtab.main(["--tasks", "eurosat", *asked])
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()} == before
    assert not published.requests
    assert len(json.loads((folder / "results.json").read_text())["scores"]) == 4, "those of earlier starts stay in the table"
    # A task that was stopped before its report goes on.
    (folder / "runs" / "eurosat" / "report.json").unlink()
    vtab.main(["--tasks", "eurosat", *asked])
    kept = [path for path in before if "eurosat" in path.parts and "checkpoints" in path.parts]
    assert kept
    assert all(path.stat().st_mtime_ns == before[path] for path in kept), "no step is done twice"
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        vtab.main(["--tasks", "eurosat", *asked, "--seed", "1"])
    assert "seed: 0 -> 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sun397", "the hub has no such repository"),
        ("svhn", r"has no files data/test-\*\.parquet"),
        ("dtd", "has 5 classes, but the task has 47"),
    ],
)
def test_what_can_not_be_done_is_told(
    published: LoopbackHub, asked: list[str], capsys: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    with pytest.raises(SystemExit, match="1"):
        vtab.main(["--tasks", name, "eurosat", *asked])
    said = capsys.readouterr().out
    assert re.search(f"NOT DONE: .*{reason}", said)
    assert re.search(f"Not done:\n\n- {name}: .*{reason}", said)
    folder = Path(asked[asked.index("--folder") + 1])
    assert list(json.loads((folder / "failures.json").read_text())) == [name]
    assert "eurosat" in json.loads((folder / "results.json").read_text())["scores"], "the others are done"


def test_a_damaged_file_is_not_trained_on(
    published: LoopbackHub, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(published, "resisc45", 45, tmp_path)
    whole = (tmp_path / "resisc45-test.parquet").read_bytes()
    published.faults.append(Fault(r"GET .*vtab_resisc45.*test-.*parquet", body=whole[:-1] + b"x"))
    with pytest.raises(SystemExit, match="1"):
        vtab.main(["--tasks", "resisc45", *asked])
    assert "it was damaged on its way" in capsys.readouterr().out
    assert not published.faults[0].times
    published.faults.clear()


def test_unknown_tasks_and_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        vtab.main(["--tasks", "natral"])
    assert 'there is no task "natral" (did you mean "natural"?)' in capsys.readouterr().err
    vtab.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 24
    assert re.fullmatch(
        r"clevr_count +structured +8  yes +no +vtab_clevr_count", next(one for one in lines if one.startswith("clevr_count"))
    )


def test_options_reach_the_runs() -> None:
    with pytest.raises(SystemExit, match="2"):
        vtab.main(["--tasks", "eurosat", "--preset", "none"])
    assert vtab.chosen_tasks(["eurosat", "specialized", "paper"])[:4] == ["eurosat", "patch_camelyon", "resisc45", "retinopathy"]


@pytest.fixture
def fresh(asked: list[str], tmp_path: Path) -> list[str]:
    """The same arguments, but in a folder of one's own and without keeping models."""
    words = [word for word in asked if word != "--keep-models"]
    words[words.index("--folder") + 1] = str(tmp_path / "out")
    return words


def test_what_no_run_can_use_is_refused_before_anything_is_fetched(
    published: LoopbackHub, fresh: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published.requests.clear()
    for wrong, message in ((["--steps", "0"], "steps is 0"), (["--model", "nothing"], "nothing")):
        with pytest.raises(SystemExit, match="2"):
            vtab.main(["--tasks", "eurosat", *fresh, *wrong])
        assert message in capsys.readouterr().err
    assert not published.requests
    assert not (tmp_path / "out").exists()


def test_a_folder_belongs_to_the_bytes_of_a_model(
    published: LoopbackHub, fresh: list[str], tiny_bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_bit, model)
    vtab.main(["--tasks", "eurosat", *fresh, "--model", str(model)])
    weights = load_file(model / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        vtab.main(["--tasks", "svhn", *fresh, "--model", str(model)])
    assert "weights: " in capsys.readouterr().err


def test_finished_runs_leave_scores_but_no_models(published: LoopbackHub, fresh: list[str], tmp_path: Path) -> None:
    vtab.main(["--tasks", "eurosat", *fresh])
    left = {path.name for path in (tmp_path / "out" / "runs" / "eurosat").iterdir()}
    assert {"report.json", "plan.json", "predictions.csv"} <= left
    assert not left & {"checkpoints", "model"}


def test_labels_may_be_plain_numbers_but_must_be_the_tasks(
    published: LoopbackHub, fresh: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(published, "kitti_distance", 3, tmp_path, numbers=True)  # 4, of which these examples have 3
    publish(published, "dmlab", 7, tmp_path, numbers=True)  # 6 are expected
    with pytest.raises(SystemExit, match="1"):
        vtab.main(["--tasks", "dmlab", "kitti_distance", *fresh])
    folder = tmp_path / "out"
    assert list(json.loads((folder / "failures.json").read_text())) == ["dmlab"]
    assert 'row 6 of train800val200 has the label 6 in "label", but the task has 0 to 5' in capsys.readouterr().out
    plan = json.loads((folder / "runs" / "kitti_distance" / "plan.json").read_text())["resolved"]
    assert plan["data"]["class_names"] == ["0", "1", "2", "3"]


def test_a_run_knows_its_data_by_what_they_are(published: LoopbackHub, tmp_path: Path) -> None:
    task = vtab.TASKS["eurosat"]
    features = Features({"image": ImageFeature(), "label": ClassLabel(num_classes=10)})

    def known(labels: list[int], where: str, folder: str) -> str:
        pictures = [Image.new("RGB", (4, 4))] * len(labels)
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "some.parquet"
        Dataset.from_dict({"image": pictures, "label": labels}, features=features).to_parquet(path)
        return str(vtab.with_classes(Dataset.from_parquet(str(path)), "test", where, task)._fingerprint)

    first = known([1, 2], "somebody/set at d", "a")
    assert known([1, 2], "somebody/set at d", "b") == first, "in another cache"
    assert len({first, known([1, 3], "somebody/set at d", "c"), known([1, 2], "somebody/set at e", "d")}) == 3


def write_lists(folder: Path) -> None:
    """kitti_distance as the archive has it, but of few examples."""
    for split, count in (("train800val200", 16), ("test", 8)):
        (folder / "kitti" / "images" / split).mkdir(parents=True)
        lines = [f"images/{split}/{row:06d}.png {row % 4}" for row in range(count)]
        for row, line in enumerate(lines):
            Image.new("RGB", (6, 6), (row, 0, 0)).save(folder / "kitti" / line.split(" ")[0])
        (folder / "kitti" / f"{split}.txt").write_text("\n".join(lines) + "\n")


def test_tasks_are_read_from_unpacked_lists(published: LoopbackHub, fresh: list[str], tmp_path: Path) -> None:
    write_lists(tmp_path / "lists")
    published.requests.clear()
    with pytest.raises(SystemExit, match="1"):
        vtab.main(["--tasks", "kitti_distance", "cifar100", *fresh, "--lists", str(tmp_path / "lists")])
    assert not published.requests
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    score = results["scores"]["kitti_distance"]
    assert (score["train_examples"], score["test_examples"], score["resize_size"], score["crop_size"]) == (16, 8, 40, 40)
    missing = tmp_path / "lists" / "cifar" / "train800val200.txt"
    assert results["failures"] == {
        "cifar100": f"{missing} is missing. Give --lists the folder that vtab-1k.zip of XiN0919/VTAB-1k was unpacked into."
    }
    data, _ = vtab.open_task("kitti_distance", vtab.VtabConfig(lists=tmp_path / "lists"))
    for split, count in (("train800val200", 16), ("test", 8)):
        decoded = data[split].cast_column("image", ImageFeature())
        assert [picture.getpixel((0, 0))[0] for picture in decoded["image"]] == list(range(count))
        assert decoded["label"][:] == [row % 4 for row in range(count)]


def test_lists_that_can_not_be_used_are_refused(tmp_path: Path) -> None:
    write_lists(tmp_path)
    path = tmp_path / "kitti" / "test.txt"
    for line, message in (
        ("images/test/000000.png 4", "a label from 0 to 3"),
        ("images/test/000000.png", "a picture and a label"),
        ("images/gone.png 1", "gone.png is missing"),
    ):
        path.write_text(f"images/test/000001.png 1\n{line}\n")
        with pytest.raises(DataError, match=rf"test\.txt line 2: .*{message}"):
            vtab.read_list(path, 4)


def test_a_signal_stops_and_the_same_command_goes_on(
    published: LoopbackHub, fresh: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = tmp_path / "out" / "runs" / "eurosat" / "metrics.jsonl"
    words = ["--tasks", "eurosat", *fresh, "--steps", "60"]

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not metrics.is_file() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt, daemon=True)
    sender.start()
    with pytest.raises(SystemExit, match="130"):
        vtab.main(words)
    sender.join()
    assert "stopped by SIGINT; the same command goes on" in capsys.readouterr().err
    before = metrics.read_text()
    assert 0 < len(before.splitlines()) < 60
    vtab.main(words)
    after = metrics.read_text()
    assert after.startswith(before), "no step is done twice"
    assert len(after.splitlines()) == 60
