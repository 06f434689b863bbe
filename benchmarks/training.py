"""How long does a training step take, beside those of others at the same precision?

    OMP_NUM_THREADS=1 python benchmarks/training.py

R50x1 at 128 pixels, ten classes, random weights, a batch of --batch-size pictures, one thread. Each way takes one step in each
round, at a rate of 0, so that all start from the same weights and pictures: their losses must agree, within rounding. What a
step costs in floating-point operations is counted, so that it shows how much of what this processor can do at best is reached;
no way may seem to do more.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peers
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from harness import Work, check, interleave, peak_memory, save, table
from timm.models.resnetv2 import ResNetV2
from torch.utils.flop_counter import FlopCounterMode

from bit_mixup.environment import Speedups
from bit_mixup.hyperrule import HyperParameters
from bit_mixup.laws import TrainingLaw
from bit_mixup.objectives import SoftmaxCrossEntropy
from bit_mixup.sampling import cut_batch
from bit_mixup.training import StepWork

EDGE = 128
RATE = 0.0  # so that all steps of all rounds start from the same weights; a step costs the same
TARGETS = {  # name of the way: (whose ratio, at most)
    "ours, bf16": {"timm, bf16": 0.95, "timm": 0.55},
    "ours": {"timm": 1.03},
    "ours, bf16, 4 micro-batches": {"ours, bf16": 1.08},
}


class OneBatch:
    """A stream that gives the same pictures over and over: bytes that lie channels last, as they come from decoding."""

    def __init__(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> None:
        self.images, self.labels = images, labels

    def ids(self, positions: Sequence[int]) -> list[str]:
        return [str(position % len(self.labels)) for position in positions]

    def __getitems__(self, positions: Sequence[int]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        rows = [position % len(self.labels) for position in positions]
        return self.images[rows[0] : rows[-1] + 1], self.labels[rows]


def accelerator(precision: str) -> Accelerator:
    """Accelerate's, of a precision ("no" or "bf16") that others before it need not have had."""
    AcceleratorState._reset_state()
    return Accelerator(cpu=True, mixed_precision=precision)


class Ours:
    """The backward passes and the optimizer of `bit_mixup.train`, without its log, checkpoints and signals."""

    def __init__(self, model: ResNetV2, stream: OneBatch, *, bf16: bool, split: int = 1, speedups: Speedups = Speedups()) -> None:  # noqa: B008
        count = len(stream.labels)
        hyper = HyperParameters(
            resize_size=EDGE, crop_size=EDGE, steps=2**20, warmup_steps=0, decay_steps=(), batch_size=count, base_lr=peers.RATE
        )
        self.precision = "bf16" if bf16 else "no"
        self.accelerator = accelerator(self.precision)
        self.work = StepWork(
            model, stream, hyper, self.accelerator, TrainingLaw(), SoftmaxCrossEntropy(), None, speedups, 0, 0
        )  # fmt: skip
        self.work.cut(cut_batch(count, micro_batch=count // split, group_size=TrainingLaw().group_size), first_step=0)
        self.model = model.train()
        fused = speedups.fused_optimizer
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=peers.MOMENTUM, fused=fused)
        self.done = 0

    def __call__(self) -> float:
        AcceleratorState._shared_state["_mixed_precision"] = self.precision  # which is one for all of the process
        loss, _ = self.work.backward(self.done, self.work.own)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return float(loss)


def ways(batch_size: int) -> Iterator[tuple[str, Callable[[], float]]]:
    """Each way, ready to take a step; what it gives is the loss."""
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 256, (batch_size, EDGE, EDGE, 3), dtype=np.uint8).transpose(0, 3, 1, 2)
    labels = np.arange(batch_size, dtype=np.int64) % 10
    images = torch.from_numpy(pictures.copy()).float().div(255).sub(0.5).div(0.5).contiguous()
    targets = torch.from_numpy(labels)
    base = peers.r50x1()

    def plain(network: torch.nn.Module, *, bf16: bool = False, split: int = 1, last: bool = False) -> Callable[[], float]:
        network, shown = network.train(), images
        if last:
            network, shown = network.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last)
        optimizer = peers.momentum_sgd(network, RATE)
        return lambda: peers.plain_step(network, optimizer, shown, targets, bf16=bf16, split=split)

    def ours(*, bf16: bool, split: int = 1, **off: Any) -> Callable[[], float]:
        return Ours(copy.deepcopy(base), OneBatch(pictures, labels), bf16=bf16, split=split, speedups=Speedups(**off))

    yield "timm", plain(copy.deepcopy(base))
    yield "timm, channels last", plain(copy.deepcopy(base), last=True)
    yield "big_transfer", plain(peers.big_transfer_of(base))
    yield "transformers", plain(peers.transformers_of(base))
    yield "ours", ours(bf16=False)
    yield "timm, bf16", plain(copy.deepcopy(base), bf16=True)
    yield "timm, bf16, channels last", plain(copy.deepcopy(base), bf16=True, last=True)
    yield "transformers, bf16", plain(peers.transformers_of(base), bf16=True)
    yield "ours, bf16", ours(bf16=True)
    yield "ours, bf16, timm's layers", ours(bf16=True, quick_layers=False)
    yield "ours, bf16, contiguous", ours(bf16=True, memory_format="contiguous")
    yield "ours, bf16, 4 micro-batches", ours(bf16=True, split=4)
    yield "ours, bf16, 4 micro-batches, filters not kept", ours(bf16=True, split=4, keep_filters=False)
    yield "timm, bf16, 4 micro-batches", plain(copy.deepcopy(base), bf16=True, split=4)


