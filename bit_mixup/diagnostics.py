"""How does a model behave between, around and against its examples?

Measurements on a trained model, in evaluation mode; nothing about it is changed. All take normalised pictures on the model's
device in micro-batches, whose size has no say.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bit_mixup.errors import ConfigError, DataError
from bit_mixup.models import Normalize
from bit_mixup.sampling import Purpose, generator

EXACT_CLASSES = 32  # up to which a Jacobian is computed class by class
PROBES = 16
GREY_LEVELS = 255


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients of parameters; afterwards as before."""
    training, wanted = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(training)
        for parameter, before in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(before)


def _input_gradient(model: torch.nn.Module, images: Tensor, loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (n, K), and the gradient (n, 3, H, W) of a loss that is summed over examples."""
    images = images.detach().requires_grad_()
    logits = model(images)
    (gradient,) = torch.autograd.grad(loss_of(logits), images)
    return logits.detach(), gradient


@dataclass(frozen=True, kw_only=True)
class InBetween:
    """Behaviour on the line between two examples of different class.

    Args:
        lams: weights of the first example.
        miss_rate: share of pairs, for each lam, whose predicted class is that of neither.
        gradient_norm: mean Euclidean norm, for each lam, of the gradient with respect to the normalised input of the
            cross-entropy to the mixed label.
        pairs: how many.
    """

    lams: list[float]
    miss_rate: list[float]
    gradient_norm: list[float]
    pairs: int

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def choose_opponents(labels: Tensor, *, seed: int = 0) -> Tensor:
    """For each example (N,) the index of a random one of another class.

    Raises:
        DataError: all are of one class.
    """
    values = labels.cpu().numpy()
    if len(np.unique(values)) < 2:
        raise DataError("pairs of different class are needed, but all examples are of one class. Give more examples.")
    opponents = []
    for index, label in enumerate(values.tolist()):
        others = np.flatnonzero(values != label)
        opponents.append(int(others[generator(seed, Purpose.DIAGNOSTICS, index).integers(len(others))]))
    return torch.tensor(opponents, device=labels.device)


def in_between(
    model: torch.nn.Module, images: Tensor, labels: Tensor, *, lams: Sequence[float], seed: int = 0, batch_size: int = 64
) -> InBetween:
    """Measures `InBetween` for a random partner of each example, after the idea of Zhang et al. ("mixup", 2018, figure 2).

    Args:
        model: maps (n, 3, H, W) to (n, K).
        images: normalised, (N, 3, H, W).
        labels: (N,) int64.
        lams: weights of the first example, in [0, 1].
        seed: of the pairs.
        batch_size: pairs at a time.

    Raises:
        DataError: all examples are of one class.
    """
    opponents = choose_opponents(labels, seed=seed)
    misses, norms = [], []
    with _frozen(model):
        for lam in lams:
            missed, total = 0, 0.0
            for rows in torch.arange(len(images), device=images.device).split(batch_size):
                others = opponents[rows]
                mixed = lam * images[rows] + (1 - lam) * images[others]

                def loss_of(logits: Tensor, rows: Tensor = rows, others: Tensor = others, lam: float = lam) -> Tensor:
                    pair = [F.cross_entropy(logits, labels[which], reduction="sum") for which in (rows, others)]
                    return lam * pair[0] + (1 - lam) * pair[1]

                logits, gradient = _input_gradient(model, mixed, loss_of)
                predicted = logits.argmax(1)
                missed += int(((predicted != labels[rows]) & (predicted != labels[others])).sum())
                total += float(gradient.flatten(1).norm(dim=1).sum())
            misses.append(missed / len(images))
            norms.append(total / len(images))
    return InBetween(lams=list(lams), miss_rate=misses, gradient_norm=norms, pairs=len(images))


def jacobian_norms(
    model: torch.nn.Module, images: Tensor, *, seed: int = 0, probes: int | None = None, batch_size: int = 64
) -> Tensor:
    """Frobenius norm of the Jacobian of the logits with respect to the normalised input, (N,), of each picture.

    Exact, by a backward pass for each class, with up to 32 classes and no `probes`; otherwise the root of an unbiased estimate of
    its square, the mean of |v^T J|^2 over random sign vectors v that are drawn for each picture.

    Args:
        model: maps (n, 3, H, W) to (n, K).
        images: normalised, (N, 3, H, W).
        seed: of the sign vectors.
        probes: how many sign vectors; None: exact up to 32 classes, else 16.
        batch_size: pictures at a time.
    """
    squares = []
    with _frozen(model):
        for rows in torch.arange(len(images)).split(batch_size):
            inputs = images[rows.to(images.device)].detach().requires_grad_()
            logits = model(inputs)
            classes = logits.shape[1]
            if probes is None and classes <= EXACT_CLASSES:
                directions = torch.eye(classes).expand(len(rows), -1, -1)
            else:
                directions = torch.stack([_signs(int(row), probes or PROBES, classes, seed) for row in rows])
            total = torch.zeros(len(rows), dtype=images.dtype, device=images.device)
            for direction in directions.to(logits).unbind(1):
                (gradient,) = torch.autograd.grad((logits * direction).sum(), inputs, retain_graph=True)
                total += gradient.flatten(1).square().sum(1)
            squares.append(total if probes is None and classes <= EXACT_CLASSES else total / directions.shape[1])
    return torch.cat(squares).sqrt()


def _signs(row: int, probes: int, classes: int, seed: int) -> Tensor:
    """Random signs (probes, classes) of one picture."""
    drawn = generator(seed, Purpose.DIAGNOSTICS, row).integers(0, 2, size=(probes, classes))
    return torch.from_numpy(2.0 * drawn - 1)


def attack(
    model: torch.nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    normalize: Normalize,
    epsilon: float,
    steps: int = 1,
    batch_size: int = 64,
) -> Tensor:
    """Pictures changed by at most epsilon grey levels so that the cross-entropy to their labels grows, normalised as they came.

    One step moves each pixel by epsilon along the sign of the gradient (FGSM; Goodfellow et al., 2015). Several steps move by
    epsilon / steps each, and by 1 grey level at least, and never leave the ball of epsilon (iterative FGSM; Kurakin et al.,
    2017). Pixels stay between black and white.

    Args:
        model: maps (n, 3, H, W) to (n, K).
        images: normalised, (N, 3, H, W).
        labels: (N,) int64.
        normalize: how pixels were normalised.
        epsilon: in grey levels of 255.
        steps: of the attack, at least 1.
        batch_size: pictures at a time.

    Raises:
        ConfigError: epsilon is negative or steps are below 1.
    """
    if not epsilon >= 0 or steps < 1:
        raise ConfigError(f"an attack needs epsilon of 0 or more and 1 step or more, not {epsilon} and {steps}.")
    if epsilon == 0:
        return images.clone()
    mean, std = normalize.constants(images)
    ball = epsilon / GREY_LEVELS / std
    black, white = -mean / std, (1 - mean) / std
    stride = ball if steps == 1 else max(epsilon / steps, min(1.0, epsilon)) / GREY_LEVELS / std
    found = []
    with _frozen(model):
        for rows in torch.arange(len(images), device=images.device).split(batch_size):
            own, wanted = images[rows], labels[rows]
            low, high = (own - ball).clamp(min=black), (own + ball).clamp(max=white)
            moved = own
            for _ in range(steps):
                _, gradient = _input_gradient(model, moved, lambda z, y=wanted: F.cross_entropy(z, y, reduction="sum"))  # type: ignore[misc]
                moved = (moved + stride * gradient.sign()).clamp(low, high)
            found.append(moved)
    return torch.cat(found)


@dataclass(frozen=True, kw_only=True)
class AdversarialErrors:
    """Error rates on pictures as they are and after attacks.

    Args:
        clean: of pictures as they are.
        fgsm: after one step.
        iterative_fgsm: after several.
        epsilon: in grey levels of 255.
        steps: of the iterative attack.
        transferred: whether the pictures were made to fool another model.
        caveat: to be shown wherever these are shown.
    """

    clean: float
    fgsm: float
    iterative_fgsm: float
    epsilon: float
    steps: int
    transferred: bool
    caveat: str = (
        "A measurement, not a defence: against iterative attacks that know the model mixup does next to nothing "
        "(Zhang et al., 2018, table 3)."
    )

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def adversarial_errors(
    model: torch.nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    normalize: Normalize,
    epsilon: float = 4.0,
    steps: int = 10,
    source: torch.nn.Module | None = None,
    batch_size: int = 64,
) -> AdversarialErrors:
    """Measures `AdversarialErrors`.

    Args:
        model: that is judged.
        images: normalised, (N, 3, H, W).
        labels: (N,) int64.
        normalize: how pixels were normalised.
        epsilon: in grey levels of 255.
        steps: of the iterative attack.
        source: the model that the pictures are made to fool, for a transferred attack. None: the model itself (white box).
        batch_size: pictures at a time.
    """

    def error(pictures: Tensor) -> float:
        with _frozen(model), torch.no_grad():
            wrong = sum(int((model(x).argmax(1) != y).sum()) for x, y in _pairs(pictures, labels, batch_size))
        return wrong / len(labels)

    def attacked(count: int) -> Tensor:
        return attack(source or model, images, labels, normalize=normalize, epsilon=epsilon, steps=count, batch_size=batch_size)

    return AdversarialErrors(
        clean=error(images),
        fgsm=error(attacked(1)),
        iterative_fgsm=error(attacked(steps)),
        epsilon=epsilon,
        steps=steps,
        transferred=source is not None,
    )


def _pairs(images: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(images.split(batch_size), labels.split(batch_size), strict=True)
