"""VTAB-1k and the paper's five sets, transferred to by the rule and put beside the published figures, as one command.

    make vtab
    python recipes/vtab.py --list
    python recipes/vtab.py --tasks vtab paper --model resnetv2_101x3_bit.goog_in21k --folder runs/vtab-101x3
    python recipes/vtab.py --tasks structured --lists path/to/vtab-1k

Each of VTAB's 19 tasks is learned from 1,000 examples and scored once, on the whole test split. Nothing is tuned. Where a crop or
a mirror image would change the label, there is none (Kolesnikov et al., 2020): no crop means that pictures are resized straight
to the crop's size. The paper's sets are learned from all of their training split.

Which 1,000? VTAB defines them by the order of TensorFlow Datasets: the first 800 of its training and the first 200 of its
validation split. The hub's sets do not say that they keep this order, and most lack the validation split. So of these a seeded
draw is taken: 800 and 200 where there is a validation split, else 1,000 of the training split. The official examples are in the
archive vtab-1k.zip (4.7 GB) of the hub's XiN0919/VTAB-1k, as lists train800val200.txt and test.txt for each task: unpack it and
name the folder with --lists. The table says which were used, and where a test split has another size than VTAB's.

The hub ids were found by search in public pages and code, not fetched. A task whose set no search confirmed has none here; it,
and any task that can not be fetched or fails, is listed with its reason, and the exit status is 1. FOLDER holds

    setup.json          what was asked of which weights
    scores/             one file for each finished task, with the rows that were drawn: what is there is not repeated
    runs/, logs/        the runs of `bit_mixup.transfer` and what they print; an interrupted one goes on from its checkpoint
    table.md            ours and the published figures, and what failed
    results.json        the same

Checkpoints and models of finished runs are removed unless --keep-models is given. Tasks may be added to a FOLDER later; a start
with another model, schedule or seed, or with --lists where there was none, is refused.
"""

import hashlib
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tyro
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, concatenate_datasets
from few_shot import file_hash, logged, open_folder

from bit_mixup import BitMixupError, ConfigError, DataError, TransferConfig, make_plan, transfer
from bit_mixup.catalog import DEFAULT_MODEL
from bit_mixup.data import find_image_column, find_label_column, pick_split
from bit_mixup.environment import Precision
from bit_mixup.errors import Interrupted, did_you_mean
from bit_mixup.hyperrule import Preset
from bit_mixup.sampling import Purpose, generator
from bit_mixup.sources import open_source
from bit_mixup.storage import read_json, write_json, write_text
from bit_mixup.weights import fetch, find_weights

TRAIN, VALIDATION = 800, 200  # examples of VTAB-1k from each of the two splits
LISTS = {"train": "train800val200.txt", "test": "test.txt"}
LISTS_ID = "XiN0919/VTAB-1k"
WDS = "clip-benchmark/wds_vtab-"  # VTAB's own train and test splits as WebDataset, columns webp and cls; no validation split
Group = Literal["Natural", "Specialized", "Structured", "Paper"]


@dataclass(frozen=True)
class Task:
    """A task and where its pictures and labels are.

    Args:
        name: here.
        group: of VTAB, or "Paper" for a set that is learned from as a whole.
        classes: how many.
        hub: id of a data set; None where none was confirmed.
        lists: its folder in the archive of official examples; None for the paper's sets.
        image: column of the pictures.
        label: column of the labels.
        stored: how many values the label column has, where they are joined to `classes` bins of equal width.
        train, validation, test: splits; no validation: drawn from the training split alone.
        crop: whether crops leave the label as it is.
        flip: whether mirroring does.
        meaning: what the label says where it is not a kind of thing, and how it comes about.
    """

    name: str
    group: Group
    classes: int
    hub: str | None
    lists: str | None = None
    image: str = "webp"
    label: str = "cls"
    stored: int | None = None
    train: str = "train"
    validation: str | None = None
    test: str = "test"
    crop: bool = True
    flip: bool = True
    meaning: str = ""

    @property
    def files(self) -> dict[str, str] | None:
        """Patterns of a WebDataset's shards: by the nshards.txt beside a single shard the library takes a set for text."""
        shards = self.hub is not None and self.hub.startswith(WDS)
        return {split: f"{split}/*.tar" for split in (self.train, self.test)} if shards else None


