"""By which law does training change pictures, labels and features?

Frozen values that say what is asked, and what follows from it in closed form; `bit_mixup.mixup` and `bit_mixup.losses` do it.
Without torch.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bit_mixup.errors import ConfigError
from bit_mixup.hyperrule import LamLaw
from bit_mixup.sampling import GROUP_SIZE
from bit_mixup.storage import plain_values
from bit_mixup.theory import check_alpha, mixing_moments, total_smoothing

Mixed = Literal["both", "inputs", "labels"]
PartnerRule = Literal["all", "same_class", "neighbours"]
SmoothingTarget = Literal["uniform", "frequencies"]
Form = Literal["exact", "modified", "approximate"]
Trainable = Literal["all", "stage4", "head"]  # which weights
Rule = Literal["raw", "eq15", "temperature", "unshrink", "fitted"]  # of prediction
AskedRule = Literal["raw", "eq15", "temperature", "unshrink", "fitted", "auto"]

NEIGHBOURS = 10  # among which a partner is drawn by the rule "neighbours"
# Of a step of approximate mixup to one of mixup, measured with the bundled model on one thread, batches of 32 and 64.
APPROXIMATE_TIME, APPROXIMATE_MEMORY = 9, 6
STAGES = 4  # of a BiT: pictures are mixed before the first (0) or features after one of them


def check_rule(asked: AskedRule, *, shrinks: bool, held_out: bool) -> None:
    """Sees whether a model can predict by a rule.

    Args:
        asked: the rule.
        shrinks: whether training shrinks inputs or labels.
        held_out: whether there are held-out examples.

    Raises:
        ConfigError: "fitted" without held-out examples, or a rule that undoes what is not done.
    """
    if asked in ("eq15", "temperature", "unshrink") and not shrinks:
        raise ConfigError(
            f"prediction_rule {asked} undoes the shrinkage of mixup, but nothing is shrunk in training. Use raw, fitted or "
            "auto, or give mixup_alpha."
        )
    if asked == "fitted" and not held_out:
        raise ConfigError("prediction_rule fitted needs held-out examples: give --validation-fraction, for instance 0.1.")


@dataclass(frozen=True, kw_only=True)
class TrainingLaw:
    """What a training step does to its examples before the loss. The plain law is empirical risk minimisation (ERM).

    Args:
        alpha: of mixup, lam ~ Beta(alpha, alpha); 0 is ERM, infinity mixes half and half.
        lam: "step" draws one weight for an optimizer step, as BiT does; "example" one for each position.
        partner: "all" takes another example of the batch; "same_class" one of the same class, and "neighbours" one of the ten
            nearest in the pretrained features, from the whole training set: these are loaded with the example.
        mixed: "both" inputs and labels; or one of them, and then the example keeps the larger weight, max(lam, 1 - lam), for
            with lam itself it would half of the time be the smaller part of what it stands for.
        stage: 0 mixes pictures; 1 to 4 mixes features after that stage of the network (Verma et al., "Manifold Mixup", 2019).
        label_smoothing: weight epsilon taken from the labels, in [0, 1).
        smooth_toward: where epsilon goes: all classes alike, or by their frequencies, which is what mixup implies.
        input_noise: standard deviation of Gaussian noise on each pixel and channel, as a share of its range from black to white.
        feature_dropout: probability with which a pooled feature is dropped before the head, in [0, 1).
        cool_down: last share of the steps that does not mix, in [0, 1].
        form: "exact" mixes. "modified" trains on what mixup amounts to without its noise: inputs and labels shrunk toward their
            means. "approximate" adds the quadratic term of its noise (Carratino et al., 2022, Theorem 2). Both are experimental.
        on_features: examples are pooled features that were computed before; they are what is mixed, and pictures are not shrunk.

    Raises:
        ConfigError: a value out of its range, or two that contradict each other.
    """

    alpha: float = 0.0
    lam: LamLaw = "step"
    partner: PartnerRule = "all"
    mixed: Mixed = "both"
    stage: int = 0
    label_smoothing: float = 0.0
    smooth_toward: SmoothingTarget = "uniform"
    input_noise: float = 0.0
    feature_dropout: float = 0.0
    cool_down: float = 0.0
    form: Form = "exact"
    on_features: bool = False

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        for name in ("label_smoothing", "feature_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1.")
        if not 0 <= self.cool_down <= 1:
            raise ConfigError(f"cool_down is {self.cool_down}; it must be a share of the steps, from 0 to 1.")
        if not (math.isfinite(self.input_noise) and self.input_noise >= 0):
            raise ConfigError(f"input_noise is {self.input_noise}; it must be 0 or a positive number (0.1 is much).")
        if not 0 <= self.stage <= STAGES:
            raise ConfigError(f"mixup_stage is {self.stage}; it must be 0 (the pictures) or a stage from 1 to {STAGES}.")
        if self.alpha == 0:
            self._refuse_what_needs_alpha()
        if self.stage and (self.partner != "all" or self.mixed == "labels"):
            raise ConfigError(
                "mixup_stage mixes features of the batch: it goes with mixup_partner all, and with mixup_of both or inputs."
            )
        if self.form != "exact":
            self._refuse_what_has_no_expansion()
        if self.smooth_toward != "uniform" and not self.label_smoothing:
            raise ConfigError(
                "smooth_toward says where smoothed labels go, but label_smoothing is 0: give it, or leave this out."
            )

    def _refuse_what_needs_alpha(self) -> None:
        plain = TrainingLaw.__dataclass_fields__
        for name, flag in (
            ("partner", "mixup_partner"), ("mixed", "mixup_of"), ("stage", "mixup_stage"), ("cool_down", "cool_down"),
            ("form", "mixup_form"),
        ):  # fmt: skip
            if getattr(self, name) != plain[name].default:
                raise ConfigError(
                    f"{flag} is {getattr(self, name)}, but nothing is mixed: mixup_alpha is 0. Give mixup_alpha, or leave {flag} "
                    "out."
                )

    def _refuse_what_has_no_expansion(self) -> None:
        others = (self.partner != "all", self.mixed != "both", self.stage, self.label_smoothing, self.input_noise)
        if any(others) or self.lam != "step":
            raise ConfigError(
                f"mixup_form {self.form} stands for plain mixup: inputs and labels, partners of all classes, no weights of "
                "single examples, no label smoothing and no input noise. Leave those options out."
            )

    def mixes_at(self, step: int, steps: int) -> bool:
        """Whether a step of a run of `steps` mixes: all do but the cool-down, the last round(cool_down * steps)."""
        return self.alpha > 0 and step < steps - round(self.cool_down * steps)

    @property
    def loads_partners(self) -> bool:
        """Whether each example is loaded with its partner."""
        return self.alpha > 0 and self.partner != "all"

    @property
    def groups(self) -> bool:
        """Whether partners are found in the batch, so that groups of it must stay whole."""
        return self.alpha > 0 and self.partner == "all" and self.form != "modified"

    @property
    def group_size(self) -> int:
        """Positions of a batch that stay together in one process and backward pass: a group of partners, or 1."""
        return GROUP_SIZE if self.groups else 1

    @property
    def needs_means(self) -> bool:
        """Whether a step needs the mean picture or the class frequencies of the training set."""
        return self.form != "exact" or (self.label_smoothing > 0 and self.smooth_toward == "frequencies")

    @property
    def time_factor(self) -> int:
        """How many times as long as one of mixup a step takes."""
        return APPROXIMATE_TIME if self.form == "approximate" else 1

    @property
    def memory_factor(self) -> int:
        """How many times the activations of mixup a step holds."""
        return APPROXIMATE_MEMORY if self.form == "approximate" else 1

    @property
    def probability(self) -> float:
        """Share of the steps that mix."""
        return 1 - self.cool_down if self.alpha else 0.0

    @property
    def theta_bar(self) -> float:
        """Mean of the larger weight of a pair, over all steps of a run."""
        return mixing_moments(self.alpha, probability=self.probability).theta_bar

    @property
    def input_shrink(self) -> float:
        """By how much training pictures were shrunk toward the mean picture: theta_bar, or 1 where that is not what happened."""
        of_pictures = self.stage == 0 and not self.on_features and self.mixed != "labels"
        return self.theta_bar if of_pictures and self.partner == "all" else 1.0

    @property
    def mixing_shrink(self) -> float:
        """By how much mixing shrank training labels toward class frequencies; 1 where the labels are not mixed so."""
        return self.theta_bar if self.partner == "all" and self.mixed != "inputs" else 1.0

    @property
    def label_shrink(self) -> float:
        """By how much mixing and smoothing together shrank training labels."""
        return 1 - total_smoothing(self.mixing_shrink, self.label_smoothing)

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return plain_values(asdict(self))

    def as_text(self) -> str:
        """The law in a few words."""
        parts = []
        if self.alpha:
            names = {"exact": "mixup", "modified": "ERM on the modified data of mixup", "approximate": "approximate mixup"}
            parts.append(
                f"{names[self.form]}{' on features' if self.on_features else ''}, alpha {self.alpha:g}"
                + (f", one weight for each {self.lam}" if self.form == "exact" else "")
            )
            if self.partner != "all":
                where = "of the same class" if self.partner == "same_class" else f"among the {NEIGHBOURS} nearest neighbours"
                parts.append(f"partners {where}")
            if self.mixed != "both":
                parts.append(f"{self.mixed} only")
            if self.stage:
                parts.append(f"after stage {self.stage}")
            if self.cool_down:
                parts.append(f"none in the last {self.cool_down:.0%} of the steps")
        if self.label_smoothing:
            toward = "all classes" if self.smooth_toward == "uniform" else "the class frequencies"
            parts.append(f"labels smoothed by {self.label_smoothing:g} toward {toward}")
        parts += [f"noise {self.input_noise:g} on the pictures"] if self.input_noise else []
        parts += [f"dropout {self.feature_dropout:g} before the head"] if self.feature_dropout else []
        return "; ".join(parts) or "off"

    def warnings(self) -> list[str]:
        """What may surprise, for people."""
        notes = []
        if self.label_smoothing and self.mixing_shrink < 1:
            notes.append(
                f"NOTE: labels are smoothed twice: mixup takes {1 - self.mixing_shrink:.3f} of their weight, label smoothing "
                f"{self.label_smoothing:g}, together {1 - self.label_shrink:.3f}. The model will be the less confident."
            )
        if self.form == "approximate":
            notes.append(
                f"NOTE: experimental, for study: a step takes about {self.time_factor} times as long as one of mixup, and "
                f"{self.memory_factor} times the memory of its activations"
            )
        elif self.form == "modified":
            notes.append("NOTE: experimental, for study: mixup's shrinkage without its noise")
        if self.alpha > 0.4 and self.form == "exact" and self.partner == "all":
            notes.append("NOTE: a large alpha can underfit: on ImageNet Zhang et al. (2018) use 0.2 and 0.4")
        return notes
