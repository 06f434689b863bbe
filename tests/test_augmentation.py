"""Does the upstream view show what it says: crops of the paper's law, drawn from seed and position, and drawings that survive?"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from bit_mixup.augmentation import InceptionView, _stroke, distort
from bit_mixup.errors import ConfigError
from bit_mixup.images import View
from bit_mixup.sampling import Purpose, generator

PLAIN = {"crop_size": 24, "flip": False, "interpolation": "bilinear"}


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def letter() -> Image.Image:
    """Black strokes on white: an F, which is not its own mirror image."""
    image = Image.new("RGB", (48, 48), "white")
    draw = ImageDraw.Draw(image)
    for box in ((12, 6, 17, 42), (12, 6, 36, 11), (12, 20, 30, 25)):
        draw.rectangle(box, fill="black")
    return image


@given(
    width=st.integers(8, 400), ratio=st.floats(0.45, 2.2), min_area=st.floats(0.01, 0.3), seed=st.integers(0, 2**32)
)  # within these ratios even the fall-back holds a third of the picture
def test_a_box_lies_in_the_picture_and_keeps_its_law(width: int, ratio: float, min_area: float, seed: int) -> None:
    height = max(4, round(width / ratio))
    view = InceptionView(**PLAIN, min_area=min_area)
    left, top, right, bottom = view.box((width, height), np.random.default_rng(seed))
    assert 0 <= left < right <= width + 1e-9
    assert 0 <= top < bottom <= height + 1e-9
    share = (right - left) * (bottom - top) / (width * height)
    assert min_area - 1e-9 <= share <= 1 + 1e-9
    assert 3 / 4 - 1e-9 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-9


@pytest.mark.parametrize(("size", "expected"), [((1000, 20), (480 + 20 / 3, 0, 520 - 20 / 3, 20)), ((6, 80), (0, 36, 6, 44))])
def test_where_no_crop_fits_the_central_part_is_shown(size: tuple[int, int], expected: tuple[float, ...]) -> None:
    """1000 x 20: no try can hold half of it at 4:3, so the part is 80/3 x 20; 6 x 80: 6 x 8."""
    box = InceptionView(**PLAIN, min_area=0.5).box(size, np.random.default_rng(0))
    assert box == pytest.approx(expected)


def test_areas_aspects_and_places_are_spread_evenly() -> None:
    """In a picture large enough for every try but the tallest and widest: area uniform, aspect log-uniform, place uniform."""
    view = InceptionView(**PLAIN, min_area=0.1)
    boxes = np.array([view.box((500, 500), np.random.default_rng(seed)) for seed in range(4000)])
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    shares, aspects = across * down / 500**2, np.log(across / down)
    small = shares < 0.7  # above 3/4 a try may not fit, so that aspects near 1 become more frequent
    counts, _ = np.histogram(shares[small], bins=6, range=(0.1, 0.7))
    assert counts.min() > 0.85 * counts.mean()
    assert counts.max() < 1.15 * counts.mean()
    counts, _ = np.histogram(aspects[small], bins=6, range=(np.log(3 / 4), np.log(4 / 3)))
    assert counts.min() > 0.85 * counts.mean()
    assert counts.max() < 1.15 * counts.mean()
    places = (boxes[:, 0] / (500 - across))[small], (boxes[:, 1] / (500 - down))[small]
    for place in places:
        counts, _ = np.histogram(place, bins=6, range=(0, 1))
        assert counts.min() > 0.85 * counts.mean()
    assert abs(np.corrcoef(*places)[0, 1]) < 0.06


@pytest.mark.parametrize("distorted", [False, True])
def test_a_view_is_a_function_of_seed_and_position(distorted: bool) -> None:
    view = InceptionView(**PLAIN | {"flip": not distorted}, min_area=1 if distorted else 0.08, distort=distorted)
    shown = [view.train(picture(), seed=3, position=position) for position in range(12)]
    assert all((one.shape, one.dtype) == ((3, 24, 24), np.uint8) for one in shown)
    again = [view.train(picture(), seed=3, position=position) for position in reversed(range(12))][::-1]
    assert [one.tobytes() for one in shown] == [one.tobytes() for one in again]
    assert len({one.tobytes() for one in shown}) == 12
    assert all(view.train(picture(), seed=4, position=p).tobytes() != shown[p].tobytes() for p in range(12))


def test_a_crop_is_pils_resize_of_its_box() -> None:
    view = InceptionView(**PLAIN)
    box = view.box((40, 30), generator(1, Purpose.CROP_AND_FLIP, 7))
    expected = np.asarray(picture().resize((24, 24), Image.Resampling.BILINEAR, box=box)).transpose(2, 0, 1)
    np.testing.assert_array_equal(view.train(picture(), seed=1, position=7), expected)


def test_the_whole_picture_is_shown_where_min_area_is_1_and_half_are_mirrored_where_asked() -> None:
    plain = np.asarray(picture().resize((24, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    mirrored = np.asarray(
        picture().resize((24, 24), Image.Resampling.BILINEAR).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    ).transpose(2, 0, 1)
    counts = {}
    for flip in (False, True):
        view = InceptionView(**PLAIN | {"flip": flip}, min_area=1)
        shown = [view.train(picture(), seed=0, position=position) for position in range(200)]
        assert all(np.array_equal(one, plain) or np.array_equal(one, mirrored) for one in shown)
        counts[flip] = sum(np.array_equal(one, mirrored) for one in shown)
    assert counts[False] == 0
    assert 75 < counts[True] < 125


def test_without_flip_no_distorted_drawing_is_mirrored() -> None:
    """An F's ink lies left of its bars' ends: turned, bent and recoloured, most still look more like it than like its mirror."""
    sides = {}
    for flip in (False, True):
        view = InceptionView(crop_size=40, flip=flip, interpolation="bilinear", min_area=1, distort=True)
        plain = letter().resize((40, 40)).convert("L")
        straight = np.asarray(plain, dtype=float) - np.asarray(plain).mean()
        found = 0
        for position in range(150):
            shown = view.train(letter(), seed=0, position=position).mean(0)
            shown = shown - shown.mean()
            found += abs((shown * straight).sum()) > abs((shown * straight[:, ::-1]).sum())
        sides[flip] = found / 150
    assert sides[False] > 0.85
    assert 0.35 < sides[True] < 0.65


def test_distortion_keeps_a_drawing_and_changes_it() -> None:
    shown = [distort(letter(), 40, np.random.default_rng(seed)) for seed in range(150)]
    assert all((one.shape, one.dtype) == ((40, 40, 3), np.uint8) for one in shown)
    contrast = [float(one.mean(2).std()) for one in shown]  # in grey
    assert np.mean(contrast) > 60
    assert np.percentile(contrast, 1) > 15
    assert len({one.tobytes() for one in shown}) == 150
    again = distort(letter(), 40, np.random.default_rng(7))
    np.testing.assert_array_equal(again, shown[7])
    darker = [one.mean() < 128 for one in shown]
    assert 0.15 < np.mean(darker) < 0.85, "ink and paper change places"
    coloured = [np.abs(one.astype(int) - one.mean(2, keepdims=True)).max() > 40 for one in shown]
    assert 0.1 < np.mean(coloured) < 0.9


def test_strokes_grow_and_shrink_as_by_pils_filters() -> None:
    image = picture(3, (31, 27))
    for kind, filtered in ((0.1, ImageFilter.MinFilter(3)), (0.4, ImageFilter.MaxFilter(3))):
        expected = Image.blend(image, image.filter(filtered), 0.7)
        np.testing.assert_array_equal(_stroke(image, kind, 0.7), expected)
    assert _stroke(image, 0.6, 0.7) is image


@pytest.mark.parametrize("min_area", [0, -0.1, 1.01, float("nan")])
def test_other_areas_are_refused(min_area: float) -> None:
    with pytest.raises(ConfigError, match="min_area is"):
        InceptionView(**PLAIN, min_area=min_area)


def test_scoring_shows_the_whole_picture_as_fine_tuning_does() -> None:
    view = InceptionView(**PLAIN | {"flip": True}, distort=True)
    theirs = View(resize_size=24, crop_size=24, flip=False, interpolation="bilinear")
    np.testing.assert_array_equal(view.evaluate(picture()), theirs.evaluate(picture()))
