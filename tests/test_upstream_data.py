"""Does pre-training read several labels a picture, arrays, and shards, and does the recipe give BiT's numbers?"""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pillow

from bit_mixup.augmentation import InceptionView
from bit_mixup.config import DistillConfig, PretrainConfig, configure, resolve_upstream
from bit_mixup.data import load_image_dataset
from bit_mixup.errors import ConfigError, DataError
from bit_mixup.examples import ArrayImages, TrainingStream
from bit_mixup.hyperrule import HyperParameters, learning_rate
from bit_mixup.upstream import load_upstream
from bit_mixup.weights import find_network

NAMES = ["cat", "dog", "owl"]
NAMED, STRINGS, NUMBERS = List(ClassLabel(names=NAMES)), List(Value("string")), List(Value("int64"))


def png(number: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Pillow.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def table(labels: list[Any], feature: Any, **others: tuple[list[Any], Any]) -> Dataset:
    """Pictures with these labels, and further columns."""
    columns = {"image": ([png(number) for number in range(len(labels))], Image()), "label": (labels, feature), **others}
    values = {name: rows for name, (rows, _) in columns.items()}
    return Dataset.from_dict(values, features=Features({name: kind for name, (_, kind) in columns.items()}))


SEVERAL: dict[str, tuple[list[Any], Any, tuple[str, ...]]] = {
    "named": ([[0, 2], [], [1], None, [2, 2]], NAMED, ("cat", "dog", "owl")),
    "strings": ([["cat", "owl"], [], ["dog"], None, ["owl", "owl"]], STRINGS, ("cat", "dog", "owl")),
    "numbers": ([[2, 30], [], [10], None, [30, 30]], NUMBERS, ("2", "10", "30")),
}


def rows_of(part: Any) -> Any:
    """The labels of a whole part, as the stream gives them."""
    return part.labels[list(range(len(part)))]


@pytest.mark.parametrize("kind", SEVERAL)
def test_lists_of_labels_become_rows_of_0_and_1(kind: str) -> None:
    lists, feature, names = SEVERAL[kind]
    data = load_upstream(table(lists, feature))
    assert data.multi_label
    assert data.class_names == names
    assert rows_of(data.train).dtype == np.uint8
    assert rows_of(data.train).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert data.test is None
    assert 'several classes a picture from "label" (0.8 on average)' in data.notes[0]
    assert len(data.train.read([0, 4])) == 2


def test_a_class_that_no_training_picture_has_keeps_its_column() -> None:
    data = load_upstream(table([[0], [1]], NAMED))
    assert rows_of(data.train).tolist() == [[1, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("rows", "feature"),
    [
        ([[1, 2], [0]], List(ClassLabel(names=["owl", "cat", "dog"]))),
        ([[0, 1], [2]], NAMED),
        ([["cat", "dog"], ["owl"]], STRINGS),
    ],
    ids=["in another order", "in the same order", "by name"],
)
def test_the_split_to_score_means_the_same_classes(rows: list[Any], feature: Any) -> None:
    data = load_upstream(DatasetDict(train=table([[0], [1], [2]], NAMED), dev=table(rows, feature)), test_split="dev")
    assert data.test is not None
    assert rows_of(data.test).tolist() == [[1, 1, 0], [0, 0, 1]]
    assert rows_of(data.train).tolist() == np.eye(3).tolist()


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "an unknown label": (
        DatasetDict(train=table([["cat"], ["dog"]], STRINGS), test=table([["cat"], ["cat", "dgo"]], STRINGS)),
        {"test_split": "test"},
        r'"label" of test row 1 has the label \'dgo\' \(did you mean "dog"\?\), which is unknown',
    ),
    "an unknown name": (
        DatasetDict(train=table([[0], [1]], NAMED), test=table([[1]], List(ClassLabel(names=["cat", "bee"])))),
        {"test_split": "test"},
        '"label" of test row 0 has the label 1, which is unknown',
    ),
    "other types in the split to score": (
        DatasetDict(train=table([["cat"], ["dog"]], STRINGS), test=table([[0], [1]], NUMBERS)),
        {"test_split": "test"},
        '"label" of test row 0 has the label 0, which is unknown',
    ),
    "no lists in the split to score": (
        DatasetDict(train=table([["cat"], ["dog"]], STRINGS), test=table(["cat", "dog"], Value("string"))),
        {"test_split": "test"},
        "those of the training split are lists",
    ),
    "floats": (table([[0.5], [1.5]], List(Value("float32"))), {"label_column": "label"}, "must hold strings or whole numbers"),
    "lists of lists": (table([[[1]], [[2]]], List(NUMBERS)), {"label_column": "label"}, "must hold strings or whole numbers"),
    "nothing in a list": (table([[None, 1], [2]], NUMBERS), {}, "must hold strings or whole numbers"),
    "one class": (table([["cat"], [], ["cat"]], STRINGS), {}, "fewer than two classes"),
    "no labels": (table([[], []], NAMED), {}, "fewer than two classes"),
    "scored on what is trained on": (table([[0], [1]], NAMED), {"test_split": "train"}, 'are both "train"'),
    "no such split": (table([[0], [1]], NAMED), {"test_split": "tets"}, 'test_split "tets"'),
    "no pictures to score": (
        DatasetDict(train=table([[0], [1]], NAMED), test=table([[0]], NAMED).rename_column("image", "scan")),
        {"test_split": "test"},
        'split "test" has no column "image", which image_column names',
    ),
    "two columns of lists": (table([["a"], ["b"]], STRINGS, tags=([["x"], ["y"]], STRINGS)), {}, "2 columns could hold"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_lists_that_can_not_be_used_are_refused(what: str) -> None:
    source, options, message = REFUSED[what]
    with pytest.raises(DataError, match=message):
        load_upstream(source, **options)


def test_named_classes_come_before_lists_of_anything() -> None:
    boxes = ([[1.0, 2.0]] * 4, List(Value("float32")))
    tags = ([["x"], ["y"]] * 2, STRINGS)
    source = table([0, 1, 0, 1], ClassLabel(names=["a", "b"]), boxes=boxes, tags=tags)
    data = load_upstream(source)
    assert (data.multi_label, data.class_names, data.train.labels.tolist()) == (False, ("a", "b"), [0, 1, 0, 1])
    named = load_upstream(source, label_column="tags")
    assert (named.multi_label, named.class_names) == (True, ("x", "y"))
    both = table(["first", "second"], Value("string"), kinds=([[0], [1, 2]], NAMED))
    assert rows_of(load_upstream(both).train).tolist() == [[1, 0, 0], [0, 1, 1]]


def test_one_label_a_picture_is_read_as_for_fine_tuning_but_nothing_is_held_out() -> None:
    data, theirs = load_upstream("digits"), load_image_dataset("digits")
    assert (data.multi_label, data.class_names, data.test) == (False, theirs.class_names, None)
    np.testing.assert_array_equal(data.train.labels, theirs.train.labels)
    scored = load_upstream("digits", test_split="test")
    assert scored.test is not None
    np.testing.assert_array_equal(scored.test.labels, theirs.test.labels)
    assert scored.fingerprint != data.fingerprint
    assert len(load_upstream(table(["a", "b"] * 3, Value("string"))).train) == 6


def test_other_labels_are_another_fingerprint() -> None:
    prints = [load_upstream(table(lists, NAMED)).fingerprint for lists in ([[0], [1]], [[0], [1]], [[1], [0]], [[0], [1, 2]])]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


IMAGES = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 1, 0])


def arrays(**changes: Any) -> ArrayImages:
    return ArrayImages(**{"images": IMAGES, "labels": LABELS, "class_names": ("a", "b")} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": IMAGES.astype(np.float32)}, r"images are float32 of shape \(4, 6, 8, 3\); expected uint8"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"shape \(4, 3, 6, 8\)"),
        ({"images": IMAGES[0, 0]}, r"shape \(8, 3\)"),
        ({"images": IMAGES[:3]}, r"3 images, but labels of shape \(4,\)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "0 images"),
        ({"labels": np.array(1)}, r"labels of shape \(\)"),
        ({"labels": np.array([0, 1, 2, 0])}, "whole numbers from 0 to 1"),
        ({"labels": np.array([0, 1, -1, 0])}, "whole numbers from 0 to 1"),
        ({"labels": np.array([0.0, 1, 1, 0])}, "whole numbers from 0 to 1"),
        ({"labels": np.array(["a", "b", "b", "a"])}, "whole numbers from 0 to 1"),
        ({"labels": np.ones((4, 3), np.uint8)}, r"shape \(N, 2\) and hold 0 and 1"),
        ({"labels": np.full((4, 2), 2)}, r"shape \(N, 2\) and hold 0 and 1"),
        ({"labels": np.full((4, 2, 1), 1)}, r"shape \(N, 2\)"),
    ],
)
def test_arrays_of_other_kinds_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        arrays(**changes)


def test_arrays_give_their_pictures_colour_or_grey() -> None:
    source = arrays()
    assert [np.asarray(picture).tolist() for picture in source.read([2, 0])] == [IMAGES[2].tolist(), IMAGES[0].tolist()]
    assert source.ids([2, 0]) == ["row 2", "row 0"]
    (grey,) = arrays(images=IMAGES[..., 0]).read([3])
    assert grey.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(grey), np.repeat(IMAGES[3, ..., :1], 3, axis=2))
    stream = TrainingStream(part=source, view=InceptionView(crop_size=5, flip=False, interpolation="bilinear"), seed=0)
    pictures, labels = stream.__getitems__(range(8))
    assert (pictures.shape, pictures.dtype, labels.dtype) == ((8, 3, 5, 5), np.uint8, np.int64)
    assert labels.tolist() == [LABELS[stream.row(position)] for position in range(8)]


