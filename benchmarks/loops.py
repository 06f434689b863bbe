"""How long do whole training loops take, data and all, beside those of others?

    OMP_NUM_THREADS=1 python benchmarks/loops.py

Two parts, one thread, fp32 unless a row says bf16. In the first all train the bundled model on the bundled digits for --steps
steps of 128, as `make fine-tune` does: decoding, crops of 40 pixels out of 48, normalisation, the step, the log. Crops are drawn
by each loop's own generator, so that losses agree but roughly. In the second the network is the tests' tiny BiT on pictures that
are prepared already, and what `bit_mixup.train` takes on top of the bare step is what its log, its signals and its streams take.
"""

import argparse
import contextlib
import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from harness import Work, interleave, save, table
from torch.utils.data import DataLoader
from training import OneBatch, Ours, accelerator

import bit_mixup
from bit_mixup.examples import TrainingStream
from bit_mixup.hyperrule import HyperParameters
from bit_mixup.images import View
from bit_mixup.laws import TrainingLaw
from bit_mixup.models import load_bit
from bit_mixup.runs import RunFolder
from bit_mixup.sampling import cut_batch
from bit_mixup.training import train

BATCH = 128
BAR = 1.0  # ms
BARE_STEPS = 600  # so many that what a run does at its start and end counts little


@contextlib.contextmanager
def in_silence() -> Any:
    """Without the progress bars and reports of the libraries."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def digits(steps: int, rounds: int, root: Path) -> list[Any]:
    """The first part."""
    data = bit_mixup.load_image_dataset("digits")
    files = [row["bytes"] for row in data.train.encoded(range(len(data.train)))]
    labels = data.train.labels.tolist()
    base = load_bit("bundled", num_classes=10)
    view = View(resize_size=48, crop_size=40, flip=False, interpolation="bilinear")
    full = peers.big_transfer_transform(48, 40)
    full.transforms.pop(2)  # a mirrored digit is another shape  # type: ignore[attr-defined]
    pictures = peers.EncodedPictures(files, labels, full)
    images = steps * BATCH
    count = 0

    def script(bf16: bool = False) -> Callable[[], Work]:
        """big_transfer's and timm's loops are the same but for their networks; the rate is looked up for each step."""

        def work() -> Work:
            network = copy.deepcopy(base).train()
            optimizer = peers.momentum_sgd(network)
            torch.manual_seed(0)
            loader = DataLoader(pictures, batch_size=BATCH, shuffle=True, num_workers=0, drop_last=False)
            losses, seen = [], 0
            for x, y in peers.endless(loader):
                if len(losses) == steps:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = 0.001
                losses.append(peers.plain_step(network, optimizer, x, y, bf16=bf16))
                seen += len(x)
            assert seen > 0.9 * images, "a pass over 1,000 pictures ends in a short batch"
            return Work(steps=steps, images=images, value=float(np.mean(losses[-10:])))

        return work

    def trainer() -> Work:
        network = Wrapped(copy.deepcopy(base))
        with in_silence():
            torch.manual_seed(0)
            peers.trainer_run(network, pictures, steps=steps, batch_size=BATCH, folder=root / "trainer", rate=0.001)
        return Work(steps=steps, images=images, value=float(np.mean(network.losses[-10:])))

    def ours(precision: str) -> Callable[[], Work]:
        def work() -> Work:
            nonlocal count
            count += 1
            run = RunFolder(root / f"run{count}")
            run.path.mkdir()
            hyper = HyperParameters(
                resize_size=48, crop_size=40, steps=steps, warmup_steps=0, decay_steps=(), batch_size=BATCH, base_lr=0.001
            )
            with in_silence():
                train(
                    copy.deepcopy(base), TrainingStream(part=data.train, view=view, seed=0), hyper, accelerator(precision),
                    law=TrainingLaw(), cuts=cut_batch(BATCH), run=run, save_every=10**6,
                )  # fmt: skip
            losses = [row["loss"] for row in run.read_metrics()]
            assert len(losses) == steps
            return Work(steps=steps, images=images, value=float(np.mean(losses[-10:])))

        return work

    ways = {
        "a loop as timm's and big_transfer's scripts have it": script(),
        "transformers' Trainer": trainer,
        "`bit_mixup.train`": ours("no"),
        "such a loop, bf16": script(bf16=True),
        "`bit_mixup.train`, bf16": ours("bf16"),
    }
    return interleave(ways, rounds=rounds, tolerance=dict.fromkeys(ways, 0.2))


class Wrapped(torch.nn.Module):
    """A timm network as the Trainer wants it: with a loss of its own."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network
        self.losses: list[float] = []

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.network(pixel_values)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        self.losses.append(float(loss.detach()))
        return {"loss": loss, "logits": logits}


def overhead(rounds: int, root: Path, steps: int = BARE_STEPS, size: int = 8) -> list[Any]:
    """The second part: the bare step, and the whole loop around the same step."""
    import timm

    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (size, 40, 40, 3), dtype=np.uint8).transpose(0, 3, 1, 2)
    stream = OneBatch(images, np.arange(size, dtype=np.int64) % 4)
    torch.manual_seed(0)
    tiny = timm.create_model("resnetv2_50x1_bit", num_classes=4, channels=(32, 32, 64, 64), stem_chs=16, norm_layer="groupnorm1")
    count = 0

    def bare() -> Work:
        step = Ours(copy.deepcopy(tiny), stream, bf16=False)
        for group in step.optimizer.param_groups:
            group["lr"] = peers.RATE
        losses = [step() for _ in range(steps)]
        return Work(steps=steps, images=steps * size, value=losses[-1])

    def whole() -> Work:
        nonlocal count
        count += 1
        run = RunFolder(root / f"tiny{count}")
        run.path.mkdir()
        hyper = HyperParameters(
            resize_size=40, crop_size=40, steps=steps, warmup_steps=0, decay_steps=(), batch_size=size, base_lr=peers.RATE
        )
        with in_silence():
            train(
                copy.deepcopy(tiny),
                stream,
                hyper,
                accelerator("no"),
                law=TrainingLaw(),
                cuts=cut_batch(size),
                run=run,
                save_every=10**6,
            )
        return Work(steps=steps, images=steps * size, value=run.read_metrics()[-1]["loss"])

    return interleave({"the bare step": bare, "`bit_mixup.train`": whole}, rounds=rounds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/loops.json"))
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        whole = digits(asked.steps, asked.rounds, Path(place))
        print(table(whole))
        bare = overhead(asked.rounds, Path(place))
    steps = BARE_STEPS
    differences = sorted(1000 * (own - base) / steps for own, base in zip(bare[2].cpu, bare[0].cpu, strict=True))
    middle = differences[len(differences) // 2]
    noise = sorted(1000 * (own - base) / steps for own, base in zip(bare[1].cpu, bare[0].cpu, strict=True))
    print(f"\n{table(bare, what='ms a step', scale=1000.0 * bare[0].images / steps)}\n")
    print(
        f"on top of the bare step: {middle:.2f} ms a step (the bare step on top of itself: {noise[len(noise) // 2]:.2f}; at most "
        f"{BAR}): {'met' if middle <= BAR else 'NOT met'}"
    )
    save(asked.json, {"loop": whole, "overhead": bare}, overhead_ms=middle, noise_ms=noise[len(noise) // 2], bar=BAR)


if __name__ == "__main__":
    main()
