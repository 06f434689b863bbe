"""Is a run's folder safe: from being overwritten, from interrupted writes, and from other people's files?"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow

import bit_mixup
from bit_mixup.cli import main as command
from bit_mixup.config import TransferConfig, configure, resolve
from bit_mixup.errors import CheckpointError, DataError
from bit_mixup.runs import RunFolder
from bit_mixup.storage import remove_leftovers, whole_folder, write_json, write_text
from bit_mixup.weights import find_weights


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(quick: dict[str, Any]) -> None:
    folder = quick["output_dir"]
    first = bit_mixup.transfer(**quick, tracker="tensorboard")
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoints" / "step_000001.bak").mkdir()
    stale = [path for path in (folder / "bit_mixup").iterdir() if path.is_file()]
    assert stale
    second = bit_mixup.transfer(**quick, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not any(path.exists() for path in stale)
    assert second.report == first.report


@pytest.mark.parametrize("content", ['{"architecture": "resnetv2_50x1_bit"}', "{}"])
def test_a_folder_with_another_config_is_not_a_run(quick: dict[str, Any], content: str) -> None:
    quick["output_dir"].mkdir()
    (quick["output_dir"] / "config.json").write_text(content)
    (quick["output_dir"] / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no run"):
        bit_mixup.transfer(**quick, overwrite=True)
    assert (quick["output_dir"] / "config.json").read_text() == content
    assert (quick["output_dir"] / "thesis.txt").read_text() == "mine"


def test_a_saved_configuration_does_not_bring_overwrite_or_resume_back(quick: dict[str, Any]) -> None:
    bit_mixup.transfer(**quick)
    bit_mixup.transfer(**quick, overwrite=True)
    saved = RunFolder(quick["output_dir"]).config
    assert not {"overwrite", "resume"} & set(json.loads(saved.read_text()))
    with pytest.raises(SystemExit) as stopped:
        command(["fine-tune", "--config", str(saved), "--seed", "1"])
    assert stopped.value.code == 2
    assert TransferConfig.from_json(saved) == configure(TransferConfig, **quick)


def test_a_run_killed_in_its_first_write_can_be_resumed(quick: dict[str, Any]) -> None:
    quick["output_dir"].mkdir()
    (quick["output_dir"] / ".writing-config.json").write_text('{"data')
    bit_mixup.transfer(**quick, resume=True)
    assert list(quick["output_dir"].glob(".writing-*")) == []


def test_a_line_of_metrics_that_a_kill_cut_short_is_written_again(quick: dict[str, Any]) -> None:
    bit_mixup.transfer(**quick)
    run = RunFolder(quick["output_dir"])
    losses = [row["loss"] for row in run.read_metrics()]
    shutil.rmtree(run.checkpoint(6))  # killed after the fifth step, while its line was written
    run.metrics.write_bytes(b"".join(run.metrics.read_bytes().splitlines(keepends=True)[:5])[:-20])
    bit_mixup.transfer(**quick, resume=True)
    assert [row["step"] for row in run.read_metrics()] == list(range(6))
    assert [row["loss"] for row in run.read_metrics()] == losses


def test_resuming_keeps_the_record_of_the_start_and_says_what_is_otherwise(
    quick: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bit_mixup.transfer(**quick)
    run = RunFolder(quick["output_dir"])
    before = run.config.read_bytes(), run.plan.read_bytes()
    capsys.readouterr()
    bit_mixup.transfer(**(quick | {"micro_batch": 8}), resume=True)
    assert "NOTE: resumed with other micro_batches: [[16]] -> [[8, 8]]" in capsys.readouterr().out
    assert (run.config.read_bytes(), run.plan.read_bytes()) == before


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.txt", float("nan"))
    assert (tmp_path / "a.txt").read_text() == "old"
    with whole_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("old")

    def fail() -> None:
        with whole_folder(tmp_path / "b") as folder:
            (folder / "x").write_text("new")
            raise OSError("disk full")

    with pytest.raises(CheckpointError, match="b can not be written: disk full"):
        fail()
    assert (tmp_path / "b" / "x").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b"]


def test_a_folder_may_hold_links_that_lead_nowhere(tmp_path: Path) -> None:
    """As packages do that `make upstream` unpacks."""
    with whole_folder(tmp_path / "package") as folder:
        (folder / "30-font.conf").symlink_to("/nowhere/30-font.conf")
    assert (tmp_path / "package" / "30-font.conf").readlink() == Path("/nowhere/30-font.conf")


def test_a_folder_that_was_being_replaced_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its two renames a replacement has moved the old folder aside and not yet put the new one in its place."""
    with whole_folder(tmp_path / "model") as folder:
        (folder / "x").write_text("old")
    rename, calls = os.rename, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)

    def replace() -> None:
        with whole_folder(tmp_path / "model") as folder:
            (folder / "x").write_text("new")

    with pytest.raises(KeyboardInterrupt):
        replace()
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert (tmp_path / "model" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("form", ["torch", "numpy", "arrow", "transform"])
def test_a_format_that_somebody_set_does_not_come_between(quick: dict[str, Any], tmp_path: Path, form: str) -> None:
    pictures = [Pillow.fromarray(np.full((8, 8), 30 * index, dtype=np.uint8)) for index in range(8)]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    data = Dataset.from_dict({"image": pictures, "label": [0, 1] * 4}, features=features)
    formatted = data.with_transform(lambda rows: {"x": rows["image"]}) if form == "transform" else data.with_format(form)
    options = quick | {"examples_per_class": None, "batch_size": 4, "steps": 2}
    losses = []
    for name, source in (("plain", data), ("formatted", formatted)):
        result = bit_mixup.transfer(**(options | {"dataset": source, "output_dir": tmp_path / name}))
        losses.append([row["loss"] for row in RunFolder(result.output_dir).read_metrics()])
    assert losses[0] == losses[1]


def test_a_row_without_a_picture_is_named(quick: dict[str, Any]) -> None:
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    picture = Pillow.new("L", (8, 8))
    data = Dataset.from_dict({"image": [picture, picture, None, picture], "label": [0, 1, 0, 1]}, features=features)
    options = quick | {"dataset": data, "examples_per_class": None, "test_split": None}
    with pytest.raises(DataError, match="train row 2"):
        bit_mixup.transfer(**options)


def test_one_size_alone_keeps_the_rules_ratio_and_plain_values_are_taken() -> None:
    weights = find_weights("resnetv2_50x1_bit.goog_in21k")
    for options, sizes in (({"crop_size": 32}, (40, 32)), ({"resize_size": 40}, (40, 32)), ({"crop_size": 256}, (320, 256))):
        found = resolve(configure(TransferConfig, dataset="digits", **options), num_examples=1000, image_area=64, weights=weights)
        assert (found.hyper.resize_size, found.hyper.crop_size) == sizes
    config = configure(TransferConfig, dataset=Path("digits"), output_dir="runs/x", decay_steps=[1, 2])
    assert (config.dataset, config.output_dir, config.decay_steps) == ("digits", Path("runs/x"), (1, 2))


def test_a_model_of_an_earlier_run_can_be_transferred_again(quick: dict[str, Any], tmp_path: Path) -> None:
    bit_mixup.transfer(**quick)
    again = quick | {"model": str(quick["output_dir"] / "model"), "output_dir": tmp_path / "again"}
    result = bit_mixup.transfer(**again)
    assert result.plan.weights.short_name == "run"
    shutil.rmtree(tmp_path / "again")
