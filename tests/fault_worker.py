"""What test_faults.py needs a process of its own for: limits of memory, and signals that end a process.

    python tests/fault_worker.py FOLDER

Imports the libraries once and forks for each case. Leaves FOLDER/outcomes.json, and what each case wrote and printed.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from PIL import Image

from bit_mixup import environment
from bit_mixup.cli import main as command
from bit_mixup.hyperrule import HyperParameters
from bit_mixup.laws import TrainingLaw
from bit_mixup.memory import release_memory
from bit_mixup.models import create_bit
from bit_mixup.runs import RunFolder
from bit_mixup.sampling import cut_batch
from bit_mixup.training import train
from bit_mixup.weights import find_network

environment.CPU_INFO = Path("no_cpuinfo")  # a processor without bf16, so that tests are the same on all
NUM_CLASSES = 10
MEASURED = {  # network, pixels, examples of a pass
    "small": ("bundled", 40, 128),
    "middle": ("bundled", 128, 64),
    "large": ("resnetv2_50x1_bit", 128, 8),
}
LADDERS = {  # MB of room, in the order in which they are tried, for a run that should end in such a way
    "halved": (350, 400, 325),
    "checkpointed": (190, 160, 225),
    "refused": (60, 20),
}
ALLOCATOR = {  # glibc's: with it each tensor is a mapping of its own, so that the room which is left does not hang on the heap
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


class Noise:
    """Random pictures of one size, as many as are asked for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __getitems__(self, positions: list[int]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        shape = (len(positions), 3, self.size, self.size)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), np.array(positions) % NUM_CLASSES

    def ids(self, positions: list[int]) -> list[str]:
        return [str(position) for position in positions]


def status(key: str) -> int:
    """A size in bytes that the kernel keeps of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def measure(folder: Path, network: str, size: int, examples: int) -> dict[str, int]:
    """Peak memory of three steps above that of the imported libraries, and what the plan would say."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = status("VmRSS")
    weights = find_network(network)
    hyper = HyperParameters(
        resize_size=size, crop_size=size, steps=3, warmup_steps=1, decay_steps=(), batch_size=examples, base_lr=0.001
    )
    model = create_bit(weights, num_classes=NUM_CLASSES, seed=0)
    cuts = cut_batch(examples, group_size=1)
    folder.mkdir()
    train(model, Noise(size), hyper, Accelerator(cpu=True), law=TrainingLaw(), cuts=cuts, run=RunFolder(folder))
    estimate = weights.shape.training_bytes(size, examples=examples, num_classes=NUM_CLASSES)
    return {"measured": status("VmHWM") - before, "estimate": estimate}


def write_pictures(folder: Path) -> None:
    """Class folders of a few random pictures."""
    pixels = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                picture = pixels.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / split / label / f"{index}.png")


def options(folder: Path, *more: str) -> list[str]:
    """A run of two steps whose activations take about 500 MB in one pass, half of that in the smallest."""
    return [
        *("fine-tune", "--dataset", str(folder.parent / "pictures"), "--model", "bundled", "--steps", "2", "--warmup-steps", "0"),
        *("--batch-size", "16", "--crop-size", "256", "--resize-size", "256", "--no-flip", "--threads", "1"),
        *("--mixup-alpha", "0.4", "--output-dir", str(folder), *more),
    ]


def limited(folder: Path, headroom: int, *more: str, address_space: bool = False) -> None:
    """That run with so many bytes more than there are in use: of data, or of address space, whose limit the program reads."""
    release_memory()  # what earlier runs have left in the heap would do for much
    limit, used = (resource.RLIMIT_AS, "VmSize") if address_space else (resource.RLIMIT_DATA, "VmData")
    resource.setrlimit(limit, (status(used) + headroom, resource.RLIM_INFINITY))
    command(options(folder, *more))


def fork(folder: Path, name: str, work: Callable[[], Any]) -> int:
    """Does something in a child, with what it prints in a file; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        out = os.open(folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        found = work()
        if found is not None:
            (folder / f"{name}.json").write_text(json.dumps(found))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def took_to_checkpointing(folder: Path, name: str) -> bool:
    """Whether a case went on with gradient checkpointing."""
    return "going on with gradient checkpointing" in (folder / f"{name}.txt").read_text()


def find_limit(folder: Path, end: str, ladder: tuple[int, ...]) -> str:
    """Name of the first case that ended so."""
    for megabytes in ladder:
        name = f"limit-{megabytes}"
        code = exit_code(fork(folder, name, lambda name=name, room=megabytes * 2**20: limited(folder / name, room)))
        how = "checkpointed" if took_to_checkpointing(folder, name) else "halved"
        if {0: how, 2: "refused"}.get(code) == end:
            return name
    return ""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


def main(argv: list[str]) -> None:
    folder = Path(argv[0])
    torch.set_num_threads(1)
    codes: dict[str, Any] = {}
    for name, case in MEASURED.items():
        codes[name] = exit_code(fork(folder, name, lambda case=case, name=name: measure(folder / name, *case)))
    write_pictures(folder / "pictures")
    command(options(folder / "warm", "--batch-size", "8"))  # imports what is imported late: that takes room, too
    codes["free"] = exit_code(fork(folder, "free", lambda: command(options(folder / "free"))))
    codes["limits"] = {end: find_limit(folder, end, ladder) for end, ladder in LADDERS.items()}
    auto = ("--micro-batch", "auto")
    codes["auto"] = exit_code(fork(folder, "auto", lambda: limited(folder / "auto", 450 * 2**20, *auto, address_space=True)))
    # The first step takes seconds: two signals come before it ends.
    child = fork(folder, "twice", lambda: command(options(folder / "twice", "--batch-size", "512")))
    wait_for(folder / "twice" / "plan.json")
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)
    time.sleep(1.2)
    os.kill(child, signal.SIGTERM)
    sent = time.monotonic()
    codes["twice"] = exit_code(child)
    codes["seconds"] = time.monotonic() - sent
    (folder / "outcomes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(sys.argv[1:])
