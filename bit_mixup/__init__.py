"""bit_mixup: transfer a pretrained BiT to your pictures.

    import bit_mixup
    result = bit_mixup.transfer(dataset="path/to/class/folders")
    print(result.report.accuracy)

Names are imported when they are first used, so that importing the package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bit_mixup.catalog import list_bit_models
    from bit_mixup.config import DistillConfig, PretrainConfig, TransferConfig
    from bit_mixup.data import ImageDataset, load_image_dataset
    from bit_mixup.errors import (
        BitMixupError,
        CheckpointError,
        ConfigError,
        DataError,
        NonFiniteError,
        WeightsError,
    )
    from bit_mixup.evaluation import EvaluationReport, MultiLabelReport, evaluate, evaluate_multi_label
    from bit_mixup.examples import ArrayImages
    from bit_mixup.hyperrule import HyperParameters, bit_hyperrule, learning_rate
    from bit_mixup.mixup import Mixup, mix
    from bit_mixup.models import load_bit, save_model
    from bit_mixup.objectives import Distillation, SigmoidCrossEntropy, SoftmaxCrossEntropy
    from bit_mixup.planning import Plan, make_plan
    from bit_mixup.prediction import predict_logits
    from bit_mixup.pretraining import PretrainResult, distill, pretrain
    from bit_mixup.training import train
    from bit_mixup.weights import find_weights
    from bit_mixup.workflow import TransferResult, transfer

_HOMES = {
    "catalog": ["list_bit_models"],
    "config": ["DistillConfig", "PretrainConfig", "TransferConfig"],
    "data": ["ImageDataset", "load_image_dataset"],
    "errors": ["BitMixupError", "CheckpointError", "ConfigError", "DataError", "NonFiniteError", "WeightsError"],
    "evaluation": ["EvaluationReport", "MultiLabelReport", "evaluate", "evaluate_multi_label"],
    "examples": ["ArrayImages"],
    "hyperrule": ["HyperParameters", "bit_hyperrule", "learning_rate"],
    "mixup": ["Mixup", "mix"],
    "models": ["load_bit", "save_model"],
    "planning": ["Plan", "make_plan"],
    "prediction": ["predict_logits"],
    "objectives": ["Distillation", "SigmoidCrossEntropy", "SoftmaxCrossEntropy"],
    "pretraining": ["PretrainResult", "distill", "pretrain"],
    "training": ["train"],
    "weights": ["find_weights"],
    "workflow": ["TransferResult", "transfer"],
}

__version__ = "0.1.0"
__all__ = [
    "ArrayImages",
    "BitMixupError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DistillConfig",
    "Distillation",
    "EvaluationReport",
    "HyperParameters",
    "ImageDataset",
    "Mixup",
    "MultiLabelReport",
    "NonFiniteError",
    "Plan",
    "PretrainConfig",
    "PretrainResult",
    "SigmoidCrossEntropy",
    "SoftmaxCrossEntropy",
    "TransferConfig",
    "TransferResult",
    "WeightsError",
    "bit_hyperrule",
    "distill",
    "evaluate",
    "evaluate_multi_label",
    "find_weights",
    "learning_rate",
    "list_bit_models",
    "load_bit",
    "load_image_dataset",
    "make_plan",
    "mix",
    "predict_logits",
    "pretrain",
    "save_model",
    "train",
    "transfer",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"bit_mixup.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
