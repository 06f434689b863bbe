"""How does training scale: what is sent between processes, what one and two of them do here, and how many cores feed a GPU?

    python benchmarks/scaling.py

What is sent follows from the sizes of the networks: all gradients, once a step, in fp32. One and two processes of one thread each
train the bundled model on the bundled digits, in turn, on a machine of two cores; images a second are those of the run's own
metrics, without the first steps. Cores for a GPU are images a second that it takes, divided by what one core prepares
(`benchmarks/input.py`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import machine

from bit_mixup.catalog import ARCHITECTURES

CLASSES = 1000
JOB = ["--dataset", "digits", "--model", "bundled", "--preset", "light", "--resolution", "model", "--no-flip", "--threads", "1"]


def sent() -> list[dict[str, Any]]:
    """For each BiT: parameters, and megabytes of gradients that each process sends and receives in a step of two or many."""
    rows = []
    for name, shape in ARCHITECTURES.items():
        size = 4 * shape.parameter_count(CLASSES)
        rows.append({"network": name, "parameters": size // 4, "gradients_mb": size / 1e6, "ring_mb": 2 * size / 1e6})
    return rows


def images_a_second(processes: int, steps: int, folder: Path, precision: str) -> float:
    """Of a run, the median over its steps after the first twenty."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        "recipes/fine_tune.py",
    ]
    options = [*JOB, "--steps", str(steps), "--precision", precision, "--output-dir", str(folder), "--log-every", "10"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launch, *options], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-800:]
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["environment"]["processes"] == processes
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == steps
    return statistics.median(row["images_per_second"] for row in rows[20:])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/scaling.json"))
    asked = parser.parse_args(argv)
    measured: dict[str, list[dict[str, float]]] = {"fp32": [], "bf16": []}
    with tempfile.TemporaryDirectory() as place:
        for turn in range(asked.rounds):
            for precision, rounds in measured.items():
                order = (1, 2) if turn % 2 == 0 else (2, 1)
                found = {
                    str(processes): images_a_second(
                        processes, asked.steps, Path(place) / f"{precision}{turn}{processes}", precision
                    )
                    for processes in order
                }
                rounds.append(found)
                print(precision, found, f"ratio {found['2'] / found['1']:.2f}", flush=True)
    values = {"machine": machine(), "sent": sent(), "images_a_second": measured, "steps": asked.steps}
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
