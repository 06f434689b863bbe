"""The whole story: data, rule, model, training, scores, files."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from timm.models.resnetv2 import ResNetV2
from torch import Tensor

from bit_mixup.config import TransferConfig, configure
from bit_mixup.environment import feature_folder, read_environment
from bit_mixup.errors import shown
from bit_mixup.evaluation import EvaluationReport, in_markdown
from bit_mixup.examples import EvaluationView, FeatureStream, PartneredStream, TrainingStream, mean_image, same_class_candidates
from bit_mixup.expansion import DataMeans
from bit_mixup.features import kept_features
from bit_mixup.interruption import Interruption
from bit_mixup.judging import Judgement, judge, watch_scores
from bit_mixup.launching import (
    default_workers,
    find_device,
    join_processes,
    lost_processes_explained,
    main_first,
    note_other_environment,
    plan_together,
    record_environment,
    start_tracker,
    torch_threads,
)
from bit_mixup.laws import NEIGHBOURS
from bit_mixup.layers import make_quick
from bit_mixup.loading import Stream
from bit_mixup.memory import memory_explained
from bit_mixup.models import (
    REFERENCE_STD_EPS,
    TIMM_STD_EPS,
    LinearProbe,
    Network,
    Normalize,
    build_bit,
    freeze,
    save_model,
    std_eps_effect,
)
from bit_mixup.outcomes import Outcomes
from bit_mixup.planning import Plan, make_plan
from bit_mixup.plots import reliability_diagram, save_figure
from bit_mixup.prediction import nearest_neighbours, predict_features
from bit_mixup.repeating import command_line, facts
from bit_mixup.report import ReportPage, render_report
from bit_mixup.storage import read_json, whole_folder, write_json, write_text
from bit_mixup.streaming import StreamedExamples
from bit_mixup.training import fit_micro_batch, train
from bit_mixup.unmixing import MixupRecord, RuleChoice
from bit_mixup.voting import Council
from bit_mixup.weights import fetch


@dataclass(frozen=True, kw_only=True, eq=False)
class TransferResult:
    """What a run leaves in memory.

    Args:
        model: trained, on its device.
        plan: everything that was decided.
        report: scores on the test examples.
        validation: scores on held-out training examples, if some were asked for.
        output_dir: the run's folder.
        record: what prediction must know of training.
        choice: how `report` was predicted.
        logits: of the test examples, as they are, (N, K).
    """

    model: ResNetV2
    plan: Plan
    report: EvaluationReport
    validation: EvaluationReport | None
    output_dir: Path
    record: MixupRecord
    choice: RuleChoice
    logits: Tensor


def transfer(*, dataset: str | Dataset | DatasetDict, **options: Any) -> TransferResult:
    """Fine-tunes a pretrained BiT on a data set, scores it, and writes the run's folder.

    Args:
        dataset: as in `TransferConfig.dataset`, or a data set in memory.
        **options: fields of `TransferConfig`.

    Returns:
        Model, plan and scores. In a run of several processes each has them; the first writes.

    Raises:
        BitMixupError: see the classes in `bit_mixup.errors`; raised before any training starts, but for NonFiniteError, and for a
            DataError where a picture is broken behind its header or outside of the sample that the plan looks at.
    """
    if not isinstance(dataset, Dataset | DatasetDict):
        return run_transfer(configure(TransferConfig, dataset=dataset, **options))
    splits = [dataset] if isinstance(dataset, Dataset) else dataset.values()
    name = "-".join(["memory", *(split._fingerprint for split in splits)][:2])
    return run_transfer(configure(TransferConfig, dataset=name, **options), source=dataset)


def run_transfer(config: TransferConfig, *, source: Dataset | DatasetDict | None = None) -> TransferResult:
    """`transfer` of a whole configuration. Prints the plan first and the scores last, on the main process."""
    with Interruption(deferring=False), memory_explained():
        environment = read_environment(precision=config.precision, threads=config.threads)
        accelerator = join_processes(environment, tracker=config.tracker)
        with torch_threads(environment.threads):
            plan = plan_together(accelerator, lambda: make_plan(config, source=source))
            with lost_processes_explained(plan.run):
                return _run(plan, accelerator)


def _run(plan: Plan, accelerator: Accelerator) -> TransferResult:
    config, hyper, run = plan.config, plan.resolution.hyper, plan.run
    council = Council(accelerator)
    weights = main_first(council, lambda: fetch(plan.weights, revision=config.revision))
    plan = replace(plan, weights=weights)
    model = build_bit(weights, num_classes=plan.data.num_classes, std_eps=config.std_eps)
    effect = std_eps_effect(model)
    std_eps = config.std_eps or weights.std_eps or TIMM_STD_EPS
    workers = config.num_workers if config.num_workers is not None else default_workers(accelerator)
    mixup_record, means = _training_means(plan, model)
    freeze(model, config.trainable)
    stream = None if plan.probes else _stream(plan, model, accelerator, workers)
    if stream is not None and config.micro_batch == "auto":
        cuts = fit_micro_batch(
            model,
            stream,
            hyper,
            accelerator,
            law=plan.law,
            estimate=plan.memory_bytes,
            known=run.recorded_micro_batch(accelerator.num_processes) if config.resume else None,
            local_processes=plan.environment.local_processes,
            means=means,
            speedups=config.speedups,
            seed=config.seed,
        )
        plan = replace(plan, cuts=cuts)
    with council.sharing_faults():
        if accelerator.is_main_process:
            resolved = {**plan.resolved(), "std_eps": std_eps}
            record = _record(plan, resolved)
            run.open(config.as_json(), record, overwrite=config.overwrite)
            if plan.quarantined:
                write_json(run.quarantine, list(plan.quarantined))
            print(plan.text())
            note_other_environment(read_json(run.plan)["environment"], record["environment"])
            print(
                f"{'':<9} smallest variance of a filter {effect.smallest_variance:.3g}: std_eps {TIMM_STD_EPS:g} instead of "
                f"{REFERENCE_STD_EPS:g} changes {effect.of} by {effect.relative_change:.2g} of the largest (in use: "
                f"{std_eps:g})\n",
                flush=True,
            )
    network: Network = model
    if stream is None:
        network, stream = LinearProbe(model), _feature_stream(plan, model, accelerator, workers, std_eps)
    start_tracker(accelerator, config, run.path)
    train(
        network,
        stream,
        hyper,
        accelerator,
        law=plan.law,
        means=means,
        cuts=plan.cuts,
        run=run,
        watch=watch_scores(plan, model, accelerator, workers),
        watch_every=config.score_every or 1,
        speedups=config.speedups,
        seed=config.seed,
        num_workers=0 if plan.streamed or plan.probes else workers,  # one process reads the stream; features are at hand
        log_every=config.log_every,
        save_every=config.save_every,
        keep_checkpoints=config.keep_checkpoints,
    )
    freeze(model, "all")  # nothing is: as a model comes that was trained whole
    judged = judge(plan, model, mixup_record, accelerator, workers)
    if accelerator.is_main_process:
        _write(plan, model, mixup_record, judged, std_eps=std_eps)
    accelerator.log({"test_accuracy": judged.report.accuracy, "test_nll": judged.report.nll}, step=hyper.steps)
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()
    return TransferResult(
        model=model,
        plan=plan,
        report=judged.report,
        validation=judged.validation,
        output_dir=run.path,
        record=mixup_record,
        choice=judged.choice,
        logits=judged.logits,
    )


def _training_means(plan: Plan, model: ResNetV2) -> tuple[MixupRecord, DataMeans | None]:
    """What prediction and the law must know of the training set."""
    law, part = plan.law, plan.data.train
    frequencies = torch.from_numpy(np.bincount(part.labels, minlength=plan.data.num_classes) / len(part))
    if not law.needs_means and law.input_shrink == 1:
        return MixupRecord.of(law, class_frequencies=frequencies, mean_image=None), None
    image = torch.from_numpy(mean_image(part, plan.view, seed=plan.config.seed))
    mean, std = Normalize.of(model).constants(image)
    means = DataMeans(image=(image - mean) / std, label=frequencies)
    return MixupRecord.of(law, class_frequencies=frequencies, mean_image=image), means


def _stream(plan: Plan, model: ResNetV2, accelerator: Accelerator, workers: int) -> Stream:
    """The training examples, with their partners where the law chooses these from the whole training set."""
    if plan.streamed is not None:
        return StreamedExamples(
            split=plan.streamed,
            view=plan.view,
            seed=plan.config.seed,
            batch_size=plan.resolution.hyper.batch_size,
            buffer_size=plan.config.shuffle_buffer,
        )
    stream = TrainingStream(part=plan.data.train, view=plan.view, seed=plan.config.seed)
    if not plan.law.loads_partners:
        return stream
    if plan.law.partner == "same_class":
        return PartneredStream(stream=stream, candidates=same_class_candidates(plan.data.train.labels))
    view = EvaluationView(part=plan.data.train, view=plan.view)
    precision = plan.environment.precision
    batch_size = plan.largest_micro_batch
    features = predict_features(model, view, accelerator, batch_size=batch_size, num_workers=workers, precision=precision)
    return PartneredStream(stream=stream, candidates=nearest_neighbours(features, NEIGHBOURS))


def _feature_stream(plan: Plan, model: ResNetV2, accelerator: Accelerator, workers: int, std_eps: float) -> FeatureStream:
    """The training examples as pooled features, computed unless they are kept from before."""
    weights = plan.weights
    features, notes = kept_features(
        model,
        plan.data.train,
        plan.view,
        accelerator,
        about={
            "architecture": weights.architecture,
            "model_args": dict(weights.model_args),
            "std_eps": std_eps,
        },
        folder=feature_folder(),
        precision=plan.environment.scoring_precision,
        batch_size=plan.pictures_at_a_time,
        num_workers=workers,
    )
    if accelerator.is_main_process:
        print("\n".join(f"{'':<9} {shown(note)}" for note in notes), flush=True)
    stream = TrainingStream(part=plan.data.train, view=plan.view, seed=plan.config.seed)
    return FeatureStream(stream=stream, features=features.numpy())


def _record(plan: Plan, resolved: dict[str, Any]) -> dict[str, Any]:
    return {
        "resolved": resolved,
        "sections": plan.sections(),
        "notes": list(plan.data.notes),
        "doctor": [finding.as_dict() for finding in plan.findings],
        "quarantined": len(plan.quarantined),
        "environment": record_environment(plan.environment, plan.cuts),
        "rows": _few_shot_rows(plan),
    }


def _few_shot_rows(plan: Plan) -> list[int] | None:
    """Rows of the training split that a few-shot run uses."""
    return plan.data.train.rows.tolist() if plan.config.examples_per_class else None


def _write(plan: Plan, model: ResNetV2, record: MixupRecord, judged: Judgement, *, std_eps: float) -> None:
    run = plan.run
    with whole_folder(run.model) as folder:
        save_model(model, folder, label_names=plan.data.class_names, view=plan.view, std_eps=std_eps)
        record.save(folder)
        judged.choice.save(folder)
    write_json(run.report, judged.as_dict() | {"quarantined": len(plan.quarantined)})
    log_probs = judged.scores.double().log_softmax(1).numpy()
    outcomes = Outcomes.of(plan.data.test, plan.data.test.labels, log_probs, plan.data.class_names)
    outcomes.save(run.predictions)
    write_text(run.page, render_report(_page(plan, judged, outcomes)))
    title = in_markdown(f"{plan.data.name}, {plan.weights.name}, seed {plan.config.seed}")
    left_out = f"{len(plan.quarantined):,} unreadable picture(s) were left out (quarantine.json).\n\n" if plan.quarantined else ""
    write_text(run.table, f"# {title}\n\n{left_out}{judged.table()}")
    if judged.diagnosis is not None:
        title = f"{plan.data.name}, {plan.weights.name}, predicted by the rule {judged.choice.rule}"
        save_figure(reliability_diagram(judged.report.calibration.bins, title=title), run.diagram)
    effect = std_eps_effect(model)
    print(f"\n{judged.table(worst=10)}")
    changes = f"changes {effect.of} by {effect.relative_change:.2g} of the largest"
    print(f"std_eps {TIMM_STD_EPS:g} instead of {REFERENCE_STD_EPS:g} {changes}\n")
    for path, what in run.written():
        print(f"{path!s:<60} {what}")


def _page(plan: Plan, judged: Judgement, outcomes: Outcomes) -> ReportPage:
    run, config = plan.run, plan.config
    return ReportPage(
        title=f"{plan.data.name}: {plan.weights.name} fine-tuned",
        subtitle=f"{plan.num_train:,} training examples, {plan.data.num_classes} classes, {plan.resolution.hyper.steps:,} steps, "
        f"seed {config.seed}; in {run.path}",
        scored="test examples",
        report=judged.report,
        raw=judged.raw,
        choice=judged.choice,
        outcomes=outcomes,
        examples=plan.data.test,
        decided="What was done, and why",
        sections=plan.sections(),
        metrics=run.read_metrics(),
        scores=run.read_scores(),
        findings=[finding.as_dict() for finding in plan.findings],
        more=judged.more(),
        command=command_line(config),
        facts=facts(read_json(run.plan), config.seed),
    )


def time_run(plan: Plan, *, timed_steps: int = 3) -> float:
    """Seconds that training would take here, from a few timed passes over random pictures with random weights.

    Of a linear probe the features are timed: its steps take milliseconds.
    """
    hyper, size = plan.resolution.hyper, plan.pictures_at_a_time
    with torch_threads(plan.environment.threads):
        device = find_device()
        model = timm.create_model(
            plan.weights.architecture, pretrained=False, num_classes=plan.data.num_classes, **plan.weights.model_args
        ).to(device)
        assert isinstance(model, ResNetV2)
        freeze(model, plan.config.trainable)
        if plan.config.quick_layers:
            make_quick(model, fused=plan.config.fused_norms)
        images = torch.randn(size, 3, hyper.crop_size, hyper.crop_size, device=device)
        if plan.config.memory_format == "channels_last":
            model.to(memory_format=torch.channels_last)
            images = images.to(memory_format=torch.channels_last)
        labels = torch.zeros(size, dtype=torch.int64, device=device)
        amp = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[plan.environment.precision]
        for timed in range(timed_steps + 1):
            if timed == 1:
                start = time.perf_counter()  # the first pass warms up
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                loss = F.cross_entropy(model(images), labels)
            if not plan.probes:
                loss.backward()
            loss.item()  # waits for the device
        seconds = (time.perf_counter() - start) / timed_steps
    if plan.probes:
        return seconds * math.ceil(plan.num_train / plan.environment.num_processes / size)
    return seconds * len(plan.cuts[0]) * hyper.steps * plan.law.time_factor