@pytest.mark.parametrize("kind", ["uint8", "int32", "int64"])
def test_labels_of_any_whole_numbers_are_the_same_labels(kind: str) -> None:
    assert arrays(labels=LABELS.astype(kind)).labels.dtype == np.int64
    assert arrays(labels=LABELS.astype(kind)).fingerprint == arrays().fingerprint
    several = arrays(labels=np.eye(2, dtype=bool)[LABELS])
    assert (several.labels.dtype, several.labels.tolist()) == (np.uint8, np.eye(2)[LABELS].tolist())
    assert load_upstream(several).multi_label
    assert not load_upstream(arrays()).multi_label


def test_the_fingerprint_of_arrays_is_of_everything() -> None:
    pixel = IMAGES.copy()
    pixel[3, 5, 7, 2] ^= 1
    others = [
        {"images": pixel},
        {"labels": 1 - LABELS},
        {"class_names": ("a", "c")},
        {"images": np.ascontiguousarray(IMAGES.reshape(4, 8, 6, 3))},
    ]
    assert len({arrays().fingerprint, *(arrays(**changes).fingerprint for changes in others)}) == 5


def test_arrays_from_an_npz_file(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "set.npz", images=IMAGES, labels=LABELS.astype(np.uint8), class_names=np.array(["a", "b"]))
    found = ArrayImages.load(tmp_path / "set.npz")
    assert (found.fingerprint, found.class_names) == (arrays().fingerprint, ("a", "b"))
    data = load_upstream(str(tmp_path / "set.npz"))
    assert (data.name, data.fingerprint) == (str(tmp_path / "set.npz"), arrays().fingerprint)
    for name in ("test_split", "image_column", "label_column"):
        with pytest.raises(DataError, match=f'{name} "x" was given, but arrays'):
            load_upstream(arrays(), **{name: "x"})
    with pytest.raises(DataError, match="fewer than two classes"):
        load_upstream(arrays(labels=np.zeros(4, np.int64)))


