"""Is an archive read as the folder that was packed, and refused where a member is not what a picture would be?"""

import gzip
import io
import shutil
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from bit_mixup.cli import main
from bit_mixup.data import load_image_dataset
from bit_mixup.errors import DataError

NAMES = ("cat", "dog")


def png(number: int) -> bytes:
    """A picture like no other."""
    buffer = io.BytesIO()
    Pillow.fromarray(np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


CONTENT = {
    f"{split}/{name}/{index}.png": png(number)
    for number, (split, name, index) in enumerate(
        (split, name, index) for split, count in (("train", 12), ("test", 3)) for name in NAMES for index in range(count)
    )
}


def write_folder(root: Path) -> Path:
    for name, content in CONTENT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, members: dict[str, bytes], *, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def member(name: str, **values: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(info, key, value)
    return info


def write_tar(path: Path, members: dict[str, bytes], *extra: tarfile.TarInfo) -> Path:
    """A .tar, or a .tar.gz where it is named so; `extra` members have no content."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            archive.addfile(member(name, size=len(content)), io.BytesIO(content))
        for info in extra:
            archive.addfile(info)
    return path


def backwards() -> dict[str, bytes]:
    """In an order that no folder is listed in, with what packers leave beside pictures."""
    strangers = {
        "__MACOSX/train/cat/._0.png": b"what a Macintosh leaves",
        "train/cat/.hidden.png": b"-",
        "notes.txt": b"no picture",
    }
    return strangers | dict(reversed(CONTENT.items()))


PACKED: dict[str, Callable[[Path], Path]] = {
    "pictures.zip": lambda path: write_zip(path, backwards()),
    "pictures.tar": lambda path: write_tar(path, {f"./{name}": content for name, content in backwards().items()}),
    "pictures.tar.gz": lambda path: write_tar(path, {f"pets/{name}": content for name, content in CONTENT.items()}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("packed") / "pictures")


@pytest.mark.parametrize("name", PACKED)
def test_an_archive_is_the_folder_that_was_packed(name: str, folder: Path, tmp_path: Path) -> None:
    expected, found = load_image_dataset(str(folder)), load_image_dataset(str(PACKED[name](tmp_path / name)))
    assert found.class_names == expected.class_names == NAMES
    assert found.fingerprint == expected.fingerprint
    for own, reference, split in ((found.train, expected.train, "train"), (found.test, expected.test, "test")):
        assert own.labels.tolist() == reference.labels.tolist()
        assert [picture.tobytes() for picture in own.read(range(len(own)))] == [
            picture.tobytes() for picture in reference.read(range(len(reference)))
        ]
        names = [place.split(f"{split}/", 1)[1] for place in own.ids(range(len(own)))]
        assert names == [place.split(f"{split}/", 1)[1] for place in reference.ids(range(len(reference)))]
    assert found.train.ids([0])[0].startswith(str(tmp_path / name))


def test_archives_train_to_the_same_bits(folder: Path, tmp_path: Path, quick: dict[str, Any]) -> None:
    """Through the doors: the same weights from the folder, the zip and the tar."""
    options = {key: value for key, value in quick.items() if key not in ("dataset", "output_dir", "flip", "examples_per_class")}
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    weights = []
    for number, source in enumerate([folder, *(make(tmp_path / name) for name, make in PACKED.items())]):
        run = tmp_path / f"run{number}"
        main(["fine-tune", "--dataset", str(source), "--output-dir", str(run), *flags])
        weights.append((run / "model" / "model.safetensors").read_bytes())
    assert weights[1:] == weights[:1] * 3


def test_class_folders_alone_are_a_training_split(tmp_path: Path) -> None:
    inner = {name.removeprefix("train/"): content for name, content in CONTENT.items() if name.startswith("train/")}
    data = load_image_dataset(str(write_zip(tmp_path / "classes.zip", inner)))
    assert (data.class_names, data.train.name, data.test.name) == (NAMES, "train", "train")
    assert len(data.train) + len(data.test) == 24


def test_an_archive_that_changed_is_read_anew(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "pictures.zip", CONTENT)
    before = load_image_dataset(str(path)).train.read([0])[0].tobytes()
    write_zip(path, CONTENT | {"train/cat/0.png": png(99)})
    assert load_image_dataset(str(path)).train.read([0])[0].tobytes() != before


def zip_of_mode(name: str, mode: int) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        path = write_zip(root / "pictures.zip", CONTENT)
        info = zipfile.ZipInfo(name)
        info.create_system, info.external_attr = 3, mode << 16
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(info, "/etc/passwd")
        return path

    return make


def encrypted(root: Path) -> Path:
    """The flag of encryption on the first member, in its own header and in the archive's list."""
    path = write_zip(root / "pictures.zip", CONTENT)
    content = bytearray(path.read_bytes())
    listed = content.index(b"PK\x01\x02")
    content[6] |= 1
    content[listed + 8] |= 1
    path.write_bytes(bytes(content))
    return path


def changed(make: Callable[[Path], Path], change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """An archive whose bytes are changed after it was packed."""

    def changing(root: Path) -> Path:
        path = make(root)
        path.write_bytes(change(path.read_bytes()))
        return path

    return changing


def flipped(name: str) -> Callable[[bytes], bytes]:
    """One bit of the pixels of a member that is stored as it is."""

    def flip(content: bytes) -> bytes:
        place = content.index(CONTENT[name]) + 50
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    return flip


def lying_size(content: bytes) -> bytes:
    """The first member, 400 or so bytes unpacked, is declared to have 300 in both places."""
    listed = content.index(b"PK\x01\x02")
    changed = bytearray(content)
    struct.pack_into("<L", changed, 22, 300)
    struct.pack_into("<L", changed, listed + 24, 300)
    return bytes(changed)


def broken_header(content: bytes) -> bytes:
    """The checksum of the header in the middle of a tar is wrong: the library takes that for its end."""
    place = content.index(b"train/dog/3.png")
    return content[: place + 148] + b"0000000\0" + content[place + 156 :]


def bomb_in_a_header(root: Path) -> Path:
    """The extended header of a member, which the library reads as a whole, unpacks to 80 MB."""
    path = root / "pictures.tar.gz"
    header = tarfile.TarInfo("./PaxHeaders/x")
    header.type, header.size = tarfile.XHDTYPE, 80 << 20
    with gzip.open(path, "wb") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(80 << 20))
    return path


def tar(*extra: tarfile.TarInfo, name: str = "pictures.tar", members: dict[str, bytes] = CONTENT) -> Callable[[Path], Path]:
    return lambda root: write_tar(root / name, members, *extra)


def packed(members: dict[str, bytes], **options: Any) -> Callable[[Path], Path]:
    return lambda root: write_zip(root / "pictures.zip", members, **options)


PAX_HOLES = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "1000000", "GNU.sparse.numblocks": "1"}
STORED = packed(CONTENT, method=zipfile.ZIP_STORED)
REFUSED: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "zip, absolute path": (
        r'pictures.zip: member "/tmp/evil.png" leads out of the archive\. Do not trust it',
        packed(CONTENT | {"/tmp/evil.png": png(0)}),
    ),
    "zip, parent folder": (r'member "train/\.\./\.\./evil.png" leads out', packed(CONTENT | {"train/../../evil.png": png(0)})),
    "zip, drive of Windows": (r'member "C:\\evil.png" leads out', packed(CONTENT | {"C:\\evil.png": png(0)})),
    "zip, parent folder of Windows": (r'member "\.\.\\evil.png" leads out', packed(CONTENT | {"..\\evil.png": png(0)})),
    "tar, absolute path": (r'pictures.tar: member "/etc/evil.png" leads out', tar(member("/etc/evil.png"))),
    "tar, parent folder": (r'member "\.\./evil.png" leads out', tar(member("../evil.png"))),
    "zip, link": (r'member "train/cat/x.png" is a link.*tar -h', zip_of_mode("train/cat/x.png", stat.S_IFLNK | 0o777)),
    "tar, symbolic link": (
        r'member "train/cat/x.png" is a link',
        tar(member("train/cat/x.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    ),
    "tar, hard link": (
        r'member "train/cat/x.png" is a link',
        tar(member("train/cat/x.png", type=tarfile.LNKTYPE, linkname="train/cat/0.png")),
    ),
    "zip, device": (r'member "train/cat/x.png" is a device, not a file', zip_of_mode("train/cat/x.png", stat.S_IFCHR | 0o666)),
    "tar, device": (r'member "train/cat/x.png" is a device', tar(member("train/cat/x.png", type=tarfile.CHRTYPE))),
    "tar, pipe": (r'member "train/cat/x.png" is a device', tar(member("train/cat/x.png", type=tarfile.FIFOTYPE))),
    "zip, encrypted": (r'member "train/cat/0.png" is encrypted\. Pack the archive anew without a password', encrypted),
    "tar, holes": (
        r'member "train/cat/x.png" is stored with holes',
        tar(member("train/cat/x.png", pax_headers=PAX_HOLES)),
    ),
    "zip, bomb of one member": (
        r'member "train/cat/x.png" is a compression bomb: [\d,]+ bytes would become 8,388,608, more than 200 times',
        packed(CONTENT | {"train/cat/x.png": bytes(8 << 20)}),
    ),
    "zip, bomb of many members": (
        r'with member "train/cat/x\d+.png" it is a compression bomb.*more than 200 times the size of the archive',
        packed(CONTENT | {f"train/cat/x{number}.png": bytes(1 << 20) for number in range(70)}),
    ),
    "tar.gz, bomb of one member": (
        r'with member "train/cat/x.png" it is a compression bomb',
        tar(name="pictures.tar.gz", members=CONTENT | {"train/cat/x.png": bytes(80 << 20)}),
    ),
    "tar.gz, bomb in a header": (r"it is a compression bomb", bomb_in_a_header),
    "zip, no archive": (r"pictures.zip is damaged \(BadZipFile: ", changed(STORED, lambda content: b"")),
    "zip, cut off": (r"pictures.zip is damaged \(BadZipFile: ", changed(STORED, lambda content: content[:-40])),
    "zip, a bit flipped": (
        r'member "train/dog/3.png" is damaged \(BadZipFile: Bad CRC-32.*Fetch or pack the archive anew',
        changed(STORED, flipped("train/dog/3.png")),
    ),
    "zip, a size that lies": (r'member "train/cat/0.png" is damaged', changed(packed(CONTENT), lying_size)),
    "tar, no archive": (r"pictures.tar is damaged \(ReadError: ", changed(tar(), lambda content: b"")),
    "tar, cut off within a member": (r"pictures.tar is damaged \(ReadError: ", changed(tar(), lambda content: content[:5000])),
    "tar, cut off between members": (
        r'pictures.tar is cut off or damaged behind member "train/cat/3.png"',
        changed(tar(), lambda content: content[: content.index(b"train/cat/4.png")]),
    ),
    "tar, a header damaged": (
        r'pictures.tar is cut off or damaged behind member "train/dog/2.png"',
        changed(tar(), broken_header),
    ),
    "tar.gz, cut off": (r"pictures.tar.gz is damaged", changed(tar(name="pictures.tar.gz"), lambda content: content[:-900])),
    "tar.gz, wrong checksum": (
        r"pictures.tar.gz is damaged \(BadGzipFile: CRC check failed",
        changed(tar(name="pictures.tar.gz"), lambda content: content[:-8] + b"\0\0\0\0" + content[-4:]),
    ),
    "tar, a member twice": (
        r'member "train/cat/0.png" is there twice\. Pack the archive anew',
        tar(member("train/cat/0.png")),
    ),
    "zip, no pictures": (r"pictures.zip holds no pictures \(.bmp", packed({"train.csv": b"file,label\n"})),
    "zip, no class folders": (
        r"pictures.zip holds pictures, but no class folders",
        packed({"0.png": png(0), "1.png": png(1)}),
    ),
    "zip, an empty class": (r"pictures.zip/train/eel holds no pictures", packed(CONTENT | {"train/eel/": b""})),
    "zip, a class to score alone": (
        r'test/dogs is a class that .*pictures.zip/train lacks.*did you mean "dog"',
        packed(CONTENT | {"test/dogs/0.png": png(0)}),
    ),
    "zip, a picture that is none": (
        r"pictures.zip/train/cat/0.png \(train row 0\): not a picture in a format",
        packed(CONTENT | {"train/cat/0.png": b"no picture"}),
    ),
    "zip, an empty picture": (
        r"1 picture\(s\) have no bytes: .*pictures.zip/train/cat/0.png \(train row 0\)",
        packed(CONTENT | {"train/cat/0.png": b""}),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_archives_that_are_refused(kind: str, tmp_path: Path, tiny_bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message, make = REFUSED[kind]
    path = make(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit) as left:
        main(
            ["fine-tune", "--dataset", str(path), "--model", str(tiny_bit), "--output-dir", str(tmp_path / "run"), "--steps", "2"]
        )
    assert left.value.code == 2
    assert isinstance(left.value.__cause__, DataError)
    with pytest.raises(DataError, match=message):
        raise left.value.__cause__
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before, "nothing is unpacked or written"


def test_other_archives_are_named_as_such(tmp_path: Path) -> None:
    shutil.copy(write_zip(tmp_path / "pictures.zip", CONTENT), tmp_path / "pictures.7z")
    with pytest.raises(DataError, match=r'pictures.7z: .*archives in .zip, .tar, .tar.gz, .tgz, not ".7z"'):
        load_image_dataset(str(tmp_path / "pictures.7z"))
