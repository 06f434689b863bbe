"""What may a user ask of a finished model or run?

The commands that come after training, each as a dataclass of its options, as `config` holds those of runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from tyro.conf import Positional

from bit_mixup.checking import check_fields
from bit_mixup.environment import Precision
from bit_mixup.errors import ConfigError

_LEAST = {"top": 1, "batch_size": 1, "threads": 1, "num_workers": 0, "resamples": 100, "seed": 0}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What can be asked after training."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in _LEAST.items():
            value = getattr(self, name, None)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}.")


RequestKind = TypeVar("RequestKind", bound=Request)


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Request):
    """Predicts the classes of pictures. Exits with 1 where some of them could not be read."""

    model: Positional[str]
    """A run's folder, its model/, a hub user/name, or any other model with a head."""
    pictures: Positional[tuple[str, ...]]
    """Files, folders, globs, or data sets (whose test split, or the one of --split, is predicted)."""
    output: Path | None = None
    """Also write all predictions into this file: .csv or .jsonl."""
    top: int = 3
    """How many of the most probable classes to give."""
    rule: Literal["stored", "raw"] = "stored"
    """stored: the prediction rule beside the model. raw: the model as it is."""
    split: str | None = None
    """Split of a data set. None: test, validation, ..., whichever comes first, else all that there is."""
    image_column: str | None = None
    """Column of the pictures, where it is not plain."""
    batch_size: int = 64
    """Pictures of a forward pass, at most; less where memory does not do."""
    num_workers: int = 0
    """Processes that decode pictures."""
    threads: int | None = None
    """Torch's threads. None: the cores."""
    precision: Precision = "fp32"
    """Of convolutions: bf16 takes half the time where the hardware computes in it; fp16 needs an accelerator."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Request):
    """Scores a model on a labelled data set, and writes the same report as a run."""

    model: Positional[str]
    """A run's folder, its model/, a hub user/name, or any other model with a head."""
    dataset: str | None = None
    """As of fine-tune. None: the data set of the run."""
    dataset_config: str | None = None
    """Configuration of a hub data set that has several."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    split: str | None = None
    """Split to score. None: for the data set of the run what the run scored, else test, validation, ..., or all that there is."""
    image_column: str | None = None
    """Column of the pictures, where it is not plain."""
    label_column: str | None = None
    """Column of the classes, where it is not plain."""
    rule: Literal["stored", "raw"] = "stored"
    """stored: the prediction rule beside the model. raw: the model as it is."""
    output_dir: Path | None = None
    """Folder of the report. None: evaluations/<dataset>-<split> in the run's folder, else runs/evaluate-<dataset>-<split>."""
    overwrite: bool = False
    """Write anew what an earlier evaluation wrote there."""
    batch_size: int = 64
    """Pictures of a forward pass, at most; less where memory does not do."""
    num_workers: int = 0
    """Processes that decode pictures."""
    threads: int | None = None
    """Torch's threads. None: the cores."""
    precision: Precision = "fp32"
    """Of convolutions: bf16 takes half the time where the hardware computes in it; fp16 needs an accelerator."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Request):
    """Compares runs that scored the same test examples: differences with bootstrap intervals, and McNemar's test."""

    runs: Positional[tuple[str, ...]]
    """Folders of two or more runs or evaluations; the first is what the others are compared with."""
    html: Path | None = None
    """Also write the comparison as a page."""
    json: Path | None = None
    """Also write the numbers."""
    resamples: int = 10_000
    """Of the bootstrap."""
    seed: int = 0
    """Of the bootstrap."""


@dataclass(frozen=True, kw_only=True)
class PushConfig(Request):
    """Publishes the model of a run on the hub, with a model card, in the layout that timm and transformers read."""

    run: Positional[Path]
    """The folder of a finished run."""
    repository: Positional[str]
    """Where to: user/name."""
    dry_run: Path | None = None
    """Write what would be published into this folder instead; nothing is sent."""
    private: bool = False
    """Make a new repository private."""
    license: str | None = None
    """Of the model, as the hub spells it, such as cc-by-4.0. None: that of the weights it is from, where they state one."""
    message: str | None = None
    """Of the commit. None: what was trained on what."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Request):
    """Writes a model as one file for other programs: ONNX, or torch.export's archive."""

    model: Positional[str]
    """A run's folder, its model/, a hub user/name, or any other model with a head."""
    output: Positional[Path]
    """File to write: .onnx or .pt2. What a program must know of it is written beside it as .json, and into it."""
    rule: Literal["none", "raw", "stored"] = "none"
    """none: logits come out. raw: probabilities. stored: probabilities by the prediction rule beside the model."""
    pixels: bool = False
    """Take bytes (0 to 255) and normalise them inside the network."""
    overwrite: bool = False
    """Write over a file that is there."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
