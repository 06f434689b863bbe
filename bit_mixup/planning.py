"""What will a run do, and why? Answered before it starts, without torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bit_mixup.catalog import PUBLISHED
from bit_mixup.config import Resolution, TransferConfig, resolve
from bit_mixup.corruption import CorruptedLabels, corrupt_labels
from bit_mixup.data import ImageDataset, load_image_dataset
from bit_mixup.doctor import Finding, column_findings, examine
from bit_mixup.environment import Environment, feature_folder, read_environment
from bit_mixup.errors import ConfigError, shown
from bit_mixup.hyperrule import MEDIUM, RULE_MIXUP_ALPHA, SMALL, SMALL_IMAGE_AREA, rate_table, size_class
from bit_mixup.images import View
from bit_mixup.laws import TrainingLaw, check_rule
from bit_mixup.runs import RunFolder, default_folder
from bit_mixup.sampling import GROUP_SIZE, MicroBatch, cut_batch, fitting_micro_batch
from bit_mixup.scanning import Quarantine, SizeSummary, quarantine_note, refuse_empty, summarize_sizes
from bit_mixup.storage import plain_values
from bit_mixup.streaming import StreamedSplit, stream_image_dataset
from bit_mixup.theory import best_train_accuracy, loss_floor
from bit_mixup.weights import BUNDLED_FOLDER, Weights, fetch, find_weights, size_text


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """All decisions of a run.

    Args:
        config: what was asked.
        data: what is trained and scored on.
        sizes: of its pictures.
        weights: what is transferred.
        resolution: the numbers, and where they come from.
        environment: launcher and machine.
        cuts: for each process its micro-batches of a global batch.
        run: where files go.
        corruption: which training labels were replaced by wrong ones, if that was asked for.
        attacker: the model whose adversarial pictures are tried, if that was asked for.
        findings: what the doctor's fast checks have found.
        quarantined: name and reason of each unreadable picture that is left out, if that was asked for.
        streamed: what is trained on, where it passes by; `data.train` holds but a sample then.
    """

    config: TransferConfig
    data: ImageDataset
    sizes: SizeSummary
    weights: Weights
    resolution: Resolution
    environment: Environment
    cuts: list[list[MicroBatch]]
    run: RunFolder
    corruption: CorruptedLabels | None = None
    attacker: Weights | None = None
    findings: tuple[Finding, ...] = ()
    quarantined: tuple[dict[str, str], ...] = ()
    streamed: StreamedSplit | None = None

    @property
    def num_train(self) -> int:
        """Examples to train on."""
        return self.streamed.num_examples if self.streamed else len(self.data.train)

    @property
    def view(self) -> View:
        """How pictures are resized."""
        hyper = self.resolution.hyper
        return View(
            resize_size=hyper.resize_size,
            crop_size=hyper.crop_size,
            flip=self.config.flip,
            interpolation=self.weights.interpolation,
        )

    @property
    def law(self) -> TrainingLaw:
        """What is done to the examples."""
        return self.config.law(self.resolution.hyper.mixup_alpha)

    @property
    def largest_micro_batch(self) -> int:
        """Examples of the largest backward pass of any process."""
        return max(cut.size for cuts in self.cuts for cut in cuts)

    @property
    def pictures_at_a_time(self) -> int:
        """Of the largest pass through the network. A probe's backward passes are of features, which are small."""
        if not self.probes or isinstance(self.config.micro_batch, int):
            return self.largest_micro_batch
        return min(self.resolution.hyper.batch_size, _fitting(self.weights, self.resolution, self.law))

    @property
    def probes(self) -> bool:
        """Whether the head alone is trained, on features."""
        return self.config.trainable == "head"

    @property
    def trained_parameters(self) -> int:
        """How many numbers are trained."""
        shape, classes = self.weights.shape, self.data.num_classes
        if self.config.trainable == "all":
            return shape.parameter_count(classes)
        return shape.last_stage_count(classes) if self.config.trainable == "stage4" else shape.head_count(classes)

    def memory_bytes(self, examples: int | None = None) -> int:
        """Estimate in bytes for each process, for backward passes of some examples (None: as they are planned)."""
        shape, size = self.weights.shape, self.resolution.hyper.crop_size
        examples, classes = examples or self.pictures_at_a_time, self.data.num_classes
        if self.probes:
            return shape.probing_bytes(size, examples=examples, num_classes=classes, num_train=self.num_train)
        return shape.training_bytes(
            size,
            examples=examples,
            num_classes=classes,
            half=self.environment.precision != "fp32",
            num_processes=self.environment.num_processes,
            activations=self.law.memory_factor,
            trained=self.trained_parameters,
        )

    def resolved(self) -> dict[str, Any]:
        """What has a say in the result, as plain values."""
        return {
            "hyper": plain_values(asdict(self.resolution.hyper)),
            "reasons": self.resolution.reasons,
            "trainable": self.config.trainable,
            "law": self.law.as_json(),
            "corrupt_labels": self.config.corrupt_labels,
            "flip": self.config.flip,
            "interpolation": self.weights.interpolation,
            "precision": self.environment.precision,
            "data": {
                "name": self.data.name,
                "revision": self.data.revision,
                "fingerprint": self.data.fingerprint,
                "image_column": self.data.image_column,
                "label_column": self.data.label_column,
                "train_examples": self.num_train,
                "streamed": self.streamed is not None,
                "test_examples": len(self.data.test),
                "test_split": self.data.test.name,
                "validation_examples": len(self.data.validation) if self.data.validation else 0,
                "class_names": list(self.data.class_names),
            },
            "weights": {"name": self.weights.name, "architecture": self.weights.architecture, "revision": self.weights.revision},
        }

    def sections(self) -> list[tuple[str, list[str]]]:
        """The plan for people: headings, and lines under each."""
        return [
            ("data", self._data_lines()),
            ("doctor", self._doctor_lines()),
            ("weights", self._weight_lines()),
            ("trains", self._trained_lines()),
            ("rule", self._rule_lines()),
            ("mixup", self._mixup_lines()),
            ("batch", self._batch_lines()),
            ("machine", self._machine_lines()),
            ("writes", [f"{self.run.path}/"]),
        ]

    def text(self) -> str:
        """The plan as it is printed."""
        lines = []
        for heading, entries in self.sections():
            lines += [f"{heading if index == 0 else '':<9} {shown(entry)}" for index, entry in enumerate(entries)]
        return "\n".join(lines)

    def _mark(self, name: str) -> str:
        """What an overridden value's line says of the rule's."""
        if name not in self.resolution.reasons:
            return ""
        return f" [{self.resolution.reasons[name]}; the rule: {getattr(self.resolution.rule, name)}]"

    def _data_lines(self) -> list[str]:
        data, sizes = self.data, self.sizes
        counts = f"{self.num_train:,} training and {len(data.test):,} test examples, {data.num_classes} classes"
        small = sizes.median_area < SMALL_IMAGE_AREA
        other = 1 - sizes.small_share if small else sizes.small_share
        looked = f"{sizes.sampled:,} pictures" + (" (a seeded sample)" if sizes.sampled < len(data.train) else "")
        return [
            f"{data.name}" + (f" @ {data.revision}" if data.revision else "") + f": {counts}",
            *data.notes,
            *(self.streamed.notes(self.config.shuffle_buffer) if self.streamed else []),
            f"{looked}: median area {sizes.median_area:,.0f} px, from {sizes.smallest[0]}x{sizes.smallest[1]} to "
            f"{sizes.largest[0]}x{sizes.largest[1]}; {other:.0%} on the other side of 96x96",
        ]

    def _doctor_lines(self) -> list[str]:
        lines = [finding.as_line() for finding in self.findings if finding.severity != "note"]
        if self.quarantined:
            lines.append(quarantine_note(self.quarantined))
        if self.streamed:
            lines.append(f"columns and the first {len(self.data.train):,} examples were looked at, no more of what is streamed")
        return lines or ["nothing to object to in columns, labels, classes and file sizes (bit-mixup doctor --full decodes all)"]

    def _weight_lines(self) -> list[str]:
        weights = self.weights
        body, head = weights.shape.parameter_count(), self.data.num_classes * (weights.shape.num_features + 1)
        upstream = weights.pretrained_cfg.get("num_classes")
        line = f"{weights.name}: {size_text(body, '')} parameters and a new head of {size_text(head, '')}, zero"
        line += f" (the upstream head of {upstream:,} classes is left out)" if upstream else ""
        if weights.file is None and weights.name in PUBLISHED:
            size = size_text(PUBLISHED[weights.name].download_bytes)
            source = f"download of {size} from the hub (timm/{weights.name}), unless cached"
        elif weights.revision:
            source = f"from the hub @ {weights.revision}"
        elif weights.file is not None and weights.file.parent == BUNDLED_FOLDER:
            source = f"in the package ({size_text(weights.file.stat().st_size)}), nothing to download"
        else:
            source = f"{weights.file}" if weights.file else f"from the hub ({weights.name})"
        return [line, source]

    def _trained_lines(self) -> list[str]:
        what = {
            "all": "all weights",
            "stage4": "the last stage, the normalisation behind it and the head",
            "head": "the head alone",
        }
        total = self.weights.shape.parameter_count(self.data.num_classes)
        line = f"{what[self.config.trainable]}: {self.trained_parameters:,} of {total:,} parameters"
        if self.config.trainable == "all":
            return [line]
        lines = [f"{line} [--trainable {self.config.trainable}]; the others stay as they are, bit for bit"]
        if self.probes:
            size = size_text(4 * self.num_train * self.weights.shape.num_features)
            lines.append(
                f"on features of whole pictures, computed once: crops and flips are off; {size}, kept in {feature_folder()}/"
            )
        return lines

    def _rule_lines(self) -> list[str]:
        hyper, config = self.resolution.hyper, self.config
        size = size_class(self.num_train)
        limits = {"small": f"below {SMALL:,}", "medium": f"{SMALL:,} to {MEDIUM - 1:,}", "large": f"{MEDIUM:,} or more"}
        rates = [
            f"steps {first}-{last}: {start:.4g}" + (f" rising to {end:.4g}" if end > start else "")
            for first, last, start, end in rate_table(hyper)
        ]
        small = self.sizes.median_area < SMALL_IMAGE_AREA
        flip = "mirrored half of the time" if config.flip else "never mirrored [--no-flip; the rule: half of the time]"
        crops = f"cropped to {hyper.crop_size}x{hyper.crop_size}{self._mark('crop_size')}, {flip}"
        shown_at = f"{hyper.resize_size}x{hyper.resize_size}{self._mark('resize_size')}, {crops}"
        if self.probes:
            shown_at = f"{hyper.crop_size}x{hyper.crop_size}{self._mark('crop_size')} whole, as in evaluation"
        return [
            f'preset "{config.preset}", data set "{size}" ({limits[size]} training examples), '
            f"pictures {'below 96x96' if small else 'of 96x96 or more'}",
            f"{hyper.steps:,} steps{self._mark('steps')} of SGD, momentum {hyper.momentum}{self._mark('momentum')}"
            + (f", weight decay {hyper.weight_decay}{self._mark('weight_decay')}" if hyper.weight_decay else ""),
            f"rate {'; '.join(rates)}",
            *(
                f"{what} {getattr(hyper, name)}{self._mark(name)}"
                for name, what in (("base_lr", "base rate"), ("warmup_steps", "warm-up steps"), ("decay_steps", "decays after"))
                if name in self.resolution.reasons
            ),
            f"pictures resized to {shown_at}; {self.weights.interpolation}",
        ]

    def _mixup_lines(self) -> list[str]:
        alpha, law = self.resolution.hyper.mixup_alpha, self.law
        mark = self._mark("mixup_alpha")
        if not alpha:
            if self.probes:
                hint = f"features are mixed only when asked. Turn it on with --mixup-alpha {RULE_MIXUP_ALPHA}"
                return [f"off{mark}: {hint}", *([law.as_text()] if law.label_smoothing or law.feature_dropout else [])]
            hint = f"the rule mixes from {SMALL:,} training examples on. Turn it on with --mixup-alpha {RULE_MIXUP_ALPHA}"
            off = f"off{mark}" if mark else f"off: {hint}"
            return [off, *([law.as_text()] if law != TrainingLaw() else []), *law.warnings()]
        groups = f", partners within groups of {GROUP_SIZE}" if law.groups else ""
        return [f"{law.as_text()}{groups}{mark}", *self._theory_lines(law), *law.warnings()]

    def _theory_lines(self, law: TrainingLaw) -> list[str]:
        """What follows from the law before anything is trained."""
        theta_bar, label_share = law.theta_bar, 1 - law.mixing_shrink
        after = "'s pooled features" if law.on_features else f" after stage {law.stage}" if law.stage else ""
        what = "a label" if law.mixed == "labels" else f"a picture{after}"
        keeps, itself = ("keep", "themselves") if law.on_features and law.mixed != "labels" else ("keeps", "itself")
        lines = [f"{what} {keeps} {theta_bar:.1%} of {itself} on average (theta_bar {theta_bar:.4f}), its partner gives the rest"]
        if label_share:
            lines.append(f"to the labels that is a smoothing by {label_share:.4f} toward the class frequencies")
        plain = law.mixed == "both" and not law.label_smoothing and law.form == "exact"
        if label_share and plain and self.num_train > 1 and not self.streamed:
            counts = np.bincount(self.data.train.labels, minlength=self.data.num_classes).tolist()
            mixed = "features" if law.on_features else "pictures"
            accuracy, floor = best_train_accuracy(law.alpha, counts), loss_floor(law.alpha, counts)
            lines.append(
                f"on mixed {mixed} accuracy can reach {accuracy:.1%} and the loss {floor:.4f} at best; excess_loss in "
                "metrics.jsonl is the loss less that of its own labels"
            )
        rule = self.config.prediction_rule
        if rule == "raw":
            lines.append("prediction takes the model as it is; --prediction-rule auto with --validation-fraction compares others")
        else:
            lines.append(f"prediction by the rule {rule}")
        return lines

    def _batch_lines(self) -> list[str]:
        hyper, processes, passes = self.resolution.hyper, self.environment.num_processes, len(self.cuts[0])
        epochs = hyper.steps * hyper.batch_size / self.num_train
        return [
            f"{hyper.batch_size} examples a step{self._mark('batch_size')} = {processes} process(es) x {passes} micro-batch(es) "
            f"of up to {self.largest_micro_batch}{self.config.micro_batch_note}; {epochs:.3g} passes over the training set",
        ]

    def _machine_lines(self) -> list[str]:
        env, about = self.environment, "at most about" if self.config.trainable == "stage4" else "about"
        return [
            f"{env.precision} ({env.precision_from}), {env.threads} thread(s) on the CPU, "
            f"{about} {size_text(self.memory_bytes())} of memory for each process beside the libraries",
            self.config.speedups.as_text(),
            *env.notes,
        ]


