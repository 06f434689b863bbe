"""How good is a model, in numbers?"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
    multilabel_average_precision,
    multilabel_f1_score,
)

from bit_mixup.calibration import CalibrationReport, NoiseFloor, ReliabilityBins, measure_calibration
from bit_mixup.errors import CheckpointError, DataError, NonFiniteError, shown


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """Scores on labelled examples; shares are from 0 to 1.

    Args:
        num_examples: scored.
        accuracy: share whose largest logit is the label's (top-1).
        accuracy_interval: 95 % confidence interval of the accuracy on more examples of the same kind (Wilson, 1927).
        top5_accuracy: share whose label is among the five largest logits; None with five classes or fewer.
        macro_f1: mean over classes of the harmonic mean of precision and recall, without classes neither present nor predicted.
        balanced_accuracy: mean recall of the classes that are present.
        nll: mean negative log-likelihood in nats.
        calibration: how far confidence can be believed.
        class_accuracy: recall by class name; None for classes without examples.
        class_precision: share of the predictions of a class that is right; None for classes that are never predicted.
        class_f1: harmonic mean of the two; None for classes neither present nor predicted.
        class_support: examples by class name.
    """

    num_examples: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    top5_accuracy: float | None
    macro_f1: float
    balanced_accuracy: float
    nll: float
    calibration: CalibrationReport
    class_accuracy: dict[str, float | None]
    class_precision: dict[str, float | None]
    class_f1: dict[str, float | None]
    class_support: dict[str, int]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EvaluationReport":
        """The inverse of `as_dict`; further values, as `report.json` has them, are left out.

        Raises:
            CheckpointError: these are not the values of a report.
        """
        try:
            own = {field.name: values[field.name] for field in fields(cls)}
            calibration = dict(own["calibration"])
            calibration["floor"] = NoiseFloor(**calibration["floor"])
            calibration["bins"] = ReliabilityBins(**calibration["bins"])
            low, high = own["accuracy_interval"]
            return cls(**own | {"calibration": CalibrationReport(**calibration), "accuracy_interval": (low, high)})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(f"these are not the scores of a run of fine-tuning: {error!r}.") from error

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self) | {"accuracy_interval": list(self.accuracy_interval)}

    def summary(self) -> list[tuple[str, str]]:
        """Names and values of the overall scores, for people."""
        low, high = self.accuracy_interval
        rows = [("top-1 accuracy", f"{self.accuracy:.2%} (95 % interval {low:.2%} to {high:.2%})")]
        if self.top5_accuracy is not None:
            rows.append(("top-5 accuracy", f"{self.top5_accuracy:.2%}"))
        return [
            *rows,
            ("balanced accuracy", f"{self.balanced_accuracy:.2%}"),
            ("macro F1", f"{self.macro_f1:.4f}"),
            ("negative log-likelihood", f"{self.nll:.4f}"),
            *self.calibration.summary(),
            ("examples", f"{self.num_examples:,}"),
        ]

    def table(self, *, worst: int | None = None) -> str:
        """The scores as a Markdown table, with the accuracy of each class (or of the `worst` ones only)."""
        lines = ["| score | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in self.summary()), ""]
        scored = sorted((value, name) for name, value in self.class_accuracy.items() if value is not None)
        chosen = scored[:worst] if worst is not None else [(self.class_accuracy[name], name) for name in self.class_accuracy]
        title = f"class ({worst} lowest)" if worst is not None and len(scored) > worst else "class"
        lines += [f"| {title} | accuracy | examples |", "|---|---|---|"]
        lines += [
            f"| {in_markdown(name)} | {'-' if value is None else f'{value:.2%}'} | {self.class_support[name]:,} |"
            for value, name in chosen
        ]
        return "\n".join(lines) + "\n"


# As numbered entities, which every reader of Markdown takes for text and none for structure.
_MARKDOWN = str.maketrans({letter: f"&#{ord(letter)};" for letter in "`*[]|~<>&"} | {"\\": "\\\\"})
_LINKS = re.compile(r"(?i)(?<=:)/(?=/)|(?<=\bwww)\.|(?<![^\W_])_|_(?![^\W_])")


def in_markdown(name: str) -> str:
    """A name of somebody else's choosing as text in Markdown: no cell, code, HTML, picture or link begins or ends in it."""
    return _LINKS.sub(lambda found: f"&#{ord(found[0])};", shown(name).translate(_MARKDOWN))


def _share(score: Tensor, count: int) -> float:
    """A share of `count` examples, exactly: torchmetrics rounds it to single precision."""
    return round(float(score) * count) / count


