"""VTAB-1k, and the data sets of BiT's paper, as one command.

    make vtab ARGS='--model resnetv2_101x3_bit.goog_in21k'
    python recipes/vtab.py --tasks natural cifar10 --model resnetv2_50x1_bit.goog_in21k
    python recipes/vtab.py --list

The 19 tasks of the Visual Task Adaptation Benchmark (Zhai et al., 2019): fine-tuning on its 1,000 examples (800 of its training
and 200 of its validation split, the split that VTAB's own code calls train800val200) by the BiT-HyperRule, nothing tuned,
scored once on the whole test split. Where mirroring or cropping would change the label it is off, as in BiT's paper. VTAB's
tasks are read from a copy on the hub that its maker wrote with VTAB's own code, labels and all; only the two splits that are
needed are fetched. Or they are read from another copy, unpacked: vtab-1k.zip (4.7 GB) of the hub's XiN0919/VTAB-1k holds all 19
as pictures and lists, train800val200.txt and test.txt; name its folder with --lists. The paper's five sets are trained on whole.
Checkpoints and models of finished runs are removed unless --keep-models is given. FOLDER holds

setup.json       what was asked: a start with another model or schedule is refused, other tasks may be added
runs/, logs/     a run for each task, and what it printed; an interrupted one goes on from its checkpoint, a finished one stays
failures.json    tasks that could not be done the last time, and why; they are tried again
results.json     scores and failures; table.md: the same beside published figures
"""

import hashlib
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from few_shot import file_hash, logged, open_folder

from bit_mixup import BitMixupError, ConfigError, DataError, TransferConfig, make_plan, transfer
from bit_mixup.data import find_label_column
from bit_mixup.errors import Interrupted, did_you_mean
from bit_mixup.hub import explain, first_line, take_out_if_damaged
from bit_mixup.storage import read_json, write_json, write_text
from bit_mixup.weights import fetch, find_weights

