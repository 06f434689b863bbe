"""What do the pictures themselves say: of their sizes by a sample, and of everything else when all are decoded?

Pictures pass by in batches and are forgotten; what stays of each is 16 bytes that tell it from others, and where it was.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL.Image import Image as Picture
from tqdm import tqdm

from bit_mixup.errors import DataError
from bit_mixup.images import decode, open_encoded, read_traits
from bit_mixup.sampling import Purpose, generator

if TYPE_CHECKING:
    from datasets import Dataset

SIZE_SAMPLE = 1000
BATCH = 100  # pictures whose bytes are in memory at a time
FEWEST_CLASSES = 2

Indices = npt.NDArray[np.int64]


class Pictures(Protocol):
    """Labelled pictures that are found by an index from 0, such as a `bit_mixup.data.Part`."""

    @property
    def name(self) -> str: ...

    @property
    def pictures(self) -> Dataset:
        """One column of the split's pictures, not decoded."""
        ...

    @property
    def rows(self) -> Indices:
        """Which rows of the split these are."""
        ...

    @property
    def labels(self) -> Any: ...

    def __len__(self) -> int: ...

    def encoded(self, indices: Sequence[int], /) -> list[dict[str, Any]]:
        """As they are stored; raises DataError for a damaged file."""
        ...

    def where(self, index: int, encoded: dict[str, Any], /) -> str:
        """How a message names one."""
        ...

    def subset(self, indices: Indices, /) -> Any:
        """Some of them."""
        ...


PicturesOf = TypeVar("PicturesOf", bound=Pictures)


def find_empty(part: Pictures) -> Indices:
    """Indices of pictures of no bytes, which shows without decoding any: from the table's offsets, or the size of the file."""
    import pyarrow.compute as pc  # comes with the `datasets` library, without which pictures are arrays and never come here

    empty = np.zeros(len(part.pictures), dtype=bool)
    row = 0
    for table in part.pictures.with_format("arrow").iter(batch_size=10_000):
        column = table.column(0).combine_chunks()
        lengths = pc.fill_null(pc.binary_length(pc.struct_field(column, "bytes")), -1).to_numpy(zero_copy_only=False)
        empty[row : row + len(lengths)] = lengths == 0
        missing = np.flatnonzero(lengths < 0)
        if len(missing):
            names = pc.struct_field(column, "path").take(missing).to_pylist()
            empty[row + missing] = [not name or _file_size(Path(name)) == 0 for name in names]
        row += len(lengths)
    return np.flatnonzero(empty[part.rows])


def refuse_empty(part: PicturesOf) -> PicturesOf:
    """The part, if each picture has bytes; raises DataError, which names those that have none."""
    empty = find_empty(part).tolist()
    if empty:
        names = [part.where(index, encoded) for index, encoded in zip(empty[:5], part.encoded(empty[:5]), strict=True)]
        more = f" and {len(empty) - 5:,} more" if len(empty) > 5 else ""
        raise DataError(
            f"{len(empty):,} picture(s) have no bytes: {', '.join(names)}{more}. Fetch them again, remove them, or leave them "
            "out with --corrupt-images quarantine."
        )
    return part


