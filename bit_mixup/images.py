"""How does an encoded picture become the square of bytes that a model is shown?

One picture at a time, in PIL and NumPy, without torch: decoding any mode to RGB, and BiT's two views of it. Normalisation
happens later, on the device and in batches (`bit_mixup.models.normalize`).
"""

import functools
import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from bit_mixup.errors import DataError
from bit_mixup.sampling import Purpose, generator

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
# What is read, whatever a file's name says. PIL reads more, some of it by running other programs (Ghostscript for EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000")
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what puts a picture upright, by its EXIF orientation

Bytes3d = npt.NDArray[np.uint8]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB, upright.

    EXIF orientation is applied; transparency is composited on white; 16-bit grey is scaled to 8 bits, not clipped; palettes,
    grey, CMYK and the like are converted.

    Raises:
        DataError: a mode whose range is unknown (floating point, 32-bit integers).
    """
    image.load()  # what is cut short shows here, not inside of _upright
    scaled = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")  # as older Pillows open 16 bits
    if image.mode in ("I", "F") and not scaled:
        kind = "floating-point values" if image.mode == "F" else "32-bit integers"
        raise DataError(f"the picture holds {kind}, whose range is unknown. Save it with 8 or 16 bits.")
    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if scaled:
        image = _scale_16_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int | None:
    try:
        orientation: int | None = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the EXIF block is broken in one of many ways; the pixels need not be
        return None
    return orientation if orientation in _TURNS else None


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    # Not ImageOps.exif_transpose: it writes the other tags anew, and fails where one of them is broken.
    return image if orientation is None else image.transpose(_TURNS[orientation])


def _scale_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    return Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8))


def open_encoded(encoded: dict[str, Any]) -> Image.Image:
    """Opens a picture as the `datasets` library stores it, {"bytes": ..., "path": ...}; only its header is read.

    Raises:
        DataError: it is of another format than `FORMATS`, or of none; or its header declares more pixels than PIL's limit, so
            that decoding might fill the memory.
    """
    with _unconcerned():
        return _open(encoded)


def _open(encoded: dict[str, Any]) -> Image.Image:
    file = io.BytesIO(encoded["bytes"]) if encoded.get("bytes") is not None else Path(encoded["path"])
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:  # whose own words name the buffer
        raise DataError(f"not a picture in a format that is read ({', '.join(FORMATS)}). Mend or remove the file.") from error
    except Image.DecompressionBombError as error:  # beyond twice the limit
        raise DataError(f"a decompression bomb? {error}. {_SMALLER}") from error
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:  # PIL itself would only warn
        image.close()
        raise DataError(f"a decompression bomb? Its header declares {pixels:,} pixels, the limit is {limit:,}. {_SMALLER}")
    return image


_SMALLER = "Save the picture smaller, or remove it."


@contextmanager
def _unconcerned() -> Iterator[None]:
    """Keeps PIL from warning of broken tags in a picture that it can read: it names no file, and does so in each pass anew.

    Of many pixels it warns as well, where `open_encoded` refuses them.
    """
    with warnings.catch_warnings():
        for category in (UserWarning, Image.DecompressionBombWarning):
            warnings.simplefilter("ignore", category)
        yield


def decode(encoded: dict[str, Any], *, where: str) -> Image.Image:
    """Decodes a picture to RGB.

    Raises:
        DataError: it can not be decoded; the message starts with `where`.
    """
    try:
        with _unconcerned(), _open(encoded) as image:
            return to_rgb(image)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except MemoryError:  # of the machine, not of the picture
        raise
    except Exception as error:  # decoders raise whatever they like on broken files
        raise DataError(
            f"{where} can not be decoded as a picture ({type(error).__name__}: {error}). Mend or remove the file."
        ) from error


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What the header of a picture says.

    Args:
        size: width and height in pixels, as stored.
        mode: PIL's name of how pixels are stored, and whether a palette or the like has transparency.
        turned: whether an EXIF orientation says that the picture is not upright.
    """

    size: tuple[int, int]
    mode: str
    turned: bool


def read_traits(encoded: dict[str, Any]) -> Traits:
    """Of a picture that can be opened."""
    with _unconcerned(), _open(encoded) as image:
        transparent = " with transparency" if "transparency" in image.info else ""
        return Traits(size=image.size, mode=f"{image.mode}{transparent}", turned=_orientation(image) is not None)


