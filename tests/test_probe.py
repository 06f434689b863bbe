"""Does training of the head alone, or of the last stage, train what it says, on features that are computed once?"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import probe as benchmark
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image, ImageFile
from torch import Tensor

import bit_mixup
from bit_mixup.catalog import ARCHITECTURES
from bit_mixup.cli import main
from bit_mixup.config import TransferConfig, configure, resolve
from bit_mixup.data import Part, load_image_dataset
from bit_mixup.environment import Precision
from bit_mixup.errors import CheckpointError, ConfigError, DataError
from bit_mixup.features import kept_features
from bit_mixup.hyperrule import learning_rate
from bit_mixup.images import View
from bit_mixup.mixup import choose_partners, draw_lam
from bit_mixup.models import Normalize, forward, freeze, load_bit
from bit_mixup.planning import make_plan
from bit_mixup.runs import RunFolder
from bit_mixup.sampling import row_at
from bit_mixup.weights import find_weights

VIEW = View(resize_size=48, crop_size=40, flip=False, interpolation="bilinear")
HEAD = ("head.fc.weight", "head.fc.bias")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where these tests keep features."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bit_mixup" / "features"


@pytest.fixture
def probe(quick: dict[str, Any]) -> dict[str, Any]:
    return quick | {"trainable": "head"}


def features_of(model: Any, part: Part) -> Tensor:
    """Pooled features as timm gives them."""
    pictures = [
        torch.from_numpy(np.array(picture.resize((40, 40), Image.Resampling.BILINEAR))) for picture in part.read(range(len(part)))
    ]
    images = Normalize.of(model)(torch.stack(pictures).permute(0, 3, 1, 2))
    with torch.no_grad():
        return model.eval().forward_head(model.forward_features(images), pre_logits=True)


@pytest.mark.parametrize("alpha", [None, 0.4])
def test_a_probe_is_plain_sgd_on_the_features(probe: dict[str, Any], tiny_bit: Path, alpha: float | None) -> None:
    result = bit_mixup.transfer(**(probe | {"steps": 30}), mixup_alpha=alpha, base_lr=0.3, weight_decay=0.01)
    part, hyper = result.plan.data.train, result.plan.resolution.hyper
    features = features_of(load_bit(str(tiny_bit), num_classes=10), part)
    labels = F.one_hot(torch.from_numpy(part.labels), 10).float()
    head = torch.nn.Linear(features.shape[1], 10)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.0, momentum=0.9, weight_decay=0.01)
    losses = []
    for step in range(30):
        rows = [row_at(position, seed=0, num_examples=40) for position in range(16 * step, 16 * step + 16)]
        inputs, targets = features[rows], labels[rows]
        if alpha:
            lam, partners = draw_lam(alpha, seed=0, index=step), choose_partners(16 * step, (8, 8), seed=0)
            inputs, targets = (lam * values + (1 - lam) * values[partners] for values in (inputs, targets))
        optimizer.param_groups[0]["lr"] = learning_rate(step, hyper)
        loss = F.cross_entropy(head(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    trained = result.model.get_classifier()
    torch.testing.assert_close(trained.weight.flatten(1), head.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trained.bias, head.bias, rtol=1e-5, atol=1e-5)
    assert [row["loss"] for row in RunFolder(result.output_dir).read_metrics()] == pytest.approx(losses, rel=1e-5)


def changed_by_a_run(before: dict[str, Tensor], folder: Path) -> set[str]:
    """Names of the weights in a run's model that are not, bit for bit, those that it started from."""
    after = safetensors.torch.load_file(folder / "model" / "model.safetensors")
    assert set(after) == set(before)
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("trainable", ["head", "stage4"])
def test_the_rest_of_the_model_stays_as_it_was(quick: dict[str, Any], tiny_bit: Path, trainable: str) -> None:
    result = bit_mixup.transfer(**quick, trainable=trainable, base_lr=0.1, weight_decay=0.1)
    before = load_bit(str(tiny_bit), num_classes=10).state_dict()
    may_change = {
        name for name in before if name.startswith(("head.", "norm.", "stages.3.") if trainable == "stage4" else "head.")
    }
    assert changed_by_a_run(before, result.output_dir) == may_change
    assert all(parameter.requires_grad for parameter in result.model.parameters())
    checkpoint = RunFolder(result.output_dir).checkpoint(6)
    held = {name: set(safetensors.torch.load_file(checkpoint / f"{name}.safetensors")) for name in ("model", "momentum")}
    assert held == {"model": set(HEAD) if trainable == "head" else set(before), "momentum": may_change}
    assert json.loads(RunFolder(result.output_dir).plan.read_text())["resolved"]["trainable"] == trainable
    again = bit_mixup.load(result.output_dir / "model")
    assert len(again.predict([Image.new("RGB", (40, 40))])) == 1


