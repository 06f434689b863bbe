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
from bit_mixup.repeating import facts, present_facts
from bit_mixup.report import ReportPage, render_report
from bit_mixup.runs import RunFolder
from bit_mixup.scanning import summarize_sizes
from bit_mixup.sources import TEST_SPLITS, open_source
from bit_mixup.storage import read_json, write_json, write_text

TRAINED_ON = "the model was trained on examples of this split: its scores here say little of others"


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """What a saved model is scored on.

    Args:
        name: of the data set and split.
        part: labelled by the model's classes.
        revision: of the data set on the hub, if it is from there.
        trained_on: whether the model's run took its training examples from this very split.
    """

    name: str
    part: Part
    revision: str | None
    trained_on: bool


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
        trained_on: whether the model's run took its training examples from this very split.
    """

    name: str
    part: Part
    report: EvaluationReport
    raw: EvaluationReport
    outcomes: Outcomes
    revision: str | None
    trained_on: bool


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
    examples = find_examples(
        classifier,
        dataset,
        config=config,
        revision=revision,
        split=split,
        image_column=image_column,
        label_column=label_column,
    )
    return score_examples(classifier, examples, batch_size=batch_size, num_workers=num_workers, progress=progress)


def find_examples(
    classifier: Classifier,
    dataset: str | Dataset | DatasetDict | None,
    *,
    config: str | None,
    revision: str | None,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
) -> Examples:
    """The first half of `evaluate_model`, which decodes no picture."""
    if dataset is None:
        given = {
            "dataset_config": config,
            "dataset_revision": revision,
            "image_column": image_column,
            "label_column": label_column,
        }
        return _examples_of_run(classifier, split, {flag: value for flag, value in given.items() if value is not None})
    source = open_source(dataset, config=config, revision=revision)
    first = next((known for known in TEST_SPLITS if known in source.splits), next(iter(source.splits)))
    chosen = pick_split(source, split or first, "split")
    part = part_for_classes(
        source, chosen, image_column=image_column, label_column=label_column, class_names=classifier.label_names
    )
    name = dataset if isinstance(dataset, str) else "memory"
    return Examples(name=f"{name} ({part.name})", part=part, revision=source.revision, trained_on=False)


def score_examples(
    classifier: Classifier, examples: Examples, *, batch_size: int = 64, num_workers: int = 0, progress: bool = False
) -> Evaluation:
    """The second half of `evaluate_model`."""
    part = examples.part
    logits, shrunk, readable = classifier.logits(part, batch_size=batch_size, num_workers=num_workers, progress=progress)
    if not readable.all():
        raise DataError(reason(part, int(readable.logical_not().nonzero()[0])))
    scores, labels, names = classifier.scores_of(logits, shrunk), torch.from_numpy(part.labels), classifier.label_names
    raw = evaluate(logits, labels, names)
    return Evaluation(
        name=examples.name,
        part=part,
        report=raw if classifier.choice.rule == "raw" else evaluate(scores, labels, names),
        raw=raw,
        outcomes=Outcomes.of(part, part.labels, _log_probs(scores), names),
        revision=examples.revision,
        trained_on=examples.trained_on,
    )


def _log_probs(scores: Tensor) -> Any:
    return scores.double().log_softmax(1).numpy()


def _examples_of_run(classifier: Classifier, split: str | None, given: dict[str, str]) -> Examples:
    """Examples of the data set that the model's run was asked for."""
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
        name = f"{asked.dataset} ({found.test.name})"
        return Examples(name=name, part=found.test, revision=found.revision, trained_on=False)
    part = part_for_classes(
        found.source,
        pick_split(found.source, split, "split"),
        image_column=found.image_column,
        label_column=found.label_column,
        class_names=classifier.label_names,
    )
    trained_on = part.name == found.train.name
    return Examples(name=f"{asked.dataset} ({part.name})", part=part, revision=found.revision, trained_on=trained_on)


def default_evaluation_folder(classifier: Classifier, examples: Examples) -> Path:
    """evaluations/<data set>-<split> in the run's folder, or runs/evaluate-<data set>-<split>."""
    short = examples.name.split("/")[-1].replace(" (", "-").replace(")", "").replace(" ", "-")
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
    run, record, known = classifier.run, {}, []
    if run is not None:
        record = read_json(run.plan)
        known = [(f"trained with: {name}", value) for name, value in facts(record, read_json(run.config)["seed"])]
    sizes = summarize_sizes(evaluation.part, small_area=0, seed=0)
    smallest, largest = ("x".join(map(str, size)) for size in (sizes.smallest, sizes.largest))
    all_classes, present = len(classifier.label_names), sum(count > 0 for count in evaluation.report.class_support.values())
    data_lines = [
        f"{evaluation.name}: {len(evaluation.part):,} examples, {present:,} of the model's {all_classes:,} classes",
        f"{sizes.sampled:,} pictures: median area {sizes.median_area:,.0f} px, from {smallest} to {largest}",
    ]
    if evaluation.trained_on:
        data_lines.append(TRAINED_ON)
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
        decided="What was scored, and how the model was trained",
        sections=[("scored", data_lines), *record.get("sections", [])],
        metrics=run.read_metrics() if run and run.metrics.is_file() else [],
        scores=[],
        findings=[],
        more=[],
        command=command,
        facts=[("data", scored_on), *present_facts(next(classifier.model.parameters()).device.type), *known],
    )