@dataclass(frozen=True, kw_only=True)
class View:
    """How pictures are resized: BiT squashes them to a square, whatever their aspect ratio.

    Args:
        resize_size: edge in pixels that training pictures are resized to.
        crop_size: edge in pixels of the random training crop, and of the evaluation picture.
        flip: whether half of the training pictures are mirrored.
        interpolation: "bilinear" or "bicubic" as the pretrained model wants it; PIL's, with antialiasing.
    """

    resize_size: int
    crop_size: int
    flip: bool
    interpolation: str

    def train(self, image: Image.Image, *, seed: int, position: int) -> Bytes3d:
        """A random crop of the resized picture, perhaps mirrored, (3, crop, crop); drawn from the seed and the position."""
        left, top, mirror = self.draws(seed=seed, position=position)
        pixels = squash_and_crop(image, self.resize_size, self.interpolation, left=left, top=top, crop_size=self.crop_size)
        return channels_first(pixels[:, ::-1] if mirror else pixels)

    def draws(self, *, seed: int, position: int) -> tuple[int, int, bool]:
        """Left and top edge of the crop in pixels, and whether to mirror."""
        numbers = generator(seed, Purpose.CROP_AND_FLIP, position)
        left, top = numbers.integers(0, self.resize_size - self.crop_size + 1, size=2)
        return int(left), int(top), bool(numbers.integers(2)) and self.flip

    def evaluate(self, image: Image.Image) -> Bytes3d:
        """The whole picture resized straight to the crop's edge, (3, crop, crop)."""
        return channels_first(np.asarray(squash(image, self.crop_size, self.interpolation)))


def squash(image: Image.Image, edge: int, interpolation: str) -> Image.Image:
    """The whole picture resized to a square, whatever its aspect ratio."""
    return image.resize((edge, edge), RESAMPLING[interpolation])


def squash_and_crop(
    image: Image.Image, edge: int, interpolation: str, *, left: int, top: int, crop_size: int
) -> npt.NDArray[np.uint8]:
    """A crop of the squashed picture, (crop, crop, 3), bit for bit what cropping it gives; little else of it is computed.

    PIL resizes a part of a picture by the same weights as the whole, if the part's edges are single precision numbers, as which
    PIL takes them, and if it goes along rows and columns in the same order, for it rounds between the two. So a part is taken
    that holds the crop and has such edges, and the crop is cut from it; where that would not do, from the whole.
    """
    width, height = image.size
    (first, last), (upper, lower) = (
        _exact_span(start, start + crop_size, edge, size) for start, size in ((left, width), (top, height))
    )
    size, box = (
        (last - first, lower - upper),
        (first * width / edge, upper * height / edge, last * width / edge, lower * height / edge),
    )
    columns_first = _pil_order()
    same_order = columns_first is not None and columns_first(*image.size, *size) is columns_first(*image.size, edge, edge)
    if interpolation == "nearest" or not same_order or any(float(np.float32(side)) != side for side in box):
        size, box, first, upper = (edge, edge), (0.0, 0.0, width, height), 0, 0
    part = np.asarray(image.resize(size, RESAMPLING[interpolation], box=box))
    return part[top - upper : top - upper + crop_size, left - first : left - first + crop_size]


def _exact_span(start: int, stop: int, edge: int, size: int) -> tuple[int, int]:
    """The smallest span around the pixels from start to stop, of `edge` pixels that `size` were resized to, whose ends are binary
    fractions of pixels of the picture as it was."""
    odd = edge
    while odd % 2 == 0:
        odd //= 2
    unit = odd // math.gcd(odd, size)
    return start // unit * unit, -(-stop // unit) * unit


@functools.cache
def _pil_order() -> Callable[[int, int, int, int], bool] | None:
    """Whether PIL goes along columns before it goes along rows, by width and height before and after.

    As version 13 does, or as those before it, whichever agrees with what this one is seen to do; None where neither does.
    """

    def is_columns_first(width: int, height: int, across: int, down: int) -> bool:
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image, bilinear = Image.fromarray(noise), Image.Resampling.BILINEAR
        columns_first = image.resize((width, down), bilinear).resize((across, down), bilinear)
        return columns_first.tobytes() == image.resize((across, down), bilinear).tobytes()

    known: list[Callable[[int, int, int, int], bool]] = [
        lambda width, height, across, down: height > down and height - down > 2 * (width - across),
        lambda width, height, across, down: False,
    ]
    sizes = ((12, 40, 10), (40, 12, 10), (14, 19, 10), (14, 18, 10), (6, 9, 10), (6, 11, 10), (9, 14, 7))
    trials = [(width, height, edge, edge) for width, height, edge in sizes]
    found = [is_columns_first(*trial) for trial in trials]
    return next((rule for rule in known if [rule(*trial) for trial in trials] == found), None)


def channels_first(pixels: npt.NDArray[np.uint8]) -> Bytes3d:
    """(H, W, 3) as (3, H, W): the same bytes, looked at otherwise."""
    return pixels.transpose(2, 0, 1)


def stack_pictures(pictures: Sequence[Bytes3d]) -> npt.NDArray[np.uint8]:
    """Pictures (3, H, W) as one array (N, 3, H, W) that lies channels last, as they do and as networks take it: nothing is
    transposed on the way."""
    channels, height, width = pictures[0].shape
    stacked = np.empty((len(pictures), height, width, channels), dtype=np.uint8)
    for place, picture in enumerate(pictures):
        stacked[place] = picture.transpose(1, 2, 0)
    return stacked.transpose(0, 3, 1, 2)