def make_plan(config: TransferConfig, *, source: Any = None, num_processes: int | None = None, to_be_run: bool = True) -> Plan:
    """Opens the data, finds the weights (without downloading published ones) and decides everything.

    Args:
        config: what is asked.
        source: an in-memory data set, in place of `config.dataset`.
        num_processes: to plan for, in place of those that the launcher has started.
        to_be_run: also see whether the run may write into its folder.

    Raises:
        BitMixupError: something can not be used; nothing has been written.
    """
    environment = read_environment(precision=config.precision, threads=config.threads)
    if num_processes is not None:
        environment = replace(environment, num_processes=num_processes)
    weights = find_weights(config.model)
    run = RunFolder(config.output_dir or default_folder(config.dataset, weights.short_name, config.seed))
    if to_be_run:
        run.check(config.as_json(), resume=config.resume, overwrite=config.overwrite)
    if not weights.architecture:  # of a repository only its own configuration says what is in it
        weights = fetch(weights, revision=config.revision)
    quarantine = Quarantine(progress=environment.num_processes == 1)
    asked: dict[str, Any] = {
        "config": config.dataset_config,
        "revision": config.dataset_revision,
        "train_split": config.train_split,
        "test_split": config.test_split,
        "image_column": config.image_column,
        "label_column": config.label_column,
    }
    streamed = None
    if config.streaming:
        if source is not None:
            raise ConfigError("streaming is for data that are read from files or the hub; these are in memory. Leave it out.")
        data, streamed = stream_image_dataset(config.dataset, **asked, train_examples=config.train_examples)
    else:
        data = load_image_dataset(
            config.dataset if source is None else source,
            **asked,
            examples_per_class=config.examples_per_class,
            few_shot_seed=config.few_shot_seed,
            validation_fraction=config.validation_fraction,
            seed=config.seed,
            leave_out=quarantine.leave_out if config.corrupt_images == "quarantine" else None,
        )
    if to_be_run:
        head = weights.shape.head_count(data.num_classes) if config.trainable == "head" else None
        total = weights.shape.parameter_count(data.num_classes)
        run.check_space(total, keep_checkpoints=config.keep_checkpoints, in_checkpoint=head)
    corruption = None
    if config.corrupt_labels:
        corruption = corrupt_labels(data.train.labels, config.corrupt_labels, num_classes=data.num_classes, seed=config.seed)
        note = f"NOTE: {corruption.corrupted.sum():,} training labels are replaced by wrong ones, as asked"
        data = replace(data, train=replace(data.train, labels=corruption.labels), notes=(*data.notes, note))
    for part in (data.train, data.test, data.validation):
        if part is not None:
            refuse_empty(part)
    sizes = summarize_sizes(data.train, small_area=SMALL_IMAGE_AREA, seed=config.seed)
    for part in (data.test, data.validation):
        if part is not None:  # a broken file is better met before training than after it
            summarize_sizes(part, small_area=SMALL_IMAGE_AREA, seed=config.seed)
    findings = column_findings(data)
    if not streamed:  # of a sample, missing classes and the like would mean nothing
        findings += examine(data, sizes, few_shot=config.examples_per_class is not None)
    num_train = streamed.num_examples if streamed else len(data.train)
    resolution = resolve(config, num_examples=num_train, image_area=sizes.median_area, weights=weights)
    law = config.law(resolution.hyper.mixup_alpha)
    shrinks = law.input_shrink < 1 or law.label_shrink < 1
    check_rule(config.prediction_rule, shrinks=shrinks, held_out=data.validation is not None)
    cuts = _cut(config, resolution, weights, environment.num_processes)
    return Plan(
        config=config,
        data=data,
        sizes=sizes,
        weights=weights,
        resolution=resolution,
        environment=environment,
        cuts=cuts,
        run=run,
        corruption=corruption,
        attacker=_find_attacker(config, data, weights),
        findings=tuple(findings),
        quarantined=tuple(quarantine.left_out),
        streamed=streamed,
    )


