"""What does a training law make of a batch?

Laws that change only pictures and labels share one line, the objective's loss of the network's logits. Mixing inside the
network and dropout change its forward pass, approximate mixup has a loss of its own; all have one signature.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bit_mixup.expansion import DataMeans, quadratic_term, shrink
from bit_mixup.laws import TrainingLaw
from bit_mixup.mixup import Place, choose_partners, draw_mixing
from bit_mixup.models import Change, LinearProbe, Network, Normalize, forward
from bit_mixup.objectives import Objective
from bit_mixup.sampling import Purpose, generator
from bit_mixup.theory import mixing_moments


def training_loss(
    model: Network,
    images: Tensor,
    targets: Tensor,
    *,
    law: TrainingLaw,
    mixes: bool,
    means: DataMeans | None,
    objective: Objective,
    place: Place,
) -> tuple[Tensor, Tensor]:
    """The loss of a micro-batch and the least that it could be, both summed over examples.

    Everything that is drawn is a function of the seed and of an example's position in the run, so the cut into processes and
    micro-batches has no say in it.

    Args:
        model: that is trained.
        images: (N, 3, H, W), normalised; (2 N, 3, H, W) with the partners behind, where the law loads them. Features (N, F) where
            the model is a `LinearProbe`.
        targets: (N, K) or (2 N, K) likewise, of the objective.
        law: what is done to them.
        mixes: whether this step mixes (`TrainingLaw.mixes_at`).
        means: of the training set, where `law.needs_means`.
        objective: the loss.
        place: of the micro-batch in the run.
    """
    if law.loads_partners:
        (images, other_images), (targets, other_targets) = images.chunk(2), targets.chunk(2)
    else:
        other_images, other_targets = images, targets
    centre = means.to(images) if means else None
    dropout = _dropout(law, place)
    if mixes and law.form == "approximate":
        assert centre is not None
        return _approximate_loss(model, images, targets, law, centre, objective, place, dropout)
    mixing = draw_mixing(law, place, images.device) if mixes and law.form == "exact" else None
    if mixing and law.stage == 0 and law.mixed != "labels":
        images = mixing(images, other_images)
    if mixing and law.mixed != "inputs":
        targets = mixing(targets, other_targets)
    if mixes and law.form == "modified":
        assert centre is not None
        theta_bar = mixing_moments(law.alpha).theta_bar
        images, targets = shrink(images, centre.image, theta_bar), shrink(targets, centre.label, theta_bar)
    images, targets = _add_noise(images, law, place, model), _smooth(targets, law, centre)
    change_stage = mixing if mixing and law.stage else None
    logits = forward(model, images, stage=law.stage, change_stage=change_stage, change_features=dropout, cosine=objective.cosine)
    return objective.loss(logits.to(targets.dtype), targets, images), objective.floor(targets)


def _approximate_loss(
    model: Network,
    images: Tensor,
    targets: Tensor,
    law: TrainingLaw,
    means: DataMeans,
    objective: Objective,
    place: Place,
    dropout: Change | None,
) -> tuple[Tensor, Tensor]:
    """Approximate mixup: the loss on the modified data and the quadratic term of its noise. It has no known least value."""
    moments = mixing_moments(law.alpha)
    partners = choose_partners(place.start, place.groups, seed=place.seed).to(images.device, non_blocking=True)

    def network(inputs: Tensor) -> Tensor:
        return forward(model, inputs, change_features=dropout)

    logits, term = quadratic_term(network, images, targets, means, moments, partners)
    modified = shrink(targets, means.label, moments.theta_bar)
    loss = objective.loss(logits.to(targets.dtype), modified, images) + term
    return loss, objective.floor(modified)


def _smooth(targets: Tensor, law: TrainingLaw, means: DataMeans | None) -> Tensor:
    """Targets (N, K) with the law's share of their weight spread over all classes, or by the class frequencies."""
    if not law.label_smoothing:
        return targets
    if law.smooth_toward == "frequencies":
        assert means is not None
        toward = means.label
    else:
        toward = torch.full_like(targets[0], 1 / targets.shape[1])
    return shrink(targets, toward, 1 - law.label_smoothing)


def _add_noise(images: Tensor, law: TrainingLaw, place: Place, model: Network) -> Tensor:
    """Normalised images (N, 3, H, W) with Gaussian noise of the law's size on the scale from black to white."""
    if not law.input_noise:
        return images
    positions = range(place.start, place.start + place.count)
    draws = [torch.from_numpy(generator(place.seed, Purpose.NOISE, p).standard_normal(images.shape[1:])) for p in positions]
    assert not isinstance(model, LinearProbe), "a law on features has no noise on pictures"
    _, std = Normalize.of(model).constants(images)
    return images + torch.stack(draws).to(images, non_blocking=True) * (law.input_noise / std)


def _dropout(law: TrainingLaw, place: Place) -> Callable[[Tensor], Tensor] | None:
    """Sets pooled features (N, F) to 0 with the law's probability and scales up the others; None without dropout."""
    if not law.feature_dropout:
        return None
    keep = 1 - law.feature_dropout

    def drop(features: Tensor) -> Tensor:
        positions = range(place.start, place.start + place.count)
        draws = [generator(place.seed, Purpose.DROPOUT, p).random(features.shape[1]) < keep for p in positions]
        return features * torch.from_numpy(np.stack(draws)).to(features, non_blocking=True) / keep

    return drop
