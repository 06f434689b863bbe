"""Which pictures is a trained model asked about?

Files, folders, globs, data sets, or pictures in memory. Those that can not be read are noted and do not stop the others. Torch is
not imported: pictures leave as NumPy bytes.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from bit_mixup.archives import is_archive
from bit_mixup.data import find_image_column, pick_split, undecoded_part
from bit_mixup.errors import DataError
from bit_mixup.images import EXTENSIONS, View, decode, to_rgb
from bit_mixup.sources import DATA_FILES, DIGITS, TEST_SPLITS, open_source, pictures_below


class Pictures(Protocol):
    """Pictures that are found by an index from 0."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], /) -> list[Image.Image]:
        """Decoded pictures, RGB; raises DataError for a broken one."""
        ...

    def ids(self, indices: Sequence[int], /) -> list[str]:
        """How people find these pictures."""
        ...


@dataclass(frozen=True)
class PictureFiles:
    """Pictures in files.

    Args:
        paths: of the files.
    """

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """Decoded pictures, RGB; raises DataError for a broken one."""
        return [decode({"path": str(self.paths[index]), "bytes": None}, where=str(self.paths[index])) for index in indices]

    def ids(self, indices: Sequence[int]) -> list[str]:
        """The paths."""
        return [str(self.paths[index]) for index in indices]


@dataclass(frozen=True, eq=False)
class PicturesInMemory:
    """Pictures of PIL, arrays (H, W, 3) or (H, W) of bytes, or paths of files, mixed at will.

    Args:
        pictures: of these kinds.
    """

    pictures: Sequence[Any]

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """Decoded pictures, RGB; raises DataError for one that is broken or of another kind."""
        return [self._one(index) for index in indices]

    def _one(self, index: int) -> Image.Image:
        picture = self.pictures[index]
        if isinstance(picture, str | Path):
            return decode({"path": str(picture), "bytes": None}, where=str(picture))
        if isinstance(picture, np.ndarray) and _holds_pixels(picture):
            return Image.fromarray(picture).convert("RGB")
        if isinstance(picture, Image.Image):
            try:
                return to_rgb(picture)
            except (OSError, SyntaxError, ValueError) as error:  # of a file that is read only now
                raise DataError(f"picture {index} can not be decoded: {error}. Mend or remove it.") from error
        what = f"an array {picture.shape} of {picture.dtype}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise DataError(
            f"picture {index} is {what}; expected a path, a picture of PIL, or an array (H, W, 3) or (H, W) of uint8."
        )

    def ids(self, indices: Sequence[int]) -> list[str]:
        """The path, or the place in the list."""
        return [str(self.pictures[i]) if isinstance(self.pictures[i], str | Path) else f"picture {i}" for i in indices]


def _holds_pixels(array: npt.NDArray[Any]) -> bool:
    return array.dtype == np.uint8 and array.size > 0 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3))


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadableView:
    """Pictures as they are scored, each with 1, or with 0 and black in the place of one that can not be read."""

    pictures: Pictures
    view: View

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, indices: Sequence[int]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Pictures (N, 3, crop, crop), and whether they could be read (N,)."""
        edge = self.view.crop_size
        images = np.zeros((len(indices), edge, edge, 3), dtype=np.uint8).transpose(0, 3, 1, 2)  # which lies channels last
        readable = np.ones(len(indices), dtype=np.int64)
        for place, index in enumerate(indices):
            try:
                images[place] = self.view.evaluate(self.pictures.read([index])[0])
            except DataError:
                readable[place] = 0
        return images, readable


def reason(pictures: Pictures, index: int) -> str:
    """Why a picture can not be read."""
    try:
        pictures.read([index])
    except DataError as error:
        return str(error)
    return "it could not be read a moment ago, but can be now"  # a disk that comes and goes


def find_pictures(names: Sequence[str], *, split: str | None = None, image_column: str | None = None) -> Pictures:
    """The pictures that some names stand for.

    Args:
        names: files, folders (all pictures below them, in the order of their names) and globs; or one data set, as of
            `bit_mixup.sources.open_source`: a data file, an archive, a folder without picture files, a hub id, or "digits".
        split: of a data set. None: the first of test, validation, ..., else the only or first one.
        image_column: of a data set, where it is not plain.

    Raises:
        DataError: a name stands for nothing, or for a data set beside other names; or an option of data sets is given for files.
    """
    if len(names) == 1 and _is_data_set(names[0]):
        return _part(names[0], split, image_column)
    for flag, value in (("split", split), ("image_column", image_column)):
        if value is not None:
            raise DataError(f'{flag} "{value}" belongs to a data set, but files were named. Leave it out.')
    paths: dict[Path, None] = {}  # each once, in the order of their naming
    for name in names:
        paths |= dict.fromkeys(_files(name))
    if not paths:
        raise DataError("no pictures were named. Give files, folders, a glob, or a data set.")
    return PictureFiles(tuple(paths))


def _is_data_set(name: str) -> bool:
    path = Path(name).expanduser()
    if path.is_file():
        return path.suffix.lower() in DATA_FILES or is_archive(path)
    if path.is_dir():
        return not pictures_below(path)
    return name == DIGITS or not (_matches(name) or path.suffix.lower() in EXTENSIONS or glob.has_magic(name))


def _part(name: str, split: str | None, image_column: str | None) -> Pictures:
    source = open_source(name)
    first = next((known for known in TEST_SPLITS if known in source.splits), next(iter(source.splits)))
    chosen = pick_split(source, split or first, "split")
    column = find_image_column(source.splits[chosen], image_column)
    return undecoded_part(source, chosen, column, np.zeros(len(source.splits[chosen]), dtype=np.int64))


def _files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        found = pictures_below(path)
        if not found:
            raise DataError(f"{path} holds no picture files ({', '.join(sorted(EXTENSIONS))}). A data set must be named alone.")
        return found
    if path.is_file():
        if path.suffix.lower() in DATA_FILES or is_archive(path):
            raise DataError(f"{path} is a data set, which must be named alone.")
        return [path]
    found = _matches(name)
    if not found:
        raise DataError(f"{name}: there is no such file or folder, and nothing that matches it. Mend the path.")
    return found


def _matches(name: str) -> list[Path]:
    """Picture files that a glob matches; ** goes through folders."""
    found = (Path(match) for match in sorted(glob.glob(str(Path(name).expanduser()), recursive=True)))
    return [path for path in found if path.is_file() and path.suffix.lower() in EXTENSIONS] if glob.has_magic(name) else []