def _find_attacker(config: TransferConfig, data: ImageDataset, weights: Weights) -> Weights | None:
    """The model that adversarial pictures are made to fool, which must see and say the same things as the one that is trained."""
    if config.attack_from is None:
        return None
    attacker = find_weights(config.attack_from)
    if attacker.file is None:
        raise ConfigError(
            f"attack_from {config.attack_from} is not on this machine. Name the model/ folder of a run on this data set."
        )
    if attacker.label_names != tuple(data.class_names):
        raise ConfigError(
            f"attack_from {config.attack_from}: that model tells apart {_list(attacker.label_names)}, the data set has "
            f"{_list(data.class_names)}. Name the model/ of a run on this data set."
        )
    for name in ("mean", "std"):
        own, other = (tuple(w.pretrained_cfg.get(name, ())) for w in (weights, attacker))
        if own != other:
            raise ConfigError(
                f"attack_from {config.attack_from} normalises pictures by a {name} of {other}, {weights.name} by {own}: they "
                "would not see the same picture."
            )
    return attacker


def _list(names: Sequence[str] | None) -> str:
    """Class names for a message, the first few of them."""
    if not names:
        return "classes without names"
    return f"{len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _cut(config: TransferConfig, resolution: Resolution, weights: Weights, num_processes: int) -> list[list[MicroBatch]]:
    hyper = resolution.hyper
    law = config.law(hyper.mixup_alpha)
    micro_batch = config.micro_batch
    if not isinstance(micro_batch, int) and config.trainable != "head":  # auto, too: it is settled where there is a device to try
        micro_batch = _fitting(weights, resolution, law)
    assert micro_batch != "auto", "the configuration refuses it for a linear probe"
    return cut_batch(hyper.batch_size, num_processes=num_processes, micro_batch=micro_batch, group_size=law.group_size)


def _fitting(weights: Weights, resolution: Resolution, law: TrainingLaw) -> int:
    """Most pictures of a backward pass."""
    activations = law.memory_factor * weights.shape.activation_bytes(resolution.hyper.crop_size)
    return fitting_micro_batch(activations, mixed=law.groups)
