"""What is in an archive of pictures, and may it be read?

Members are read from where they are; none is written to the disk under a name that the archive chose. All members are looked at
before the first is read, and one that no packer of pictures makes is reason to refuse the whole.
"""

import gzip
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from bit_mixup.errors import DataError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
# Encoded pictures hardly shrink, and bitmaps rarely more than twenty-fold; a bomb of zeros does so a thousand-fold.
LARGEST_RATIO = 200
ALWAYS_ALLOWED = 1 << 20  # bytes of a member that are never too many: a small bitmap of one colour shrinks well
ALWAYS_ALLOWED_IN_ALL = 1 << 26

Kind = Literal["file", "folder", "link", "device"]


@dataclass(frozen=True, kw_only=True)
class Member:
    """What an archive says of one of its members.

    Args:
        name: as it was packed.
        kind: of thing.
        size: in bytes, unpacked, as declared.
        packed: in bytes, in the archive; None where that is not known for each member.
        encrypted: whether a password is needed.
        sparse: whether holes are left out, so that the size says nothing of what is stored.
    """

    name: str
    kind: Kind
    size: int
    packed: int | None = None
    encrypted: bool = False
    sparse: bool = False

    @property
    def path(self) -> PurePosixPath:
        return PurePosixPath(self.name)


def is_archive(path: Path) -> bool:
    """Whether a file is named as an archive that can be read."""
    return path.name.lower().endswith(ARCHIVES)


def list_members(path: Path) -> tuple[list[PurePosixPath], set[PurePosixPath]]:
    """Files in the order of the archive, and folders.

    Raises:
        DataError: the archive is damaged, or a member escapes, links, is a device, encrypted, too large or there twice.
    """
    files: dict[PurePosixPath, None] = {}
    folders: set[PurePosixPath] = set()
    members = _zip_members(path) if path.suffix.lower() == ".zip" else _tar_members(path)
    for member in members:
        _check(member, path)
        if member.kind == "folder":
            folders.add(member.path)
        elif member.path in files:
            raise DataError(f'{path}: member "{member.path}" is there twice. Pack the archive anew.')
        else:
            files[member.path] = None
    folders.update(folder for file in files for folder in file.parents)
    return list(files), folders - {PurePosixPath()}


