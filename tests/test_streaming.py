"""What stays exact where training pictures pass by, and what does not?"""

import io
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import datasets.utils.file_utils
import huggingface_hub.utils._http
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image, Value
from hub import Fault, LoopbackHub
from PIL import Image as Pillow

import bit_mixup
from bit_mixup.cli import main
from bit_mixup.config import TransferConfig, configure
from bit_mixup.data import load_image_dataset
from bit_mixup.errors import BitMixupError, ConfigError, DataError
from bit_mixup.evaluation import evaluate
from bit_mixup.examples import EvaluationView
from bit_mixup.images import View
from bit_mixup.models import load_bit
from bit_mixup.planning import Plan, make_plan
from bit_mixup.prediction import predict_logits
from bit_mixup.runs import RunFolder
from bit_mixup.streaming import SAMPLE, StreamedExamples, stream_image_dataset

WHOLE = View(resize_size=8, crop_size=8, flip=False, interpolation="bilinear")  # pictures as they are
CLASSES = Features({"image": Image(), "label": ClassLabel(names=["even", "odd"])})


def picture(number: int) -> dict[str, Any]:
    """A picture of one colour that says its number."""
    png = io.BytesIO()
    Pillow.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(png, "png")
    return {"bytes": png.getvalue(), "path": f"{number}.png"}


def rows(count: int) -> dict[str, list[Any]]:
    return {"image": [picture(number) for number in range(count)], "label": [number % 2 for number in range(count)]}


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away the five seconds that the `datasets` library waits at the end of each pass."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 40 training pictures, and 9 to score."""
    folder = tmp_path_factory.mktemp("stream")
    train = Dataset.from_dict(rows(120), features=CLASSES)
    for shard in range(3):
        train.select(range(40 * shard, 40 * (shard + 1))).to_parquet(folder / f"train-0000{shard}-of-00003.parquet")
    Dataset.from_dict(rows(9), features=CLASSES).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def stream(folder: Path, **options: Any) -> StreamedExamples:
    values = {"split": stream_image_dataset(str(folder))[1], "view": WHOLE, "seed": 3, "batch_size": 32, "buffer_size": 50}
    return StreamedExamples(**values | options)


def numbers(found: StreamedExamples, positions: range) -> list[int]:
    """Which pictures stand at some positions."""
    batch = found.__getitems__(positions)
    assert not isinstance(batch, DataError)
    images, labels = batch
    assert images.shape == (len(positions), 3, 8, 8)
    seen = images[:, 0, 0, 0].astype(int) + 256 * images[:, 1, 0, 0].astype(int)
    np.testing.assert_array_equal(labels, seen % 2)
    return seen.tolist()


# --- what is exact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{}, {"train_examples": 25_000}, {"train_examples": 600_000}])
def test_the_rule_chooses_the_same_steps(folder: Path, asked: dict[str, int]) -> None:
    def planned(**options: Any) -> Plan:
        return make_plan(configure(TransferConfig, dataset=str(folder), model="bundled", **options), to_be_run=False)

    streamed, plain = planned(streaming=True, **asked), planned()
    assert streamed.num_train == asked.get("train_examples", 120)
    assert streamed.sizes.median_area == plain.sizes.median_area
    if not asked:
        assert streamed.resolution == plain.resolution
    else:
        steps = {25_000: 10_000, 600_000: 20_000}
        assert streamed.resolution.hyper.steps == steps[asked["train_examples"]]
        assert streamed.resolution.hyper.mixup_alpha == 0.1


