"""Does pre-training compute the same by any door, cut and interruption, and does a student learn from its teacher alone?"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import distill as distill_recipe
import numpy as np
import pretrain as pretrain_recipe
import pytest
import timm
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List
from markupsafe import escape
from PIL import Image as Pillow
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score
from test_training import UNEVEN, difference, in_a_child, weights_of
from torch import Tensor

import bit_mixup
from bit_mixup.augmentation import InceptionView
from bit_mixup.cli import main as command
from bit_mixup.data import load_image_dataset
from bit_mixup.errors import CheckpointError, ConfigError, WeightsError, shown
from bit_mixup.examples import ArrayImages, EvaluationView, TrainingStream
from bit_mixup.hyperrule import HyperParameters
from bit_mixup.images import View
from bit_mixup.laws import TrainingLaw
from bit_mixup.models import Normalize, create_bit, draw_head, forward, load_bit, save_model
from bit_mixup.objectives import (
    Distillation,
    LargeMarginCosine,
    Objective,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    kl_divergence,
)
from bit_mixup.prediction import predict_logits
from bit_mixup.repeating import command_line
from bit_mixup.runs import RunFolder
from bit_mixup.sampling import MicroBatch, cut_batch
from bit_mixup.training import train as train_model
from bit_mixup.weights import find_network

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def digits() -> ArrayImages:
    """The bundled training digits as arrays."""
    part = load_image_dataset("digits").train
    images = np.stack([np.asarray(picture.convert("L")) for picture in part.read(range(len(part)))])
    return ArrayImages(images=images, labels=part.labels, class_names=tuple(str(digit) for digit in range(10)))


@pytest.fixture(scope="module")
def teacher(tiny_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model of random weights that says something: its head is not near zero."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    model = create_bit(find_network(str(tiny_bit)), num_classes=10, seed=7)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.get_classifier().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    view = View(resize_size=40, crop_size=40, flip=False, interpolation="bilinear")
    save_model(model, folder, label_names=[f"class {index}" for index in range(10)], view=view, std_eps=1e-8)
    return folder


@pytest.fixture
def short(tiny_bit: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a run of 6 steps."""
    return {
        "model": str(tiny_bit),
        "steps": 6,
        "batch_size": 16,
        "flip": False,
        "threads": 1,
        "save_every": 2,
        "output_dir": tmp_path / "run",
    }


def losses_of(folder: Path) -> list[float]:
    return [row["loss"] for row in RunFolder(folder).read_metrics()]


# One run by each door


LONGER = {"steps": 24, "batch_size": 64, "base_lr": 0.1, "decay_steps": (24,), "min_area": 1.0, "flip": False, "threads": 1}
FLAGS = """--steps 24 --batch-size 64 --base-lr 0.1 --decay-steps 24 --min-area 1 --no-flip --threads 1""".split()


@pytest.fixture(scope="module")
def pretrained(tiny_bit: Path, digits: ArrayImages, tmp_path_factory: pytest.TempPathFactory) -> bit_mixup.PretrainResult:
    folder = tmp_path_factory.mktemp("arrays") / "run"
    return bit_mixup.pretrain(dataset=digits, model=str(tiny_bit), output_dir=folder, **LONGER)


def test_every_door_gives_the_same_bits(
    pretrained: bit_mixup.PretrainResult, tiny_bit: Path, digits: ArrayImages, tmp_path: Path
) -> None:
    losses = losses_of(pretrained.output_dir)
    assert len(losses) == 24
    assert losses[0] == pytest.approx(np.log(10), rel=1e-5), "the head is zero"
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    command(["pretrain", "--dataset", "digits", "--model", str(tiny_bit), *FLAGS, "--output-dir", str(tmp_path / "command")])
    np.savez(tmp_path / "digits.npz", images=digits.images, labels=digits.labels, class_names=np.array(digits.class_names))
    arguments = ["--dataset", str(tmp_path / "digits.npz"), "--model", str(tiny_bit), "--output-dir", str(tmp_path / "recipe")]
    pretrain_recipe.main([*arguments, *FLAGS])
    for folder in (tmp_path / "command", tmp_path / "recipe"):
        assert weights_of(folder) == weights_of(pretrained.output_dir)
        assert losses_of(folder) == losses
        assert not (folder / "report.json").exists(), "nothing is scored unasked"
    fingerprints = [
        json.loads((folder / "plan.json").read_text())["resolved"]["data"]["fingerprint"]
        for folder in (pretrained.output_dir, tmp_path / "recipe")
    ]
    assert fingerprints == [digits.fingerprint] * 2


