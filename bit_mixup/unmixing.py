"""How does one predict with a model that was trained on mixed pictures?

Such a model has learnt shrunken labels at shrunken inputs. What undoes this is kept beside its weights, and is never applied
unasked: on real data it may help or harm, and only held-out examples tell.

Of a BiT it should be known that its logits do not change with the scale of its input: the stem has no bias, and normalisation
follows every path. Shrinking the input toward a mean picture that is near mid-grey, 0 after normalisation, then changes next to
nothing, and what is left of equation (15) is its temperature theta_bar.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from bit_mixup.calibration import cross_fitted, fit_temperature
from bit_mixup.errors import CheckpointError, ConfigError
from bit_mixup.expansion import shrink
from bit_mixup.laws import AskedRule, Rule, TrainingLaw, check_rule
from bit_mixup.sampling import Purpose, generator
from bit_mixup.storage import plain_values, read_json, write_json

RULES: tuple[Rule, ...] = get_args(Rule)
LEAST_PROBABILITY = 1e-6  # what "unshrink" would make smaller, or negative, is set to this
RECORD, MEAN_IMAGE, CHOICE = "mixup.json", "mean_image.safetensors", "prediction.json"
_AS_ASKED = "as asked"


@dataclass(frozen=True, kw_only=True, eq=False)
class MixupRecord:
    """What prediction must know of training.

    Args:
        law: how the model was trained, in words.
        alpha: of mixup.
        probability: share of the steps that mixed.
        theta_bar: mean of the larger weight of a pair, over all steps.
        input_shrink: by how much training pictures were shrunk toward the mean picture; 1 for not at all.
        label_shrink: by how much training labels were shrunk toward `label_centre`; 1 for not at all.
        label_centre: what labels were shrunk toward, (K,); class frequencies where mixup did it.
        class_frequencies: of the training set, (K,).
        mean_image: of the training set, (3, H, W) in [0, 1]; None where pictures were not shrunk.
    """

    law: str
    alpha: float
    probability: float
    theta_bar: float
    input_shrink: float
    label_shrink: float
    label_centre: Tensor
    class_frequencies: Tensor
    mean_image: Tensor | None

    @classmethod
    def of(cls, law: TrainingLaw, *, class_frequencies: Tensor, mean_image: Tensor | None) -> "MixupRecord":
        """The record of a training law and its training set."""
        uniform = torch.full_like(class_frequencies, 1 / len(class_frequencies))
        smoothed_toward = uniform if law.smooth_toward == "uniform" else class_frequencies
        lost = 1 - law.label_shrink
        by_mixing = (1 - law.label_smoothing) * (1 - law.mixing_shrink)
        centre = class_frequencies
        if lost > 0:
            centre = (by_mixing * class_frequencies + law.label_smoothing * smoothed_toward) / lost
        return cls(
            law=law.as_text(),
            alpha=law.alpha,
            probability=law.probability,
            theta_bar=law.theta_bar,
            input_shrink=law.input_shrink,
            label_shrink=law.label_shrink,
            label_centre=centre,
            class_frequencies=class_frequencies,
            mean_image=mean_image if law.input_shrink < 1 else None,
        )

    @property
    def shrinks(self) -> bool:
        """Whether there is anything to undo."""
        return self.input_shrink < 1 or self.label_shrink < 1

    def save(self, folder: Path) -> None:
        """Writes `mixup.json`, and `mean_image.safetensors` where there is one."""
        numbers = {name: getattr(self, name) for name in ("law", "probability", "theta_bar", "input_shrink", "label_shrink")}
        lists = {name: getattr(self, name).double().tolist() for name in ("label_centre", "class_frequencies")}
        alpha = plain_values({"alpha": self.alpha})
        write_json(folder / RECORD, {**numbers, **alpha, **lists, "mean_image": self.mean_image is not None})
        if self.mean_image is not None:
            safetensors.torch.save_file({"mean_image": self.mean_image.float().contiguous()}, folder / MEAN_IMAGE)

    @classmethod
    def load(cls, folder: Path) -> "MixupRecord | None":
        """Reads the record beside a model; None where there is none, as for a model that another tool has trained.

        Raises:
            CheckpointError: it can not be read.
        """
        if not (folder / RECORD).is_file():
            return None
        values = read_json(folder / RECORD)
        try:
            mean_image = safetensors.torch.load_file(folder / MEAN_IMAGE)["mean_image"] if values.pop("mean_image") else None
            for name in ("label_centre", "class_frequencies"):
                values[name] = torch.tensor(values[name], dtype=torch.float64)
            return cls(**values | {"alpha": float(values["alpha"])}, mean_image=mean_image)
        except (OSError, SafetensorError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder / RECORD} is not the record of a training run: {error!r}.") from error

    def shrink_input(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Tensor], Tensor] | None:
        """The input half of equation (15) for pictures normalised by `mean` and `std`; None where pictures were not shrunk.

        At another resolution than that of training the mean picture is resized.
        """
        if self.mean_image is None:
            return None
        picture = (self.mean_image - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

        def change(images: Tensor) -> Tensor:
            centre = picture
            if centre.shape[1:] != images.shape[2:]:
                centre = F.interpolate(centre[None], images.shape[2:], mode="bilinear", antialias=True)[0]
            return shrink(images, centre.to(images), self.input_shrink)

        return change


def predict_by_rule(rule: Rule, logits: Tensor, shrunk: Tensor, record: MixupRecord, *, temperature: float = 1.0) -> Tensor:
    """Scores (N, K) whose softmax is what a rule predicts.

    - raw: the logits.
    - eq15: equation (15) of Carratino et al. (2022) as its author's code has it. The input is shrunk toward the mean picture and
      the output un-shrunk, (z - (1 - s) c) / s, with the logits z of the shrunk input, the shrink s of labels and their centre c.
      For classes of equal frequency c is a constant that softmax does not see, and the output half is a temperature; otherwise it
      is an offset against frequent classes.
    - temperature: logits / s alone.
    - unshrink: undoes the shrinkage of labels where cross-entropy has it, on probabilities: c + (softmax(z) - c) / s; what is
      below 1e-6 is set to 1e-6 and the sum made 1.
    - fitted: logits / T, with a temperature T that was fitted on held-out examples (Guo et al., 2017).

    Args:
        rule: of the five.
        logits: of the pictures as they are, (N, K).
        shrunk: of the shrunken pictures, (N, K); the same as `logits` where pictures were not shrunk.
        record: of the model.
        temperature: of "fitted".

    Raises:
        ConfigError: an unknown rule.
    """
    if rule not in RULES:
        raise ConfigError(f'prediction_rule is "{rule}"; it must be one of {", ".join(RULES)}, auto.')
    if rule == "fitted":
        return logits / temperature
    if rule == "raw" or not record.shrinks:
        return logits
    share, centre = record.label_shrink, record.label_centre.to(logits)
    if rule == "temperature":
        return logits / share
    if rule == "eq15":
        return (shrunk - (1 - share) * centre) / share
    probs = centre + (shrunk.softmax(1) - centre) / share
    probs = probs.clamp(min=LEAST_PROBABILITY, max=1.0)  # the ONNX exporter takes no mixed types
    return (probs / probs.sum(1, keepdim=True)).log()


@dataclass(frozen=True, kw_only=True)
class RuleChoice:
    """How a model is to predict, and why.

    Args:
        rule: of the five.
        temperature: of "fitted", else 1.
        why: for people.
        held_out_nll: of each rule on held-out examples, in nats, where there were some.
        num_held_out: examples that were held out.
    """

    rule: Rule
    temperature: float
    why: str
    held_out_nll: Mapping[str, float]
    num_held_out: int

    @property
    def owed_to_held_out(self) -> str:
        """What was taken from the held-out examples, whose scores are therefore no test of it; empty for nothing."""
        if self.rule == "raw":
            return ""
        if not self.why.startswith(_AS_ASKED):
            return "the rule was chosen"
        return "the temperature was fitted" if self.rule == "fitted" else ""

    def save(self, folder: Path) -> None:
        """Writes `prediction.json`."""
        write_json(folder / CHOICE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "RuleChoice | None":
        """Reads the choice beside a model; None where there is none.

        Raises:
            CheckpointError: it can not be read.
        """
        if not (folder / CHOICE).is_file():
            return None
        values = read_json(folder / CHOICE)
        try:
            choice = cls(**values)
        except TypeError as error:
            raise CheckpointError(f"{folder / CHOICE} does not say how a model predicts: {error}.") from error
        if choice.rule not in RULES or not (isinstance(choice.temperature, float) and choice.temperature > 0):
            raise CheckpointError(
                f"{folder / CHOICE} has the rule {choice.rule!r} and the temperature {choice.temperature!r}; the rule must be "
                f"one of {', '.join(RULES)}, and the temperature a positive number."
            )
        return choice


def choose_rule(
    asked: AskedRule, record: MixupRecord, held_out: tuple[Tensor, Tensor, Tensor] | None, *, seed: int = 0
) -> RuleChoice:
    """Decides how to predict: as asked; or, for "auto", by the negative log-likelihood on held-out examples.

    There the fitted temperature competes by two-fold cross-fitting: each half is scored by the temperature of the other. A rule
    with nothing to undo is left out. Ties go to the earlier of raw, eq15, temperature, unshrink, fitted. A fit that runs to the
    end of its range, as where every example is right, says nothing: it counts as the temperature 1.

    Args:
        asked: a rule, or "auto".
        record: of the model.
        held_out: logits (N, K), logits of shrunken pictures (N, K), and labels (N,) of examples that neither training nor the
            test has seen. None: there are none, and "auto" is raw.
        seed: of the two halves.

    Raises:
        ConfigError: "fitted" without held-out examples, or a rule that undoes what was not done.
    """
    check_rule(asked, shrinks=record.shrinks, held_out=held_out is not None)
    why = "no other was asked for" if asked == "raw" else _AS_ASKED
    if held_out is None:
        if asked == "auto":
            why = "there are no held-out examples to choose by; --validation-fraction holds some out"
        return RuleChoice(rule="raw" if asked == "auto" else asked, temperature=1.0, why=why, held_out_nll={}, num_held_out=0)
    logits, shrunk, labels = (values.double() if values.is_floating_point() else values for values in held_out)
    scores: dict[str, float] = {
        rule: float(F.cross_entropy(predict_by_rule(rule, logits, shrunk, record), labels))
        for rule in RULES
        if rule == "raw" or (rule != "fitted" and record.shrinks)
    }
    scores["fitted"] = _cross_fitted_nll(logits, labels, seed)
    fit = fit_temperature(logits, labels)
    rule = min((rule for rule in RULES if rule in scores), key=lambda rule: scores[rule]) if asked == "auto" else asked
    if asked == "auto":
        listed = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        why = f"the least negative log-likelihood on {len(labels):,} held-out examples ({listed})"
    if rule == "fitted" and fit.note:
        why += f". {fit.note}" + (" It is left at 1." if fit.bounded else "")
        why = why.removesuffix(".")
    return RuleChoice(
        rule=rule,
        temperature=fit.usable if rule == "fitted" else 1.0,
        why=why,
        held_out_nll=scores,
        num_held_out=len(labels),
    )


def _cross_fitted_nll(logits: Tensor, labels: Tensor, seed: int) -> float:
    """NLL with a temperature fitted on the other half."""
    if len(labels) < 2:
        return float(F.cross_entropy(logits, labels))
    order = torch.from_numpy(generator(seed, Purpose.CALIBRATION, 1).permutation(len(labels)))
    first, second = order.chunk(2)
    return float(F.cross_entropy(cross_fitted(logits, labels, first, second), labels))
