"""What one of several processes does in test_distributed.py; started by torchrun, once for each world size.

    torchrun --standalone --nproc_per_node 2 tests/distributed_worker.py FOLDER WEIGHTS WORLD_SIZE
    torchrun --nnodes 2 --nproc_per_node 1 ... tests/distributed_worker.py FOLDER WEIGHTS machines

Leaves in FOLDER what the test compares with a single process.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator

from bit_mixup import environment
from bit_mixup.augmentation import InceptionView
from bit_mixup.cli import main as command
from bit_mixup.data import load_image_dataset
from bit_mixup.examples import ArrayImages, EvaluationView, PartneredStream, TrainingStream, mean_image, same_class_candidates
from bit_mixup.expansion import DataMeans
from bit_mixup.hyperrule import HyperParameters
from bit_mixup.images import View
from bit_mixup.laws import TrainingLaw
from bit_mixup.models import create_bit, load_bit
from bit_mixup.objectives import Distillation, SigmoidCrossEntropy
from bit_mixup.prediction import predict_logits
from bit_mixup.runs import RunFolder
from bit_mixup.sampling import GROUP_SIZE, cut_batch
from bit_mixup.training import train as train_model
from bit_mixup.weights import find_network

environment.CPU_INFO = Path("no_cpuinfo")  # a processor without bf16, so that tests are the same on all
VIEW = View(resize_size=48, crop_size=40, flip=False, interpolation="bilinear")
RULE = HyperParameters(
    resize_size=48, crop_size=40, steps=60, warmup_steps=10, decay_steps=(100,), batch_size=64, base_lr=0.003, mixup_alpha=0.4
)
# Two processes get two micro-batches of 16 each. Three processes get 3, 3 and 2 groups: one repeats a group with weight 0.
MICRO_BATCH = {1: None, 2: 16, 3: 8}
LAWS = {
    "partners": TrainingLaw(alpha=0.4, lam="example", partner="same_class", input_noise=0.1, feature_dropout=0.3),
    "approximate": TrainingLaw(alpha=0.4, form="approximate"),
}
NUM_SCORED = 101  # a prime: no number of processes divides it


def train(folder: Path, weights: str, accelerator: Accelerator) -> None:
    """60 steps in double precision with mixup, cut for this number of processes."""
    data = load_image_dataset("digits", examples_per_class=20)
    stream = TrainingStream(part=data.train, view=VIEW, seed=3)
    world = accelerator.num_processes
    cuts = cut_batch(64, num_processes=world, micro_batch=MICRO_BATCH[world])
    run = RunFolder(folder)
    folder.mkdir(exist_ok=True)
    model = load_bit(weights, num_classes=10).double()
    train_model(model, stream, RULE, accelerator, law=TrainingLaw(alpha=0.4), cuts=cuts, run=run, seed=3, save_every=60)


def pretrain(folder: Path, weights: str, accelerator: Accelerator) -> None:
    """10 steps on distorted inception crops in double precision: several labels a picture, unmixed; and distillation, mixed."""
    part = load_image_dataset("digits", examples_per_class=20).train
    several = np.concatenate([np.eye(10)[part.labels], part.labels[:, None] > 4], axis=1)
    images = np.stack([np.asarray(picture) for picture in part.read(range(len(part)))])
    arrays = ArrayImages(images=images, labels=several, class_names=(*"0123456789", "large"))
    view = InceptionView(crop_size=40, flip=True, interpolation="bilinear", min_area=0.3, distort=True)
    stream = TrainingStream(part=arrays, view=view, seed=3)
    world = accelerator.num_processes
    teacher = load_bit(weights, keep_head=True).double()
    for name, objective, num_classes, alpha in (
        ("several", SigmoidCrossEntropy(), 11, 0.0),
        ("distilled", Distillation(teacher), 4, 1.0),
    ):
        (folder / name).mkdir(exist_ok=True)
        hyper = replace(RULE, resize_size=40, steps=10, warmup_steps=2, base_lr=0.001, weight_decay=1e-4, mixup_alpha=alpha)
        cuts = cut_batch(64, num_processes=world, micro_batch=MICRO_BATCH[world], group_size=GROUP_SIZE if alpha else 1)
        train_model(
            create_bit(find_network(weights), num_classes=num_classes, seed=0).double(),
            stream,
            hyper,
            accelerator,
            law=TrainingLaw(alpha=alpha),
            cuts=cuts,
            run=RunFolder(folder / name),
            objective=objective,
            seed=3,
            save_every=10,
        )


def follow_laws(folder: Path, weights: str, accelerator: Accelerator) -> None:
    """6 steps in double precision under two laws that draw all that can be drawn, or that take derivatives along the way."""
    part = load_image_dataset("digits", examples_per_class=20).train
    stream = TrainingStream(part=part, view=VIEW, seed=3)
    means = DataMeans(image=torch.from_numpy(mean_image(part, VIEW, seed=3)) * 2 - 1, label=torch.full((10,), 0.1))
    world = accelerator.num_processes
    for name, law in LAWS.items():
        (folder / name).mkdir(exist_ok=True)
        partnered = PartneredStream(stream=stream, candidates=same_class_candidates(part.labels))
        train_model(
            load_bit(weights, num_classes=10).double(),
            partnered if law.loads_partners else stream,
            replace(RULE, steps=6, warmup_steps=2),
            accelerator,
            law=law,
            means=means,
            cuts=cut_batch(64, num_processes=world, micro_batch=MICRO_BATCH[world], group_size=GROUP_SIZE if law.groups else 1),
            run=RunFolder(folder / name),
            seed=3,
            save_every=6,
        )


def score(weights: str, accelerator: Accelerator) -> torch.Tensor:
    """Logits of the first 101 test digits by the head that the weights come with."""
    part = load_image_dataset("digits").test
    view = EvaluationView(part=part.subset(torch.arange(NUM_SCORED).numpy()), view=VIEW)
    return predict_logits(load_bit(weights, keep_head=True), view, accelerator, batch_size=16)


def options(folder: Path, weights: str) -> list[str]:
    """A whole run of 6 steps through the command line."""
    return [
        *("fine-tune", "--dataset", "digits", "--model", weights, "--examples-per-class", "4", "--steps", "6"),
        *("--batch-size", "35", "--resize-size", "48", "--crop-size", "40", "--threads", "1", "--save-every", "2"),
        *("--mixup-alpha", "0.4", "--output-dir", str(folder)),
    ]


def outcome(arguments: list[str]) -> tuple[int, str]:
    """Exit status and last words of a command."""
    said = StringIO()
    try:
        with redirect_stderr(said):
            command(arguments)
    except SystemExit as stop:
        return int(stop.code or 0), said.getvalue().strip().splitlines()[-1]
    return 0, ""


def disagree(folder: Path, weights: str, rank: int) -> dict[str, tuple[int, str]]:
    """What the last rank does otherwise than the others, and what this one hears of it."""
    odd = rank == int(os.environ["WORLD_SIZE"]) - 1
    own = folder / f"own_{rank}"
    stale = folder / f"stale_{rank}"  # a folder that is not shared, with an older run on one machine
    if odd:
        (stale / "checkpoints" / "step_000002").mkdir(parents=True)
        (stale / "config.json").write_text((folder / "whole" / "config.json").read_text())
    other_weights = folder / "other_weights"
    if rank == 0:
        shutil.copytree(weights, other_weights)
        tensors = safetensors.torch.load_file(other_weights / "model.safetensors")
        tensors["stem.conv.weight"][0, 0, 0, 0] += 1e-6
        safetensors.torch.save_file(tensors, other_weights / "model.safetensors")
    same_path = folder / f"weights_{rank}" / "weights"  # as two machines may have two files at one path
    same_path.parent.mkdir()
    Accelerator(cpu=True).wait_for_everyone()
    same_path.symlink_to(other_weights if odd else weights)
    os.chdir(same_path.parent)
    cases = {
        "option": ["--base-lr", "0.01"] if odd else [],
        "seed": ["--seed", "1"] if odd else [],
        "data": ["--examples-per-class", "5"] if odd else [],
        "checkpoint": ["--overwrite", "--output-dir", str(stale)],
        "weights": ["--model", "./weights", "--output-dir", str(folder / "weights_differ")],
        "missing": ["--dataset", str(folder / "nowhere")] if odd else [],
        "main cannot write": ["--output-dir", "/proc/nowhere"] if rank == 0 else [],
    }
    return {name: outcome([*options(own, weights), *more]) for name, more in cases.items()}


@contextmanager
def signal_to_oneself(number: int, run: RunFolder) -> Iterator[None]:
    """Sends a signal to this process alone, once the run has written its first losses."""

    def wait() -> None:
        while not run.metrics.is_file():
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    yield
    thread.join()


def interrupt(folder: Path, weights: str, rank: int) -> tuple[int, str]:
    """A run of 16 steps that SIGUSR1, sent to the last rank alone, stops on the way; and resumed."""
    run = RunFolder(folder / "signalled")
    arguments = [*options(run.path, weights), "--steps", "16", "--log-every", "1", "--save-every", "1000"]
    if rank == int(os.environ["WORLD_SIZE"]) - 1:
        with signal_to_oneself(signal.SIGUSR1, run):
            found = outcome(arguments)
    else:
        found = outcome(arguments)
    Accelerator(cpu=True).wait_for_everyone()
    command([*arguments, "--resume"])
    command([*options(folder / "undisturbed", weights), "--steps", "16", "--log-every", "1", "--save-every", "1000"])
    return found


def lose_a_process(folder: Path, weights: str, rank: int) -> None:
    """A long run whose last process is killed on the way; what the other one hears."""
    run = RunFolder(folder / "bereft")
    arguments = [*options(run.path, weights), "--steps", "4000", "--log-every", "20", "--save-every", "10"]
    if rank == int(os.environ["WORLD_SIZE"]) - 1:
        with signal_to_oneself(signal.SIGKILL, run):
            command(arguments)
    start = time.monotonic()
    status, words = outcome(arguments)
    report = {"status": status, "words": words, "seconds": time.monotonic() - start}
    (folder / f"bereft_{rank}.json").write_text(json.dumps(report))
    raise SystemExit(status)  # or its agent would wait for the other machine's to be done, too


def count_backward_calls(folder: Path, weights: str, accelerator: Accelerator) -> dict[int, int]:
    """How often this process computes gradients in two steps, by batch size; sizes that no number of processes divides."""
    part = load_image_dataset("digits", examples_per_class=20).train
    stream, world = TrainingStream(part=part, view=VIEW, seed=3), accelerator.num_processes
    counts = {}
    for batch_size in (25, 33, 35, 65):
        model = load_bit(weights, num_classes=10)
        calls: list[object] = []
        next(iter(model.parameters())).register_hook(calls.append)
        run = RunFolder(folder / f"batch_{batch_size}")
        run.path.mkdir(exist_ok=True)
        hyper = replace(RULE, steps=2, warmup_steps=1, batch_size=batch_size)
        cuts = cut_batch(batch_size, num_processes=world, micro_batch=9)
        train_model(model, stream, hyper, accelerator, law=TrainingLaw(alpha=0.4), cuts=cuts, run=run, seed=3)
        counts[batch_size] = len(calls)
    return counts


def main(argv: list[str]) -> None:
    folder, weights = Path(argv[0]), argv[1]
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    print(f"world size {accelerator.num_processes}, rank {accelerator.process_index}", flush=True)
    if argv[2] == "machines":
        command(options(folder / "whole", weights))
        lose_a_process(folder, weights, accelerator.process_index)
        return
    assert accelerator.num_processes == int(argv[2])
    train(folder / "double", weights, accelerator)
    pretrain(folder, weights, accelerator)
    follow_laws(folder, weights, accelerator)
    logits = score(weights, accelerator)
    safetensors.torch.save_file({"logits": logits}, folder / f"logits_{accelerator.process_index}.safetensors")
    command(options(folder / "whole", weights))
    command(options(folder / "resumed", weights))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:  # as if killed after step 4
        shutil.rmtree(folder / "resumed" / "checkpoints" / "step_000006")
        shutil.rmtree(folder / "resumed" / "model")
    accelerator.wait_for_everyone()
    command([*options(folder / "resumed", weights), "--resume"])
    rank = accelerator.process_index
    found = {
        "disagreements": disagree(folder, weights, rank),
        "signalled": interrupt(folder, weights, rank),
        "backward calls": count_backward_calls(folder, weights, accelerator),
    }
    (folder / f"found_{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
