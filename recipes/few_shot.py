"""How far do a few examples for each class go? The few-shot protocol as one command.

    make few-shot
    python recipes/few_shot.py --dataset runs/open_sets/furniture --shots 1 5 10

For each number of examples a class and each few-shot seed a balanced set is drawn from the training split, without replacement,
and every method learns from the same sets and is scored on the whole test split:

nearest     the label of the nearest training picture by squared difference of pixels, at the test pictures' own size where they
            all have one of at most 32 x 32, else resized to 32 x 32
ridge       ridge regression to +1 and -1 for each class, with an intercept, on the model's frozen pooled features of evaluation
            views, scaled to length 1; in closed form, with a penalty of 0.1 that was fixed beforehand and is never tuned
scratch     the bundled architecture from random weights; of --scratch-rates the best median *by test score*: a favour to it
pretrained  fine-tuning --model, nothing tuned

The last two are whole runs of `bit_mixup.transfer`. It lays a small set end to end in shuffled passes, where the reference draws
with replacement. FOLDER holds

setup.json, indices.json      what was asked of which data; the drawn rows of the training split by examples a class and seed
scores/                       one file for each score: what is there is read, not repeated
runs/, logs/                  the fine-tuning runs and what they print; an interrupted one goes on from its checkpoint
table.md, few_shot.png        smallest, median and largest score over the seeds
results.json                  the same and every score

Checkpoints and models of finished runs are removed unless --keep-models is given. Shots, seeds, methods and rates may be added to
a FOLDER later; a start with another model, other data or another schedule is refused. Of the pictures themselves only a sample of
200 is compared.
"""

import argparse
import hashlib
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bit_mixup import (
    BitMixupError,
    CheckpointError,
    ConfigError,
    ImageDataset,
    TransferConfig,
    load_bit,
    load_image_dataset,
    make_plan,
    save_model,
    transfer,
)
from bit_mixup.data import Part
from bit_mixup.images import View, open_encoded
from bit_mixup.launching import torch_threads
from bit_mixup.models import Normalize
from bit_mixup.storage import read_json, write_json, write_text
from bit_mixup.weights import BUNDLED, fetch, find_weights

METHODS = ("nearest", "ridge", "scratch", "pretrained")
PIXELS = 32  # edge at which larger pictures are compared by their pixels
PENALTY = 0.1
BATCH = 128
LINES = {  # colour and marker
    "nearest": ("#8c8c8c", "s"),
    "ridge": ("#2a7f62", "^"),
    "scratch": ("#c46210", "D"),
    "pretrained": ("#1f4e9c", "o"),
}

