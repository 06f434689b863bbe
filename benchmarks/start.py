"""How long does it take until something is there: an import, a help text, a plan?

    python benchmarks/start.py

Processes of their own, one after the other in each round, in an order that moves on; wall and CPU time of the whole process.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness import Row, quartiles, save, table

COMMANDS = {
    "python alone": ["-c", "pass"],
    "import bit_mixup": ["-c", "import bit_mixup"],
    "bit-mixup --help": ["-m", "bit_mixup", "--help"],
    "bit-mixup plan, on digits": [
        "-m",
        "bit_mixup",
        "plan",
        "--dataset",
        "digits",
        "--model",
        "bundled",
        "--resolution",
        "model",
    ],
    "import torch": ["-c", "import torch"],
    "import timm": ["-c", "import timm"],
    "from transformers import Trainer": ["-c", "from transformers import Trainer"],
}


def run(arguments: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a Python process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-500:]
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/start.json"))
    asked = parser.parse_args(argv)
    names = list(COMMANDS)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(asked.rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = run(COMMANDS[name])
            if turn:  # the first fills the file cache
                spent[name].append(seconds)
    first = spent[names[0]]
    rows = []
    for name in names:
        wall, cpu = (tuple(pair[index] for pair in spent[name]) for index in (0, 1))
        ratios = [quartiles([own[i] / base[i] for own, base in zip(spent[name], first, strict=True)]) for i in (0, 1)]
        rows.append(Row(name=name, wall=wall, cpu=cpu, wall_ratio=ratios[0], cpu_ratio=ratios[1], images=1, value=0.0))
    print(table(rows, what="seconds", scale=1.0))
    print({name: round(statistics.median(wall for wall, _ in spent[name]), 2) for name in names})
    save(asked.json, {"start": rows})


if __name__ == "__main__":
    main()
