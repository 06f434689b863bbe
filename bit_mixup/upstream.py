"""What is pre-trained on?

The same sources and columns as for fine-tuning, with three differences: a picture may have several labels (a column of lists),
nothing is held out, and arrays in memory or in an .npz file do as well, for machines without the `datasets` library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bit_mixup.errors import DataError, did_you_mean
from bit_mixup.examples import ArrayImages, Examples, Labels, LabelSets

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from bit_mixup.data import Part
    from bit_mixup.sources import Source

FEWEST_CLASSES = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Upstream:
    """Labelled pictures to pre-train on.

    Args:
        name: as asked for.
        class_names: in the order of the labels.
        train: examples to train on.
        test: examples to score; None where no split was named for it.
        multi_label: whether a picture may have several labels.
        fingerprint: a hash of classes, rows and labels.
        notes: what was decided on the way, for people to read.
        revision: commit hash on the hub; None for data of this machine.
    """

    name: str
    class_names: tuple[str, ...]
    train: Examples
    test: Examples | None
    multi_label: bool
    fingerprint: str
    notes: tuple[str, ...] = ()
    revision: str | None = None


def load_upstream(
    source: str | ArrayImages | Dataset | DatasetDict,
    *,
    config: str | None = None,
    revision: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    leave_out: Callable[[Part], Part] | None = None,
) -> Upstream:
    """Opens a data set to pre-train on.

    Args:
        source: arrays; an .npz file of them; or what `bit_mixup.sources.open_source` accepts.
        config: of a hub data set that has several.
        revision: branch, tag or commit of a hub data set.
        train_split: the split to train on.
        test_split: the split to score; None for none.
        image_column: None: the one column of pictures.
        label_column: None: the one column of classes. A column of lists gives several labels to a picture.
        leave_out: gives the examples of a split that may be used. None: all. Arrays are taken whole.

    Raises:
        DataError: something is missing, ambiguous or out of range; the message names it.
    """
    arrays = source if isinstance(source, ArrayImages) else None
    if isinstance(source, str) and Path(source).suffix.lower() == ".npz":
        arrays = ArrayImages.load(Path(source).expanduser())
    if arrays is None:
        return _from_columns(
            source,
            config,
            revision,
            _Columns(train=train_split, test=test_split, image=image_column, label=label_column),
            leave_out or (lambda part: part),
        )
    asked = {"test_split": test_split, "image_column": image_column, "label_column": label_column, "dataset_config": config}
    for name, value in asked.items():
        if value is not None:
            raise DataError(f'{name} "{value}" was given, but arrays have neither splits nor columns: leave it out.')
    _check_classes(arrays.labels, "labels")
    return Upstream(
        name=source if isinstance(source, str) else "arrays",
        class_names=arrays.class_names,
        train=arrays,
        test=None,
        multi_label=arrays.labels.ndim == 2,
        fingerprint=arrays.fingerprint,
        notes=("arrays in memory",),
    )


def _check_classes(labels: Labels | LabelSets, where: str) -> None:
    if isinstance(labels, LabelSets):
        present = len(np.unique(labels.values))
    else:
        present = int((labels.sum(0) > 0).sum()) if labels.ndim == 2 else len(np.unique(labels))
    if present < FEWEST_CLASSES:
        raise DataError(f"{where} holds fewer than two classes: there is nothing to learn.")


@dataclass(frozen=True, kw_only=True)
class _Columns:
    train: str
    test: str | None
    image: str | None
    label: str | None
    lists: dict[str, Any] = field(default_factory=dict)


def _from_columns(
    source: Any, config: str | None, revision: str | None, asked: _Columns, leave_out: Callable[[Part], Part]
) -> Upstream:
    from bit_mixup.data import open_parts
    from bit_mixup.sources import open_source

    opened = open_source(source, config=config, revision=revision)
    lists = _list_column(opened, asked)
    name = source if isinstance(source, str) else "memory"
    if lists is not None:
        return _from_lists(opened, asked, lists, name, leave_out)
    parts = open_parts(
        opened,
        train_split=asked.train,
        test_split=asked.test,
        image_column=asked.image,
        label_column=asked.label,
    )
    train, test = leave_out(parts.train), leave_out(parts.test) if parts.test else None
    return Upstream(
        name=name,
        class_names=parts.class_names,
        train=train,
        test=test,
        multi_label=False,
        fingerprint=_fingerprint(parts.class_names, opened.revision, train, test),
        notes=(f'pictures from column "{parts.image_column}", classes from "{parts.label_column}"',),
        revision=opened.revision,
    )


def _list_column(opened: Source, asked: _Columns) -> str | None:
    """The column of lists of labels, if the labels are in one: named classes come before plain strings and numbers."""
    from datasets import ClassLabel, LargeList, List

    if asked.train not in opened.splits:
        return None  # said where splits are picked
    features = opened.splits[asked.train].features
    lists = {name: feature.feature for name, feature in features.items() if isinstance(feature, List | LargeList)}
    if asked.label is not None:
        return asked.label if asked.label in lists else None
    named = [name for name, feature in features.items() if isinstance(lists.get(name, feature), ClassLabel)]
    found = named or [name for name, inner in lists.items() if _is_plain(inner)]
    if len(found) > 1 and any(name in lists for name in found):
        raise DataError(f"{len(found)} columns could hold the classes: {', '.join(found)}. Name one with label_column.")
    return found[0] if len(found) == 1 and found[0] in lists else None


def _is_plain(feature: Any) -> bool:
    """Whether a list's members are strings or whole numbers."""
    dtype = str(getattr(feature, "dtype", ""))
    return "string" in dtype or "int" in dtype