TRAIN, TEST = "train800val200", "test"
LISTS_ID = "XiN0919/VTAB-1k"
GROUPS = ("natural", "specialized", "structured", "paper")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task.

    Args:
        group: natural, specialized or structured of VTAB; paper for whole sets.
        repository: on the hub, without the user of VTAB's copies.
        classes: how many.
        flip: whether mirroring keeps the label.
        crop: whether cropping keeps the label.
        columns: of pictures and labels, and splits, where they are not VTAB's.
    """

    group: Literal["natural", "specialized", "structured", "paper"]
    repository: str
    classes: int
    flip: bool = True
    crop: bool = True
    columns: tuple[str, str, str, str] = ("image", "label", TRAIN, TEST)


# The folders of the lists are named as in the many loaders that read them; where a name is not that of the task here:
LIST_FOLDERS = {
    "cifar100": "cifar", "flowers102": "oxford_flowers102", "pets": "oxford_iiit_pet", "retinopathy": "diabetic_retinopathy",
    "clevr_distance": "clevr_dist", "kitti_distance": "kitti", "dsprites_location": "dsprites_loc",
    "dsprites_orientation": "dsprites_ori", "smallnorb_azimuth": "smallnorb_azi", "smallnorb_elevation": "smallnorb_ele",
}  # fmt: skip


# Splits and columns of these copies, and their names, are those of the script that wrote them. The pages or the use in code of
# vtab_cifar100 and vtab_patch_camelyon were seen as well; none could be opened from where this was written.
TASKS = {
    "caltech101": Task(group="natural", repository="vtab_caltech101", classes=102),
    "cifar100": Task(group="natural", repository="vtab_cifar100", classes=100),
    "dtd": Task(group="natural", repository="vtab_dtd", classes=47),
    "flowers102": Task(group="natural", repository="vtab_flowers102", classes=102),
    "pets": Task(group="natural", repository="vtab_pets", classes=37),
    "sun397": Task(group="natural", repository="vtab_sun397", classes=397),
    "svhn": Task(group="natural", repository="vtab_svhn", classes=10),
    "patch_camelyon": Task(group="specialized", repository="vtab_patch_camelyon", classes=2),
    "eurosat": Task(group="specialized", repository="vtab_eurosat", classes=10),
    "resisc45": Task(group="specialized", repository="vtab_resisc45", classes=45),
    "retinopathy": Task(group="specialized", repository="vtab_retinopathy", classes=5),
    "clevr_count": Task(group="structured", repository="vtab_clevr_count", classes=8, crop=False),
    "clevr_distance": Task(group="structured", repository="vtab_clevr_distance", classes=6, crop=False),
    "dmlab": Task(group="structured", repository="vtab_dmlab", classes=6, crop=False),
    "kitti_distance": Task(group="structured", repository="vtab_kitti_distance", classes=4, crop=False),
    "dsprites_location": Task(group="structured", repository="vtab_dsprites_location", classes=16, flip=False, crop=False),
    "dsprites_orientation": Task(group="structured", repository="vtab_dsprites_orientation", classes=16, flip=False),
    "smallnorb_azimuth": Task(group="structured", repository="vtab_smallnorb_azimuth", classes=18, flip=False),
    "smallnorb_elevation": Task(group="structured", repository="vtab_smallnorb_elevation", classes=9),
    "whole_cifar10": Task(group="paper", repository="uoft-cs/cifar10", classes=10, columns=("img", "label", "train", "test")),
    "whole_cifar100": Task(
        group="paper", repository="uoft-cs/cifar100", classes=100, columns=("img", "fine_label", "train", "test")
    ),
    "whole_pets": Task(group="paper", repository="timm/oxford-iiit-pet", classes=37, columns=("image", "label", "train", "test")),
    "whole_flowers102": Task(
        group="paper", repository="Donghyun99/Oxford-Flower-102", classes=102, columns=("image", "label", "train", "test")
    ),
    "whole_imagenet": Task(
        group="paper", repository="ILSVRC/imagenet-1k", classes=1000, columns=("image", "label", "train", "validation")
    ),
}

# BiT-M, top-1 in per cent. VTAB: means of groups, from the README of the authors' code. Whole sets: R50x1, R101x3 and R152x2 from
# the same place (its PyTorch column, medians), R152x4 from the paper.
PUBLISHED_SOURCE = "README of github.com/google-research/big_transfer (BiT-M), and Kolesnikov et al., 2020 (whole sets, R152x4)"
PUBLISHED = {
    "R50x1": {"whole_cifar10": 97.4, "whole_cifar100": 86.6, "whole_imagenet": 80.68},
    "R101x3": {
        "natural": 80.29, "specialized": 85.75, "structured": 59.40, "VTAB": 72.65, "whole_cifar10": 98.6, "whole_cifar100": 91.2,
    },
    "R152x2": {"whole_cifar10": 98.5, "whole_cifar100": 91.3, "whole_imagenet": 85.15},
    "R152x4": {
        "natural": 80.77, "specialized": 85.67, "structured": 61.08, "VTAB": 73.51, "whole_cifar10": 98.91,
        "whole_cifar100": 92.17, "whole_pets": 94.46, "whole_flowers102": 99.30, "whole_imagenet": 85.39,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VtabConfig:
    """Fine-tunes a model on each task of VTAB-1k, or on the paper's sets, and compares with published figures."""

    tasks: tuple[str, ...] = ("natural", "specialized", "structured")
    """Tasks or groups of tasks: natural, specialized, structured, paper (--list names all)."""
    model: str = "resnetv2_50x1_bit.goog_in21k"
    """As of bit-mixup fine-tune."""
    folder: Path | None = None
    """Where everything is kept. None: runs/vtab/ and the model's name."""
    user: str = "bramtoula"
    """Whose copies of VTAB's tasks on the hub."""
    lists: Path | None = None
    """Folder of the unpacked lists, in place of the hub. None: the hub."""
    preset: Literal["code", "paper", "light"] = "code"
    """Of the rule."""
    resolution: Literal["rule", "model"] = "rule"
    """Of the pictures."""
    steps: int | None = None
    """None: the rule's."""
    batch_size: int | None = None
    """None: the preset's."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Of the forward and backward pass."""
    threads: int | None = None
    """Torch's. None: the cores."""
    seed: int = 0
    """Of the runs."""
    keep_models: bool = False
    """Keep checkpoints and models of finished runs."""
    list: bool = False
    """Print the tasks and leave."""

    @property
    def schedule(self) -> dict[str, Any]:
        """What all runs have in common and has a say in their results."""
        names = ("model", "preset", "resolution", "steps", "batch_size", "precision", "seed")
        return {name: getattr(self, name) for name in names}