def write_npz(path: Path, **changes: Any) -> None:
    content = {"images": IMAGES, "labels": LABELS, "class_names": np.array(["a", "b"])} | changes
    np.savez(path, **{name: array for name, array in content.items() if array is not None})


@pytest.mark.parametrize(
    "break_it",
    [
        lambda path: write_npz(path, labels=None),
        lambda path: write_npz(path, class_names=None),
        lambda path: write_npz(path, class_names=np.array(["a", "b"], dtype=object)),
        lambda path: path.write_bytes(b""),
        lambda path: (write_npz(path), path.write_bytes(path.read_bytes()[:300])),
        lambda path: path.write_text("no archive"),
        lambda path: (np.save(path.with_suffix(".npy"), IMAGES), path.with_suffix(".npy").rename(path)),
        lambda path: None,
    ],
    ids=["no labels", "no names", "a pickle", "empty", "cut short", "text", "one array", "absent"],
)
def test_npz_files_that_can_not_be_used_are_named(break_it: Any, tmp_path: Path) -> None:
    break_it(tmp_path / "set.npz")
    with pytest.raises(DataError, match=r"set\.npz can not be read as arrays of images, labels and class_names"):
        load_upstream(str(tmp_path / "set.npz"))


def test_shards_are_one_split_in_order(tmp_path: Path) -> None:
    whole = table(["a", "b", "b", "a", "a", "b"], Value("string"))
    for shard, rows in ((1, range(4, 6)), (0, range(4))):
        whole.select(rows).to_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet")
    whole.select([5, 4]).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    data = load_image_dataset(str(tmp_path))
    assert data.train.labels.tolist() == [0, 1, 1, 0, 0, 1]
    assert data.test.labels.tolist() == [1, 0]
    pictures = [picture.tobytes() for picture in data.train.read(range(6))]
    assert pictures == [picture.tobytes() for picture in load_upstream(whole).train.read(range(6))]


