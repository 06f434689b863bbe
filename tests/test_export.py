"""Do exported files say what the model says, in another program, and do they say how to call them?"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from timm.layers.std_conv import StdConv2d

import bit_mixup
from bit_mixup.classifier import Classifier
from bit_mixup.cli import main as command
from bit_mixup.errors import ConfigError, WeightsError
from bit_mixup.export import export_model
from bit_mixup.models import fold_weight_standardisation, load_bit
from bit_mixup.prediction import Predictor
from bit_mixup.unmixing import RULES
from bit_mixup.workflow import TransferResult


@pytest.fixture(scope="module")
def run(tiny_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> TransferResult:
    folder = tmp_path_factory.mktemp("export") / "run"
    sizes: dict[str, Any] = {"resize_size": 48, "crop_size": 40, "steps": 4, "batch_size": 16, "threads": 1}
    mixing: dict[str, Any] = {"mixup_alpha": 0.5, "validation_fraction": 0.1, "prediction_rule": "unshrink", "base_lr": 0.3}
    return bit_mixup.transfer(dataset="digits", model=str(tiny_bit), flip=False, output_dir=folder, **sizes, **mixing)


@pytest.fixture(scope="module")
def classifier(run: TransferResult) -> Classifier:
    return bit_mixup.load(run.output_dir)


@pytest.fixture(scope="module")
def images(run: TransferResult) -> np.ndarray:
    """64 test digits as the model sees them, (64, 3, 40, 40) uint8."""
    return np.stack([run.plan.view.evaluate(picture) for picture in run.plan.data.test.read(range(64))])


def called(path: Path, images: np.ndarray) -> np.ndarray:
    """What an exported file gives, in one batch each of 64, 5 and 1; those must agree."""
    outputs = []
    for batch in (images, images[:5], images[:1]):
        if path.suffix == ".onnx":
            session = onnxruntime.InferenceSession(str(path))
            outputs.append(session.run(None, {"pictures": batch})[0])
        else:
            outputs.append(torch.export.load(str(path)).module()(torch.from_numpy(batch)).detach().numpy())
    assert [len(output) for output in outputs] == [64, 5, 1]
    np.testing.assert_allclose(outputs[1], outputs[0][:5], atol=1e-5)
    np.testing.assert_allclose(outputs[2], outputs[0][:1], atol=1e-5)
    return outputs[0]


@pytest.mark.parametrize(
    ("suffix", "pixels"), [(".onnx", True), (".pt2", False), pytest.param(".onnx", False, marks=pytest.mark.slow)]
)
def test_logits_are_those_of_timms_copy(
    run: TransferResult, classifier: Classifier, images: np.ndarray, tmp_path: Path, suffix: str, pixels: bool
) -> None:
    """And a reader who knows nothing but the file beside the model can call it."""
    path = tmp_path / f"model{suffix}"
    export_model(classifier, path, pixels=pixels)
    said = json.loads(Path(f"{path}.json").read_text())
    network = timm.create_model(f"local-dir:{run.output_dir / 'model'}", pretrained=True).eval()
    mean, std = (np.array(said["input"][name], dtype=np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
    normalized = (images.astype(np.float32) / 255 - mean) / std
    with torch.no_grad():
        wanted = network(torch.from_numpy(normalized)).numpy()
    assert wanted.std(0).max() > 0.01, "the logits differ between pictures"
    np.testing.assert_allclose(called(path, images if pixels else normalized), wanted, atol=1e-4)
    assert said["input"]["type"] == ("uint8" if pixels else "float32")
    assert (said["input"]["shape"], said["output"]["shape"]) == (["batch", 3, 40, 40], ["batch", 10])
    assert said["label_names"] == [str(digit) for digit in range(10)]
    assert (said["output"]["name"], said["prediction_rule"]) == ("logits", None)


@pytest.mark.parametrize(
    ("rule", "suffix"),
    [
        pytest.param(rule, suffix, marks=[pytest.mark.slow] if (suffix == ".onnx") != (rule == "unshrink") else [])
        for rule in RULES
        for suffix in (".onnx", ".pt2")
    ],
)
def test_the_prediction_rule_is_inside(
    classifier: Classifier, run: TransferResult, images: np.ndarray, tmp_path: Path, rule: str, suffix: str
) -> None:
    temperature = 1.7 if rule == "fitted" else 1.0
    choice = dataclasses.replace(classifier.choice, rule=rule, temperature=temperature)
    other = dataclasses.replace(classifier, choice=choice)
    path = tmp_path / f"model{suffix}"
    said = export_model(other, path, ending="probabilities", pixels=True)
    predictions = other.predict(run.plan.data.test.read(range(64)))
    wanted = [[dict(zip(one.classes, one.probabilities, strict=True))[name] for name in other.label_names] for one in predictions]
    found = called(path, images)
    np.testing.assert_allclose(found, np.array(wanted), atol=1e-4)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    assert said["prediction_rule"] == {"rule": rule, "temperature": temperature}


def test_a_model_without_a_record_of_mixup(classifier: Classifier, images: np.ndarray, tmp_path: Path) -> None:
    choice = dataclasses.replace(classifier.choice, rule="fitted", temperature=2.0)
    export_model(
        dataclasses.replace(classifier, record=None, choice=choice), tmp_path / "a.pt2", ending="probabilities", pixels=True
    )
    export_model(classifier, tmp_path / "b.pt2", pixels=True)
    logits = torch.from_numpy(called(tmp_path / "b.pt2", images))
    np.testing.assert_allclose(called(tmp_path / "a.pt2", images), (logits / 2).softmax(1).numpy(), atol=1e-6)


def test_filters_are_constants_of_the_file(classifier: Classifier, tmp_path: Path) -> None:
    """Nothing is computed on weights any more, and the description is in the file as well."""
    said = export_model(classifier, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(graph)
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.graph.initializer}
    filters = [node.input[1] for node in graph.graph.node if node.op_type == "Conv"]
    standardised = [module for module in classifier.model.modules() if isinstance(module, StdConv2d)]
    assert len(filters) == len(standardised) > 10
    for name in filters:
        rows = constants[name].reshape(len(constants[name]), -1)
        np.testing.assert_allclose(rows.mean(1), 0, atol=1e-6)
        np.testing.assert_allclose(rows.std(1), 1, atol=1e-3)
    kept = {pair.key: pair.value for pair in graph.metadata_props}
    assert json.loads(kept["bit_mixup"]) == said == json.loads((tmp_path / "model.onnx.json").read_text())
    export_model(classifier, tmp_path / "model.pt2")
    extra: dict[str, Any] = {"bit_mixup.json": ""}
    torch.export.load(str(tmp_path / "model.pt2"), extra_files=extra)
    assert json.loads(extra["bit_mixup.json"]) == said
    assert str(tmp_path) not in json.dumps(said)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_folding_is_exact(run: TransferResult, dtype: torch.dtype, tolerance: float) -> None:
    model = load_bit(str(run.output_dir / "model"), keep_head=True).to(dtype).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fold_weight_standardisation(model)
    pictures = torch.randn(4, 3, 40, 40, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(folded(pictures), model(pictures), atol=tolerance, rtol=tolerance)
    assert not any(isinstance(module, StdConv2d) for module in folded.modules())
    assert list(folded.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_prediction_does_without_a_copy_where_memory_does(run: TransferResult) -> None:
    model = load_bit(str(run.output_dir / "model"), keep_head=True)
    pictures = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    folded = Predictor(model, torch.device("cpu")).network
    assert not any(isinstance(module, StdConv2d) for module in folded.modules())

    class Large(torch.nn.Identity):
        def __deepcopy__(self, memo: dict[int, Any]) -> "Large":
            raise MemoryError

    model.large = Large()
    as_it_is = Predictor(model, torch.device("cpu")).network
    assert as_it_is is model
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(folded(pictures), as_it_is(pictures), atol=1e-4, rtol=1e-4)


def test_the_command(run: TransferResult, images: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    command(["export", str(run.output_dir), str(path), "--rule", "stored", "--pixels"])
    assert capsys.readouterr().out.splitlines() == [
        f"{path!s:<60} pictures uint8 batch x 3 x 40 x 40 -> probabilities batch x 10",
        f"{'':<60} by the rule unshrink (as asked)",
        f"{f'{path}.json':<60} what a program must know to call it",
    ]
    wanted = np.array(
        [max(one.probabilities) for one in bit_mixup.load(run.output_dir).predict(run.plan.data.test.read(range(64)))]
    )
    np.testing.assert_allclose(called(path, images).max(1), wanted, atol=1e-4)
    command(["export", str(run.output_dir), str(path), "--overwrite", "--rule", "raw"])
    assert "by the rule raw (as asked)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.tflite", 'not ".tflite". Rename the output'),
        ("model", 'not "". Rename'),
        ("there.onnx", "is there already. Use --overwrite"),
    ],
)
def test_where_a_model_can_not_be_written(run: TransferResult, tmp_path: Path, capsys: Any, name: str, message: str) -> None:
    (tmp_path / "there.onnx").write_text("mine")
    with pytest.raises(SystemExit) as left:
        command(["export", str(run.output_dir), str(tmp_path / name)])
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "there.onnx").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


def test_a_library_that_is_missing(classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bit_mixup.export.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs onnx and onnxscript, which are not installed: `pip install 'bit_mixup\[export\]'`"
    ):
        export_model(classifier, tmp_path / "model.onnx")
    export_model(classifier, tmp_path / "model.pt2")


def test_a_model_too_large_for_onnx(classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bit_mixup.export.LARGEST_ONNX", 100_000)
    with pytest.raises(ConfigError, match=r"weights of .* have 0\.0 GB. Name a \.pt2 file"):
        export_model(classifier, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_model_without_a_head(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="has no head to keep"):
        bit_mixup.load("bundled")
