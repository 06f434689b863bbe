"""What does mixup's loss consist of?

Carratino, Cisse, Jenatton and Vert ("On Mixup Regularization", 2022). Theorem 1: the loss on mixed pairs is that on modified
data x~ = mean + theta_bar (x - mean), y~ likewise, with noise of known covariance on both. Theorem 2: to second order in that
noise it is the loss on the modified data and four terms, R1 to R4. For cross-entropy R4 is 0; R2 holds second derivatives of the
network and is not built; and R1 + R3, which nearly cancel one another on confident examples, are computed as the one quadratic
form that they complete to a square. In a network of ReLUs alone R2 would be 0 between the kinks. In a BiT it is not, for
GroupNorm is curved: logits that do not change with the scale of x have second derivatives f''[x, v] = -f'[v].
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

from bit_mixup.theory import MixingMoments, label_entropy, mixing_moments, theta_quadrature

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class DataMeans:
    """The centre that mixup shrinks toward.

    Args:
        image: mean picture of the training set as the model sees it, (3, H, W), normalised.
        label: class frequencies (K,).
    """

    image: Tensor
    label: Tensor

    def to(self, like: Tensor) -> "DataMeans":
        """On the device and in the type of another tensor."""
        return DataMeans(image=self.image.to(like), label=self.label.to(like))


def shrink(values: Tensor, mean: Tensor, theta_bar: float) -> Tensor:
    """Values (N, ...) moved toward their mean (...): mean + theta_bar (values - mean)."""
    return mean + theta_bar * (values - mean)


def noise_covariances(values: Tensor, others: Tensor, moments: MixingMoments) -> Tensor:
    """Covariances of the noise that mixup puts on modified data, for each example: (N, D, E) (Theorem 1).

    sigma2 a_i b_i^T + gamma2 (1/N) sum_j a_j b_j^T, with the deviations a of `values` and b of `others` from their means. Inputs
    twice give that of the inputs, targets twice that of the targets, inputs and targets their cross-covariance, which is what
    tells mixup from independent noise with label smoothing. The noise itself has mean 0.

    Args:
        values: the whole training set, (N, D): flattened inputs, or targets.
        others: likewise (N, E), of the same examples.
        moments: of theta.
    """
    first, second = values - values.mean(0), others - others.mean(0)
    own = first[:, :, None] * second[:, None, :]
    return moments.sigma2 * own + moments.gamma2 * own.mean(0)


def quadratic_term(
    network: Network, images: Tensor, targets: Tensor, means: DataMeans, moments: MixingMoments, partners: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits at the modified inputs, and R1 + R3 of Theorem 2 for cross-entropy, summed over examples.

    For an example with deviations a = x - mean and b = y - mean of inputs and labels, and those of a partner a' and b', the term
    is sigma2 g(a, b) + gamma2 g(a', b') with g(v, w) = q^T H q / 2 - w^T q, q the derivative of the logits in the direction v,
    and H = diag(p) - p p^T at the softmax p of the modified input (derived from eq. 12 to 14). Its mean over all partners, the
    example itself among them, is exact; one random partner gives an unbiased estimate.

    Args:
        network: normalised images (N, 3, H, W) to logits (N, K).
        images: not modified.
        targets: (N, K), rows that sum to 1.
        means: of the training set.
        moments: of theta.
        partners: (N,) int64, index of each example's partner.
    """
    deviations, label_deviations = images - means.image, targets - means.label
    modified = means.image + moments.theta_bar * deviations
    logits, own = _jvp(network, modified, deviations)
    _, other = _jvp(network, modified, deviations[partners])
    probs = logits.softmax(1)

    def form(direction: Tensor, labels: Tensor) -> Tensor:
        square: Tensor = (probs * direction**2).sum(1) - (probs * direction).sum(1) ** 2
        return square / 2 - (labels * direction).sum(1)

    term = moments.sigma2 * form(own, label_deviations) + moments.gamma2 * form(other, label_deviations[partners])
    return logits, term.sum()


def _jvp(network: Network, images: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The network's outputs, and their derivative in a direction."""
    outputs: Any = jvp(network, (images,), (direction,))
    return outputs[0], outputs[1]


@dataclass(frozen=True, kw_only=True)
class LossParts:
    """The cross-entropy of mixup cut into parts, in nats, means over examples: mixup = erm + shrinkage + perturbation.

    Args:
        erm: on the examples as they are.
        shrinkage: what shrinking inputs and labels toward their means adds (label smoothing is in it).
        perturbation: what the noise around the shrunk examples adds, to all orders.
        mixup: on mixed pairs.
        floor: the least that `mixup` can be: the mean entropy of the mixed labels of the very pairs that were looked at.
    """

    erm: float
    shrinkage: float
    perturbation: float
    mixup: float
    floor: float

    def as_dict(self) -> dict[str, float]:
        """As plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def decompose_loss(
    network: Network,
    images: Tensor,
    labels: Tensor,
    means: DataMeans,
    *,
    alpha: float,
    nodes: int = 8,
    shifts: int | None = None,
    batch_size: int = 64,
) -> LossParts:
    """Measures `LossParts` on some examples, by quadrature over theta and without drawing.

    Args:
        network: normalised images (N, 3, H, W) to logits (N, K).
        images: normalised, (N, 3, H, W).
        labels: (N,) int64.
        means: of the training set; the means of these very examples make the parts those of Theorem 1.
        alpha: of mixup.
        nodes: of the quadrature.
        shifts: how many cyclic shifts of the examples serve as partners; None takes all N, the example itself too. For a few
            shifts to stand for all, the examples must be in random order.
        batch_size: examples at a time.
    """

    def loss_of(inputs: Tensor, outputs: Tensor) -> float:
        pairs = zip(inputs.split(batch_size), outputs.split(batch_size), strict=True)
        return sum(float(F.cross_entropy(network(x).to(y.dtype), y, reduction="sum")) for x, y in pairs) / len(inputs)

    theta, weights = theta_quadrature(alpha, nodes=nodes)
    targets = F.one_hot(labels, len(means.label)).to(images)
    count = len(images)
    offsets = list(range(count))
    if shifts is not None and count > 1:
        shifts = min(shifts, count - 1)
        offsets = [1 + index * (count - 1) // shifts for index in range(shifts)]
    mixed = 0.0
    for value, weight in zip(theta.tolist(), weights.tolist(), strict=True):
        for offset in offsets:
            pairs = [value * values + (1 - value) * values.roll(offset, 0) for values in (images, targets)]
            mixed += weight * loss_of(*pairs) / len(offsets)
    theta_bar = mixing_moments(alpha).theta_bar
    plain = loss_of(images, targets)
    shrunk = loss_of(shrink(images, means.image, theta_bar), shrink(targets, means.label, theta_bar))
    different = sum(float((labels != labels.roll(offset)).double().mean()) for offset in offsets) / len(offsets)
    return LossParts(
        erm=plain,
        shrinkage=shrunk - plain,
        perturbation=mixed - shrunk,
        mixup=mixed,
        floor=different * label_entropy(alpha),
    )