# Classes and bins: google-research/task_adaptation (d2a72ed), data/*.py. No flip, no crop: Kolesnikov et al. (2020).
_DISTANCE = "distance of the nearest object, in VTAB's bins (to 8, 8.5, 9, 9.5, 10 and beyond), as the set has it"
_VEHICLE = "distance of the nearest car, van or truck: to 8 m, to 20 m, beyond, or none"
_REWARD = "close, far or very far from an object of positive or of negative reward, as the set has it"
TASKS = (
    Task("caltech101", "Natural", 102, WDS + "caltech101", "caltech101"),
    Task("cifar100", "Natural", 100, WDS + "cifar100", "cifar"),
    Task("dtd", "Natural", 47, WDS + "dtd", "dtd"),
    Task("flowers102", "Natural", 102, WDS + "flowers", "oxford_flowers102"),
    Task("pets", "Natural", 37, WDS + "pets", "oxford_iiit_pet"),
    Task("svhn", "Natural", 10, WDS + "svhn", "svhn"),
    Task("sun397", "Natural", 397, "dpdl-benchmark/sun397", "sun397", "image", "label", validation="validation"),
    Task("patch-camelyon", "Specialized", 2, WDS + "pcam", "patch_camelyon"),
    Task("eurosat", "Specialized", 10, WDS + "eurosat", "eurosat"),
    Task("resisc45", "Specialized", 45, WDS + "resisc45", "resisc45"),
    Task("retinopathy", "Specialized", 5, WDS + "diabetic_retinopathy", "diabetic_retinopathy"),
    Task("clevr-count", "Structured", 8, WDS + "clevr_count_all", "clevr_count", crop=False,
         meaning="number of objects less 3, as the set has it"),
    Task("clevr-distance", "Structured", 6, WDS + "clevr_closest_object_distance", "clevr_dist", crop=False, meaning=_DISTANCE),
    Task("dmlab", "Structured", 6, WDS + "dmlab", "dmlab", crop=False, meaning=_REWARD),
    Task("kitti-distance", "Structured", 4, None, "kitti", crop=False, meaning=_VEHICLE),
    Task("dsprites-location", "Structured", 16, WDS + "dsprites_label_x_position", "dsprites_loc", stored=32, crop=False,
         flip=False, meaning="horizontal position: 32 values joined to 16 bins here"),
    Task("dsprites-orientation", "Structured", 16, WDS + "dsprites_label_orientation", "dsprites_ori", stored=40, flip=False,
         meaning="angle: 40 values joined to 16 bins here"),
    Task("smallnorb-azimuth", "Structured", 18, WDS + "smallnorb_label_azimuth", "smallnorb_azi", flip=False,
         meaning="angle of the camera in steps of 20 degrees, as the set has it"),
    Task("smallnorb-elevation", "Structured", 9, WDS + "smallnorb_label_elevation", "smallnorb_ele",
         meaning="height of the camera in steps of 5 degrees, as the set has it"),
    # As in the Makefile's fine-tune-cifar10 and so on.
    Task("full-cifar10", "Paper", 10, "uoft-cs/cifar10", None, "img", "label"),
    Task("full-cifar100", "Paper", 100, "uoft-cs/cifar100", None, "img", "fine_label"),
    Task("full-pets", "Paper", 37, "timm/oxford-iiit-pet", None, "image", "label"),
    Task("full-flowers102", "Paper", 102, "Donghyun99/Oxford-Flower-102", None, "image", "label"),
    Task("full-imagenet", "Paper", 1000, "ILSVRC/imagenet-1k", None, "image", "label", test="validation"),
)  # fmt: skip
BY_NAME = {task.name: task for task in TASKS}
GROUPS: dict[str, tuple[Group, ...]] = {
    "vtab": ("Natural", "Specialized", "Structured"),
    "natural": ("Natural",),
    "specialized": ("Specialized",),
    "structured": ("Structured",),
    "paper": ("Paper",),
}
MEAN = "VTAB-1k"  # of the 19 tasks