def share_interval(count: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share, by the score test (Wilson, 1927): right near 0 and 1 and for few examples, too."""
    from scipy.stats import binomtest  # takes a second to import

    interval = binomtest(count, total).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def evaluate(logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> EvaluationReport:
    """Scores logits against labels.

    Args:
        logits: (N, K) float.
        labels: (N,) int64, from 0 to K - 1.
        class_names: K names.

    Raises:
        DataError: no examples, or shapes that do not fit.
        NonFiniteError: a logit is not a finite number.
    """
    num_classes = len(class_names)
    if logits.shape != (len(labels), num_classes) or not len(labels):
        raise DataError(f"logits {tuple(logits.shape)}, {len(labels)} labels and {num_classes} class names do not fit together.")
    if not logits.isfinite().all():
        raise NonFiniteError("the model's logits are not all finite numbers: there is nothing to score.")
    logits = logits.double()
    calibration = measure_calibration(logits, labels)
    support = torch.bincount(labels, minlength=num_classes).tolist()
    recalls = multiclass_recall(logits, labels, num_classes=num_classes, average="none").tolist()
    present = [recall for recall, count in zip(recalls, support, strict=True) if count]
    top5 = None
    if num_classes > 5:
        top5 = _share(multiclass_accuracy(logits, labels, num_classes=num_classes, top_k=5, average="micro"), len(labels))
    accuracy = _share(multiclass_accuracy(logits, labels, num_classes=num_classes, average="micro"), len(labels))
    predicted = torch.bincount(logits.argmax(1), minlength=num_classes).tolist()
    precisions = multiclass_precision(logits, labels, num_classes=num_classes, average="none").tolist()
    f1s = multiclass_f1_score(logits, labels, num_classes=num_classes, average="none").tolist()
    return EvaluationReport(
        num_examples=len(labels),
        accuracy=accuracy,
        accuracy_interval=share_interval(round(accuracy * len(labels)), len(labels)),
        top5_accuracy=top5,
        macro_f1=float(multiclass_f1_score(logits, labels, num_classes=num_classes, average="macro")),
        balanced_accuracy=math.fsum(present) / len(present),
        nll=calibration.nll,
        calibration=calibration,
        class_accuracy={name: recalls[i] if support[i] else None for i, name in enumerate(class_names)},
        class_precision={name: precisions[i] if predicted[i] else None for i, name in enumerate(class_names)},
        class_f1={name: f1s[i] if support[i] or predicted[i] else None for i, name in enumerate(class_names)},
        class_support={name: support[i] for i, name in enumerate(class_names)},
    )


@dataclass(frozen=True, kw_only=True)
class MultiLabelReport:
    """Scores on examples that may have several labels; shares are from 0 to 1.

    Args:
        num_examples: scored.
        mean_average_precision: area under each label's precision-recall curve, mean over the labels that occur.
        micro_f1: harmonic mean of precision and recall over all pairs of example and label, at a probability of one half.
        nll: mean over examples of the binary cross-entropy summed over labels, in nats.
        label_average_precision: by label name; None for labels that do not occur.
        label_support: examples by label name.
    """

    num_examples: int
    mean_average_precision: float
    micro_f1: float
    nll: float
    label_average_precision: dict[str, float | None]
    label_support: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def summary(self) -> list[tuple[str, str]]:
        """Names and values of the overall scores, for people."""
        return [
            ("mean average precision", f"{self.mean_average_precision:.2%}"),
            ("micro F1", f"{self.micro_f1:.2%}"),
            ("NLL (nats)", f"{self.nll:.4f}"),
            ("examples", f"{self.num_examples:,}"),
        ]

    def table(self, *, worst: int | None = None) -> str:
        """Overall scores, and average precision by label (of the `worst` alone), as Markdown tables."""
        found = {name: value for name, value in self.label_average_precision.items() if value is not None}
        order = sorted(found, key=lambda name: found[name])[: worst if worst is not None else len(found)]
        lines = [
            "| score | value |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in self.summary()),
            "",
            "| label | average precision | examples |",
            "|---|---|---|",
            *(f"| {in_markdown(name)} | {found[name]:.2%} | {self.label_support[name]:,} |" for name in order),
        ]
        return "\n".join(lines) + "\n"


def evaluate_multi_label(logits: Tensor, labels: Tensor, label_names: Sequence[str]) -> MultiLabelReport:
    """Scores logits (N, K) against labels (N, K) of 0 and 1.

    Raises:
        DataError: no examples, or shapes that do not fit.
        NonFiniteError: a logit is not finite.
    """
    if not len(logits) or logits.shape != labels.shape or logits.shape[1] != len(label_names):
        raise DataError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit {len(label_names)} label names."
        )
    if not logits.isfinite().all():
        raise NonFiniteError(f"the logits of example {int((~logits.isfinite()).any(1).nonzero()[0])} are not finite.")
    support = labels.sum(0).tolist()
    present = [index for index, count in enumerate(support) if count]
    precision: dict[int, float] = {}
    if present:
        columns = [*present, present[-1]]  # one more: torchmetrics wants two labels or more
        values = multilabel_average_precision(
            logits[:, columns].sigmoid(), labels[:, columns].long(), num_labels=len(columns), average="none"
        )
        precision = dict(zip(present, values[:-1].tolist(), strict=True))
    return MultiLabelReport(
        num_examples=len(logits),
        mean_average_precision=sum(precision.values()) / max(len(precision), 1),
        micro_f1=float(multilabel_f1_score(logits.sigmoid(), labels.long(), num_labels=len(label_names), average="micro")),
        nll=float(F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="sum")) / len(logits),
        label_average_precision={name: precision.get(index) for index, name in enumerate(label_names)},
        label_support=dict(zip(label_names, (int(count) for count in support), strict=True)),
    )
