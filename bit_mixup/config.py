"""What may a user ask?"""

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from bit_mixup.catalog import DEFAULT_MODEL
from bit_mixup.checking import check_fields
from bit_mixup.corruption import check_fraction
from bit_mixup.environment import MemoryFormat, Precision, Speedups
from bit_mixup.errors import ConfigError, did_you_mean
from bit_mixup.hyperrule import HyperParameters, LamLaw, Preset, bit_hyperrule, scale_step
from bit_mixup.laws import AskedRule, Form, Mixed, PartnerRule, SmoothingTarget, Trainable, TrainingLaw
from bit_mixup.storage import plain_values
from bit_mixup.weights import Weights


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where pictures and labels are."""

    dataset: str
    """digits (bundled), a folder of class folders or a zip / tar / tar.gz of it, csv / parquet / json files, a save_to_disk
    folder, or a hub id."""
    dataset_config: str | None = None
    """Configuration of a hub data set that has several."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str | None = None
    """Split to score. None: the first labelled one of test, validation, ...; else a fifth of the training split."""
    image_column: str | None = None
    """Column of the pictures, where it is not plain."""
    label_column: str | None = None
    """Column of the classes, where it is not plain."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(DataConfig):
    """Looks for what is wrong with a data set. Exits with 0 where nothing is, with 1 after warnings, with 2 after errors."""

    full: bool = False
    """Also decode every picture: unreadable ones, odd kinds, duplicates."""
    json: Path | None = None
    """Also write the findings into this file."""
    preset: Preset = "code"
    """Preset of the rule, for the resolution that it would choose."""
    seed: int = 0
    """Of the split that is made where there is nothing to score, and of the sample of sizes."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(DataConfig):
    """What can be asked of any run, whatever it trains."""

    corrupt_images: Literal["raise", "quarantine"] = "raise"
    """Unreadable pictures: raise stops and names one; quarantine decodes all before training, leaves them out and lists them in
    quarantine.json."""

    model: str = DEFAULT_MODEL
    """bundled, a published architecture.tag (bit-mixup models), a .safetensors or .npz file, a folder, or a hub user/name."""
    std_eps: float | None = None
    """Added to the variance of filters. None: what the weights say, else 1e-8 as in timm; the reference has 1e-10."""

    steps: int | None = None
    """Optimizer steps; warm-up and decays move in proportion."""
    batch_size: int | None = None
    """Examples per step, over all processes. The rate does not follow it."""
    base_lr: float | None = None
    """Rate between warm-up and first decay."""
    warmup_steps: int | None = None
    """Steps of linear warm-up."""
    decay_steps: tuple[int, ...] | None = None
    """Steps after which the rate falls ten-fold."""
    momentum: float | None = None
    """Of SGD."""
    weight_decay: float | None = None
    """Of SGD; BiT transfers without."""
    crop_size: int | None = None
    """Edge in pixels of training crops and evaluation pictures."""
    flip: bool = True
    """Mirror half of the training pictures; turn it off where that changes the class."""
    mixup_alpha: float | None = None
    """Beta parameter of mixup; 0 turns it off."""
    mixup_lam: LamLaw = "step"
    """Draw the mixing weight once for each step, as BiT does, or for each example."""

    seed: int = 0
    """Of random weights, shuffling, crops, mixing and splits."""
    precision: Precision | None = None
    """Of the forward and backward pass. None: what the Accelerate configuration says, else bf16 where the hardware computes in it
    (scores are then computed in fp32 all the same), else fp32. fp16 needs an accelerator."""
    micro_batch: int | Literal["auto"] | None = None
    """Most examples of one backward pass; it changes rounding alone. None: what fits into 6 GiB. auto: what fits, as tried."""
    num_workers: int | None = None
    """Processes that decode pictures. None: 0 on the CPU, else up to 8."""
    threads: int | None = None
    """Torch's threads in each process. None: an equal share of the cores."""
    memory_format: MemoryFormat = "channels_last"
    """How pictures and filters lie in memory; it changes time, and rounding."""
    quick_layers: bool = True
    """Compute weight standardisation and group normalisation by operations that take less time than timm's."""
    fused_norms: bool = True
    """On a GPU, compute group normalisation and ReLU by one kernel."""
    keep_filters: bool = True
    """Standardise filters once a step, not in each of its backward passes."""
    fused_optimizer: bool = True
    """Take a step of SGD by one operation."""

    output_dir: Path | None = None
    """Folder of the run. None: runs/<dataset>-<model>-<seed>."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder, if there is one."""
    overwrite: bool = False
    """Delete the run in the folder and start anew."""
    log_every: int = 10
    """Period in steps of the log."""
    save_every: int = 100
    """Period in steps of checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    tracker: str | None = None
    """Also log through Accelerate to tensorboard, wandb, ..., if installed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("log_every", "save_every", "keep_checkpoints", "micro_batch", "steps"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.")
        for name in ("seed", "few_shot_seed", "num_workers"):
            value = getattr(self, name, None)
            if value is not None and value < 0:
                raise ConfigError(f"{name} is {value}; it must be 0 or a positive whole number.")
        if self.std_eps is not None and not (math.isfinite(self.std_eps) and self.std_eps > 0):
            raise ConfigError(f"std_eps is {self.std_eps}; it must be a small positive number, such as 1e-8 or 1e-10.")

    @property
    def speedups(self) -> Speedups:
        """How steps are computed."""
        return Speedups(**{field.name: getattr(self, field.name) for field in fields(Speedups)})

    @property
    def micro_batch_note(self) -> str:
        """What a plan says behind the size of its micro-batches."""
        return " (auto: tried before training)" if self.micro_batch == "auto" else ""

    def as_json(self) -> dict[str, Any]:
        """As plain values for `config.json`; `from_json` reads it back. What belongs to one start only is left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("resume", "overwrite")}
        return plain_values(values)

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Reads a saved `config.json`.

        Raises:
            ConfigError: it can not be read, or holds an unknown key or a wrong value.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} can not be read as a configuration: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold a JSON object of options, such as a run's config.json.")
        if values.get("mixup_alpha") == "inf":
            values["mixup_alpha"] = math.inf
        return configure(cls, **values)


@dataclass(frozen=True, kw_only=True)
class TransferConfig(RunConfig):
    """Everything that can be asked of fine-tuning. None leaves a value to the rule."""

    streaming: bool = False
    """Read training pictures from where they lie as they are needed, for sets larger than the disk: a hub id or parquet files.
    The order is shuffled within a buffer alone, and a resumed run begins another pass."""
    train_examples: int | None = None
    """With streaming: how many training examples there are, where neither the data set's card nor its files say so."""
    shuffle_buffer: int = 2000
    """With streaming: pictures among which the next one is drawn."""

    examples_per_class: int | None = None
    """Train on a balanced few-shot subset of this many for each class."""
    few_shot_seed: int = 0
    """Seed of the few-shot draw."""
    validation_fraction: float = 0.0
    """Share of the training split to hold out and score apart."""
    revision: str | None = None
    """Branch, tag or commit of weights on the hub."""
    preset: Preset = "code"
    """code: the reference's PyTorch code. paper: the paper's text. light: code with batch 128 and rate 0.001."""
    resolution: Literal["rule", "model"] = "rule"
    """rule: by the size of the pictures. model: crops of the size the weights were made for, resized a fifth larger."""
    resize_size: int | None = None
    """Edge in pixels that training pictures are resized to."""

    trainable: Trainable = "all"
    """Train all weights, those from the last stage on, or the head alone (a linear probe): on features computed once, of whole
    pictures, and mixed only with a mixup_alpha."""

    mixup_partner: PartnerRule = "all"
    """Mix with any example of the batch, one of the same class, or one of the ten nearest neighbours in pretrained features."""
    mixup_of: Mixed = "both"
    """Mix inputs and labels, or one of them."""
    mixup_stage: int = 0
    """Mix pictures (0), or features after this stage of the network, 1 to 4."""
    mixup_form: Form = "exact"
    """Experimental, for study: modified trains on mixup's shrunken data without its noise, approximate adds the noise to second
    order."""
    cool_down: float = 0.0
    """Last share of the steps that does not mix."""
    label_smoothing: float = 0.0
    """Weight taken from the labels."""
    smooth_toward: SmoothingTarget = "uniform"
    """Where that weight goes: all classes alike, or by their frequencies, as mixup implies."""
    input_noise: float = 0.0
    """Standard deviation of Gaussian noise on the pictures, as a share of the range from black to white."""
    feature_dropout: float = 0.0
    """Probability with which a feature before the head is dropped."""
    corrupt_labels: float = 0.0
    """Replace this share of the training labels by wrong ones, and report how far they were memorised."""
    prediction_rule: AskedRule = "raw"
    """How to predict after mixup: raw, eq15, temperature, unshrink, fitted, or auto, which picks by held-out likelihood."""
    score_every: int | None = None
    """Also score the test split each so many steps, into scores.jsonl."""
    diagnostics: bool = False
    """Also measure behaviour between examples, Jacobians, parts of the loss, and adversarial pictures."""
    attack_from: str | None = None
    """With diagnostics: a trained model of the same classes. Pictures made to fool it are tried too (a transferred attack)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_streaming()
        self._check_head()
        check_fraction(self.corrupt_labels)
        if self.score_every is not None and self.score_every < 1:
            raise ConfigError(f"score_every is {self.score_every}; it must be at least 1.")
        if self.attack_from and not self.diagnostics:
            raise ConfigError("attack_from belongs to the diagnostics, which were not asked for: add --diagnostics.")
        if self.resolution == "model" and (self.resize_size or self.crop_size):
            raise ConfigError("resolution model contradicts resize_size and crop_size: give one or the other.")

    def _check_streaming(self) -> None:
        for name in ("train_examples", "shuffle_buffer"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.")
        if not self.streaming:
            if self.train_examples is not None:
                raise ConfigError(
                    "train_examples belongs to streaming; otherwise they are counted. Add --streaming or leave it out."
                )
            return
        # Each of these needs all of the training split before the first step, or a second look at an example.
        needing_all = {
            "examples_per_class": self.examples_per_class,
            "validation_fraction": self.validation_fraction,
            "corrupt_labels": self.corrupt_labels,
            "corrupt_images": self.corrupt_images == "quarantine",
            "mixup_partner": self.mixup_partner != "all",
            "mixup_form": self.mixup_form != "exact",
            "smooth_toward": self.smooth_toward != "uniform",
            "num_workers": self.num_workers,
        }
        asked = [name for name, value in needing_all.items() if value]
        if asked:
            raise ConfigError(
                f"{asked[0]} {getattr(self, asked[0])} does not go with streaming, which sees each training example as it passes "
                f"by, in one process. Leave out --{asked[0].replace('_', '-')} or --streaming."
            )

    def _check_head(self) -> None:
        if self.trainable != "head":
            return
        # Each of these changes pictures from step to step, or needs the network in training.
        needing_pictures = {
            "streaming": self.streaming,
            "mixup_partner": self.mixup_partner != "all",
            "mixup_stage": self.mixup_stage,
            "mixup_form": self.mixup_form != "exact",
            "input_noise": self.input_noise,
            "micro_batch": self.micro_batch == "auto",
        }
        asked = [name for name, value in needing_pictures.items() if value]
        if asked:
            raise ConfigError(
                f"{asked[0]} {getattr(self, asked[0])} does not go with trainable head, which learns from features that are "
                f"computed once. Leave out --{asked[0].replace('_', '-')} or --trainable head."
            )

    def law(self, alpha: float) -> TrainingLaw:
        """What is done to the examples, given the alpha that was asked for or that the rule says.

        Raises:
            ConfigError: options contradict each other.
        """
        return TrainingLaw(
            alpha=alpha,
            lam=self.mixup_lam,
            partner=self.mixup_partner,
            mixed=self.mixup_of,
            stage=self.mixup_stage,
            label_smoothing=self.label_smoothing,
            smooth_toward=self.smooth_toward,
            input_noise=self.input_noise,
            feature_dropout=self.feature_dropout,
            cool_down=self.cool_down,
            form=self.mixup_form,
            on_features=self.trainable == "head",
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Everything that can be asked of pre-training. None leaves a value to BiT's upstream recipe.

    The dataset may also be an .npz file of arrays (images, labels, class_names); nothing is scored unless a test_split is named.
    Of the model only the network counts (but for init): it starts from random weights. Plain names (resnetv2_101x1_bit) will do.
    """

    test_split: str | None = None
    """Split to score. None: nothing is scored."""
    model: str = DEFAULT_MODEL
    """The network: bundled (the small one), an architecture such as resnetv2_101x1_bit, or the name or folder of a model."""
    steps: int | None = None
    """Optimizer steps, in place of epochs."""
    batch_size: int | None = None
    """Examples per step, over all processes. None: 256."""
    base_lr: float | None = None
    """Rate between warm-up and first decay. None: 0.03 for each 256 examples of a batch."""
    warmup_steps: int | None = None
    """Steps of linear warm-up. None: a twentieth of the run, at most 5000."""
    decay_steps: tuple[int, ...] | None = None
    """Steps after which the rate falls ten-fold. None: at 30, 60 and 80 % of the run."""
    weight_decay: float | None = None
    """Of SGD. None: 0.0001."""
    crop_size: int | None = None
    """Edge in pixels of crops. None: the input size of the network."""
    epochs: float = 90.0
    """Length of the run in passes over the data set, unless steps are given."""
    min_area: float = 0.08
    """Smallest share of a picture that an inception crop holds; 1 shows it whole."""
    init: bool = False
    """Start from the body of the model's weights instead of random ones, with a new head."""
    distort: bool = False
    """Bend, recolour and blur: for drawings, letters and symbols, not for photographs."""
    margin: float | None = None
    """Learn from angles (CosFace): cosines, of which that of the right class must win by this much, in place of scalar products:
    0.2, to begin with. None: plain softmax."""
    cosine_scale: float = 24.0
    """With a margin: what cosines are multiplied by, to be logits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.epochs <= 1e6:
            raise ConfigError(f"epochs is {self.epochs}; it must be a positive number, at most a million.")
        if self.margin is not None and not 0 <= self.margin < 1:
            raise ConfigError(f"margin is {self.margin}; it must be at least 0 and below 1.")
        if not 0 < self.cosine_scale < math.inf:
            raise ConfigError(f"cosine_scale is {self.cosine_scale}; it must be a positive number.")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(PretrainConfig):
    """Everything that can be asked of distillation: that of pre-training, and a teacher in place of labels."""

    teacher: str
    """What the model learns from, with its head: the model folder of a run, a published architecture.tag, or a file."""
    temperature: float = 1.0
    """Softens both distributions; the paper tries 1, 2, 5 and 10."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margin is not None:
            raise ConfigError("margin is for learning from labels, and distillation has none. Leave it out.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature is {self.temperature}; it must be a positive number.")


Config = TypeVar("Config", bound=RunConfig)


def configure(kind: type[Config], /, **options: Any) -> Config:
    """A configuration of keyword arguments. Paths may be strings, and the other way round; tuples may be lists.

    Raises:
        ConfigError: an unknown name, a missing data set or teacher, or a wrong value.
    """
    known = [field.name for field in fields(kind)]
    for name in options:
        if name not in known:
            raise ConfigError(f'there is no option "{name}"{did_you_mean(name, known)}. `{_COMMANDS[kind]} --help` lists them.')
    if "dataset" not in options:
        raise ConfigError('no data set was named. Give dataset, for instance "uoft-cs/cifar10", a folder, or "digits".')
    if "teacher" in known and "teacher" not in options:
        raise ConfigError(
            "no teacher was named. Give teacher: the model folder of a run, a published architecture.tag, or a file."
        )
    for name in ("dataset", "model", "teacher", "attack_from"):
        if isinstance(options.get(name), Path):
            options[name] = str(options[name])
    if isinstance(options.get("output_dir"), str):
        options["output_dir"] = Path(options["output_dir"])
    if isinstance(options.get("decay_steps"), list):
        options["decay_steps"] = tuple(options["decay_steps"])
    return kind(**options)


_COMMANDS: dict[type[RunConfig], str] = {
    TransferConfig: "bit-mixup fine-tune",
    PretrainConfig: "bit-mixup pretrain",
    DistillConfig: "python recipes/distill.py",
}


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """The numbers of a run and where each comes from.

    Args:
        hyper: what will be run.
        rule: what the rule alone says.
        reasons: for each field of `hyper` that is not the rule's, why.
    """

    hyper: HyperParameters
    rule: HyperParameters
    reasons: dict[str, str]


def resolve(config: TransferConfig, *, num_examples: int, image_area: float, weights: Weights) -> Resolution:
    """Asks the rule, then puts what was asked for in its place.

    Raises:
        ConfigError: the result contradicts itself.
    """
    rule = bit_hyperrule(num_examples, image_area, preset=config.preset, architecture=weights.architecture)
    hyper = rule
    reasons: dict[str, str] = {}
    if config.steps is not None:
        hyper = replace(
            rule,
            steps=config.steps,
            warmup_steps=scale_step(rule.warmup_steps, rule.steps, config.steps),
            decay_steps=tuple(scale_step(step, rule.steps, config.steps) for step in rule.decay_steps),
        )
        reasons |= {"steps": "--steps", "warmup_steps": "in proportion to --steps", "decay_steps": "in proportion to --steps"}
    if config.resolution == "model":
        size = weights.input_size
        hyper = replace(hyper, resize_size=round(size * 6 / 5), crop_size=size)
        reasons |= dict.fromkeys(("resize_size", "crop_size"), "--resolution model")
    if config.trainable == "head":
        hyper = replace(hyper, mixup_alpha=0.0)
        reasons["mixup_alpha"] = "--trainable head"
    asked = {f.name: getattr(config, f.name) for f in fields(HyperParameters)}
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked.get("crop_size") and not asked.get("resize_size"):
        hyper = replace(
            hyper, resize_size=round(asked["crop_size"] * hyper.resize_size / hyper.crop_size), crop_size=asked["crop_size"]
        )
        reasons["resize_size"] = "in proportion to --crop-size"
    if asked.get("resize_size") and not asked.get("crop_size"):
        hyper = replace(
            hyper, resize_size=asked["resize_size"], crop_size=round(asked["resize_size"] * hyper.crop_size / hyper.resize_size)
        )
        reasons["crop_size"] = "in proportion to --resize-size"
    hyper = replace(hyper, **asked)
    reasons |= {name: f"--{name.replace('_', '-')}" for name in asked}
    changed = {name: why for name, why in reasons.items() if getattr(hyper, name) != getattr(rule, name)}
    return Resolution(hyper=hyper, rule=rule, reasons=changed)


UPSTREAM_LR = 0.03  # for UPSTREAM_BATCH examples a step, in proportion
UPSTREAM_BATCH = 256
UPSTREAM_DECAYS = (0.3, 0.6, 0.8)  # of the run
UPSTREAM_WARMUP = 5_000  # steps, but never more than a twentieth of the run


def resolve_upstream(config: PretrainConfig, *, num_examples: int, weights: Weights) -> HyperParameters:
    """BiT's upstream recipe (Kolesnikov et al., 2020, section 3.2 and appendix), with what was asked for in its place.

    SGD with momentum 0.9 and weight decay 0.0001; a rate of 0.03 for each 256 examples of a batch, after a linear warm-up
    divided by 10 at 30, 60 and 80 % of the run; 90 passes over the data set; no mixup.
    Distillation mixes with weights uniform on [0, 1], as Beyer et al. (2022) do.

    Raises:
        ConfigError: the result contradicts itself.
    """

    def asked(name: str, default: Any) -> Any:
        value = getattr(config, name)
        return default if value is None else value

    batch_size, crop_size = asked("batch_size", UPSTREAM_BATCH), asked("crop_size", weights.input_size)
    steps = config.steps or max(1, round(config.epochs * num_examples / max(1, batch_size)))
    return HyperParameters(
        resize_size=crop_size,
        crop_size=crop_size,
        steps=steps,
        warmup_steps=asked("warmup_steps", min(UPSTREAM_WARMUP, steps // 20)),
        decay_steps=asked("decay_steps", tuple(round(share * steps) for share in UPSTREAM_DECAYS)),
        batch_size=batch_size,
        base_lr=asked("base_lr", UPSTREAM_LR * batch_size / UPSTREAM_BATCH),
        momentum=asked("momentum", 0.9),
        weight_decay=asked("weight_decay", 1e-4),
        mixup_alpha=asked("mixup_alpha", 1.0 if isinstance(config, DistillConfig) else 0.0),
    )