# Percent: smallest, median and largest.
PUBLISHED_SOURCE = (
    "README of google-research/big_transfer (140de6e), few-shot table, PyTorch column: --batch 128, --base_lr 0.001, at least "
    "five runs; printed numbers, not digitised"
)
PUBLISHED = {
    "cifar10": {
        "BiT-M R50x1": {1: (45.8, 57.9, 65.7), 5: (80.3, 82.3, 84.9)},
        "BiT-M R101x3": {1: (56.4, 56.7, 73.1), 5: (84.8, 85.8, 89.6)},
        "BiT-M R152x2": {1: (50.9, 55.5, 59.5), 5: (85.3, 85.8, 88.6)},
    },
    "cifar100": {
        "BiT-M R50x1": {1: (34.6, 35.2, 38.6), 5: (64.7, 65.5, 66.0)},
        "BiT-M R101x3": {1: (31.6, 33.8, 36.9), 5: (70.6, 71.6, 71.7)},
        "BiT-M R152x2": {1: (34.3, 36.8, 39.0), 5: (70.3, 72.0, 72.3)},
    },
}

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is asked for; None leaves a value to `bit_mixup.transfer`.

    Args:
        dataset: anything that `bit_mixup.load_image_dataset` opens.
        model: anything that `bit_mixup.find_weights` knows.
        shots: numbers of training examples for each class.
        seeds: how many few-shot seeds, from 0.
        methods: some of METHODS.
        folder: None: runs/few-shot/ and the data set's short name.
        preset: of the fine-tuning runs.
        resolution: of evaluation views and fine-tuning; from scratch "model" means the bundled one.
        flip: mirror half of the training pictures. None: unless they are the digits.
        steps: of fine-tuning.
        batch_size: of fine-tuning.
        base_lr: of fine-tuning the pretrained model.
        scratch_rates: to choose from for random weights.
        threads: torch's.
        train_split, test_split, image_column, label_column: as in `bit_mixup.load_image_dataset`.
        keep_models: keep checkpoints and models of finished runs.
    """

    dataset: str = "digits"
    model: str = BUNDLED
    shots: tuple[int, ...] = (1, 5, 10)
    seeds: int = 5
    methods: tuple[str, ...] = METHODS
    folder: Path | None = None
    preset: str = "light"
    resolution: str = "model"
    flip: bool | None = None
    steps: int | None = None
    batch_size: int | None = None
    base_lr: float | None = None
    scratch_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    threads: int = 1
    train_split: str = "train"
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    keep_models: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            raise ConfigError(f"methods are {', '.join(METHODS)}, not {', '.join(unknown) or 'none'}.")
        if not self.shots or min(self.shots) < 1 or self.seeds < 1 or not self.scratch_rates:
            raise ConfigError("shots and seeds must be at least 1, and there must be a rate for training from scratch.")

    @property
    def short_name(self) -> str:
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.dataset.rstrip("/").split("/")[-1])

    @property
    def place(self) -> Path:
        return self.folder or Path("runs") / "few-shot" / self.short_name

    @property
    def columns(self) -> dict[str, Any]:
        """What both `load_image_dataset` and `transfer` are told of the data."""
        names = ("train_split", "test_split", "image_column", "label_column")
        return {name: getattr(self, name) for name in names}

    @property
    def schedule(self) -> dict[str, Any]:
        """What the fine-tuning runs of pretrained and of random weights have in common."""
        flip = self.short_name != "digits" if self.flip is None else self.flip
        names = ("preset", "resolution", "steps", "batch_size")
        return {name: getattr(self, name) for name in names} | {"flip": flip}


@dataclass(frozen=True)
class Draw:
    """A small training set.

    Args:
        shots: examples of each class.
        seed: of the draw.
        rows: of the training split, rising.
    """

    shots: int
    seed: int
    rows: Rows


def nearest_labels(train: npt.NDArray[np.uint8], labels: Rows, test: npt.NDArray[np.uint8]) -> Rows:
    """The label of the nearest row of `train` (N, D) for each row of `test` (M, D), in whole numbers and therefore exact."""
    known = train.astype(np.float64)
    lengths = (known**2).sum(1)
    chunks = [test[start : start + 1000].astype(np.float64) for start in range(0, len(test), 1000)]
    return np.concatenate([labels[(lengths - 2 * chunk @ known.T).argmin(1)] for chunk in chunks])


def ridge_labels(train: npt.NDArray[Any], labels: Rows, test: npt.NDArray[Any], penalty: float = PENALTY) -> Rows:
    """Labels of ridge regression on rows scaled to length 1, solved for one unknown an example and class, not a feature."""
    train, test = (x.astype(np.float64) / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (train, test))
    classes = np.unique(labels)
    targets = np.where(labels[:, None] == classes, 1.0, -1.0)
    centre, offset = train.mean(0), targets.mean(0)
    centred = train - centre
    dual = np.linalg.solve(centred @ centred.T + penalty * np.eye(len(centred)), targets - offset)
    return classes[((test - centre) @ (centred.T @ dual) + offset).argmax(1)]


def pixel_size(part: Part) -> tuple[int, int]:
    """Width and height at which pictures are compared: their own where all have one that is small, else PIXELS."""
    sizes = set()
    for start in range(0, len(part), 1000):
        for encoded in part.encoded(range(start, min(start + 1000, len(part)))):
            with open_encoded(encoded) as picture:
                sizes.add(picture.size)
        if len(sizes) > 1:
            return PIXELS, PIXELS
    (size,) = sizes
    return size if max(size) <= PIXELS else (PIXELS, PIXELS)


def pixels(part: Part, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The pictures of a part as rows of bytes, (N, D)."""
    batches = (range(start, min(start + BATCH, len(part))) for start in range(0, len(part), BATCH))
    pictures = (picture.resize(size, 2) for batch in batches for picture in part.read(batch))  # 2: bilinear
    return np.stack([np.asarray(picture).reshape(-1) for picture in pictures])