def read_members(path: Path, wanted: Container[PurePosixPath]) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Wanted files and their content, in the order of the archive; `list_members` comes first.

    Raises:
        DataError: a member is damaged.
    """
    reader = _read_zip if path.suffix.lower() == ".zip" else _read_tar
    yield from reader(path, wanted)


def _check(member: Member, path: Path) -> None:
    """Raises DataError for a member that may not be read."""
    where = f'{path}: member "{member.name}"'
    if re.match(r"[/\\]|[A-Za-z]:[/\\]", member.name) or ".." in re.split(r"[/\\]", member.name):
        raise DataError(f"{where} leads out of the archive. Do not trust it; pack the pictures anew.")
    if member.kind == "link":
        raise DataError(f"{where} is a link. Pack the archive anew with the files that links stand for (tar -h).")
    if member.kind == "device":
        raise DataError(f"{where} is a device, not a file. Do not trust the archive; pack the pictures anew.")
    if member.encrypted:
        raise DataError(f"{where} is encrypted. Pack the archive anew without a password.")
    if member.sparse:
        raise DataError(f"{where} is stored with holes, as no picture is. Pack the archive anew without --sparse.")
    if member.packed is not None and member.size > max(ALWAYS_ALLOWED, LARGEST_RATIO * member.packed):
        raise DataError(
            f"{where} is a compression bomb: {member.packed:,} bytes would become {member.size:,}, more than "
            f"{LARGEST_RATIO} times as many. Remove it."
        )


@contextmanager
def _damage_explained(path: Path, name: str | None = None) -> Iterator[None]:
    """What the libraries raise on damaged archives, as a DataError that names the member."""
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, NotImplementedError) as error:
        where = f'{path}: member "{name}"' if name else f"{path}"
        raise DataError(f"{where} is damaged ({type(error).__name__}: {error}). Fetch or pack the archive anew.") from error


def _zip_members(path: Path) -> Iterator[Member]:
    allowed = max(ALWAYS_ALLOWED_IN_ALL, LARGEST_RATIO * path.stat().st_size)
    with _damage_explained(path), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            allowed -= entry.file_size
            if allowed < 0:
                raise DataError(_too_much(path, entry.filename))
            mode = stat.S_IFMT(entry.external_attr >> 16)
            kinds: dict[int, Kind] = {stat.S_IFLNK: "link", 0: "file", stat.S_IFREG: "file", stat.S_IFDIR: "folder"}
            yield Member(
                name=entry.filename,
                kind="folder" if entry.is_dir() else kinds.get(mode, "device"),
                size=entry.file_size,
                packed=entry.compress_size,
                encrypted=bool(entry.flag_bits & 1),
            )


def _too_much(path: Path, name: str) -> str:
    return (
        f'{path}: with member "{name}" it is a compression bomb: what is unpacked until there is more than {LARGEST_RATIO} times '
        "the size of the archive. Do not trust it."
    )


def _read_zip(path: Path, wanted: Container[PurePosixPath]) -> Iterator[tuple[PurePosixPath, bytes]]:
    with _damage_explained(path), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if PurePosixPath(entry.filename) in wanted and not entry.is_dir():
                with _damage_explained(path, entry.filename):
                    content = archive.read(entry)  # never more than was declared; less, or other bytes, are damage
                yield PurePosixPath(entry.filename), content


class _Bounded:
    """A file that refuses to be read beyond a number of bytes: what a gzip file unpacks to is not known before."""

    def __init__(self, file: gzip.GzipFile | IO[bytes], path: Path) -> None:
        self.file, self.path, self.last = file, path, "(the first)"
        self.limit = max(ALWAYS_ALLOWED_IN_ALL, LARGEST_RATIO * path.stat().st_size)

    def read(self, count: int) -> bytes:
        self.check(self.file.tell() + count)
        return self.file.read(count)

    def seek(self, position: int) -> int:
        self.check(position)
        return self.file.seek(position)

    def tell(self) -> int:
        return self.file.tell()

    def check(self, position: int) -> None:
        """Raises DataError for a position beyond the limit."""
        if position > self.limit:
            raise DataError(_too_much(self.path, self.last))


@contextmanager
def _open_tar(path: Path) -> Iterator[tuple[tarfile.TarFile, _Bounded]]:
    with gzip.open(path) if path.suffix.lower() in (".gz", ".tgz") else path.open("rb") as file:
        bounded = _Bounded(file, path)
        with tarfile.open(fileobj=bounded, mode="r:") as archive:  # type: ignore[call-overload]
            yield archive, bounded


def _tar_members(path: Path) -> Iterator[Member]:
    with _damage_explained(path), _open_tar(path) as (archive, file):
        for entry in archive:
            file.last = entry.name
            file.check(entry.offset_data + (0 if entry.issparse() else entry.size))
            kind: Kind = "folder" if entry.isdir() else "file" if entry.isreg() else "link"
            if entry.isdev():
                kind = "device"
            yield Member(name=entry.name, kind=kind, size=entry.size, sparse=entry.issparse())
        # The library takes a damaged header, and the end of the file, for the end of the archive.
        file.seek(archive.offset)
        mark = file.read(tarfile.BLOCKSIZE)
        if len(mark) < tarfile.BLOCKSIZE or mark.strip(b"\0"):
            raise DataError(f'{path} is cut off or damaged behind member "{file.last}". Fetch or pack the archive anew.')
        while file.read(1 << 16):  # to the end, where gzip has its checksum
            pass


def _read_tar(path: Path, wanted: Container[PurePosixPath]) -> Iterator[tuple[PurePosixPath, bytes]]:
    with _damage_explained(path), _open_tar(path) as (archive, file):
        for entry in archive:
            file.last = entry.name
            if PurePosixPath(entry.name) in wanted and entry.isreg():
                content = archive.extractfile(entry)
                yield PurePosixPath(entry.name), content.read() if content else b""