def test_the_last_stage_gets_the_gradients_of_full_training(quick: dict[str, Any], tmp_path: Path) -> None:
    gradients = {}
    for trainable in ("all", "stage4"):
        options = quick | {
            "trainable": trainable,
            "output_dir": tmp_path / trainable,
            "steps": 2,
            "warmup_steps": 0,
            "mixup_alpha": 0.2,
        }
        # The head is zero at first, and no gradient passes it: the second step is the first that tells.
        result = bit_mixup.transfer(**options, base_lr=1e-3)
        gradients[trainable] = safetensors.torch.load_file(RunFolder(result.output_dir).checkpoint(2) / "momentum.safetensors")
    own = gradients["stage4"]
    assert len(own) < len(gradients["all"]) / 2
    assert own["stages.3.blocks.0.conv1.weight"].abs().max() > 0
    for name, value in own.items():
        torch.testing.assert_close(value, gradients["all"][name], rtol=1e-5, atol=1e-8)


def test_gradient_checkpointing_goes_with_frozen_stages(tiny_bit: Path) -> None:
    model = load_bit(str(tiny_bit), keep_head=True).train()
    images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    found = []
    for trainable, checkpointing in (("all", False), ("stage4", True)):
        freeze(model, trainable)  # type: ignore[arg-type]
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        forward(model, images).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert {name.split(".")[0] for name in found[1]} == {"stages", "norm", "head"}
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, found[0][name])


def test_counts_are_those_of_the_network(tiny_bit: Path) -> None:
    with torch.device("meta"):
        large = bit_mixup.models.timm.create_model("resnetv2_50x1_bit", pretrained=False, num_classes=7)  # type: ignore[attr-defined]
    tiny = find_weights(str(tiny_bit)).shape
    for model, shape, classes in (
        (large, ARCHITECTURES["resnetv2_50x1_bit"], 7),
        (load_bit(str(tiny_bit), keep_head=True), tiny, 4),
    ):
        freeze(model, "stage4")
        assert shape.last_stage_count(classes) == sum(p.numel() for p in model.parameters() if p.requires_grad)
        freeze(model, "head")
        assert shape.head_count(classes) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each picture that PIL decodes."""
    found: list[int] = []
    prepare = ImageFile.ImageFile.load_prepare

    def counting(self: ImageFile.ImageFile) -> None:
        found.append(1)
        prepare(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", counting)
    return found


def test_the_second_run_reads_the_features_and_decodes_no_training_picture(
    probe: dict[str, Any], tmp_path: Path, cache: Path, decoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    first = bit_mixup.transfer(**probe)
    assert "features of 40 pictures computed in " in capsys.readouterr().out
    (kept,) = cache.iterdir()
    before, count = (kept / "features.safetensors").read_bytes(), len(decoded)
    decoded.clear()
    second = bit_mixup.transfer(**(probe | {"output_dir": tmp_path / "second"}))
    assert f"features of 40 pictures read from {kept}" in capsys.readouterr().out
    assert count - len(decoded) == 40
    assert len(decoded) >= len(first.plan.data.test)  # and some mistakes once more, for the report
    assert (kept / "features.safetensors").read_bytes() == before
    for name in ("model/model.safetensors", "predictions.csv"):
        assert (tmp_path / "second" / name).read_bytes() == (first.output_dir / name).read_bytes()
    assert second.report == first.report
    other = bit_mixup.transfer(**(probe | {"output_dir": tmp_path / "third", "seed": 1, "corrupt_labels": 0.2}))
    assert list(cache.iterdir()) == [kept], "neither seed nor labels have a say in features"
    assert other.report != first.report


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures of two classes in a folder."""
    for label in ("a", "b"):
        (tmp_path / "set" / "train" / label).mkdir(parents=True)
        for index in range(3):
            pixels = np.random.default_rng((ord(label), index)).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / "train" / label / f"{index}.bmp")
    return tmp_path / "set"


