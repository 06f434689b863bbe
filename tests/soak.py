"""Does a run that is killed again and again end in the same bits, and does a kill leave anything half-written?

    make soak
    python tests/soak.py --kills 50 --seed 0
    python tests/soak.py --kills 6 --processes 2

A small run (60 steps of a tiny BiT on the bundled digits, with mixup) is trained once undisturbed, with a checkpoint at each
step. Then the same run is started with --resume, killed at a random moment and started again until it ends, and another one is
begun, until there were so many kills. Six of ten kills are SIGKILL, the others SIGTERM, SIGUSR1, or two of SIGINT:
at once, as an echo; or the second after more than a second in which the process is held, so that it ends in the midst of a step
or a checkpoint. A third of the moments is uniform over the life of the process; for the others the run's folder is watched,
and the kill falls just after a temporary file appeared there or a line of metrics was written.

After every kill each file at its final name must be whole: JSON parses, tensors load, a checkpoint or model has all its files,
and of metrics only the last line may be cut short. Each checkpoint must equal, bit for bit, that of the undisturbed run after as
many steps; so must the model, scores and losses of each run that ends.

Children are forked from this process, which has imported everything, but for the first --fresh kills, which end new interpreters.
With --processes N torchrun starts N workers, and one of them is killed. It stops at the first fault and exits with 1; what was
written stays then (or with --keep) in a folder of its own below --folder.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # before the libraries read them

import psutil
import safetensors.numpy
import timm
import torch
from safetensors import SafetensorError

from bit_mixup import workflow
from bit_mixup.cli import main as command
from bit_mixup.images import View
from bit_mixup.interruption import ECHO_SECONDS
from bit_mixup.models import save_model
from bit_mixup.runs import RunFolder
from bit_mixup.storage import TEMPORARY_PREFIX

STEPS = 60
PATIENCE = 120.0  # seconds after which a process that neither ends nor dies is a failure
MOMENTS = ("uniform", "writing", "appending")
SIGNALS = [("SIGKILL", 6), ("SIGTERM", 1), ("SIGUSR1", 1), ("SIGINT echoed", 1), ("SIGINT twice", 1)]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked for.

    Args:
        kills: how many.
        seed: of moments and signals.
        processes: of each run; more than one are started by torchrun.
        fresh: how many of the kills, the first ones, end a new interpreter.
        folder: below which a folder is made.
        keep: leave that folder.
    """

    kills: int
    seed: int
    processes: int
    fresh: int
    folder: Path
    keep: bool


@dataclass
class Tally:
    """What has been seen so far."""

    signals: Counter[str] = field(default_factory=Counter)
    during_a_write: int = 0
    resumes: int = 0
    compared: int = 0
    mismatches: list[str] = field(default_factory=list)
    half_written: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.signals.total()

    @property
    def faults(self) -> list[str]:
        return [*self.mismatches, *self.half_written, *self.failures]

    def summary(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self.signals.items()))
        return "\n".join(
            [
                f"kills                     {self.kills} ({kinds}), {self.during_a_write} of them during a write",
                f"resumes                   {self.resumes}",
                f"finished runs compared    {self.compared}",
                f"mismatches                {len(self.mismatches)}",
                f"files left half-written   {len(self.half_written)}",
                f"failed starts             {len(self.failures)}",
            ]
        )


# --- what is run ------------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> None:
    """A BiT of few parameters with random weights, in timm's hub layout."""
    torch.manual_seed(0)
    args = {"channels": (32, 32, 64, 64), "stem_chs": 16, "norm_layer": "groupnorm1"}
    model = timm.create_model("resnetv2_50x1_bit", pretrained=False, num_classes=4, **args)
    view = View(resize_size=48, crop_size=40, flip=True, interpolation="bilinear")
    save_model(model, folder, label_names=["a", "b", "c", "d"], view=view, std_eps=1e-8)