@torch.no_grad()
def features(part: Part, model: Any, view: View) -> npt.NDArray[np.float32]:
    """timm's pooled features before the head for the evaluation views of a part, (N, D)."""
    device = next(model.parameters()).device
    normalize = Normalize.of(model)
    found = []
    for start in range(0, len(part), BATCH):
        pictures = part.read(range(start, min(start + BATCH, len(part))))
        images = torch.from_numpy(np.stack([view.evaluate(picture) for picture in pictures])).to(device)
        pooled = model.forward_head(model.forward_features(normalize(images)), pre_logits=True)
        found.append(pooled.flatten(1).cpu().numpy())
    return np.concatenate(found)


def file_hash(path: Path) -> str:
    """The start of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def pictures_hash(data: ImageDataset) -> str:
    """A hash of the encoded bytes of 100 training and 100 test pictures, evenly spaced."""
    digest = hashlib.sha256()
    for part in (data.train, data.test):
        for encoded in part.encoded(np.linspace(0, len(part) - 1, 100).astype(int).tolist()):
            digest.update(encoded["bytes"] if encoded.get("bytes") is not None else Path(encoded["path"]).read_bytes())
    return digest.hexdigest()[:16]


def open_folder(folder: Path, setup: dict[str, Any]) -> None:
    """Makes the folder this experiment's, or sees that it is.

    Raises:
        CheckpointError: it belongs to something else; the message names what differs.
    """
    path = folder / "setup.json"
    if not path.is_file():
        if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise CheckpointError(f"{folder} is not empty and holds no experiment of this kind. Choose another --folder.")
        write_json(path, setup)
        return
    before = read_json(path)
    changed = [name for name in {**before, **setup} if before.get(name) != setup.get(name)]
    if changed:
        differences = "\n".join(f"  {name}: {before.get(name)} -> {setup.get(name)}" for name in changed)
        raise CheckpointError(
            f"{folder} holds scores of another experiment:\n{differences}\nStart as then, or choose another --folder."
        )


def draw_all(asked: Protocol) -> list[Draw]:
    """The small training sets; FOLDER/indices.json holds them, and must agree where it has them already.

    Raises:
        CheckpointError: it does not agree.
    """
    path = asked.place / "indices.json"
    saved = read_json(path) if path.is_file() else {}
    draws = []
    for shots in sorted(set(asked.shots)):
        for seed in range(asked.seeds):
            data = load_image_dataset(asked.dataset, examples_per_class=shots, few_shot_seed=seed, **asked.columns)
            draws.append(Draw(shots, seed, data.train.rows))
            rows = saved.setdefault(str(shots), {}).setdefault(str(seed), data.train.rows.tolist())
            if rows != data.train.rows.tolist():
                raise CheckpointError(
                    f"{path}: the rows for {shots} a class and seed {seed} are not those that are drawn now: the file or data "
                    "have changed. Choose another --folder."
                )
    write_json(path, saved)
    return draws


class Scores:
    """The scores of an experiment, a file each.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, draw: Draw) -> Path:
        """Where a score is kept; the name is the method's, with the rate if it has several."""
        return self.folder / f"{name}-{draw.shots}-{draw.seed}.json"

    def missing(self, name: str, draws: Sequence[Draw]) -> list[Draw]:
        """The draws that have no score yet."""
        return [draw for draw in draws if not self.path(name, draw).is_file()]

    def write(self, name: str, draw: Draw, accuracy: float) -> None:
        """Keeps a score."""
        print(f"{name:<16} {draw.shots:>3} a class, seed {draw.seed}: {accuracy:.4f}", flush=True)
        score = {"method": name, "examples_per_class": draw.shots, "few_shot_seed": draw.seed, "accuracy": accuracy}
        write_json(self.path(name, draw), score)

    def read(self, name: str, draws: Sequence[Draw]) -> dict[int, list[float]]:
        """The kept scores of a method: for each number of shots those of the seeds."""
        found: dict[int, list[float]] = {}
        for draw in draws:
            found.setdefault(draw.shots, []).append(float(read_json(self.path(name, draw))["accuracy"]))
        return found


