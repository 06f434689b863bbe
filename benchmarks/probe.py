"""How much faster does a linear probe train than the whole network, on the bundled job (`make fine-tune`)?

    python benchmarks/probe.py                # a minute of probes, three minutes of fine-tuning on one thread
    python benchmarks/probe.py --repeats 5    # of the probe

Everything is imported before the clock starts. Training is the loop with its metrics and checkpoints; the plan (opening the data,
looking at sizes) and the features are timed apart, for they come once: the next probe reads the features. Both the time on the
wall and that of the processor are given, for cores may be shared. The features and runs go into a temporary folder.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from harness import machine

from bit_mixup.config import TransferConfig, configure
from bit_mixup.evaluation import evaluate
from bit_mixup.examples import EvaluationView, FeatureStream, TrainingStream
from bit_mixup.features import kept_features
from bit_mixup.laws import Trainable
from bit_mixup.loading import Stream
from bit_mixup.models import LinearProbe, Network, build_bit, freeze
from bit_mixup.planning import make_plan
from bit_mixup.prediction import predict_logits
from bit_mixup.training import train

JOB = {"dataset": "digits", "model": "bundled", "preset": "light", "resolution": "model", "threads": 1, "flip": False}
BAR = 50
Result = TypeVar("Result")


@dataclass(frozen=True)
class Seconds:
    """On the wall, and of the processor."""

    wall: float
    cpu: float

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


def timed(work: Callable[[], Result]) -> tuple[Result, Seconds]:
    """What some work gives, and how long it takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def run(trainable: Trainable, folder: Path, features_in: Path, *, steps: int | None = None) -> tuple[dict[str, Seconds], float]:
    """Times the parts of a run; these, and the accuracy on the test split."""
    asked = {**JOB, "trainable": trainable, "output_dir": folder, "steps": steps}
    plan, planning = timed(lambda: make_plan(configure(TransferConfig, **asked)))
    accelerator, hyper = Accelerator(cpu=True), plan.resolution.hyper
    model = build_bit(plan.weights, num_classes=plan.data.num_classes)
    freeze(model, trainable)
    plan.run.open(plan.config.as_json(), {"resolved": plan.resolved()}, overwrite=False)
    stream: Stream = TrainingStream(part=plan.data.train, view=plan.view, seed=plan.config.seed)
    network: Network = model
    seconds = {"plan": planning}
    if trainable == "head":

        def features() -> torch.Tensor:
            return kept_features(
                model, plan.data.train, plan.view, accelerator, about={}, folder=features_in, batch_size=plan.pictures_at_a_time
            )[0]

        found, seconds["features"] = timed(features)
        _, seconds["features, kept"] = timed(features)
        assert isinstance(stream, TrainingStream)
        network, stream = LinearProbe(model), FeatureStream(stream=stream, features=found.numpy())
    _, seconds["training"] = timed(
        lambda: train(network, stream, hyper, accelerator, law=plan.law, cuts=plan.cuts, run=plan.run, seed=plan.config.seed)
    )
    view = EvaluationView(part=plan.data.test, view=plan.view)
    logits = predict_logits(model, view, accelerator, batch_size=plan.pictures_at_a_time)
    return seconds, evaluate(logits, torch.from_numpy(plan.data.test.labels), plan.data.class_names).accuracy


def show(name: str, seconds: Seconds, whole: Seconds | None = None) -> None:
    """Prints a row: a part, its seconds, and how often they fit into those of the whole network's training."""
    line = f"| {name:<46} | {seconds.wall:8.2f} | {seconds.cpu:8.2f} |"
    print(
        line if whole is None else f"{line} {whole.wall / seconds.wall:5.0f} x | {whole.cpu / seconds.cpu:5.0f} x |", flush=True
    )


def middle(runs: list[dict[str, Seconds]], part: str) -> Seconds:
    """Medians over runs."""
    return Seconds(statistics.median(r[part].wall for r in runs), statistics.median(r[part].cpu for r in runs))


def main(argv: Sequence[str] | None = None) -> None:
    """Times, prints a table, and says whether the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="probes, of which the median counts")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/probe.json"))
    asked = parser.parse_args(argv)
    repeats = asked.repeats
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bit_mixup_probe_") as root:
        probes = [run("head", Path(root) / f"head{index}", Path(root) / f"features{index}") for index in range(repeats)]
        stage4, stage4_accuracy = run("stage4", Path(root) / "stage4", Path(root))
        full, accuracy = run("all", Path(root) / "all", Path(root))
    parts = [seconds for seconds, _ in probes]
    training, features, kept = (middle(parts, name) for name in ("training", "features", "features, kept"))
    print("| seconds                                        |     wall |      CPU | faster, wall | faster, CPU |")
    print("|---|---|---|---|---|")
    show(f"all weights: training (accuracy {accuracy:.2%})", full["training"], full["training"])
    show(f"last stage: training (accuracy {stage4_accuracy:.2%})", stage4["training"], full["training"])
    show(f"head: training, median of {repeats} (accuracy {probes[0][1]:.2%})", training, full["training"])
    show("head: features, the first time", features)
    show("head: features, kept from before", kept)
    show("head: features and training, the first time", features + training, full["training"])
    show("head: features and training, kept from before", kept + training, full["training"])
    show("any: plan (opening the data)", full["plan"])
    found = {
        "all": (full["training"], accuracy),
        "stage4": (stage4["training"], stage4_accuracy),
        "head": (training, probes[0][1]),
        "head, with its features computed": (features + training, probes[0][1]),
    }
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    values = {name: {**asdict(seconds), "accuracy": share} for name, (seconds, share) in found.items()}
    asked.json.write_text(json.dumps({"machine": machine(), "trainable": values}, indent=1) + "\n", encoding="utf-8")
    for what, seconds in (("training alone", training), ("with the features computed", features + training)):
        met = "met" if full["training"].wall >= BAR * seconds.wall and full["training"].cpu >= BAR * seconds.cpu else "NOT met"
        print(f"{BAR} times faster, {what}: {met}")


if __name__ == "__main__":
    main()
