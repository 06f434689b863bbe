"""What does mixup do on a data set of yours? One factor at a time around a base, and a report that says what was seen.

    make mixup-study
    python recipes/mixup_study.py --dataset path/to/folders --model resnetv2_50x1_bit.goog_in21k --examples-per-class 100

Each run is one of `bit_mixup.transfer` in a folder of its own, with the logits of all test examples; what is done is skipped, so
a stopped study goes on where it stopped. Weights and checkpoints of finished runs are removed. Two variants are compared over the
same test examples and the same seeds (a seed draws the training examples, the batches and the mixing): the difference has a
two-way standard error, over seeds and over examples, and an interval from Student's t with one degree of freedom less than seeds.
The folder then holds `report.html`, which needs nothing else, and `results.json` with the scores of each run.
"""

import argparse
import base64
import io
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

import bit_mixup
from bit_mixup import calibration
from bit_mixup.calibration import measure_calibration, reliability_bins
from bit_mixup.environment import versions
from bit_mixup.errors import BitMixupError
from bit_mixup.examples import EvaluationView
from bit_mixup.laws import Rule
from bit_mixup.models import Normalize, save_model
from bit_mixup.plots import reliability_diagram
from bit_mixup.prediction import predict_logits
from bit_mixup.storage import read_json, whole_folder, write_json, write_text
from bit_mixup.theory import mixing_moments
from bit_mixup.unmixing import predict_by_rule
from bit_mixup.weights import find_weights

LOGITS = "logits.safetensors"
ALPHAS = (0.1, 0.2, 0.4, 1.0, 8.0, math.inf)
CHOSEN = 1.0  # the alpha of the comparisons that need one
DIAGNOSED = {
    "erm": "ERM",
    f"mixup-{CHOSEN:g}": f"mixup, alpha {CHOSEN:g}",
    "approximate": "approximate mixup",
}  # their first seed

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Variant:
    """Options of `bit_mixup.transfer` that a variant changes in the base.

    Args:
        name: also of its folder.
        label: for people.
        options: in place of the base's.
        seeds: how many runs.
    """

    name: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    seeds: int = 3


def variants(asked: argparse.Namespace) -> list[Variant]:
    """All variants of the study, the base first."""
    steps, mix = asked.steps, {"mixup_alpha": CHOSEN}
    found = [Variant("erm", "ERM", {}, asked.seeds)]
    found += [Variant(f"mixup-{a:g}", f"mixup, alpha {a:g}", {"mixup_alpha": a}, asked.seeds) for a in ALPHAS]
    for share in (0.5, 2):
        count = round(steps * share)
        found += [Variant(f"erm-{count}-steps", f"ERM, {count} steps", {"steps": count}, asked.seeds)]
        found += [Variant(f"mixup-{count}-steps", f"mixup, {count} steps", mix | {"steps": count}, asked.seeds)]
    for decay in (1e-4, 5e-4):
        found += [Variant(f"erm-decay-{decay:g}", f"ERM, weight decay {decay:g}", {"weight_decay": decay})]
        found += [Variant(f"mixup-decay-{decay:g}", f"mixup, weight decay {decay:g}", mix | {"weight_decay": decay})]
    smooth = round(1 - mixing_moments(CHOSEN).theta_bar, 6)
    found += [
        Variant("inputs", "inputs only", mix | {"mixup_of": "inputs"}),
        Variant("labels", "labels only", mix | {"mixup_of": "labels"}),
        Variant("smoothing", f"label smoothing {smooth:g}", {"label_smoothing": smooth, "smooth_toward": "frequencies"}),
        Variant("inputs-smoothing", "inputs only, label smoothing 0.1", mix | {"mixup_of": "inputs", "label_smoothing": 0.1}),
        Variant("same-class", "partners of the same class", mix | {"mixup_partner": "same_class"}),
        Variant("neighbours", "partners among neighbours", mix | {"mixup_partner": "neighbours"}),
        Variant("each", "a weight for each example", mix | {"mixup_lam": "example"}),
        Variant("cool-down", "no mixing in the last 30 %", mix | {"cool_down": 0.3}),
        *(Variant(f"stage-{stage}", f"mixed after stage {stage}", mix | {"mixup_stage": stage}) for stage in (1, 4)),
        Variant("noise", "input noise 0.1", {"input_noise": 0.1}),
        Variant("dropout", "dropout 0.5", {"feature_dropout": 0.5}),
        Variant("mixup-dropout", "mixup and dropout 0.5", mix | {"feature_dropout": 0.5}),
        Variant("modified", "ERM on the modified data", mix | {"mixup_form": "modified"}),
        Variant("approximate", "approximate mixup", mix | {"mixup_form": "approximate"}),
    ]
    for width in ("half", "whole"):
        scratch = {"model": width, "examples_per_class": None, "base_lr": asked.scratch_lr, "steps": 2 * steps}
        found += [Variant(f"scratch-{width}-erm", f"from scratch, {width} width, ERM", scratch)]
        found += [Variant(f"scratch-{width}-mixup", f"from scratch, {width} width, mixup", scratch | mix)]
    noisy = {"examples_per_class": asked.noisy_examples, "base_lr": asked.noisy_lr, "steps": round(1.5 * steps)}
    noisy["score_every"] = max(1, round(0.3 * steps))
    for share in (0.2, 0.5, 0.8):
        for name, alpha in (("erm", 0.0), ("mixup-8", 8.0), ("mixup-32", 32.0)):
            label = f"{share:.0%} of labels wrong, {'ERM' if not alpha else f'mixup, alpha {alpha:g}'}"
            found += [Variant(f"wrong-{share:g}-{name}", label, noisy | {"corrupt_labels": share, "mixup_alpha": alpha})]
    return found


