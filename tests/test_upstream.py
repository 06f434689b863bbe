"""Does the upstream recipe keep numbers out, take only open licences, and write what it says?"""

import json
import re
import unicodedata
from pathlib import Path

import build_upstream as upstream
import datasets
import numpy as np
import pytest

SHIPPED = Path(upstream.__file__).parent.parent / "bit_mixup" / "bundled" / "classes.json"
GLYPHS, PICTURES, HELD_OUT = 4654, 4355, 50  # trained classes of the shipped weights, and held-out ones of each kind


@pytest.mark.parametrize("char", "AzÆŋΩжאकあ한ꀀ")
def test_letters_are_classes(char: str) -> None:
    assert upstream.is_class(char)


NOT_LETTERS = [0x37, 0x663, 0x2163, 0x3007, 0x3021, 0x3038, 0x2186, 0xBD, 0x4E00, 0x1BB, 0x1BC, 0x1BD, 0xE9, 0x2B, 0xE000]


@pytest.mark.parametrize("char", map(chr, NOT_LETTERS))
def test_numbers_and_composites_are_not(char: str) -> None:
    assert not upstream.is_class(char)


def test_icon_names_lose_style_and_size() -> None:
    fluent = upstream.icon_classes(["home-24-regular", "home-24-filled", "home-16-light", "traffic-light-20-filled"])
    assert {stem for stem, _ in fluent.values()} == {"home", "traffic-light"}
    assert upstream.icon_classes(["home-outline"]) == {"home-outline": ("home", "outline")}
    names = ["bell", "bell-o", "bell-light", "traffic-light", "sharp-object"]
    stems = {name: stem for name, (stem, _) in upstream.icon_classes(names).items()}
    assert stems == {name: name for name in names} | {"bell-o": "bell", "bell-light": "bell"}
    assert upstream.icon_classes(["baseline-home"], {"baseline", "round"}) == {"baseline-home": ("home", "baseline")}


@pytest.mark.parametrize(
    "name",
    """numeric-1 looks-one bell-2 counter clock-outline calendar-fill one-oclock list-numbers hundred-points input-numbers dice
    half-star hand-medium-dark-skin-tone sort-ascending keycap-asterisk x repeat-once road-sign skip-back""".split(),
)
def test_names_of_numbers_and_of_what_shows_digits_are_dropped(name: str) -> None:
    assert upstream.icon_classes([name]) == {}


def test_the_words_are_whole() -> None:
    for name in ("bone", "stone", "tent", "weightless", "phone", "flag-ad", "honeycomb", "datebase"):
        assert upstream.is_picture(name)


@pytest.mark.parametrize("licence", ["CC-BY-SA-4.0", "CC-BY-NC-SA-4.0", "GPL-3.0", "MPL-2.0", "none", ""])
def test_other_licences_are_refused(licence: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(f'some-icons@1 is licensed "{licence}"')):
        upstream.check_licence("some-icons@1", licence)
    upstream.check_licence("some-icons@1", "CC-BY-4.0")


def test_every_font_licence_can_be_looked_for() -> None:
    assert set(upstream.FONT_PACKAGES) == set(upstream.MARKS)


def test_svg_drawings_keep_aspect_and_margin() -> None:
    bar = {"body": '<path fill="currentColor" d="M4 10h16v4H4z"/>', "width": 24, "height": 24}
    pixels = upstream.draw_svg(bar)
    assert pixels is not None
    assert pixels.shape == (48, 48)
    rows, columns = np.nonzero(pixels < 128)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (4, 43, 19, 28)
    red = upstream.draw_svg(bar | {"body": '<circle cx="12" cy="12" r="8" fill="red"/>'})
    assert red is not None
    assert red.shape == (48, 48, 3)
    assert red[24, 24].tolist() == [255, 0, 0]
    assert (red[:4] == 255).all()
    assert upstream.draw_svg(bar | {"body": ""}) is None


def drawings(bits: int, count: int, source: str) -> list[upstream.Drawing]:
    """Noise drawn by the bits, each time a little different, in styles that all classes share."""
    base = np.random.default_rng(bits).integers(0, 200, (48, 48), np.uint8)
    noise = np.random.default_rng(bits + 1).integers(0, 50, (count, 48, 48), np.uint8)
    return [upstream.Drawing(base + extra, source, f"style {i}") for i, extra in enumerate(noise)]


