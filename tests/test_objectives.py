"""Are the losses what their formulas say, do teacher and student see the same, and is a new network what its seed says?"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor

from bit_mixup.catalog import ARCHITECTURES
from bit_mixup.data import load_image_dataset
from bit_mixup.errors import ConfigError, DataError, NonFiniteError, WeightsError
from bit_mixup.evaluation import evaluate_multi_label
from bit_mixup.examples import TrainingStream
from bit_mixup.hyperrule import HyperParameters
from bit_mixup.images import View
from bit_mixup.laws import TrainingLaw
from bit_mixup.mixup import Mixup
from bit_mixup.models import Normalize, create_bit, draw_head, forward, linear_head, load_bit
from bit_mixup.objectives import Distillation, LargeMarginCosine, SigmoidCrossEntropy, SoftmaxCrossEntropy, kl_divergence
from bit_mixup.runs import RunFolder
from bit_mixup.sampling import cut_batch
from bit_mixup.training import train as train_model
from bit_mixup.weights import find_network

PICTURES = torch.randn(6, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sigmoid_cross_entropy_of_numbers_by_hand() -> None:
    """Logits log 3 and -log 3 are probabilities 3/4 and 1/4; 0 is one half."""
    logits = torch.tensor([[math.log(3), -math.log(3), 0.0], [math.log(3), 0.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=torch.uint8)
    objective = SigmoidCrossEntropy()
    targets = objective.targets(labels, num_classes=3, dtype=torch.float64)
    assert (targets.dtype, targets.tolist()) == (torch.float64, [[1, 1, 0], [0, 0, 0]])
    expected = -math.log(3 / 4) - math.log(1 / 4) - math.log(1 / 2) + (-math.log(1 / 4) - 2 * math.log(1 / 2))
    assert objective.loss(logits, targets, PICTURES).item() == pytest.approx(expected, rel=1e-12)
    half = objective.loss(logits[:1], targets[:1] / 2, PICTURES).item()  # what mixup makes of a label
    expected = -(math.log(3 / 4) + math.log(1 / 4)) / 2 * 2 - math.log(1 / 2)
    assert half == pytest.approx(expected, rel=1e-12)


def test_softmax_cross_entropy_of_numbers_by_hand() -> None:
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], dtype=torch.float64)
    objective = SoftmaxCrossEntropy()
    targets = objective.targets(torch.tensor([0, 1]), num_classes=2, dtype=torch.float64)
    assert targets.tolist() == [[1, 0], [0, 1]]
    assert objective.loss(logits, targets, PICTURES).item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 2), rel=1e-12)


def test_large_margin_cosine_of_numbers_by_hand() -> None:
    """s = 2, m = 1/4; cosines 1 and 0, then 1/2 and 1 for the second class; and half of each class, with half of the margin."""
    objective = LargeMarginCosine(margin=0.25, cosine=2.0)
    logits = 2 * torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=torch.float64)
    targets = objective.targets(torch.tensor([0, 1]), num_classes=2, dtype=torch.float64)
    expected = math.log(1 + math.exp(0 - 1.5)) + math.log(1 + math.exp(1 - 1.5))
    assert objective.loss(logits, targets, PICTURES).item() == pytest.approx(expected, rel=1e-12)
    halves = torch.full((1, 2), 0.5, dtype=torch.float64)
    expected = math.log(math.exp(1.75) + math.exp(-0.25)) - (1.75 - 0.25) / 2
    assert objective.loss(logits[:1], halves, PICTURES).item() == pytest.approx(expected, rel=1e-12)
    assert (objective.floor(targets).item(), objective.floor(halves).item()) == (0, pytest.approx(math.log(2), rel=1e-12))
    plain = LargeMarginCosine(margin=0.0, cosine=2.0)
    assert plain.loss(logits, targets, PICTURES) == SoftmaxCrossEntropy().loss(logits, targets, PICTURES)


@pytest.mark.parametrize(("margin", "cosine"), [(-0.1, 1), (1, 1), (float("nan"), 1), (0.2, 0), (0.2, float("inf"))])
def test_other_margins_are_refused(margin: float, cosine: float) -> None:
    with pytest.raises(ConfigError, match="margin is" if cosine == 1 else "cosine_scale is"):
        LargeMarginCosine(margin, cosine)


def test_cosines_look_at_angles_alone_and_a_linear_head_keeps_their_order(tiny_bit: Path) -> None:
    model = load_bit(str(tiny_bit), num_classes=5).double().eval()
    draw_head(model, seed=0)
    weight = model.get_classifier().weight
    assert weight.flatten(1).norm(dim=1).tolist() == pytest.approx([1] * 5, abs=0.35)
    with torch.no_grad():
        model.get_classifier().bias.fill_(3)  # which has no say
        features = model.forward_head(model.forward_features(PICTURES.double()), pre_logits=True)
        rows = weight.flatten(1).clone()
        expected = torch.nn.functional.cosine_similarity(features[:, None], rows[None], dim=2)
        torch.testing.assert_close(forward(model, PICTURES.double(), cosine=7.0), 7 * expected, rtol=1e-10, atol=1e-10)
        weight.mul_(torch.tensor([1.0, 2, 3, 4, 5])[:, None, None, None])
        longer = forward(model, PICTURES.double(), change_features=lambda x: x * 9, cosine=7.0)
        torch.testing.assert_close(longer, 7 * expected, rtol=1e-10, atol=1e-10)
        model.get_classifier().bias.zero_()
        linear_head(model, PICTURES.double().split(4), cosine=7.0)
        lengths = features.norm(dim=1)
        torch.testing.assert_close(model(PICTURES.double()), 7 * expected * (lengths / lengths.mean())[:, None])


@pytest.mark.parametrize("objective", [SoftmaxCrossEntropy(), SigmoidCrossEntropy()], ids=lambda o: type(o).__name__)
def test_losses_add_up_over_any_cut(objective: Any) -> None:
    logits, targets = noise(12, 5), noise(12, 5, seed=1).softmax(1)
    whole = objective.loss(logits, targets, PICTURES)
    parts = [objective.loss(logits[rows], targets[rows], PICTURES) for rows in (slice(0, 7), slice(7, 8), slice(8, 12))]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_kl_divergence_of_two_classes_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2). At temperature 2 the teacher's odds are the root of 3."""
    teacher, student = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    cold = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    assert kl_divergence(teacher, student).tolist() == pytest.approx([cold], rel=1e-12)
    p = math.sqrt(3) / (1 + math.sqrt(3))
    warm = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert kl_divergence(teacher, student, temperature=2).tolist() == pytest.approx([warm], rel=1e-12)
    other_way = 1 / 2 * math.log(2 / 3) + 1 / 2 * math.log(2)  # it is no distance
    assert kl_divergence(student, teacher).tolist() == pytest.approx([other_way], rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_the_gradient_of_the_kl_divergence_is_that_of_its_definition(temperature: float) -> None:
    """T (softmax(student / T) - softmax(teacher / T)), and finite differences."""
    teacher, student = noise(4, 6), noise(4, 6, seed=1).requires_grad_()
    kl_divergence(teacher, student, temperature=temperature).sum().backward()
    expected = temperature * ((student / temperature).softmax(1) - (teacher / temperature).softmax(1))
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: kl_divergence(teacher, x, temperature=temperature), (student,))


