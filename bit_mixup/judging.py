"""How good is a trained model, by which rule should it predict, and what did it learn besides?"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from timm.models.resnetv2 import ResNetV2
from torch import Tensor

from bit_mixup.corruption import Memorisation, memorisation
from bit_mixup.data import Part
from bit_mixup.diagnostics import adversarial_errors, in_between, jacobian_norms
from bit_mixup.evaluation import EvaluationReport, evaluate
from bit_mixup.examples import EvaluationView
from bit_mixup.expansion import DataMeans, decompose_loss
from bit_mixup.images import stack_pictures
from bit_mixup.models import Network, Normalize, build_bit, forward
from bit_mixup.planning import Plan
from bit_mixup.prediction import predict_logits
from bit_mixup.sampling import Purpose, generator
from bit_mixup.storage import plain_values
from bit_mixup.unmixing import MixupRecord, RuleChoice, choose_rule, predict_by_rule

DIAGNOSED = 256  # examples that diagnostics look at
LAMS = tuple(index / 10 for index in range(11))


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """Scores of a trained model.

    Args:
        choice: the rule that the test examples were predicted by, and why.
        logits: of the test examples as they are, (N, K).
        scores: whose softmax is what that rule predicts, (N, K).
        report: by that rule.
        raw: of the model as it is.
        validation: scores by that rule on held-out training examples, if some were asked for.
        memorisation: of corrupted labels, if some were.
        best_and_last: test error at the best step and at the last, where scores on the way were asked for.
        diagnosis: behaviour between, around and against test examples, if that was asked for.
    """

    choice: RuleChoice
    logits: Tensor
    scores: Tensor
    report: EvaluationReport
    raw: EvaluationReport
    validation: EvaluationReport | None
    memorisation: Memorisation | None
    best_and_last: tuple[float, float] | None
    diagnosis: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        best, last = self.best_and_last or (None, None)
        return self.report.as_dict() | {
            "prediction": asdict(self.choice),
            "raw": self.raw.as_dict() if self.choice.rule != "raw" else None,
            "validation": self.validation.as_dict() if self.validation else None,
            "memorisation": asdict(self.memorisation) if self.memorisation else None,
            "best_test_error": best,
            "last_test_error": last,
            "diagnosis": self.diagnosis,
        }

    def more(self) -> list[tuple[str, str]]:
        """Headings and text, for people, of what was measured besides the scores of the test examples."""
        found = []
        if self.validation:
            found.append(("Held out of the training split", f"{self._held_out(self.validation)}."))
        if self.memorisation:
            found.append(("Corrupted labels", self.memorisation.as_text()))
        if self.best_and_last:
            found.append(("Test error on the way", f"{self._way()}."))
        if self.diagnosis:
            found.append(("Between, around and against examples", _diagnosis_text(self.diagnosis)))
        return found

    def table(self, *, worst: int | None = None) -> str:
        """As Markdown, for people; with `worst`, only so many classes and few words."""
        text = self.report.table(worst=worst)
        if self.choice.rule != "raw" or self.choice.held_out_nll:
            text += f"\nPredicted by the rule {self.choice.rule}: {self.choice.why}.\n"
        if self.choice.rule != "raw":
            text += f"The model as it is: accuracy {self.raw.accuracy:.2%}, NLL {self.raw.nll:.4f}.\n"
        if self.validation:
            text += f"\n{'' if worst else '## '}Held out of the training split: {self._held_out(self.validation)}\n"
            text += "" if worst else f"\n{self.validation.table()}"
        if self.memorisation:
            text += f"\n## Corrupted labels\n\n{self.memorisation.as_text()}\n"
        if self.best_and_last:
            text += f"\nTest error on the way: {self._way()}.\n"
        if self.diagnosis:
            text += f"\n## Between, around and against examples\n\n{_diagnosis_text(self.diagnosis)}"
        return text

    def _held_out(self, report: EvaluationReport) -> str:
        owed = f" ({self.choice.owed_to_held_out} on these very examples)" if self.choice.owed_to_held_out else ""
        return f"{report.num_examples:,} examples{owed}, accuracy {report.accuracy:.2%}, NLL {report.nll:.4f}"

    def _way(self) -> str:
        best, last = self.best_and_last or (math.nan, math.nan)
        own = "" if self.choice.rule == "raw" else ", of the model as it is"
        return f"{best:.2%} at best, {last:.2%} at last{own}"


def judge(plan: Plan, model: ResNetV2, record: MixupRecord, accelerator: Accelerator, workers: int) -> Judgement:
    """Scores a trained model by the prediction rule that was asked for, in all processes together."""
    config, data = plan.config, plan.data
    normalize = Normalize.of(model)
    change = record.shrink_input(normalize.mean, normalize.std) if config.prediction_rule != "raw" else None

    def both(part: Part) -> tuple[Tensor, Tensor]:
        """Logits of pictures as they are, and shrunk."""
        logits = _logits(plan, model, part, accelerator, workers)
        return logits, _logits(plan, model, part, accelerator, workers, change) if change else logits

    def score(part: Part, logits: Tensor) -> EvaluationReport:
        return evaluate(logits, torch.from_numpy(part.labels), data.class_names)

    test = both(data.test)
    held_out = both(data.validation) if data.validation else None
    known = (*held_out, torch.from_numpy(data.validation.labels)) if held_out and data.validation else None
    choice = choose_rule(config.prediction_rule, record, known if config.prediction_rule != "raw" else None, seed=config.seed)

    def predicted(pair: tuple[Tensor, Tensor]) -> Tensor:
        return predict_by_rule(choice.rule, *pair, record, temperature=choice.temperature)

    memorised = None
    if plan.corruption is not None:
        predictions = _logits(plan, model, data.train, accelerator, workers).argmax(1).numpy()
        memorised = memorisation(predictions, plan.corruption)
    raw, scores = score(data.test, test[0]), predicted(test)
    return Judgement(
        choice=choice,
        logits=test[0],
        scores=scores,
        report=raw if choice.rule == "raw" else score(data.test, scores),
        raw=raw,
        validation=score(data.validation, predicted(held_out)) if held_out and data.validation else None,
        memorisation=memorised,
        best_and_last=_best_and_last(plan) if accelerator.is_main_process else None,
        diagnosis=_diagnose(plan, model) if config.diagnostics else None,
    )


def _logits(
    plan: Plan,
    model: ResNetV2,
    part: Part,
    accelerator: Accelerator,
    workers: int,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    view = EvaluationView(part=part, view=plan.view)
    return predict_logits(
        model,
        view,
        accelerator,
        batch_size=plan.pictures_at_a_time,
        num_workers=workers,
        precision=plan.environment.scoring_precision,
        change=change,
    )


def watch_scores(plan: Plan, model: ResNetV2, accelerator: Accelerator, workers: int) -> Callable[[int, Network], None] | None:
    """What scores a model, all or the head of which trains, on the test split into `scores.jsonl`, where that was asked for."""
    if plan.config.score_every is None:
        return None
    first = True

    def watch(done: int, _: Network) -> None:
        nonlocal first
        if first and accelerator.is_main_process:
            plan.run.trim_scores(done)
        first = False
        logits = _logits(plan, model, plan.data.test, accelerator, workers)
        report = evaluate(logits, torch.from_numpy(plan.data.test.labels), plan.data.class_names)
        if accelerator.is_main_process:
            plan.run.add_scores({"step": done, "accuracy": report.accuracy, "nll": report.nll})

    return watch


def _best_and_last(plan: Plan) -> tuple[float, float] | None:
    errors = [1 - row["accuracy"] for row in plan.run.read_scores()]
    return (min(errors), errors[-1]) if errors else None


def _diagnose(plan: Plan, model: ResNetV2) -> dict[str, Any]:
    """Diagnostics on a seeded sample of test examples, and the parts of mixup's loss on one of training examples."""
    seed, device = plan.config.seed, next(model.parameters()).device
    normalize = Normalize.of(model)

    def sample(part: Part, index: int) -> tuple[Tensor, Tensor]:
        rows = generator(seed, Purpose.DIAGNOSTICS, index).permutation(len(part))[:DIAGNOSED].tolist()
        pictures = stack_pictures([plan.view.evaluate(picture) for picture in part.read(rows)])
        images = normalize(torch.from_numpy(pictures).to(device), next(model.parameters()).dtype)
        return images, torch.from_numpy(part.labels[rows]).to(device)

    def network(images: Tensor) -> Tensor:
        return forward(model, images)

    images, labels = sample(plan.data.test, 1)
    train_images, train_labels = sample(plan.data.train, 2)
    alpha = plan.law.alpha or 1.0
    label = torch.bincount(train_labels, minlength=plan.data.num_classes) / len(train_labels)
    means = DataMeans(image=train_images.mean(0), label=label).to(train_images)
    batch_size = plan.pictures_at_a_time
    model.eval()
    source = build_bit(plan.attacker, keep_head=True).to(device).eval() if plan.attacker else None

    def attacked(by: ResNetV2 | None) -> dict[str, Any]:
        found = adversarial_errors(model, images, labels, normalize=normalize, source=by, batch_size=batch_size)
        return found.as_dict()

    # A sample of one class has no pairs to go between; the run is over, so that is no reason to fail.
    several = len(labels.unique()) > 1
    between = in_between(model, images, labels, lams=LAMS, seed=seed, batch_size=batch_size) if several else None
    parts = decompose_loss(network, train_images, train_labels, means, alpha=alpha, nodes=6, shifts=4, batch_size=batch_size)
    return {
        "examples": len(images),
        "in_between": between.as_dict() if between else None,
        "jacobian_norm": float(jacobian_norms(model, images, seed=seed, batch_size=batch_size).mean()),
        "adversarial": attacked(None),
        "transferred": attacked(source) | {"from": plan.config.attack_from} if source else None,
        "loss_parts": parts.as_dict() | plain_values({"alpha": alpha}),
    }


