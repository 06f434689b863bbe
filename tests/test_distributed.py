"""Do several processes compute what one computes? One torchrun launch for each world size does all that needs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from test_training import difference

from bit_mixup.cli import main as command
from bit_mixup.data import load_image_dataset
from bit_mixup.evaluation import evaluate
from bit_mixup.runs import RunFolder

WORKER = Path(worker.__file__)


@pytest.fixture(scope="module")
def alone(tiny_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a single process computes."""
    folder = tmp_path_factory.mktemp("alone")
    accelerator = Accelerator(cpu=True)
    worker.train(folder / "double", str(tiny_bit), accelerator)
    worker.pretrain(folder, str(tiny_bit), accelerator)
    worker.follow_laws(folder, str(tiny_bit), accelerator)
    safetensors.torch.save_file({"logits": worker.score(str(tiny_bit), accelerator)}, folder / "logits_0.safetensors")
    command(worker.options(folder / "whole", str(tiny_bit)))
    return folder


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def together(request: pytest.FixtureRequest, tiny_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """World size, and the folder that so many processes filled."""
    world = request.param
    folder = tmp_path_factory.mktemp(f"world{world}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), str(WORKER)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(WORKER.parent.parent), os.environ.get("PYTHONPATH", "")])}
    launch += [str(folder), str(tiny_bit), str(world)]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    expected = [f"world size {world}, rank {rank}" for rank in range(world)]
    assert sorted(re.findall(r"world size \d, rank \d", done.stdout)) == expected
    return world, folder


def test_training_does_not_depend_on_the_number_of_processes(alone: Path, together: tuple[int, Path]) -> None:
    _, folder = together
    losses = [[row["loss"] for row in RunFolder(f / "double").read_metrics()] for f in (alone, folder)]
    assert len(losses[0]) == 60
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    name = "double/checkpoints/step_000060/model.safetensors"
    one, several = (safetensors.torch.load_file(f / name) for f in (alone, folder))
    assert difference(one, several) < 1e-9


@pytest.mark.parametrize(("name", "steps"), [("several", 10), ("distilled", 10), ("partners", 6), ("approximate", 6)])
def test_pretraining_distillation_and_other_laws_do_not_depend_on_it_either(
    alone: Path, together: tuple[int, Path], name: str, steps: int
) -> None:
    _, folder = together
    losses = [[row["loss"] for row in RunFolder(f / name).read_metrics()] for f in (alone, folder)]
    assert len(losses[0]) == steps
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    one, several = (
        safetensors.torch.load_file(f / name / "checkpoints" / f"step_{steps:06d}" / "model.safetensors") for f in (alone, folder)
    )
    assert difference(one, several) < 1e-9


def test_evaluation_sees_each_example_once_on_any_number_of_processes(alone: Path, together: tuple[int, Path]) -> None:
    world, folder = together
    expected = safetensors.torch.load_file(alone / "logits_0.safetensors")["logits"]
    labels = torch.from_numpy(load_image_dataset("digits").test.labels[: worker.NUM_SCORED]) % 4
    reports = [evaluate(expected, labels, ["a", "b", "c", "d"])]
    for rank in range(world):
        logits = safetensors.torch.load_file(folder / f"logits_{rank}.safetensors")["logits"]
        assert logits.shape == (worker.NUM_SCORED, 4)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        reports.append(evaluate(logits, labels, ["a", "b", "c", "d"]))
    assert len(reports) == world + 1
    for report in reports[1:]:
        assert report.class_support == reports[0].class_support
        assert report.accuracy == reports[0].accuracy
        assert report.nll == pytest.approx(reports[0].nll, abs=1e-6)


def test_a_resumed_run_of_several_processes_ends_in_the_same_bits(together: tuple[int, Path]) -> None:
    _, folder = together
    whole, resumed = ((folder / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed
    assert [row["step"] for row in RunFolder(folder / "resumed").read_metrics()] == list(range(6))


def test_a_whole_run_agrees_with_one_process(alone: Path, together: tuple[int, Path]) -> None:
    world, folder = together
    plans = [json.loads((f / "whole" / "plan.json").read_text()) for f in (alone, folder)]
    assert [plan["environment"]["processes"] for plan in plans] == [1, world]
    assert plans[0]["resolved"] == plans[1]["resolved"]
    losses = [[row["loss"] for row in RunFolder(f / "whole").read_metrics()] for f in (alone, folder)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    reports = [json.loads((f / "whole" / "report.json").read_text()) for f in (alone, folder)]
    assert reports[0]["class_support"] == reports[1]["class_support"]
    assert reports[1]["nll"] == pytest.approx(reports[0]["nll"], abs=1e-4)
