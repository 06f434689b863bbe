"""Does the loop compute what the rule says, whatever the cut, and go on to the same bits after any interruption?"""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.layers.std_conv import StdConv2d
from torch import Tensor

import bit_mixup
from bit_mixup.data import load_image_dataset
from bit_mixup.environment import Speedups
from bit_mixup.errors import CheckpointError, NonFiniteError
from bit_mixup.examples import TrainingStream
from bit_mixup.hyperrule import HyperParameters, learning_rate
from bit_mixup.images import View
from bit_mixup.laws import TrainingLaw
from bit_mixup.mixup import Mixup
from bit_mixup.models import Normalize, load_bit
from bit_mixup.runs import RunFolder
from bit_mixup.sampling import MicroBatch, cut_batch
from bit_mixup.training import train as train_model

VIEW = View(resize_size=48, crop_size=40, flip=False, interpolation="bilinear")
RULE = HyperParameters(
    resize_size=48, crop_size=40, steps=60, warmup_steps=10, decay_steps=(100,), batch_size=64, base_lr=0.003, mixup_alpha=0.4
)
UNEVEN = [[MicroBatch(start=0, groups=(8, 8, 8)), MicroBatch(start=24, groups=(8,)), MicroBatch(start=32, groups=(8, 8, 8, 8))]]


@pytest.fixture(scope="module")
def stream() -> TrainingStream:
    return TrainingStream(part=load_image_dataset("digits", examples_per_class=20).train, view=VIEW, seed=3)


