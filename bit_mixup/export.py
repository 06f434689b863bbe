"""How does a model leave PyTorch, or at least this package?

As one file with the whole function from pictures to logits or probabilities in it, and with all that is needed to call it right:
how pictures are to be resized and normalised, what comes out, and in which order the classes stand. Weight standardisation is
folded into the filters, which is exact, so what runs elsewhere is a network of plain convolutions.
"""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor

from bit_mixup.classifier import Classifier
from bit_mixup.environment import versions
from bit_mixup.errors import ConfigError
from bit_mixup.models import Normalize, fold_weight_standardisation, forward
from bit_mixup.storage import write_bytes, write_json
from bit_mixup.unmixing import predict_by_rule

SUFFIXES = (".onnx", ".pt2")
INPUT = "pictures"
DESCRIPTION = "bit_mixup.json"  # within an archive of torch.export's; in ONNX the key "bit_mixup"
LARGEST_ONNX = 2_000_000_000  # bytes of weights; a protobuf holds 2 GiB
Ending = Literal["logits", "probabilities"]


class Exported(torch.nn.Module):
    """The function that a file holds: pictures (N, 3, H, W) to logits or probabilities (N, K), in float32.

    Args:
        classifier: whose network and, for probabilities, prediction rule.
        ending: what comes out.
        pixels: whether pictures are bytes, 0 to 255, or already normalised.
    """

    mean: Tensor
    std: Tensor
    offset: Tensor | None

    def __init__(self, classifier: Classifier, *, ending: Ending, pixels: bool) -> None:
        super().__init__()
        self.network = fold_weight_standardisation(classifier.model).cpu().float()
        self.ending, self.pixels, self.choice, self.record = ending, pixels, classifier.choice, classifier.record
        normalize = Normalize.of(classifier.model)
        for name, values in (("mean", normalize.mean), ("std", normalize.std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))
        self.register_buffer("offset", None)
        looks_at_shrunk = ending == "probabilities" and self.choice.rule in ("eq15", "unshrink")
        shrink = self.record.shrink_input(normalize.mean, normalize.std) if self.record and looks_at_shrunk else None
        if shrink is not None:  # shrink * pictures + (1 - shrink) * mean picture, of which the second part is a constant
            edge = classifier.view.crop_size
            self.register_buffer("offset", shrink(torch.zeros(1, 3, edge, edge)))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits or probabilities (N, K)."""
        normalized = (pictures.float() / 255 - self.mean) / self.std if self.pixels else pictures
        if self.ending == "logits":
            return forward(self.network, normalized)
        if self.offset is not None and self.record is not None:
            # No rule looks at the shrunken pictures and at the others as well, so one pass does.
            normalized = self.record.input_shrink * normalized + self.offset
        logits = forward(self.network, normalized)
        if self.record is None:  # the rule is raw, or a fitted temperature, which needs no record
            return (logits / self.choice.temperature).softmax(1)
        return predict_by_rule(self.choice.rule, logits, logits, self.record, temperature=self.choice.temperature).softmax(1)


def export_model(
    classifier: Classifier, output: Path, *, ending: Ending = "logits", pixels: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Writes a model for other programs, whole or not at all, and beside it a .json that says how to call it.

    The number of pictures in a batch is free; their size is the one that the model was trained at.

    Args:
        classifier: from `bit_mixup.load`.
        output: ends in .onnx (ONNX, for onnxruntime and others) or .pt2 (`torch.export.load`).
        ending: "logits", or "probabilities" by the classifier's prediction rule.
        pixels: whether the input is bytes, (N, 3, H, W) uint8, which are normalised inside; else normalised float32.
        overwrite: whether a file that is there may be written over.

    Returns:
        What the .json says. It is in the file as well: in ONNX in the metadata under "bit_mixup", in .pt2 as the extra file
        "bit_mixup.json".

    Raises:
        ConfigError: another suffix, a file that is there, a library that is missing, or a model too large for one ONNX file.
    """
    check_export(output, overwrite=overwrite)
    exported = Exported(classifier, ending=ending, pixels=pixels).eval()
    size = sum(tensor.numel() * tensor.element_size() for tensor in exported.state_dict().values())
    if output.suffix == ".onnx" and size > LARGEST_ONNX:
        raise ConfigError(
            f"{output}: an ONNX file holds 2 GB, but the weights of {classifier.name} have {size / 1e9:.1f} GB. Name a .pt2 file."
        )
    description = _describe(classifier, ending=ending, pixels=pixels)
    edge = classifier.view.crop_size
    example = torch.zeros(2, 3, edge, edge, dtype=torch.uint8 if pixels else torch.float32)
    with _quiet():
        program = torch.export.export(exported, (example,), dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}})
        content = _onnx(program, description) if output.suffix == ".onnx" else _archive(program, description)
    write_bytes(output, content)
    write_json(Path(f"{output}.json"), description)
    return description


