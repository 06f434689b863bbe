"""Pre-training and distillation, the whole story: BiT's upstream half.

The loop, checkpoints and run folder of fine-tuning, with BiT's upstream recipe in place of the HyperRule. Neither the `datasets`
library nor the command line is imported: arrays in memory will do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from timm.models.resnetv2 import ResNetV2
from torch import Tensor

from bit_mixup.augmentation import InceptionView
from bit_mixup.config import DistillConfig, PretrainConfig, configure, resolve_upstream
from bit_mixup.environment import Environment, read_environment
from bit_mixup.errors import ConfigError, DataError, shown
from bit_mixup.evaluation import EvaluationReport, MultiLabelReport, evaluate, evaluate_multi_label, in_markdown
from bit_mixup.examples import ArrayImages, EvaluationView, TrainingStream
from bit_mixup.hyperrule import HyperParameters, rate_table
from bit_mixup.images import View
from bit_mixup.interruption import Interruption
from bit_mixup.launching import (
    default_workers,
    join_processes,
    lost_processes_explained,
    main_first,
    note_other_environment,
    plan_together,
    record_environment,
    start_tracker,
    torch_threads,
)
from bit_mixup.laws import TrainingLaw
from bit_mixup.memory import memory_explained
from bit_mixup.models import TIMM_STD_EPS, Normalize, build_bit, create_bit, draw_head, linear_head, save_model
from bit_mixup.objectives import Distillation, LargeMarginCosine, Objective, SigmoidCrossEntropy, SoftmaxCrossEntropy
from bit_mixup.prediction import predict_logits
from bit_mixup.repeating import command_line, present_facts
from bit_mixup.report import TrainingPage, render_training
from bit_mixup.runs import RunFolder, default_folder
from bit_mixup.sampling import MicroBatch, cut_batch, fitting_micro_batch
from bit_mixup.scanning import Quarantine, quarantine_note, refuse_empty
from bit_mixup.storage import plain_values, read_json, whole_folder, write_json, write_text
from bit_mixup.training import fit_micro_batch, train
from bit_mixup.upstream import Upstream, load_upstream
from bit_mixup.voting import Council
from bit_mixup.weights import Weights, fetch, find_network, find_weights, size_text

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

LAST_STEPS = 100  # whose mean loss is told


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainPlan:
    """All decisions of a pre-training run.

    Args:
        config: what was asked.
        data: what is trained on.
        network: architecture and input size; its file counts only with `init`.
        hyper: rates, batch and length.
        view: how pictures are shown.
        environment: launcher and machine.
        cuts: for each process its micro-batches of a global batch.
        law: whether and how pictures are mixed.
        run: where files go.
        teacher: of distillation, on this machine or still on the hub.
        quarantined: name and reason of each unreadable picture that is left out, if that was asked for.
    """

    config: PretrainConfig
    data: Upstream
    network: Weights
    hyper: HyperParameters
    view: InceptionView
    environment: Environment
    cuts: list[list[MicroBatch]]
    law: TrainingLaw
    run: RunFolder
    teacher: Weights | None = None
    quarantined: tuple[dict[str, str], ...] = ()

    def memory_bytes(self, examples: int) -> int:
        """Estimate in bytes for each process, for backward passes of some examples; beside a teacher."""
        return self.network.shape.training_bytes(
            self.hyper.crop_size,
            examples=examples,
            num_classes=len(self.data.class_names),
            half=self.environment.precision != "fp32",
            num_processes=self.environment.num_processes,
        )

    @property
    def saved_view(self) -> View:
        """How the finished model wants its pictures."""
        size = self.hyper.crop_size
        return View(resize_size=size, crop_size=size, flip=self.view.flip, interpolation=self.view.interpolation)

    def resolved(self) -> dict[str, Any]:
        """What has a say in the result, as plain values."""
        return {
            "task": "distill" if isinstance(self.config, DistillConfig) else "pretrain",
            "hyper": plain_values(asdict(self.hyper)),
            "view": asdict(self.view),
            "precision": self.environment.precision,
            "data": {
                "name": self.data.name,
                "revision": self.data.revision,
                "fingerprint": self.data.fingerprint,
                "multi_label": self.data.multi_label,
                "train_examples": len(self.data.train),
                "test_examples": len(self.data.test) if self.data.test else 0,
                "classes": len(self.data.class_names),
            },
            "teacher": _digest(self.teacher.file) if self.teacher and self.teacher.file else None,
            "network": {"architecture": self.network.architecture, "model_args": dict(self.network.model_args)},
        }

    def text(self) -> str:
        """The plan as it is printed."""
        lines = [
            (heading if place == 0 else "", entry) for heading, entries in self.sections() for place, entry in enumerate(entries)
        ]
        return "\n".join(f"{heading:<9} {shown(entry)}" for heading, entry in lines)

    def sections(self) -> list[tuple[str, list[str]]]:
        """The plan for people: headings, and lines under each."""
        hyper, data, view = self.hyper, self.data, self.view
        rates = "; ".join(
            f"steps {first}-{last}: {start:.4g}" + (f" rising to {end:.4g}" if end > start else "")
            for first, last, start, end in rate_table(hyper)
        )
        body = self.network.shape.parameter_count()
        start = "its own weights" if self.config.init else "random weights"
        labels = "several labels a picture, sigmoid" if data.multi_label else "one label a picture, softmax"
        if self.config.margin is not None:
            labels += f" of {self.config.cosine_scale:g} times cosines, with a margin of {self.config.margin:g}"
        passes = hyper.steps * hyper.batch_size / len(data.train)
        if isinstance(self.config, DistillConfig):
            labels = f"no labels: KL from the teacher {self.config.teacher} at temperature {self.config.temperature:g}"
        micro = max(cut.size for cuts in self.cuts for cut in cuts)
        quarantined = [quarantine_note(self.quarantined)] if self.quarantined else []
        mixed = f"alpha {hyper.mixup_alpha}, one weight for each {self.config.mixup_lam}" if hyper.mixup_alpha else "off"
        mirrored = "mirrored half of the time" if view.flip else "never mirrored"
        return [
            ("data", [f"{data.name}: {len(data.train):,} examples, {len(data.class_names):,} classes; {labels}",
                      *data.notes, *quarantined]),
            ("network", [f"{self.network.architecture}: {size_text(body, '')} parameters and a head, from {start}, "
                         f"seed {self.config.seed}"]),
            ("recipe", [f"{hyper.steps:,} steps of SGD, momentum {hyper.momentum}, weight decay {hyper.weight_decay:g}",
                        f"rate {rates}",
                        f"inception crops of {view.min_area:.0%} or more at {view.crop_size} px, "
                        f"{mirrored}{', distorted' if view.distort else ''}"]),
            ("mixup", [mixed]),
            ("batch", [f"{hyper.batch_size} examples a step = {self.environment.num_processes} process(es) x "
                       f"{len(self.cuts[0])} micro-batch(es) of up to {micro}{self.config.micro_batch_note}; {passes:.3g} passes "
                       "over the data set"]),
            ("machine", [f"{self.environment.precision} ({self.environment.precision_from}), "
                         f"{self.environment.threads} thread(s), about {size_text(self.memory_bytes(micro))} of memory for each "
                         "process beside the libraries", self.config.speedups.as_text(), *self.environment.notes]),
            ("writes", [f"{self.run.path}/"]),
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainResult:
    """What a run leaves in memory.

    Args:
        model: trained, on its device.
        plan: everything that was decided.
        report: scores, where a test split was named.
        output_dir: the run's folder.
    """

    model: ResNetV2
    plan: PretrainPlan
    report: EvaluationReport | MultiLabelReport | None
    output_dir: Path


def pretrain(*, dataset: str | Path | ArrayImages | Dataset | DatasetDict, **options: Any) -> PretrainResult:
    """Trains a BiT from random weights by the upstream recipe and writes the run's folder.

    Its `model/` is what `bit_mixup.transfer(model=...)` takes.

    Args:
        dataset: as in `PretrainConfig.dataset`; or arrays or a data set in memory.
        **options: fields of `PretrainConfig`.

    Raises:
        BitMixupError: see the classes in `bit_mixup.errors`; raised before any training starts, but for NonFiniteError and for a
            picture that is broken behind its header.
    """
    if isinstance(dataset, str | Path):
        return run_pretrain(configure(PretrainConfig, dataset=dataset, **options))
    return run_pretrain(configure(PretrainConfig, dataset="memory", **options), source=dataset)


def distill(*, dataset: str | Path | ArrayImages | Dataset | DatasetDict, teacher: str | Path, **options: Any) -> PretrainResult:
    """Trains a BiT to agree with another on the same views and the same mixed images; see `bit_mixup.objectives.Distillation`.

    Args:
        dataset: as in `pretrain`; its labels are not used.
        teacher: as in `DistillConfig.teacher`.
        **options: fields of `DistillConfig`.

    Raises:
        BitMixupError: as `pretrain`; WeightsError also for a teacher without a head.
    """
    if isinstance(dataset, str | Path):
        return run_pretrain(configure(DistillConfig, dataset=dataset, teacher=teacher, **options))
    return run_pretrain(configure(DistillConfig, dataset="memory", teacher=teacher, **options), source=dataset)


def plan_pretrain(config: PretrainConfig, *, source: Any = None) -> PretrainPlan:
    """Opens the data and decides everything.

    Raises:
        BitMixupError: something can not be used; nothing has been written.
    """
    environment = read_environment(precision=config.precision, threads=config.threads)
    network = find_network(config.model)
    run = RunFolder(config.output_dir or default_folder(config.dataset.removesuffix(".npz"), network.short_name, config.seed))
    run.check(config.as_json(), resume=config.resume, overwrite=config.overwrite)
    quarantine = Quarantine(progress=environment.num_processes == 1)
    data = load_upstream(
        config.dataset if source is None else source,
        config=config.dataset_config,
        revision=config.dataset_revision,
        train_split=config.train_split,
        test_split=config.test_split,
        image_column=config.image_column,
        label_column=config.label_column,
        leave_out=quarantine.leave_out if config.corrupt_images == "quarantine" else refuse_empty,
    )
    hyper = resolve_upstream(config, num_examples=len(data.train), weights=network)
    run.check_space(network.shape.parameter_count(len(data.class_names)), keep_checkpoints=config.keep_checkpoints)
    law = TrainingLaw(alpha=hyper.mixup_alpha, lam=config.mixup_lam)
    if data.multi_label and config.margin is not None:
        raise ConfigError(f"margin is for one label a picture, and {data.name} has several. Leave it out.")
    if isinstance(config, DistillConfig) and config.test_split is not None:
        raise ConfigError("distillation scores nothing, so test_split has no use. Leave it out.")
    return PretrainPlan(
        config=config,
        data=data,
        network=network,
        hyper=hyper,
        view=InceptionView(
            crop_size=hyper.crop_size,
            flip=config.flip,
            interpolation=network.interpolation,
            min_area=config.min_area,
            distort=config.distort,
        ),
        environment=environment,
        cuts=cut_batch(
            hyper.batch_size,
            num_processes=environment.num_processes,
            micro_batch=config.micro_batch
            if isinstance(config.micro_batch, int)
            else fitting_micro_batch(network.shape.activation_bytes(hyper.crop_size), mixed=law.groups),
            group_size=law.group_size,
        ),
        law=law,
        run=run,
        teacher=find_weights(config.teacher) if isinstance(config, DistillConfig) else None,
        quarantined=tuple(quarantine.left_out),
    )


def run_pretrain(config: PretrainConfig, *, source: Any = None) -> PretrainResult:
    """`pretrain` or `distill` of a whole configuration. Prints the plan first and the scores last, on the main process."""
    with Interruption(deferring=False), memory_explained():
        environment = read_environment(precision=config.precision, threads=config.threads)
        accelerator = join_processes(environment, tracker=config.tracker)
        with torch_threads(environment.threads):
            plan = plan_together(accelerator, lambda: plan_pretrain(config, source=source))
            with lost_processes_explained(plan.run):
                return _run(plan, accelerator)


def _run(plan: PretrainPlan, accelerator: Accelerator) -> PretrainResult:
    config, hyper, run = plan.config, plan.hyper, plan.run
    council = Council(accelerator)
    if plan.teacher is not None:
        teacher = plan.teacher
        plan = replace(plan, teacher=main_first(council, lambda: fetch(teacher)))
    model, objective = _model_and_objective(plan, accelerator, council)
    stream = TrainingStream(part=plan.data.train, view=plan.view, seed=config.seed)
    if config.micro_batch == "auto":
        cuts = fit_micro_batch(
            model,
            stream,
            hyper,
            accelerator,
            law=plan.law,
            estimate=plan.memory_bytes,
            known=run.recorded_micro_batch(accelerator.num_processes) if config.resume else None,
            local_processes=plan.environment.local_processes,
            objective=objective,
            speedups=config.speedups,
            seed=config.seed,
        )
        plan = replace(plan, cuts=cuts)
    with council.sharing_faults():
        if accelerator.is_main_process:
            record: dict[str, Any] = {
                "resolved": {**plan.resolved(), "std_eps": config.std_eps or TIMM_STD_EPS},
                "notes": list(plan.data.notes),
                "quarantined": len(plan.quarantined),
                "environment": record_environment(plan.environment, plan.cuts),
            }
            run.open(config.as_json(), record, overwrite=config.overwrite)
            if plan.quarantined:
                write_json(run.quarantine, list(plan.quarantined))
            print(plan.text())
            note_other_environment(read_json(run.plan)["environment"], record["environment"])
            print(flush=True)
    start_tracker(accelerator, config, run.path)
    workers = config.num_workers if config.num_workers is not None else default_workers(accelerator)
    model = train(
        model,
        stream,
        hyper,
        accelerator,
        law=plan.law,
        cuts=plan.cuts,
        run=run,
        objective=objective,
        speedups=config.speedups,
        seed=config.seed,
        num_workers=workers,
        log_every=config.log_every,
        save_every=config.save_every,
        keep_checkpoints=config.keep_checkpoints,
    )
    if isinstance(objective, LargeMarginCosine):
        linear_head(model, _first_views(stream, model, len(plan.data.train)), cosine=objective.cosine)
    report = _score(plan, model, accelerator, workers)
    if accelerator.is_main_process:
        _write(plan, model, report)
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()
    return PretrainResult(model=model, plan=plan, report=report, output_dir=run.path)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _model_and_objective(plan: PretrainPlan, accelerator: Accelerator, council: Council) -> tuple[ResNetV2, Objective]:
    config = plan.config
    std_eps = config.std_eps or TIMM_STD_EPS

    def build(num_classes: int) -> ResNetV2:
        if config.init:
            weights = main_first(council, lambda: fetch(plan.network))
            return build_bit(weights, num_classes=num_classes, std_eps=std_eps)
        return create_bit(plan.network, num_classes=num_classes, seed=config.seed, std_eps=std_eps)

    if not isinstance(config, DistillConfig) or plan.teacher is None:
        model = build(len(plan.data.class_names))
        if config.margin is not None:
            draw_head(model, seed=config.seed)
            return model, LargeMarginCosine(config.margin, config.cosine_scale)
        return model, SigmoidCrossEntropy() if plan.data.multi_label else SoftmaxCrossEntropy()
    teacher = build_bit(plan.teacher, keep_head=True)
    model = build(int(teacher.num_classes))
    if _normalization(teacher) != _normalization(model):
        raise ConfigError(
            f"the teacher normalises pictures by {_normalization(teacher)}, the student by {_normalization(model)}: they would "
            "not see the same. Choose a student with the teacher's mean and standard deviation."
        )
    teacher.to(accelerator.device).to(memory_format=torch.channels_last)
    return model, Distillation(teacher, temperature=config.temperature)


def _first_views(stream: TrainingStream, model: ResNetV2, count: int) -> Iterator[Tensor]:
    """A thousand views of the run, or one of each example where there are fewer, normalised."""
    for start in range(0, min(count, 1024), 64):
        batch = stream.__getitems__(range(start, min(start + 64, count)))
        if isinstance(batch, DataError):
            raise batch
        yield Normalize.of(model)(torch.from_numpy(batch[0]).to(next(model.parameters()).device))


def _normalization(model: ResNetV2) -> tuple[tuple[float, ...], tuple[float, ...]]:
    cfg: Any = model.pretrained_cfg
    return tuple(cfg["mean"]), tuple(cfg["std"])


def _score(
    plan: PretrainPlan, model: ResNetV2, accelerator: Accelerator, workers: int
) -> EvaluationReport | MultiLabelReport | None:
    test = plan.data.test
    if test is None:
        return None
    view = EvaluationView(part=test, view=plan.view)
    batch_size = max(cut.size for cuts in plan.cuts for cut in cuts)
    precision = plan.environment.scoring_precision
    logits = predict_logits(model, view, accelerator, batch_size=batch_size, num_workers=workers, precision=precision)
    score = evaluate_multi_label if plan.data.multi_label else evaluate
    return score(logits, torch.from_numpy(test.labels[list(range(len(test)))]), plan.data.class_names)


def _write(plan: PretrainPlan, model: ResNetV2, report: EvaluationReport | MultiLabelReport | None) -> None:
    run, names = plan.run, list(plan.data.class_names)
    if isinstance(plan.config, DistillConfig):  # the outputs are the teacher's classes
        known = plan.teacher.label_names if plan.teacher else None
        names = list(known or map(str, range(int(model.num_classes))))
    with whole_folder(run.model) as folder:
        save_model(model, folder, label_names=names, view=plan.saved_view, std_eps=plan.config.std_eps or TIMM_STD_EPS)
    if report is not None:
        write_json(run.report, report.as_dict())
        title = in_markdown(f"{plan.data.name}, {plan.network.name}, seed {plan.config.seed}")
        write_text(run.table, f"# {title}\n\n{report.table()}")
        print(f"\n{report.table(worst=10)}")
    metrics = run.read_metrics()
    losses = [row["loss"] for row in metrics]
    last = losses[-LAST_STEPS:]
    write_text(run.page, render_training(_page(plan, report, metrics)))
    print(f"\nloss {losses[0]:.4g} at the first step, {sum(last) / len(last):.4g} over the last {len(last)}\n")
    for path, what in run.written():
        print(f"{path!s:<60} {what}")


def _page(
    plan: PretrainPlan, report: EvaluationReport | MultiLabelReport | None, metrics: Sequence[dict[str, Any]]
) -> TrainingPage:
    config, data, scores = plan.config, plan.data, report.summary() if report is not None else []
    losses = [row["loss"] for row in metrics]
    last = losses[-LAST_STEPS:]
    headline = [(f"{sum(last) / len(last):.4g}", f"loss over the last {len(last)} steps (nats); {losses[0]:.4g} at the first")]
    headline += [(value.split(" (")[0], name + value[len(value.split(" (")[0]) :]) for name, value in scores[:1]]
    environment = read_json(plan.run.plan)["environment"]
    processes = f"{environment['processes']} process(es) of {environment['threads']} thread(s)"
    return TrainingPage(
        title=f"{data.name}: {plan.network.name} {'distilled' if isinstance(config, DistillConfig) else 'pre-trained'}",
        subtitle=f"{len(data.train):,} examples, {plan.hyper.steps:,} steps, seed {config.seed}; in {plan.run.path}",
        headline=headline,
        decided="What was done",
        sections=plan.sections(),
        metrics=metrics,
        scores=scores,
        command=command_line(config),
        facts=[
            ("seed", str(config.seed)),
            ("data", f"{data.name}{f' @ {data.revision}' if data.revision else ''}, fingerprint {data.fingerprint}"),
            ("precision", plan.environment.precision),
            *present_facts(f"{environment['device']}, {processes}"),
        ],
    )
