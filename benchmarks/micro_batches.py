"""Where does the time go that several micro-batches take more than one?

    OMP_NUM_THREADS=1 python benchmarks/micro_batches.py

Our step in bf16 (`benchmarks/training.py`: R50x1, 128 pixels, batch of 32) as one backward pass and as four, under torch's
profiler: milliseconds that each operation itself takes, and how often it is called; medians over steps that take turns.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import machine
from torch.profiler import ProfilerActivity, profile
from training import ways_named

WAYS = {"one": "ours, bf16", "four": "ours, bf16, 4 micro-batches"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/micro_batches.json"))
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    steps = {way: dict(ways_named(name, asked.batch_size))[name] for way, name in WAYS.items()}
    times: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in WAYS}
    calls: dict[str, dict[str, int]] = {way: {} for way in WAYS}
    for turn in range(asked.rounds + 1):
        for way, step in steps.items():
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                step()
            if turn:
                for event in seen.key_averages():
                    times[way][event.key].append(event.self_cpu_time_total / 1000)
                    calls[way][event.key] = event.count
    middle = {way: {name: statistics.median(values) for name, values in found.items()} for way, found in times.items()}
    names = sorted(middle["four"], key=lambda name: middle["one"].get(name, 0.0) - middle["four"][name])
    rows = [
        {
            "operation": name, "one": middle["one"].get(name, 0.0), "four": middle["four"][name],
            "calls_one": calls["one"].get(name, 0), "calls_four": calls["four"][name],
        }
        for name in names[:12]
    ]  # fmt: skip
    whole = {way: sum(found.values()) for way, found in middle.items()}
    for row in rows:
        print(row)
    print(whole)
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps({"machine": machine(), "rows": rows, "whole": whole}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
