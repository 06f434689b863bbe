"""What should training look like, given only the size of the data set and of its images?

The BiT-HyperRule (Kolesnikov et al., "Big Transfer (BiT): General Visual Representation Learning", 2020, section 3.3) in the
form of the authors' PyTorch code (google-research/big_transfer: `bit_hyperrule.py`), where it differs from the paper.
Pure Python: this file can be read, tested and used without torch.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from bit_mixup.errors import ConfigError

Preset = Literal["code", "paper", "light"]
SizeClass = Literal["small", "medium", "large"]
LamLaw = Literal["step", "example"]

SMALL = 20_000  # examples; a data set of exactly this many is "medium"
MEDIUM = 500_000  # examples; a data set of exactly this many is "large"
SMALL_IMAGE_AREA = 96 * 96  # square pixels; an image of exactly this area is not small
RULE_MIXUP_ALPHA = 0.1

_DECAY_STEPS = {
    "small": (200, 300, 400),
    "medium": (3_000, 6_000, 9_000),
    "large": (6_000, 12_000, 18_000),
}
_TOTAL_STEPS = {"small": 500, "medium": 10_000, "large": 20_000}
_WARMUP_STEPS = {"small": 100, "medium": 500, "large": 500}


@dataclass(frozen=True, kw_only=True)
class HyperParameters:
    """Every number that training depends on; nothing in it is left to be decided later.

    Args:
        resize_size: edge in pixels of the square that a training image is resized to.
        crop_size: edge in pixels of the random crop; evaluation resizes straight to it.
        steps: optimizer steps.
        warmup_steps: steps over which the rate rises linearly from 0; 0 for none.
        decay_steps: the rate falls ten-fold after each of these steps.
        batch_size: examples per optimizer step, over all processes and micro-batches.
        base_lr: the rate between warm-up and the first decay. Never scaled by the batch size.
        momentum: of SGD, without dampening or Nesterov's correction.
        weight_decay: of SGD; BiT transfers without.
        mixup_alpha: both parameters of the Beta distribution of lam; 0 turns mixup off, `inf` mixes half and half.

    Raises:
        ConfigError: a value is out of its range, or two of them contradict each other.
    """

    resize_size: int
    crop_size: int
    steps: int
    warmup_steps: int
    decay_steps: tuple[int, ...]
    batch_size: int = 512
    base_lr: float = 0.003
    momentum: float = 0.9
    weight_decay: float = 0.0
    mixup_alpha: float = 0.0

    def __post_init__(self) -> None:
        for name in ("resize_size", "crop_size", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.crop_size > self.resize_size:
            raise ConfigError(
                f"crop_size {self.crop_size} is larger than resize_size {self.resize_size}: a crop is cut from the resized "
                "image. Lower crop_size or raise resize_size."
            )
        if not 0 <= self.warmup_steps <= self.steps:
            raise ConfigError(f"warmup_steps is {self.warmup_steps}; it must lie between 0 and steps {self.steps}.")
        if list(self.decay_steps) != sorted(self.decay_steps) or any(s < 0 for s in self.decay_steps):
            raise ConfigError(f"decay_steps {self.decay_steps} must be in rising order, none of them negative.")
        if not (math.isfinite(self.base_lr) and self.base_lr > 0):
            raise ConfigError(f"base_lr is {self.base_lr}; it must be a finite number above 0 (the rule's is 0.003).")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum is {self.momentum}; it must be at least 0 and below 1 (the rule's is 0.9).")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"weight_decay is {self.weight_decay}; it must be 0 or a positive number.")
        if math.isnan(self.mixup_alpha) or self.mixup_alpha < 0:
            raise ConfigError(f"mixup_alpha is {self.mixup_alpha}; it must be 0 (off) or positive (`inf` mixes half and half).")
        if self.mixup_alpha > 0 and self.batch_size == 1:
            raise ConfigError(
                "mixup needs a second example, but batch_size is 1. Raise batch_size, or turn mixup off with mixup_alpha 0."
            )


def size_class(num_examples: int) -> SizeClass:
    """The rule's class of a data set by its number of training examples: below 20,000, below 500,000, or more."""
    if num_examples < SMALL:
        return "small"
    return "medium" if num_examples < MEDIUM else "large"