def chosen_tasks(asked: Sequence[str]) -> list[str]:
    """Names of tasks, each once, from names of tasks and groups.

    Raises:
        ConfigError: there is no such task or group.
    """
    names: list[str] = []
    for name in asked:
        if name not in TASKS and name not in GROUPS:
            raise ConfigError(f'there is no task "{name}"{did_you_mean(name, [*TASKS, *GROUPS])}; --list names them.')
        names += [name] if name in TASKS else [task for task, about in TASKS.items() if about.group == name]
    return list(dict.fromkeys(names))


def fetch_task(repository: str) -> tuple[DatasetDict, str]:
    """The two splits of one of VTAB's tasks that its protocol needs, and the commit that they are from.

    Raises:
        DataError: they can not be fetched, or are not there.
    """
    from huggingface_hub import HfApi, hf_hub_download

    where = f'data set "{repository}"'
    try:
        info = HfApi().dataset_info(repository)
        commit, names = str(info.sha), [file.rfilename for file in info.siblings or []]
        files = {split: sorted(name for name in names if name.startswith(f"data/{split}-")) for split in (TRAIN, TEST)}
        if missing := [split for split, found in files.items() if not found]:
            raise DataError(
                f"{where} has no files data/{missing[0]}-*.parquet: it is no copy of a task of VTAB. Name another --user."
            )
        paths = {
            split: [Path(hf_hub_download(repository, name, revision=commit, repo_type="dataset")) for name in found]
            for split, found in files.items()
        }
    except DataError:
        raise
    except Exception as error:  # of the client, of its HTTP library, or of the system
        reason = explain(error, instead="leave the task out") or f"it can not be fetched: {first_line(error)}"
        raise DataError(f"{where}: {reason}") from error
    for path in (path for of_split in paths.values() for path in of_split):
        if damage := take_out_if_damaged(path):
            raise DataError(f"{path.name} of {where}: {damage}")
    data = load_dataset("parquet", data_files={split: [str(path) for path in of_split] for split, of_split in paths.items()})
    assert isinstance(data, DatasetDict)
    return data, commit