@pytest.mark.parametrize("temperature", [0, -1, float("inf"), float("nan")])
def test_other_temperatures_are_refused(temperature: float, tiny_bit: Path) -> None:
    with pytest.raises(ConfigError, match="temperature is"):
        Distillation(load_bit(str(tiny_bit), keep_head=True), temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(tiny_bit: Path, temperature: float) -> None:
    teacher, student = (load_bit(str(tiny_bit), keep_head=True).double() for _ in range(2))
    objective = Distillation(teacher, temperature=temperature)
    targets = objective.targets(torch.zeros(6, dtype=torch.int64), num_classes=4, dtype=torch.float64)
    assert targets.shape == (6, 0)
    student.train()
    loss = objective.loss(forward(student, PICTURES.double()), targets, PICTURES.double())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    gradients = [parameter.grad for parameter in student.parameters()]
    assert len(gradients) > 100
    assert max(float(gradient.abs().max()) for gradient in gradients if gradient is not None) < 1e-12
    assert all(gradient is not None for gradient in gradients)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    with torch.no_grad():
        next(student.parameters()).mul_(1.5).add_(0.1 * noise(*next(student.parameters()).shape))
    assert objective.loss(forward(student, PICTURES.double()), targets, PICTURES.double()).item() > 1e-8


def record_inputs(model: torch.nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    model.stem.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach().clone()))
    return seen


