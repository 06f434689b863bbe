"""Which of several ways of doing the same thing takes less time?

On a machine that others use as well, times of different minutes can not be compared. So all ways run in one process, one after
the other in each round, in an order that moves on by one; what is reported is the median over rounds of the ratio to the first
way in the same round, with the quartiles of it, in wall time and in the process's own CPU time. The first way runs twice in
each round, under two names: the ratio of the second to the first is what this procedure makes of no difference at all.
"""

import gc
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CONTROL = "the first again"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a way has done in a round: all ways must have done the same.

    Args:
        steps: optimizer steps, or batches.
        images: seen.
        value: a loss or a sum of outputs, by which it is seen that the same was computed.
    """

    steps: int
    images: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way and its times.

    Args:
        name: of the way.
        wall: seconds of each round.
        cpu: seconds of CPU time of this process in each round.
        wall_ratio: quartiles (lower, median, upper) of the ratio of wall times to the first way in the same round.
        cpu_ratio: the same of CPU times.
        images: seen in each round.
        value: of the last round's `Work`.
        note: anything a reader must know.
    """

    name: str
    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    wall_ratio: tuple[float, float, float]
    cpu_ratio: tuple[float, float, float]
    images: int
    value: float
    note: str = ""

    def middle_cpu_ratio(self, other: "Row") -> float:
        """Median over rounds of the ratio of CPU times to another way's in the same round."""
        return statistics.median(own / base for own, base in zip(self.cpu, other.cpu, strict=True))


def check(rows: Sequence[Row], bars: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Compares ratios of CPU times with bars, prints each, and gives them.

    Args:
        rows: of one `interleave`.
        bars: for the name of a way, by the names of others the largest ratio that is aimed at.
    """
    by_name = {row.name: row for row in rows}
    found = []
    for name, others in bars.items():
        for other, bar in others.items():
            ratio = by_name[name].middle_cpu_ratio(by_name[other])
            found.append({"way": name, "beside": other, "ratio": ratio, "bar": bar, "met": ratio <= bar})
            print(f"{name} / {other}: {ratio:.3f} (at most {bar:.3f}): {'met' if ratio <= bar else 'NOT met'}")
    return found


def interleave(
    ways: Mapping[str, Callable[[], Work]],
    *,
    rounds: int,
    tolerance: float | Mapping[str, float] = 1e-3,
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """Times ways of doing the same thing.

    Args:
        ways: by name; the first is what the others are compared with.
        rounds: after one that is not counted.
        tolerance: how far the `value` of a way may be from that of the first, as a share of it, for all or by name; else it is an
            error, as is another number of steps or images.
        notes: of ways, for the table.
    """
    first = next(iter(ways))
    order = [first, CONTROL, *[name for name in ways if name != first]]
    calls = {**ways, CONTROL: ways[first]}
    wall: dict[str, list[float]] = {name: [] for name in order}
    cpu: dict[str, list[float]] = {name: [] for name in order}
    done: dict[str, Work] = {}
    for turn in range(rounds + 1):
        shift = turn % len(order)
        for name in order[shift:] + order[:shift]:
            gc.collect()
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            done[name] = calls[name]()
            spent = time.perf_counter() - wall_start, time.process_time() - cpu_start
            if turn:
                wall[name].append(spent[0])
                cpu[name].append(spent[1])
        for name, work in done.items():
            allowed = tolerance if isinstance(tolerance, float) else tolerance.get(name, 1e-3)
            wanted = done[first]
            assert (work.steps, work.images) == (wanted.steps, wanted.images), f"{name} did {work}, {first} {wanted}"
            assert abs(work.value - wanted.value) <= allowed * abs(wanted.value), (
                f"{name} got {work.value}, {first} {wanted.value}"
            )
    return [
        Row(
            name=name,
            wall=tuple(wall[name]),
            cpu=tuple(cpu[name]),
            wall_ratio=quartiles([own / base for own, base in zip(wall[name], wall[first], strict=True)]),
            cpu_ratio=quartiles([own / base for own, base in zip(cpu[name], cpu[first], strict=True)]),
            images=done[name].images,
            value=done[name].value,
            note=(notes or {}).get(name, ""),
        )
        for name in order
    ]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def table(rows: Sequence[Row], *, what: str = "ms an image", scale: float = 1000.0) -> str:
    """Rows as a Markdown table: CPU and wall time as medians over rounds, and ratios with their quartiles."""
    lines = [
        f"| | {what}, CPU | {what}, wall | CPU, ratio to the first | wall, ratio to the first |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cpu, wall = (scale * statistics.median(times) / row.images for times in (row.cpu, row.wall))
        ratios = [f"**{middle:.2f}** ({low:.2f} to {high:.2f})" for low, middle, high in (row.cpu_ratio, row.wall_ratio)]
        note = f" ({row.note})" if row.note else ""
        lines.append(f"| {row.name}{note} | {cpu:.3g} | {wall:.3g} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Where this runs: processor, cores, threads of torch, versions."""
    import torch

    from bit_mixup.environment import available_cores, versions

    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def peak_memory() -> int:
    """Most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def save(path: Path, parts: Mapping[str, Sequence[Row]], **more: Any) -> None:
    """Writes all times as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"machine": machine(), "parts": {name: [asdict(row) for row in rows] for name, rows in parts.items()}, **more}
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