def read_list(path: Path, classes: int) -> Dataset:
    """The pictures that a list names, a line each: the path from the list's folder, a space, and the label.

    Raises:
        DataError: the list is missing, or a line of it can not be used.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing. Give --lists the folder that vtab-1k.zip of {LISTS_ID} was unpacked into.")
    files, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal() or int(label) >= classes:
            raise DataError(f"{path} line {number}: expected a picture and a label from 0 to {classes - 1}. Unpack it anew.")
        if not (path.parent / name).is_file():
            raise DataError(f"{path} line {number}: {path.parent / name} is missing. Unpack the archive anew.")
        files.append({"path": str(path.parent / name), "bytes": None})
        labels.append(int(label))
    features = Features({"image": Image(decode=False), "label": ClassLabel(num_classes=classes)})
    return Dataset.from_dict({"image": files, "label": labels}, features=features)


def with_classes(split: Dataset, name: str, where: str, task: Task) -> Dataset:
    """A split whose labels are known to be the task's, under a name that a resumed run knows again whatever the cache.

    Raises:
        DataError: there are no labels, or not those of the task.
    """
    label = find_label_column(split, task.columns[1], task.columns[0])
    feature = split.features[label]
    if isinstance(feature, ClassLabel) and feature.num_classes != task.classes:
        raise DataError(f"{where} has {feature.num_classes} classes, but the task has {task.classes}.")
    labels = split[label][:]
    foreign = next((row for row, value in enumerate(labels) if value not in range(task.classes)), None)
    if foreign is not None:
        raise DataError(
            f'{where}: row {foreign} of {name} has the label {labels[foreign]} in "{label}", but the task has 0 to '
            f"{task.classes - 1}. It is another set: name another --user, or --lists."
        )
    if not isinstance(feature, ClassLabel):  # a class that none of the 1,000 examples has is still one of the task's
        split = split.cast_column(label, ClassLabel(num_classes=task.classes))
    digest = hashlib.sha256(f"{where} {name} {labels}".encode()).hexdigest()[:16]
    return split.select(range(len(split)), new_fingerprint=f"{task.repository}-{digest}")


def open_task(name: str, asked: VtabConfig) -> tuple[Any, dict[str, str]]:
    """The data of a task, as `transfer` takes it, and where they are from.

    Raises:
        DataError: they can not be had, or are not those of the task.
    """
    task = TASKS[name]
    if task.group == "paper":
        return task.repository, {"repository": task.repository}
    if asked.lists is not None:
        where = LIST_FOLDERS.get(name, name)
        data = DatasetDict({split: read_list(asked.lists / where / f"{split}.txt", task.classes) for split in (TRAIN, TEST)})
        origin = {"lists": str(asked.lists / where)}
    else:
        where = f"{asked.user}/{task.repository}"
        data, commit = fetch_task(where)
        origin = {"repository": where, "revision": commit}
        where += f" at {commit[:12]}"
    return DatasetDict({split: with_classes(data[split], split, where, task) for split in (TRAIN, TEST)}), origin


def run_task(name: str, asked: VtabConfig, folder: Path) -> dict[str, Any]:
    """Fine-tunes on a task, unless that was done before, and gives its scores.

    Raises:
        BitMixupError: it can not be done.
    """
    task, run = TASKS[name], folder / "runs" / name
    if not (run / "report.json").is_file():
        image, label, train, test = task.columns
        options: dict[str, Any] = asked.schedule | {
            "threads": asked.threads, "flip": task.flip,
            "train_split": train, "test_split": test, "image_column": image, "label_column": label, "output_dir": run,
        }  # fmt: skip
        data, origin = open_task(name, asked)
        if task.group != "paper":
            run.parent.mkdir(parents=True, exist_ok=True)
            write_json(run.parent / f"{name}.revision.json", origin)
        if not task.crop:  # the whole picture at the size of a crop
            planned = make_plan(TransferConfig(dataset=str(task.repository), **options), source=data, to_be_run=False)
            size = planned.resolution.hyper.crop_size
            options |= {"resolution": "rule", "resize_size": size, "crop_size": size}
        with logged(folder / "logs" / f"{name}.txt"):
            transfer(dataset=data, resume=True, **options)
    if not asked.keep_models:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        shutil.rmtree(run / "model", ignore_errors=True)
    report, plan = read_json(run / "report.json"), read_json(run / "plan.json")["resolved"]
    source = run.parent / f"{name}.revision.json"
    return {
        "accuracy": report["accuracy"],
        "accuracy_interval": report["accuracy_interval"],
        "train_examples": plan["data"]["train_examples"],
        "test_examples": report["num_examples"],
        "revision": read_json(source).get("revision") if source.is_file() else plan["data"]["revision"],
        "resize_size": plan["hyper"]["resize_size"],
        "crop_size": plan["hyper"]["crop_size"],
        "flip": plan["flip"],
    }


def means(scores: dict[str, dict[str, Any]]) -> dict[str, tuple[float, int, int]]:
    """Mean accuracy of each group of VTAB and of all its tasks, with the number of tasks that are in it and that should be."""
    groups = {group: [name for name, task in TASKS.items() if task.group == group] for group in GROUPS[:3]}
    found = {}
    for title, names in {**groups, "VTAB": [name for members in groups.values() for name in members]}.items():
        done = [scores[name]["accuracy"] for name in names if name in scores]
        if done:
            found[title] = (statistics.fmean(done), len(done), len(names))
    return found


def table(asked: VtabConfig, scores: dict[str, dict[str, Any]], failures: dict[str, str]) -> str:
    """Scores beside published ones, and what failed, as Markdown."""
    head = ["task", "group", "examples", "test", "top-1", *(f"BiT-M {size}" for size in PUBLISHED)]
    lines = [
        f"# {asked.model}, preset {asked.preset}, seed {asked.seed}",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]

    def published(name: str) -> list[str]:
        return [f"{figures[name]:.2f}" if name in figures else "" for figures in PUBLISHED.values()]

    for name, score in scores.items():
        low, high = (100 * end for end in score["accuracy_interval"])
        own = [
            f"{score['train_examples']:,}",
            f"{score['test_examples']:,}",
            f"{100 * score['accuracy']:.2f} ({low:.2f} to {high:.2f})",
        ]
        lines.append(f"| {' | '.join([name, TASKS[name].group, *own, *published(name)])} |")
    for title, (mean, done, all_) in means(scores).items():
        shown = f"**{100 * mean:.2f}**" if done == all_ else f"{100 * mean:.2f} ({done} of {all_} tasks: not comparable)"
        lines.append(f"| {' | '.join([f'mean of {title}', '', '', '', shown, *published(title)])} |")
    lines += [
        "",
        f"Per cent; in brackets 95 % intervals (Wilson, 1927). Published: {PUBLISHED_SOURCE}; medians of several runs.",
    ]
    if failures:
        lines += ["", "Not done:", "", *(f"- {name}: {reason}" for name, reason in failures.items())]
    return "\n".join(lines) + "\n"


def listing() -> str:
    """All tasks, as lines."""
    lines = [f"{'task':<22} {'group':<12} {'classes':>7}  mirrored  cropped  on the hub"]
    for name, task in TASKS.items():
        words = ["yes" if allowed else "no" for allowed in (task.flip, task.crop)]
        lines.append(f"{name:<22} {task.group:<12} {task.classes:>7,}  {words[0]:<8}  {words[1]:<7}  {task.repository}")
    return "\n".join(lines)


def vtab(asked: VtabConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Does what is missing, and writes table and results: scores and failures by task.

    Raises:
        BitMixupError: there is no such task or model, an option can not be used, or the folder belongs to another experiment.
    """
    names = chosen_tasks(asked.tasks)
    folder = asked.folder or Path("runs/vtab") / Path(asked.model).name
    TransferConfig(dataset="vtab", threads=asked.threads, **asked.schedule)  # before anything is fetched for it
    weights = fetch(find_weights(asked.model))
    assert weights.file is not None
    copies = "lists" if asked.lists is not None else asked.user
    open_folder(folder, {**asked.schedule, "weights": file_hash(weights.file), "copies": copies})
    scores: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    for number, name in enumerate(names, start=1):
        print(f"{number} of {len(names)}: {name}", flush=True)
        try:
            scores[name] = run_task(name, asked, folder)
            print(f"    {scores[name]['accuracy']:.2%}", flush=True)
        except BitMixupError as error:
            failures[name] = str(error)
            print(f"    NOT DONE: {error}", flush=True)
        write_json(folder / "failures.json", failures)
    before = [name for name in TASKS if name not in names and (folder / "runs" / name / "report.json").is_file()]
    scores |= {name: run_task(name, asked, folder) for name in before}
    scores = {name: scores[name] for name in TASKS if name in scores}
    write_json(
        folder / "results.json", {"scores": scores, "failures": failures, "means": {k: v[0] for k, v in means(scores).items()}}
    )
    write_text(folder / "table.md", table(asked, scores, failures))
    print("\n" + table(asked, scores, failures))
    return scores, failures


def main(argv: Sequence[str] | None = None) -> None:
    """Exits with 1 where tasks could not be done, and with 2 where nothing could be."""
    asked = tyro.cli(VtabConfig, args=list(sys.argv[1:] if argv is None else argv), prog="vtab.py", description=__doc__)
    if asked.list:
        print(listing())
        return
    try:
        _, failures = vtab(asked)
    except BitMixupError as error:
        print(f"vtab.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except Interrupted as stop:
        print(f"vtab.py: stopped by {stop.signal_name}; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(stop.exit_code) from stop
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
