"""What does pre-training show of a picture?

BiT's upstream view is the "inception crop" (Szegedy et al., "Going Deeper with Convolutions", 2015, section 6): a random part of
random shape, perhaps mirrored. Drawings that are a few pixels wide want more than that and less: `distort` bends, recolours and
blurs, but keeps them whole. Every draw is a function of the seed and the position in the run.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from bit_mixup.errors import ConfigError
from bit_mixup.images import RESAMPLING, Bytes3d, channels_first, squash
from bit_mixup.sampling import Purpose, generator

ASPECTS = (3 / 4, 4 / 3)  # of an inception crop, width to height
_CELLS = 4  # quadrilaterals along an edge of the mesh that bends a picture
_WAVES = 3  # of the elastic displacement, along each axis
_LEVELS = np.linspace(0, 1, 256)  # from black to white
_CHANNELS = np.array([0, 256, 512], dtype=np.int16)  # where the levels of red, green and blue begin in a table of all


@dataclass(frozen=True, kw_only=True)
class InceptionView:
    """BiT's upstream view of a picture.

    Args:
        crop_size: edge in pixels of what the model is shown.
        flip: whether half of the training pictures are mirrored; wrong where that changes the class.
        interpolation: PIL's, with antialiasing.
        min_area: smallest share of the picture's area that a crop holds; 1 for the whole picture.
        distort: whether `distort` follows: for drawings and symbols, not for photographs.

    Raises:
        ConfigError: min_area is not in (0, 1].
    """

    crop_size: int
    flip: bool
    interpolation: str
    min_area: float = 0.08
    distort: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= 1:
            raise ConfigError(f"min_area is {self.min_area}; it must be above 0 and at most 1 (BiT's is 0.08).")

    def train(self, image: Image.Image, *, seed: int, position: int) -> Bytes3d:
        """A random part of the picture, resized to a square, perhaps mirrored and distorted, (3, crop, crop)."""
        draws = generator(seed, Purpose.CROP_AND_FLIP, position)
        box = self.box(image.size, draws)
        mirror = bool(draws.integers(2)) and self.flip
        edge = round(self.crop_size * 6 / 5) if self.distort else self.crop_size
        part = image.resize((edge, edge), RESAMPLING[self.interpolation], box=box)
        if mirror:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.distort:
            return channels_first(distort(part, self.crop_size, generator(seed, Purpose.DISTORTION, position)))
        return channels_first(np.asarray(part))

    def box(self, size: tuple[int, int], draws: np.random.Generator) -> tuple[float, float, float, float]:
        """Left, upper, right and lower edge of the crop, for a picture of (width, height).

        Ten tries with an area uniform in [min_area, 1] of the picture and an aspect log-uniform in [3/4, 4/3], as in
        torchvision's RandomResizedCrop; if none fits, the largest central part whose aspect is within these bounds.
        """
        width, height = size
        if self.min_area == 1:
            return 0, 0, width, height
        for _ in range(10):
            area = draws.uniform(self.min_area, 1) * width * height
            aspect = math.exp(draws.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
            across, down = math.sqrt(area * aspect), math.sqrt(area / aspect)
            if across <= width and down <= height:
                left, top = draws.uniform(0, width - across), draws.uniform(0, height - down)
                return left, top, left + across, top + down
        across, down = min(width, height * ASPECTS[1]), min(height, width / ASPECTS[0])
        left, top = (width - across) / 2, (height - down) / 2
        return left, top, left + across, top + down

    def evaluate(self, image: Image.Image) -> Bytes3d:
        """The whole picture resized straight to the crop's edge, (3, crop, crop)."""
        return channels_first(np.asarray(squash(image, self.crop_size, self.interpolation)))


