"""Does each training law do what it says to each example, however a batch is cut?"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.models.resnetv2 import ResNetV2
from torch import Tensor
from torch.func import jvp

from bit_mixup.data import load_image_dataset
from bit_mixup.errors import ConfigError
from bit_mixup.examples import EvaluationView, PartneredStream, TrainingStream, mean_image, same_class_candidates
from bit_mixup.expansion import DataMeans
from bit_mixup.hyperrule import HyperParameters
from bit_mixup.images import View
from bit_mixup.laws import TrainingLaw
from bit_mixup.losses import training_loss
from bit_mixup.mixup import Place, choose_partners, draw_lam
from bit_mixup.models import Normalize, forward, load_bit
from bit_mixup.objectives import SoftmaxCrossEntropy
from bit_mixup.prediction import nearest_neighbours, predict_features
from bit_mixup.runs import RunFolder
from bit_mixup.sampling import Purpose, cut_batch, generator
from bit_mixup.theory import mixing_moments
from bit_mixup.training import train

LAWS = {
    "ERM": TrainingLaw(),
    "mixup": TrainingLaw(alpha=0.4),
    "a weight for each example": TrainingLaw(alpha=0.4, lam="example"),
    "midpoints": TrainingLaw(alpha=math.inf),
    "inputs only": TrainingLaw(alpha=0.4, mixed="inputs"),
    "labels only": TrainingLaw(alpha=0.4, mixed="labels", lam="example"),
    "same class": TrainingLaw(alpha=0.4, partner="same_class"),
    "neighbours, inputs only": TrainingLaw(alpha=1.0, partner="neighbours", mixed="inputs", lam="example"),
    "smoothing": TrainingLaw(label_smoothing=0.1),
    "smoothing toward frequencies": TrainingLaw(label_smoothing=0.2, smooth_toward="frequencies"),
    "inputs and smoothing": TrainingLaw(alpha=1.0, mixed="inputs", label_smoothing=0.1),
    "noise": TrainingLaw(input_noise=0.1),
    "dropout": TrainingLaw(feature_dropout=0.5),
    "mixup and dropout": TrainingLaw(alpha=0.4, feature_dropout=0.3),
    **{f"after stage {stage}": TrainingLaw(alpha=1.0, stage=stage) for stage in (1, 2, 3, 4)},
    "modified data": TrainingLaw(alpha=0.4, form="modified"),
    "approximate mixup": TrainingLaw(alpha=0.4, form="approximate"),
    "cool-down": TrainingLaw(alpha=0.4, cool_down=0.5),
    "everything": TrainingLaw(
        alpha=0.4, lam="example", label_smoothing=0.1, smooth_toward="frequencies", input_noise=0.05, feature_dropout=0.2
    ),
}
VIEW = View(resize_size=48, crop_size=40, flip=False, interpolation="bilinear")
PLACE = Place(seed=5, step=3, start=48, groups=(8, 4))
COUNT = PLACE.count


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, DataMeans]:
    """Twelve pictures, with twelve partners behind, their targets, and means."""
    labels = torch.arange(2 * COUNT) % 4
    means = DataMeans(image=numbers(3, 40, 40, seed=2) / 4, label=torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64))
    return numbers(2 * COUNT, 3, 40, 40, seed=1), F.one_hot(labels, 4).double(), means


def loss_of_one(law: TrainingLaw, model: ResNetV2, index: int, images: Tensor, targets: Tensor, means: DataMeans) -> Tensor:
    """The loss of one example of the batch, written out."""
    position = PLACE.start + index
    lam = draw_lam(law.alpha, seed=PLACE.seed, index=PLACE.step if law.lam == "step" else position) if law.alpha else 1.0
    lam = max(lam, 1 - lam) if law.mixed != "both" else lam
    partner = COUNT + index if law.partner != "all" else int(choose_partners(PLACE.start, PLACE.groups, seed=PLACE.seed)[index])
    x, y, other_x, other_y = images[index], targets[index], images[partner], targets[partner]
    moments = mixing_moments(law.alpha)
    drawn = generator(PLACE.seed, Purpose.DROPOUT, position).random(int(model.num_features)) < 1 - law.feature_dropout
    mask = torch.from_numpy(drawn).double() / (1 - law.feature_dropout)
    head = model.get_classifier()

    def logits_of(picture: Tensor) -> Tensor:
        maps = model.stem(picture[None])
        for number, stage in enumerate(model.stages, start=1):
            maps = stage(maps)
            if law.stage == number:
                other = model.stem(other_x[None])
                for block in list(model.stages)[:number]:
                    other = block(other)
                maps = lam * maps + (1 - lam) * other
        features = model.norm(maps).mean((2, 3))[0]
        return head.weight[:, :, 0, 0] @ (features * mask) + head.bias

    if law.form != "exact":
        deviation, label_deviation = x - means.image, y - means.label
        x, y = means.image + moments.theta_bar * deviation, means.label + moments.theta_bar * label_deviation
        loss = -(y * logits_of(x).log_softmax(0)).sum()
        if law.form == "modified":
            return loss
        probs = logits_of(x).softmax(0)
        hessian = probs.diag() - torch.outer(probs, probs)
        for share, a, b in (
            (moments.sigma2, deviation, label_deviation),
            (moments.gamma2, other_x - means.image, other_y - means.label),
        ):
            q = jvp(logits_of, (x,), (a,))[1]
            loss = loss + share * (q @ hessian @ q / 2 - b @ q)
        return loss
    if law.alpha and law.mixed != "labels" and not law.stage:
        x = lam * x + (1 - lam) * other_x
    if law.alpha and law.mixed != "inputs":
        y = lam * y + (1 - lam) * other_y
    if law.input_noise:
        drawn = torch.from_numpy(generator(PLACE.seed, Purpose.NOISE, position).standard_normal((3, 40, 40)))
        x = x + law.input_noise * drawn / 0.5  # pixels from 0 to 1 are normalised by a standard deviation of one half
    toward = means.label if law.smooth_toward == "frequencies" else torch.full((4,), 0.25, dtype=torch.float64)
    y = (1 - law.label_smoothing) * y + law.label_smoothing * toward
    return -(y * logits_of(x).log_softmax(0)).sum()


@pytest.mark.parametrize("name", LAWS)
def test_gradient_of_a_batch_is_that_of_a_loop_over_examples(
    name: str, tiny_bit: Path, batch: tuple[Tensor, Tensor, DataMeans]
) -> None:
    law, (images, targets, means) = LAWS[name], batch
    model = load_bit(str(tiny_bit), keep_head=True).double()
    with torch.no_grad():
        model.get_classifier().weight.mul_(20)  # sure of itself: second derivatives count
    own = slice(None) if law.loads_partners else slice(COUNT)
    loss, _ = training_loss(
        model, images[own], targets[own], law=law, mixes=law.alpha > 0, means=means, objective=SoftmaxCrossEntropy(), place=PLACE
    )
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    expected = sum(loss_of_one(law, model, index, images, targets, means) for index in range(COUNT))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    for parameter_name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().clamp(min=1e-6)
        assert float((gradients[parameter_name] - parameter.grad).abs().max() / scale) < 1e-8, parameter_name


def test_laws_differ(tiny_bit: Path, batch: tuple[Tensor, Tensor, DataMeans]) -> None:
    images, targets, means = batch
    model = load_bit(str(tiny_bit), keep_head=True).double()
    losses = {}
    for name, law in LAWS.items():
        own = slice(None) if law.loads_partners else slice(COUNT)
        with torch.no_grad():
            losses[name] = float(
                training_loss(
                    model, images[own], targets[own], law=law, mixes=law.alpha > 0, means=means, objective=SoftmaxCrossEntropy(),
                    place=PLACE,
                )[0]
            )  # fmt: skip
    assert losses.pop("cool-down") == losses["mixup"]
    assert len(set(losses.values())) == len(losses)


def test_excess_loss_is_a_divergence_from_the_targets(tiny_bit: Path, batch: tuple[Tensor, Tensor, DataMeans]) -> None:
    images, targets, means = batch
    model = load_bit(str(tiny_bit), keep_head=True).double()
    lam = draw_lam(1.0, seed=PLACE.seed, index=PLACE.step)
    partners = choose_partners(PLACE.start, PLACE.groups, seed=PLACE.seed)
    mixed = lam * targets[:COUNT] + (1 - lam) * targets[:COUNT][partners]
    law = TrainingLaw(alpha=1.0)
    loss, floor = training_loss(
        model, images[:COUNT], targets[:COUNT], law=law, mixes=True, means=means, objective=SoftmaxCrossEntropy(), place=PLACE
    )
    entropy = -sum(float(p) * math.log(float(p)) for row in mixed for p in row if p > 0)
    assert floor.item() == pytest.approx(entropy, abs=1e-12)
    logits = forward(model, lam * images[:COUNT] + (1 - lam) * images[:COUNT][partners])
    divergence = F.kl_div(logits.log_softmax(1), mixed, reduction="sum")
    assert (loss - floor).item() == pytest.approx(divergence.item(), rel=1e-10)


@pytest.fixture(scope="module")
def stream() -> TrainingStream:
    return TrainingStream(part=load_image_dataset("digits", examples_per_class=5).train, view=VIEW, seed=3)


def trained(
    name: str, tiny_bit: Path, stream: TrainingStream, folder: Path, micro_batch: int
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights after eight steps in double precision."""
    law = LAWS[name]
    model = load_bit(str(tiny_bit), num_classes=10).double()
    hyper = HyperParameters(
        resize_size=48, crop_size=40, steps=8, warmup_steps=2, decay_steps=(), batch_size=24, base_lr=0.003, mixup_alpha=law.alpha
    )
    source: TrainingStream | PartneredStream = stream
    if law.partner == "same_class":
        source = PartneredStream(stream=stream, candidates=same_class_candidates(stream.part.labels))
    elif law.partner == "neighbours":
        features = numbers(len(stream.part), 5, seed=9)
        source = PartneredStream(stream=stream, candidates=nearest_neighbours(features, 3))
    image = torch.from_numpy(mean_image(stream.part, VIEW, seed=3)) * 2 - 1
    means = DataMeans(image=image, label=torch.full((10,), 0.1))
    folder.mkdir()
    train(
        model, source, hyper, Accelerator(cpu=True), law=law, means=means, cuts=cut_batch(24, micro_batch=micro_batch),
        run=RunFolder(folder), seed=3, save_every=100,
    )  # fmt: skip
    return [row["loss"] for row in RunFolder(folder).read_metrics()], model.state_dict()