def score_closed(
    name: str,
    draws: Sequence[Draw],
    data: ImageDataset,
    scores: Scores,
    represent: Callable[[Part], npt.NDArray[Any]],
    classify: Callable[[npt.NDArray[Any], Rows, npt.NDArray[Any]], Rows],
) -> None:
    """Scores a method that needs no training run: each test picture and each drawn one is decoded once."""
    index_of = {int(row): index for index, row in enumerate(data.train.rows)}
    indices = np.array(sorted({index_of[int(row)] for draw in draws for row in draw.rows}))
    part = data.train.subset(indices)
    train, test = represent(part), represent(data.test)
    for draw in draws:
        own = np.flatnonzero(np.isin(part.rows, draw.rows))
        predicted = classify(train[own], part.labels[own], test)
        scores.write(name, draw, float((predicted == data.test.labels).mean()))


def random_weights(folder: Path, seed: int) -> Path:
    """The bundled architecture with random weights, in timm's hub layout."""
    target = folder / f"random-{seed}"
    if not (target / "config.json").is_file():
        weights = find_weights(BUNDLED)
        torch.manual_seed(seed)
        args = {name: value for name, value in weights.model_args.items() if name not in ("in_chans", "global_pool")}
        model = timm.create_model(weights.architecture, pretrained=False, num_classes=2, **args)
        size = weights.input_size
        view = View(resize_size=size, crop_size=size, flip=False, interpolation=weights.interpolation)
        save_model(model, target, label_names=["a", "b"], view=view, std_eps=1e-8)
    return target


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Appends what is printed to a file instead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield


def fine_tune(asked: Protocol, name: str, draw: Draw, scores: Scores, *, model: str, base_lr: float | None) -> None:
    """Scores a fine-tuning run, going on with an interrupted one.

    Raises:
        CheckpointError: the run used other rows than were drawn.
    """
    run = asked.place / "runs" / f"{name}-{draw.shots}-{draw.seed}"
    if not (run / "report.json").is_file():
        with logged(asked.place / "logs" / f"{run.name}.txt"):
            transfer(
                dataset=asked.dataset,
                model=model,
                examples_per_class=draw.shots,
                few_shot_seed=draw.seed,
                base_lr=base_lr,
                threads=asked.threads,
                output_dir=run,
                resume=True,
                **asked.columns,
                **asked.schedule,
            )
    if read_json(run / "plan.json")["rows"] != draw.rows.tolist():
        raise CheckpointError(f"{run} was trained on other rows than indices.json names. Remove that folder.")
    scores.write(name, draw, float(read_json(run / "report.json")["accuracy"]))
    if not asked.keep_models:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        shutil.rmtree(run / "model", ignore_errors=True)


def compute(asked: Protocol, draws: Sequence[Draw], data: ImageDataset, view: View, scores: Scores) -> None:
    """Computes what has no score yet, the quick methods first."""
    if "nearest" in asked.methods and (left := scores.missing("nearest", draws)):
        size = pixel_size(data.test)
        score_closed("nearest", left, data, scores, lambda part: pixels(part, size), nearest_labels)
    if "ridge" in asked.methods and (left := scores.missing("ridge", draws)):
        model = load_bit(asked.model, num_classes=data.num_classes).eval().to("cuda" if torch.cuda.is_available() else "cpu")
        with torch_threads(asked.threads):
            score_closed("ridge", left, data, scores, lambda part: features(part, model, view), ridge_labels)
    if "pretrained" in asked.methods:
        for draw in scores.missing("pretrained", draws):
            fine_tune(asked, "pretrained", draw, scores, model=asked.model, base_lr=asked.base_lr)
    if "scratch" in asked.methods:
        for rate in asked.scratch_rates:
            for draw in scores.missing(scratch_name(rate), draws):
                start = random_weights(asked.place / "runs", draw.seed)
                fine_tune(asked, scratch_name(rate), draw, scores, model=str(start), base_lr=rate)


def scratch_name(rate: float) -> str:
    """How scores of random weights at a rate are named."""
    return f"scratch-{rate:g}"