def test_teacher_and_student_see_the_same_bits_and_the_teacher_stays_as_it_is(tiny_bit: Path, tmp_path: Path) -> None:
    """Two steps of two micro-batches each, mixed."""
    teacher, student = load_bit(str(tiny_bit), keep_head=True), create_bit(find_network(str(tiny_bit)), num_classes=4, seed=1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    theirs, own = record_inputs(teacher), record_inputs(student)
    stream = TrainingStream(
        part=load_image_dataset("digits", examples_per_class=4).train,
        view=View(resize_size=48, crop_size=40, flip=False, interpolation="bilinear"),
        seed=3,
    )
    hyper = HyperParameters(
        resize_size=48, crop_size=40, steps=2, warmup_steps=0, decay_steps=(), batch_size=16, base_lr=0.01, mixup_alpha=1.0
    )
    law, cuts = TrainingLaw(alpha=1.0), cut_batch(16, micro_batch=8)
    (tmp_path / "run").mkdir()
    run = RunFolder(tmp_path / "run")
    train_model(
        student, stream, hyper, Accelerator(cpu=True), law=law, cuts=cuts, run=run, objective=Distillation(teacher), seed=3
    )
    assert len(theirs) == len(own) == 4
    for one, other in zip(theirs, own, strict=True):
        assert one.shape == (8, 3, 40, 40)
        assert torch.equal(one, other)
    pictures, _ = stream.__getitems__(range(16, 24))
    plain = Normalize.of(student)(torch.from_numpy(pictures))
    mixed, _ = Mixup(alpha=1.0)(plain, torch.zeros(8, 0), seed=3, step=1, start=16, groups=(8,))
    torch.testing.assert_close(own[2], mixed)
    assert not torch.allclose(own[2], plain, atol=0.01)
    assert not teacher.training
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert any(not torch.equal(start[name], tensor) for name, tensor in student.state_dict().items())


def test_multi_label_scores_are_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(80, 5, generator=generator) < 0.3).to(torch.uint8)
    labels[:, 3] = 0
    logits = torch.randn(80, 5, generator=generator) + labels
    report = evaluate_multi_label(logits, labels, list("abcde"))
    precision = {n: average_precision_score(labels[:, i], logits[:, i]) for i, n in enumerate("abcde") if n != "d"}
    assert report.label_average_precision["d"] is None
    assert {n: value for n, value in report.label_average_precision.items() if n != "d"} == pytest.approx(precision, rel=1e-5)
    assert report.mean_average_precision == pytest.approx(sum(precision.values()) / 4, rel=1e-5)
    assert report.micro_f1 == pytest.approx(f1_score(labels, logits > 0, average="micro"), rel=1e-5)
    assert report.label_support == {name: int(labels[:, i].sum()) for i, name in enumerate("abcde")}
    probability = logits.double().sigmoid()
    nll = -(labels * probability.log() + (1 - labels.double()) * (1 - probability).log()).sum(1).mean()
    assert report.nll == pytest.approx(nll.item(), rel=1e-6)
    one = evaluate_multi_label(logits[:, :3], labels[:, :3] * torch.tensor([0, 1, 0], dtype=torch.uint8), ["a", "b", "c"])
    assert one.mean_average_precision == one.label_average_precision["b"] == pytest.approx(precision["b"], rel=1e-5)