def operations(batch_size: int) -> float:
    """Floating-point operations of a forward and backward pass, by torch's counter."""
    model, images = peers.r50x1(), torch.zeros(1, 3, EDGE, EDGE)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(images), torch.zeros(1, dtype=torch.int64)).backward()
    return float(counter.get_total_flops()) * batch_size


def peak(dtype: torch.dtype) -> float:
    """Operations a second of the fastest convolution found: the forward passes of 3 x 3 filters, channels last."""
    best = 0.0
    for channels, edge, count in ((64, 32, 32), (128, 16, 64), (256, 16, 32)):
        images = torch.randn(count, channels, edge, edge).to(dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(12):
            start = time.process_time()
            torch.conv2d(images, weight, padding=1)
            best = max(best, 2 * 9 * channels**2 * edge**2 * count / (time.process_time() - start))
    return best


def memory(name: str, batch_size: int) -> int:
    """Most bytes that a process of its own takes on top for two steps of a way."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = peak_memory()
        step = dict(ways_named(name, batch_size))[name]
        step(), step()
        os.write(writer, str(peak_memory() - before).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    os.waitpid(child, 0)
    return int(said)


def ways_named(name: str, batch_size: int) -> Iterator[tuple[str, Callable[[], float]]]:
    """The one way of that name; the others are made and dropped."""
    for found, step in ways(batch_size):
        if found == name:
            yield found, step
            return


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/training.json"))
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    peaks = {"fp32": peak(torch.float32), "bf16": peak(torch.bfloat16)}
    flops = operations(asked.batch_size)
    names = [name for name, _ in ways(4)]
    memories = {name: memory(name, asked.batch_size) for name in names}
    steps = dict(ways(asked.batch_size))

    def timed(step: Callable[[], float]) -> Callable[[], Work]:
        return lambda: Work(steps=1, images=asked.batch_size, value=step())

    tolerance = {name: 0.02 if "bf16" in name else 1e-3 for name in steps}
    rows = interleave({name: timed(step) for name, step in steps.items()}, rounds=asked.rounds, tolerance=tolerance)
    shares = {}
    for row in rows:
        kind = "bf16" if "bf16" in row.name else "fp32"
        fastest = min(row.cpu)
        shares[row.name] = flops / sorted(row.cpu)[len(row.cpu) // 2] / peaks[kind]
        assert flops / fastest < 1.02 * peaks[kind], f"{row.name} seems to do more than this processor can"
    print(f"\nR50x1, {EDGE} px, batch {asked.batch_size}: {flops / 1e9:.0f} GFLOP a step\n")
    print(table(rows))
    checks = check(rows, TARGETS)
    save(
        asked.json, {"step": rows}, flops=flops, peaks=peaks, share_of_peak=shares, memory=memories, checks=checks,
        batch_size=asked.batch_size,
    )  # fmt: skip
    print(json.dumps({"peaks": peaks, "share_of_peak": shares, "memory": memories}, indent=1))


if __name__ == "__main__":
    main()