def options(home: Path, name: str, *, save_every: int, keep_checkpoints: int = 2) -> list[str]:
    """The run's options; those that are given here have no say in what is computed."""
    words = f"--dataset digits --model {home / 'tiny'} --steps {STEPS} --batch-size 32 --resize-size 48 --crop-size 40 --no-flip"
    words += " --examples-per-class 20 --mixup-alpha 0.4 --threads 1 --log-every 2 --resume"
    words += f" --save-every {save_every} --keep-checkpoints {keep_checkpoints} --output-dir {home / name}"
    return words.split()


class Process:
    """A started run: forked from this process, or a new interpreter, or torchrun's."""

    def __init__(self, arguments: list[str], log: Path, *, fresh: bool, processes: int) -> None:
        self.processes = processes
        if fresh or processes > 1:
            launch = [sys.executable, "-m", "bit_mixup", "fine-tune"]
            if processes > 1:
                launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
                launch.append(str(ROOT / "recipes" / "fine_tune.py"))
            paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            with log.open("ab") as output:
                started = subprocess.Popen(
                    [*launch, *arguments], env=os.environ | {"PYTHONPATH": paths}, stdout=output, stderr=output
                )
            self.pid, self.poll = started.pid, started.poll
        else:
            self.pid, self.status = fork(lambda: command(["fine-tune", *arguments]), log), None
            self.poll = self._poll_fork

    def _poll_fork(self) -> int | None:
        if self.status is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if found else None
        return self.status

    def kill(self, kind: str, rng: random.Random) -> None:
        """Sends the signal to the run, or to one of its workers."""
        workers = [self.pid] if self.processes == 1 else self._workers()
        if not workers:
            return
        target = rng.choice(workers)
        with suppress(ProcessLookupError):
            os.kill(target, signal.Signals[kind.split()[0]])
            if kind in ("SIGINT echoed", "SIGINT twice"):
                time.sleep(rng.uniform(0.001, 0.1))
                if self.poll() is None:
                    self._again(target, held=kind == "SIGINT twice")

    def _again(self, target: int, *, held: bool) -> None:
        """A second SIGINT. A step takes a twentieth of a second: one that is held meets the signal where the first found it."""
        if held:
            os.kill(target, signal.SIGSTOP)
            time.sleep(1.1 * ECHO_SECONDS)
        os.kill(target, signal.SIGINT)
        if held:
            os.kill(target, signal.SIGCONT)

    def _workers(self) -> list[int]:
        """What torchrun has started; if it has not yet, as soon as it has."""
        while self.poll() is None:
            with suppress(psutil.Error):
                children = psutil.Process(self.pid).children()
                if workers := [child.pid for child in children if "fine_tune.py" in str(child.cmdline())]:
                    return workers
            time.sleep(0.01)
        return []

    def wait(self) -> int | None:
        """The exit status; None, and a certain end, for a process that goes on for too long."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if (status := self.poll()) is not None:
                return status
            time.sleep(0.002)
        for process in [*psutil.Process(self.pid).children(recursive=True), psutil.Process(self.pid)]:
            process.kill()
        return None


def fork(action: Callable[[], object], log: Path) -> int:
    """Runs something in a forked process that writes into a log; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            action()
            status = 0
        except SystemExit as left:
            status = int(left.code or 0)
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
        finally:
            sys.stdout.flush()
            os._exit(status)
    finally:
        os._exit(status)  # a second SIGINT may have come in between: nothing of a child may go on with the parent's work


# --- when it is killed ------------------------------------------------------------------------------------------------


def temporaries(run: RunFolder) -> list[str]:
    """Names of what is being written, or was left by a kill."""
    found = []
    for folder in (run.path, run.checkpoints):
        with suppress(FileNotFoundError):
            found += [entry.name for entry in os.scandir(folder) if entry.name.startswith(TEMPORARY_PREFIX)]
    return found


