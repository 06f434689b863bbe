"""How are examples mixed?

mixup (Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", 2018, eq. 1): train on
lam * x_i + (1 - lam) * x_j with the target lam * y_i + (1 - lam) * y_j, lam ~ Beta(alpha, alpha). As in BiT's code lam is not
folded to one half and is drawn once for a whole optimizer step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bit_mixup.errors import ConfigError
from bit_mixup.hyperrule import LamLaw
from bit_mixup.laws import TrainingLaw
from bit_mixup.sampling import Purpose, generator
from bit_mixup.theory import check_alpha


def draw_lam(alpha: float, *, seed: int, index: int) -> float:
    """One mixing weight in [0, 1] from Beta(alpha, alpha): a pure function of the seed and of a step or position.

    alpha 0 gives 1 (nothing is mixed), alpha infinity gives one half.
    """
    if alpha == 0:
        return 1.0
    if math.isinf(alpha):
        return 0.5
    return float(generator(seed, Purpose.LAM, index).beta(alpha, alpha))


def choose_partners(start: int, groups: Sequence[int], *, seed: int) -> Tensor:
    """For each example of some consecutive groups the index of its partner, (N,) int64, counted from the first example.

    Each group is closed into one random cycle, and an example's partner is its successor: never itself, each example is the
    partner of exactly one, and each of the others is equally likely.

    Args:
        start: position of the first example in the run.
        groups: sizes of the groups, 2 or more each.
        seed: of the run.
    """
    partners = torch.empty(sum(groups), dtype=torch.int64)
    offset = 0
    for size in groups:
        cycle = torch.from_numpy(generator(seed, Purpose.PARTNER, start + offset).permutation(size))
        partners[offset + cycle] = offset + cycle.roll(-1)
        offset += size
    return partners


def mix(images: Tensor, targets: Tensor, lam: float | Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
    """Convex combinations of examples with their partners.

    Args:
        images: (N, C, H, W) float.
        targets: (N, K) float, rows that sum to 1.
        lam: the weight of the example itself, a number or (N,) in [0, 1].
        partners: (N,) int64, index of each example's partner.

    Returns:
        Mixed images and targets, of the shapes given. The arguments are left as they are.
    """
    return blend(images, images[partners], lam), blend(targets, targets[partners], lam)


def blend(values: Tensor, others: Tensor, lam: float | Tensor) -> Tensor:
    """lam * values + (1 - lam) * others, (N, ...); lam is a number or (N,)."""
    weight = lam.to(values, non_blocking=True).view(-1, *[1] * (values.ndim - 1)) if isinstance(lam, Tensor) else lam
    return values * weight + others * (1 - weight)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a micro-batch stands in a run: all that its draws depend on.

    Args:
        seed: of the run.
        step: the optimizer step.
        start: position of the first example in the run.
        groups: sizes of the groups that the micro-batch holds; they sum to its examples.
    """

    seed: int
    step: int
    start: int
    groups: Sequence[int]

    @property
    def count(self) -> int:
        """Examples in the micro-batch."""
        return sum(self.groups)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixing:
    """Weights and partners of the examples of a micro-batch, drawn.

    Args:
        lam: weight of the example itself in [0, 1], for all of them or (N,).
        partners: (N,) int64, index of each example's partner in the micro-batch. None: partners come along with the examples.
    """

    lam: float | Tensor
    partners: Tensor | None

    def __call__(self, values: Tensor, others: Tensor | None = None) -> Tensor:
        """(N, ...) convex combinations of values with those of partners, or with `others` where partners came along."""
        if self.partners is not None:
            others = values[self.partners]
        assert others is not None
        return blend(values, others, self.lam)


def draw_mixing(law: TrainingLaw, place: Place, device: torch.device) -> Mixing:
    """The weights and partners that a law gives to the examples at a place of the run."""
    folded = law.mixed != "both"
    if law.lam == "step":
        draw = draw_lam(law.alpha, seed=place.seed, index=place.step)
        lam: float | Tensor = max(draw, 1 - draw) if folded else draw
    else:
        positions = range(place.start, place.start + place.count)
        draws = torch.tensor([draw_lam(law.alpha, seed=place.seed, index=p) for p in positions], dtype=torch.float64)
        lam = torch.maximum(draws, 1 - draws) if folded else draws
    if law.loads_partners:
        return Mixing(lam=lam, partners=None)
    partners = choose_partners(place.start, place.groups, seed=place.seed)
    return Mixing(lam=lam, partners=partners.to(device, non_blocking=True))


@dataclass(frozen=True, kw_only=True)
class Mixup:
    """Plain mixup as a function of images, targets and their place in the run, for loops of your own.

    Args:
        alpha: both parameters of the Beta distribution of lam, from 0 (off) to infinity (always one half).
        lam: "step" draws one weight for all examples of an optimizer step, in all micro-batches and processes, as BiT does;
            "example" draws one for each position.

    Raises:
        ConfigError: a negative alpha or an unknown law.
    """

    alpha: float
    lam: LamLaw = "step"

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if self.lam not in ("step", "example"):
            raise ConfigError(f'mixup_lam is "{self.lam}"; it must be "step" or "example".')

    def __call__(
        self, images: Tensor, targets: Tensor, *, seed: int, step: int, start: int, groups: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Mixes a micro-batch of whole groups.

        Args:
            images: (N, C, H, W) float.
            targets: (N, K) float.
            seed: of the run.
            step: the optimizer step.
            start: position of the first example in the run.
            groups: sizes of the groups that the micro-batch holds; they sum to N.
        """
        if self.alpha == 0:
            return images, targets
        place = Place(seed=seed, step=step, start=start, groups=groups)
        mixing = draw_mixing(TrainingLaw(alpha=self.alpha, lam=self.lam), place, images.device)
        return mixing(images), mixing(targets)
