"""Writes docs/performance.md from what the benchmarks have measured.

    python benchmarks/write.py

Words are in `performance.md.j2` beside this file, figures in runs/benchmarks/*.json, which `make bench` fills.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from harness import Row, table

HERE = Path(__file__).parent


def rows(measured: dict[str, Any]) -> list[Row]:
    """As they were saved."""
    return [Row(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}) for row in measured]


def checks(found: list[dict[str, Any]]) -> str:
    """Ratios beside what was aimed at, as a Markdown table."""
    lines = ["| | beside | ratio of CPU times | aimed at | |", "|---|---|---:|---:|---|"]
    for row in found:
        verdict = "met" if row["met"] else "**not met**"
        lines.append(f"| {row['way']} | {row['beside']} | {row['ratio']:.3f} | at most {row['bar']:.3f} | {verdict} |")
    return "\n".join(lines)


def spread(runs: list[dict[str, float]], score: str) -> str:
    """Smallest, median and largest of a score."""
    values = [run[score] for run in runs]
    return " / ".join(f"{value:.3f}" for value in (min(values), statistics.median(values), max(values)))


def differences(runs: dict[str, list[dict[str, float]]], score: str) -> str:
    """The same of the differences between bf16 and fp32, pair by pair."""
    pairs = zip(runs["bf16"], runs["fp32"], strict=True)
    values = [half[score] - full[score] for half, full in pairs]
    return " / ".join(f"{value:+.3f}" for value in (min(values), statistics.median(values), max(values)))


def middle(rounds: list[dict[str, float]], name: str) -> float:
    """Median over rounds of what each has under a name."""
    return statistics.median(found[name] for found in rounds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    asked = parser.parse_args(argv)
    measured = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(asked.folder.glob("*.json"))}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip

    def shown(name: str, part: str, what: str = "ms an image", scale: float = 1000.0) -> str:
        return table(rows(measured[name]["parts"][part]), what=what, scale=scale)

    words = {
        "table": shown,
        "checks": checks,
        "middle": middle,
        "median": statistics.median,
        "spread": spread,
        "differences": differences,
    }
    text = environment.get_template("performance.md.j2").render(measured=measured, **words)
    asked.out.write_text(text, encoding="utf-8")
    print(f"{asked.out} written")


if __name__ == "__main__":
    main()