def _from_lists(opened: Source, asked: _Columns, column: str, name: str, leave_out: Callable[[Part], Part]) -> Upstream:
    from bit_mixup.data import find_image_column, pick_split, undecoded_part

    split = pick_split(opened, asked.train, "train_split")
    data = opened.splits[split]
    image_column = find_image_column(data, asked.image)
    class_names, index = _list_classes(data, column, split)
    parts: list[Part] = []
    for place in [split, *([pick_split(opened, asked.test, "test_split")] if asked.test else [])]:
        if parts and place == split:
            raise DataError(f'test_split and train_split are both "{place}": scores on training examples mean nothing.')
        rows = opened.splits[place]
        for name_of_column, flag in ((image_column, "image_column"), (column, "label_column")):
            if name_of_column not in rows.column_names:
                raise DataError(f'split "{place}" has no column "{name_of_column}", which {flag} names.')
        by_name = _index_by_name(rows.features[column], data.features[column], class_names)
        labels = _multi_hot(rows[column][:], index if by_name is None else by_name, f'"{column}" of {place}', class_names)
        parts.append(leave_out(undecoded_part(opened, place, image_column, labels)))
    train, test = parts[0], parts[1] if len(parts) > 1 else None
    _check_classes(train.labels, f'"{column}" of {split}')
    per_picture = len(train.labels.values) / len(train)
    return Upstream(
        name=name,
        class_names=class_names,
        train=train,
        test=test,
        multi_label=True,
        fingerprint=_fingerprint(class_names, opened.revision, train, test),
        notes=(
            f'pictures from column "{image_column}", several classes a picture from "{column}" ({per_picture:.3g} on average)',
        ),
        revision=opened.revision,
    )


def _list_classes(data: Dataset, column: str, split: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Names of the classes, and the index of each value that stands for one."""
    from datasets import ClassLabel

    inner = data.features[column].feature
    if isinstance(inner, ClassLabel):
        return tuple(inner.names), {value: value for value in range(len(inner.names))}
    values = {value for row in data[column][:] for value in row or ()} if _is_plain(inner) else set()
    if not values or None in values:
        raise DataError(f'the lists in "{column}" of {split} must hold strings or whole numbers, the same kind in all rows.')
    ordered = sorted(values)
    return tuple(str(value) for value in ordered), {value: position for position, value in enumerate(ordered)}


def _index_by_name(here: Any, in_training: Any, class_names: tuple[str, ...]) -> dict[Any, int] | None:
    """What the values of a split stand for, by their names; None where they mean what they mean in the training split."""
    from datasets import ClassLabel, LargeList, List

    if not isinstance(here, List | LargeList):
        raise DataError(f"the labels of the split to score are {here}, but those of the training split are lists.")
    trained = in_training.feature
    if here == in_training or (not isinstance(trained, ClassLabel) and "int" in trained.dtype):
        return None
    if isinstance(here.feature, ClassLabel):
        return {value: class_names.index(name) for value, name in enumerate(here.feature.names) if name in class_names}
    return {name: position for position, name in enumerate(class_names)}


def _multi_hot(lists: list[Any], index: dict[Any, int], where: str, class_names: tuple[str, ...]) -> LabelSets:
    """An empty or missing list is a picture without labels."""
    found: list[int] = []
    offsets = [0]
    for row, values in enumerate(lists):
        for value in values or ():
            if value not in index:
                raise DataError(
                    f"{where} row {row} has the label {value!r}{did_you_mean(str(value), class_names)}, which is unknown."
                )
        found += sorted({index[value] for value in values or ()})
        offsets.append(len(found))
    return LabelSets(np.array(found, dtype=np.int64), np.array(offsets, dtype=np.int64), len(index))


def _fingerprint(class_names: tuple[str, ...], revision: str | None, *parts: Part | None) -> str:
    digest = hashlib.sha256(repr((class_names, revision)).encode())
    for part in parts:
        if part is not None:
            digest.update(part.name.encode() + part.rows.astype("<i8").tobytes() + part.labels.tobytes())
    return digest.hexdigest()[:16]