def summarize(asked: Protocol, draws: Sequence[Draw], scores: Scores) -> dict[str, dict[int, dict[str, Any]]]:
    """For each method and number of shots the scores by seed, their range and median, and the rate where several were tried."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for method in (method for method in METHODS if method in asked.methods):
        names = [scratch_name(rate) for rate in asked.scratch_rates] if method == "scratch" else [method]
        kept = [scores.read(name, draws) for name in names]
        for shots in kept[0]:
            best = max(range(len(names)), key=lambda i, shots=shots: statistics.median(kept[i][shots]))
            values = kept[best][shots]
            entry = {"min": min(values), "median": statistics.median(values), "max": max(values), "scores": values}
            rate = {"rate": asked.scratch_rates[best]} if method == "scratch" else {}
            found.setdefault(method, {})[shots] = entry | rate
    return found


def label(method: str, asked: Protocol) -> str:
    """How table and plot name a method."""
    rates = ", ".join(f"{rate:g}" for rate in asked.scratch_rates)
    scratch = f"from scratch, {'best of rates' if len(asked.scratch_rates) > 1 else 'rate'} {rates}"
    model = Path(asked.model).name
    names = {
        "nearest": "raw-pixel 1-nearest-neighbour",
        "ridge": f"ridge on frozen features ({model})",
        "scratch": scratch,
        "pretrained": f"fine-tuned ({model})",
    }
    return names[method]


def triple(values: Sequence[float]) -> str:
    """A cell: smallest, median and largest."""
    return "{:.3f} / **{:.3f}** / {:.3f}".format(*values)


def published(dataset: str) -> dict[str, dict[int, tuple[float, ...]]]:
    """The authors' figures for a data set as shares, none for most."""
    name = re.search(r"cifar-?(100?)$", dataset.rstrip("/").lower())
    figures = PUBLISHED[f"cifar{name[1]}"] if name else {}
    return {model: {shots: tuple(v / 100 for v in of) for shots, of in by.items()} for model, by in figures.items()}


def table(asked: Protocol, results: dict[str, dict[int, dict[str, Any]]], data: ImageDataset) -> str:
    """The results, and the authors' beside them where there are any, as Markdown."""
    counts = sorted(set(asked.shots))

    def lines(title: str, columns: Sequence[int], rows: dict[str, dict[int, Sequence[float]]]) -> list[str]:
        head = [f"| {title} | " + " | ".join(f"{count} a class" for count in columns) + " |", "|---" * (len(columns) + 1) + "|"]
        cells = {name: [triple(by[count]) if count in by else "" for count in columns] for name, by in rows.items()}
        return [*head, *(f"| {name} | {' | '.join(cells[name])} |" for name in cells)]

    own = {
        label(method, asked): {count: (entry["min"], entry["median"], entry["max"]) for count, entry in by.items()}
        for method, by in results.items()
    }
    text = [
        f"# {asked.dataset}, few examples for each class",
        "",
        f"Top-1 accuracy on {len(data.test):,} test pictures of {data.num_classes} classes: smallest / **median** / largest of "
        f"{asked.seeds} draws.",
        "",
        *lines("method", counts, own),
    ]
    if "scratch" in results and len(asked.scratch_rates) > 1:
        chosen = ", ".join(f"{entry['rate']:g} at {count}" for count, entry in results["scratch"].items())
        text += ["", f"Rate from scratch, chosen by test score in the baseline's favour: {chosen} a class."]
    if figures := published(asked.dataset):
        shown = sorted({count for by in figures.values() for count in by})
        text += ["", *lines("published", shown, figures), "", f"Source: {PUBLISHED_SOURCE}."]
    return "\n".join(text) + "\n"


