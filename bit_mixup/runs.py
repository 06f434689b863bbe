"""What is in a run's folder, and may this run use it?

config.json   what was asked          plan.json      what that resolved to
metrics.jsonl a line for each step    checkpoints/   whole or absent
scores.jsonl  test scores on the way  (where asked for)
quarantine.json unreadable pictures   (where leaving them out was asked for, and there are any)
model/        timm's hub layout       report.html, report.json, report.md, reliability.png (with diagnostics)
predictions.csv  what was said about each test example     evaluations/  reports of `bit-mixup evaluate`
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bit_mixup.errors import CheckpointError
from bit_mixup.storage import TEMPORARY_PREFIX, read_json, remove_folder, remove_leftovers, write_json, write_text, writing

TRACKER_PROJECT = "bit_mixup"  # also the folder that a tracker such as tensorboard writes into

# What may differ between the start of a run and its resumption: it has no say in what is computed (beyond rounding).
FREE_ON_RESUME = frozenset(
    {"output_dir", "num_workers", "threads", "micro_batch", "log_every", "save_every", "keep_checkpoints", "tracker"}
)


@dataclass(frozen=True)
class RunFolder:
    """The places of a run's files.

    Args:
        path: of the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def scores(self) -> Path:
        return self.path / "scores.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after `step` steps stands."""
        return self.checkpoints / f"step_{step:06d}"

    def list_checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first. What has been renamed to its place is whole."""
        found = [path for path in self.checkpoints.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
        return sorted(found, key=lambda path: (len(path.name), path.name))

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def table(self) -> Path:
        return self.path / "report.md"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.csv"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    @property
    def diagram(self) -> Path:
        return self.path / "reliability.png"

    @property
    def nonfinite(self) -> Path:
        return self.path / "nonfinite.json"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine.json"

    def written(self) -> list[tuple[Path, str]]:
        """The files of a finished run, and what is in them."""
        files = [
            (self.model, "the model, in timm's hub layout"),
            (self.page, "the report, to open in a browser"),
            (self.report, "all scores"),
            (self.table, "the same as a table"),
            (self.predictions, "what it says of each test example"),
            (self.diagram, "accuracy against confidence"),
            (self.metrics, "loss and rate of each step"),
            (self.scores, "test scores on the way"),
            (self.plan, "what was decided"),
            (self.quarantine, "unreadable pictures that were left out"),
            (self.config, "what was asked"),
        ]
        return [(path, what) for path, what in files if path.exists()]

    def recorded_micro_batch(self, num_processes: int) -> int | None:
        """Examples of the largest backward pass of the run's first start, if a checkpoint waits that as many processes wrote."""
        if not (self.plan.is_file() and self.list_checkpoints()):
            return None
        sizes = read_json(self.plan)["environment"]["micro_batches"]
        return max(map(max, sizes)) if len(sizes) == num_processes else None

    def check(self, asked: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Sees whether a run may write here; changes nothing.

        Raises:
            CheckpointError: there is a run already and neither flag is given, both are, or that run asked for something else.
        """
        if resume and overwrite:
            raise CheckpointError("resume and overwrite contradict each other: go on with the run, or start it anew?")
        try:
            occupied = self.path.exists() and not self.path.is_dir()
        except OSError as error:
            raise CheckpointError(f"{self.path} can not be a folder: {error.strerror}. Choose another output_dir.") from error
        if occupied:
            raise CheckpointError(f"{self.path} is a file; output_dir must be a folder.")
        if not self.path.is_dir() or all(entry.name.startswith(TEMPORARY_PREFIX) for entry in self.path.iterdir()):
            return
        before = read_json(self.config) if self.config.is_file() else None
        if not isinstance(before, dict) or "dataset" not in before:
            raise CheckpointError(
                f"{self.path} is not empty and holds no run (no config.json of one). Choose another output_dir."
            )
        if resume:
            self.compare("config.json", before, asked)
        elif not overwrite:
            raise CheckpointError(
                f"{self.path} holds a run already. Go on with --resume, start anew with --overwrite, or choose another "
                "--output-dir."
            )

    def check_space(self, parameters: int, *, keep_checkpoints: int, in_checkpoint: int | None = None) -> None:
        """Sees whether the disk has room for what the run will write: checkpoints (one more than stay) and the model.

        Args:
            parameters: of the model, 4 bytes each.
            keep_checkpoints: how many stay.
            in_checkpoint: parameters that a checkpoint holds with their momentum. None: all.

        Raises:
            CheckpointError: it has not.
        """
        there = max(0, keep_checkpoints + 1 - len(self.list_checkpoints()))
        needed = 4 * (parameters + 2 * there * (parameters if in_checkpoint is None else in_checkpoint))
        disk = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.is_dir())
        total, _, free = shutil.disk_usage(disk)
        if needed > free and total > 0:  # some kinds of file system do not tell their size
            raise CheckpointError(
                f"{self.path} is on a disk with {free / 1e9:.3g} GB of room, but checkpoints and the model take "
                f"{needed / 1e9:.3g} GB. Make room, lower --keep-checkpoints, or choose another --output-dir."
            )

    def compare(self, name: str, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Raises CheckpointError with all differences that would change what is computed."""
        before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
        keys = [key for key in {**before, **now} if key not in FREE_ON_RESUME and before.get(key) != now.get(key)]
        if keys:
            differences = "\n".join(f"  {key}: {before.get(key)} -> {now.get(key)}" for key in keys)
            raise CheckpointError(
                f"the run in {self.path} was started with another configuration ({name}):\n{differences}\n"
                "Resume with the values of then, or choose another --output-dir."
            )

    def open(self, asked: dict[str, Any], resolved: dict[str, Any], *, overwrite: bool) -> None:
        """Makes the folder ready and writes what was asked and what that resolved to. `check` comes first.

        Raises:
            CheckpointError: a checkpoint waits, but data, weights or rule resolve to something else than when the run was
                started; nothing has been changed. (Where they agree, the record of the first start stays.)
        """
        if overwrite and self.path.is_dir():
            self._delete()
        goes_on = self.plan.is_file() and bool(self.list_checkpoints())
        if goes_on:
            self.compare("plan.json", read_json(self.plan)["resolved"], resolved["resolved"])
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        remove_leftovers(self.checkpoints)
        if goes_on:
            return
        write_json(self.config, asked)
        write_json(self.plan, resolved)

    def _delete(self) -> None:
        """Removes what a run writes, and nothing else; `config.json` last, so that what is left still looks like a run."""
        for folder in (self.checkpoints, self.model, self.evaluations, self.path / TRACKER_PROJECT):
            remove_folder(folder)
        scored = (self.scores, self.page, self.report, self.table, self.predictions, self.diagram)
        for file in (self.metrics, *scored, self.nonfinite, self.quarantine, self.plan, self.config):
            file.unlink(missing_ok=True)

    def trim_metrics(self, step: int) -> None:
        """Forgets the lines of steps from `step` on: they are about to be repeated."""
        _trim(self.metrics, step)

    def trim_scores(self, step: int) -> None:
        """Forgets the scores after `step` steps and later."""
        _trim(self.scores, step)

    def add_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Appends a JSON line for each step."""
        _append(self.metrics, rows)

    def add_scores(self, row: dict[str, Any]) -> None:
        """Appends a JSON line of test scores after a number of steps."""
        _append(self.scores, [row])

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def read_scores(self) -> list[dict[str, Any]]:
        """The lines of `scores.jsonl`, if scores on the way were asked for."""
        return (
            [json.loads(line) for line in self.scores.read_text(encoding="utf-8").splitlines()] if self.scores.is_file() else []
        )


def _trim(path: Path, step: int) -> None:
    """Keeps the JSON lines of steps before `step`, as far as they are whole."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
        except ValueError:
            break  # the line that an interruption cut short
    write_text(path, "".join(kept))


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def default_folder(dataset: str, model: str, seed: int) -> Path:
    """runs/<dataset>-<model>-<seed>"""
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", dataset.rstrip("/").split("/")[-1])
    return Path("runs") / f"{short}-{model}-{seed}"
