"""What should the model's logits be close to, and how is the distance measured?"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bit_mixup.errors import ConfigError


class Objective(Protocol):
    """A loss that is summed over examples, so that micro-batches and processes add up to the whole batch.

    `cosine`: None for logits that are scalar products of features and the head's rows; else the factor of the cosines that take
    their place (`bit_mixup.models.forward`).
    """

    @property
    def cosine(self) -> float | None: ...

    def targets(self, labels: Tensor, *, num_classes: int, dtype: torch.dtype) -> Tensor:
        """What mixup mixes beside the images: (N, K), or (N, 0) where labels play no part."""
        ...

    def loss(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """The loss summed over examples, a number.

        Args:
            logits: (N, K) of the model.
            targets: (N, K) or (N, 0), mixed.
            images: (N, 3, H, W), normalised and mixed: the very ones that gave the logits.
        """
        ...

    def floor(self, targets: Tensor) -> Tensor:
        """The least that the loss could be for these targets, summed over examples."""
        ...


@dataclass(frozen=True)
class SoftmaxCrossEntropy:
    """One class for each picture: cross-entropy between the softmax and a distribution over classes."""

    cosine: ClassVar[float | None] = None

    def targets(self, labels: Tensor, *, num_classes: int, dtype: torch.dtype) -> Tensor:
        """Class indices (N,) as rows of 0 and a 1, (N, K)."""
        return F.one_hot(labels, num_classes).to(dtype)

    def loss(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """Sum over examples of -sum_k t_k log softmax_k."""
        return F.cross_entropy(logits, targets, reduction="sum")

    def floor(self, targets: Tensor) -> Tensor:
        """Sum over examples of the entropy of the targets."""
        entropy: Tensor = torch.special.entr(targets)
        return entropy.sum()


@dataclass(frozen=True)
class SigmoidCrossEntropy:
    """Any number of classes for each picture: binary cross-entropy, summed over classes, as BiT's upstream on ImageNet-21k."""

    cosine: ClassVar[float | None] = None

    def targets(self, labels: Tensor, *, num_classes: int, dtype: torch.dtype) -> Tensor:
        """Rows of 0 and 1, (N, K), as numbers."""
        return labels.to(dtype)

    def loss(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """Sum over examples and classes of -t log sigmoid - (1 - t) log (1 - sigmoid)."""
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")

    def floor(self, targets: Tensor) -> Tensor:
        """Sum over examples and classes of the entropy of a coin that falls so."""
        entropy: Tensor = torch.special.entr(targets) + torch.special.entr(1 - targets)
        return entropy.sum()


@dataclass(frozen=True)
class LargeMarginCosine:
    """Softmax cross-entropy of s (cos theta_k - m t_k): the right class must win by a margin, by its angle alone.

    Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", 2018, eq. 4, for targets t of 0 and 1; a mixed
    target takes its share of the margin. Neither a feature's length nor a class's can make up for a wrong angle, so pictures of a
    class lie close together, also those of classes that are met only later, with an example or two.

    Args:
        margin: m, at least 0 and below 1.
        cosine: s, above 0: logits lie between -s and s.

    Raises:
        ConfigError: one is out of its range.
    """

    margin: float
    cosine: float

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 1:
            raise ConfigError(f"margin is {self.margin}; it must be at least 0 and below 1 (the paper's is 0.35).")
        if not 0 < self.cosine < float("inf"):
            raise ConfigError(f"cosine_scale is {self.cosine}; it must be a positive number (the paper's is 64).")

    def targets(self, labels: Tensor, *, num_classes: int, dtype: torch.dtype) -> Tensor:
        """Class indices (N,) as rows of 0 and a 1, (N, K)."""
        return F.one_hot(labels, num_classes).to(dtype)

    def loss(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """Sum over examples of the cross-entropy, of logits that are s times a cosine."""
        return F.cross_entropy(logits - self.cosine * self.margin * targets, targets, reduction="sum")

    def floor(self, targets: Tensor) -> Tensor:
        """Sum over examples of the entropy of the targets: a bound that bounded logits come near, and never reach."""
        entropy: Tensor = torch.special.entr(targets)
        return entropy.sum()


class Distillation:
    """Function matching (Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", 2022, eq. 1).

    The student's distribution follows the teacher's on the same views and the same mixed images; there are no labels.
    The loss of an example is T^2 KL(softmax(teacher / T) || softmax(student / T)): with T^2 the size of the gradient depends
    little on T.

    Args:
        teacher: with as many classes as the student; is set to evaluation mode and never changed.
        temperature: T, above 0.

    Raises:
        ConfigError: temperature is not a positive number.
    """

    cosine: ClassVar[float | None] = None

    def __init__(self, teacher: torch.nn.Module, *, temperature: float = 1.0) -> None:
        if not 0 < temperature < float("inf"):
            raise ConfigError(f"temperature is {temperature}; it must be a positive number (the paper tries 1, 2, 5 and 10).")
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature = temperature

    def targets(self, labels: Tensor, *, num_classes: int, dtype: torch.dtype) -> Tensor:
        """Nothing, (N, 0)."""
        return torch.zeros(len(labels), 0, dtype=dtype, device=labels.device)

    def loss(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """Sum over examples of T^2 KL(teacher || student)."""
        with torch.no_grad():
            wanted = self.teacher(images).to(logits.dtype)
        return kl_divergence(wanted, logits, temperature=self.temperature).sum()

    def floor(self, targets: Tensor) -> Tensor:
        """0: a divergence."""
        return torch.zeros((), dtype=targets.dtype, device=targets.device)


def kl_divergence(teacher: Tensor, student: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each example in nats, (N,), from logits (N, K)."""
    wanted, given = (F.log_softmax(logits / temperature, dim=1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(given, wanted, reduction="none", log_target=True).sum(1)