def _diagnosis_text(diagnosis: dict[str, Any]) -> str:
    """The diagnosis as Markdown."""
    between, attacked, parts = diagnosis["in_between"], diagnosis["adversarial"], diagnosis["loss_parts"]
    lines = [f"Measured on {diagnosis['examples']:,} test examples, the parts of the loss on as many training examples.", ""]
    if between:
        heads = ("weight of the first of two examples", "neither is predicted", "norm of the input gradient")
        one, two, three = map(len, heads)  # columns are as wide as their heads: the page shows this text as it is
        lines += [f"| {' | '.join(heads)} |", f"|{'-' * (one + 1)}:|{'-' * (two + 1)}:|{'-' * (three + 1)}:|"]
        columns = (between["lams"], between["miss_rate"], between["gradient_norm"])
        lines += [
            f"| {lam:>{one}.1f} | {miss:>{two}.1%} | {norm:>{three}.4f} |" for lam, miss, norm in zip(*columns, strict=True)
        ]
    else:
        lines.append("All of them are of one class: nothing lies between two.")
    lines += [
        "",
        f"Norm of the logits' Jacobian, mean: {diagnosis['jacobian_norm']:.4f}",
        f"Mixup's loss at alpha {parts['alpha']}: {parts['mixup']:.4f} = {parts['erm']:.4f} plain {parts['shrinkage']:+.4f} by "
        f"shrinking {parts['perturbation']:+.4f} by noise; its floor is {parts['floor']:.4f}",
        f"Error {attacked['clean']:.1%}; changed by {attacked['epsilon']:g} grey levels {attacked['fgsm']:.1%} in one step, "
        f"{attacked['iterative_fgsm']:.1%} in {attacked['steps']}. {attacked['caveat']}",
    ]
    if moved := diagnosis["transferred"]:
        lines.append(
            f"With pictures made to fool {moved['from']}: {moved['fgsm']:.1%} in one step, {moved['iterative_fgsm']:.1%} in "
            f"{moved['steps']}."
        )
    return "\n".join(lines) + "\n"