def test_each_pass_shows_every_example_once_in_an_order_of_its_own(folder: Path) -> None:
    found = stream(folder)
    seen = [number for step in range(15) for number in numbers(found, range(32 * step, 32 * (step + 1)))]
    passes = [seen[120 * number : 120 * (number + 1)] for number in range(4)]
    assert [sorted(one) for one in passes] == [list(range(120))] * 4
    assert len({tuple(one) for one in passes}) == 4
    assert all(one != sorted(one) for one in passes)
    assert {tuple(number // 40 for number in one) for one in passes} != {tuple(np.arange(120) // 40)}, "shards change places"


def test_processes_share_the_examples_of_one_stream(folder: Path) -> None:
    whole = stream(folder)
    shares = [range(13), range(13, 32)]
    parts = [stream(folder) for _ in shares]
    for step in range(6):
        positions = range(32 * step, 32 * (step + 1))
        expected = numbers(whole, positions)
        own = [numbers(part, positions[share.start : share.stop]) for part, share in zip(parts, shares, strict=True)]
        assert own[0] + own[1] == expected
        assert [name.split(" ")[0] for name in whole.ids(positions)] == [f"{number}.png" for number in expected]


def test_a_step_can_be_asked_for_again(folder: Path) -> None:
    """As after running out of memory: the same examples are computed in smaller pieces."""
    found = stream(folder)
    for step in range(3):
        first = numbers(found, range(32 * step, 32 * (step + 1)))
        again = [
            number for start in range(0, 32, 8) for number in numbers(found, range(32 * step + start, 32 * step + start + 8))
        ]
        assert first == again


@pytest.fixture
def asked(quick: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Options of a short streamed run."""
    return {name: value for name, value in quick.items() if name != "examples_per_class"} | {
        "dataset": str(folder), "streaming": True, "shuffle_buffer": 50,
    }  # fmt: skip


def test_a_run_is_a_function_of_its_seed_and_scores_are_exact(asked: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    first = bit_mixup.transfer(**asked, mixup_alpha=0.3)
    second = bit_mixup.transfer(**asked | {"output_dir": tmp_path / "second", "micro_batch": 8}, mixup_alpha=0.3)
    other = bit_mixup.transfer(**asked | {"output_dir": tmp_path / "other", "seed": 1}, mixup_alpha=0.3)
    weights = [(run.output_dir / "model" / "model.safetensors").read_bytes() for run in (first, other)]
    assert weights[0] != weights[1]
    for one, two in zip(first.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    test = load_image_dataset(str(folder)).test
    model = load_bit(first.output_dir / "model", keep_head=True)
    logits = predict_logits(model, EvaluationView(part=test, view=first.plan.view), Accelerator(cpu=True), batch_size=16)
    torch.testing.assert_close(logits, first.logits, rtol=0, atol=1e-5)
    assert evaluate(first.logits, torch.from_numpy(test.labels), ["even", "odd"]) == first.report
    assert len(test) == first.report.num_examples == 9


# --- what is not ------------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_with_another_pass(asked: dict[str, Any], tmp_path: Path) -> None:
    whole = bit_mixup.transfer(**asked)
    folders = []
    for name in ("once", "again"):
        shutil.copytree(whole.output_dir, tmp_path / name)
        shutil.rmtree(tmp_path / name / "model")
        shutil.rmtree(tmp_path / name / "checkpoints" / "step_000006")
        folders.append(bit_mixup.transfer(**asked | {"output_dir": tmp_path / name, "resume": True}).output_dir)
    models = [(run / "model" / "model.safetensors").read_bytes() for run in (whole.output_dir, *folders)]
    assert models[1] == models[2]
    assert models[0] != models[1]
    assert [row["step"] for row in RunFolder(folders[0]).read_metrics()] == list(range(6))
    losses = [[row["loss"] for row in RunFolder(run).read_metrics()] for run in (whole.output_dir, folders[0])]
    assert losses[0][:4] == losses[1][:4]
    assert losses[0][4:] != losses[1][4:]


def test_each_start_of_a_run_begins_a_pass_of_its_own(folder: Path) -> None:
    """Else a run that is often interrupted would see the same first examples again and again."""
    first, later, again = (numbers(stream(folder), range(32 * step, 32 * (step + 1))) for step in (0, 5, 5))
    assert later == again
    assert later != first


def test_the_plan_says_what_is_exact(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    result = bit_mixup.transfer(**asked | {"steps": 1})
    said = capsys.readouterr().out
    assert "streamed: 120 training examples (by its card or files), drawn from a buffer of 50 pictures, about " in said
    assert "          exact: what is scored (kept whole), the rule's steps, the same batches on any number of processes" in said
    assert "NOT exact: the order is shuffled within the buffer alone, and a resumed run begins another pass" in said
    assert "columns and the first 120 examples were looked at" in said
    plan = json.loads((result.output_dir / "plan.json").read_text())
    assert (plan["resolved"]["data"]["train_examples"], plan["resolved"]["data"]["streamed"]) == (120, True)


def test_an_order_that_is_shuffled_within_a_buffer_stays_near(tmp_path: Path) -> None:
    place = saved(tmp_path, count=120, label=[number % 2 for number in range(120)])["dataset"]
    near, far = (numbers(stream(Path(place), batch_size=120, buffer_size=size), range(120)) for size in (20, 120))
    assert sorted(near) == sorted(far) == list(range(120))
    assert all(number < position + 20 for position, number in enumerate(near)), "nothing comes before it has been read"
    assert any(number >= position + 20 for position, number in enumerate(far))


# --- faults and bad input ---------------------------------------------------------------------------------------------


def saved(place: Path, features: Features = CLASSES, *, count: int = 12, test: bool = True, **changes: Any) -> dict[str, Any]:
    """A folder of parquet files with other rows."""
    table = Dataset.from_dict(rows(count) | changes, features=features)
    table.to_parquet(place / "train.parquet")
    if test:
        table.to_parquet(place / "test.parquet")
    return {"dataset": str(place)}


def text_labels(place: Path) -> dict[str, Any]:
    return saved(place, Features({"image": Image(), "label": Value("string")}), label=["a", "b"] * 6)


def counted_by_nobody(place: Path) -> dict[str, Any]:
    HUBS["hub"].add_dataset("streams/uncounted", {f"data/{name}.arrow": arrow(place) for name in ("train", "test")})
    return {"dataset": "streams/uncounted"}


def damaged_tar(place: Path) -> dict[str, Any]:
    HUBS["hub"].add_dataset("streams/tars", {f"data/{name}-0000.tar": b"no tar" for name in ("train", "test")})
    return {"dataset": "streams/tars"}


def arrow(place: Path) -> bytes:
    Dataset.from_dict(rows(12), features=CLASSES).save_to_disk(place / "saved")
    return next((place / "saved").glob("*.arrow")).read_bytes()


HUBS: dict[str, LoopbackHub] = {}


def empty(place: Path) -> dict[str, Any]:
    return saved(place, count=0)


def table_of_names(place: Path) -> dict[str, Any]:
    (place / "train.csv").write_text("image,label\na.png,a\n")
    return {"dataset": str(place)}


BAD: dict[str, tuple[type[BitMixupError], str, Callable[[Path], dict[str, Any]]]] = {
    "few shots": (ConfigError, "examples_per_class 4 does not go with streaming.*Leave out --examples-per-class or --streaming",
                  lambda place: {"examples_per_class": 4}),
    "held out": (ConfigError, "validation_fraction 0.1 does not go with", lambda place: {"validation_fraction": 0.1}),
    "false labels": (ConfigError, "corrupt_labels 0.1 does not go with", lambda place: {"corrupt_labels": 0.1}),
    "quarantine": (ConfigError, "corrupt_images quarantine does not go with", lambda place: {"corrupt_images": "quarantine"}),
    "partners": (ConfigError, "mixup_partner same_class does not go with", lambda place: {"mixup_partner": "same_class"}),
    "forms": (ConfigError, "mixup_form modified does not go with", lambda place: {"mixup_form": "modified"}),
    "frequencies": (ConfigError, "smooth_toward frequencies does not go", lambda place: {"smooth_toward": "frequencies"}),
    "workers": (ConfigError, "num_workers 2 does not go with streaming.*in one process", lambda place: {"num_workers": 2}),
    "count for nothing": (ConfigError, "train_examples belongs to streaming.*Add --streaming or leave it out",
                          lambda place: {"train_examples": 5, "streaming": False}),
    "no examples": (ConfigError, "train_examples is 0; it must be at least 1", lambda place: {"train_examples": 0}),
    "no buffer": (ConfigError, "shuffle_buffer is 0; it must be at least 1", lambda place: {"shuffle_buffer": 0}),
    "a table of names": (DataError, "can not be streamed: parquet files and data sets on the hub can. Leave --streaming out",
                         table_of_names),
    "a revision of local files": (DataError, "dataset_revision belong to the hub, but .* is data of this machine",
                                  lambda place: saved(place) | {"dataset_revision": "main"}),
    "no such split": (DataError, 'train_split "trian": the data set has the splits.*did you mean "train"',
                      lambda place: saved(place) | {"train_split": "trian"}),
    "no split to score": (DataError, "has no labelled split to score .train., and none can be held out of a stream.*--test-split",
                          lambda place: saved(place, test=False)),
    "no labels to score": (DataError, "has no labelled split to score", lambda place: saved(place, label=[-1] * 12)),
    "no example": (DataError, 'split "train" holds no examples', empty),
    "no ClassLabel": (DataError, '"label" of train holds Value.*streaming needs a ClassLabel', text_labels),
    "one class": (DataError, "fewer than two classes", lambda place: saved(place, label=[0] * 12)),
    "sorted by class": (DataError, "the first 1,000 examples of train are of one class: .*in a shuffled order",
                        lambda place: saved(place, count=SAMPLE + 2, label=[0] * SAMPLE + [1] * 2)),
    "a damaged file": (DataError, "train.parquet.*ArrowInvalid|the stream broke off after 0 examples: ArrowInvalid",
                       lambda place: saved(place) | {"dataset": damaged(place)}),
    "a damaged shard": (DataError, r"train-00001-of-00002.parquet can not be read as parquet: ArrowInvalid: .*Parquet magic",
                        lambda place: damaged_shard(place)),
    "damaged tars on the hub": (DataError, 'data set "streams/tars": the one on the hub can not be read: ReadError', damaged_tar),
    "counted by nobody": (DataError, "neither its card nor its files say how many examples train holds.*--train-examples",
                          counted_by_nobody),
}  # fmt: skip


def damaged(place: Path) -> str:
    (place / "train.parquet").write_bytes(b"PAR1 and no more")
    return str(place)


def damaged_shard(place: Path) -> dict[str, Any]:
    """The second of two: the first says what kind of columns there are."""
    asked = saved(place, count=SAMPLE + 2)  # more than are looked at first
    (place / "train.parquet").rename(place / "train-00000-of-00002.parquet")
    (place / "train-00001-of-00002.parquet").write_bytes(b"PAR1 and no more")
    return asked


@pytest.mark.parametrize("name", BAD)
def test_what_can_not_be_streamed_is_told_before_training(
    name: str, asked: dict[str, Any], tmp_path: Path, hub: LoopbackHub
) -> None:
    kind, message, change = BAD[name]
    place = tmp_path / "data"
    place.mkdir()
    HUBS["hub"] = hub
    changed = asked | change(place)
    with pytest.raises(kind, match=f"(?s){message}"):
        bit_mixup.transfer(**changed)
    assert not (tmp_path / "run").exists()


def test_a_data_set_in_memory_is_not_streamed(asked: dict[str, Any]) -> None:
    table = Dataset.from_dict(rows(12), features=CLASSES)
    asked["dataset"] = table
    with pytest.raises(ConfigError, match="streaming is for data that are read from files or the hub; these are in memory"):
        bit_mixup.transfer(**asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": {"bytes": picture(7)["bytes"][:-32], "path": "7.png"}}, r"7.png \(example .* can not be decoded as a picture"),
        ({"image": None}, r"^example \d+ of pass 0 over train can not be decoded as a picture"),
        ({"label": -1}, r'.*example .* over train\) has the label -1 in "label"; it must be from 0 to 1'),
        ({"label": None}, r".*has the label None"),
    ],
    ids=["cut short", "no picture", "unlabelled", "empty label"],
)
def test_a_broken_example_on_the_way_stops_the_run_and_is_named(
    change: dict[str, Any], message: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    count = SAMPLE + 20  # behind what is looked at before training
    changed = {name: [*values[:-1], change.get(name, values[-1])] for name, values in rows(count).items()}
    Dataset.from_dict(changed, features=CLASSES).to_parquet(tmp_path / "train.parquet")
    Dataset.from_dict(rows(9), features=CLASSES).to_parquet(tmp_path / "test.parquet")
    asked |= {"dataset": str(tmp_path), "steps": 6, "batch_size": 256, "crop_size": 32, "resize_size": 32, "save_every": 1}
    with pytest.raises(DataError, match=message):
        bit_mixup.transfer(**asked)
    assert RunFolder(asked["output_dir"]).list_checkpoints(), "what was done before stands"


def test_a_wrong_count_is_told_at_the_end_of_a_pass(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    split = stream_image_dataset(str(folder), train_examples=1000)[1]
    numbers(stream(folder, split=split, batch_size=120), range(120))
    found = stream(folder, split=split, batch_size=121)
    numbers(found, range(121))
    assert "a pass over train had 120 examples; the plan counted on 1000" in caplog.text


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(hub: LoopbackHub, folder: Path) -> str:
    hub.requests.clear()
    hub.add_dataset("streams/published", {f"data/{file.name}": file for file in sorted(folder.iterdir())})
    return "streams/published"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the clients would have waited before they tried again."""
    seconds: list[float] = []
    clock = SimpleNamespace(**{**vars(time), "sleep": seconds.append})
    for module in (huggingface_hub.utils._http, datasets.utils.file_utils):
        monkeypatch.setattr(module, "time", clock)
    return seconds


def test_a_whole_run_streams_from_the_hub(published: str, asked: dict[str, Any], hub: LoopbackHub, tmp_path: Path) -> None:
    flags = {"dataset": published, "shuffle-buffer": 50, "steps": 6, "batch-size": 16, "resize-size": 48, "crop-size": 40}
    flags |= {"model": asked["model"], "threads": 1, "output-dir": tmp_path / "hub"}
    main(["fine-tune", "--streaming", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))])
    local = bit_mixup.transfer(**asked | {"flip": True})
    models = [(run / "model" / "model.safetensors").read_bytes() for run in (tmp_path / "hub", local.output_dir)]
    assert models[0] == models[1], "the same files in the same order"
    plan = json.loads((tmp_path / "hub" / "plan.json").read_text())
    assert plan["resolved"]["data"]["revision"] == "b" * 40
    cached = [
        path for path in Path(datasets.config.HF_CACHE_HOME).rglob("*") if "streams--published" in str(path) and path.is_file()
    ]
    assert not [path for path in cached if path.stat().st_size > 5_000 and "train" in path.name], "nothing of it is kept"


def test_a_connection_that_breaks_off_is_taken_up_again(
    published: str, hub: LoopbackHub, folder: Path, waits: list[float]
) -> None:
    expected = [numbers(stream(folder), range(32))]
    hub.faults[:] = [Fault("GET .*train-00001", times=2, cut=100)]
    assert [numbers(stream(folder, split=stream_image_dataset(published)[1]), range(32))] == expected
    assert waits
    hub.faults.clear()


def test_a_stream_that_stays_broken_is_told(published: str, hub: LoopbackHub, waits: list[float]) -> None:
    found = stream(Path(published))
    hub.faults[:] = [Fault(r"GET .*train-0000\d", times=-1, status=503)]
    error = found.__getitems__(range(32))
    hub.faults.clear()
    assert isinstance(error, DataError)
    assert re.match(r'data set "streams/published": the stream broke off after \d+ examples: .*busy or down', str(error)), error


@pytest.mark.parametrize("path", ["train-0000", "tree/"])
def test_a_hub_that_is_busy_from_the_start_is_told(
    path: str, hub: LoopbackHub, folder: Path, waits: list[float], asked: dict[str, Any]
) -> None:
    name = f"streams/busy-{path.strip('/')}"  # the client remembers what it was told of others
    hub.add_dataset(name, {f"data/{file.name}": file for file in sorted(folder.iterdir())})
    hub.faults[:] = [Fault(f"GET .*{path}", times=-1, status=503)]
    with pytest.raises(DataError, match=rf'data set "{name}": .*busy or down \(503'):
        bit_mixup.transfer(**asked | {"dataset": name})
    hub.faults.clear()


def test_streaming_needs_the_hub(published: str, hub: LoopbackHub, waits: list[float], asked: dict[str, Any]) -> None:
    load_image_dataset(published)  # whole in the cache now
    with hub.stopped(), pytest.raises(DataError, match="can not be reached"):
        bit_mixup.transfer(**asked | {"dataset": published})
