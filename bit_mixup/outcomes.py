"""What did a model say about each labelled example?

A run writes it as a table, so that two runs can be compared example by example, and so that people can look at the mistakes.
"""

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from bit_mixup.errors import CheckpointError
from bit_mixup.storage import write_text

COLUMNS = ("id", "digest", "label", "predicted", "confidence", "nll")
READ_AT_ONCE = 256  # encoded pictures

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]


class EncodedExamples(Protocol):
    """Labelled pictures as they are stored."""

    def __len__(self) -> int: ...

    def encoded(self, indices: Sequence[int], /) -> list[dict[str, Any]]:
        """{"bytes": ..., "path": ...} of each."""
        ...

    def where(self, index: int, encoded: dict[str, Any], /) -> str:
        """How people find it."""
        ...

    def read(self, indices: Sequence[int], /) -> list[Image.Image]:
        """Decoded pictures, RGB; raises DataError for a broken one."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcomes:
    """Predictions for N labelled examples.

    Args:
        class_names: in the order of the labels.
        ids: how people find each example.
        digests: of each encoded picture: the first 16 hexadecimal digits of its SHA-256.
        labels: (N,).
        predicted: (N,).
        confidence: probability of the predicted class, (N,).
        nll: negative log-likelihood of the label in nats, (N,).
    """

    class_names: tuple[str, ...]
    ids: list[str]
    digests: list[str]
    labels: Whole
    predicted: Whole
    confidence: Floats
    nll: Floats

    @classmethod
    def of(cls, examples: EncodedExamples, labels: Whole, log_probs: Floats, class_names: Sequence[str]) -> "Outcomes":
        """What some log-probabilities (N, K) say about examples."""
        ids, digests = zip(*_named(examples), strict=True) if len(examples) else ((), ())
        predicted = log_probs.argmax(1)
        rows = np.arange(len(labels))
        return cls(
            class_names=tuple(class_names),
            ids=list(ids),
            digests=list(digests),
            labels=labels,
            predicted=predicted,
            confidence=np.exp(log_probs[rows, predicted]),
            nll=-log_probs[rows, labels],
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether each prediction is right, (N,)."""
        return np.equal(self.predicted, self.labels)

    def confusion(self) -> Whole:
        """How often the class of a row was predicted as the class of a column, (K, K)."""
        counts = np.zeros((len(self.class_names), len(self.class_names)), dtype=np.int64)
        np.add.at(counts, (self.labels, self.predicted), 1)
        return counts

    def surest_mistakes(self, count: int) -> list[int]:
        """Indices of the wrong predictions of highest confidence, the surest first."""
        wrong = np.flatnonzero(~self.correct)
        return [int(index) for index in wrong[np.argsort(-self.confidence[wrong], kind="stable")][:count]]

    def least_sure_hits(self, count: int) -> list[int]:
        """Indices of the right predictions of lowest confidence, the least sure first."""
        right = np.flatnonzero(self.correct)
        return [int(index) for index in right[np.argsort(self.confidence[right], kind="stable")][:count]]

    def save(self, path: Path) -> None:
        """Writes a .csv; numbers keep all their digits."""
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(COLUMNS)
        names = self.class_names
        numbers = zip(self.labels.tolist(), self.predicted.tolist(), self.confidence.tolist(), self.nll.tolist(), strict=True)
        for name, digest, (label, predicted, confidence, nll) in zip(self.ids, self.digests, numbers, strict=True):
            rows.writerow([name, digest, names[label], names[predicted], repr(confidence), repr(nll)])
        write_text(path, table.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Outcomes":
        """Reads what `save` wrote. Classes are those that occur, in the order of their names.

        Raises:
            CheckpointError: it can not be read as such a table; the message names the line.
        """
        try:
            with path.open(encoding="utf-8", newline="") as file:
                lines = list(csv.reader(file))
        except (OSError, ValueError, csv.Error) as error:
            raise CheckpointError(f"{path} can not be read: {error}. Start the run or the evaluation anew.") from error
        if not lines or tuple(lines[0]) != COLUMNS:
            raise CheckpointError(f"{path} is no table of predictions; its first line must be {','.join(COLUMNS)}.")
        wrong = next((place for place, line in enumerate(lines[1:], start=2) if not _whole(line)), None)
        if wrong is not None:
            raise CheckpointError(f"{path}, line {wrong}: expected {len(COLUMNS)} cells, the last two of them numbers.")
        ids, digests, labels, predicted, confidence, nll = zip(*lines[1:], strict=True) if lines[1:] else [()] * len(COLUMNS)
        names = tuple(sorted({*labels, *predicted}))
        index = {name: place for place, name in enumerate(names)}
        return cls(
            class_names=names,
            ids=list(ids),
            digests=list(digests),
            labels=np.array([index[name] for name in labels], dtype=np.int64),
            predicted=np.array([index[name] for name in predicted], dtype=np.int64),
            confidence=np.array(confidence, dtype=np.float64),
            nll=np.array(nll, dtype=np.float64),
        )


def _whole(line: list[str]) -> bool:
    try:
        return len(line) == len(COLUMNS) and float(line[4]) >= 0 and float(line[5]) >= -1e-9
    except ValueError:
        return False


def _named(examples: EncodedExamples) -> Iterator[tuple[str, str]]:
    """Name and digest of each example."""
    for start in range(0, len(examples), READ_AT_ONCE):
        indices = range(start, min(start + READ_AT_ONCE, len(examples)))
        for index, encoded in zip(indices, examples.encoded(indices), strict=True):
            content = encoded["bytes"] if encoded.get("bytes") is not None else Path(encoded["path"]).read_bytes()
            yield examples.where(index, encoded), hashlib.sha256(content).hexdigest()[:16]
