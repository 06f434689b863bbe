"""Does bf16 cost accuracy? Few-shot fine-tuning in both precisions, on sets that the bundled model has never seen.

    python recipes/open_sets.py
    OMP_NUM_THREADS=1 python benchmarks/precision.py

Pairs of runs that differ in precision alone: the bundled model, preset light, --steps steps, so many examples of each class, the
same draw and seed; each is scored in its own precision. What the precision does is to be compared with what the seed does.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import machine

import bit_mixup

LAST = 50  # steps whose mean loss counts


def one(dataset: str, precision: str, *, seed: int, shots: int, steps: int, folder: Path) -> dict[str, float]:
    """Accuracy on the test split and the last steps' loss of a run."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = bit_mixup.transfer(
            dataset=dataset, model="bundled", preset="light", resolution="model", steps=steps, examples_per_class=shots,
            few_shot_seed=seed, seed=seed, precision=precision, threads=1, output_dir=folder,
        )  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"accuracy": result.report.accuracy, "loss": statistics.fmean(losses[-LAST:])}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=["runs/open_sets/furniture", "runs/open_sets/stamps"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/precision.json"))
    asked = parser.parse_args(argv)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as place:
        for dataset in asked.datasets:
            name = Path(dataset).name
            found[name] = {"fp32": [], "bf16": []}
            for seed in range(asked.seeds):
                for precision, runs in found[name].items():
                    folder = Path(place) / f"{name}-{precision}-{seed}"
                    runs.append(one(dataset, precision, seed=seed, shots=asked.shots, steps=asked.steps, folder=folder))
                print(name, seed, {precision: runs[-1] for precision, runs in found[name].items()}, flush=True)
    values: dict[str, Any] = {"machine": machine(), "sets": found, "shots": asked.shots, "steps": asked.steps, "last": LAST}
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