def wait_for_moment(process: Process, run: RunFolder, moment: str, rng: random.Random, *, life: float) -> bool:
    """Waits for the moment of a kill; False if the run ends before it.

    Args:
        process: the run.
        run: its folder.
        moment: one of MOMENTS.
        rng: draws it.
        life: seconds that an undisturbed run takes.
    """
    end = time.monotonic() + rng.uniform(0, life)
    left = rng.randint(1, 8)  # so many writes are let through
    before = watched(run, moment)
    while process.poll() is None:
        if moment == "uniform":
            if time.monotonic() >= end:
                return True
            time.sleep(0.001)
            continue
        now = watched(run, moment)
        left -= now != before and bool(now)
        before = now
        if left <= 0:
            time.sleep(rng.choice([0.0, rng.uniform(0, 0.02)]))
            return process.poll() is None
    return False


def watched(run: RunFolder, moment: str) -> object:
    """What changes with each write."""
    if moment == "writing":
        return temporaries(run)
    with suppress(FileNotFoundError):
        return run.metrics.stat().st_size
    return 0


# --- what it has left -------------------------------------------------------------------------------------------------


def half_written(run: RunFolder, undisturbed: RunFolder) -> list[str]:
    """The files at their final names that are not whole, and why."""
    found = []
    for path in sorted(run.path.rglob("*")):
        if path.is_file() and not any(part.startswith(TEMPORARY_PREFIX) for part in path.relative_to(run.path).parts):
            try:
                check_whole(path)
            except (ValueError, SafetensorError) as error:
                found.append(f"{path}: {error}")
    pairs = [(checkpoint, undisturbed.checkpoint(STEPS)) for checkpoint in run.list_checkpoints()]
    for folder, whole in [*pairs, *([(run.model, undisturbed.model)] if run.model.exists() else [])]:
        missing = {path.name for path in whole.iterdir()} - {path.name for path in folder.iterdir()}
        found += [f"{folder} lacks {name}" for name in sorted(missing)]
    return found


def check_whole(path: Path) -> None:
    """Raises ValueError or SafetensorError for a file that is not."""
    if path.suffix == ".safetensors":
        safetensors.numpy.load_file(path)
    elif path.suffix == ".json":
        json.loads(path.read_bytes())
    elif path.suffix == ".jsonl":
        *lines, _ = path.read_bytes().split(b"\n")  # behind the last newline is nothing, or what was cut short
        steps = [json.loads(line)["step"] for line in lines]
        if steps != list(range(len(steps))):
            raise ValueError(f"its steps are {steps}")
    elif path.suffix == ".md":
        if not path.read_bytes().endswith(b"\n"):
            raise ValueError("its last line is cut short")
    else:
        raise ValueError("no such file belongs to a run")


def differing_checkpoints(run: RunFolder, undisturbed: RunFolder) -> list[str]:
    """Files of checkpoints that are not those of the undisturbed run after as many steps."""
    pairs = [
        (path, undisturbed.checkpoints / folder.name / path.name)
        for folder in run.list_checkpoints()
        for path in folder.iterdir()
    ]
    return [f"{own} differs" for own, other in pairs if own.read_bytes() != other.read_bytes()]


def differences(run: RunFolder, undisturbed: RunFolder) -> list[str]:
    """What of a finished run is not as in the undisturbed one."""
    files = [*(Path("model") / path.name for path in undisturbed.model.iterdir()), Path("report.json"), Path("report.md")]
    found = [
        f"{run.path / name} differs" for name in files if not equal(run.path / name, undisturbed.path / name)
    ]  # fmt: skip
    if metrics(run) != metrics(undisturbed):
        found.append(f"{run.metrics} differs")
    return [*found, *differing_checkpoints(run, undisturbed), *(f"{run.path} keeps {name}" for name in temporaries(run))]