def train(
    tiny_bit: Path,
    stream: TrainingStream,
    folder: Path,
    cuts: list[list[MicroBatch]],
    *,
    dtype: torch.dtype,
    hyper: HyperParameters = RULE,
    speedups: Speedups = Speedups(),  # noqa: B008  (it is frozen)
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of all steps and the final weights."""
    model = load_bit(str(tiny_bit), num_classes=10).to(dtype)
    run = RunFolder(folder)
    folder.mkdir()
    law = TrainingLaw(alpha=hyper.mixup_alpha)
    train_model(
        model, stream, hyper, Accelerator(cpu=True), law=law, cuts=cuts, run=run, speedups=speedups, seed=3, save_every=1000
    )
    assert type(model.stem.conv) is StdConv2d, "the layers are timm's again"
    assert model.stem.conv.weight.is_contiguous()
    return [row["loss"] for row in run.read_metrics()], model.state_dict()


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference of a weight, as a share of the largest weight of its tensor."""
    return max(float((first[n] - second[n]).abs().max() / first[n].abs().max().clamp(min=1e-3)) for n in first)


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Norm of the difference of all weights, as a share of the norm of the weights."""
    one, other = (torch.cat([tensor.flatten() for tensor in weights.values()]) for weights in (first, second))
    return float((one - other).norm() / one.norm())


def cuts_of_one_process() -> dict[str, list[list[MicroBatch]]]:
    return {"1x64": cut_batch(64), "4x16": cut_batch(64, micro_batch=16), "uneven": UNEVEN}


def test_no_cut_changes_anything_in_double_precision(tiny_bit: Path, stream: TrainingStream, tmp_path: Path) -> None:
    whole_losses, whole = train(tiny_bit, stream, tmp_path / "1x64", cut_batch(64), dtype=torch.float64)
    assert len(whole_losses) == 60
    assert whole_losses[-1] < whole_losses[0]
    for name, cuts in list(cuts_of_one_process().items())[1:]:
        losses, weights = train(tiny_bit, stream, tmp_path / name, cuts, dtype=torch.float64)
        assert losses == pytest.approx(whole_losses, rel=1e-9)
        assert difference(whole, weights) < 1e-9


def test_cuts_agree_in_single_precision_for_ten_steps(tiny_bit: Path, stream: TrainingStream, tmp_path: Path) -> None:
    hyper = replace(RULE, steps=12)  # the head first has a gradient at step 0, and moves from step 1 on
    runs = {
        name: train(tiny_bit, stream, tmp_path / name, cuts, dtype=torch.float32, hyper=hyper)
        for name, cuts in cuts_of_one_process().items()
    }
    for losses, weights in runs.values():
        assert losses[:10] == pytest.approx(runs["1x64"][0][:10], rel=1e-4)
        assert distance(runs["1x64"][1], weights) < 1e-4


@pytest.mark.parametrize(
    "off",
    [{"memory_format": "contiguous"}, {"quick_layers": False}, {"keep_filters": False}, {"fused_optimizer": False}],
    ids=str,
)
def test_no_speedup_changes_anything_in_double_precision(
    off: dict[str, Any], tiny_bit: Path, stream: TrainingStream, tmp_path: Path
) -> None:
    hyper = replace(RULE, steps=14)
    cuts = cut_batch(64, micro_batch=32)
    with_all = train(tiny_bit, stream, tmp_path / "all", cuts, dtype=torch.float64, hyper=hyper)
    without = train(tiny_bit, stream, tmp_path / "off", cuts, dtype=torch.float64, hyper=hyper, speedups=Speedups(**off))
    assert without[0] == pytest.approx(with_all[0], rel=1e-9)
    assert difference(without[1], with_all[1]) < 1e-9


def test_a_step_is_sgd_on_the_mean_over_the_batch(tiny_bit: Path, stream: TrainingStream, tmp_path: Path) -> None:
    """Against momentum SGD written out, one example at a time."""
    hyper = replace(RULE, steps=4, warmup_steps=2, batch_size=16, weight_decay=0.01)
    losses, trained = train(tiny_bit, stream, tmp_path / "run", cut_batch(16, micro_batch=8), dtype=torch.float64, hyper=hyper)
    model = load_bit(str(tiny_bit), num_classes=10).double()
    velocity = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for step in range(4):
        pictures, labels = stream.__getitems__(range(step * 16, step * 16 + 16))
        images = Normalize.of(model)(torch.from_numpy(pictures), torch.float64)
        targets = F.one_hot(torch.from_numpy(labels), 10).double()
        images, targets = Mixup(alpha=0.4)(images, targets, seed=3, step=step, start=step * 16, groups=(8, 8))
        loss = sum(-(t * model(x[None]).log_softmax(1)[0]).sum() for x, t in zip(images, targets, strict=True)) / 16
        model.zero_grad()
        loss.backward()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-10)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gradient = parameter.grad + 0.01 * parameter
                velocity[name] = gradient if step == 0 else 0.9 * velocity[name] + gradient
                parameter -= learning_rate(step, hyper) * velocity[name]
    assert difference(model.state_dict(), trained) < 1e-10


def test_the_head_moves_at_update_1_and_the_body_at_update_2(quick: dict[str, Any]) -> None:
    folders = {}
    for steps in (1, 2, 3):
        options = quick | {"warmup_steps": 1, "decay_steps": (2,), "steps": steps, "output_dir": quick["output_dir"] / str(steps)}
        result = bit_mixup.transfer(**options)
        folders[steps] = result.model.state_dict()
    start = load_bit(str(quick["model"]), num_classes=10).state_dict()
    heads = [name for name in start if name.startswith("head.")]
    body = [name for name in start if not name.startswith("head.")]
    assert (len(heads), len(body)) == (2, len(start) - 2)
    moved = {steps: {name for name in start if not torch.equal(start[name], after[name])} for steps, after in folders.items()}
    assert moved[1] == set(), "the first rate is 0"
    assert moved[2] == set(heads), "with a zero head the body has no gradient yet"
    assert moved[3] == set(start)


def weights_of(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def in_a_child(action: Callable[[], object]) -> int:
    """Runs something in a forked process, without the cost of a new interpreter; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(function: str, path_part: str, count: int, *, before: bool) -> None:
    """Makes a function of `os` end this process by SIGKILL when it meets a path for the count-th time."""
    original = getattr(os, function)
    seen = 0

    def deadly(*arguments: Any, **options: Any) -> Any:
        nonlocal seen
        path = os.readlink(f"/proc/self/fd/{arguments[0]}") if isinstance(arguments[0], int) else str(arguments[-1])
        seen += path_part in path
        if path_part in path and seen == count and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if path_part in path and seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, function, deadly)