@pytest.mark.parametrize("name", LAWS)
def test_no_cut_of_the_batch_has_a_say(name: str, tiny_bit: Path, stream: TrainingStream, tmp_path: Path) -> None:
    losses, whole = trained(name, tiny_bit, stream, tmp_path / "whole", 24)
    other_losses, cut = trained(name, tiny_bit, stream, tmp_path / "cut", 8)
    assert losses == pytest.approx(other_losses, rel=1e-9)
    assert len(losses) == 8
    assert max(float((whole[n] - cut[n]).abs().max() / whole[n].abs().max().clamp(min=1e-3)) for n in whole) < 1e-9


def test_cool_down_mixes_first_and_then_no_more(tiny_bit: Path, stream: TrainingStream, tmp_path: Path) -> None:
    law = LAWS["cool-down"]
    assert [law.mixes_at(step, 8) for step in range(8)] == [True] * 4 + [False] * 4
    assert [TrainingLaw(alpha=1, cool_down=1.0).mixes_at(step, 3) for step in range(3)] == [False] * 3
    assert all(TrainingLaw(alpha=1).mixes_at(step, 3) for step in range(3))
    mixed, _ = trained("mixup", tiny_bit, stream, tmp_path / "mixed", 24)
    cooled, _ = trained("cool-down", tiny_bit, stream, tmp_path / "cooled", 24)
    assert cooled[:4] == mixed[:4]
    assert cooled[4] != mixed[4]
    rows = RunFolder(tmp_path / "cooled").read_metrics()
    assert all(row["excess_loss"] < row["loss"] - 1e-3 for row in rows[:4])
    assert all(row["excess_loss"] == row["loss"] for row in rows[4:]), "plain labels have no entropy"


