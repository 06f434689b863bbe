"""How far do a few examples for each class go? The table in the README.

    make few-shot

Handwritten digits, 5 and 10 training examples for each class, 5 few-shot seeds, scored on the 797 test digits:
  raw-pixel 1-NN   the label of the nearest training picture (squared difference of its 64 pixels)
  from scratch     the bundled architecture with random weights, the best of three rates *by test score*: a favour to the baseline
  pretrained       the bundled weights at the rule's rate, nothing tuned
Both networks take the same 200 steps of 64 pictures at 40 px without mirroring. About 40 runs of half a minute on one core; every
run has a folder under --folder, and a second start goes on where the first stopped. --seeds and --examples-per-class shorten it.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch

from bit_mixup import load_image_dataset, save_model, transfer
from bit_mixup.data import EvaluationView
from bit_mixup.images import View
from bit_mixup.weights import BUNDLED, find_weights

SCRATCH_RATES = (0.01, 0.03, 0.1)
OPTIONS = {
    "dataset": "digits",
    "steps": 200,
    "batch_size": 64,
    "resolution": "model",
    "flip": False,
    "threads": 1,
    "resume": True,
}


def nearest_neighbour(examples_per_class: int, seed: int) -> float:
    """Accuracy of the nearest training picture's label, on raw pixels."""
    data = load_image_dataset("digits", examples_per_class=examples_per_class, few_shot_seed=seed)
    view = View(resize_size=8, crop_size=8, flip=False, interpolation="bilinear")
    pixels, labels = [], []
    for part in (data.train, data.test):
        batch = EvaluationView(part=part, view=view).__getitems__(range(len(part)))
        assert not isinstance(batch, Exception)
        pixels.append(batch[0].reshape(len(part), -1).astype(np.float64))
        labels.append(batch[1])
    distances = ((pixels[1][:, None] - pixels[0][None]) ** 2).sum(-1)
    return float((labels[0][distances.argmin(1)] == labels[1]).mean())


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


def accuracy(folder: Path, model: str, examples_per_class: int, seed: int, **options: float) -> float:
    """Test accuracy of one run; a finished run is read, not repeated."""
    report = folder / "report.json"
    if not report.is_file():
        transfer(model=model, examples_per_class=examples_per_class, few_shot_seed=seed, output_dir=folder, **OPTIONS, **options)
    return float(json.loads(report.read_text())["accuracy"])


def row(name: str, by_shots: dict[int, list[float]]) -> str:
    """One line of the table: median, and range over the seeds."""
    cells = [f"{statistics.median(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in by_shots.values()]
    return f"| {name} | " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/few-shot"), help="where the runs are kept")
    parser.add_argument("--seeds", type=int, default=5, help="few-shot seeds, from 0")
    parser.add_argument("--examples-per-class", type=int, nargs="+", default=[5, 10], help="examples for each class")
    parser.add_argument("--methods", nargs="+", default=["nearest", "scratch", "pretrained"], help="which rows to compute")
    asked = parser.parse_args(argv)
    folder, seeds, counts = asked.folder, range(asked.seeds), asked.examples_per_class
    lines = [f"| median (range) of {asked.seeds} seeds | " + " | ".join(f"{count} a class" for count in counts) + " |"]
    lines.append("|---" * (len(counts) + 1) + "|")
    if "nearest" in asked.methods:
        lines.append(row("raw-pixel 1-NN", {count: [nearest_neighbour(count, seed) for seed in seeds] for count in counts}))
    if "scratch" in asked.methods:
        best: dict[int, list[float]] = {}
        chosen = []
        for count in counts:
            by_rate = {
                rate: [
                    accuracy(
                        folder / f"scratch-{count}-{rate}-{seed}", str(random_weights(folder, seed)), count, seed, base_lr=rate
                    )
                    for seed in seeds
                ]
                for rate in SCRATCH_RATES
            }
            rate = max(by_rate, key=lambda r, scores=by_rate: statistics.median(scores[r]))
            best[count] = by_rate[rate]
            chosen.append(f"{rate:g}")
        lines.append(row(f"from scratch (rates {', '.join(chosen)})", best))
    if "pretrained" in asked.methods:
        scores = {
            count: [accuracy(folder / f"pretrained-{count}-{seed}", BUNDLED, count, seed) for seed in seeds] for count in counts
        }
        lines.append(row("pretrained (bundled)", scores))
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