def kept(
    part: Part, model: Any, cache: Path, *, view: View = VIEW, precision: Precision = "fp32", **about: Any
) -> tuple[Tensor, str]:
    """Features, and what was said about them."""
    features, notes = kept_features(model, part, view, Accelerator(cpu=True), about=about, folder=cache, precision=precision)
    return features, "\n".join(notes)


def test_whatever_decides_the_features_decides_where_they_are_kept(pictures: Path, tiny_bit: Path, cache: Path) -> None:
    model = load_bit(str(tiny_bit), num_classes=2)
    part = load_image_dataset(str(pictures)).train
    features, said = kept(part, model, cache)
    assert "computed" in said
    torch.testing.assert_close(features, features_of(model, part), rtol=1e-5, atol=1e-5)

    def cases() -> Iterator[tuple[str, tuple[Tensor, str]]]:
        yield "crop", kept(part, model, cache, view=View(resize_size=48, crop_size=32, flip=False, interpolation="bilinear"))
        yield "filter", kept(part, model, cache, view=View(resize_size=48, crop_size=40, flip=False, interpolation="bicubic"))
        yield "precision", kept(part, model, cache, precision="bf16")
        yield "arguments", kept(part, model, cache, std_eps=1e-10)
        yield "rows", kept(part.subset(np.arange(2)), model, cache)
        yield "order", kept(part.subset(np.arange(len(part))[::-1]), model, cache)
        with torch.no_grad():
            model.stem.conv.weight[0, 0, 0, 0] += 1e-3
        yield "weights", kept(part, model, cache)
        file = next(iter(sorted(pictures.rglob("*.bmp"))))
        stat, content = file.stat(), bytearray(file.read_bytes())
        content[-1] ^= 1  # a pixel: neither name, size nor times of the file tell
        file.write_bytes(content)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        yield "pixels", kept(load_image_dataset(str(pictures)).train, model, cache)

    for number, (what, (_, said)) in enumerate(cases(), start=2):
        assert "computed" in said, what
        assert len(list(cache.iterdir())) == number, what
    assert "read from" in kept(load_image_dataset(str(pictures)).train, model, cache)[1]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another"])
