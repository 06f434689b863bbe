"""Which pictures and labels does the model get to see, and in what order?

Where examples come from is hidden behind a protocol: columns of the `datasets` library (`bit_mixup.data.Part`) or arrays in
memory (`ArrayImages`, which needs neither that library nor files). Torch is not imported: pictures leave as NumPy bytes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from bit_mixup.errors import DataError
from bit_mixup.images import Bytes3d, stack_pictures
from bit_mixup.sampling import Purpose, generator, row_at

MEAN_SAMPLE = 2_048  # pictures that the mean picture is taken of
Labels = npt.NDArray[Any]  # int64 (N,), or uint8 (N, K)
Batch = tuple[npt.NDArray[np.uint8], Labels]


@dataclass(frozen=True, eq=False)
class LabelSets:
    """Several labels a picture, kept as short as they are: a table of 0 and 1 for all of ImageNet-21k would take 300 GB.

    Args:
        values: the labels of all pictures, one after another.
        offsets: where those of each picture start, and where the last ones end, (N + 1,).
        num_classes: K.
    """

    values: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    num_classes: int

    @property
    def ndim(self) -> int:
        """2, as of the table that it stands for."""
        return 2

    def subset(self, indices: npt.NDArray[np.int64]) -> "LabelSets":
        """Those of some pictures, as short as they are."""
        lengths = np.diff(self.offsets)[indices]
        kept = [self.values[self.offsets[index] : self.offsets[index + 1]] for index in indices]
        values = np.concatenate([*kept, np.empty(0, dtype=np.int64)])
        return LabelSets(values, np.concatenate([[0], np.cumsum(lengths)]), self.num_classes)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, indices: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Rows of the table, (n, K) of 0 and 1."""
        rows = np.zeros((len(indices), self.num_classes), dtype=np.uint8)
        for row, index in enumerate(indices):
            rows[row, self.values[self.offsets[index] : self.offsets[index + 1]]] = 1
        return rows

    def tobytes(self) -> bytes:
        """For a fingerprint."""
        return self.offsets.astype("<i8").tobytes() + self.values.astype("<i8").tobytes()


class Examples(Protocol):
    """Labelled pictures that are found by an index from 0."""

    @property
    def labels(self) -> Any:
        """Asked for at a list of indices: (n,), a class for each; or (n, K) of 0 and 1 where a picture may have several."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], /) -> list[Image.Image]:
        """Decoded pictures, RGB; raises DataError for a broken one."""
        ...

    def ids(self, indices: Sequence[int], /) -> list[str]:
        """How people find these examples."""
        ...


class View(Protocol):
    """How a picture becomes the square of bytes that a model is shown, (3, crop, crop)."""

    def train(self, image: Image.Image, *, seed: int, position: int) -> Bytes3d:
        """For training: a function of the seed and of the position in the run."""
        ...

    def evaluate(self, image: Image.Image) -> Bytes3d:
        """For evaluation: nothing is random."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingStream:
    """All training examples of a run, laid end to end: a map-style data set whose index is the position in the run.

    What stands at a position (row, crop, flip) is a function of the seed and the position alone.
    """

    part: Examples
    view: View
    seed: int

    def row(self, position: int) -> int:
        """Index into the part of the example at a position."""
        return row_at(position, seed=self.seed, num_examples=len(self.part))

    def ids(self, positions: Sequence[int]) -> list[str]:
        """Where the examples at some positions are found: the file, or the row of the split."""
        return self.part.ids([self.row(position) for position in positions])

    def __getitems__(self, positions: Sequence[int]) -> Batch | DataError:
        """Pictures (N, 3, crop, crop) and labels (N,) at some positions; a broken picture comes back as the error to raise.

        (An exception raised in a worker process would reach the user wrapped in a traceback of that process.)
        """
        return self.load(positions, [self.row(position) for position in positions], [self.seed] * len(positions))

    def load(self, positions: Sequence[int], indices: Sequence[int], seeds: Sequence[int]) -> Batch | DataError:
        """The same of any indices into the part, cropped as some seeds say at these positions."""
        try:
            pictures = zip(positions, self.part.read(indices), seeds, strict=True)
            images = [self.view.train(picture, seed=seed, position=position) for position, picture, seed in pictures]
        except DataError as error:
            return error
        return stack_pictures(images), self.part.labels[list(indices)]


