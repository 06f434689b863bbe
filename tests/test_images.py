"""Are pictures of every kind shown to the model as torchvision would show them, one at a time?"""

import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torchvision.transforms.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode

from bit_mixup.errors import DataError
from bit_mixup.images import FORMATS, RESAMPLING, View, decode, squash_and_crop, stack_pictures, to_rgb
from bit_mixup.models import Normalize

Pixels = npt.NDArray[Any]
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
SIZES = [(8, 8), (37, 61), (200, 90), (12, 300), (48, 48), (1, 7), (640, 480)]  # width, height


def picture(width: int, height: int) -> Image.Image:
    """Noise on a slope: neither smooth nor the same when mirrored."""
    noise = np.random.default_rng(width * height).integers(0, 128, (height, width, 3))
    slope = np.linspace(0, 127, width, dtype=np.int64)[None, :, None]
    return Image.fromarray((noise + slope).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    """A file's bytes, as the `datasets` library holds them."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def decoded(image: Image.Image, kind: str = "PNG", **options: Any) -> Pixels:
    """A picture saved and decoded again, (height, width, 3)."""
    rgb = decode(encoded(image, kind, **options), where="here")
    assert rgb.mode == "RGB"
    return np.asarray(rgb)


# --- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("flip", [True, False])
def test_views_equal_torchvision_one_picture_at_a_time(interpolation: str, flip: bool) -> None:
    """Resize, crop, flip: bit for bit on bytes. Normalised in a batch: the same floats."""
    view = View(resize_size=48, crop_size=40, flip=flip, interpolation=interpolation)
    mean, std = (0.5, 0.25, 0.4), (0.5, 0.3, 0.2)
    ours, theirs, mirrored = [], [], Counter[bool]()
    for position, (width, height) in enumerate(SIZES * 4):
        image = picture(width, height)
        read = decode(encoded(image), where="here")
        left, top, mirror = view.draws(seed=5, position=position)
        mirrored[mirror] += 1
        expected = F.crop(F.resize(image, [48, 48], MODES[interpolation]), top, left, 40, 40)
        expected = F.hflip(expected) if mirror else expected
        train = view.train(read, seed=5, position=position)
        assert (train.dtype, train.shape) == (np.uint8, (3, 40, 40))
        np.testing.assert_array_equal(train, F.pil_to_tensor(expected).numpy())
        straight = F.resize(image, [40, 40], MODES[interpolation])
        np.testing.assert_array_equal(view.evaluate(read), F.pil_to_tensor(straight).numpy())
        ours += [train, view.evaluate(read)]
        theirs += [F.normalize(F.to_tensor(one), mean, std) for one in (expected, straight)]
    assert len(ours) == len(theirs) == 2 * 28
    assert set(mirrored) == ({True, False} if flip else {False})
    assert torch.equal(Normalize(mean, std)(torch.from_numpy(np.stack(ours))), torch.stack(theirs))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_crop_is_cut_from_the_squashed_picture_bit_for_bit(data: st.DataObject) -> None:
    """Of any sizes; the whole squashed picture is the reference, which `View` itself never computes."""
    width, height = data.draw(st.integers(1, 90), "width"), data.draw(st.integers(1, 90), "height")
    edge = data.draw(st.integers(1, 70), "edge")
    crop = data.draw(st.integers(1, edge), "crop")
    left, top = (data.draw(st.integers(0, edge - crop), side) for side in ("left", "top"))
    name = data.draw(st.sampled_from(sorted(RESAMPLING)), "interpolation")
    image = Image.fromarray(np.random.default_rng(width * 100 + height).integers(0, 256, (height, width, 3), dtype=np.uint8))
    found = squash_and_crop(image, edge, name, left=left, top=top, crop_size=crop)
    whole = np.asarray(image.resize((edge, edge), RESAMPLING[name]))
    np.testing.assert_array_equal(found, whole[top : top + crop, left : left + crop])


def test_stacked_pictures_lie_channels_last() -> None:
    pictures = [np.random.default_rng(index).integers(0, 256, (3, 5, 7), dtype=np.uint8) for index in range(4)]
    stacked = stack_pictures(pictures)
    np.testing.assert_array_equal(stacked, np.stack(pictures))
    assert torch.from_numpy(stacked).is_contiguous(memory_format=torch.channels_last)


def test_interpolations_differ() -> None:
    views = {name: View(resize_size=48, crop_size=40, flip=False, interpolation=name) for name in MODES}
    assert len({view.evaluate(picture(37, 61)).tobytes() for view in views.values()}) == 2


def test_normalize_leaves_bytes_alone_and_follows_the_asked_precision() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    kept = images.clone()
    for dtype in (torch.float32, torch.float64):
        out = Normalize((0.5,) * 3, (0.5,) * 3)(images, dtype)
        assert out.dtype == dtype
        np.testing.assert_allclose(out[0, 2].flatten(), np.arange(256) / 127.5 - 1, atol=torch.finfo(dtype).eps)
    assert torch.equal(images, kept)


def test_crops_reach_every_offset_and_half_are_mirrored() -> None:
    count = 6_000
    view = View(resize_size=45, crop_size=40, flip=True, interpolation="bilinear")
    draws = [view.draws(seed=2, position=position) for position in range(count)]
    corners = Counter((left, top) for left, top, _ in draws)
    assert set(corners) == {(left, top) for left in range(6) for top in range(6)}
    assert max(abs(times / count - 1 / 36) for times in corners.values()) < 4.5 * (35 / 36 / 36 / count) ** 0.5
    assert abs(sum(mirror for *_, mirror in draws) / count - 0.5) < 4 * 0.5 / count**0.5
    unmirrored = View(resize_size=45, crop_size=40, flip=False, interpolation="bilinear")
    assert [unmirrored.draws(seed=2, position=p) for p in range(count)] == [(left, top, False) for left, top, _ in draws]
    assert [view.draws(seed=2, position=p) for p in range(count)] == draws
    assert [view.draws(seed=3, position=p) for p in range(count)] != draws


def test_a_crop_as_large_as_the_picture_is_the_picture() -> None:
    view = View(resize_size=40, crop_size=40, flip=False, interpolation="bilinear")
    for position in range(5):
        np.testing.assert_array_equal(view.train(picture(50, 60), seed=0, position=position), view.evaluate(picture(50, 60)))


# --- modes -----------------------------------------------------------------------------------------------------------


def on_white(rgb: Pixels, alpha: Pixels) -> Pixels:
    """Exact composition over white, in floats."""
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def test_black_and_white_and_grey_become_three_equal_channels() -> None:
    bits = np.random.default_rng(0).integers(0, 2, (9, 13)).astype(bool)
    np.testing.assert_array_equal(decoded(Image.fromarray(bits)), np.repeat(bits[..., None] * np.uint8(255), 3, axis=2))
    grey = np.random.default_rng(1).integers(0, 256, (9, 13), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(Image.fromarray(grey)), np.repeat(grey[..., None], 3, axis=2))


def test_colour_stays() -> None:
    image = picture(13, 9)
    np.testing.assert_array_equal(decoded(image), np.asarray(image))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_composited_on_white(mode: str) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (40, 40, len(mode)), dtype=np.uint8)
    pixels[:4, :, -1] = 0
    pixels[4:8, :, -1] = 255
    result = decoded(Image.fromarray(pixels, mode)).astype(float)
    colours = np.broadcast_to(pixels[..., :-1], (40, 40, 3))
    assert np.abs(result - on_white(colours.astype(float), pixels[..., -1])).max() <= 1
    assert (result[:4] == 255).all(), "what is wholly transparent is white, whatever its hidden colour"
    np.testing.assert_array_equal(result[4:8], colours[4:8])


def palette_picture() -> tuple[Image.Image, Pixels, Pixels]:
    """A palette picture, its indices and its colours."""
    numbers = np.random.default_rng(3)
    indices, colours = numbers.integers(0, 6, (9, 13), dtype=np.uint8), numbers.integers(0, 256, (6, 3), dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(colours.tobytes())
    return image, indices, colours


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes_are_looked_up(kind: str) -> None:
    image, indices, colours = palette_picture()
    np.testing.assert_array_equal(decoded(image, kind), colours[indices])


def test_transparent_palette_entries_are_composited_on_white() -> None:
    image, indices, colours = palette_picture()
    one = decoded(image, transparency=2)
    np.testing.assert_array_equal(one, np.where((indices == 2)[..., None], 255, colours[indices]))
    alphas = np.array([0, 51, 102, 153, 204, 255], dtype=np.uint8)
    several = decoded(image, transparency=alphas.tobytes())
    assert np.abs(several - on_white(colours[indices].astype(float), alphas[indices])).max() <= 1


def test_a_transparent_colour_without_an_alpha_channel_is_white() -> None:
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)
    assert decoded(Image.fromarray(pixels), transparency=(1, 2, 3)).tolist() == [[[255] * 3, [4, 5, 6]]]
    assert decoded(Image.fromarray(pixels[..., 0]), transparency=1).tolist() == [[[255] * 3, [4] * 3]]


def test_cmyk_is_converted() -> None:
    inks = np.random.default_rng(4).integers(0, 256, (20, 20, 4), dtype=np.uint8)
    share = 1 - inks / 255
    expected = 255 * share[..., :3] * share[..., 3:]
    assert np.abs(decoded(Image.fromarray(inks, "CMYK"), "TIFF") - expected).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_and_not_clipped(kind: str) -> None:
    values = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    result = decoded(Image.fromarray(values), kind)
    assert (result == result[..., :1]).all()
    assert np.abs(result[..., 0] - values / 257).max() <= 0.5
    wanted = {65_535: 255, 32_768: 128, 0: 0}
    assert {value: int(result[..., 0].flat[value]) for value in wanted} == wanted


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_other_ways_to_hold_16_bits(mode: str) -> None:
    values = np.array([[0, 257, 32_768], [65_535, 40_000, 128]])
    raw = values.astype({"I;16": "<u2", "I;16B": ">u2"}[mode]).tobytes()
    result = np.asarray(to_rgb(Image.frombytes(mode, (3, 2), raw)))
    assert result[..., 1].tolist() == [[0, 1, 128], [255, 156, 0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 254]], dtype=np.int32), "32-bit integers"),  # scaled as 16 bits they would turn black
        (np.array([[0.5, 1.0]], dtype=np.float32), "floating-point"),
    ],
)
def test_values_of_unknown_range_are_refused(values: Pixels, message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_rgb(Image.fromarray(values))
    with pytest.raises(DataError, match=f"train row 3: the picture holds .*{message}"):
        decode(encoded(Image.fromarray(values), "TIFF"), where="train row 3")


# --- orientation -----------------------------------------------------------------------------------------------------

# Exif 2.3, tag 0x0112: which side of the upright picture the file's first row is, and which its first column.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def as_stored(upright: Pixels, orientation: int) -> Pixels:
    """The rows and columns of a file whose picture is to be shown upright."""
    row, column = SIDES[orientation]
    stored = upright if row in ("top", "bottom") else upright.swapaxes(0, 1)
    stored = stored[::-1] if row in ("bottom", "right") else stored
    return np.ascontiguousarray(stored[:, ::-1] if column in ("bottom", "right") else stored)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", SIDES)
def test_pictures_are_turned_upright(orientation: int, kind: str) -> None:
    upright = np.asarray(picture(13, 9))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decoded(Image.fromarray(as_stored(upright, orientation)), kind, exif=exif, **options), upright)


def test_orientations_are_eight_different_ones() -> None:
    assert len({as_stored(np.asarray(picture(9, 9)), orientation).tobytes() for orientation in SIDES}) == 8


BROKEN_BLOCKS = [
    b"",
    b"garbage",
    b"II*\0\xff\xff\xff\xff",
    b"MM\0*",
    b"II",
    b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\xff\xff\0\0",
]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow mentions what is corrupt
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("block", BROKEN_BLOCKS, ids=range(len(BROKEN_BLOCKS)))
def test_a_broken_exif_block_does_no_harm(block: bytes, kind: str) -> None:
    image = picture(13, 9)
    np.testing.assert_array_equal(decoded(image, kind, exif=b"Exif\0\0" + block), decoded(image, kind))


@pytest.mark.parametrize("damage", [b"\x01\x0d\0\x05", b"\x01\x1a\0\x02", b"\x01\x07\0\x05"], ids=["text", "rational", "short"])
def test_a_broken_tag_beside_it_does_not_hide_the_orientation(damage: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 1.5
    block = exif.tobytes()
    assert block.count(b"\x01\x1a\0\x05") == 1  # the tag of the resolution and its type
    upright = np.asarray(picture(13, 9))
    stored = Image.fromarray(as_stored(upright, 6))
    np.testing.assert_array_equal(decoded(stored, exif=block.replace(b"\x01\x1a\0\x05", damage)), upright)


# --- broken files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], " can not be decoded as a picture (OSError: "),
        (lambda data: b"", ": not a picture in a format that is read"),
        (lambda data: b"<html>Not Found</html>", ": not a picture in a format that is read"),
        (lambda data: data[::-1], ": not a picture in a format that is read"),
    ],
    ids=["cut short", "empty", "a web page", "reversed"],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_broken_picture_is_named(spoil: Callable[[bytes], bytes], message: str, kind: str) -> None:
    data = spoil(encoded(picture(64, 64), kind)["bytes"])
    with pytest.raises(DataError, match=rf"^train row 7 \(cat\.png\){re.escape(message)}.*Mend or remove the file"):
        decode({"bytes": data, "path": "cat.png"}, where="train row 7 (cat.png)")


def test_files_are_read_by_path_and_a_missing_one_is_named(tmp_path: Path) -> None:
    picture(13, 9).save(tmp_path / "a.png")
    read = decode({"bytes": None, "path": str(tmp_path / "a.png")}, where="a.png")
    np.testing.assert_array_equal(np.asarray(read), np.asarray(picture(13, 9)))
    with pytest.raises(DataError, match=r"^b\.png can not be decoded"):
        decode({"bytes": None, "path": str(tmp_path / "b.png")}, where="b.png")


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "ICO", "PDF"])
def test_formats_that_run_programs_or_are_hardly_known_are_not_read(kind: str) -> None:
    with pytest.raises(DataError, match=r"^cat\.jpg: not a picture in a format that is read \(JPEG, PNG, "):
        decode(encoded(picture(8, 8), kind), where="cat.jpg")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_formats_that_are_named_are_read(kind: str) -> None:
    image = picture(8, 8)
    assert decode(encoded(image, kind), where="cat").size == image.size
