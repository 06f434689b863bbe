"""How good is a saved model on labelled pictures, those of its run or others?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor

from bit_mixup.classifier import Classifier
from bit_mixup.config import TransferConfig
from bit_mixup.data import Part, load_image_dataset, part_for_classes, pick_split
from bit_mixup.errors import CheckpointError, ConfigError, DataError
from bit_mixup.evaluation import EvaluationReport, evaluate, in_markdown
from bit_mixup.outcomes import Outcomes
from bit_mixup.pictures import reason
from bit_mixup.repeating import facts
from bit_mixup.report import ReportPage, render_report
from bit_mixup.runs import RunFolder
from bit_mixup.sources import TEST_SPLITS, open_source
from bit_mixup.storage import read_json, write_json, write_text


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Scores of a saved model.

    Args:
        name: of the data set and split.
        part: what was scored.
        report: by the model's prediction rule.
        raw: of the model as it is.
        outcomes: for each example.
        revision: of the data set on the hub, if it is from there.
    """

    name: str
    part: Part
    report: EvaluationReport
    raw: EvaluationReport
    outcomes: Outcomes
    revision: str | None


def evaluate_model(
    classifier: Classifier,
    dataset: str | Dataset | DatasetDict | None = None,
    *,
    config: str | None = None,
    revision: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Scores a model on a labelled data set, by its prediction rule and as it is.

    Args:
        classifier: see `bit_mixup.load`.
        dataset: as of `bit_mixup.transfer`; its classes are matched by name. None: that of the model's run.
        config: of a hub data set that has several.
        revision: branch, tag or commit of a hub data set.
        split: to score. None: of the run's data set what the run scored; of another the first of test, validation, ..., else
            the only or first one.
        image_column: None: the one column of pictures.
        label_column: None: the one column of classes.
        batch_size: pictures of a forward pass, at most.
        num_workers: processes that decode pictures.
        progress: whether to show a bar.

    Raises:
        ConfigError: no data set is named, and the model's run does not know one that can be opened again.
        DataError: the data set can not be used, a class is not the model's, or a picture can not be read.
    """
    if dataset is None:
        given = {
            "dataset_config": config,
            "dataset_revision": revision,
            "image_column": image_column,
            "label_column": label_column,
        }
        name, part, commit = _part_of_run(classifier, split, {flag: value for flag, value in given.items() if value is not None})
    else:
        source = open_source(dataset, config=config, revision=revision)
        first = next((known for known in TEST_SPLITS if known in source.splits), next(iter(source.splits)))
        chosen = pick_split(source, split or first, "split")
        part = part_for_classes(
            source, chosen, image_column=image_column, label_column=label_column, class_names=classifier.label_names
        )
        name, commit = dataset if isinstance(dataset, str) else "memory", source.revision
    logits, shrunk, readable = classifier.logits(part, batch_size=batch_size, num_workers=num_workers, progress=progress)
    if not readable.all():
        raise DataError(reason(part, int(readable.logical_not().nonzero()[0])))
    scores, labels, names = classifier.scores_of(logits, shrunk), torch.from_numpy(part.labels), classifier.label_names
    raw = evaluate(logits, labels, names)
    return Evaluation(
        name=f"{name} ({part.name})",
        part=part,
        report=raw if classifier.choice.rule == "raw" else evaluate(scores, labels, names),
        raw=raw,
        outcomes=Outcomes.of(part, part.labels, _log_probs(scores), names),
        revision=commit,
    )


def _log_probs(scores: Tensor) -> Any:
    return scores.double().log_softmax(1).numpy()


def _part_of_run(classifier: Classifier, split: str | None, given: dict[str, str]) -> tuple[str, Part, str | None]:
    """Name, examples and revision of the data set that the model's run was asked for."""
    if classifier.run is None:
        raise ConfigError(f"{classifier.name} is not in the folder of a run, which would know its data set: give --dataset.")
    if given:
        flag = next(iter(given))
        raise ConfigError(f"--{flag.replace('_', '-')} belongs to a data set that is named: give --dataset as well.")
    asked = TransferConfig.from_json(classifier.run.config)
    if asked.dataset.startswith("memory-"):
        raise ConfigError(f"the data set of {classifier.run.path} was in memory and is gone: give --dataset.")
    found = load_image_dataset(
        asked.dataset,
        config=asked.dataset_config,
        revision=read_json(classifier.run.plan)["resolved"]["data"]["revision"] or asked.dataset_revision,
        train_split=asked.train_split,
        test_split=asked.test_split,
        image_column=asked.image_column,
        label_column=asked.label_column,
        seed=asked.seed,
    )
    if tuple(found.class_names) != classifier.label_names:
        raise DataError(
            f"{asked.dataset} has other classes now than when {classifier.run.path} was trained. Name a data set with --dataset."
        )
    if split is None:
        return asked.dataset, found.test, found.revision
    part = part_for_classes(
        found.source,
        pick_split(found.source, split, "split"),
        image_column=found.image_column,
        label_column=found.label_column,
        class_names=classifier.label_names,
    )
    return asked.dataset, part, found.revision


def default_evaluation_folder(classifier: Classifier, evaluation: Evaluation) -> Path:
    """evaluations/<data set>-<split> in the run's folder, or runs/evaluate-<data set>-<split>."""
    short = evaluation.name.split("/")[-1].replace(" (", "-").replace(")", "").replace(" ", "-")
    return classifier.run.evaluations / short if classifier.run else Path("runs") / f"evaluate-{short}"


def check_evaluation_folder(folder: Path, *, overwrite: bool) -> None:
    """Sees whether an evaluation may be written into a folder.

    Raises:
        CheckpointError: it holds something else, or an evaluation and `overwrite` was not given.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    place = RunFolder(folder)
    if not place.report.is_file() or place.config.exists():
        raise CheckpointError(f"{folder} is not empty and holds no evaluation. Choose another --output-dir.")
    if not overwrite:
        raise CheckpointError(f"{folder} holds an evaluation already. Add --overwrite, or choose another --output-dir.")


def write_evaluation(classifier: Classifier, evaluation: Evaluation, folder: Path, *, command: str) -> None:
    """Writes report.html, report.json, report.md and predictions.csv into a folder.

    Args:
        classifier: that was scored.
        evaluation: its scores.
        folder: see `check_evaluation_folder`.
        command: that repeats it.

    Raises:
        CheckpointError: a file can not be written.
    """
    place, report, choice = RunFolder(folder), evaluation.report, classifier.choice
    evaluation.outcomes.save(place.predictions)
    own = {"model": classifier.name, "dataset": evaluation.name, "rule": choice.rule, "temperature": choice.temperature}
    raw = None if choice.rule == "raw" else evaluation.raw.as_dict()
    write_json(place.report, report.as_dict() | {"evaluation": own, "raw": raw})
    write_text(place.table, f"# {in_markdown(classifier.name)} on {in_markdown(evaluation.name)}\n\n{report.table()}")
    write_text(place.page, render_report(_page(classifier, evaluation, command)))


def _page(classifier: Classifier, evaluation: Evaluation, command: str) -> ReportPage:
    run, record = classifier.run, {}
    if run is not None:
        record = read_json(run.plan)
    seed = read_json(run.config)["seed"] if run else None
    known = [(f"trained with: {name}", value) for name, value in facts(record, seed)] if run and seed is not None else []
    scored_on = evaluation.name + (f" @ {evaluation.revision}" if evaluation.revision else "")
    return ReportPage(
        title=f"{classifier.name} on {evaluation.name}",
        subtitle=f"a saved model{f' @ {classifier.revision}' if classifier.revision else ''}, "
        f"{len(classifier.label_names)} classes, prediction rule {classifier.choice.rule}",
        scored="examples",
        report=evaluation.report,
        raw=evaluation.raw,
        choice=classifier.choice,
        outcomes=evaluation.outcomes,
        examples=evaluation.part,
        sections=[(f"{heading} (training)", lines) for heading, lines in record.get("sections", [])],
        metrics=run.read_metrics() if run and run.metrics.is_file() else [],
        scores=[],
        findings=[],
        more=[],
        command=command,
        facts=[("data", scored_on), *known],
    )
