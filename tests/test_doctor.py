"""Does the doctor find what is wrong with a data set, and does a run leave out what can not be read and nothing else?"""

import io
import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markdown
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pillow

import bit_mixup
from bit_mixup.cli import main
from bit_mixup.data import load_image_dataset
from bit_mixup.doctor import exit_code, findings_table, visit
from bit_mixup.errors import CheckpointError, DataError, shown
from bit_mixup.evaluation import in_markdown
from bit_mixup.images import decode
from bit_mixup.scanning import Quarantine
from bit_mixup.upstream import load_upstream

NAMES = ("cat", "dog")
ESC, OVERRIDE = "\x1b[31m", "\u202e"  # red letters from here on; right to left from here on


def picture(number: int, size: tuple[int, int] = (12, 10)) -> Pillow.Image:
    """A picture like no other."""
    return Pillow.fromarray(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encode(image: Pillow.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNGS = [encode(picture(number)) for number in range(40)]


def rows(labels: list[Any], feature: Any = None, *, first: int = 0, pictures: list[bytes | None] | None = None) -> Dataset:
    """Labelled pictures in memory, each like no other unless they are given."""
    feature = feature or ClassLabel(names=list(NAMES))
    pictures = pictures or [PNGS[(first + number) % len(PNGS)] for number in range(len(labels))]
    encoded = [None if content is None else {"bytes": content, "path": None} for content in pictures]
    return Dataset.from_dict({"image": encoded, "label": labels}, features=Features({"image": Image(), "label": feature}))


TEN = [0, 1] * 5


def sound(**changes: Dataset) -> DatasetDict:
    """A small data set that nothing is wrong with, but for what is changed."""
    return DatasetDict({"train": rows(TEN * 2), "test": rows(TEN, first=20), **changes})


def check_up(source: Any, *, full: bool = False) -> dict[str, list[str]]:
    """What was found, as lines by severity."""
    findings = visit(source, preset="code", seed=0, full=full)
    lines: dict[str, list[str]] = {"error": [], "warning": [], "note": []}
    for finding in findings:
        lines[finding.severity].append(f"{finding.what} | {finding.where} | {finding.advice}")
    return lines


def test_a_sound_data_set_gets_notes_alone() -> None:
    found = check_up(sound(), full=True)
    assert found["error"] == found["warning"] == []
    notes = "\n".join(found["note"])
    assert 'pictures from column "image", classes from "label"' in notes
    assert "the rule (code) will resize to 160 and crop to 128 pixels | median area 120 square pixels" in notes
    assert "only 10 examples are scored: each is 10.0% of accuracy" in notes
    assert "shorter sides in pixels: 0-31: 30 | 30 pictures" in notes


def test_other_columns_are_named() -> None:
    source = sound()
    for name, split in source.items():
        labels = split["label"][:]
        wide = split.add_column("author", ["x", "y"] * (len(split) // 2)).to_dict()
        features = Features({**split.features, "author": Value("string"), "mask": Image()})
        source[name] = Dataset.from_dict(wide | {"mask": wide["image"]}, features=features)
        assert source[name]["label"][:] == labels
    with pytest.raises(DataError, match="2 columns could hold the pictures"):
        load_image_dataset(source)
    found = visit(source, preset="code", seed=0, full=False, image_column="image", label_column="label")
    assert "could hold pictures: mask; other columns that could hold classes: author" in found[0].what
    assert found[0].advice == "Name others with --image-column, --label-column."


def three(names: list[str]) -> ClassLabel:
    return ClassLabel(names=names)


ABC, CAB = three(["a", "b", "c"]), three(["c", "a", "b"])
TRIPLE = [0, 1, 2] * 6
EMPTY, CUT, NONSENSE = b"", PNGS[0][:-40], b"no picture"


def with_first(content: bytes | None) -> DatasetDict:
    """The first training picture replaced."""
    return sound(train=rows(TEN * 2, pictures=[content, *PNGS[1:20]]))


def header_of(pixels: str) -> bytes:
    """A picture that is a header alone."""
    return f"P5 {pixels} 255\n".encode()


def copied(label: int, *, split: str = "train") -> DatasetDict:
    """The last picture of a split is the first training one, saved anew as another file."""
    copy = encode(picture(0), "bmp")
    if split == "test":
        return sound(test=rows([*TEN[:-1], label], pictures=[*PNGS[20:29], copy]))
    return sound(train=rows([*(TEN * 2)[:-1], label], pictures=[*PNGS[:19], copy]))


def out_of_range(label: int) -> DatasetDict:
    """Arrow tables hold labels that ClassLabel does not know, and casting lets them pass."""
    wrong = rows([*TEN[:-1], label], Value("int64"))
    table = wrong.data.table.cast(rows(TEN).data.table.schema)
    return sound(train=Dataset(pa_table(table)))


def pa_table(table: pa.Table) -> Any:
    from datasets.table import InMemoryTable

    return InMemoryTable(table)


# Of each: whether all pictures are decoded, the severity, what is said, and the data set.
WRONG: dict[str, tuple[bool, str, str, Callable[[], DatasetDict]]] = {
    "negative label": (
        False,
        "error",
        'train row 9 has the label -7 in "label"; it must be from 0 to 1',
        lambda: out_of_range(-7),
    ),
    "too large a label": (
        False,
        "error",
        'train row 9 has the label 2 in "label"; it must be from 0 to 1',
        lambda: out_of_range(2),
    ),
    "one class": (False, "error", "holds fewer than two classes: there is nothing to learn", lambda: sound(train=rows([1] * 20))),
    "a name without examples": (
        False,
        "warning",
        "1 class(es) have a name but no example | c | Remove the names",
        lambda: sound(train=rows(TEN * 2, ABC), test=rows(TEN, ABC, first=20)),
    ),
    "scored, not trained": (
        False,
        "warning",
        "1 class(es) are scored but have no training example | c | Add some",
        lambda: sound(train=rows(TEN * 2, ABC), test=rows([0, 1, 2], ABC, first=20)),
    ),
    "trained, not scored": (
        False,
        "warning",
        "1 class(es) are trained but never scored | c | Add some to test",
        lambda: sound(train=rows(TRIPLE, ABC), test=rows(TEN, ABC, first=20)),
    ),
    "few of a class": (
        False,
        "warning",
        "1 class(es) have fewer than 5 training examples | dog | Add some",
        lambda: sound(train=rows([0] * 16 + [1] * 4)),
    ),
    "lopsided": (
        False,
        "warning",
        "the largest class has 12 times as many training examples as the smallest | cat: 60, dog: 5 | Look at balanced",
        lambda: sound(train=rows([0] * 60 + [1] * 5)),
    ),
    "another order": (
        False,
        "warning",
        'classes are in another order than in split train: label 0 is "c", not "a". Here they are matched by name | split test',
        lambda: sound(train=rows(TRIPLE, ABC), test=rows(TRIPLE[:6], CAB, first=20)),
    ),
    "control characters": (
        False,
        "warning",
        "1 class name(s) hold invisible or control characters",
        lambda: sound(train=rows(TEN * 2, three(["cat", f"{ESC}dog"])), test=rows(TEN, three(["cat", f"{ESC}dog"]), first=20)),
    ),
    "names alike": (
        False,
        "warning",
        "2 class names differ by nothing but case or spaces | Cat, cat  | Are they one class?",
        lambda: sound(train=rows(TEN * 2, three(["Cat", "cat "])), test=rows(TEN, three(["Cat", "cat "]), first=20)),
    ),
    "no bytes": (False, "error", "1 picture(s) of no bytes | train row 0 | Fetch them again", lambda: with_first(EMPTY)),
    "no picture at all": (False, "error", "1 picture(s) of no bytes | train row 0 | Fetch", lambda: with_first(None)),
    "a broken header": (False, "error", "train row 0: not a picture in a format that is read", lambda: with_first(NONSENSE)),
    "cut off": (True, "error", "1 training picture(s) can not be decoded; the first: train row 0 can", lambda: with_first(CUT)),
    "many pixels": (
        True,
        "error",
        "train row 0: a decompression bomb? Its header declares 100,000,000 pixels, the limit is 89,478,485",
        lambda: with_first(header_of("10000 10000")),
    ),
    "very many pixels": (
        True,
        "error",
        "train row 0: a decompression bomb? Image size (10000000000 pixels) exceeds limit",
        lambda: with_first(header_of("100000 100000")),
    ),
    "many pixels in a header": (
        False,
        "error",
        "train row 0: a decompression bomb? Its header declares 100,000,000 pixels",
        lambda: with_first(header_of("10000 10000")),
    ),
    "floating point": (
        True,
        "error",
        "train row 0: the picture holds floating-point values, whose range is unknown",
        lambda: with_first(encode(Pillow.new("F", (9, 9)), "tiff")),
    ),
    "scored and trained": (
        True,
        "warning",
        "1 picture(s) to score are there for training, too: scores on them mean nothing | train row 0 = test row 9 | Remove",
        lambda: copied(0, split="test"),
    ),
    "two labels": (
        True,
        "warning",
        "1 picture(s) are there twice or more with different labels | train row 0 = train row 19 | Decide",
        lambda: copied(1),
    ),
    "a copy": (
        True,
        "warning",
        "1 picture(s) repeat another one of the same split | train row 0 = train row 19 | Remove what was copied",
        lambda: copied(0),
    ),
    "CMYK": (True, "note", "converted to RGB: 1 CMYK", lambda: with_first(encode(picture(0).convert("CMYK"), "jpeg"))),
    "16 bits": (
        True,
        "note",
        "converted to RGB: 1 I;16",
        lambda: with_first(encode(Pillow.fromarray(np.arange(100, dtype=np.uint16).reshape(10, 10) * 600))),
    ),
    "transparent palette": (
        True,
        "note",
        "converted to RGB: 1 P with transparency",
        lambda: with_first(encode(picture(0).quantize(8), transparency=0)),
    ),
    "EXIF orientation": (True, "note", "1 picture(s) are turned upright", lambda: with_first(turned())),
}


def turned() -> bytes:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    return encode(picture(0), "jpeg", exif=exif)


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_found(kind: str) -> None:
    full, severity, message, make = WRONG[kind]
    found = check_up(make(), full=full)
    assert [line for line in found[severity] if message in line], found
    if severity != "error":
        assert found["error"] == []


def test_fast_checks_decode_no_picture() -> None:
    """A picture that is cut off behind its header passes them: nobody has looked there."""
    assert check_up(with_first(CUT))["error"] == []


def write_folder(root: Path, *, test: int = 3, **broken: bytes) -> Path:
    """Split folders of class folders; some files are replaced, by name with "_" for "/"."""
    number = 0
    for split, count in (("train", 12), ("test", test)):
        for name in NAMES:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                content = broken.get(f"{split}_{name}_{index}", PNGS[number % len(PNGS)])
                (root / split / name / f"{index}.png").write_bytes(content)
                number += 1
    return root


def doctor(*arguments: object) -> int:
    """The exit code of `bit-mixup doctor`."""
    try:
        main(["doctor", *map(str, arguments)])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_exit_codes_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, odd = write_folder(tmp_path / "good"), write_folder(tmp_path / "odd", train_cat_1=PNGS[0])
    bad = write_folder(tmp_path / "bad", train_dog_3=CUT, test_cat_0=EMPTY)
    file = tmp_path / "findings.json"
    assert [doctor(good, "--full"), doctor(odd), doctor(odd, "--full"), doctor("--dataset", bad, "--full", "--json", file)] == [
        0,
        0,
        1,
        2,
    ]
    printed = capsys.readouterr().out
    assert all(len(line) <= 130 for line in printed.splitlines())
    assert printed.count("severity  finding") == 4
    found = json.loads(file.read_text())
    assert found["dataset"] == str(bad)
    errors = [finding for finding in found["findings"] if finding["severity"] == "error"]
    assert {name for finding in errors for name in finding["names"]} == {
        f"{bad}/test/cat/0.png (test row 0)",
        f"{bad}/train/dog/3.png (train row 17)",
    }
    assert doctor(tmp_path / "nothing", "--json", file) == 2
    assert "there is no such file or folder" in file.read_text()  # the table breaks lines where they become too long


def test_the_digits_are_sound() -> None:
    assert exit_code(visit("digits", preset="code", seed=0, full=True)) == 0


def refused(quick: dict[str, Any], **options: Any) -> str:
    """The message of a run that was refused, before anything was written."""
    asked = {key: value for key, value in quick.items() if key != "examples_per_class"} | options
    with pytest.raises(DataError) as error:
        bit_mixup.transfer(**asked)
    assert not Path(asked["output_dir"]).exists()
    return str(error.value)


def test_a_run_stops_before_training_at_pictures_of_no_bytes(tmp_path: Path, quick: dict[str, Any]) -> None:
    folder = write_folder(tmp_path / "pictures", train_dog_3=EMPTY)
    assert f"1 picture(s) have no bytes: {folder}/train/dog/3.png (train row 17)" in refused(quick, dataset=str(folder))
    folder = write_folder(tmp_path / "scored", test_dog_2=EMPTY)
    assert f"{folder}/test/dog/2.png (test row 5)" in refused(quick, dataset=str(folder))


def test_pretraining_stops_there_too(tmp_path: Path, tiny_bit: Path) -> None:
    folder = write_folder(tmp_path / "pictures", train_dog_3=EMPTY)
    with pytest.raises(DataError, match=r"1 picture\(s\) have no bytes: .*train/dog/3.png"):
        bit_mixup.pretrain(dataset=str(folder), model=str(tiny_bit), steps=2, output_dir=tmp_path / "run")


def test_warnings_are_printed_and_recorded(quick: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    options = {key: value for key, value in quick.items() if key not in ("dataset", "examples_per_class")}
    source = sound(train=rows(TRIPLE, ABC), test=rows(TRIPLE[:6], CAB, first=20))
    result = bit_mixup.transfer(dataset=source, **options)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("doctor"))
    assert "warning: classes are in another order than in split train" in line
    record = json.loads((result.output_dir / "plan.json").read_text())
    assert "warning" in {finding["severity"] for finding in record["doctor"]}
    assert record["quarantined"] == 0
    assert "doctor" not in record["resolved"]


BROKEN = {"train_cat_4": CUT, "train_dog_0": EMPTY, "test_dog_1": NONSENSE}


def test_a_quarantined_run_is_the_run_without_these_pictures(tmp_path: Path, quick: dict[str, Any]) -> None:
    """The same rows in the same order, so the same bits; also resumed."""
    broken = write_folder(tmp_path / "broken", **BROKEN)
    clean = shutil.copytree(broken, tmp_path / "clean")
    for name in BROKEN:
        (clean / f"{name.replace('_', '/')}.png").unlink()
    options = {key: value for key, value in quick.items() if key not in ("dataset", "examples_per_class", "output_dir")}
    expected = bit_mixup.transfer(dataset=str(clean), output_dir=tmp_path / "a", **options)
    options |= {"dataset": str(broken), "corrupt_images": "quarantine", "output_dir": tmp_path / "b"}
    result = bit_mixup.transfer(**options)
    weights = [run.output_dir / "model" / "model.safetensors" for run in (expected, result)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert result.report == expected.report
    listed = json.loads((result.output_dir / "quarantine.json").read_text())
    places = {f"{broken}/{name.replace('_', '/')}.png" for name in BROKEN}
    assert {entry["name"].split(" (")[0] for entry in listed} == places
    assert all(re.search("can not be decoded as a picture|not a picture in a format", entry["reason"]) for entry in listed)
    assert json.loads((result.output_dir / "report.json").read_text())["quarantined"] == 3
    assert "3 unreadable picture(s) were left out" in (result.output_dir / "report.md").read_text()
    assert "3 unreadable picture(s) are left out, as asked" in result.plan.text()
    assert not (expected.output_dir / "quarantine.json").exists()
    shutil.rmtree(result.output_dir / "checkpoints" / "step_000006")
    resumed = bit_mixup.transfer(**options, resume=True)
    assert weights[0].read_bytes() == (resumed.output_dir / "model" / "model.safetensors").read_bytes()


def test_a_resumed_run_sees_the_set_that_it_began_with(tmp_path: Path, quick: dict[str, Any]) -> None:
    folder = write_folder(tmp_path / "pictures", **BROKEN)
    options = {key: value for key, value in quick.items() if key not in ("dataset", "examples_per_class")}
    options |= {"dataset": str(folder), "corrupt_images": "quarantine"}
    bit_mixup.transfer(**options)
    (folder / "train" / "cat" / "7.png").write_bytes(CUT)
    with pytest.raises(CheckpointError, match=r"(?s)another configuration .plan.json.*fingerprint"):
        bit_mixup.transfer(**options, resume=True)


def test_a_few_shot_draw_comes_after_the_quarantine() -> None:
    broken = with_first(CUT)
    quarantine = Quarantine(progress=False)
    data = load_image_dataset(broken, examples_per_class=9, leave_out=quarantine.leave_out)
    assert np.bincount(data.train.labels).tolist() == [9, 9]
    assert 0 not in data.train.rows
    assert [entry["name"] for entry in quarantine.left_out] == ["train row 0"]


def test_quarantine_does_not_empty_a_data_set(tmp_path: Path, quick: dict[str, Any]) -> None:
    cats = {f"train_cat_{index}": CUT for index in range(12)}
    folder = write_folder(tmp_path / "pictures", **cats)
    message = refused(quick, dataset=str(folder), corrupt_images="quarantine")
    assert message.startswith("12 of 24 pictures of train can not be decoded, and those that can are of fewer than two classes")
    assert "the first is " + str(folder / "train/cat/0.png") in message


def test_quarantine_keeps_several_labels_with_their_pictures() -> None:
    source = rows([[0], [0, 1], [], [1]], List(ClassLabel(names=list(NAMES))), pictures=[PNGS[0], PNGS[1], CUT, PNGS[3]])
    quarantine = Quarantine(progress=False)
    data = load_upstream(DatasetDict(train=source), leave_out=quarantine.leave_out)
    assert data.train.labels[[0, 1, 2]].tolist() == [[1, 0], [1, 1], [0, 1]]
    assert len(quarantine.left_out) == 1


def test_a_damaged_table_is_quarantined_row_by_row(tmp_path: Path) -> None:
    names = pa.array([b"a.png", b"\xff.png", b"c.png", b"d.png"] * 6).view(pa.string())
    pictures = pa.StructArray.from_arrays([pa.array(PNGS[:24]), names], names=["bytes", "path"])
    pq.write_table(pa.table({"image": pictures, "label": ["a", "b", "a", "b"] * 6}), tmp_path / "rows.parquet")
    quarantine = Quarantine(progress=False)
    data = load_image_dataset(str(tmp_path / "rows.parquet"), leave_out=quarantine.leave_out)
    assert len(data.train) + len(data.test) == 18
    assert {entry["name"] for entry in quarantine.left_out} == {f"train row {row}" for row in range(1, 24, 4)}


@contextmanager
def short_of_memory(room: int) -> Iterator[None]:
    """This process may take so many bytes more, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_machine_out_of_memory_is_no_corrupt_picture() -> None:
    content = encode(Pillow.new("RGB", (9000, 9000)))
    with short_of_memory(100 << 20), pytest.raises(MemoryError):
        decode({"bytes": content, "path": None}, where="train row 0")


HOSTILE = {
    "colours": (f"{ESC}cat", r"\x1b[31mcat"),
    "a line of its own": ("cat\nbit-mixup: all is well", r"cat\nbit-mixup: all is well"),
    "over the line": ("cat\rdog", r"cat\rdog"),
    "right to left": (f"cat{OVERRIDE}gnp.exe", r"cat\u202egnp.exe"),
    "isolates": ("\u2066cat\u2069", r"\u2066cat\u2069"),
    "C1 control": ("\x9b31mcat", r"\x9b31mcat"),
    "invisible": ("c\u200bat", r"c\u200bat"),
    "a bell and a delete": ("\x07cat\x7f", r"\x07cat\x7f"),
    "line separator": ("cat\u2028dog", r"cat\u2028dog"),
    "plain": ("Sankt-Gallen ü 猫 🐈", "Sankt-Gallen ü 猫 🐈"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_names_can_not_steer_a_terminal(kind: str) -> None:
    name, escaped = HOSTILE[kind]
    assert shown(name) == shown(shown(name)) == escaped
    assert str(DataError(f'class "{name}"')) == f'class "{escaped}"'
    assert str(CheckpointError("a\nb")) == "a\nb", "messages of ours that list something keep their lines"


class Cells(HTMLParser):
    """The text of a table's cells, and the tags in them."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag == "td":
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags[-1] == "td":
            self.texts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")


MARKDOWN = ["a|b", "`rm`", "<img src=x onerror=alert(1)>", "[x](http://evil)", "![x](y)", "https://evil.org", "www.evil.org",
            "**b**", "a\\|b", "\\", "&lt;b&gt;", "a\n\n# b", "~~x~~", "a\tb", "_x_", "golden_retriever", f"{ESC}x"]  # fmt: skip


@pytest.mark.parametrize("name", MARKDOWN)
def test_names_are_text_in_markdown(name: str) -> None:
    """Rendered by an independent reader of Markdown, a cell of a table gives the name back, and nothing but text."""
    text = f"| name | value |\n|---|---|\n| {in_markdown(name)} | 1 |\n"
    cells = Cells()
    cells.feed(markdown.markdown(text, extensions=["tables"]))
    assert cells.texts == [shown(name), "1"]
    assert cells.tags[cells.tags.index("td") :] == ["td", "/td", "td", "/td", "/tr", "/tbody", "/table"]
    assert "://" not in text, "other readers make links of these"
    assert "www." not in text


def test_a_run_with_hostile_names_shows_none_of_them(
    tmp_path: Path, quick: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Class folders, the plan, the report and the model's own list of names, through all of a run."""
    hostile = [f"{ESC}c|at`<b>", f"dog{OVERRIDE}\n[x](http://evil)".replace("/", "\u2215")]
    kind = ClassLabel(names=hostile)
    source = DatasetDict(train=rows([0] * 16 + [1] * 4, kind), test=rows(TEN, kind, first=20))
    options = {key: value for key, value in quick.items() if key not in ("dataset", "examples_per_class")}
    result = bit_mixup.transfer(dataset=source, **options)
    printed, report = capsys.readouterr().out, (result.output_dir / "report.md").read_text()
    for text in (printed, report, findings_table(visit(source, preset="code", seed=0, full=False))):
        assert "\x1b" not in text
        assert OVERRIDE not in text
        assert all(letter.isprintable() for line in text.split("\n") for letter in line)
    assert "dog\\u202e" in printed
    cells = Cells()
    cells.feed(markdown.markdown(report, extensions=["tables"]))
    assert [shown(name) in cells.texts for name in hostile] == [True, True]
    assert {tag.strip("/") for tag in cells.tags} == {"h1", "table", "thead", "tbody", "tr", "th", "td"}
    saved = json.loads((result.output_dir / "model" / "config.json").read_text())
    assert saved["label_names"] == hostile, "files for machines hold the names as they are"