def test_the_model_is_what_transfer_and_timm_take(pretrained: bit_mixup.PretrainResult, quick: dict[str, Any]) -> None:
    folder = pretrained.output_dir / "model"
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert loaded.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    assert loaded.pretrained_cfg["input_size"] == (3, 40, 40)
    images = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(images), pretrained.model.eval()(images))
        assert loaded(images).std() > 0.01
    result = bit_mixup.transfer(**(quick | {"model": str(folder), "steps": 1, "warmup_steps": 1}))  # at a rate of 0
    body = {name: tensor for name, tensor in result.model.state_dict().items() if not name.startswith("head.")}
    assert len(body) > 100
    assert all(torch.equal(tensor, pretrained.model.state_dict()[name]) for name, tensor in body.items())


# Interruptions


def test_a_killed_run_goes_on_to_the_same_bits(digits: ArrayImages, short: dict[str, Any], tmp_path: Path) -> None:
    short |= {"distort": True}
    bit_mixup.pretrain(dataset=digits, **short)
    killed = short | {"output_dir": tmp_path / "killed"}

    def run() -> None:
        backward, calls = Accelerator.backward, 0

        def deadly(self: Accelerator, *arguments: Any, **options: Any) -> None:
            nonlocal calls
            calls += 1
            backward(self, *arguments, **options)
            if calls == 4:  # in step 3, gradients computed, nothing applied yet
                os.kill(os.getpid(), signal.SIGKILL)

        Accelerator.backward = deadly  # type: ignore[method-assign]
        bit_mixup.pretrain(dataset=digits, **killed)

    assert in_a_child(run) == -signal.SIGKILL
    assert [path.name for path in RunFolder(tmp_path / "killed").list_checkpoints()] == ["step_000002"]
    others: list[dict[str, Any]] = [{"min_area": 0.5, "distort": False}, {"seed": 1}, {"epochs": 1.0}]
    for other in others:
        with pytest.raises(CheckpointError) as stopped:
            bit_mixup.pretrain(dataset=digits, **(killed | other), resume=True)
        named = {line.split(":")[0].strip() for line in str(stopped.value).splitlines()[1:-1]}
        assert named == set(other)
    mirrored = ArrayImages(images=digits.images[:, :, ::-1], labels=digits.labels, class_names=digits.class_names)
    with pytest.raises(CheckpointError, match=f"data: .*{digits.fingerprint}.*{mirrored.fingerprint}"):
        bit_mixup.pretrain(dataset=mirrored, **killed, resume=True)
    assert not (tmp_path / "killed" / "model").exists()
    bit_mixup.pretrain(dataset=digits, **killed, resume=True, num_workers=1)
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "run")
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "run")
    assert [row["step"] for row in RunFolder(tmp_path / "killed").read_metrics()] == list(range(6))


def test_a_distillation_resumes_to_the_same_bits_and_under_its_own_options_alone(
    digits: ArrayImages, teacher: Path, short: dict[str, Any], tmp_path: Path
) -> None:
    bit_mixup.distill(dataset=digits, teacher=str(teacher), **short)
    folder = tmp_path / "stopped"
    shutil.copytree(tmp_path / "run", folder)
    shutil.rmtree(folder / "checkpoints" / "step_000006")
    shutil.rmtree(folder / "model")
    again = short | {"output_dir": folder, "resume": True}
    with pytest.raises(CheckpointError, match=r"temperature: 1.0 -> 2.0"):
        bit_mixup.distill(dataset=digits, teacher=str(teacher), temperature=2.0, **again)
    with pytest.raises(CheckpointError, match=r"teacher: "):
        bit_mixup.pretrain(dataset=digits, **again)
    bit_mixup.distill(dataset=digits, teacher=str(teacher), **again)
    assert weights_of(folder) == weights_of(tmp_path / "run")