@pytest.mark.parametrize(
    ("moment", "kept"),
    [
        (("fsync", "step_000004/momentum", 1, True), ["step_000002"]),
        (("rename", "step_000004", 1, True), ["step_000002"]),
        (("rename", "step_000004", 1, False), ["step_000002", "step_000004"]),
        (("rename", "step_000002", 1, True), []),
    ],
    ids=["while a checkpoint is written", "between write and rename", "after the rename", "before there is any"],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    quick: dict[str, Any], tmp_path: Path, moment: tuple[str, str, int, bool], kept: list[str]
) -> None:
    quick["mixup_alpha"] = 0.4
    bit_mixup.transfer(**quick)

    killed = quick | {"output_dir": tmp_path / "killed"}

    def run() -> None:
        kill_at(*moment[:3], before=moment[3])
        bit_mixup.transfer(**killed)

    assert in_a_child(run) == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "killed" / "checkpoints").glob("step_*")) == kept
    assert not (tmp_path / "killed" / "model").exists()
    bit_mixup.transfer(**killed, resume=True, num_workers=1 if kept else 0)
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "run")
    assert [row["step"] for row in RunFolder(tmp_path / "killed").read_metrics()] == list(range(6))
    left_over = list((tmp_path / "killed").rglob(".writing-*"))
    assert left_over == []


def test_a_run_killed_during_a_step_goes_on_to_the_same_bits(quick: dict[str, Any], tmp_path: Path) -> None:
    bit_mixup.transfer(**quick)
    killed = quick | {"output_dir": tmp_path / "killed"}

    def run() -> None:
        backward, calls = Accelerator.backward, 0

        def deadly(self: Accelerator, *arguments: Any, **options: Any) -> None:
            nonlocal calls
            calls += 1
            backward(self, *arguments, **options)
            if calls == 4:  # in step 3, gradients computed, nothing applied yet
                os.kill(os.getpid(), signal.SIGKILL)

        Accelerator.backward = deadly  # type: ignore[method-assign]
        bit_mixup.transfer(**killed)

    assert in_a_child(run) == -signal.SIGKILL
    bit_mixup.transfer(**killed, resume=True)
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "run")


def test_resume_without_a_checkpoint_starts_and_a_finished_run_is_left_as_it_is(quick: dict[str, Any]) -> None:
    first = bit_mixup.transfer(**quick, resume=True)
    before = weights_of(quick["output_dir"])
    again = bit_mixup.transfer(**quick, resume=True)
    assert weights_of(quick["output_dir"]) == before
    assert again.report == first.report


def test_resuming_with_another_configuration_stops_and_shows_the_difference(quick: dict[str, Any]) -> None:
    bit_mixup.transfer(**quick)
    with pytest.raises(CheckpointError, match="seed: 0 -> 1") as stopped:
        bit_mixup.transfer(**(quick | {"seed": 1, "base_lr": 0.01}), resume=True)
    assert "base_lr: None -> 0.01" in str(stopped.value)


def test_resuming_with_other_data_stops(quick: dict[str, Any], tmp_path: Path) -> None:
    from PIL import Image

    for label in ("x", "y"):
        for index in range(4):
            path = tmp_path / "pictures" / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (index * 20, 0, 200)).save(path)
    options = quick | {"dataset": str(tmp_path / "pictures"), "examples_per_class": None, "batch_size": 4}
    bit_mixup.transfer(**options)
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "x" / "new.png")
    with pytest.raises(CheckpointError, match="data:"):
        bit_mixup.transfer(**options, resume=True)


def test_worker_processes_change_nothing(quick: dict[str, Any], tmp_path: Path) -> None:
    bit_mixup.transfer(**quick)
    bit_mixup.transfer(**(quick | {"output_dir": tmp_path / "two", "num_workers": 2}))
    assert weights_of(tmp_path / "two") == weights_of(tmp_path / "run")