def test_look_alikes_of_earlier_classes_are_left_out() -> None:
    classes = {"O": drawings(1, 4, "a"), "X": drawings(2, 4, "a"), "o": drawings(1, 5, "a"), "x": drawings(3, 4, "a")}
    kept, pairs = upstream.distinct(classes, 0.9)
    assert list(kept) == ["O", "X", "x"]
    assert pairs == [("o", "O")]


def test_the_set_that_is_written(tmp_path: Path) -> None:
    glyphs = {char: drawings(ord(char), 18 if char < "M" else 5, "fonts-one") for char in "ABCDEFGHIJKLMNOP"}
    icons = {name: drawings(i, 16 + i, "@iconify-json/some@1") for i, name in enumerate(["house", "cat-face", "tree"])}
    facts = upstream.write_set(tmp_path, {"glyph": glyphs, "picture": icons}, seed=3, held_out=2)
    listed = json.loads((tmp_path / "classes.json").read_text())
    trained, held = set(listed["glyphs"]["trained"]), set(listed["glyphs"]["held_out"])
    assert trained | held == set("ABCDEFGHIJKLMNOP")
    assert not trained & held
    assert len(held) == 2
    assert max(held) < "M"  # the others have too few drawings
    packed = np.load(tmp_path / "train.npz")
    shard = tmp_path / "train" / "train-00000-of-00001.parquet"
    train = datasets.Dataset.from_parquet(str(shard), cache_dir=str(tmp_path / "cache"))
    assert train.features["label"].names == packed["class_names"].tolist()
    assert train["label"] == packed["labels"].tolist()
    assert np.array_equal(np.asarray(train[7]["image"].convert("RGB")), packed["images"][7])
    assert train.num_rows == facts["glyphs"]["trained_drawings"] + facts["pictures"]["trained_drawings"]
    assert sum(name.startswith("picture: ") for name in train.features["label"].names) == 1
    for kind in ("glyphs", "pictures"):
        files = {part: str(tmp_path / f"held_out_{kind}" / f"{part}.parquet") for part in ("train", "test")}
        parts = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
        assert np.bincount(parts["train"]["label"]).tolist() == [10, 10]
        assert np.bincount(parts["test"]["label"]).min() >= 6
        assert not set(parts["train"].features["label"].names) & set(train.features["label"].names)


def test_too_few_rich_classes_are_an_error() -> None:
    with pytest.raises(SystemExit, match="only 1 have 16"):
        upstream.split({"a": drawings(1, 16, "f"), "b": drawings(2, 15, "f")}, seed=0, count=2)


def test_no_shipped_class_is_a_number() -> None:
    shipped = json.loads(SHIPPED.read_text(encoding="utf-8"))
    glyphs, pictures = shipped["glyphs"], shipped["pictures"]
    assert [len(glyphs["trained"]), len(glyphs["held_out"])] == [GLYPHS, HELD_OUT]
    assert [len(pictures["trained"]), len(pictures["held_out"])] == [PICTURES, HELD_OUT]
    words = set(  # written here anew: the recipe's own lists must not be what proves it right
        """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
        eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million digit digits number
        numbers numeral numerals numeric first second third half quarter double triple dozen clock watch calendar date dice die
        calculator medal keypad keycap domino stopwatch timer""".split()
    )
    letters = [*glyphs["trained"], *glyphs["held_out"]]
    names = [*pictures["trained"], *pictures["held_out"]]
    assert len(set(letters)) == len(letters)
    assert len(set(names)) == len(names)
    for char in letters:
        assert unicodedata.numeric(char, None) is None, char
        assert unicodedata.category(char).startswith("L"), char
        assert not re.search(r"\d", unicodedata.name(char)), char
        assert not words & set(re.findall("[a-z]+", unicodedata.name(char).lower())), char
    for name in names:
        assert not re.search(r"\d", name), name
        assert not words & set(re.findall("[a-z]+", name)), name