def test_damaged_features_are_computed_anew(pictures: Path, tiny_bit: Path, cache: Path, damage: str) -> None:
    model, part = load_bit(str(tiny_bit), num_classes=2), load_image_dataset(str(pictures)).train
    features, _ = kept(part, model, cache)
    (file,) = cache.glob("*/features.safetensors")
    whole = file.read_bytes()
    if damage == "another":
        safetensors.torch.save_file({"features": torch.zeros_like(features)}, file)
    elif damage == "empty":
        file.unlink()
    else:
        file.write_bytes(whole[:-5] if damage == "cut" else whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    again, said = kept(part, model, cache)
    assert f"NOTE: {file} " in said
    assert "they are computed anew" in said
    assert torch.equal(again, features)
    assert file.read_bytes() == whole
    assert "read from" in kept(part, model, cache)[1]


def test_features_that_can_not_be_kept_do_not_stop_a_run(pictures: Path, tiny_bit: Path, cache: Path) -> None:
    model, part = load_bit(str(tiny_bit), num_classes=2), load_image_dataset(str(pictures)).train
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where a folder should be")
    features, said = kept(part, model, cache)
    assert len(features) == len(part)
    assert "but not kept: " in said
    assert "can not be written" in said


def test_a_picture_that_is_gone_is_named(pictures: Path, tiny_bit: Path, cache: Path) -> None:
    model, part = load_bit(str(tiny_bit), num_classes=2), load_image_dataset(str(pictures)).train
    shutil.rmtree(pictures / "train" / "a")
    with pytest.raises(DataError, match=r"\.bmp .*can not be read: .*No such file"):
        kept(part, model, cache)


@pytest.mark.parametrize("trainable", ["head", "stage4"])
def test_a_killed_run_goes_on_to_the_same_bits(quick: dict[str, Any], tmp_path: Path, cache: Path, trainable: str) -> None:
    options = quick | {"trainable": trainable, "mixup_alpha": 0.3, "feature_dropout": 0.1, "base_lr": 0.05}
    whole = bit_mixup.transfer(**options)
    broken = tmp_path / "broken"
    shutil.copytree(whole.output_dir, broken)
    for name in ("model", "checkpoints/step_000006"):
        shutil.rmtree(broken / name)  # killed between steps 4 and 6
    shutil.rmtree(cache, ignore_errors=True)  # and nothing is left of the features
    again = bit_mixup.transfer(**(options | {"output_dir": broken}), resume=True)
    for name in ("model/model.safetensors", "checkpoints/step_000006/momentum.safetensors"):
        assert (broken / name).read_bytes() == (whole.output_dir / name).read_bytes()
    assert again.report == whole.report
    with pytest.raises(CheckpointError, match=f"trainable: {trainable} -> all"):
        bit_mixup.transfer(**(options | {"output_dir": broken, "trainable": "all"}), resume=True)


def test_a_cut_into_micro_batches_changes_rounding_alone(probe: dict[str, Any], tmp_path: Path) -> None:
    heads = []
    for micro_batch in (None, 8):
        options = probe | {
            "output_dir": tmp_path / str(micro_batch),
            "micro_batch": micro_batch,
            "mixup_alpha": 0.4,
            "base_lr": 0.1,
        }
        result = bit_mixup.transfer(**options)
        heads.append(result.model.get_classifier().weight)
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-5, atol=1e-6)


def test_mixing_of_features_shrinks_labels_but_no_pictures(probe: dict[str, Any]) -> None:
    result = bit_mixup.transfer(**probe, mixup_alpha=0.4, validation_fraction=0.2, prediction_rule="auto")
    assert result.record.input_shrink == 1
    assert result.record.mean_image is None
    assert result.record.label_shrink == pytest.approx(result.plan.law.theta_bar)
    text = result.plan.text()
    assert "mixup on features, alpha 0.4" in text
    assert "a picture's pooled features keep" in text


def test_scores_on_the_way_and_corrupted_labels(probe: dict[str, Any]) -> None:
    result = bit_mixup.transfer(**probe, score_every=3, corrupt_labels=0.25, label_smoothing=0.1, smooth_toward="frequencies")
    scores = RunFolder(result.output_dir).read_scores()
    assert [row["step"] for row in scores] == [3, 6]
    assert scores[-1]["accuracy"] == result.report.accuracy
    assert json.loads((result.output_dir / "report.json").read_text())["memorisation"]