def test_partners_of_the_same_class_are_of_the_same_class_and_of_all_of_it(stream: TrainingStream) -> None:
    labels = stream.part.labels
    partnered = PartneredStream(stream=stream, candidates=same_class_candidates(labels))
    positions = range(2000)
    pairs = [(stream.row(p), partnered.partner(p)) for p in positions]
    assert all(labels[a] == labels[b] and a != b for a, b in pairs)
    assert len(set(pairs)) == len(labels) * 4, "each of the four others"
    images, both = partnered.__getitems__([7, 8])
    assert both.tolist() == labels[[stream.row(7), stream.row(8), partnered.partner(7), partnered.partner(8)]].tolist()
    assert np.array_equal(images[:2], stream.__getitems__([7, 8])[0])
    again, _ = partnered.__getitems__([8])
    assert np.array_equal(again, images[[1, 3]]), "a position has one partner, whatever is asked for beside it"
    assert partnered.ids([7]) == stream.ids([7])


def test_an_only_example_of_its_class_is_its_own_partner() -> None:
    assert [found.tolist() for found in same_class_candidates(np.array([2, 0, 2, 1]))] == [[2], [1], [0], [3]]


def test_nearest_neighbours_against_a_loop() -> None:
    points = numbers(30, 4, seed=0)
    for chunk in (7, 64):
        found = nearest_neighbours(points, 3, chunk=chunk)
        for i, neighbours in enumerate(found):
            distances = [(float((points[i] - points[j]).norm()), j) for j in range(30) if j != i]
            assert neighbours.tolist() == [j for _, j in sorted(distances)[:3]]
    assert [n.tolist() for n in nearest_neighbours(points[:2], 5)] == [[1], [0]]
    assert [n.tolist() for n in nearest_neighbours(points[:1], 5)] == [[0]]