def test_only_the_newest_checkpoints_stay(quick: dict[str, Any]) -> None:
    bit_mixup.transfer(**(quick | {"save_every": 1, "keep_checkpoints": 3}))
    names = sorted(path.name for path in (quick["output_dir"] / "checkpoints").iterdir())
    assert names == ["step_000004", "step_000005", "step_000006"]


def test_a_damaged_checkpoint_is_named(quick: dict[str, Any]) -> None:
    bit_mixup.transfer(**quick)
    damaged = quick["output_dir"] / "checkpoints" / "step_000006" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="step_000006 can not be read"):
        bit_mixup.transfer(**quick, resume=True)


@pytest.mark.parametrize("more", [{}, {"score_every": 1}], ids=["unwatched", "scored on the way"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_examples(quick: dict[str, Any], more: dict[str, int]) -> None:
    quick |= {"base_lr": 1e30, "warmup_steps": 2, "decay_steps": (6,), "log_every": 4, "save_every": 5} | more
    with pytest.raises(NonFiniteError, match=r"step (\d+): .*train row \d+") as stopped:
        bit_mixup.transfer(**quick)
    run = RunFolder(quick["output_dir"])
    found = json.loads(run.nonfinite.read_text())
    assert f"step {found['step']}:" in str(stopped.value)
    assert len(found["examples"]) == 16
    data = load_image_dataset("digits", examples_per_class=4)
    stream = TrainingStream(part=data.train, view=VIEW, seed=0)
    expected = {int(data.train.rows[stream.row(p)]) for p in range(found["step"] * 16, found["step"] * 16 + 16)}
    assert {int(name.rsplit("row ", 1)[1].rstrip(")")) for name in found["examples"]} == expected
    assert [row["step"] for row in run.read_metrics()] == list(range(found["step"]))
    assert run.list_checkpoints() == []


def test_no_checkpoint_holds_a_weight_that_is_not_finite(quick: dict[str, Any]) -> None:
    """Also where the loss of the last step before the save was finite and only the update was not."""
    quick |= {"base_lr": 1e38, "warmup_steps": 0, "decay_steps": (6,), "save_every": 1, "log_every": 50, "momentum": 0.0}
    with pytest.raises(NonFiniteError):
        bit_mixup.transfer(**quick)
    for checkpoint in RunFolder(quick["output_dir"]).list_checkpoints():
        tensors = safetensors.torch.load_file(checkpoint / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_metrics_hold_the_rate_of_each_step_and_the_tracker_hears_of_them(quick: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = bit_mixup.transfer(**quick, tracker="tensorboard")
    rows = RunFolder(result.output_dir).read_metrics()
    assert [row["lr"] for row in rows] == [learning_rate(step, result.plan.resolution.hyper) for step in range(6)]
    (events,) = (result.output_dir / "bit_mixup").glob("events*")
    log = EventAccumulator(str(events)).Reload()
    for name in ("loss", "lr"):
        assert [(event.step, event.value) for event in log.Scalars(name)] == [
            (row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows
        ]
    for name, value in (("test_accuracy", result.report.accuracy), ("test_nll", result.report.nll)):
        assert [(event.step, event.value) for event in log.Scalars(name)] == [(6, pytest.approx(value, rel=1e-6))]


def test_bf16_trains_near_fp32_and_is_recorded(quick: dict[str, Any], tmp_path: Path) -> None:
    full = bit_mixup.transfer(**quick)
    half = bit_mixup.transfer(**(quick | {"output_dir": tmp_path / "half", "precision": "bf16"}))
    assert half.plan.resolved()["precision"] == "bf16"
    losses = [[row["loss"] for row in RunFolder(r.output_dir).read_metrics()] for r in (full, half)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert all(p.dtype == torch.float32 for p in half.model.parameters())


def test_the_final_model_is_what_timm_loads(quick: dict[str, Any]) -> None:
    import timm

    result = bit_mixup.transfer(**quick)
    loaded = timm.create_model(f"local-dir:{result.output_dir / 'model'}", pretrained=True).eval()
    assert loaded.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    assert loaded.pretrained_cfg["input_size"] == (3, 40, 40)
    assert loaded.pretrained_cfg["crop_mode"] == "squash"
    images = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(images), result.model.eval()(images))