def test_the_rule_mixes_no_features_unasked() -> None:
    weights = find_weights("bundled")
    for asked, alpha in (({}, 0.0), ({"mixup_alpha": 0.2}, 0.2)):
        config = configure(TransferConfig, dataset="digits", trainable="head", **asked)
        found = resolve(config, num_examples=30_000, image_area=64, weights=weights)
        assert (found.rule.mixup_alpha, found.hyper.mixup_alpha) == (0.1, alpha)
    assert resolve(config, num_examples=30_000, image_area=64, weights=weights).reasons["mixup_alpha"] == "--mixup-alpha"
    config = configure(TransferConfig, dataset="digits", trainable="stage4")
    assert resolve(config, num_examples=30_000, image_area=64, weights=weights).hyper.mixup_alpha == 0.1


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("streaming", True),
        ("mixup_partner", "neighbours"),
        ("mixup_stage", 2),
        ("mixup_form", "modified"),
        ("input_noise", 0.1),
        ("micro_batch", "auto"),
    ],
)
def test_what_needs_pictures_does_not_go_with_a_probe(flag: str, value: object) -> None:
    options = {"dataset": "digits", "mixup_alpha": 0.2, flag: value}
    assert configure(TransferConfig, **options, trainable="stage4")
    with pytest.raises(
        ConfigError, match=f"{flag} {value} does not go with trainable head.* Leave out --{flag.replace('_', '-')} or"
    ):
        configure(TransferConfig, **options, trainable="head")


def test_plans_say_what_is_trained(probe: dict[str, Any], cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "plan",
        "--dataset",
        "digits",
        "--model",
        str(probe["model"]),
        "--resolution",
        "model",
        "--preset",
        "light",
        "--threads",
        "1",
    ]
    texts = {}
    for trainable in ("all", "stage4", "head"):
        main([*words, "--trainable", trainable, *(["--time"] if trainable == "head" else [])])
        texts[trainable] = " ".join(capsys.readouterr().out.split())
    shape = find_weights(str(probe["model"])).shape
    total = shape.parameter_count(10)
    assert f"trains all weights: {total:,} of {total:,} parameters" in texts["all"]
    assert (
        f"trains the last stage, the normalisation behind it and the head: {shape.last_stage_count(10):,} of" in texts["stage4"]
    )
    assert "[--trainable stage4]" in texts["stage4"]
    assert f"trains the head alone: {shape.head_count(10):,} of {total:,} parameters [--trainable head]" in texts["head"]
    assert "features of whole pictures, computed once: crops and flips are off;" in texts["head"]
    assert f"kept in {cache}/" in texts["head"]
    assert "features are mixed only when asked" in texts["head"]
    assert "whole, as in evaluation" in texts["head"]
    assert "cropped" not in texts["head"]
    assert "minutes of training here" in texts["head"]
    assert "mirrored" in texts["stage4"]


def test_less_is_trained_in_less_memory_and_kept_on_less_disk(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {name: make_plan(configure(TransferConfig, **quick, trainable=name)) for name in ("all", "stage4", "head")}
    numbers = [plans[name].memory_bytes() for name in ("all", "stage4", "head")]
    assert numbers[0] > numbers[1] > numbers[2]
    parameters = plans["all"].trained_parameters
    room = 4 * parameters * 2  # for the model and some heads, not for checkpoints of the whole
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (10**12, 0, room))
    make_plan(configure(TransferConfig, **quick, trainable="head"))
    with pytest.raises(CheckpointError, match="checkpoints and the model take"):
        make_plan(configure(TransferConfig, **quick, trainable="stage4"))


def test_std_eps_has_a_say_in_where_features_are_kept(probe: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    for index, std_eps in enumerate((1e-8, 1e-3)):
        bit_mixup.transfer(**(probe | {"std_eps": std_eps, "output_dir": tmp_path / str(index)}))
    recipes = [json.loads((place / "recipe.json").read_text()) for place in cache.iterdir()]
    assert sorted(recipe["std_eps"] for recipe in recipes) == [1e-8, 1e-3]
    assert len({recipe["weights"] for recipe in recipes}) == 1


@pytest.mark.slow
def test_a_probe_trains_fifty_times_faster_than_the_whole_network(tmp_path: Path) -> None:
    """On the job of `make fine-tune`, shortened, in time of the processor, for others may use it as well."""
    cpu = {}
    for trainable, steps in (("all", 15), ("head", 500)):
        seconds, _ = benchmark.run(trainable, tmp_path / trainable, tmp_path / "features", steps=steps)
        cpu[trainable] = seconds["training"].cpu / steps
    assert cpu["all"] > benchmark.BAR * cpu["head"]
