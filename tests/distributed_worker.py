"""What one of several processes does in test_distributed.py; started by torchrun, once for each world size.

    torchrun --standalone --nproc_per_node 2 tests/distributed_worker.py FOLDER WEIGHTS

Leaves in FOLDER what the test compares with a single process.
"""

import shutil
import sys
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator

from bit_mixup.cli import main as command
from bit_mixup.data import load_image_dataset
from bit_mixup.examples import EvaluationView, TrainingStream
from bit_mixup.hyperrule import HyperParameters
from bit_mixup.images import View
from bit_mixup.mixup import Mixup
from bit_mixup.models import load_bit
from bit_mixup.prediction import predict_logits
from bit_mixup.runs import RunFolder
from bit_mixup.sampling import cut_batch
from bit_mixup.training import train as train_model

VIEW = View(resize_size=48, crop_size=40, flip=False, interpolation="bilinear")
RULE = HyperParameters(
    resize_size=48, crop_size=40, steps=60, warmup_steps=10, decay_steps=(100,), batch_size=64, base_lr=0.003, mixup_alpha=0.4
)
# Two processes get two micro-batches of 16 each. Three processes get 3, 3 and 2 groups: one repeats a group with weight 0.
MICRO_BATCH = {1: None, 2: 16, 3: 8}
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
    train_model(model, stream, RULE, accelerator, mixup=Mixup(alpha=0.4), cuts=cuts, run=run, seed=3, save_every=60)


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


def main(argv: list[str]) -> None:
    folder, weights = Path(argv[0]), argv[1]
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    print(f"world size {accelerator.num_processes}, rank {accelerator.process_index}", flush=True)
    assert accelerator.num_processes == int(argv[2])
    train(folder / "double", weights, accelerator)
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


if __name__ == "__main__":
    main(sys.argv[1:])