# Cuts


RULE = HyperParameters(
    resize_size=40, crop_size=40, steps=10, warmup_steps=2, decay_steps=(), batch_size=64, base_lr=0.003, weight_decay=1e-4
)
SINGLE_UNEVEN = [
    [MicroBatch(start=0, groups=(1,) * 13), MicroBatch(start=13, groups=(1,) * 30), MicroBatch(start=43, groups=(1,) * 21)]
]
VIEW = InceptionView(crop_size=40, flip=True, interpolation="bilinear", min_area=0.3, distort=True)


def several_labels(digits: ArrayImages) -> ArrayImages:
    """Digits with the labels of their value, of being even and of being above 4: 12 columns."""
    value = digits.labels
    columns = np.concatenate([np.eye(10)[value], (value[:, None] % 2 == 0), (value[:, None] > 4)], axis=1)
    return ArrayImages(images=digits.images, labels=columns, class_names=(*digits.class_names, "even", "large"))


def cut_run(
    model: timm.models.resnetv2.ResNetV2,
    part: ArrayImages,
    objective: Objective,
    cuts: list[list[MicroBatch]],
    folder: Path,
    *,
    base_lr: float,
    mixup_alpha: float,
) -> tuple[list[float], dict[str, Tensor]]:
    folder.mkdir()
    run = RunFolder(folder)
    stream, law = TrainingStream(part=part, view=VIEW, seed=3), TrainingLaw(alpha=mixup_alpha)
    train_model(
        model.double(),
        stream,
        replace(RULE, base_lr=base_lr),
        Accelerator(cpu=True),
        law=law,
        cuts=cuts,
        run=run,
        objective=objective,
        seed=3,
        save_every=1000,
    )
    return losses_of(folder), model.state_dict()


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and how. A loss that is a sum over twelve labels wants a lower rate: at 0.003 a difference grows
    twentyfold with each step, whatever it comes from."""

    part: Callable[[ArrayImages], ArrayImages] = lambda digits: digits
    objective: Callable[[Path], Objective]
    num_classes: int = 10
    base_lr: float = 0.003
    mixup_alpha: float = 0.0


CASES = {
    "softmax": Case(objective=lambda teacher: SoftmaxCrossEntropy()),
    "cosines": Case(objective=lambda teacher: LargeMarginCosine(margin=0.2, cosine=16.0), base_lr=0.001),
    "sigmoid": Case(part=several_labels, objective=lambda teacher: SigmoidCrossEntropy(), num_classes=12, base_lr=0.001),
    "sigmoid, mixed": Case(
        part=several_labels, objective=lambda teacher: SigmoidCrossEntropy(), num_classes=12, base_lr=0.001, mixup_alpha=1.0
    ),
    "distillation": Case(
        objective=lambda teacher: Distillation(load_bit(str(teacher), keep_head=True).double(), temperature=2.0), mixup_alpha=1.0
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_no_cut_changes_anything_in_double_precision(
    name: str, digits: ArrayImages, teacher: Path, tiny_bit: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    part, objective = case.part(digits), case.objective(teacher)
    cuts = {"1x64": cut_batch(64), "4x16": cut_batch(64, micro_batch=16), "uneven": UNEVEN if case.mixup_alpha else SINGLE_UNEVEN}
    start = create_bit(find_network(str(tiny_bit)), num_classes=case.num_classes, seed=0).double()
    if objective.cosine is not None:
        draw_head(start, seed=0)
    runs = {}
    for kind, cut in cuts.items():
        folder, law = tmp_path / kind, {"base_lr": case.base_lr, "mixup_alpha": case.mixup_alpha}
        runs[kind] = cut_run(deepcopy(start), part, objective, cut, folder, **law)
    losses, weights = runs["1x64"]
    assert len(losses) == 10
    assert difference(start.state_dict(), weights) > 1e-3
    for kind in ("4x16", "uneven"):
        assert runs[kind][0] == pytest.approx(losses, rel=1e-9)
        assert difference(weights, runs[kind][1]) < 1e-9


# Several labels


def encoded(digits: ArrayImages, rows: range) -> Dataset:
    """Digits as a data set with a column of lists."""
    pictures = []
    for row in rows:
        buffer = io.BytesIO()
        Pillow.fromarray(digits.images[row]).save(buffer, "png")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    several = several_labels(digits)
    lists = [np.flatnonzero(several.labels[row]).tolist() for row in rows]
    lists[0] = []
    features = Features({"image": Image(), "labels": List(ClassLabel(names=[*several.class_names, "never"]))})
    return Dataset.from_dict({"image": pictures, "labels": lists}, features=features)


def test_several_labels_are_trained_and_scored(digits: ArrayImages, short: dict[str, Any]) -> None:
    source = DatasetDict(train=encoded(digits, range(200)), dev=encoded(digits, range(200, 240)))
    result = bit_mixup.pretrain(dataset=source, test_split="dev", **(short | {"base_lr": 0.1}))
    losses = losses_of(result.output_dir)
    assert losses[0] == pytest.approx(13 * np.log(2), rel=1e-5), "thirteen labels at a probability of one half"
    assert losses[-1] < 0.8 * losses[0]
    assert isinstance(result.report, bit_mixup.MultiLabelReport)
    test = result.plan.data.test
    assert test is not None
    labels = test.labels[list(range(len(test)))]
    assert not labels[0].any()
    logits = predict_logits(result.model, EvaluationView(part=test, view=result.plan.view), Accelerator(cpu=True))
    names = result.plan.data.class_names
    found = {n: average_precision_score(labels[:, i], logits[:, i]) for i, n in enumerate(names) if labels[:, i].any()}
    assert set(names) - set(found) == {"never"}
    assert result.report.mean_average_precision == pytest.approx(np.mean(list(found.values())), rel=1e-5)
    saved = json.loads((result.output_dir / "report.json").read_text())
    assert saved == result.report.as_dict()
    assert saved["label_average_precision"]["never"] is None
    assert (saved["num_examples"], saved["label_support"]["even"]) == (40, int(labels[:, 10].sum()))
    plan = json.loads((result.output_dir / "plan.json").read_text())["resolved"]["data"]
    assert (plan["multi_label"], plan["classes"], plan["test_examples"]) == (True, 13, 40)


def test_one_label_a_picture_is_scored_where_a_split_is_named(short: dict[str, Any]) -> None:
    result = bit_mixup.pretrain(dataset="digits", test_split="test", **(short | {"steps": 2}))
    assert isinstance(result.report, bit_mixup.EvaluationReport)
    assert result.report.num_examples == 797
    assert json.loads((result.output_dir / "report.json").read_text()) == result.report.as_dict()


def test_the_page_of_a_run_says_what_was_done(
    pretrained: bit_mixup.PretrainResult, short: dict[str, Any], digits: ArrayImages, tmp_path: Path
) -> None:
    """Also where nothing was scored, and where several labels were; whatever classes are called."""
    several = encoded(digits, range(60)).cast_column("labels", List(ClassLabel(names=["<script>", *map(str, range(12))])))
    data = DatasetDict(train=several, dev=several)
    scored = bit_mixup.pretrain(dataset=data, test_split="dev", **(short | {"steps": 2, "output_dir": tmp_path / "several"}))
    assert scored.report is not None
    for result, scores in ((pretrained, []), (scored, scored.report.summary())):
        text = (result.output_dir / "report.html").read_text(encoding="utf-8")
        losses = losses_of(result.output_dir)
        assert f"<b>{np.mean(losses[-100:]):.4g}</b><span>loss over the last {min(100, len(losses))} steps" in text
        for heading, lines in result.plan.sections():
            assert f"<dt>{heading}</dt><dd>" in text
            assert all(str(escape(shown(line))) in text for line in lines)
        assert command_line(result.plan.config) in re.sub(r"</?span>", "", text)
        assert text.count("<svg") == text.count("<script>") == 1
        assert ("<h2>Scores</h2>" in text) == bool(scores)
        assert all(f'<tr><td>{name}</td><td class="number">{value}</td></tr>' in text for name, value in scores)
        assert f"fingerprint {result.plan.data.fingerprint}" in text


# Distillation


def test_a_student_comes_to_agree_with_its_teacher(digits: ArrayImages, teacher: Path, tiny_bit: Path, tmp_path: Path) -> None:
    """On test digits, which it has not seen, without mixup."""
    flags = [*FLAGS, "--dataset", "digits", "--teacher", str(teacher), "--model", str(tiny_bit)]
    distill_recipe.main([*flags, "--base-lr", "0.03", "--output-dir", str(tmp_path / "run")])
    assert f"KL from the teacher {teacher} at temperature" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    config = json.loads((tmp_path / "run" / "plan.json").read_text())["resolved"]
    assert (config["task"], config["hyper"]["mixup_alpha"]) == ("distill", 1.0)
    view = EvaluationView(
        part=load_image_dataset("digits").test.subset(np.arange(200)),
        view=View(resize_size=40, crop_size=40, flip=False, interpolation="bilinear"),
    )
    wanted = predict_logits(load_bit(str(teacher), keep_head=True), view, Accelerator(cpu=True))
    assert wanted.softmax(1).std(0).max() > 0.01, "the teacher says different things of different digits"
    student = load_bit(str(tmp_path / "run" / "model"), keep_head=True)
    before = create_bit(find_network(str(tiny_bit)), num_classes=10, seed=0)
    far, near = (
        kl_divergence(wanted, predict_logits(model, view, Accelerator(cpu=True))).mean().item() for model in (before, student)
    )
    assert near < 0.5 * far
    losses = losses_of(tmp_path / "run")
    assert np.mean(losses[-3:]) < 0.5 * losses[0]


def test_labels_have_no_say_in_distillation(digits: ArrayImages, teacher: Path, short: dict[str, Any], tmp_path: Path) -> None:
    others = ArrayImages(
        images=digits.images,
        labels=np.random.default_rng(0).permutation(digits.labels) % 3,
        class_names=("x", "y", "z"),
    )
    options = short | {"steps": 3}
    bit_mixup.distill(dataset=digits, teacher=str(teacher), **options)
    bit_mixup.distill(dataset=others, teacher=str(teacher), **(options | {"output_dir": tmp_path / "others"}))
    assert weights_of(tmp_path / "others") == weights_of(tmp_path / "run")
    bit_mixup.distill(dataset=digits, teacher=str(teacher), temperature=2.0, **(options | {"output_dir": tmp_path / "warm"}))
    assert weights_of(tmp_path / "warm") != weights_of(tmp_path / "run")


def test_a_network_starts_from_random_weights_or_where_asked_from_its_own(
    digits: ArrayImages, teacher: Path, tiny_bit: Path, short: dict[str, Any], tmp_path: Path
) -> None:
    options = short | {"steps": 1, "warmup_steps": 1}  # at a rate of 0
    random = bit_mixup.distill(dataset=digits, teacher=teacher, **options)
    own = bit_mixup.distill(dataset=digits, teacher=teacher, init=True, **(options | {"output_dir": tmp_path / "own"}))
    further = bit_mixup.pretrain(dataset=digits, init=True, **(options | {"output_dir": tmp_path / "further"}))
    expected = {
        "random": create_bit(find_network(str(tiny_bit)), num_classes=10, seed=0).state_dict(),
        "own": load_bit(str(tiny_bit), num_classes=10).state_dict(),
    }
    for name, result in (("random", random), ("own", own), ("own", further)):
        found = result.model.state_dict()
        assert found.keys() == expected[name].keys()
        assert all(torch.equal(found[key], expected[name][key]) for key in found)


def test_a_run_by_cosines_learns_resumes_and_leaves_a_head_that_gives_its_classes(
    tiny_bit: Path, short: dict[str, Any], tmp_path: Path
) -> None:
    options = {"dataset": "digits", "margin": 0.2, "cosine_scale": 10.0, "test_split": "test"}
    result = bit_mixup.pretrain(**options, **(short | LONGER))
    losses = losses_of(tmp_path / "run")
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    head = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not head["head.fc.bias"].any()
    lengths = head["head.fc.weight"].flatten(1).norm(dim=1)
    assert lengths.std() < 1e-5 * lengths.mean()
    part = load_image_dataset("digits").test
    images = Normalize.of(result.model)(torch.from_numpy(EvaluationView(part=part, view=VIEW).__getitems__(range(64))[0]))
    with torch.no_grad():
        cosines, logits = forward(result.model, images, cosine=10.0), result.model(images)
    assert torch.equal(cosines.argmax(1), logits.argmax(1))
    assert 5 < logits.abs().max() < 20
    assert result.report is not None
    assert result.report.accuracy > 0.2
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    shutil.rmtree(again / "checkpoints" / "step_000024")
    shutil.rmtree(again / "model")
    with pytest.raises(CheckpointError, match=r"margin: 0\.2 -> 0\.3"):
        bit_mixup.pretrain(**(options | short | LONGER | {"output_dir": again, "margin": 0.3}), resume=True)
    bit_mixup.pretrain(**(options | short | LONGER | {"output_dir": again}), resume=True)
    assert weights_of(again) == weights_of(tmp_path / "run")


def test_a_margin_is_refused_where_it_has_no_use(
    digits: ArrayImages, teacher: Path, short: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="margin is for one label a picture"):
        bit_mixup.pretrain(dataset=several_labels(digits), margin=0.2, **short)
    with pytest.raises(ConfigError, match="margin is for learning from labels"):
        bit_mixup.distill(dataset=digits, teacher=str(teacher), margin=0.2, **short)
    for wrong in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=f"margin is {wrong}"):
            bit_mixup.PretrainConfig(dataset="digits", margin=wrong)
    with pytest.raises(ConfigError, match="cosine_scale is 0"):
        bit_mixup.PretrainConfig(dataset="digits", margin=0.1, cosine_scale=0.0)
    assert not short["output_dir"].exists()


def test_what_distillation_can_not_use_is_refused(
    digits: ArrayImages, teacher: Path, short: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "teacher"
    other.mkdir()
    config = json.loads((teacher / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.485, 0.456, 0.406]
    (other / "config.json").write_text(json.dumps(config))
    (other / "model.safetensors").symlink_to(teacher / "model.safetensors")
    with pytest.raises(ConfigError, match=r"the teacher normalises pictures by .*0\.485"):
        bit_mixup.distill(dataset=digits, teacher=str(other), **short)
    with pytest.raises(WeightsError, match="has no head to keep"):
        bit_mixup.distill(dataset=digits, teacher="bundled", **short)
    with pytest.raises(ConfigError, match="test_split has no use"):
        bit_mixup.distill(dataset="digits", teacher=str(teacher), test_split="test", **short)
    assert not short["output_dir"].exists()


# A machine with little on it


LITTLE = """
import sys
from importlib.util import find_spec
assert find_spec("datasets") is None and find_spec("tyro") is None
import numpy as np
import bit_mixup

images = np.random.default_rng(0).integers(0, 256, (32, 8, 8), dtype=np.uint8)
data = bit_mixup.ArrayImages(images=images, labels=np.arange(32) % 4, class_names=tuple("abcd"))
result = bit_mixup.pretrain(
    dataset=data, model=sys.argv[1], output_dir=sys.argv[2], steps=2, batch_size=8, threads=1, distort=True
)
print("parameters", sum(parameter.numel() for parameter in result.model.parameters()))
"""


def test_arrays_need_neither_the_data_set_library_nor_the_command_lines(tiny_bit: Path, tmp_path: Path) -> None:
    """In a Python where neither of the two is installed: one whose packages are links to all the others."""
    installed = Path(sysconfig.get_paths()["purelib"])
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in installed.iterdir():
        if not entry.name.startswith(("datasets", "tyro", "__editable__")):
            (packages / entry.name).symlink_to(entry)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)])}
    line = [sys.executable, "-S", "-c", LITTLE, str(tiny_bit), str(tmp_path / "run")]
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "parameters " in done.stdout
    assert len(losses_of(tmp_path / "run")) == 2
    assert load_bit(str(tmp_path / "run" / "model"), keep_head=True).num_classes == 4