def distort(image: Image.Image, edge: int, draws: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A drawing as another hand, pen, paper, light and camera would have made it, (edge, edge, 3).

    Strokes are made bolder or finer, the sheet is turned, sheared, scaled and bent, ink and paper change their colours, and the
    picture loses sharpness and gains noise; each of these for a share of the pictures.

    Args:
        image: square, RGB.
        edge: in pixels, of the result.
        draws: where all randomness comes from.
    """
    chance: list[float] = draws.random(16).tolist()
    image = _stroke(image, chance[0], chance[1])
    image = _bend(image, edge, draws)
    image = _blur(image, edge, chance[2:5])
    pixels = _recolour(image, chance[5:8], draws)
    return _light(pixels, edge, chance[8:11], draws)


def _stroke(image: Image.Image, kind: float, weight: float) -> Image.Image:
    """Darker shapes grow or shrink by up to a pixel, for half of the pictures."""
    if kind > 0.5:
        return image
    extreme = np.minimum if kind < 0.25 else np.maximum
    # As PIL's MinFilter(3) and MaxFilter(3), rows first and columns then, in a tenth of their time.
    pixels = np.asarray(image)
    rows = pixels.copy()
    extreme(rows[1:], pixels[:-1], out=rows[1:])
    extreme(rows[:-1], pixels[1:], out=rows[:-1])
    changed = rows.copy()
    extreme(changed[:, 1:], rows[:, :-1], out=changed[:, 1:])
    extreme(changed[:, :-1], rows[:, 1:], out=changed[:, :-1])
    return Image.blend(image, Image.fromarray(changed), weight)


def _bend(image: Image.Image, edge: int, draws: np.random.Generator) -> Image.Image:
    """One resampling for turning, shearing, scaling, shifting and, in most pictures, a smooth elastic displacement."""
    drawn: list[float] = draws.random(8).tolist()
    angle, shear = (0.7 * share - 0.35 for share in drawn[:2])
    zoom, aspect = math.exp(0.5 * drawn[2] - 0.15), math.exp(0.5 * drawn[3] - 0.25)
    shift = 0.24 * drawn[4] - 0.12, 0.24 * drawn[5] - 0.12
    linear = np.array([[math.cos(angle) * aspect, math.sin(angle)], [shear - math.sin(angle), math.cos(angle) / aspect]])
    grid, between = _mesh(edge)
    source = grid @ (zoom * linear) + shift  # where each corner of the mesh comes from, in halves of the picture from its centre
    if drawn[6] < 0.8:
        waves = draws.random((3, 2 * _WAVES))
        frequency, phase = 7 * waves[:2] - 3.5, 2 * math.pi * waves[2]  # radians for each half of the picture
        source += 0.14 * drawn[7] * np.sin(grid @ frequency + phase).reshape(-1, 2, _WAVES).sum(-1)
    pixels = np.array(image)
    corners = np.sort(pixels[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0).astype(np.float32)
    paper = torch.from_numpy((corners[1] + corners[2]) // 2)[:, None, None]  # what lies around the sheet
    places = torch.from_numpy((between @ (between @ source.reshape(_CELLS + 1, -1)).reshape(edge, -1, 2)).astype(np.float32))
    sheet = torch.from_numpy(pixels).permute(2, 0, 1).float().sub_(paper)
    bent = F.grid_sample(sheet[None], places[None], mode="bilinear", padding_mode="zeros", align_corners=False)[0]
    shown: npt.NDArray[np.uint8] = bent.add_(paper).round_().byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(shown)


@cache
def _mesh(edge: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Corners of the mesh (row by row; xy), from -1 to 1; and what part each has in each of `edge` pixels, along an axis."""
    corners = np.linspace(-1, 1, _CELLS + 1)
    centres = (np.arange(edge) + 0.5) / edge * 2 - 1
    between = np.stack([np.interp(centres, corners, one) for one in np.eye(_CELLS + 1)], axis=1)
    return np.stack(np.meshgrid(corners, corners), -1).reshape(-1, 2), between


def _blur(image: Image.Image, edge: int, chance: list[float]) -> Image.Image:
    """Half of the pictures lose resolution, down to a quarter; another fifth are out of focus."""
    if chance[0] < 0.5:
        small = round(edge * (0.25 + 0.75 * chance[1]))
        back = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[int(chance[2] * 3)]
        return image.resize((small, small), Image.Resampling.BOX).resize((edge, edge), back)
    if chance[0] < 0.7:
        return image.filter(ImageFilter.GaussianBlur(1.2 * chance[1]))
    return image


def _recolour(image: Image.Image, chance: list[float], draws: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Moves what is black and what is white to other colours or grey levels, with a random gamma between them."""
    if chance[0] < 0.2:
        image = image.convert("L").convert("RGB")
    black, white = np.zeros(3), np.ones(3)
    if chance[1] < 0.5:
        black, white = draws.random((2, 3))
        if chance[1] < 0.25:
            black[:], white[:] = black[0], white[0]
        if abs(black.mean() - white.mean()) < 0.3:  # else the drawing would be all but invisible
            black, white = (black / 3, 1 - (1 - white) / 3) if draws.random() < 0.5 else (1 - (1 - black) / 3, white / 3)
    elif chance[1] < 0.75:
        black, white = white, black
    levels = _LEVELS ** math.exp(1.2 * (chance[2] - 0.5))
    table = black[:, None] * 255 + ((white - black)[:, None] * 255) * levels
    bytes_table: npt.NDArray[np.uint8] = np.rint(table).astype(np.uint8)
    recoloured: npt.NDArray[np.uint8] = bytes_table.ravel().take(np.asarray(image) + _CHANNELS)
    return recoloured


def _light(pixels: npt.NDArray[np.uint8], edge: int, chance: list[float], draws: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Uneven light on two fifths of the pictures, noise on half of them."""
    if chance[0] > 0.4 and chance[1] > 0.5:
        return pixels
    changed = pixels.astype(np.float32)
    if chance[0] < 0.4:
        ramp = np.linspace(-1, 1, edge, dtype=np.float32)
        across, down = draws.uniform(-50, 50, size=2).astype(np.float32)
        changed += across * ramp[None, :, None] + down * ramp[:, None, None]
    if chance[1] < 0.5:
        changed += draws.standard_normal(pixels.shape, dtype=np.float32) * np.float32(30 * chance[2])
    return changed.clip(0, 255).astype(np.uint8)
