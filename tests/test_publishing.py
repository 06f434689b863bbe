"""Does a published model load elsewhere and say the same, and is its card true?"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hub import Fault, LoopbackHub
from huggingface_hub import ModelCard
from PIL import Image
from transformers import pipeline

import bit_mixup
from bit_mixup.cli import main as command
from bit_mixup.errors import CheckpointError
from bit_mixup.evaluation import EvaluationReport
from bit_mixup.models import load_bit
from bit_mixup.publishing import push
from bit_mixup.workflow import TransferResult

FILES = [
    "README.md",
    "config.json",
    "mean_image.safetensors",
    "mixup.json",
    "model.safetensors",
    "prediction.json",
    "reliability.png",
    "report.json",
    "training.png",
]
NAMES = ("zero", "<b>one</b>", "two | three", *map(str, range(3, 10)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 digits in class folders, whose names would do harm in Markdown."""
    folder = tmp_path_factory.mktemp("secret_place") / "my digits"
    digits = bit_mixup.load_image_dataset("digits").train
    for index, (picture, label) in enumerate(zip(digits.read(range(200)), digits.labels[list(range(200))].tolist(), strict=True)):
        place = folder / NAMES[label].replace("/", "\u2044")
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{index:03}.png")
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tiny_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> TransferResult:
    sizes: dict[str, Any] = {"resize_size": 48, "crop_size": 40, "steps": 6, "batch_size": 16, "threads": 1, "flip": False}
    mixing: dict[str, Any] = {"mixup_alpha": 0.5, "validation_fraction": 0.2, "prediction_rule": "unshrink", "base_lr": 0.3}
    folder = tmp_path_factory.mktemp("secret_run") / "run"
    return bit_mixup.transfer(dataset=str(data), model=str(tiny_bit), output_dir=folder, **sizes, **mixing)


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_dummy")


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """64 test digits as RGB files."""
    files = []
    for index, picture in enumerate(bit_mixup.load_image_dataset("digits").test.read(range(64))):
        files.append(tmp_path / f"{index:02}.png")
        picture.convert("RGB").save(files[-1])
    return files


def timm_logits(name: str, files: list[Path]) -> np.ndarray:
    """As timm's documentation has it."""
    model = timm.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        logits: np.ndarray = model(torch.stack([transform(Image.open(file)) for file in files])).numpy()
    return logits