def _file_size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None  # of whatever kind it is: decoding will tell


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A picture that can not be decoded.

    Args:
        index: into the part.
        where: the file, or the row of the split.
        reason: what the decoder says.
    """

    index: int
    where: str
    reason: str


def decoded(part: Pictures, *, progress: str | None) -> Iterator[tuple[int, dict[str, Any], Picture | Unreadable]]:
    """Every picture of a part, as it is stored and decoded to RGB, in batches; `progress` heads a bar."""
    with tqdm(total=len(part), desc=progress, unit="picture", disable=progress is None, dynamic_ncols=True) as bar:
        for start in range(0, len(part), BATCH):
            indices = list(range(start, min(start + BATCH, len(part))))
            for index, encoded in zip(indices, _encoded(part, indices), strict=True):
                if isinstance(encoded, DataError):
                    yield index, {}, Unreadable(index=index, where=part.where(index, {}), reason=str(encoded))
                    continue
                try:
                    yield index, encoded, decode(encoded, where=part.where(index, encoded))
                except DataError as error:
                    yield index, encoded, Unreadable(index=index, where=part.where(index, encoded), reason=str(error))
            bar.update(len(indices))


def _encoded(part: Pictures, indices: Sequence[int]) -> Sequence[dict[str, Any] | DataError]:
    try:
        return part.encoded(indices)
    except DataError as error:  # of one of them: ask for each alone
        return [error] if len(indices) == 1 else [_encoded(part, [index])[0] for index in indices]


class Quarantine:
    """Leaves unreadable pictures out, and knows which.

    Args:
        progress: whether to show a bar.
    """

    def __init__(self, *, progress: bool) -> None:
        self.progress = progress
        self.left_out: list[dict[str, str]] = []

    def leave_out(self, part: PicturesOf) -> PicturesOf:
        """The readable pictures of a part; all are decoded to see which.

        Raises:
            DataError: fewer than two classes are left.
        """
        found = (picture for *_, picture in decoded(part, progress=f"reading {part.name}" if self.progress else None))
        unreadable = [picture for picture in found if isinstance(picture, Unreadable)]
        if not unreadable:
            return part
        self.left_out += [{"name": one.where, "reason": one.reason} for one in unreadable]
        kept: PicturesOf = part.subset(np.setdiff1d(np.arange(len(part)), [one.index for one in unreadable]))
        if not len(kept) or (isinstance(kept.labels, np.ndarray) and len(np.unique(kept.labels)) < FEWEST_CLASSES):
            raise DataError(
                f"{len(unreadable):,} of {len(part):,} pictures of {part.name} can not be decoded, and those that can are of "
                f"fewer than two classes. Mend the files; the first is {unreadable[0].where}."
            )
        return kept


def quarantine_note(left_out: Sequence[dict[str, str]]) -> str:
    """What a plan says of pictures that are left out."""
    first = left_out[0]["reason"]
    return f"NOTE: {len(left_out):,} unreadable picture(s) are left out, as asked; quarantine.json lists them. The first: {first}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """What decoding all pictures of some parts has shown.

    Args:
        pictures: looked at.
        unreadable: by part, those that can not be decoded.
        modes: how many pictures are stored in which of PIL's modes.
        turned: how many an EXIF orientation turns upright.
        sizes: how many have which width and height.
        twins: groups of indices (part, index) of pictures with the same pixels, two or more each.
    """

    pictures: int
    unreadable: dict[str, list[Unreadable]]
    modes: Counter[str]
    turned: int
    sizes: Counter[tuple[int, int]]
    twins: list[list[tuple[str, int]]]


def scan(parts: dict[str, Any], *, progress: bool) -> Scan:
    """Decodes every picture of some parts.

    Twins are found by a hash of decoded pixels, not of files: a copy that was saved again without loss, or with other EXIF tags,
    is the same to the model.
    """
    unreadable: dict[str, list[Unreadable]] = {}
    modes: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    turned, digests, places = 0, bytearray(), []
    for number, (name, part) in enumerate(parts.items()):
        readable = []
        for index, encoded, picture in decoded(part, progress=f"reading {name}" if progress else None):
            if isinstance(picture, Unreadable):
                unreadable.setdefault(name, []).append(picture)
                continue
            traits = read_traits(encoded)
            modes[traits.mode] += 1
            sizes[traits.size] += 1
            turned += traits.turned
            digests += hashlib.blake2b(repr(picture.size).encode() + picture.tobytes(), digest_size=16).digest()
            readable.append(index)
        places.append(np.stack([np.full(len(readable), number), np.array(readable, dtype=np.int64)], axis=1))
    names = list(parts)
    groups = _groups(np.frombuffer(bytes(digests), dtype="<u8").reshape(-1, 2))
    where = np.concatenate(places)
    return Scan(
        pictures=sum(map(len, parts.values())),
        unreadable=unreadable,
        modes=modes,
        turned=turned,
        sizes=sizes,
        twins=[[(names[part], int(index)) for part, index in where[group]] for group in groups],
    )


def _groups(digests: npt.NDArray[np.uint64]) -> list[Indices]:
    """Positions of equal rows (N, 2), for each row that is there twice or more."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    same = (digests[order[1:]] == digests[order[:-1]]).all(1)
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    bounds = pairwise([*starts.tolist(), len(order)])
    return sorted((np.sort(order[first:last]) for first, last in bounds if last - first > 1), key=lambda group: int(group[0]))


@dataclass(frozen=True, kw_only=True)
class SizeSummary:
    """Sizes of a seeded sample of pictures.

    Args:
        median_area: in square pixels.
        smallest: width and height of the smallest by area.
        largest: width and height of the largest by area.
        sampled: how many were looked at.
        small_share: share of them below 96 x 96 pixels.
        sizes: width and height of each.
    """

    median_area: float
    smallest: tuple[int, int]
    largest: tuple[int, int]
    sampled: int
    small_share: float
    sizes: tuple[tuple[int, int], ...]


def summarize_sizes(part: Pictures, *, small_area: int, seed: int) -> SizeSummary:
    """Reads the headers of at most 1,000 pictures of a part.

    Raises:
        DataError: one of them is not a picture.
    """
    indices = range(len(part))
    if len(part) > SIZE_SAMPLE:
        indices = np.sort(generator(seed, Purpose.SIZE_SAMPLE).permutation(len(part))[:SIZE_SAMPLE]).tolist()
    sizes = []
    for start in range(0, len(indices), 100):
        chunk = list(indices[start : start + 100])
        for index, encoded in zip(chunk, part.encoded(chunk), strict=True):
            try:
                with open_encoded(encoded) as image:
                    sizes.append(image.size)
            except MemoryError:
                raise
            except DataError as error:
                raise DataError(f"{part.where(index, encoded)}: {error}") from error
            except Exception as error:  # decoders raise whatever they like on broken files
                raise DataError(
                    f"{part.where(index, encoded)} can not be opened as a picture ({type(error).__name__}: {error}). "
                    "Mend or remove the file."
                ) from error
    areas = [width * height for width, height in sizes]
    return SizeSummary(
        median_area=float(np.median(areas)),
        smallest=sizes[int(np.argmin(areas))],
        largest=sizes[int(np.argmax(areas))],
        sampled=len(sizes),
        small_share=sum(area < small_area for area in areas) / len(areas),
        sizes=tuple(sizes),
    )
