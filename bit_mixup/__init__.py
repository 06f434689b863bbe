"""bit_mixup: transfer a pretrained BiT to your pictures.

    import bit_mixup
    result = bit_mixup.transfer(dataset="path/to/class/folders")
    print(result.report.accuracy)

Names are imported when they are first used, so that importing the package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bit_mixup.calibration import CalibrationReport, TemperatureFit, fit_temperature, measure_calibration
    from bit_mixup.catalog import list_bit_models
    from bit_mixup.classifier import Classifier, Prediction, load
    from bit_mixup.comparison import Comparison, compare_runs
    from bit_mixup.config import DistillConfig, PretrainConfig, TransferConfig
    from bit_mixup.corruption import CorruptedLabels, corrupt_labels, memorisation
    from bit_mixup.data import ImageDataset, load_image_dataset
    from bit_mixup.diagnostics import AdversarialErrors, InBetween, adversarial_errors, attack, in_between, jacobian_norms
    from bit_mixup.errors import (
        BitMixupError,
        CheckpointError,
        ConfigError,
        DataError,
        NonFiniteError,
        PublishError,
        WeightsError,
    )
    from bit_mixup.evaluation import EvaluationReport, MultiLabelReport, evaluate, evaluate_multi_label
    from bit_mixup.examples import ArrayImages
    from bit_mixup.expansion import DataMeans, LossParts, decompose_loss, noise_covariances, quadratic_term, shrink
    from bit_mixup.export import export_model
    from bit_mixup.hyperrule import HyperParameters, bit_hyperrule, learning_rate
    from bit_mixup.laws import TrainingLaw
    from bit_mixup.losses import training_loss
    from bit_mixup.mixup import Mixup, mix
    from bit_mixup.models import fold_weight_standardisation, load_bit, save_model
    from bit_mixup.objectives import Distillation, LargeMarginCosine, SigmoidCrossEntropy, SoftmaxCrossEntropy
    from bit_mixup.outcomes import Outcomes
    from bit_mixup.planning import Plan, make_plan
    from bit_mixup.plots import reliability_diagram, save_figure
    from bit_mixup.prediction import predict_features, predict_logits
    from bit_mixup.pretraining import PretrainResult, distill, pretrain
    from bit_mixup.publishing import Published, push
    from bit_mixup.scoring import Evaluation, evaluate_model
    from bit_mixup.theory import MixingMoments, loss_floor, mixing_moments
    from bit_mixup.training import train
    from bit_mixup.unmixing import MixupRecord, RuleChoice, choose_rule, predict_by_rule
    from bit_mixup.weights import find_weights
    from bit_mixup.workflow import TransferResult, transfer

_HOMES = {
    "calibration": ["CalibrationReport", "TemperatureFit", "fit_temperature", "measure_calibration"],
    "catalog": ["list_bit_models"],
    "classifier": ["Classifier", "Prediction", "load"],
    "comparison": ["Comparison", "compare_runs"],
    "config": ["DistillConfig", "PretrainConfig", "TransferConfig"],
    "corruption": ["CorruptedLabels", "corrupt_labels", "memorisation"],
    "data": ["ImageDataset", "load_image_dataset"],
    "diagnostics": ["AdversarialErrors", "InBetween", "adversarial_errors", "attack", "in_between", "jacobian_norms"],
    "errors": ["BitMixupError", "CheckpointError", "ConfigError", "DataError", "NonFiniteError", "PublishError", "WeightsError"],
    "evaluation": ["EvaluationReport", "MultiLabelReport", "evaluate", "evaluate_multi_label"],
    "examples": ["ArrayImages"],
    "expansion": ["DataMeans", "LossParts", "decompose_loss", "noise_covariances", "quadratic_term", "shrink"],
    "export": ["export_model"],
    "hyperrule": ["HyperParameters", "bit_hyperrule", "learning_rate"],
    "laws": ["TrainingLaw"],
    "losses": ["training_loss"],
    "mixup": ["Mixup", "mix"],
    "models": ["fold_weight_standardisation", "load_bit", "save_model"],
    "objectives": ["Distillation", "LargeMarginCosine", "SigmoidCrossEntropy", "SoftmaxCrossEntropy"],
    "outcomes": ["Outcomes"],
    "planning": ["Plan", "make_plan"],
    "plots": ["reliability_diagram", "save_figure"],
    "prediction": ["predict_features", "predict_logits"],
    "pretraining": ["PretrainResult", "distill", "pretrain"],
    "publishing": ["Published", "push"],
    "scoring": ["Evaluation", "evaluate_model"],
    "theory": ["MixingMoments", "loss_floor", "mixing_moments"],
    "training": ["train"],
    "unmixing": ["MixupRecord", "RuleChoice", "choose_rule", "predict_by_rule"],
    "weights": ["find_weights"],
    "workflow": ["TransferResult", "transfer"],
}

__version__ = "0.1.0"
__all__ = [
    "AdversarialErrors",
    "ArrayImages",
    "BitMixupError",
    "CalibrationReport",
    "CheckpointError",
    "Classifier",
    "Comparison",
    "ConfigError",
    "CorruptedLabels",
    "DataError",
    "DataMeans",
    "DistillConfig",
    "Distillation",
    "Evaluation",
    "EvaluationReport",
    "HyperParameters",
    "ImageDataset",
    "InBetween",
    "LargeMarginCosine",
    "LossParts",
    "MixingMoments",
    "Mixup",
    "MixupRecord",
    "MultiLabelReport",
    "NonFiniteError",
    "Outcomes",
    "Plan",
    "Prediction",
    "PretrainConfig",
    "PretrainResult",
    "PublishError",
    "Published",
    "RuleChoice",
    "SigmoidCrossEntropy",
    "SoftmaxCrossEntropy",
    "TemperatureFit",
    "TrainingLaw",
    "TransferConfig",
    "TransferResult",
    "WeightsError",
    "adversarial_errors",
    "attack",
    "bit_hyperrule",
    "choose_rule",
    "compare_runs",
    "corrupt_labels",
    "decompose_loss",
    "distill",
    "evaluate",
    "evaluate_model",
    "evaluate_multi_label",
    "export_model",
    "find_weights",
    "fit_temperature",
    "fold_weight_standardisation",
    "in_between",
    "jacobian_norms",
    "learning_rate",
    "list_bit_models",
    "load",
    "load_bit",
    "load_image_dataset",
    "loss_floor",
    "make_plan",
    "measure_calibration",
    "memorisation",
    "mix",
    "mixing_moments",
    "noise_covariances",
    "predict_by_rule",
    "predict_features",
    "predict_logits",
    "pretrain",
    "push",
    "quadratic_term",
    "reliability_diagram",
    "save_figure",
    "save_model",
    "shrink",
    "train",
    "training_loss",
    "transfer",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"bit_mixup.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