def plot(path: Path, asked: Protocol, results: dict[str, dict[int, dict[str, Any]]], data: ImageDataset) -> None:
    """Accuracy against examples for each class: a line for the medians and a band from smallest to largest."""
    counts = sorted(set(asked.shots))
    figure = Figure(figsize=(7, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    order = sorted(results, key=lambda method: -results[method][counts[-1]]["median"])  # the legend follows the lines
    for method in order:
        colour, marker = LINES[method]
        low, middle, high = ([results[method][count][key] for count in counts] for key in ("min", "median", "max"))
        if len(counts) > 1:
            axes.fill_between(counts, low, high, color=colour, alpha=0.15, linewidth=0)
        else:
            shift = 1 + 0.02 * (order.index(method) - (len(order) - 1) / 2)
            spread = [[middle[0] - low[0]], [high[0] - middle[0]]]
            axes.errorbar([counts[0] * shift], middle, spread, color=colour, capsize=4, linewidth=1.5)
        places = counts if len(counts) > 1 else [counts[0] * shift]
        axes.plot(places, middle, marker=marker, color=colour, markersize=6, linewidth=2, label=label(method, asked))
    axes.axhline(1 / data.num_classes, color="black", linewidth=1, linestyle=":", label="chance")
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    if len(counts) == 1:
        axes.set_xlim(counts[0] / 1.3, counts[0] * 1.3)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("training examples for each class")
    axes.set_ylabel(f"top-1 accuracy, {len(data.test):,} test pictures")
    axes.set_title(f"{asked.short_name}: median and range of {asked.seeds} draws", loc="left")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9)
    figure.savefig(path)


def few_shot(asked: Protocol) -> dict[str, Any]:
    """Computes what is missing, writes table, plot and results, and gives what results.json holds.

    Raises:
        BitMixupError: the folder belongs to another experiment, or data or model can not be used.
    """
    data = load_image_dataset(asked.dataset, **asked.columns)
    config = TransferConfig(
        dataset=asked.dataset, model=asked.model, base_lr=asked.base_lr, output_dir=asked.place / "runs" / "planned",
        **asked.columns, **asked.schedule,
    )  # fmt: skip
    plan = make_plan(config)
    weights = fetch(plan.weights)
    assert weights.file is not None
    setup = {
        "dataset": asked.dataset,
        "rows": data.fingerprint,
        "pictures": pictures_hash(data),
        "model": asked.model,
        "weights": file_hash(weights.file),
        **asked.columns,
        **asked.schedule,
        "base_lr": asked.base_lr,
    }
    open_folder(asked.place, setup)
    draws, scores = draw_all(asked), Scores(asked.place / "scores")
    compute(asked, draws, data, plan.view, scores)
    summary = summarize(asked, draws, scores)
    results = {
        "setup": setup,
        "seeds": asked.seeds,
        "classes": data.num_classes,
        "test_examples": len(data.test),
        "methods": {method: {str(count): entry for count, entry in by.items()} for method, by in summary.items()},
    }
    write_json(asked.place / "results.json", results)
    write_text(asked.place / "table.md", table(asked, summary, data))
    plot(asked.place / "few_shot.png", asked, summary, data)
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what is missing and prints the table. Exits with 2 and an explanation where it can not be done."""
    default = asdict(Protocol())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--dataset", help="digits (bundled), a folder, a file or a hub id (default: digits)")
    parser.add_argument("--model", help="bundled, architecture.tag, a file or a folder (default: bundled)")
    parser.add_argument("--shots", type=int, nargs="+", help="examples for each class (default: 1 5 10)")
    parser.add_argument("--seeds", type=int, help="how many few-shot seeds, from 0 (default: 5)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="which rows to compute (default: all)")
    parser.add_argument("--folder", type=Path, help="where everything is kept (default: runs/few-shot/DATASET)")
    parser.add_argument("--preset", choices=["code", "paper", "light"], help="of fine-tuning (default: light)")
    parser.add_argument("--resolution", choices=["rule", "model"], help="of features and fine-tuning (default: model)")
    flip = "mirror half of the training pictures (default: yes, but for digits)"
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, help=flip)
    parser.add_argument("--steps", type=int, help="of fine-tuning (default: the rule's)")
    parser.add_argument("--batch-size", type=int, help="of fine-tuning (default: the preset's)")
    parser.add_argument("--base-lr", type=float, help="of fine-tuning the pretrained model (default: the preset's)")
    parser.add_argument("--scratch-rates", type=float, nargs="+", help="for random weights (default: 0.01 0.03 0.1)")
    parser.add_argument("--threads", type=int, help="torch's (default: 1)")
    for name in ("train-split", "test-split", "image-column", "label-column"):
        parser.add_argument(f"--{name}", help="as in bit-mixup fine-tune")
    parser.add_argument("--keep-models", action="store_true", help="keep checkpoints and models of finished runs")
    given = vars(parser.parse_args(argv))
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    start = time.monotonic()
    try:
        asked = Protocol(**{**default, **options})
        results = few_shot(asked)
    except BitMixupError as error:
        print(f"few_shot: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"\n{(asked.place / 'table.md').read_text(encoding='utf-8')}")
    print(f"{asked.place}/: table.md, results.json, few_shot.png ({time.monotonic() - start:.0f} s)")
    return results


if __name__ == "__main__":
    main()