def check_export(output: Path, *, overwrite: bool) -> None:
    """Sees whether a model can be written there; raises ConfigError."""
    if output.suffix not in SUFFIXES:
        raise ConfigError(f'{output}: models are exported as .onnx or .pt2, not "{output.suffix}". Rename the output.')
    taken = next((path for path in (output, Path(f"{output}.json")) if path.exists()), None)
    if taken is not None and not overwrite:
        raise ConfigError(f"{taken} is there already. Use --overwrite to write over it, or name another file.")
    missing = [library for library in ("onnx", "onnxscript") if output.suffix == ".onnx" and find_spec(library) is None]
    if missing:
        raise ConfigError(
            f"{output}: writing ONNX needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "`pip install 'bit_mixup[export]'`, or name a .pt2 file."
        )


def _describe(classifier: Classifier, *, ending: Ending, pixels: bool) -> dict[str, Any]:
    """All that a program must know to call the model, and where it is from."""
    normalize, view, choice = Normalize.of(classifier.model), classifier.view, classifier.choice
    edge = view.crop_size
    return {
        "model": classifier.name if classifier.revision else Path(classifier.name).name,  # no folders of this machine
        "revision": classifier.revision,
        "input": {
            "name": INPUT,
            "shape": ["batch", 3, edge, edge],
            "type": "uint8" if pixels else "float32",
            "channels": "RGB",
            "values": "bytes, 0 to 255" if pixels else "(byte / 255 - mean) / std",
            "mean": list(normalize.mean),
            "std": list(normalize.std),
            "resize": f"the whole picture to {edge} x {edge}, whatever its shape, by Pillow's {view.interpolation}",
            "interpolation": view.interpolation,
            "transparent": "put on white",
        },
        "output": {"name": ending, "shape": ["batch", int(classifier.model.num_classes)]},
        "label_names": list(classifier.label_names),
        "prediction_rule": {"rule": choice.rule, "temperature": choice.temperature} if ending == "probabilities" else None,
        "weight_standardisation": "folded into the filters",
        "versions": versions(),
    }


def _onnx(program: torch.export.ExportedProgram, description: dict[str, Any]) -> bytes:
    """The content of an ONNX file."""
    converted = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=[description["output"]["name"]], verbose=False
    )
    assert converted is not None
    proto: Any = converted.model_proto
    for key, value in (
        ("bit_mixup", json.dumps(description, ensure_ascii=False)),
        ("label_names", "\n".join(description["label_names"])),
    ):
        proto.metadata_props.add(key=key, value=value)
    content: bytes = proto.SerializeToString()
    return content


def _archive(program: torch.export.ExportedProgram, description: dict[str, Any]) -> bytes:
    """The content of an archive of torch.export's."""
    with io.BytesIO() as file:
        torch.export.save(program, file, extra_files={DESCRIPTION: json.dumps(description, ensure_ascii=False)})
        return file.getvalue()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' notes about themselves are not the user's; their errors come as ever."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [one.level for one in loggers]
    with catch_warnings():
        simplefilter("ignore")
        try:
            for one in loggers:
                one.setLevel(logging.ERROR)
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)
