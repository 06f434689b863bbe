"""Does every kind of source give the same pictures, labels and classes, and does each position of a run give the same example?"""

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from hub import LoopbackHub
from PIL import Image as Pillow
from sklearn.datasets import load_digits

from bit_mixup.data import ImageDataset, Part, load_image_dataset
from bit_mixup.errors import DataError
from bit_mixup.examples import EvaluationView, TrainingStream
from bit_mixup.images import View, decode
from bit_mixup.scanning import summarize_sizes
from bit_mixup.sources import DIGITS_FOLDER

NAMES = ["cat", "dog", "test_tubes"]  # the last looks like a split to the `datasets` library's own image folders
COUNTS = {"train": 5, "test": 2}  # pictures for each class
Splits = dict[str, list[tuple[str, str]]]  # file and class of each picture
VIEW = View(resize_size=20, crop_size=16, flip=True, interpolation="bilinear")


def picture(number: int, mode: str = "RGB") -> Pillow.Image:
    """A picture like no other."""
    return Pillow.fromarray(np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)).convert(mode)


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "png")
    return buffer.getvalue()


def in_memory(labels: list[Any], feature: Any = None) -> Dataset:
    """Pictures with these labels."""
    feature = feature or Value("string" if isinstance(labels[0], str) else "int64")
    pictures = [{"bytes": png(number), "path": None} for number in range(len(labels))]
    return Dataset.from_dict({"image": pictures, "label": labels}, features=Features({"image": Image(), "label": feature}))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Split folders of class folders, with hidden files among them."""
    root = tmp_path_factory.mktemp("pictures")
    number = 0
    for split, count in COUNTS.items():
        for name in NAMES:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                picture(number).save(root / split / name / f"{index}.{'PNG' if index == 0 else 'png'}")
                number += 1
        (root / split / ".ipynb_checkpoints").mkdir()
        picture(99).save(root / split / ".ipynb_checkpoints" / "0.png")
    (root / "train" / "cat" / "._0.png").write_bytes(b"what a Macintosh leaves")
    (root / "train" / "cat" / "notes.txt").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def splits(root: Path) -> Splits:
    return {
        split: [(f"{split}/{name}/{i}.{'PNG' if i == 0 else 'png'}", name) for name in NAMES for i in range(count)]
        for split, count in COUNTS.items()
    }


@pytest.fixture(scope="module")
def encoded(root: Path, splits: Splits) -> DatasetDict:
    """The same with features, in memory."""
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {
                    "image": [{"bytes": (root / file).read_bytes(), "path": None} for file, _ in rows],
                    "label": [NAMES.index(name) for _, name in rows],
                },
                features=features,
            )
            for split, rows in splits.items()
        }
    )


def write_table(root: Path, rows: list[tuple[str, str]], file: Path) -> Path:
    """File names relative to the table, and class names."""
    for name in COUNTS:
        if not (file.parent / name).exists():
            (file.parent / name).symlink_to(root / name)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({"file": name, "kind": kind}) + "\n" for name, kind in rows))
    else:
        comma = "\t" if file.suffix == ".tsv" else ","
        file.write_text("".join(f"{name}{comma}{kind}\n" for name, kind in [("file", "kind"), *rows]))
    return file


def table_folder(suffix: str) -> Callable[..., Any]:
    def make(root: Path, splits: Splits, encoded: DatasetDict, hub: LoopbackHub, tmp: Path) -> Any:
        folder = tmp / "tables"
        folder.mkdir()
        for split, rows in splits.items():
            write_table(root, rows, folder / f"{split}{suffix}")
        return str(folder)

    return make


def parquet_folder(root: Path, splits: Splits, encoded: DatasetDict, hub: LoopbackHub, tmp: Path) -> Any:
    for split, data in encoded.items():
        data.to_parquet(tmp / f"{split}-00000-of-00001.parquet")
    return str(tmp)


def saved(root: Path, splits: Splits, encoded: DatasetDict, hub: LoopbackHub, tmp: Path) -> Any:
    encoded.save_to_disk(tmp / "saved")
    return str(tmp / "saved")


def published(root: Path, splits: Splits, encoded: DatasetDict, hub: LoopbackHub, tmp: Path) -> Any:
    publish(hub, "someone/pictures", encoded, tmp, commit="c" * 40)
    return "someone/pictures"


def publish(hub: LoopbackHub, repository: str, data: DatasetDict, tmp: Path, *, commit: str) -> None:
    files = {}
    for split, rows in data.items():
        file = tmp / commit / f"{split}.parquet"
        file.parent.mkdir(exist_ok=True)
        rows.to_parquet(file)
        files[f"data/{split}-00000-of-00001.parquet"] = file
    hub.add_dataset(repository, files, commit)


SOURCES: dict[str, Callable[..., Any]] = {
    "split folders": lambda root, *_: str(root),
    "csv": table_folder(".csv"),
    "tsv": table_folder(".tsv"),
    "jsonl": table_folder(".jsonl"),
    "parquet": parquet_folder,
    "save_to_disk": saved,
    "in memory": lambda root, splits, encoded, *_: encoded,
    "hub": published,
}


def test_folders_beside_a_table_hold_its_pictures_and_are_no_classes(root: Path, splits: Splits, tmp_path: Path) -> None:
    shutil.copytree(root / "train", tmp_path / "pictures")
    rows = "".join(f"pictures/{Path(file).relative_to('train')},{name}\n" for file, name in splits["train"])
    (tmp_path / "train.csv").write_text("file,kind\n" + rows)
    data = load_image_dataset(str(tmp_path))
    assert (data.notes[0], data.class_names) == ('pictures from column "file", classes from "kind"', tuple(NAMES))


def pixels(part: Part) -> list[bytes]:
    return [decode(encoded, where="").tobytes() for encoded in part.encoded(range(len(part)))]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same(
    kind: str, root: Path, splits: Splits, encoded: DatasetDict, hub: LoopbackHub, tmp_path: Path
) -> None:
    data = load_image_dataset(SOURCES[kind](root, splits, encoded, hub, tmp_path))
    assert data.class_names == tuple(NAMES)
    for part, split in ((data.train, "train"), (data.test, "test")):
        assert part.name == split
        assert [NAMES[label] for label in part.labels] == [name for _, name in splits[split]]
        assert pixels(part) == [Pillow.open(root / file).tobytes() for file, _ in splits[split]]
        assert len(part) == 3 * COUNTS[split]
    assert data.revision == ("c" * 40 if kind == "hub" else None)
    assert 'scored on split "test"' in data.notes


ONE_SPLIT: dict[str, Callable[..., Any]] = {
    "class folders": lambda root, *_: str(root / "train"),
    "csv": lambda root, splits, encoded, tmp: str(write_table(root, splits["train"], tmp / "rows.csv")),
    "jsonl": lambda root, splits, encoded, tmp: str(write_table(root, splits["train"], tmp / "rows.jsonl")),
    "parquet": lambda root, splits, encoded, tmp: (encoded["train"].to_parquet(tmp / "a.parquet"), str(tmp / "a.parquet"))[1],
    "save_to_disk": lambda root, splits, encoded, tmp: (encoded["train"].save_to_disk(tmp / "a"), str(tmp / "a"))[1],
    "in memory": lambda root, splits, encoded, tmp: encoded["train"],
}


@pytest.mark.parametrize("kind", ONE_SPLIT)
def test_without_a_test_split_every_source_gives_the_same_fifth(
    kind: str, root: Path, splits: Splits, encoded: DatasetDict, tmp_path: Path
) -> None:
    data = load_image_dataset(ONE_SPLIT[kind](root, splits, encoded, tmp_path), seed=3)
    expected = load_image_dataset(encoded["train"], seed=3)
    assert data.class_names == tuple(NAMES)
    assert pixels(data.train) + pixels(data.test) == pixels(expected.train) + pixels(expected.test)
    assert data.train.labels.tolist() == expected.train.labels.tolist()
    assert [note for note in data.notes if note.startswith("NOTE: the data set has no test split")]


def test_hub_revision_is_pinned_and_recorded(hub: LoopbackHub, encoded: DatasetDict, tmp_path: Path) -> None:
    publish(
        hub,
        "someone/pinned",
        DatasetDict(train=encoded["train"].select(range(7)), test=encoded["test"]),
        tmp_path,
        commit="1" * 40,
    )
    publish(hub, "someone/pinned", encoded, tmp_path, commit="2" * 40)
    newest, pinned = (load_image_dataset("someone/pinned", revision=revision) for revision in (None, "1" * 40))
    assert (newest.revision, len(newest.train)) == ("2" * 40, 15)
    assert (pinned.revision, len(pinned.train)) == ("1" * 40, 7)
    assert newest.fingerprint != pinned.fingerprint
    with pytest.raises(DataError, match=r"someone/pinned.*Revision '3{40}' doesn't exist"):
        load_image_dataset("someone/pinned", revision="3" * 40)


def test_string_labels_are_sorted_and_equal_in_all_splits() -> None:
    data = load_image_dataset(DatasetDict(train=in_memory(["owl", "ant", "owl", "bee"]), test=in_memory(["owl", "bee"])))
    assert data.class_names == ("ant", "bee", "owl")
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([2, 0, 2, 1], [2, 1])


def test_whole_number_labels_keep_their_names() -> None:
    data = load_image_dataset(DatasetDict(train=in_memory([10, 2, 1, 2]), test=in_memory([2, 10])))
    assert data.class_names == ("1", "2", "10")
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([2, 1, 0, 1], [1, 2])


def test_class_labels_in_another_order_are_aligned_by_name() -> None:
    train, test = in_memory([0, 1, 2], ClassLabel(names=["a", "b", "c"])), in_memory([0, 1, 2], ClassLabel(names=["c", "a", "b"]))
    assert load_image_dataset(DatasetDict(train=train, test=test)).test.labels.tolist() == [2, 0, 1]


def test_class_labels_beside_plain_labels_mean_what_they_say() -> None:
    train, test = in_memory(["b", "a", "c"] * 2), in_memory([0, 2, 1], ClassLabel(names=["c", "a", "b"]))
    assert load_image_dataset(DatasetDict(train=train, test=test)).test.labels.tolist() == [2, 1, 0]
    numbers, test = in_memory([3, 1, 2] * 2), in_memory([1, 3, 2], ClassLabel(names=["none", "one", "two", "three"]))
    assert load_image_dataset(DatasetDict(train=numbers, test=test)).test.labels.tolist() == [0, 2, 1]


def test_a_selection_in_memory_has_only_its_own_classes() -> None:
    whole = in_memory(["a", "b", "a", "b", "z", "z"])
    data = load_image_dataset(DatasetDict(train=whole.select([3, 2, 1, 0]), test=whole.select([1, 2])))
    assert data.class_names == ("a", "b")
    assert data.train.labels.tolist() == [1, 0, 1, 0]
    assert pixels(data.train) == [picture(number).tobytes() for number in (3, 2, 1, 0)]


LABELLED, UNLABELLED, KIND = [0, 1, 0, 1], [-1, -1], ClassLabel(names=["a", "b"])


@pytest.mark.parametrize(
    ("others", "scored", "note"),
    [
        ({"test": LABELLED, "validation": LABELLED}, "test", 'scored on split "test"'),
        ({"validation": LABELLED}, "validation", 'scored on split "validation"'),
        ({"test": UNLABELLED, "validation": LABELLED}, "validation", 'scored on split "validation" (unlabelled: test)'),
        ({"test": UNLABELLED}, "train", "NOTE: the split(s) test are unlabelled, so a stratified fifth of train (seed 0)"),
    ],
)
def test_split_to_score(others: dict[str, list[int]], scored: str, note: str) -> None:
    data = load_image_dataset(DatasetDict({name: in_memory(rows, KIND) for name, rows in {"train": LABELLED, **others}.items()}))
    assert data.test.name == scored
    assert [line for line in data.notes if line.startswith(note)]


def labelled(counts: dict[str, int]) -> Dataset:
    return in_memory([name for name, count in counts.items() for _ in range(count)])


def rows(part: Part | None) -> set[int]:
    assert part is not None
    assert len(set(part.rows.tolist())) == len(part)
    return set(part.rows.tolist())


def per_class(data: ImageDataset, part: Part) -> dict[str, int]:
    return dict(Counter(data.class_names[label] for label in part.labels))


def test_held_out_parts_are_stratified_seeded_and_disjoint() -> None:
    source = labelled({"a": 40, "b": 20, "c": 2, "d": 1})
    data, again, other = (load_image_dataset(source, validation_fraction=0.25, seed=seed) for seed in (0, 0, 1))
    assert per_class(data, data.test) == {"a": 8, "b": 4, "c": 1}
    assert data.validation is not None
    assert per_class(data, data.validation) == {"a": 8, "b": 4}
    parts = [rows(part) for part in (data.train, data.test, data.validation)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 63
    assert data.fingerprint == again.fingerprint != other.fingerprint
    assert rows(data.test) == rows(again.test) != rows(other.test)
    assert load_image_dataset(source).validation is None


def test_few_shot_is_balanced_seeded_and_without_replacement() -> None:
    data, again, other = (load_image_dataset("digits", examples_per_class=7, few_shot_seed=seed) for seed in (0, 0, 5))
    assert per_class(data, data.train) == {str(digit): 7 for digit in range(10)}
    assert len(data.test) == 797
    assert rows(data.train) == rows(again.train) != rows(other.train)
    everything = load_image_dataset("digits")
    assert data.train.labels.tolist() == everything.train.labels[data.train.rows].tolist()


def test_features_decide_before_types_and_flags_before_both() -> None:
    source = in_memory([0, 1, 0, 1], KIND).add_column("author", ["x", "y", "y", "x"])
    source = source.add_column("file", ["1.png", "2.png", "3.png", "4.png"])
    data = load_image_dataset(source)
    assert (data.image_column, data.label_column) == ("image", "label")
    assert data.notes[0] == 'pictures from column "image", classes from "label"'
    assert load_image_dataset(source, label_column="author").class_names == ("x", "y")
    two = source.add_column("mask", [{"bytes": png(9), "path": None}] * 4).cast_column("mask", Image())
    with pytest.raises(DataError, match=r"2 columns could hold the pictures: image, mask\. Name one with image_column"):
        load_image_dataset(two)
    assert set(pixels(load_image_dataset(two, image_column="mask").train)) == {picture(9).tobytes()}


def of_sizes(sizes: list[tuple[int, int]]) -> Part:
    """Pictures that are headers alone: nobody may decode them to learn their size."""
    pictures = [{"bytes": b"P5 %d %d 255\n" % size, "path": None} for size in sizes]
    data = Dataset.from_dict({"image": pictures}, features=Features({"image": Image(decode=False)}))
    return Part(name="train", pictures=data, rows=np.arange(len(sizes)), labels=np.zeros(len(sizes), dtype=np.int64))


def test_sizes_of_all_pictures() -> None:
    sizes = summarize_sizes(of_sizes([(100, 90), (96, 96), (300, 200), (10, 20), (97, 95)]), small_area=96 * 96, seed=0)
    assert (sizes.median_area, sizes.sampled) == (97 * 95, 5)
    assert (sizes.smallest, sizes.largest, sizes.small_share) == ((10, 20), (300, 200), 3 / 5)


def test_sizes_of_a_seeded_sample_of_1000() -> None:
    part = of_sizes([(edge, 1) for edge in range(1, 1201)])
    first, again, other = (summarize_sizes(part, small_area=601, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first.sampled == other.sampled == 1000
    assert 550 < first.median_area < 650


def test_bundled_digits_are_scikit_learns() -> None:
    source = load_dataset("parquet", data_files={split: str(DIGITS_FOLDER / f"{split}.parquet") for split in ("train", "test")})
    digits, found = load_digits(), []
    for split, size in (("train", 1000), ("test", 797)):
        assert source[split].features == Features({"image": Image(), "label": ClassLabel(names=[str(d) for d in range(10)])})
        assert len(source[split]) == size
        found += [(row["label"], np.asarray(row["image"]).tobytes()) for row in source[split]]
        shares = np.bincount(source[split]["label"][:]) / np.bincount(digits.target)
        assert np.abs(shares - size / 1797).max() < 0.006, "the split is stratified"
    theirs = np.round(digits.images * 255 / 16).astype(np.uint8)
    assert Counter(found) == Counter(
        (label, image.tobytes()) for label, image in zip(digits.target.tolist(), theirs, strict=True)
    )
    data = load_image_dataset("digits")
    assert (len(data.train), len(data.test), data.num_classes) == (1000, 797, 10)


@pytest.fixture(scope="module")
def stream(encoded: DatasetDict) -> TrainingStream:
    return TrainingStream(part=load_image_dataset(encoded).train, view=VIEW, seed=5)


def test_a_position_gives_the_same_in_any_batch_and_order(stream: TrainingStream) -> None:
    positions = list(range(40))  # almost three passes over 15 pictures
    images, labels = stream.__getitems__(positions)
    assert (images.shape, images.dtype, labels.dtype) == ((40, 3, 16, 16), np.uint8, np.int64)
    shuffled = np.random.default_rng(0).permutation(40)
    for batch in (shuffled, shuffled[:7], *[[position] for position in positions]):
        some, their_labels = stream.__getitems__([int(position) for position in batch])
        np.testing.assert_array_equal(some, images[batch])
        np.testing.assert_array_equal(their_labels, labels[batch])
    assert len({image.tobytes() for image in images}) > 30, "crops and flips differ between passes"


def test_a_pass_sees_each_example_once_in_an_order_of_its_own(stream: TrainingStream) -> None:
    passes = [[stream.row(position) for position in range(start, start + 15)] for start in (0, 15)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(15))
    assert passes[0] != passes[1]
    other = TrainingStream(part=stream.part, view=VIEW, seed=6)
    assert [other.row(position) for position in range(15)] != passes[0]


def test_ids_name_files_or_rows(root: Path, stream: TrainingStream) -> None:
    assert stream.ids([3, 17]) == [f"train row {stream.row(position)}" for position in (3, 17)]
    files = TrainingStream(part=load_image_dataset(str(root)).train, view=VIEW, seed=5)
    row = files.row(17)
    assert files.ids([17]) == [f"{root}/train/{NAMES[row // 5]}/{row % 5}.{'png' if row % 5 else 'PNG'} (train row {row})"]


def test_scored_pictures_come_in_order_and_whole(encoded: DatasetDict) -> None:
    part = load_image_dataset(encoded).test
    images, labels = EvaluationView(part=part, view=VIEW).__getitems__(range(len(part)))
    np.testing.assert_array_equal(labels, part.labels)
    for image, row in zip(images, encoded["test"], strict=True):
        np.testing.assert_array_equal(
            image, np.asarray(row["image"].resize((16, 16), Pillow.Resampling.BILINEAR)).transpose(2, 0, 1)
        )


def test_a_broken_picture_comes_back_as_the_error_to_raise() -> None:
    broken = Dataset.from_dict({"image": [{"bytes": png(1), "path": None}, {"bytes": png(1)[:-60], "path": None}]})
    part = Part(
        name="train", pictures=broken.cast_column("image", Image(decode=False)), rows=np.arange(2), labels=np.array([0, 1])
    )
    error = TrainingStream(part=part, view=VIEW, seed=0).__getitems__([0, 1])
    assert isinstance(error, DataError)
    assert str(error).startswith("train row 1 can not be decoded as a picture (OSError: ")
    assert isinstance(EvaluationView(part=part, view=VIEW).__getitems__([1]), DataError)


def test_string_labels_beside_named_classes_mean_the_names(encoded: DatasetDict) -> None:
    names = encoded["train"].features["label"].names
    test = encoded["test"].cast_column("label", Value("int64"))
    strings = test.remove_columns("label").add_column("label", [names[label] for label in test["label"]])
    found = load_image_dataset(DatasetDict({"train": encoded["train"], "test": strings}))
    np.testing.assert_array_equal(found.test.labels, load_image_dataset(encoded).test.labels)
