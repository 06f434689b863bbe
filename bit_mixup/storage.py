"""How does something reach the disk whole or not at all?

Everything is written beside its place under a temporary name, flushed to the device, and renamed: after a crash at any moment
the place holds the old content or the new, never a part.
"""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bit_mixup.errors import CheckpointError

TEMPORARY_PREFIX = ".writing-"
ASIDE_PREFIX = f"{TEMPORARY_PREFIX}old-"  # a folder can not be replaced in one go: the old one waits here for a moment


_REASONS = {
    errno.ENOSPC: "the disk is full. Make room",
    errno.EDQUOT: "your share of the disk is used up. Make room",
    errno.EFBIG: "it would be larger than a file may be here (ulimit -f). Raise the limit",
    errno.ENOENT: "its folder is gone. Bring the disk back, or put the folder where it was",
    errno.EROFS: "the disk is read-only. Make it writable",
    errno.EACCES: "you may not write there. Change its permissions",
    errno.EPERM: "you may not write there. Change its permissions",
    errno.ENOTDIR: "a part of the path is a file, not a folder. Move it away",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Explains what keeps a file or folder from being written.

    Raises:
        CheckpointError: the operating system refused; the message names the path, the reason and the remedy.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors passes the system's error on as text
        found = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        reason = _REASONS.get(number or 0, f"{error}. Mend that")
        raise CheckpointError(
            f"{path} can not be written: {reason}, then go on with --resume; or choose another --output-dir. "
            "What was written before is whole."
        ) from error


def _flush(path: Path) -> None:
    """Waits until a file's bytes, or a folder's list of names, are on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically, making its folder if need be."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically, making its folder if need be."""
    temporary = path.parent / f"{TEMPORARY_PREFIX}{path.name}"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            _flush(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically. Keys keep their order; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON can hold them: paths as text, and infinity, which it lacks, as "inf"."""
    return {name: str(value) if isinstance(value, Path) or value == math.inf else value for name, value in values.items()}


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        CheckpointError: it is missing or not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can not be read as JSON: {error}") from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill; it takes the place of `path` when the block ends well, and vanishes when it does not."""
    temporary = path.parent / f"{TEMPORARY_PREFIX}{path.name}"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if not file.is_symlink():  # it is a name in its folder; what it points to may be elsewhere, or nowhere
                    _flush(file)
            _flush(temporary)
            aside = path.parent / f"{ASIDE_PREFIX}{path.name}"
            if path.exists():
                os.rename(path, aside)
            os.rename(temporary, path)
            _flush(path.parent)
            shutil.rmtree(aside, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove_folder(path: Path) -> None:
    """Removes a folder, if there is one: after a crash at any moment all of it is there or none. Of a link, the link."""
    if path.is_symlink():
        path.unlink()
    if not path.is_dir():
        return
    temporary = path.parent / f"{TEMPORARY_PREFIX}{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    os.rename(path, temporary)
    shutil.rmtree(temporary)


def remove_leftovers(folder: Path) -> None:
    """Removes what an interrupted write left in a folder, if there is such a folder."""
    for path in folder.glob(f"{ASIDE_PREFIX}*"):
        place = folder / path.name.removeprefix(ASIDE_PREFIX)
        if not place.exists():
            os.rename(path, place)
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
