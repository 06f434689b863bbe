"""How does one train on more than the disk holds?

Training pictures pass by in the order of their files, each drawn from a buffer of those that come next, and are forgotten. What
is scored is kept whole. So scores and the rule's steps are exact; the order of examples is a function of the seed, but shuffled
within the buffer alone, and a run that is resumed begins another pass where an undisturbed one would have gone on.

Every process reads the same stream and decodes its own positions of it: the examples of a step do not depend on how many
processes share it. That costs the traffic of one stream for each.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset

from bit_mixup.data import UNLABELLED, ImageDataset, find_image_column, find_label_column, find_split, load_image_dataset
from bit_mixup.errors import DataError
from bit_mixup.examples import Batch, View
from bit_mixup.images import decode, stack_pictures
from bit_mixup.sampling import Purpose, generator
from bit_mixup.sources import TEST_SPLITS, StreamedSource, open_stream
from bit_mixup.weights import size_text

SAMPLE = 1_000  # of the first examples: sizes, class frequencies and mean picture are taken of these
REMEMBERED_STEPS = 100  # whose examples can still be named: losses are looked at in batches

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedSplit:
    """A training split that passes by.

    Args:
        source: of it.
        name: of the split.
        rows: pictures, not decoded, and labels; two columns.
        image_column: of the pictures.
        label_column: of the labels.
        num_classes: K.
        num_examples: of one pass.
        counted_by: who says so.
        sample_bytes: mean size of a picture as stored, by the sample.
    """

    source: StreamedSource
    name: str
    rows: IterableDataset
    image_column: str
    label_column: str
    num_classes: int
    num_examples: int
    counted_by: str
    sample_bytes: float

    def notes(self, buffer_size: int) -> list[str]:
        """What a plan says of exactness."""
        return [
            f"streamed: {self.num_examples:,} training examples (by {self.counted_by}), drawn from a buffer of {buffer_size:,} "
            f"pictures, about {size_text(int(buffer_size * self.sample_bytes))} in each process",
            "exact: what is scored (kept whole), the rule's steps, the same batches on any number of processes, the run as a "
            "function of its seed",
            "NOT exact: the order is shuffled within the buffer alone, and a resumed run begins another pass, so it does not end "
            "in the bits of an undisturbed one",
            f"sizes, class frequencies and the mean picture are those of the first {SAMPLE:,} examples",
        ]


def stream_image_dataset(
    source: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_examples: int | None = None,
) -> tuple[ImageDataset, StreamedSplit]:
    """Opens a data set whose training split is not to be kept.

    Args:
        source: parquet files, a folder of them, or the id of a data set on the hub.
        config: as in `bit_mixup.data.load_image_dataset`; so are the following.
        revision: of a hub data set.
        train_split: the split to train on.
        test_split: the split to score; None: the first labelled one of test, validation, ...
        image_column: of the pictures.
        label_column: of the classes, a ClassLabel: names of classes must be known before their pictures have passed.
        train_examples: how many there are, where it can not be found out.

    Returns:
        The data set, of whose training examples `train` holds but the first 1,000; and the stream of all.

    Raises:
        DataError: something is missing, ambiguous or out of range; the message names it.
    """
    opened = open_stream(source, config=config, revision=revision)
    stream = opened.splits[find_split(list(opened.splits), train_split, "train_split")]
    first = list(islice(opened.rows(stream), SAMPLE))
    if not first:
        raise DataError(f'split "{train_split}" holds no examples. Name another train_split.')
    sample = Dataset.from_list(first, features=stream.features)
    image_column = find_image_column(sample, image_column)
    label_column = find_label_column(sample, label_column, image_column)
    _check_classes(sample, label_column, train_split)
    columns = [image_column, label_column]
    name = _scored_split(opened, test_split, train_split, label_column)
    splits = DatasetDict({train_split: sample.select_columns(columns), name: opened.keep(name, columns)})
    data = load_image_dataset(
        splits, train_split=train_split, test_split=name, image_column=image_column, label_column=label_column
    )
    num_examples = train_examples or opened.count(train_split)
    if num_examples is None:
        raise DataError(
            f'data set "{source}": neither its card nor its files say how many examples {train_split} holds, which decides how '
            "long to train. Give --train-examples."
        )
    split = StreamedSplit(
        source=opened,
        name=train_split,
        rows=stream.select_columns(columns).cast_column(image_column, Image(decode=False)),
        image_column=image_column,
        label_column=label_column,
        num_classes=data.num_classes,
        num_examples=num_examples,
        counted_by="--train-examples" if train_examples else "its card or files",
        sample_bytes=float(np.mean([len((row[image_column] or {}).get("bytes") or b"") for row in first])),
    )
    return replace(data, name=source, revision=opened.revision), split


def _check_classes(sample: Dataset, column: str, split: str) -> None:
    if not isinstance(sample.features[column], ClassLabel):
        raise DataError(
            f'"{column}" of {split} holds {sample.features[column]}, whose classes would be known only when all examples have '
            "passed: streaming needs a ClassLabel. Save the data set with one, or leave --streaming out."
        )
    if len(sample) == SAMPLE and len(set(sample[column][:])) == 1:
        raise DataError(
            f"the first {SAMPLE:,} examples of {split} are of one class: the stream seems to be sorted by class, which a buffer "
            "does not undo. Save the data set in a shuffled order, or leave --streaming out."
        )


def _scored_split(opened: StreamedSource, asked: str | None, train_split: str, label_column: str) -> str:
    """The split to score: the one asked for, or the first one whose first example has a label."""
    if asked is not None:
        return find_split(list(opened.splits), asked, "test_split")
    for name in [name for name in TEST_SPLITS if name in opened.splits and name != train_split]:
        row = next(opened.rows(opened.splits[name]), {})
        if row.get(label_column) not in (None, UNLABELLED):
            return name
    raise DataError(
        f'data set "{opened.name}" has no labelled split to score ({", ".join(opened.splits)}), and none can be held out of a '
        "stream. Name one with --test-split, or leave --streaming out."
    )


@dataclass(frozen=True)
class _Example:
    encoded: dict[str, Any]
    label: int
    where: str


@dataclass(kw_only=True, eq=False)
class StreamedExamples:
    """All training examples of a run as they pass by: asked for by position, step after step.

    Which example stands at a position is a function of the seed, of the position, and of the step at which this start of the run
    began.

    Args:
        split: to train on.
        view: how pictures are resized and cropped.
        seed: of order and crops.
        batch_size: of a step, over all processes.
        buffer_size: pictures among which the next one is drawn.
    """

    split: StreamedSplit
    view: View
    seed: int
    batch_size: int
    buffer_size: int
    _step: int | None = None
    _batch: list[_Example] = field(default_factory=list)  # of that step, all processes' positions: memory may ask for it again
    _coming: Iterator[_Example] = field(default_factory=lambda: iter(()))
    _names: dict[int, list[str]] = field(default_factory=dict)  # of the last steps

    def ids(self, positions: Sequence[int]) -> list[str]:
        """How people find the examples at some positions, as long as these are not long past."""
        found = []
        for position in positions:
            step, offset = divmod(position, self.batch_size)
            found.append(self._names[step][offset] if step in self._names else f"position {position} of the stream")
        return found

    def __getitems__(self, positions: Sequence[int]) -> Batch | DataError:
        """Pictures (N, 3, crop, crop) and labels (N,) at some positions of one step; a fault comes back as the error to raise."""
        try:
            examples = [self._at(position) for position in positions]
            pictures = [decode(example.encoded, where=example.where) for example in examples]
            views = zip(pictures, positions, strict=True)
            images = [self.view.train(picture, seed=self.seed, position=position) for picture, position in views]
        except DataError as error:
            return error
        return stack_pictures(images), np.array([example.label for example in examples], dtype=np.int64)

    def _at(self, position: int) -> _Example:
        step, offset = divmod(position, self.batch_size)
        if step != self._step:
            if self._step is None or step != self._step + 1:
                self._coming = self._passes(step)
            self._batch, self._step = list(islice(self._coming, self.batch_size)), step
            self._names[step] = [example.where for example in self._batch]
            self._names.pop(step - REMEMBERED_STEPS, None)
        return self._batch[offset]

    def _passes(self, step: int) -> Iterator[_Example]:
        """Shuffled passes without end, numbered from the step at which this start of the run began."""
        split = self.split
        for number in count(step):
            seed = int(generator(self.seed, Purpose.STREAM_PASS, number).integers(2**31))
            seen = 0
            for row in split.source.rows(split.rows.shuffle(seed=seed, buffer_size=self.buffer_size)):
                encoded = row[split.image_column] or {"bytes": None, "path": None}
                where = f"example {seen:,} of pass {number} over {split.name}"
                where = f"{encoded['path']} ({where})" if encoded.get("path") else where
                yield _Example(encoded, self._label(row[split.label_column], where), where)
                seen += 1
            if seen != split.num_examples:
                _log.warning("a pass over %s had %d examples; the plan counted on %d", split.name, seen, split.num_examples)

    def _label(self, label: int | None, where: str) -> int:
        if label is None or not 0 <= label < self.split.num_classes:
            raise DataError(
                f'{where} has the label {label} in "{self.split.label_column}"; it must be from 0 to '
                f"{self.split.num_classes - 1}, as there are {self.split.num_classes} classes."
            )
        return label