def test_a_table_of_labels_names_the_worst_first_and_keeps_its_cells() -> None:
    labels = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 0]])
    report = evaluate_multi_label(torch.tensor([[2.0, 0, -1], [0, 3, 2], [1, -1, 0]]), labels, ["fine", "a|b", "worst"])
    assert report.table(worst=1).splitlines()[-1] == "| worst | 33.33% | 1 |"
    assert report.table().splitlines()[-3:] == ["| worst | 33.33% | 1 |", "| fine | 100.00% | 2 |", "| a&#124;b | 100.00% | 1 |"]
    assert "| mean average precision | 77.78% |" in report.table()


def test_multi_label_shapes_and_numbers_that_do_not_fit_are_refused() -> None:
    labels = torch.ones(2, 3, dtype=torch.uint8)
    for logits, names in ((torch.zeros(2, 2), "abc"), (torch.zeros(2, 3), "ab"), (torch.zeros(0, 3), "abc")):
        with pytest.raises(DataError, match="do not fit"):
            evaluate_multi_label(logits, labels[: len(logits)], list(names))
    with pytest.raises(NonFiniteError, match="example 1 "):
        evaluate_multi_label(torch.tensor([[0.0, 0, 0], [0, float("nan"), 0]]), labels, list("abc"))


@pytest.mark.parametrize("network", ["resnetv2_50x1_bit", "tiny"])
def test_the_head_as_a_matrix_product_is_the_models_own(network: str, tiny_bit: Path) -> None:
    model = create_bit(find_network(network if network != "tiny" else str(tiny_bit)), num_classes=7, seed=2).eval()
    with torch.no_grad():
        for parameter in model.get_classifier().parameters():
            parameter.copy_(noise(*parameter.shape) / 16)
        pictures = PICTURES[:2]
        torch.testing.assert_close(forward(model, pictures), model(pictures), rtol=1e-6, atol=1e-6)
        assert forward(model, pictures).abs().max() > 0.1
        many = model.double()(pictures.double())
        torch.testing.assert_close(forward(model, pictures.double()), many, rtol=1e-12, atol=1e-12)


def test_a_new_network_is_a_function_of_its_seed_with_a_head_of_zeros(tiny_bit: Path) -> None:
    network = find_network(str(tiny_bit))
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again, other = (create_bit(network, num_classes=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    convolutions = [name for name in weights[0] if "conv" in name]
    assert len(convolutions) > 50
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in convolutions)
    assert not any(
        torch.equal(weights[0][name], load_bit(str(tiny_bit), keep_head=True).state_dict()[name]) for name in convolutions
    )
    head = [tensor for name, tensor in weights[0].items() if name.startswith("head.")]
    assert [tuple(tensor.shape) for tensor in head] == [(5, 64, 1, 1), (5,)]
    assert not any(tensor.any() for tensor in head)
    assert first.num_classes == 5
    assert Normalize.of(first) == Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_plain_architecture_names_a_network(name: str) -> None:
    network = find_network(name)
    assert (network.architecture, network.file, network.input_size, network.short_name) == (name, None, 224, name)
    assert network.shape == ARCHITECTURES[name]


def test_a_network_is_found_by_the_names_of_weights_too(tiny_bit: Path, tmp_path: Path) -> None:
    assert find_network(str(tiny_bit)).input_size == 40
    published = find_network("resnetv2_101x1_bit.goog_in21k_ft_in1k")
    assert (published.architecture, published.input_size, published.file) == ("resnetv2_101x1_bit", 448, None)
    with pytest.raises(WeightsError, match=r'"resnetv2_51x1_bit" is neither.*resnetv2_50x1_bit'):
        find_network("resnetv2_51x1_bit")
    unknown = tmp_path / "resnet50"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"architecture": "resnet50"}')
    with pytest.raises(WeightsError, match="names the architecture"):
        find_network(str(unknown))