@pytest.mark.parametrize("second", ["train2.parquet", "train-2.parquet", "train-00001-of-00002.parquet"])
def test_two_files_of_a_split_that_are_not_both_shards_are_refused(tmp_path: Path, second: str) -> None:
    table(["a", "b"] * 2, Value("string")).to_parquet(tmp_path / "train.parquet")
    shutil.copy(tmp_path / "train.parquet", tmp_path / second)
    with pytest.raises(DataError, match="each is named for its split"):
        load_image_dataset(str(tmp_path))


def upstream(num_examples: int = 1_281_167, kind: Any = PretrainConfig, **options: Any) -> HyperParameters:
    network = find_network("resnetv2_50x1_bit")
    return resolve_upstream(configure(kind, dataset="digits", **options), num_examples=num_examples, weights=network)


def test_the_recipe_of_imagenet() -> None:
    """90 passes in batches of 4096: 0.03 x 16, divided by 10 at 30, 60 and 80 % of the run."""
    hyper = upstream(batch_size=4096)
    assert hyper.steps == 28151
    assert (hyper.base_lr, hyper.momentum, hyper.weight_decay, hyper.mixup_alpha) == (0.48, 0.9, 1e-4, 0.0)
    assert (hyper.crop_size, hyper.warmup_steps, hyper.decay_steps) == (224, 1407, (8445, 16891, 22521))
    for share, factor in ((0.06, 1), (0.29, 1), (0.31, 10), (0.59, 10), (0.61, 100), (0.79, 100), (0.81, 1000), (1, 1000)):
        assert learning_rate(round(share * 28151) - 1, hyper) == pytest.approx(0.48 / factor)
    for step in (0, 1, 700, 1406):
        assert learning_rate(step, hyper) == pytest.approx(0.48 * step / 1407)


def test_the_rate_follows_the_batch_and_all_else_the_length() -> None:
    hyper = upstream()
    assert (hyper.batch_size, hyper.base_lr, hyper.steps) == (256, 0.03, round(90 * 1_281_167 / 256))
    assert hyper.warmup_steps == 5000
    assert upstream(batch_size=64).base_lr == pytest.approx(0.0075)
    short = upstream(num_examples=1000, batch_size=100, epochs=10)
    assert (short.steps, short.warmup_steps) == (100, 5)
    assert upstream(num_examples=1000, epochs=0.01).steps == 1
    assert upstream(steps=40).steps == 40


def test_distillation_mixes_and_pre_training_does_not() -> None:
    options = {"num_examples": 1000, "batch_size": 100, "epochs": 10}
    assert upstream(**options).mixup_alpha == 0
    distilled = upstream(**options, kind=DistillConfig, teacher="bundled")
    assert distilled.mixup_alpha == 1.0
    assert upstream(**options, kind=DistillConfig, teacher="bundled", mixup_alpha=0.0).mixup_alpha == 0


def test_what_is_asked_for_comes_first() -> None:
    asked = {
        "steps": 50,
        "batch_size": 32,
        "base_lr": 0.2,
        "warmup_steps": 0,
        "decay_steps": (10, 20),
        "momentum": 0.5,
        "weight_decay": 0.0,
        "crop_size": 96,
        "mixup_alpha": 0.1,
    }
    hyper = upstream(**asked)
    assert {name: getattr(hyper, name) for name in asked} == asked
    assert hyper.resize_size == 96


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"crop_size": 0}, "is 0; it must be at least 1"),
        ({"epochs": 0.0}, "epochs is 0"),
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"steps": 5, "warmup_steps": 6}, "warmup_steps is 6"),
        ({"min_aera": 0.5}, r'no option "min_aera" \(did you mean "min_area"'),
        ({"examples_per_class": 3}, 'no option "examples_per_class"'),
        ({"kind": DistillConfig}, "no teacher was named"),
        ({"kind": DistillConfig, "teacher": "bundled", "temperature": 0.0}, "temperature is 0"),
    ],
)
def test_requests_that_contradict_the_recipe_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        upstream(**options)


def test_incomplete_shards_are_refused(tmp_path: Path) -> None:
    table([0, 1, 1, 0], ClassLabel(names=["a", "b"])).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    with pytest.raises(DataError, match=r"1 shard\(s\) of train, but their names speak of 2"):
        load_upstream(str(tmp_path))