def test_features_are_those_before_the_head(tiny_bit: Path, stream: TrainingStream) -> None:
    model = load_bit(str(tiny_bit), keep_head=True)
    view = EvaluationView(part=stream.part, view=VIEW)
    features = predict_features(model, view, Accelerator(cpu=True), batch_size=16)
    head = model.get_classifier()
    images = Normalize.of(model)(torch.from_numpy(view.__getitems__(range(50))[0]))
    expected = model.eval()(images)
    torch.testing.assert_close(features @ head.weight[:, :, 0, 0].T + head.bias, expected, atol=1e-4, rtol=1e-4)


def test_mean_picture_is_a_mean(stream: TrainingStream) -> None:
    expected = np.mean([VIEW.evaluate(picture) / 255 for picture in stream.part.read(range(50))], axis=0)
    np.testing.assert_allclose(mean_image(stream.part, VIEW, seed=1), expected, atol=1e-7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": -1}, "alpha is -1"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"feature_dropout": -0.1}, "feature_dropout is -0.1"),
        ({"cool_down": 1.1, "alpha": 1}, "cool_down is 1.1"),
        ({"input_noise": math.nan}, "input_noise is nan"),
        ({"stage": 5, "alpha": 1}, "mixup_stage is 5"),
        ({"stage": 1, "alpha": 1, "partner": "same_class"}, "mixup_stage mixes features of the batch"),
        ({"stage": 1, "alpha": 1, "mixed": "labels"}, "mixup_stage mixes features of the batch"),
        ({"partner": "same_class"}, "mixup_partner is same_class, but nothing is mixed"),
        ({"mixed": "inputs"}, "mixup_of is inputs, but nothing is mixed"),
        ({"stage": 2}, "mixup_stage is 2, but nothing is mixed"),
        ({"cool_down": 0.5}, "cool_down is 0.5, but nothing is mixed"),
        ({"form": "modified"}, "mixup_form is modified, but nothing is mixed"),
        ({"form": "approximate", "alpha": 1, "label_smoothing": 0.1}, "mixup_form approximate stands for plain mixup"),
        ({"form": "modified", "alpha": 1, "mixed": "inputs"}, "mixup_form modified stands for plain mixup"),
        ({"form": "approximate", "alpha": 1, "lam": "example"}, "no weights of single examples"),
        ({"smooth_toward": "frequencies"}, "smooth_toward says where smoothed labels go"),
    ],
)
def test_laws_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingLaw(**values)


def test_shrinks_of_a_law() -> None:
    theta_bar = mixing_moments(0.4).theta_bar
    shrinks = {name: (law.input_shrink, law.label_shrink) for name, law in LAWS.items()}
    assert shrinks["ERM"] == shrinks["noise"] == shrinks["dropout"] == (1, 1)
    assert shrinks["mixup"] == shrinks["approximate mixup"] == shrinks["modified data"] == pytest.approx((theta_bar, theta_bar))
    assert shrinks["inputs only"] == pytest.approx((theta_bar, 1))
    assert shrinks["labels only"] == pytest.approx((1, theta_bar))
    assert shrinks["same class"] == shrinks["neighbours, inputs only"] == (1, 1), "toward no common mean"
    assert shrinks["smoothing"] == pytest.approx((1, 0.9))
    assert shrinks["after stage 2"] == pytest.approx((1, 0.75))
    assert shrinks["everything"] == pytest.approx((theta_bar, 0.9 * theta_bar))
    assert shrinks["cool-down"] == pytest.approx(((1 + theta_bar) / 2,) * 2)


def test_double_smoothing_is_warned_of_with_the_total() -> None:
    [note] = TrainingLaw(alpha=0.4, label_smoothing=0.1).warnings()
    total = 1 - 0.9 * mixing_moments(0.4).theta_bar
    assert f"together {total:.3f}" in note
    assert TrainingLaw(label_smoothing=0.1).warnings() == []
    assert TrainingLaw(alpha=0.4).warnings() == []
    assert len(replace(TrainingLaw(alpha=0.4), form="approximate").warnings()) == 1
