"""What is trained on, what is tested on, and what does the model get to see at each position?

From the splits of a source to pictures and labels: which column is which, what the classes are, which rows belong to which part.
Torch is not imported: pictures leave as NumPy arrays of bytes.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import ClassLabel, Dataset, DatasetDict, Image, LargeList, List, Value
from PIL.Image import Image as Picture

from bit_mixup.errors import DataError, did_you_mean
from bit_mixup.examples import LabelSets
from bit_mixup.images import EXTENSIONS, decode
from bit_mixup.sampling import few_shot_rows, stratified_rows
from bit_mixup.sources import TEST_SPLITS, Source, open_source

UNLABELLED = -1
TEST_FRACTION = 0.2

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Some rows of a split, with their labels.

    Args:
        name: of the split, for messages.
        pictures: the split's pictures, not decoded; one column.
        rows: which rows of it belong to the part, (N,).
        labels: of those rows, (N,), from 0 to the number of classes less one; or `LabelSets`.
    """

    name: str
    pictures: Dataset
    rows: npt.NDArray[np.int64]
    labels: Any

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: npt.NDArray[np.int64]) -> "Part":
        """The examples at these indices of the part."""
        labels = self.labels.subset(indices) if isinstance(self.labels, LabelSets) else self.labels[indices]
        return replace(self, rows=self.rows[indices], labels=labels)

    def encoded(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The undecoded pictures at these indices; raises DataError for a damaged file."""
        column = self.pictures.column_names[0]
        rows = [int(self.rows[index]) for index in indices]
        try:
            pictures = self.pictures[rows][column]
        except MemoryError:
            raise
        except Exception as error:  # values of a damaged file show where they are read
            raise DataError(
                f'{self.name} rows {rows[0]} to {rows[-1]}: "{column}" can not be read: {error}. Mend the file.'
            ) from error
        return [picture or {"bytes": None, "path": None} for picture in pictures]

    def read(self, indices: Sequence[int]) -> list[Picture]:
        """The decoded pictures at these indices, RGB.

        Raises:
            DataError: one of them is broken.
        """
        pairs = zip(indices, self.encoded(indices), strict=True)
        return [decode(encoded, where=self.where(index, encoded)) for index, encoded in pairs]

    def ids(self, indices: Sequence[int]) -> list[str]:
        """Where people find the examples at these indices: the file, or the row of the split."""
        return [self.where(index, encoded) for index, encoded in zip(indices, self.encoded(indices), strict=True)]

    def where(self, index: int, encoded: dict[str, Any]) -> str:
        """How a message names an example."""
        path = encoded.get("path")
        return f"{path} ({self.name} row {self.rows[index]})" if path else f"{self.name} row {self.rows[index]}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDataset:
    """A data set that is ready to be trained on.

    Args:
        name: as asked for.
        class_names: in the order of the labels.
        train: examples to train on.
        test: examples to score, none of them in `train`.
        validation: examples held out of the training split, where that was asked for.
        image_column: where pictures were found.
        label_column: where labels were found.
        notes: what was decided on the way, for people to read.
        revision: commit hash on the hub; None for data of this machine.
        source: all splits as they were opened.
    """

    name: str
    class_names: tuple[str, ...]
    train: Part
    test: Part
    validation: Part | None
    image_column: str
    label_column: str
    notes: tuple[str, ...]
    revision: str | None
    source: Source

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """A hash of class names, of the revision, and of the rows and labels of each part; pixels are not looked at."""
        digest = hashlib.sha256(repr((self.class_names, self.revision)).encode())
        for part in (self.train, self.test, self.validation):
            if part is not None:
                digest.update(part.name.encode() + part.rows.astype("<i8").tobytes() + part.labels.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def load_image_dataset(
    source: str | Dataset | DatasetDict,
    *,
    config: str | None = None,
    revision: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    examples_per_class: int | None = None,
    few_shot_seed: int = 0,
    validation_fraction: float = 0.0,
    seed: int = 0,
    leave_out: Callable[[Part], Part] | None = None,
) -> ImageDataset:
    """Opens a data set and decides its columns, classes and parts.

    Args:
        source: see `bit_mixup.sources.open_source`.
        config: of a hub data set that has several.
        revision: branch, tag or commit of a hub data set.
        train_split: the split to train on.
        test_split: the split to score. None: the first labelled one of test, validation, ...; else a seeded stratified fifth
            of the training split.
        image_column: None: the one column of pictures.
        label_column: None: the one column of classes, else the one of strings or whole numbers.
        examples_per_class: draw a balanced subset of this many for each class, without replacement.
        few_shot_seed: of that draw.
        validation_fraction: share of each class of the training split that is held out and scored apart.
        seed: of the splits that are made here.
        leave_out: gives the examples of a split that may be used, before anything is drawn or held out. None: all.

    Raises:
        DataError: something is missing, ambiguous or out of range; the message names it.
    """
    opened = open_source(source, config=config, revision=revision)
    parts = open_parts(opened, train_split=train_split, test_split=None, image_column=image_column, label_column=label_column)
    leave_out = leave_out or (lambda part: part)
    train, class_names, split = leave_out(parts.train), parts.class_names, train_split
    notes = [f'pictures from column "{parts.image_column}", classes from "{parts.label_column}"']
    test, note = _test_part(opened, parts, test_split, seed)
    notes.append(note)
    if test is not None:
        test = leave_out(test)
    else:
        test, train = _hold_out(train, TEST_FRACTION, seed=seed)
    validation = None
    if validation_fraction:
        if not 0 < validation_fraction < 1:
            raise DataError(f"validation_fraction is {validation_fraction}; it must lie between 0 and 1.")
        validation, train = _hold_out(train, validation_fraction, seed=seed + 1)
        notes.append(f"{len(validation):,} examples of {split} are held out for validation")
    if examples_per_class is not None:
        train = _few_shot(train, class_names, examples_per_class, few_shot_seed)
        notes.append(f"{examples_per_class} example(s) for each class, drawn without replacement with seed {few_shot_seed}")
    return ImageDataset(
        name=source if isinstance(source, str) else "memory",
        class_names=class_names,
        train=train,
        test=test,
        validation=validation,
        image_column=parts.image_column,
        label_column=parts.label_column,
        notes=tuple(notes),
        revision=opened.revision,
        source=opened,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Splits with their columns and classes found; nothing is drawn, cut or held out yet.

    Args:
        class_names: in the order of the labels.
        values: what stands for each class in the column of the training split.
        train: all labelled rows of the training split.
        test: all rows of the split that was named for it.
        image_column: where pictures were found.
        label_column: where labels were found.
    """

    class_names: tuple[str, ...]
    values: list[Any]
    train: Part
    test: Part | None
    image_column: str
    label_column: str


def open_parts(
    source: Source, *, train_split: str, test_split: str | None, image_column: str | None, label_column: str | None
) -> Parts:
    """Finds columns and classes; arguments and errors as `load_image_dataset`, but without a test_split there is no test part."""
    split = pick_split(source, train_split, "train_split")
    image_column = find_image_column(source.splits[split], image_column)
    label_column = find_label_column(source.splits[split], label_column, image_column)
    class_names, values = _classes(source.splits[split], label_column, split)
    train = _part(source, split, image_column, label_column, values, class_names)
    unlabelled = np.flatnonzero(train.labels == UNLABELLED)
    if len(unlabelled):
        raise DataError(
            f'{split} row {unlabelled[0]} has the label -1 in "{label_column}", which means unlabelled '
            f"({len(unlabelled)} rows do). Remove these rows, or name another train_split."
        )
    if len(np.unique(train.labels)) < 2:
        raise DataError(
            f'"{label_column}" of {split} holds fewer than two classes: there is nothing to learn. Name another label_column '
            "or train_split."
        )
    parts = Parts(
        class_names=class_names, values=values, train=train, test=None, image_column=image_column, label_column=label_column
    )
    return parts if test_split is None else replace(parts, test=_labelled_part(source, parts, test_split))


def pick_split(source: Source, name: str, flag: str) -> str:
    """The name, if there is such a split and it holds examples; raises DataError, which names the flag."""
    if not len(source.splits[find_split(list(source.splits), name, flag)]):
        raise DataError(f'split "{name}" holds no examples. Name another {flag}.')
    return name


def find_split(names: Sequence[str], name: str, flag: str) -> str:
    """The name, if there is such a split; raises DataError, which names the flag."""
    if name not in names:
        raise DataError(
            f'{flag} "{name}": the data set has the splits {", ".join(names)}{did_you_mean(name, names)}. Name one with {flag}.'
        )
    return name


def _column(split: Dataset, name: str, flag: str) -> str:
    if name not in split.column_names:
        raise DataError(
            f'{flag} "{name}": the data set has the columns {", ".join(split.column_names)}'
            f"{did_you_mean(name, split.column_names)}."
        )
    return name


def _one_of(candidates: list[str], split: Dataset, what: str, flag: str) -> str:
    if len(candidates) == 1:
        return candidates[0]
    columns = ", ".join(
        f"{name} ({type(f).__name__ if not isinstance(f, Value) else f.dtype})" for name, f in split.features.items()
    )
    if candidates:
        raise DataError(f"{len(candidates)} columns could hold the {what}: {', '.join(candidates)}. Name one with {flag}.")
    raise DataError(f"no column seems to hold the {what}; there are {columns}. Name one with {flag}.")


def find_image_column(split: Dataset, asked: str | None) -> str:
    """The column of pictures: the one asked for, or the only one; raises DataError."""
    if asked is not None:
        name = _column(split, asked, "image_column")
        if not isinstance(split.features[name], Image) and not looks_like_pictures(split, name):
            raise DataError(
                f'image_column "{name}" holds {split.features[name]}, not pictures: expected an Image feature, encoded bytes, or '
                f"names of picture files ({', '.join(sorted(EXTENSIONS))})."
            )
        return name
    features = [name for name, feature in split.features.items() if isinstance(feature, Image)]
    return _one_of(
        features or [n for n in split.column_names if looks_like_pictures(split, n)], split, "pictures", "image_column"
    )


def looks_like_pictures(split: Dataset, name: str) -> bool:
    """Whether a column without an Image feature could hold pictures: encoded, or names of their files."""
    feature = split.features[name]
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    if not isinstance(feature, Value):
        return False
    if feature.dtype in ("binary", "large_binary"):
        return True
    first = split[0][name] if feature.dtype in ("string", "large_string") else None
    return isinstance(first, str) and Path(first).suffix.lower() in EXTENSIONS


def find_label_column(split: Dataset, asked: str | None, image_column: str) -> str:
    """The column of classes: the one asked for, or the only one; raises DataError."""
    if asked is not None:
        name = _column(split, asked, "label_column")
        if not isinstance(split.features[name], ClassLabel) and not looks_like_labels(split, name):
            kind = (
                "lists (several labels for a picture)"
                if isinstance(split.features[name], List | LargeList)
                else split.features[name]
            )
            raise DataError(
                f'label_column "{name}" holds {kind}; expected one class a picture: a ClassLabel, strings or whole numbers.'
            )
        return name
    features = [name for name, feature in split.features.items() if isinstance(feature, ClassLabel)]
    by_type = [name for name in split.column_names if name != image_column and looks_like_labels(split, name)]
    return _one_of(features or by_type, split, "classes", "label_column")


def looks_like_labels(split: Dataset, name: str) -> bool:
    """Whether a column without a ClassLabel could hold classes: strings or whole numbers."""
    feature = split.features[name]
    return isinstance(feature, Value) and (feature.dtype in ("string", "large_string", "bool") or "int" in feature.dtype)


def _classes(split: Dataset, column: str, name: str) -> tuple[tuple[str, ...], list[Any]]:
    """Names of the classes, and the values in the column that stand for them, both in the order of the labels."""
    feature = split.features[column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names), list(range(len(feature.names)))
    raw = split[column][:]
    if None in raw:
        raise DataError(f'{name} row {raw.index(None)} has no label: "{column}" is empty there. Fill it or remove the row.')
    values = sorted(value for value in set(raw) if isinstance(value, str) or value != UNLABELLED)
    if values and not isinstance(values[0], str) and values[0] < 0:
        raise DataError(f'"{column}" of {name} holds the label {values[0]}; labels are 0 or more (-1 means unlabelled).')
    if len(values) == len(split) > 1:
        raise DataError(
            f'"{column}" of {name} has another value in every row, as names or ids do: it can not be the class. '
            "Name the right column with label_column."
        )
    return tuple(str(value) for value in values), values


def _part(
    source: Source, split: str, image_column: str, label_column: str, values: list[Any], class_names: tuple[str, ...]
) -> Part:
    data = source.splits[split]
    for column, flag in ((image_column, "image_column"), (label_column, "label_column")):
        if column not in data.column_names:
            raise DataError(
                f'split "{split}" has no column "{column}", which {flag} names. It has {", ".join(data.column_names)}.'
            )
    return undecoded_part(source, split, image_column, _labels(data, split, label_column, values, class_names))


def part_for_classes(
    source: Source, split: str, *, image_column: str | None, label_column: str | None, class_names: Sequence[str]
) -> Part:
    """All rows of a split, labelled by the place of their class's name in `class_names`; classes without rows do not matter.

    Raises:
        DataError: a row is unlabelled or of another class, or a column can not be found.
    """
    data = source.splits[pick_split(source, split, "split")]
    image_column = find_image_column(data, image_column)
    label_column = find_label_column(data, label_column, image_column)
    names, values = _classes(data, label_column, split)
    part = _all_labelled(_part(source, split, image_column, label_column, values, names))
    foreign = [names[label] for label in np.unique(part.labels) if names[label] not in class_names]
    if foreign:
        known = f"{len(class_names)}: {', '.join(class_names[:10])}{', ...' if len(class_names) > 10 else ''}"
        meant = did_you_mean(foreign[0], class_names)
        raise DataError(
            f'split "{split}" has the class "{foreign[0]}", which the model does not know{meant}; it knows {known}. Rename or '
            "remove it, or name another label_column."
        )
    places = np.array([class_names.index(name) if name in class_names else UNLABELLED for name in names], dtype=np.int64)
    return replace(part, labels=places[part.labels])


def undecoded_part(source: Source, split: str, image_column: str, labels: Labels | LabelSets) -> Part:
    """All rows of a split as a part, with labels (N,) or (N, K)."""
    data = source.splits[split]
    return Part(
        name=split,
        pictures=_undecoded(data.select_columns([image_column]), image_column, source.folder),
        rows=np.arange(len(data)),
        labels=labels,
    )


def _undecoded(pictures: Dataset, column: str, folder: Path) -> Dataset:
    feature = pictures.features[column]
    if isinstance(feature, Value) and "string" in feature.dtype:
        names = pictures[column][:]
        if None in names:
            raise DataError(f'row {names.index(None)} of column "{column}" names no picture. Fill it or remove the row.')
        paths = [{"path": str(folder / Path(path).expanduser()), "bytes": None} for path in names]
        missing = next((row for row, p in enumerate(paths) if not Path(str(p["path"])).is_file()), None)
        if missing is not None:
            raise DataError(
                f'row {missing} of column "{column}" names {paths[missing]["path"]}, which is no file. Mend the path.'
            )
        return Dataset.from_dict({column: paths}).cast_column(column, Image(decode=False))
    return pictures.cast_column(column, Image(decode=False))


def _labels(data: Dataset, split: str, column: str, values: list[Any], class_names: tuple[str, ...]) -> Labels:
    """Labels as positions in `values`; -1 where a row is unlabelled."""
    feature = data.features[column]
    raw = data[column][:]
    if isinstance(feature, ClassLabel):
        labels = _class_labels(raw, split, column, feature, len(values))
        if values == list(range(len(values))):
            return labels
        # The training split has plain strings or numbers, so these labels mean what their names or numbers say.
        named = isinstance(values[0], str)
        raw = [None if label == UNLABELLED else feature.names[label] if named else int(label) for label in labels]
    elif isinstance(feature, Value) and "string" in feature.dtype:
        values = list(class_names)  # the training split may have a ClassLabel of these names
    index: dict[Any, int] = {value: position for position, value in enumerate(values)}
    if not values or not isinstance(values[0], str):
        index[UNLABELLED] = UNLABELLED
    index[None] = UNLABELLED
    labels = np.empty(len(raw), dtype=np.int64)
    for row, value in enumerate(raw):
        if value not in index:
            raise DataError(
                f'{split} row {row} has the class "{value}" in "{column}", which the training split lacks. Rename or remove it.'
            )
        labels[row] = index[value]
    return labels


def _class_labels(raw: list[int | None], split: str, column: str, feature: ClassLabel, num_classes: int) -> Labels:
    labels = np.array([UNLABELLED if value is None else value for value in raw], dtype=np.int64)
    wrong = np.flatnonzero((labels < UNLABELLED) | (labels >= feature.num_classes))
    if len(wrong):
        raise DataError(
            f'{split} row {wrong[0]} has the label {labels[wrong[0]]} in "{column}"; it must be from 0 to '
            f"{feature.num_classes - 1}, as there are {feature.num_classes} classes."
        )
    return labels


def _test_part(source: Source, parts: Parts, asked: str | None, seed: int) -> tuple[Part | None, str]:
    """The part to score and a note on the choice; None if it must be cut from the training split."""
    unlabelled: list[str] = []
    train_split = parts.train.name
    for name in [asked] if asked is not None else [n for n in TEST_SPLITS if n in source.splits and n != train_split]:
        part = _other_part(source, parts, name)
        if asked is not None or (part.labels != UNLABELLED).any():
            part = _all_labelled(part)
            return part, f'scored on split "{name}"' + (f" (unlabelled: {', '.join(unlabelled)})" if unlabelled else "")
        unlabelled.append(name)
    why = f"the split(s) {', '.join(unlabelled)} are unlabelled" if unlabelled else "the data set has no test split"
    return None, f"NOTE: {why}, so a stratified fifth of {train_split} (seed {seed}) is kept out of training and scored instead"


def _labelled_part(source: Source, parts: Parts, name: str) -> Part:
    return _all_labelled(_other_part(source, parts, name))


def _other_part(source: Source, parts: Parts, name: str) -> Part:
    """A split beside the training split, its labels in the order of the training split's classes."""
    train_split = parts.train.name
    if name == train_split:
        raise DataError(f'test_split and train_split are both "{name}": scores on training examples mean nothing.')
    split = pick_split(source, name, "test_split")
    part = _part(source, split, parts.image_column, parts.label_column, parts.values, parts.class_names)
    return replace(part, labels=_in_training_order(part.labels, source, train_split, name, parts.label_column))


def _all_labelled(part: Part) -> Part:
    if (part.labels == UNLABELLED).any():
        row = int(np.flatnonzero(part.labels == UNLABELLED)[0])
        raise DataError(f'split "{part.name}" can not be scored: row {row} has no label (-1). Name another split.')
    return part


def _in_training_order(labels: Labels, source: Source, train_split: str, split: str, column: str) -> Labels:
    """Labels of another split in the training split's order of class names."""
    train, other = source.splits[train_split].features[column], source.splits[split].features[column]
    if not (isinstance(train, ClassLabel) and isinstance(other, ClassLabel)) or train.names == other.names:
        return labels
    foreign = [name for name in other.names if name not in train.names]
    if foreign:
        raise DataError(
            f'split "{split}" has the class "{foreign[0]}", which {train_split} lacks{did_you_mean(foreign[0], train.names)}. '
            "Rename or remove it."
        )
    order = np.array([train.names.index(name) for name in other.names])
    return np.where(labels == UNLABELLED, UNLABELLED, order[labels])


def _hold_out(train: Part, fraction: float, *, seed: int) -> tuple[Part, Part]:
    """A stratified share of the training examples, and the others."""
    held = stratified_rows(train.labels, fraction, seed=seed)
    if not len(held):
        raise DataError(
            f"every class of {train.name} has a single example: none can be held out of training. Add examples, or name a "
            "labelled split with test_split."
        )
    return train.subset(held), train.subset(np.setdiff1d(np.arange(len(train)), held))


def _few_shot(train: Part, class_names: tuple[str, ...], examples_per_class: int, seed: int) -> Part:
    if examples_per_class < 1:
        raise DataError(f"examples_per_class is {examples_per_class}; it must be at least 1.")
    counts = np.bincount(train.labels, minlength=len(class_names))
    short = np.flatnonzero(counts < examples_per_class)
    if len(short):
        raise DataError(
            f'class "{class_names[short[0]]}" has only {counts[short[0]]} training example(s), but examples_per_class is '
            f"{examples_per_class}. Lower it, or remove the class."
        )
    return train.subset(few_shot_rows(train.labels, examples_per_class, seed=seed))
