"""What does a trained model say about pictures that nobody has labelled?

A model's folder holds all that this takes: the network, the names of its classes, the size and interpolation of its pictures, and
the rule by which a model that was trained with mixup is to predict.
"""

import csv
import io
import json
import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from timm.models.resnetv2 import ResNetV2
from torch import Tensor
from tqdm import tqdm

from bit_mixup.environment import Precision, versions
from bit_mixup.errors import CheckpointError, ConfigError, WeightsError, shown
from bit_mixup.images import View
from bit_mixup.launching import find_device
from bit_mixup.loading import load_batches
from bit_mixup.models import Normalize, build_bit
from bit_mixup.pictures import Pictures, PicturesInMemory, ReadableView, reason
from bit_mixup.prediction import Predictor, in_pieces_that_fit
from bit_mixup.runs import RunFolder
from bit_mixup.storage import read_json, write_text
from bit_mixup.unmixing import CHOICE, MEAN_IMAGE, RECORD, MixupRecord, RuleChoice, predict_by_rule
from bit_mixup.weights import CONFIG_FILE, fetch, fetch_companions, find_weights

logger = logging.getLogger(__name__)

# Libraries whose version shows in what a model says, and how. Of torch and timm the last digits are fixes alone.
_MATTERING = {"timm": "the network", "torch": "its arithmetic", "pillow": "decoding and resizing", "bit_mixup": "all of it"}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says about a picture.

    Args:
        id: the path, or the place in a list or data set.
        classes: names, the most probable first; none where the picture could not be read.
        probabilities: of these classes, from 0 to 1.
        error: why the picture could not be read; None for one that could.
    """

    id: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    error: str | None = None

    @property
    def label(self) -> str | None:
        """The most probable class; None where the picture could not be read."""
        return self.classes[0] if self.classes else None

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        pairs = zip(self.classes, self.probabilities, strict=True)
        return {"id": self.id, "classes": [{"class": n, "probability": p} for n, p in pairs], "error": self.error}


@dataclass(frozen=True, kw_only=True, eq=False)
class Classifier:
    """A trained model with all that it takes to predict.

    Args:
        name: as asked for.
        model: the network, on its device, in evaluation mode.
        label_names: of the classes, in the order of the logits.
        view: how pictures are resized.
        choice: the prediction rule.
        record: what that rule must know of training; None for a model that another tool has trained.
        revision: commit hash on the hub; None for a model of this machine.
        run: the run that the model is from, where it is still in its folder.
        precision: of convolutions.
    """

    name: str
    model: ResNetV2
    label_names: tuple[str, ...]
    view: View
    choice: RuleChoice
    record: MixupRecord | None
    revision: str | None
    run: RunFolder | None
    precision: Precision = "fp32"

    def predict(
        self, images: Any, *, top: int | None = None, batch_size: int = 64, num_workers: int = 0, progress: bool = False
    ) -> list[Prediction]:
        """Predicts the classes of pictures by the model's prediction rule.

        Args:
            images: a path, a picture of PIL, an array (H, W, 3) or (H, W) of uint8, or a list of these; or anything that
                `bit_mixup.pictures.find_pictures` gives.
            top: how many of the most probable classes to give. None: all.
            batch_size: pictures of a forward pass, at most; less where memory does not do.
            num_workers: processes that decode pictures.
            progress: whether to show a bar.

        Returns:
            One prediction for each picture, in their order. One that can not be read has its `error` set and no classes.

        Raises:
            ConfigError: top or batch_size is below 1.
        """
        if top is not None and top < 1:
            raise ConfigError(f"top is {top}; it must be at least 1, or None for all classes.")
        pictures = _as_pictures(images)
        scores, readable = self.scores(pictures, batch_size=batch_size, num_workers=num_workers, progress=progress)
        best = scores.softmax(1).topk(min(top or len(self.label_names), len(self.label_names)))
        predictions = []
        for index, ok in enumerate(readable.tolist()):
            name = pictures.ids([index])[0]
            if not ok:
                predictions.append(Prediction(id=name, classes=(), probabilities=(), error=reason(pictures, index)))
                continue
            classes = tuple(self.label_names[label] for label in best.indices[index].tolist())
            predictions.append(Prediction(id=name, classes=classes, probabilities=tuple(best.values[index].tolist())))
        return predictions

    def scores(
        self, pictures: Pictures, *, batch_size: int = 64, num_workers: int = 0, progress: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Scores (N, K) float64 whose softmax is the prediction, and whether each picture could be read, (N,) bool."""
        logits, shrunk, readable = self.logits(pictures, batch_size=batch_size, num_workers=num_workers, progress=progress)
        return self.scores_of(logits, shrunk), readable

    def scores_of(self, logits: Tensor, shrunk: Tensor) -> Tensor:
        """Scores (N, K) by the model's prediction rule, from what `logits` gives."""
        if self.record is None:  # the rule is raw, or a fitted temperature, which needs no record
            return logits / self.choice.temperature
        return predict_by_rule(self.choice.rule, logits, shrunk, self.record, temperature=self.choice.temperature)

    @torch.inference_mode()
    def logits(
        self, pictures: Pictures, *, batch_size: int = 64, num_workers: int = 0, progress: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the model says as it is.

        Returns:
            Logits of the pictures and of the shrunken pictures (the same, where the prediction rule looks at none), (N, K)
            float64 both, and whether each picture could be read, (N,) bool; what could not is black.

        Raises:
            ConfigError: batch_size is below 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1.")
        normalize, device = Normalize.of(self.model), next(self.model.parameters()).device
        looks_at_shrunk = self.record is not None and self.choice.rule in ("eq15", "unshrink")
        shrink = self.record.shrink_input(normalize.mean, normalize.std) if self.record and looks_at_shrunk else None
        network = Predictor(self.model, device, precision=self.precision).logits
        order = list(range(len(pictures)))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        source = ReadableView(pictures=pictures, view=self.view)
        with closing(load_batches(source, batches, num_workers=num_workers, device=device)) as loaded:
            for images, readable in tqdm(loaded, total=len(batches), desc="predicting", unit="batch", disable=not progress):
                normalized = normalize(images)
                logits = in_pieces_that_fit(network, normalized).double()
                shrunk = in_pieces_that_fit(network, shrink(normalized)).double() if shrink else logits
                parts.append((logits.cpu(), shrunk.cpu(), readable.bool().cpu()))
        if not parts:
            nothing = torch.empty(0, len(self.label_names), dtype=torch.float64)
            return nothing, nothing, torch.empty(0, dtype=torch.bool)
        logits, shrunk, readable = (torch.cat(column) for column in zip(*parts, strict=True))
        return logits, shrunk, readable


def load(
    name_or_path: str | Path, *, revision: str | None = None, rule: str = "stored", precision: Precision = "fp32"
) -> Classifier:
    """Loads a trained model to predict with.

    Args:
        name_or_path: the folder of a run, its `model/`, `user/name` on the hub, or anything with a head that
            `bit_mixup.find_weights` finds.
        revision: branch, tag or commit on the hub.
        rule: "stored": the prediction rule beside the model; "raw": the model as it is.
        precision: of convolutions; bf16 takes half the time where the hardware computes in it, and fp16 needs a GPU.

    Raises:
        WeightsError: see `bit_mixup.find_weights`; or the model has no head.
        CheckpointError: what lies beside the model can not be read.
        ConfigError: another rule or precision.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f'precision "{precision}": expected one of {", ".join(get_args(Precision))}.')
    if precision == "fp16" and find_device().type == "cpu":
        raise ConfigError("precision fp16 needs an accelerator, but the model is on the CPU. Use bf16 or fp32.")
    if rule not in ("stored", "raw"):
        raise ConfigError(f'rule "{rule}": expected stored or raw.')
    path = Path(name_or_path).expanduser()
    run = next((RunFolder(folder) for folder in (path, path.parent) if _is_run_of(folder, path)), None)
    weights = fetch(find_weights(str(run.model if run else name_or_path)), revision=revision)
    assert weights.file is not None
    fetch_companions(weights, (RECORD, MEAN_IMAGE, CHOICE))
    model = build_bit(weights, keep_head=True)
    folder = weights.file.parent
    choice = RuleChoice.load(folder) if rule == "stored" else None
    record = MixupRecord.load(folder)
    if choice is None:
        why = "as asked" if rule == "raw" else "no prediction rule lies beside the model"
        choice = RuleChoice(rule="raw", temperature=1.0, why=why, held_out_nll={}, num_held_out=0)
    if record is None and choice.rule in ("eq15", "temperature", "unshrink"):
        raise CheckpointError(
            f"{folder / CHOICE} predicts by the rule {choice.rule}, which needs {RECORD} beside it. Copy that too, or use "
            "--rule raw."
        )
    names = weights.label_names or tuple(f"class {index}" for index in range(int(model.num_classes)))
    if len(names) != model.num_classes:
        raise WeightsError(
            f"{folder / CONFIG_FILE} names {len(names)} classes, but the head has {model.num_classes}. Mend label_names."
        )
    _warn_of_other_versions(folder, str(name_or_path))
    size = weights.input_size
    return Classifier(
        name=str(name_or_path),
        model=model.to(find_device()).eval(),
        label_names=names,
        view=View(resize_size=size, crop_size=size, flip=False, interpolation=weights.interpolation),
        choice=choice,
        record=record,
        revision=weights.revision,
        run=run,
        precision=precision,
    )


def _is_run_of(folder: Path, path: Path) -> bool:
    """Whether a folder is a run's, and the path is it or its model."""
    run = RunFolder(folder)
    return (run.model / CONFIG_FILE).is_file() and run.plan.is_file() and path in (folder, run.model)


def _warn_of_other_versions(folder: Path, name: str) -> None:
    """Says which libraries are others than those that the model was trained with, where that may show in predictions."""
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    before, now = config.get("versions"), versions()
    if not isinstance(before, dict):
        return
    changed = [
        f"{library} {shown(str(before[library]))} -> {now[library]} ({what})"
        for library, what in _MATTERING.items()
        if library in before and library in now and _release(str(before[library])) != _release(now[library])
    ]
    if changed:
        logger.warning("%s was trained with other versions: %s; predictions may differ slightly", name, ", ".join(changed))


def _release(version: str) -> list[str]:
    """What of a version's number changes with more than fixes."""
    return version.split("+")[0].split(".")[:2]


def _as_pictures(images: Any) -> Pictures:
    if isinstance(images, Sequence) and not isinstance(images, str):
        return PicturesInMemory(images)
    return images if hasattr(images, "read") and hasattr(images, "ids") else PicturesInMemory([images])


def predictions_table(predictions: Sequence[Prediction], *, limit: int | None = None) -> str:
    """Predictions as lines for a terminal: name, and each class with its probability; at most `limit` of them."""
    chosen = predictions[:limit]
    width = min(60, max((len(shown(one.id)) for one in chosen), default=0))
    lines = []
    for one in chosen:
        said = "  ".join(f"{shown(name)} {share:.1%}" for name, share in zip(one.classes, one.probabilities, strict=True))
        lines.append(f"{shown(one.id):<{width}}  {said if one.error is None else 'UNREADABLE'}")
    if len(predictions) > len(chosen):
        lines.append(f"... and {len(predictions) - len(chosen):,} more")
    return "\n".join(lines)


def check_output(path: Path) -> None:
    """Sees whether predictions can be written in the format that a name asks for; raises ConfigError."""
    if path.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f'{path}: predictions are written as .csv or .jsonl, not "{path.suffix}". Rename the output.')


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """Writes predictions as .csv or .jsonl, whole or not at all; probabilities keep all their digits.

    Raises:
        ConfigError: another suffix.
        CheckpointError: the file can not be written.
    """
    check_output(path)
    if path.suffix == ".jsonl":
        lines = (json.dumps(one.as_dict(), ensure_ascii=False) + "\n" for one in predictions)
        return write_text(path, "".join(lines))
    most = max((len(one.classes) for one in predictions), default=0)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["id", *(f"{what}_{place}" for place in range(1, most + 1) for what in ("class", "probability")), "error"])
    for one in predictions:
        cells = [cell for pair in zip(one.classes, map(repr, one.probabilities), strict=True) for cell in pair]
        rows.writerow([one.id, *cells, *[""] * (2 * most - len(cells)), one.error or ""])
    write_text(path, table.getvalue())