def equal(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()


def metrics(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, but for the speed."""
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in run.read_metrics()]


# --- the whole --------------------------------------------------------------------------------------------------------


def soak(asked: Asked, home: Path) -> Tally:
    """Trains undisturbed, then kills and compares; prints a line for each kill."""
    rng, tally = random.Random(asked.seed), Tally()
    make_model(home / "tiny")
    undisturbed = RunFolder(home / "undisturbed")
    lives = {}
    for name, fresh in (("undisturbed", False), ("interpreter", True))[: 2 if asked.fresh else 1]:
        began = time.monotonic()
        arguments = options(home, name, save_every=1, keep_checkpoints=STEPS)
        status = Process(arguments, home / f"{name}.log", fresh=fresh, processes=asked.processes).wait()
        lives[fresh] = time.monotonic() - began
        if status != 0:
            tally.failures.append(f"the undisturbed run: status {status}, see {home / name}.log")
            return tally
        print(f"undisturbed{', new interpreter' if fresh else ''}: {STEPS} steps in {lives[fresh]:.1f} s", flush=True)
    if asked.fresh:
        tally.mismatches += differences(RunFolder(home / "interpreter"), undisturbed)
    number = 1
    while tally.kills < asked.kills and not tally.faults:
        run = RunFolder(home / f"run_{number:03d}")
        kill_until_done(run, undisturbed, asked, rng, tally, lives)
        number += 1
    return tally


def kill_until_done(
    run: RunFolder, undisturbed: RunFolder, asked: Asked, rng: random.Random, tally: Tally, lives: dict[bool, float]
) -> None:
    """Starts a run again and again until it ends by itself, which it may do undisturbed once there were kills enough."""
    log = run.path.with_suffix(".log")
    while not tally.faults:
        fresh = tally.kills < asked.fresh
        tally.resumes += run.config.is_file()
        arguments = options(run.path.parent, run.path.name, save_every=rng.randint(1, 5))
        moment = rng.choice(MOMENTS)
        kind = rng.choices([name for name, _ in SIGNALS], [weight for _, weight in SIGNALS])[0]
        process = Process(arguments, log, fresh=fresh, processes=asked.processes)
        killed = tally.kills < asked.kills and wait_for_moment(process, run, moment, rng, life=lives[fresh])
        if killed:
            process.kill(kind, rng)
        status = process.wait()
        if status == 0:
            tally.compared += 1
            tally.half_written += half_written(run, undisturbed)
            tally.mismatches += differences(run, undisturbed)
            print(f"      {run.path.name} ended and {'differs' if tally.faults else 'is equal'}", flush=True)
            if not (asked.keep or tally.faults):
                shutil.rmtree(run.path)
            return
        number = signal.Signals[kind.split()[0]]
        by_signal = {-number, 128 + number}
        if not killed or status is None or (asked.processes == 1 and status not in by_signal):
            tally.failures.append(f"{run.path.name}: status {status}, see {log}")
            return
        tally.signals[kind] += 1
        note_kill(run, undisturbed, tally, f"{kind}, {moment}{', new interpreter' if fresh else ''}")


def note_kill(run: RunFolder, undisturbed: RunFolder, tally: Tally, how: str) -> None:
    """Looks at what a kill has left, and prints a line."""
    left = temporaries(run)
    tally.during_a_write += bool(left)
    tally.half_written += half_written(run, undisturbed)
    tally.mismatches += differing_checkpoints(run, undisturbed)
    checkpoints = run.list_checkpoints()
    where = checkpoints[-1].name if checkpoints else "no checkpoint yet"
    print(f"{tally.kills:4}  {run.path.name}  {how:<41} {where:<18} {' '.join(left)}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Soaks, prints the tally, and exits with 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--fresh", type=int, default=3, help="the first so many kills end new interpreters")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--keep", action="store_true", help="leave what was written")
    asked = Asked(**vars(parser.parse_args(argv)))
    if asked.processes > 1:
        asked = replace(asked, fresh=0)  # torchrun starts new interpreters each time
    asked.folder.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="", dir=asked.folder.resolve()))
    assert workflow.__file__  # imported here, so that no child has to
    began = time.monotonic()
    tally = soak(asked, home)
    print(f"\nsoak of {asked.processes} process(es), seed {asked.seed}, {time.monotonic() - began:.0f} s\n{tally.summary()}")
    for fault in tally.faults:
        print(fault)
    if tally.faults or asked.keep:
        print(f"all of it is in {home}")
    else:
        shutil.rmtree(home)
    raise SystemExit(bool(tally.faults))


if __name__ == "__main__":
    main()