# Percent, by task, group or MEAN. Figures of BiT-M for single tasks of VTAB were not found.
PUBLISHED_SOURCE = (
    "VTAB-1k, and R50x1, R101x3 and R152x2 on the paper's sets: README of google-research/big_transfer (140de6e), PyTorch "
    "column, medians; there CIFAR is learned with --batch 128 --base_lr 0.001. R152x4 on the paper's sets: Kolesnikov et al. "
    "(2020)"
)
PUBLISHED: dict[str, dict[str, float]] = {
    "BiT-M R50x1": {"full-cifar10": 97.4, "full-cifar100": 86.6, "full-imagenet": 80.68},
    "BiT-M R101x3": {
        "Natural": 80.29, "Specialized": 85.75, "Structured": 59.40, MEAN: 72.65, "full-cifar10": 98.6, "full-cifar100": 91.2,
    },
    "BiT-M R152x2": {"full-cifar10": 98.5, "full-cifar100": 91.3, "full-imagenet": 85.15},
    "BiT-M R152x4": {
        "Natural": 80.77, "Specialized": 85.67, "Structured": 61.08, MEAN: 73.51,
        "full-cifar10": 98.91, "full-cifar100": 92.17, "full-pets": 94.46, "full-flowers102": 99.30, "full-imagenet": 85.39,
    },
}  # fmt: skip

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is asked for; None leaves a value to `bit_mixup.transfer`."""

    tasks: tuple[str, ...] = ("vtab",)
    """Names of tasks or of groups: vtab (all 19), natural, specialized, structured, paper (the paper's five sets)."""
    model: str = DEFAULT_MODEL
    """As of bit-mixup fine-tune."""
    folder: Path = Path("runs/vtab")
    """Where everything is kept."""
    list: bool = False
    """Show the tasks, where each comes from and what is left out for it; run nothing."""
    lists: Path | None = None
    """Folder that vtab-1k.zip of XiN0919/VTAB-1k was unpacked into: the official 1,000 examples. None: the hub's sets."""
    preset: Preset = "code"
    """As of bit-mixup fine-tune."""
    resolution: Literal["rule", "model"] = "rule"
    """As of bit-mixup fine-tune."""
    steps: int | None = None
    """As of bit-mixup fine-tune."""
    batch_size: int | None = None
    """As of bit-mixup fine-tune."""
    base_lr: float | None = None
    """As of bit-mixup fine-tune."""
    seed: int = 0
    """Of the draws of examples and of the runs."""
    precision: Precision | None = None
    """As of bit-mixup fine-tune."""
    num_workers: int | None = None
    """As of bit-mixup fine-tune."""
    threads: int | None = None
    """As of bit-mixup fine-tune."""
    keep_models: bool = False
    """Keep checkpoints and models of finished runs."""

    def __post_init__(self) -> None:
        known = [*GROUPS, *BY_NAME]
        for name in self.tasks:
            if name not in known:
                raise ConfigError(f'tasks: there is no "{name}"{did_you_mean(name, known)}. --list shows all.')
        if not self.tasks:
            raise ConfigError("tasks names none. --list shows all.")

    @property
    def chosen(self) -> tuple[Task, ...]:
        """The tasks that were named, in the order of TASKS."""
        groups = {group for name in self.tasks for group in GROUPS.get(name, ())}
        return tuple(task for task in TASKS if task.name in self.tasks or task.group in groups)

    @property
    def schedule(self) -> dict[str, Any]:
        """What all runs have in common and has a say in the result."""
        names = ("model", "preset", "resolution", "steps", "batch_size", "base_lr", "seed", "precision")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """What a task is learned from and scored on.

    Args:
        splits: "train" and "test", each with columns "image", not decoded, and "label".
        kind: "official", "drawn" or "all".
        origin: hub id or folder.
        revision: commit on the hub; None for data of this machine.
        rows: that were drawn, by split of the hub's set.
    """

    splits: DatasetDict
    kind: Literal["official", "drawn", "all"]
    origin: str
    revision: str | None = None
    rows: dict[str, list[int]] = field(default_factory=dict)


def labels_of(task: Task, split: Dataset, name: str, column: str) -> Labels:
    """The classes of a split, (N,), joined to bins where the task says so.

    Raises:
        DataError: a label is outside of what the task has.
    """
    values = np.array([-1 if value is None else int(value) for value in split[column][:]], dtype=np.int64)
    stored = task.stored or task.classes
    wrong = np.flatnonzero((values < 0) | (values >= stored))
    if len(wrong):
        raise DataError(
            f'{task.hub} {name} row {wrong[0]} has the label {values[wrong[0]]} in "{column}", not one of 0 to {stored - 1}. '
            "The set is not the one that this recipe knows: use the official examples, with --lists."
        )
    return values * task.classes // stored


def relabelled(task: Task, split: Dataset, name: str) -> Dataset:
    """A split of the hub's set with the columns "image" and "label".

    Raises:
        DataError: it lacks a column, or labels are out of range.
    """
    image = find_image_column(split, task.image)
    label = find_label_column(split, task.label, image)
    feature = split.features[label]
    named = isinstance(feature, ClassLabel) and feature.num_classes == task.classes and task.stored is None
    names = feature.names if named else [str(number) for number in range(task.classes)]
    pictures = split.select_columns([image]).cast_column(image, Image(decode=False))
    if image != "image":
        pictures = pictures.rename_column(image, "image")
    return pictures.add_column("label", labels_of(task, split, name, label), feature=ClassLabel(names=names))


def fingerprinted(task: Task, split: Dataset, origin: str) -> Dataset:
    """The same under a name that is a function of the task, the origin and the labels: a resumed run knows its data by it."""
    digest = hashlib.sha256(f"{task.name} {origin}".encode() + np.array(split["label"][:], "<i8").tobytes()).hexdigest()[:16]
    return split.select(range(len(split)), new_fingerprint=f"{task.name}-{digest}")


def from_hub(task: Task, seed: int) -> Examples:
    """Fetches a task's set from the hub; of VTAB's 1,000 examples are drawn, without replacement.

    Raises:
        DataError: no set is known, or it can not be fetched or is another than expected.
    """
    if task.hub is None:
        raise DataError(
            f"not confirmed: no search found a set with it on the hub. Unpack that of {LISTS_ID} and name it by --lists."
        )
    opened = open_source(task.hub, files=task.files)
    named = {"train_split": task.train, "test_split": task.test, **({"validation": task.validation} if task.validation else {})}
    found = {name: opened.splits[pick_split(opened, name, flag)] for flag, name in named.items()}
    parts = {name: relabelled(task, split, name) for name, split in found.items()}
    wanted = {task.train: TRAIN + VALIDATION}
    if task.validation:
        wanted = {task.train: TRAIN, task.validation: VALIDATION}
    rows = {}
    train = parts[task.train]
    if task.group != "Paper":
        for index, (name, count) in enumerate(wanted.items()):
            order = generator(seed, Purpose.FEW_SHOT, index).permutation(len(parts[name]))
            rows[name] = sorted(order[:count].tolist())
        train = concatenate_datasets([parts[name].select(of_split) for name, of_split in rows.items()])
    origin = f"{task.hub} {opened.revision} {rows}"
    splits = {"train": fingerprinted(task, train, origin), "test": fingerprinted(task, parts[task.test], origin)}
    kind: Literal["drawn", "all"] = "all" if task.group == "Paper" else "drawn"
    return Examples(splits=DatasetDict(splits), kind=kind, origin=task.hub, revision=opened.revision, rows=rows)


def read_list(task: Task, path: Path) -> Dataset:
    """The pictures that a list names, a line each: path from the list's folder, a space, and the label.

    Raises:
        DataError: the list is missing, or a line of it can not be used.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing: --lists names the folder that vtab-1k.zip of {LISTS_ID} was unpacked into.")
    files, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal() or int(label) >= task.classes:
            raise DataError(f"{path} line {number}: expected a picture and a label from 0 to {task.classes - 1}. Unpack it anew.")
        if not (path.parent / name).is_file():
            raise DataError(f"{path} line {number}: {path.parent / name} is missing. Unpack the archive anew.")
        files.append({"path": str(path.parent / name), "bytes": None})
        labels.append(int(label))
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=[str(n) for n in range(task.classes)])})
    return Dataset.from_dict({"image": files, "label": labels}, features=features)


def from_lists(task: Task, folder: Path) -> Examples:
    """The official examples of a task, from lists that somebody has unpacked.

    Raises:
        DataError: they can not be used.
    """
    assert task.lists is not None
    root = folder / task.lists
    splits = {split: fingerprinted(task, read_list(task, root / file), task.lists) for split, file in LISTS.items()}
    return Examples(splits=DatasetDict(splits), kind="official", origin=str(root))


def fine_tune(asked: Protocol, task: Task, examples: Examples) -> Path:
    """Learns and scores a task in a folder of its own, going on with an interrupted run."""
    run = asked.folder / "runs" / task.name
    if (run / "report.json").is_file():
        return run
    options = asked.schedule | {"flip": task.flip, "num_workers": asked.num_workers, "threads": asked.threads}
    with logged(asked.folder / "logs" / f"{task.name}.txt"):
        if not task.crop:
            config = TransferConfig(dataset=task.name, **options)
            crop = make_plan(config, source=examples.splits, to_be_run=False).resolution.hyper.crop_size
            options |= {"resolution": "rule", "resize_size": crop, "crop_size": crop}
        transfer(dataset=examples.splits, output_dir=run, resume=True, **options)
    return run


def finish(asked: Protocol, task: Task, examples: Examples, run: Path, seconds: float) -> None:
    """Keeps what a finished run says; from then on the task is done."""
    accuracy = float(read_json(run / "report.json")["accuracy"])
    resolved = read_json(run / "plan.json")["resolved"]
    write_json(
        score_path(asked, task),
        {
            "task": task.name,
            "accuracy": accuracy,
            "examples": examples.kind,
            "train_examples": len(examples.splits["train"]),
            "test_examples": len(examples.splits["test"]),
            "resize_size": resolved["hyper"]["resize_size"],
            "crop_size": resolved["hyper"]["crop_size"],
            "flip": resolved["flip"],
            "origin": examples.origin,
            "revision": examples.revision,
            "rows": examples.rows,
            "seconds": round(seconds, 1),
        },
    )
    print(f"{task.name:<22} {100 * accuracy:6.2f} %", flush=True)
    if not asked.keep_models:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        shutil.rmtree(run / "model", ignore_errors=True)


def score_path(asked: Protocol, task: Task) -> Path:
    """Where the score of a finished task is."""
    return asked.folder / "scores" / f"{task.name}.json"


def run_tasks(asked: Protocol) -> dict[str, str]:
    """Runs the tasks that have no score yet; gives for each that could not be run why."""
    failures = {}
    for task in asked.chosen:
        if score_path(asked, task).is_file():
            continue
        start, what = time.monotonic(), "could not be fetched"
        try:
            official = asked.lists is not None and task.lists is not None
            examples = from_lists(task, asked.lists) if official and asked.lists else from_hub(task, asked.seed)
            what = "could not be learned"
            run = fine_tune(asked, task, examples)
        except BitMixupError as error:
            failures[task.name] = f"{what}: {error}"
            print(f"{task.name:<22} {what}: {error}", file=sys.stderr, flush=True)
            continue
        finish(asked, task, examples, run, time.monotonic() - start)
    return failures


def means(scores: dict[str, dict[str, Any]]) -> dict[str, tuple[float, int, int]]:
    """For each group of VTAB with a score, and for all of it: mean accuracy, how many tasks it is of, and how many there are."""
    found = {}
    for name, groups in [*((group, (group,)) for group in GROUPS["vtab"]), (MEAN, GROUPS["vtab"])]:
        members = [task.name for task in TASKS if task.group in groups]
        values = [scores[member]["accuracy"] for member in members if member in scores]
        if values:
            found[name] = (statistics.fmean(values), len(values), len(members))
    return found


def table(asked: Protocol, scores: dict[str, dict[str, Any]], failures: dict[str, str]) -> str:
    """Ours beside the published figures in percent, and what failed, as Markdown."""
    ours = means(scores)

    def line(name: str, cells: Sequence[str], accuracy: str) -> str:
        published = [f"{of[name]:.2f}" if name in of else "" for of in PUBLISHED.values()]
        return "| " + " | ".join([name, *cells, accuracy, *published]) + " |"

    lines = []
    for group in (*GROUPS["vtab"], "Paper"):
        for task in (task for task in TASKS if task.group == group):
            if task.name in scores:
                score = scores[task.name]
                view = f"{score['resize_size']} → {score['crop_size']}" if task.crop else f"{score['crop_size']}, no crop"
                view += "" if score["flip"] else ", no flip"
                counts = [f"{score['train_examples']:,} {score['examples']}", f"{score['test_examples']:,}"]
                lines.append(line(task.name, [*counts, view], f"{100 * score['accuracy']:.2f}"))
            elif task.name in failures:
                lines.append(line(task.name, ["", "", ""], "failed"))
        if group in ours:
            lines.append(_mean_line(line, group, ours[group]))
    if MEAN in ours:
        lines.append(_mean_line(line, MEAN, ours[MEAN]))
    text = [
        f"# VTAB-1k and the paper's sets: {asked.model}",
        "",
        "Top-1 accuracy in percent, scored once on the whole test split; seed "
        f"{asked.seed}, preset {asked.preset}, nothing tuned. A mean of fewer tasks than its group has can not be compared.",
        "",
        "| task | trained on | scored on | view | ours | " + " | ".join(PUBLISHED) + " |",
        "|---" * (5 + len(PUBLISHED)) + "|",
        *lines,
        "",
        f"Published: {PUBLISHED_SOURCE}.",
    ]
    if any(score["examples"] == "drawn" for score in scores.values()):
        text += ["", "drawn: not VTAB's own 1,000 examples but as many drawn by the seed; --lists takes the official ones."]
    if failures:
        text += ["", "## Failed", "", *(f"- {name}: {reason}" for name, reason in failures.items())]
    return "\n".join(text) + "\n"


def _mean_line(line: Any, name: str, mean: tuple[float, int, int]) -> str:
    value, count, of = mean
    return str(line(name, [f"mean of {count} of {of}", "", ""], f"**{100 * value:.2f}**"))


def task_list() -> str:
    """All tasks as Markdown: where each comes from, how its label comes about and what is left out."""
    lines = ["| task | group | classes | hub id | splits | columns | --lists | left out | label |", "|---" * 9 + "|"]
    for task in TASKS:
        splits = [
            f"{task.train}[{TRAIN}] + {task.validation}[{VALIDATION}]" if task.validation else f"{task.train}[1000]",
            task.test,
        ]
        if task.group == "Paper":
            splits[0] = task.train
        left_out = ", ".join(name for name, kept in (("crop", task.crop), ("flip", task.flip)) if not kept)
        where = [task.hub, "; ".join(splits), f"{task.image}, {task.label}"] if task.hub else ["not confirmed", "", ""]
        cells = [task.name, task.group, str(task.classes), *where, task.lists or "", left_out, task.meaning]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def vtab(asked: Protocol) -> dict[str, Any]:
    """Runs what is missing, writes table and results, and gives what results.json holds.

    Raises:
        BitMixupError: the folder belongs to another experiment, or the model can not be used.
    """
    weights = fetch(find_weights(asked.model))
    assert weights.file is not None
    setup = {**asked.schedule, "weights": file_hash(weights.file), "examples": "official" if asked.lists else "hub"}
    open_folder(asked.folder, setup, kind="VTAB experiment")
    failures = run_tasks(asked)
    scores = {task.name: read_json(score_path(asked, task)) for task in TASKS if score_path(asked, task).is_file()}
    groups = {name: {"mean": mean, "tasks": count, "of": of} for name, (mean, count, of) in means(scores).items()}
    results = {"setup": setup, "tasks": scores, "means": groups, "failures": failures, "published": PUBLISHED}
    write_json(asked.folder / "results.json", results)
    write_text(asked.folder / "table.md", table(asked, scores, failures))
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what is missing and prints the table. Exits with 1 where a task failed, with 2 where nothing can be done."""
    try:
        asked = tyro.cli(Protocol, args=argv, prog="vtab", description=__doc__)
        if asked.list:
            print(task_list())
            return {}
        results = vtab(asked)
    except BitMixupError as error:
        print(f"vtab: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except Interrupted as stop:
        print(f"vtab: {stop}", file=sys.stderr)
        raise SystemExit(stop.exit_code) from stop
    print(f"\n{(asked.folder / 'table.md').read_text(encoding='utf-8')}")
    print(f"{asked.folder}/: table.md, results.json")
    if results["failures"]:
        raise SystemExit(1)
    return results


if __name__ == "__main__":
    main()