# ---- running


def starting_weights(folder: Path, width: str, seed: int) -> Path:
    """Random weights of the bundled architecture, of half or whole width, in timm's hub layout."""
    target = folder / "random" / f"{width}-{seed}"
    if not (target / "config.json").is_file():
        weights = find_weights("bundled")
        args = {name: value for name, value in weights.model_args.items() if name not in ("in_chans", "global_pool")}
        if width == "half":
            args |= {"channels": [channels // 2 for channels in args["channels"]], "stem_chs": args["stem_chs"] // 2}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = timm.create_model(weights.architecture, pretrained=False, num_classes=2, **args)
        size = weights.input_size
        view = bit_mixup.images.View(resize_size=size, crop_size=size, flip=False, interpolation=weights.interpolation)
        save_model(model, target, label_names=["a", "b"], view=view, std_eps=1e-8)
    return target


def options_of(asked: argparse.Namespace, variant: Variant, seed: int) -> dict[str, Any]:
    """The whole request of one run."""
    base: dict[str, Any] = {
        "dataset": asked.dataset,
        "model": asked.model,
        "resolution": "model",
        "examples_per_class": asked.examples_per_class,
        "few_shot_seed": seed,
        "seed": seed,
        "steps": asked.steps,
        "batch_size": 64,
        "base_lr": asked.base_lr,
        "flip": asked.flip,
        "mixup_alpha": 0.0,
        "threads": asked.threads,
        "num_workers": asked.num_workers,
        "log_every": 50,
        "save_every": 10_000,
        "keep_checkpoints": 1,
        "output_dir": asked.folder / "runs" / f"{variant.name}-{seed}",
        "overwrite": True,
    }
    options = base | variant.options
    if seed == 0 and variant.name in DIAGNOSED:
        options["diagnostics"] = True
        source = asked.folder / "source"
        if variant.name != "erm" and (source / "config.json").is_file():
            options["attack_from"] = source
    if options["model"] in ("half", "whole"):
        options["model"] = str(starting_weights(asked.folder, options["model"], seed))
    return options


def run_one(asked: argparse.Namespace, variant: Variant, seed: int) -> None:
    """One run, and its logits on the test split by the rules that undo its shrinkage."""
    folder = asked.folder / "runs" / f"{variant.name}-{seed}"
    began = time.perf_counter()
    result = bit_mixup.transfer(**options_of(asked, variant, seed))
    model, data, record = result.model, result.plan.data, result.record
    values = {"raw": result.logits.double()}
    if variant.name in {f"mixup-{alpha:g}" for alpha in ALPHAS}:
        normalize = Normalize.of(model)
        change = record.shrink_input(normalize.mean, normalize.std)
        assert change is not None
        view = EvaluationView(part=data.test, view=result.plan.view)
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        shrunk = predict_logits(model, view, accelerator, num_workers=asked.num_workers, change=change).double()
        rules: tuple[Rule, ...] = ("eq15", "temperature", "unshrink")
        values |= {rule: predict_by_rule(rule, values["raw"], shrunk, record) for rule in rules}
    facts: dict[str, Any] = {"variant": variant.name, "seed": seed, "threads": result.plan.environment.threads}
    facts["seconds"] = time.perf_counter() - began
    if variant.name == "erm" and seed == 0:  # before the scores, which say that the run is done
        shutil.copytree(folder / "model", asked.folder / "source", dirs_exist_ok=True)
    with whole_folder(folder / "scores") as scores:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in values.items()}, scores / LOGITS)
        safetensors.torch.save_file({"labels": torch.from_numpy(data.test.labels)}, scores / "labels.safetensors")
        write_json(scores / "facts.json", facts)
    shutil.rmtree(folder / "model", ignore_errors=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def run_all(asked: argparse.Namespace, chosen: Sequence[Variant]) -> None:
    """All runs that are not done yet."""
    todo = [(v, s) for v in chosen for s in range(v.seeds) if not (asked.folder / "runs" / f"{v.name}-{s}" / "scores").is_dir()]
    done = sum(v.seeds for v in chosen) - len(todo)
    began = time.monotonic()
    for index, (variant, seed) in enumerate(todo):
        run_one(asked, variant, seed)
        minutes = (time.monotonic() - began) / 60
        left = minutes / (index + 1) * (len(todo) - index - 1)
        print(
            f"== {done + index + 1} of {done + len(todo)} runs: {variant.label}, seed {seed}; about {left:.0f} minutes left ==",
            flush=True,
        )


# ---- statistics


@dataclass(frozen=True)
class Runs:
    """What the runs of a variant say of the test examples.

    Args:
        variant: whose.
        logits: by rule, (seeds, N, K).
        labels: (N,).
    """

    variant: Variant
    logits: dict[str, Tensor]
    labels: Tensor

    def correct(self, rule: str = "raw") -> Array:
        """(seeds, N) of 0 and 1."""
        found: Array = (self.logits[rule].argmax(2) == self.labels).double().numpy()
        return found

    def nll(self, rule: str = "raw") -> Array:
        """(seeds, N) in nats."""
        rows: Array = torch.stack([F.cross_entropy(z, self.labels, reduction="none") for z in self.logits[rule]]).numpy()
        return rows

    def reports(self, rule: str = "raw") -> list[Any]:
        """A calibration report for each seed."""
        return [measure_calibration(logits, self.labels) for logits in self.logits[rule]]


def load_runs(folder: Path, variant: Variant) -> Runs:
    """Reads the logits of a variant's runs and adds those of a temperature that is fitted on the other half of the test split."""
    places = [folder / "runs" / f"{variant.name}-{seed}" / "scores" for seed in range(variant.seeds)]
    files = [safetensors.torch.load_file(place / LOGITS) for place in places]
    labels = safetensors.torch.load_file(places[0] / "labels.safetensors")["labels"]
    logits = {rule: torch.stack([file[rule] for file in files]) for rule in files[0]}
    logits["fitted"] = torch.stack([cross_fitted(z, labels) for z in logits["raw"]])
    return Runs(variant, logits, labels)


def cross_fitted(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits divided by a temperature fitted on the other half of the examples (even and odd rows)."""
    rows = torch.arange(len(labels))
    return calibration.cross_fitted(logits, labels, rows[::2], rows[1::2])


def read_diagnosis(folder: Path, name: str) -> dict[str, Any]:
    """Behaviour between and against test examples of a variant's first run."""
    found: dict[str, Any] = read_json(folder / "runs" / f"{name}-0" / "report.json")["diagnosis"]
    return found


@dataclass(frozen=True)
class Difference:
    """A difference over the same seeds and test examples.

    Args:
        mean: first less second.
        detectable: the smallest difference whose 95 % interval leaves out 0.
        better: whether larger is better.
        same: whether the two agree on every example of every seed.
    """

    mean: float
    detectable: float
    better: bool = True
    same: bool = False

    @property
    def verdict(self) -> str:
        """yes (the first is better), no (it is worse), or not distinguishable here."""
        if self.same:
            return "not distinguishable here (the same on every example)"
        if not abs(self.mean) > self.detectable:
            return f"not distinguishable here (smallest detectable difference {self.detectable:.4f})"
        return "yes" if (self.mean > 0) == self.better else "no"

    @property
    def text(self) -> str:
        """With its interval."""
        return f"{self.mean:+.4f} (95 %: {self.mean - self.detectable:+.4f} to {self.mean + self.detectable:+.4f})"


def compare(first: Array, second: Array, *, better: bool = True) -> Difference:
    """The mean of first - second, (seeds, N) each, with a two-way standard error.

    With rows (seeds) and columns (examples) as random effects the variance of the grand mean is V_rows / S + V_columns / N -
    V_residual / (S N), V_rows and V_columns being the variances of row and of column means. The interval is
    too wide rather than too narrow where examples vary more than seeds.
    """
    seeds = min(len(first), len(second))
    table = first[:seeds] - second[:seeds]
    rows, columns = table.mean(1), table.mean(0)
    residual = table - rows[:, None] - columns[None] + table.mean()
    free = max((seeds - 1) * (table.shape[1] - 1), 1)
    variance = rows.var(ddof=1) / seeds + columns.var(ddof=1) / table.shape[1] - (residual**2).sum() / free / table.size
    least = rows.var(ddof=1) / seeds  # never less than the seeds alone say
    error = math.sqrt(max(variance, least, 0.0))
    return Difference(float(table.mean()), float(stats.t.ppf(0.975, seeds - 1) * error), better, same=not table.any())


# ---- questions


@dataclass(frozen=True)
class Answer:
    """One question of the study.

    Args:
        question: for people.
        literature: what papers say, with its source.
        differences: label and difference, the deciding one first.
        verdict: yes, no, or not distinguishable here; and what it means.
    """

    question: str
    literature: str
    differences: list[tuple[str, Difference]]
    verdict: str


def answers(runs: dict[str, Runs]) -> list[Answer]:
    """The questions of the study, answered from its runs."""
    erm, mix = runs["erm"], runs[f"mixup-{CHOSEN:g}"]
    accuracy, likelihood = (
        (lambda a, b: compare(a.correct(), b.correct())),
        (lambda a, b: compare(a.nll(), b.nll(), better=False)),
    )
    found = [
        Answer(
            f"Does mixup (alpha {CHOSEN:g}) beat ERM here?",
            "Zhang et al. (2018, tables 1 and 5): yes on ImageNet and CIFAR-10. BiT (2020) mixes only from 20,000 examples on.",
            [("accuracy", accuracy(mix, erm)), ("NLL", likelihood(mix, erm))],
            "",
        ),
        best_of(
            "Which alpha is best?",
            "Zhang et al. (2018): 0.2 and 0.4 on ImageNet (table 1), 1 in the authors' code for CIFAR-10. BiT (2020): 0.1.",
            [erm, *(runs[f"mixup-{alpha:g}"] for alpha in ALPHAS)],
        ),
        interaction(
            "Does mixup help more with more steps?",
            "Zhang et al. (2018, table 1): on ImageNet its gain is larger at 200 epochs than at 90.",
            *step_pairs(runs),
        ),
        interaction(
            "Does mixup help more with a larger model? (Both from scratch, on all training examples.)",
            "Zhang et al. (2018, table 1): on ImageNet at 90 epochs ResNet-101 gains more than ResNet-50.",
            (runs["scratch-whole-mixup"], runs["scratch-whole-erm"]),
            (runs["scratch-half-mixup"], runs["scratch-half-erm"]),
        ),
        Answer(
            "Is a small weight decay better with mixup?",
            "Zhang et al. (2018, table 5): on CIFAR-10 ERM is better with 5e-4, mixup with 1e-4.",
            [
                ("mixup, accuracy at 1e-4 less that at 5e-4", accuracy(runs["mixup-decay-0.0001"], runs["mixup-decay-0.0005"])),
                ("ERM, the same", accuracy(runs["erm-decay-0.0001"], runs["erm-decay-0.0005"])),
            ],
            "",
        ),
        best_of(
            "Should inputs be mixed, labels, or both?",
            "Thulasidasan et al. (2019), on calibration: mixing inputs without labels does not give the benefit.",
            [mix, runs["inputs"], runs["labels"], runs["smoothing"]],
        ),
        Answer(
            "Is dropout compatible with mixup: is the accuracy of both together above that of mixup alone?",
            "Zhang et al. (2018, table 2): on CIFAR-10 with half of the labels wrong, or more, the two together are best.",
            [
                ("accuracy, mixup with dropout less mixup", accuracy(runs["mixup-dropout"], mix)),
                ("NLL", likelihood(runs["mixup-dropout"], mix)),
                ("accuracy, ERM with dropout less ERM", accuracy(runs["dropout"], erm)),
            ],
            "",
        ),
        prediction(runs),
        likeness(mix, runs["approximate"]),
        corrupted(runs),
    ]
    return [a if a.verdict else Answer(a.question, a.literature, a.differences, a.differences[0][1].verdict) for a in found]


def confidences(runs: Runs, rule: str = "raw") -> Array:
    """(seeds, N) probabilities of the predicted classes."""
    found: Array = runs.logits[rule].softmax(2).amax(2).numpy()
    return found


def best_of(question: str, literature: str, rivals: Sequence[Runs]) -> Answer:
    """Which has the highest accuracy, and which cannot be told from it."""
    seeds = min(r.variant.seeds for r in rivals)  # all are compared over the seeds that all have
    best = max(rivals, key=lambda r: float(r.correct()[:seeds].mean()))
    pairs = [(r.variant.label, compare(best.correct()[:seeds], r.correct()[:seeds])) for r in rivals if r is not best]
    alike = [label for label, difference in pairs if abs(difference.mean) <= difference.detectable]
    verdict = f"{best.variant.label}: the highest accuracy"
    verdict += f"; not distinguishable from it: {'; '.join(alike)}" if alike else ", above each of the others"
    rows = [(f"accuracy, {best.variant.label} less {label}", difference) for label, difference in pairs]
    rows += [(f"NLL, {best.variant.label} less {r.variant.label}", compare(best.nll()[:seeds], r.nll()[:seeds], better=False))
             for r in rivals if r is not best]  # fmt: skip
    return Answer(question, literature, rows, verdict)


def likeness(mix: Runs, other: Runs) -> Answer:
    """Whether approximate mixup leaves a model like mixup's."""
    differences = {
        "accuracy": compare(mix.correct(), other.correct()),
        "NLL": compare(mix.nll(), other.nll(), better=False),
        "confidence": compare(confidences(mix), confidences(other)),
    }
    parts = []
    for name, found in differences.items():
        told = abs(found.mean) > found.detectable
        apart = f"mixup's is {'higher' if found.mean > 0 else 'lower'} by {abs(found.mean):.4f}"
        parts.append(f"{name}: {apart if told else found.verdict}")
    literature = (
        "Carratino et al. (2022, theorem 2) derive it as the quadratic expansion of mixup's loss; without R2 here, which holds "
        "second derivatives of the network and is not 0 for a BiT."
    )
    rows = [(f"{name}, mixup less approximate", found) for name, found in differences.items()]
    return Answer("Is approximate mixup like mixup?", literature, rows, "; ".join(parts))


def step_pairs(runs: dict[str, Runs]) -> tuple[tuple[Runs, Runs], tuple[Runs, Runs]]:
    """Mixup and ERM at the most and at the fewest steps."""
    counts = sorted(int(name.split("-")[1]) for name in runs if name.startswith("erm-") and name.endswith("-steps"))
    most, fewest = ((runs[f"mixup-{count}-steps"], runs[f"erm-{count}-steps"]) for count in (counts[-1], counts[0]))
    return most, fewest


def interaction(question: str, literature: str, first: tuple[Runs, Runs], second: tuple[Runs, Runs]) -> Answer:
    """Whether mixup's gain is larger in one setting than in another."""
    gains = [mixed.correct() - plain.correct() for mixed, plain in (first, second)]
    both = [
        (f"accuracy, {m.variant.label} less {e.variant.label}", compare(m.correct(), e.correct())) for m, e in (first, second)
    ]
    return Answer(question, literature, [("first gain below less the second", compare(gains[0], gains[1])), *both], "")


def prediction(runs: dict[str, Runs]) -> Answer:
    """What equation (15) and a temperature do to models trained with mixup."""
    differences = []
    for alpha in (0.1, 0.4, CHOSEN):
        own = runs[f"mixup-{alpha:g}"]
        raw = own.nll()
        for rule, label in (("eq15", "equation (15)"), ("temperature", "temperature theta_bar alone"), ("fitted", "fitted T")):
            differences.append((f"alpha {alpha:g}, NLL, {label} less raw", compare(own.nll(rule), raw, better=False)))
    helped = [d.verdict.split(" (")[0] for label, d in differences if "equation" in label]
    verdict = "; ".join(f"alpha {a:g}: {text}" for a, text in zip((0.1, 0.4, CHOSEN), helped, strict=True))
    literature = (
        "Carratino et al. (2022) propose it to undo the shrinkage of training. Of a BiT it is nearly the temperature alone: a "
        "BiT's logits do not change with the scale of its input."
    )
    return Answer("Does equation (15) help the likelihood, and what does temperature alone do?", literature, differences, verdict)


def corrupted(runs: dict[str, Runs]) -> Answer:
    """Mixup against ERM with wrong labels."""
    differences = [
        (
            f"{share:.0%} wrong, accuracy, alpha {alpha} less ERM",
            compare(runs[f"wrong-{share:g}-mixup-{alpha}"].correct(), runs[f"wrong-{share:g}-erm"].correct()),
        )
        for share in (0.2, 0.5, 0.8)
        for alpha in (8, 32)
    ]
    verdict = "; ".join(f"{label.split(', accuracy, ')[0]}, {label.split(', ')[2].split(' less')[0]}: {d.verdict.split(' (')[0]}"
                        for label, d in differences)  # fmt: skip
    literature = "Zhang et al. (2018, table 2): on CIFAR-10 mixup (alpha 8, 32) memorises fewer wrong labels and tests better."
    return Answer("Does a strong mixup help when labels are wrong?", literature, differences, verdict)


# ---- report


def embed(figure: Figure) -> str:
    """A figure as a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def mean_sd(values: Sequence[float], form: str = ".4f") -> str:
    """Mean and standard deviation over seeds."""
    spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


def table_rows(runs: dict[str, Runs]) -> list[dict[str, str]]:
    """Scores of all variants, mean and standard deviation over seeds."""
    rows = []
    for own in runs.values():
        reports = own.reports()
        rows.append(
            {
                "label": own.variant.label,
                "folder": f"{own.variant.name}-0" + (f" … {own.variant.seeds - 1}" if own.variant.seeds > 1 else ""),
                "accuracy": mean_sd(own.correct().mean(1).tolist()),
                "nll": mean_sd(own.nll().mean(1).tolist()),
                "ece": mean_sd([r.expected_calibration_error for r in reports]),
                "floor": f"{np.mean([r.floor.mean for r in reports]):.4f}",
                "gap": mean_sd([r.gap for r in reports]),
            }
        )
    return rows


def rule_rows(runs: dict[str, Runs]) -> list[dict[str, str]]:
    """NLL, ECE and accuracy by prediction rule, for each alpha."""
    rows = []
    for alpha in ALPHAS:
        own = runs[f"mixup-{alpha:g}"]
        for rule in ("raw", "eq15", "temperature", "unshrink", "fitted"):
            rows.append(
                {
                    "alpha": f"{alpha:g}",
                    "theta_bar": f"{mixing_moments(alpha).theta_bar:.4f}",
                    "rule": rule,
                    "accuracy": mean_sd(own.correct(rule).mean(1).tolist()),
                    "nll": mean_sd(own.nll(rule).mean(1).tolist()),
                    "ece": mean_sd([r.expected_calibration_error for r in own.reports(rule)]),
                }
            )
    return rows


def noise_rows(folder: Path, runs: dict[str, Runs]) -> list[dict[str, str]]:
    """Memorisation and best and last test error under wrong labels."""
    rows = []
    for name, own in runs.items():
        if not name.startswith("wrong-"):
            continue
        reports = [read_json(folder / "runs" / f"{name}-{seed}" / "report.json") for seed in range(own.variant.seeds)]
        rows.append(
            {
                "label": own.variant.label,
                "best": mean_sd([r["best_test_error"] for r in reports], ".3f"),
                "last": mean_sd([r["last_test_error"] for r in reports], ".3f"),
                "real": mean_sd([r["memorisation"]["error_on_real"] for r in reports], ".3f"),
                "corrupted": mean_sd([r["memorisation"]["error_on_corrupted"] for r in reports], ".3f"),
            }
        )
    return rows


def plots(folder: Path, runs: dict[str, Runs]) -> list[tuple[str, str]]:
    """Pictures with their captions."""
    drawn = [plot_alphas(runs), plot_confidence(runs), plot_in_between(folder)]
    return [(embed(figure), caption) for figure, caption in drawn]


def reliability(runs: dict[str, Runs]) -> list[str]:
    """Reliability diagrams of ERM, and of mixup by three rules, all seeds together."""
    mix = runs[f"mixup-{CHOSEN:g}"]
    drawn = []
    for title, own, rule in (
        ("ERM", runs["erm"], "raw"),
        (mix.variant.label, mix, "raw"),
        (f"{mix.variant.label}, by equation (15)", mix, "eq15"),
        (f"{mix.variant.label}, fitted temperature", mix, "fitted"),
    ):
        logits = own.logits[rule]
        bins = reliability_bins(logits.softmax(2).flatten(0, 1), own.labels.repeat(len(logits)))
        drawn.append(embed(reliability_diagram(bins, title=title)))
    return drawn


def plot_alphas(runs: dict[str, Runs]) -> tuple[Figure, str]:
    """Accuracy, NLL and the confidence gap by alpha."""
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    chosen = [runs["erm"], *(runs[f"mixup-{alpha:g}"] for alpha in ALPHAS)]
    names = ["0", *(f"{alpha:g}" for alpha in ALPHAS)]
    measures: list[tuple[str, Callable[[Runs], list[float]]]] = [
        ("accuracy", lambda r: r.correct().mean(1).tolist()),
        ("NLL (nats)", lambda r: r.nll().mean(1).tolist()),
        ("confidence less accuracy", lambda r: [report.gap for report in r.reports()]),
    ]
    for axes, (title, measure) in zip(figure.subplots(1, 3), measures, strict=True):
        for place, own in enumerate(chosen):
            values = measure(own)
            axes.plot([place] * len(values), values, ".", color="0.6", markersize=4)
        axes.plot(range(len(chosen)), [np.mean(measure(own)) for own in chosen], "o-", color="#0072b2")
        axes.set_xticks(range(len(chosen)), names)
        axes.set(xlabel="alpha", title=title)
        if "less" in title:
            axes.axhline(0, color="0.3", linewidth=0.8)
    return figure, "By alpha: each run (grey) and the mean over seeds. Below 0 in the right plot predictions are under-confident."


def plot_confidence(runs: dict[str, Runs]) -> tuple[Figure, str]:
    """Histograms of confidence."""
    figure = Figure(figsize=(9.5, 2.8), layout="constrained")
    mix = runs[f"mixup-{CHOSEN:g}"]
    shown = [
        ("ERM", confidences(runs["erm"])),
        (f"mixup, alpha {CHOSEN:g}", confidences(mix)),
        ("the same by equation (15)", confidences(mix, "eq15")),
        ("approximate mixup", confidences(runs["approximate"])),
    ]
    for axes, (title, values) in zip(figure.subplots(1, 4, sharey=True), shown, strict=True):
        axes.hist(
            values.ravel(), bins=np.linspace(0, 1, 21).tolist(), color="#0072b2", weights=np.full(values.size, 1 / values.size)
        )
        axes.set(title=title, xlabel="confidence", xlim=(0, 1), xticks=[0, 0.5, 1])
    return figure, "Share of test predictions by confidence, all seeds."


def plot_in_between(folder: Path) -> tuple[Figure, str]:
    """Miss rate and gradient norm on the line between two examples."""
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in DIAGNOSED.items():
        found = read_diagnosis(folder, name)["in_between"]
        if found is None:
            return figure, "All sampled test examples are of one class: nothing lies between two."
        left.plot(found["lams"], found["miss_rate"], label=label)
        right.plot(found["lams"], found["gradient_norm"], label=label)
    left.set(xlabel="weight of the first example", title="neither class is predicted")
    right.set(xlabel="weight of the first example", title="norm of the input gradient of the loss")
    left.legend()
    return figure, f"Between test examples of different class, seed 0, {found['pairs']} pairs."


def attack_rows(folder: Path) -> list[dict[str, str]]:
    """Errors under attack of the diagnosed runs, seed 0."""
    rows = []
    for name, label in DIAGNOSED.items():
        found = read_diagnosis(folder, name)
        own, other = found["adversarial"], found["transferred"]
        rows.append(
            {
                "label": label,
                "clean": f"{own['clean']:.3f}",
                "fgsm": f"{own['fgsm']:.3f}",
                "iterative": f"{own['iterative_fgsm']:.3f}",
                "transferred": f"{other['fgsm']:.3f} / {other['iterative_fgsm']:.3f}" if other else "-",
                "jacobian": f"{found['jacobian_norm']:.3f}",
                "caveat": own["caveat"],
            }
        )
    return rows


def write_report(asked: argparse.Namespace, chosen: Sequence[Variant]) -> Path:
    """Writes report.html and results.json from the finished runs."""
    runs = {variant.name: load_runs(asked.folder, variant) for variant in chosen}
    answered = answers(runs)
    rows, rules = table_rows(runs), rule_rows(runs)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("mixup_study.html.j2").read_text(encoding="utf-8"))
    facts = {path.parts[-3]: read_json(path) for path in sorted((asked.folder / "runs").glob("*/scores/facts.json"))}
    text = template.render(
        setup=setup_of(asked),
        count=len(facts),
        minutes=sum(fact["seconds"] for fact in facts.values()) / 60,
        threads=sorted({fact["threads"] for fact in facts.values()}),
        answers=answered,
        rows=rows,
        rules=rules,
        noise=noise_rows(asked.folder, runs),
        attacks=attack_rows(asked.folder),
        plots=plots(asked.folder, runs),
        reliability=reliability(runs),
        test_examples=len(runs["erm"].labels),
        versions=versions(),
    )
    write_text(asked.folder / "report.html", text)
    found = [
        {"question": a.question, "verdict": a.verdict,
         "differences": {label: {"mean": d.mean, "detectable": d.detectable} for label, d in a.differences}}
        for a in answered
    ]  # fmt: skip
    scores = {
        f"{name}-{seed}": {"accuracy": float(accuracy), "nll": float(nll), "ece": report.expected_calibration_error}
        for name, own in runs.items()
        for seed, (accuracy, nll, report) in enumerate(zip(own.correct().mean(1), own.nll().mean(1), own.reports(), strict=True))
    }
    results = {
        "setup": setup_of(asked),
        "versions": versions(),
        "answers": found,
        "variants": rows,
        "rules": rules,
        "runs": scores,
    }
    write_json(asked.folder / "results.json", results)
    return Path(asked.folder / "report.html")


def setup_of(asked: argparse.Namespace) -> dict[str, Any]:
    """What a folder's runs have in common."""
    names = (
        "dataset",
        "model",
        "examples_per_class",
        "noisy_examples",
        "steps",
        "seeds",
        "base_lr",
        "noisy_lr",
        "scratch_lr",
        "flip",
    )
    return {name: getattr(asked, name) for name in names}


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs what is not done yet and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="as of bit-mixup fine-tune")
    parser.add_argument("--model", default="bundled", help="as of bit-mixup fine-tune")
    parser.add_argument("--examples-per-class", type=int, default=5, help="training examples of each class, drawn by the seed")
    parser.add_argument("--noisy-examples", type=int, default=50, help="the same for the runs with wrong labels")
    parser.add_argument("--steps", type=int, default=100, help="of the base, 64 pictures each")
    parser.add_argument("--seeds", type=int, default=5, help="of the main comparisons; the others have 3")
    parser.add_argument("--base-lr", type=float, default=0.003)
    parser.add_argument("--noisy-lr", type=float, default=0.01, help="of the runs with wrong labels: large enough to learn these")
    parser.add_argument("--scratch-lr", type=float, default=0.1, help="of the runs from random weights")
    parser.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror half of the training pictures"
    )
    parser.add_argument("--threads", type=int, help="of torch; all cores unless given")
    parser.add_argument("--num-workers", type=int, default=0, help="loader processes; small pictures need none")
    parser.add_argument("--folder", type=Path, default=Path("runs/mixup-study"))
    parser.add_argument("--only", nargs="+", help="names of variants to run; without a report")
    asked = parser.parse_args(argv)
    if asked.seeds < 2:
        parser.error("--seeds must be 2 or more: without a second seed there is no spread.")
    marker = asked.folder / "study.json"
    begun = marker.is_file() and any(asked.folder.glob("runs/*/scores"))
    if begun and read_json(marker) != setup_of(asked):
        parser.error(f"{asked.folder} holds a study of another setup: {read_json(marker)}. Choose another --folder.")
    chosen = variants(asked)
    if asked.only and (unknown := set(asked.only) - {variant.name for variant in chosen}):
        parser.error(f"--only names no variant: {', '.join(sorted(unknown))}. There are {', '.join(v.name for v in chosen)}.")
    write_json(marker, setup_of(asked))
    try:
        run_all(asked, [variant for variant in chosen if not asked.only or variant.name in asked.only])
    except BitMixupError as error:
        raise SystemExit(f"mixup_study.py: error: {error}") from error
    if asked.only:
        return marker
    report = write_report(asked, chosen)
    print(f"{report}\n{asked.folder / 'results.json'}")
    return report


if __name__ == "__main__":
    main()