@dataclass(frozen=True, kw_only=True, eq=False)
class PartneredStream:
    """A stream that loads each example together with a partner from the whole training set.

    Which partner stands at a position, and how it is cropped, is a function of the seed and the position alone.

    Args:
        stream: gives the examples.
        candidates: for each index into the part, the indices among which its partner is drawn; one of them at least.
    """

    stream: TrainingStream
    candidates: Sequence[npt.NDArray[np.int64]]

    def ids(self, positions: Sequence[int]) -> list[str]:
        """Where the examples at some positions are found."""
        return self.stream.ids(positions)

    def partner(self, position: int) -> int:
        """Index into the part of the partner at a position."""
        among = self.candidates[self.stream.row(position)]
        return int(among[generator(self.stream.seed, Purpose.PARTNER_ROW, position).integers(len(among))])

    def __getitems__(self, positions: Sequence[int]) -> Batch | DataError:
        """Pictures (2 N, 3, crop, crop) and labels (2 N,): the examples, and behind them their partners."""
        own = self.stream.__getitems__(positions)
        if isinstance(own, DataError):
            return own
        seeds = [int(generator(self.stream.seed, Purpose.PARTNER_VIEW, position).integers(2**31)) for position in positions]
        partners = self.stream.load(positions, [self.partner(position) for position in positions], seeds)
        if isinstance(partners, DataError):
            return partners
        return np.concatenate([own[0], partners[0]]), np.concatenate([own[1], partners[1]])


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureStream:
    """A stream that gives features in the place of pictures: the same examples at the same positions.

    Args:
        stream: says which example stands where.
        features: of all examples of its part, (N, F) float32.
    """

    stream: TrainingStream
    features: npt.NDArray[np.float32]

    def ids(self, positions: Sequence[int]) -> list[str]:
        """Where the examples at some positions are found."""
        return self.stream.ids(positions)

    def __getitems__(self, positions: Sequence[int]) -> tuple[npt.NDArray[np.float32], Labels]:
        """Features (N, F) and labels (N,) at some positions."""
        rows = [self.stream.row(position) for position in positions]
        return self.features[rows], self.stream.part.labels[rows]


def same_class_candidates(labels: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """For each example the others of its class, or itself where it is the only one."""
    members = {label: np.flatnonzero(labels == label) for label in np.unique(labels).tolist()}
    others = ((index, members[label]) for index, label in enumerate(labels.tolist()))
    return [found[found != index] if len(found) > 1 else found for index, found in others]


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationView:
    """The examples of a part as they are scored: resized straight to the crop's edge, in order."""

    part: Examples
    view: View

    def __len__(self) -> int:
        return len(self.part)

    def __getitems__(self, indices: Sequence[int]) -> Batch | DataError:
        """Pictures (N, 3, crop, crop) and labels (N,); a broken picture comes back as the error to raise."""
        try:
            images = [self.view.evaluate(picture) for picture in self.part.read(indices)]
        except DataError as error:
            return error
        return stack_pictures(images), self.part.labels[list(indices)]


def mean_image(part: Examples, view: View, *, seed: int) -> npt.NDArray[np.float32]:
    """Mean picture (3, crop, crop) in [0, 1] of at most 2,048 examples, drawn by the seed, as evaluation sees them.

    Raises:
        DataError: one of them is broken.
    """
    indices = np.sort(generator(seed, Purpose.MEAN_IMAGE).permutation(len(part))[:MEAN_SAMPLE]).tolist()
    total: Any = 0
    for start in range(0, len(indices), 64):
        pictures = part.read(indices[start : start + 64])
        total = total + sum(view.evaluate(picture).astype(np.int64) for picture in pictures)  # whole numbers: exact in any order
    return np.asarray(total / (255 * len(indices)), dtype=np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayImages:
    """Labelled pictures in memory, all of one size.

    Args:
        images: (N, H, W, 3) or grey (N, H, W), uint8.
        labels: (N,) whole numbers from 0 to the number of classes less one; or (N, K) of 0 and 1, several classes a picture.
        class_names: in the order of the labels.

    Raises:
        DataError: shapes, types or ranges are others.
    """

    images: npt.NDArray[np.uint8]
    labels: Labels
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        shape, classes = self.images.shape, len(self.class_names)
        if self.images.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
            raise DataError(f"images are {self.images.dtype} of shape {shape}; expected uint8 of (N, H, W) or (N, H, W, 3).")
        if not len(self.images) or self.labels.shape[:1] != shape[:1]:
            raise DataError(f"there are {shape[0]} images, but labels of shape {self.labels.shape}; expected one for each.")
        if self.labels.ndim == 1:
            if not np.issubdtype(self.labels.dtype, np.integer) or self.labels.min() < 0 or self.labels.max() >= classes:
                raise DataError(f"labels must be whole numbers from 0 to {classes - 1}, one less than there are class names.")
        elif self.labels.shape[1:] != (classes,) or not np.isin(self.labels, (0, 1)).all():
            raise DataError(f"labels of several classes must be of shape (N, {classes}) and hold 0 and 1 alone.")
        object.__setattr__(self, "labels", self.labels.astype(np.int64 if self.labels.ndim == 1 else np.uint8, copy=False))

    @classmethod
    def load(cls, path: Path) -> "ArrayImages":
        """Reads an .npz file of the arrays `images`, `labels` and `class_names`.

        Raises:
            DataError: it can not be read, or lacks one of them.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in ("images", "labels", "class_names")}
        except Exception as error:  # what unpacks it raises whatever it likes on broken archives
            raise DataError(f"{path} can not be read as arrays of images, labels and class_names: {error}") from error
        names = tuple(str(name) for name in arrays["class_names"].reshape(-1).tolist())
        return cls(images=arrays["images"], labels=arrays["labels"], class_names=names)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        """A hash of everything, pixels too."""
        digest = hashlib.sha256(repr((self.class_names, self.images.shape)).encode() + self.labels.tobytes())
        digest.update(np.ascontiguousarray(self.images).tobytes())
        return digest.hexdigest()[:16]

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """The pictures at these indices, RGB."""
        return [Image.fromarray(self.images[index]).convert("RGB") for index in indices]

    def ids(self, indices: Sequence[int]) -> list[str]:
        """The rows at these indices."""
        return [f"row {index}" for index in indices]
