"""Do the prediction rules undo what mixup did, and nothing else?"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bit_mixup.calibration import fit_temperature
from bit_mixup.errors import CheckpointError, ConfigError
from bit_mixup.expansion import shrink
from bit_mixup.laws import TrainingLaw
from bit_mixup.models import Normalize, forward, load_bit
from bit_mixup.sampling import Purpose, generator
from bit_mixup.theory import mixing_moments
from bit_mixup.unmixing import LEAST_PROBABILITY, RULES, MixupRecord, RuleChoice, choose_rule, predict_by_rule


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def record(
    alpha: float = 0.4, frequencies: tuple[float, ...] = (0.5, 0.3, 0.2), image: Tensor | None = None, **law: object
) -> MixupRecord:
    return MixupRecord.of(
        TrainingLaw(alpha=alpha, **law), class_frequencies=torch.tensor(frequencies, dtype=torch.float64), mean_image=image
    )


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 8.0])
def test_equation_15_gives_back_the_labels_of_a_model_that_interpolates_the_modified_data(alpha: float) -> None:
    """A kernel machine that is exactly y~ at each x~ is far from y at x; equation (15) is exactly y there."""
    inputs, labels = numbers(20, 4, seed=1), F.one_hot(torch.arange(20) % 3, 3).double()
    theta_bar = mixing_moments(alpha).theta_bar
    mean, frequencies = inputs.mean(0), labels.mean(0)
    shrunk, wanted = shrink(inputs, mean, theta_bar), shrink(labels, frequencies, theta_bar)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-torch.cdist(a, b).square()).exp()

    weights = torch.linalg.solve(kernel(shrunk, shrunk), wanted)
    of_model = record(alpha, tuple(frequencies.tolist()), torch.zeros(3, 1, 1))
    raw, at_shrunk = kernel(inputs, shrunk) @ weights, kernel(shrunk, shrunk) @ weights
    assert float((predict_by_rule("eq15", raw, at_shrunk, of_model) - labels).abs().max()) < 1e-8
    assert float((raw - labels).abs().max()) > 0.05


@pytest.mark.parametrize("alpha", [0.1, 1.0, 8.0])
def test_equation_15_leaves_linear_least_squares_as_it_is(alpha: float) -> None:
    inputs, labels = numbers(30, 4, seed=2), F.one_hot(torch.arange(30) % 3, 3).double()
    mean, frequencies = inputs.mean(0), labels.mean(0)
    slope = torch.linalg.lstsq(inputs - mean, labels - frequencies).solution
    theta_bar = mixing_moments(alpha).theta_bar
    points = numbers(50, 4, seed=3)

    def predict(x: Tensor) -> Tensor:
        return frequencies + (x - mean) @ slope

    of_model = record(alpha, tuple(frequencies.tolist()), torch.zeros(3, 1, 1))
    found = predict_by_rule("eq15", predict(points), predict(shrink(points, mean, theta_bar)), of_model)
    torch.testing.assert_close(found, predict(points), atol=1e-12, rtol=0)


def test_with_balanced_classes_the_output_half_is_a_temperature() -> None:
    logits = numbers(40, 4, seed=4) * 3
    of_model = record(1.0, (0.25,) * 4)
    by_rule = predict_by_rule("eq15", logits, logits, of_model).softmax(1)
    torch.testing.assert_close(by_rule, (logits / 0.75).softmax(1), atol=1e-12, rtol=0)
    torch.testing.assert_close(predict_by_rule("temperature", logits, logits, of_model), logits / 0.75, atol=0, rtol=0)


def test_with_unequal_classes_it_is_an_offset_against_frequent_ones() -> None:
    logits = numbers(40, 3, seed=5)
    difference = predict_by_rule("eq15", logits, logits, record(1.0)) - logits / 0.75
    expected = -(1 / 0.75 - 1) * torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    torch.testing.assert_close(difference, expected.expand(40, 3), atol=1e-14, rtol=0)


def test_without_mixing_every_rule_is_raw_to_the_bit() -> None:
    logits, shrunk = numbers(10, 3, seed=6), numbers(10, 3, seed=7)
    for rule in ("raw", "eq15", "temperature", "unshrink"):
        assert torch.equal(predict_by_rule(rule, logits, shrunk, record(0.0)), logits)
    assert not record(0.0).shrinks
    assert record(0.0).shrink_input((0.5,) * 3, (0.5,) * 3) is None


def test_unshrink_is_the_inverse_of_what_cross_entropy_learns() -> None:
    """A model of mixed labels says c + s (p - c) where p is the truth."""
    of_model = record(1.0)
    truth = numbers(50, 3, seed=8).softmax(1)
    said = shrink(truth, of_model.class_frequencies, 0.75).log()
    found = predict_by_rule("unshrink", said, said, of_model).softmax(1)
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)


def test_unshrink_stays_within_the_simplex() -> None:
    logits = torch.tensor([[30.0, 0.0, 0.0]], dtype=torch.float64)  # surer than mixed labels ever ask
    probs = predict_by_rule("unshrink", logits, logits, record(1.0)).softmax(1)
    assert float(probs.sum()) == pytest.approx(1)
    assert float(probs.min()) == pytest.approx(LEAST_PROBABILITY, rel=1e-4)


def test_half_shrunken_laws_are_undone_by_their_half() -> None:
    logits, shrunk = numbers(10, 3, seed=9), numbers(10, 3, seed=10)
    inputs_only, labels_only = record(1.0, mixed="inputs"), record(1.0, mixed="labels")
    assert torch.equal(predict_by_rule("eq15", logits, shrunk, inputs_only), shrunk)
    assert torch.equal(predict_by_rule("temperature", logits, shrunk, inputs_only), logits)
    centre = labels_only.class_frequencies
    torch.testing.assert_close(predict_by_rule("eq15", logits, logits, labels_only), (logits - 0.25 * centre) / 0.75)


def test_centre_of_smoothed_and_mixed_labels() -> None:
    """Labels that are smoothed toward all classes and then mixed lie between label and centre, as training sees them."""
    frequencies = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    of_model = record(1.0, label_smoothing=0.1)
    label = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    mixed = shrink(label, frequencies, 0.75)
    smoothed = shrink(mixed, torch.full((3,), 1 / 3, dtype=torch.float64), 0.9)
    torch.testing.assert_close(shrink(label, of_model.label_centre, of_model.label_shrink), smoothed, atol=1e-14, rtol=0)
    toward = record(0.0, label_smoothing=0.2, smooth_toward="frequencies")
    torch.testing.assert_close(toward.label_centre, frequencies)
    assert toward.label_shrink == pytest.approx(0.8)


def test_of_a_bit_equation_15_is_a_temperature_where_the_mean_picture_is_mid_grey(tiny_bit: Path) -> None:
    """Its logits do not change with the scale of the input."""
    model = load_bit(str(tiny_bit), keep_head=True).double().eval()
    with torch.no_grad():
        model.get_classifier().weight.mul_(50)
    normalize = Normalize.of(model)
    grey = torch.tensor(normalize.mean).view(3, 1, 1).expand(3, 40, 40)
    of_model = record(0.4, (0.25,) * 4, grey)
    images = numbers(8, 3, 40, 40, seed=11)
    change = of_model.shrink_input(normalize.mean, normalize.std)
    assert change is not None
    with torch.no_grad():
        raw, shrunk = forward(model, images), forward(model, change(images))
    found = predict_by_rule("eq15", raw, shrunk, of_model)
    expected = (raw - (1 - of_model.theta_bar) / 4) / of_model.theta_bar
    assert float((found - expected).abs().max() / raw.std()) < 1e-4
    other = record(0.4, (0.25,) * 4, grey + 0.4).shrink_input(normalize.mean, normalize.std)
    with torch.no_grad():
        assert float((forward(model, other(images)) - raw).abs().max() / raw.std()) > 1e-3, "elsewhere it is not"


def test_mean_picture_is_resized_to_the_picture() -> None:
    of_model = record(1.0, image=torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)))
    change = of_model.shrink_input((0.5,) * 3, (0.5,) * 3)
    black = change(torch.zeros(2, 3, 16, 16))
    assert black.shape == (2, 3, 16, 16)
    assert float(black.mean()) == pytest.approx(0.25 * float((of_model.mean_image.mean() - 0.5) / 0.5), abs=1e-3)


def test_record_comes_back_from_its_files(tmp_path: Path) -> None:
    for name, one in {
        "mixed": record(math.inf, image=torch.rand(3, 4, 4), label_smoothing=0.1),
        "plain": record(0.0),
    }.items():
        (tmp_path / name).mkdir()
        one.save(tmp_path / name)
        other = MixupRecord.load(tmp_path / name)
        assert other is not None
        for field in ("law", "alpha", "probability", "theta_bar", "input_shrink", "label_shrink"):
            assert getattr(one, field) == getattr(other, field)
        assert torch.equal(one.label_centre, other.label_centre)
        assert torch.equal(one.class_frequencies, other.class_frequencies)
        assert (one.mean_image is None) == (other.mean_image is None)
        assert one.mean_image is None or torch.equal(one.mean_image, other.mean_image)
    assert MixupRecord.load(tmp_path) is None, "another tool's model has none"


@pytest.mark.parametrize("damage", ["not JSON", "a key less", "no picture", "a list"])
def test_broken_records_are_refused(damage: str, tmp_path: Path) -> None:
    record(1.0, image=torch.rand(3, 4, 4)).save(tmp_path)
    file = tmp_path / "mixup.json"
    values = json.loads(file.read_text())
    if damage == "not JSON":
        file.write_text("{")
    elif damage == "a key less":
        file.write_text(json.dumps({k: v for k, v in values.items() if k != "theta_bar"}))
    elif damage == "no picture":
        (tmp_path / "mean_image.safetensors").unlink()
    else:
        file.write_text("[]")
    with pytest.raises(CheckpointError, match=r"mixup\.json"):
        MixupRecord.load(tmp_path)


def test_choice_comes_back_from_its_file_or_is_refused(tmp_path: Path) -> None:
    assert RuleChoice.load(tmp_path) is None
    choice = choose_rule("auto", record(1.0, (0.25,) * 4), held_out(shrunk_by=0.75))
    choice.save(tmp_path)
    assert RuleChoice.load(tmp_path) == choice
    values = json.loads((tmp_path / "prediction.json").read_text())
    for broken in ({**values, "rule": "best"}, {**values, "temperature": -1.0}, {"rule": "raw"}):
        (tmp_path / "prediction.json").write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match=r"prediction\.json"):
            RuleChoice.load(tmp_path)


def held_out(count: int = 400, *, shrunk_by: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a model whose labels were shrunk (over the classes alike), and labels."""
    truth = (3 * numbers(count, 4, seed=seed)).softmax(1)
    labels = torch.multinomial(truth, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    logits = shrink(truth, torch.full((4,), 0.25, dtype=torch.float64), shrunk_by).log()
    return logits, logits, labels


def test_auto_picks_the_least_held_out_likelihood_and_says_so() -> None:
    of_model = record(1.0, (0.25,) * 4)
    choice = choose_rule("auto", of_model, held_out(shrunk_by=0.75))
    assert choice.rule == "unshrink"
    assert set(choice.held_out_nll) == set(RULES)
    assert choice.held_out_nll["unshrink"] == min(choice.held_out_nll.values())
    assert "400 held-out examples" in choice.why
    assert "unshrink" in choice.why
    calibrated = choose_rule("auto", of_model, held_out())
    assert calibrated.rule in ("raw", "fitted"), "a model that is calibrated as it is"
    assert calibrated.held_out_nll["temperature"] > calibrated.held_out_nll["raw"]


def test_auto_scores_each_rule_by_its_own_likelihood() -> None:
    logits, _, labels = held_out(100, shrunk_by=0.75)
    shrunk = logits * 0.9
    of_model = record(1.0, (0.25,) * 4)
    choice = choose_rule("auto", of_model, (logits, shrunk, labels))
    for rule in ("raw", "eq15", "temperature", "unshrink"):
        scores = predict_by_rule(rule, logits, shrunk, of_model)
        assert choice.held_out_nll[rule] == pytest.approx(float(F.cross_entropy(scores, labels)), abs=1e-12)


def test_fitted_temperature_competes_on_examples_that_it_was_not_fitted_on() -> None:
    logits, _, labels = held_out(200)
    sure = logits * 3
    choice = choose_rule("fitted", record(0.0, (0.25,) * 4), (sure, sure, labels))
    fit = fit_temperature(sure, labels)
    assert choice.temperature == fit.temperature
    assert choice.held_out_nll["fitted"] > fit.nll_after
    assert set(choice.held_out_nll) == {"raw", "fitted"}, "with nothing to undo"
    order = generator(0, Purpose.CALIBRATION, 1).permutation(200)
    losses = []
    for own, other in ((order[:100], order[100:]), (order[100:], order[:100])):
        temperature = fit_temperature(sure[other], labels[other]).temperature
        losses += [float(F.cross_entropy(sure[i] / temperature, labels[i])) for i in own]
    assert choice.held_out_nll["fitted"] == pytest.approx(np.mean(losses), abs=1e-12)


def test_examples_that_are_all_right_choose_no_temperature() -> None:
    """Their likelihood rises without end as the model gets surer: 20 of 20 right is no reason to be sure of everything."""
    labels = torch.arange(20) % 4
    right = numbers(20, 4, seed=1) + 6 * F.one_hot(labels, 4)
    choice = choose_rule("auto", record(0.0, (0.25,) * 4), (right, right, labels))
    assert (choice.rule, choice.temperature) == ("raw", 1.0)
    asked = choose_rule("fitted", record(0.0, (0.25,) * 4), (right, right, labels))
    assert (asked.rule, asked.temperature) == ("fitted", 1.0)
    assert "end of its range" in asked.why
    assert "left at 1" in asked.why
    few = held_out(100)
    assert "fitted on 100 examples and is uncertain" in choose_rule("fitted", record(0.0, (0.25,) * 4), few).why


def test_auto_without_held_out_examples_is_raw_and_says_so() -> None:
    choice = choose_rule("auto", record(1.0), None)
    assert (choice.rule, choice.held_out_nll) == ("raw", {})
    assert "no held-out examples" in choice.why
    assert choose_rule("eq15", record(1.0), None).rule == "eq15"


def test_rules_that_make_no_sense_are_refused() -> None:
    for rule in ("eq15", "temperature", "unshrink"):
        with pytest.raises(ConfigError, match=f"{rule} undoes the shrinkage"):
            choose_rule(rule, record(0.0), None)
    with pytest.raises(ConfigError, match="needs held-out examples"):
        choose_rule("fitted", record(1.0), None)
    with pytest.raises(ConfigError, match='"best"; it must be one of raw'):
        predict_by_rule("best", torch.zeros(1, 3), torch.zeros(1, 3), record(1.0))