@pytest.mark.usefixtures("logged_in")
def test_every_door_gives_the_same_logits_and_names(
    run: TransferResult, hub: LoopbackHub, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(["push", str(run.output_dir), "ada/digits"])
    said = capsys.readouterr().out.split()
    assert said[:-1] == FILES
    assert re.fullmatch(re.escape(hub.url) + "/ada/digits/commit/[0-9a-f]{40}", said[-1])
    assert sorted(hub.commits["models/ada/digits"][said[-1][-40:]]) == FILES
    push(run.output_dir, "ada/digits", dry_run=tmp_path / "dry")
    assert sorted(path.name for path in (tmp_path / "dry").iterdir()) == FILES

    own = load_bit(str(run.output_dir / "model"), keep_head=True).eval()
    images = np.stack([run.plan.view.evaluate(Image.open(file)) for file in pictures])
    with torch.inference_mode():
        wanted = own((torch.from_numpy(images).float() / 255 - 0.5) / 0.5).numpy()
    assert wanted.std(0).max() > 0.01, "the logits differ between pictures"
    np.testing.assert_allclose(timm_logits("hf-hub:ada/digits", pictures), wanted, atol=1e-4)
    np.testing.assert_allclose(timm_logits(f"local-dir:{tmp_path / 'dry'}", pictures), wanted, atol=1e-4)
    classify = pipeline("image-classification", model="ada/digits", device="cpu")
    values = classify.image_processor([Image.open(file) for file in pictures], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        np.testing.assert_allclose(classify.model(values).logits.numpy(), wanted, atol=1e-4)
    assert [one["label"] for one in classify(str(pictures[0]), top_k=1)] == [run.plan.data.class_names[wanted[0].argmax()]]

    here, there = bit_mixup.load(run.output_dir), bit_mixup.load("ada/digits")
    assert there.choice.rule == "unshrink"
    assert there.revision == said[-1][-40:]
    for before, after in zip(here.predict(pictures), there.predict(pictures), strict=True):
        assert before == after


@pytest.mark.usefixtures("logged_in")
def test_snippets_of_the_card_run(
    run: TransferResult, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    push(run.output_dir, "ada/snippets")
    (tmp_path / "picture.jpg").write_bytes(pictures[0].read_bytes())
    monkeypatch.chdir(tmp_path)
    card = ModelCard.load("ada/snippets").content
    blocks = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    best = bit_mixup.load("ada/snippets").predict(["picture.jpg"])[0].label
    raw = run.plan.data.class_names[timm_logits("hf-hub:ada/snippets", pictures)[0].argmax()]
    for block in blocks:
        exec(compile(block, "card", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{best} 0.")
    assert said[1] == raw
    assert re.match(
        rf"\[\{{'label': {re.escape(repr(raw))}, 'score': 0\.|\[\{{'score': 0\.\d+, 'label': {re.escape(repr(raw))}", said[2]
    )


def test_the_card_tells_the_figures_of_the_run(run: TransferResult, data: Path, tmp_path: Path) -> None:
    push(run.output_dir, "ada/digits", dry_run=tmp_path / "dry", license="cc-by-4.0")
    card = ModelCard.load(tmp_path / "dry" / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == ("cc-by-4.0", "timm", "image-classification")
    assert card.data.model_name == "digits"
    results = {result.metric_type: result for result in card.data.eval_results}
    report = json.loads((run.output_dir / "report.json").read_text())
    assert {name: result.metric_value for name, result in results.items()} == {
        "accuracy": report["accuracy"],
        "f1": report["macro_f1"],
        "nll": report["nll"],
        "ece": report["calibration"]["expected_calibration_error"],
    }
    assert {(result.dataset_name, result.dataset_split) for result in results.values()} == {
        ("my digits", run.plan.data.test.name)
    }
    assert card.data.base_model is None, "a folder of this machine is no model of the hub"
    low, high = report["accuracy_interval"]
    assert f"{report['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%})" in card.text
    assert f"negative log-likelihood {report['raw']['nll']:.4f}" in card.text
    assert "6 of 16 examples" in card.text
    assert "alpha 0.5" in card.text
    assert "--mixup-alpha 0.5" in card.text
    assert re.search(r"\| trained \| all weights \|", card.text)
    figures = re.findall(r"!\[[\w ,]+\]\((\S+)\)", card.text)
    assert figures == ["reliability.png", "training.png"]
    for name in figures:
        with Image.open(tmp_path / "dry" / name) as figure:
            assert min(figure.size) > 500
            assert len(np.unique(np.asarray(figure.convert("L")))) > 20, "something is drawn"
    # What others have named is text.
    assert "<b>" not in card.text
    assert "&#60;b&#62;one" in card.text or "&lt;b&gt;one" in card.text
    # Nothing of this machine gets out.
    for path in (tmp_path / "dry").iterdir():
        for place in (data.parent, run.output_dir.parent, Path(run.plan.config.model).parent, tmp_path):
            assert str(place).encode() not in path.read_bytes(), path.name
    assert card.content == (tmp_path / "dry" / "README.md").read_text(encoding="utf-8")


def test_a_card_without_a_licence_says_so(run: TransferResult, tmp_path: Path) -> None:
    push(run.output_dir, "ada/digits", dry_run=tmp_path / "dry")
    card = ModelCard.load(tmp_path / "dry" / "README.md")
    known = json.loads((run.output_dir / "model" / "config.json").read_text())["pretrained_cfg"].get("license")
    assert card.data.license == known
    assert ("No licence was stated" in card.text) == (known is None)


@pytest.mark.parametrize(
    ("trainable", "trained", "pictures"),
    [
        ("head", "the head alone, on features that stay as they were", "resized to 40, whole; bilinear"),
        (
            "stage4",
            "the last stage, the normalisation behind it and the head",
            "resized to 48, cropped to 40, never mirrored; bilinear",
        ),
    ],
)
def test_the_card_of_a_part_says_which(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainable: str, trained: str, pictures: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = bit_mixup.transfer(**quick, trainable=trainable)
    push(result.output_dir, "ada/part", dry_run=tmp_path / "dry")
    card = ModelCard.load(tmp_path / "dry" / "README.md").text
    assert f"| trained | {trained} |" in card
    assert f"| pictures | {pictures} |" in card
    assert f"--trainable {trainable}" in card


def test_models_of_the_hub_are_named_as_such(quick: dict[str, Any], hub: LoopbackHub, tiny_bit: Path, tmp_path: Path) -> None:
    hub.add_model("ada/base", {path.name: path for path in tiny_bit.iterdir()}, commit="e" * 40)
    result = bit_mixup.transfer(**quick | {"model": "ada/base"})
    push(result.output_dir, "ada/child", dry_run=tmp_path / "dry")
    card = ModelCard.load(tmp_path / "dry" / "README.md")
    assert card.data.base_model == "ada/base"
    assert f"ada/base @ {'e' * 40}" in card.text.replace("&#64;", "@")


def test_scores_come_back_from_their_dictionary(run: TransferResult) -> None:
    again = EvaluationReport.from_dict(json.loads((run.output_dir / "report.json").read_text()))
    assert again == run.report
    with pytest.raises(CheckpointError, match="not the scores of a run of fine-tuning"):
        EvaluationReport.from_dict({"accuracy": 1.0})


@pytest.mark.usefixtures("logged_in")
def test_a_second_push_is_a_second_commit(run: TransferResult, hub: LoopbackHub) -> None:
    first = push(run.output_dir, "ada/twice", private=True)
    second = push(run.output_dir, "ada/twice", message="again", license="mit")
    commits = list(hub.commits["models/ada/twice"])
    assert [str(first.url)[-40:], str(second.url)[-40:]] == commits[1:]
    assert "models/ada/twice" in hub.private


@pytest.mark.parametrize("name", ["digits", "ada/", "ada/dig its", "ada/b/c", "../x", "ada/x.git", "ada/.."])
def test_bad_names_are_refused(run: TransferResult, capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        command(["push", str(run.output_dir), name])
    assert f'"{name}" is no name of a repository on the hub' in capsys.readouterr().err


def explain_push(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="2"):
        command(["push", *arguments])
    return capsys.readouterr().err


def test_what_can_not_be_published(run: TransferResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "it has no config.json" in explain_push([str(tmp_path), "ada/x"], capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "full is there already" in explain_push([str(run.output_dir), "ada/x", "--dry-run", str(tmp_path / "full")], capsys)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_run_of_pre_training_is_not_published(tiny_bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"steps": 2, "batch_size": 8, "crop_size": 40, "threads": 1, "test_split": "test"}
    bit_mixup.pretrain(dataset="digits", model=str(tiny_bit), output_dir=tmp_path / "upstream", **options)
    assert "is a run of pretrain" in explain_push([str(tmp_path / "upstream"), "ada/x"], capsys)


def test_without_a_token(run: TransferResult, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert "you are not logged in to the hub" in explain_push([str(run.output_dir), "ada/x"], capsys)


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("POST /api/repos/create", status=401), "the hub does not accept your token"),
        (Fault("POST /api/repos/create", status=403), "may write there"),
        (Fault("POST .*/commit/main", times=-1, status=403), "may write there"),
        (Fault("POST .*/commit/main", times=-1, status=500), "the hub is busy or down"),
        (Fault("POST .*/commit/main", times=-1, status=400), "the hub refuses it"),
    ],
    ids=["token", "forbidden", "forbidden to commit", "busy", "refused"],
)
def test_what_the_hub_answers_is_explained(
    run: TransferResult, hub: LoopbackHub, capsys: pytest.CaptureFixture[str], fault: Fault, message: str
) -> None:
    hub.faults.append(fault)
    try:
        assert message in explain_push([str(run.output_dir), "ada/faults"], capsys)
    finally:
        hub.faults.clear()
    assert all(not files for files in hub.commits.get("models/ada/faults", {}).values()), "nothing was published"


@pytest.mark.usefixtures("logged_in")
def test_a_hub_that_is_not_there(run: TransferResult, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    with hub.stopped():
        said = explain_push([str(run.output_dir), "ada/x"], capsys)
    assert "the hub can not be reached" in said
    assert "write the files with --dry-run" in said