def bit_hyperrule(
    num_examples: int, image_area: float, *, preset: Preset = "code", architecture: str = "resnetv2_50x1_bit"
) -> HyperParameters:
    """The BiT-HyperRule's choice for a data set.

    Args:
        num_examples: examples trained on (after few-shot sampling and any split).
        image_area: median area of the images in square pixels. Below 96 x 96 they count as small.
        preset: "code" is the authors' PyTorch code: warm-up, decays at fixed steps, large images at 512 / 480 px.
            "paper" is the text of section 3.3: no warm-up, decays at 30, 60 and 90 % of the run, large images at 448 / 384 px
            (R152x4 at 512 / 480). "light" is "code" with batch 128 and base rate 0.001, the authors' setting for a small device.
        architecture: timm's name; the paper's resolution depends on it, nothing else does.

    Raises:
        ConfigError: no examples, or no area.
    """
    if num_examples < 1:
        raise ConfigError(f"the rule needs at least 1 training example, got {num_examples}.")
    if not image_area > 0:
        raise ConfigError(f"the rule needs a positive image area, got {image_area}.")
    size = size_class(num_examples)
    total = _TOTAL_STEPS[size]
    if image_area < SMALL_IMAGE_AREA:
        resize, crop = 160, 128
    elif preset == "paper" and not architecture.startswith("resnetv2_152x4_bit"):
        resize, crop = 448, 384
    else:
        resize, crop = 512, 480
    paper = preset == "paper"
    return HyperParameters(
        resize_size=resize,
        crop_size=crop,
        steps=total,
        warmup_steps=0 if paper else _WARMUP_STEPS[size],
        decay_steps=tuple(total * tenths // 10 for tenths in (3, 6, 9)) if paper else _DECAY_STEPS[size],
        batch_size=128 if preset == "light" else 512,
        base_lr=0.001 if preset == "light" else 0.003,
        mixup_alpha=0.0 if size == "small" else RULE_MIXUP_ALPHA,
    )


def scale_step(step: int, steps: int, new_steps: int) -> int:
    """Where `step` of a run of `steps` falls in a run of `new_steps`: in proportion, rounded half to even."""
    return round(step * new_steps / steps)


def learning_rate(step: int, hyper: HyperParameters) -> float:
    """The rate of one optimizer step, counted from 0.

    Warm-up gives 0 to step 0, so the first update moves no weight and only fills the momentum. After it the rate is
    `base_lr`, divided by 10 for each decay step that lies *strictly* before `step` (as in the reference: with a decay at
    200, step 200 still has the old rate).

    Raises:
        ValueError: the step is outside of the run.
    """
    if not 0 <= step < hyper.steps:
        raise ValueError(f"step {step} is outside of a run of {hyper.steps} steps.")
    if step < hyper.warmup_steps:
        return hyper.base_lr * step / hyper.warmup_steps
    lr = hyper.base_lr
    for decay_step in hyper.decay_steps:
        if decay_step < step:
            lr /= 10
    return lr


def rate_table(hyper: HyperParameters) -> list[tuple[int, int, float, float]]:
    """The schedule as pieces (first step, last step, rate at the first, rate at the last), for people to read."""
    starts = {0, hyper.warmup_steps} | {s + 1 for s in hyper.decay_steps}
    edges = [*sorted(s for s in starts if s < hyper.steps), hyper.steps]
    return [
        (first, end - 1, learning_rate(first, hyper), learning_rate(end - 1, hyper)) for first, end in itertools.pairwise(edges)
    ]
