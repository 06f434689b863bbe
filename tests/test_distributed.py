"""Do several processes compute what one computes? One torchrun launch for each world size does all that needs it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

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
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(WORKER.parent.parent), os.environ.get("PYTHONPATH", "")])}


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
    launch = [*TORCHRUN, "--standalone", "--nproc_per_node", str(world), str(WORKER), str(folder), str(tiny_bit), str(world)]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=300, check=False)
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


# --- processes that differ, are stopped, or end -----------------------------------------------------------------------

ALIKE = "Start all with the same command and versions, on the same data and the same run folder."
DISAGREEMENTS = {  # what is said by the first process, and by the last; which holds the odd value
    "option": "processes differ in --base-lr: {others} null, {last} 0.01; ",
    "seed": "processes differ in --seed: {others} 0, {last} 1. ",
    "data": "processes differ in --examples-per-class: {others} 4, {last} 5; what the plan found (data fingerprint): ",
    "checkpoint": 'processes differ in the newest checkpoint: {others} "none", {last} "step_000002". ',
    "weights": "processes differ in the weights (digest): {others} ",
}


def found(together: tuple[int, Path], what: str) -> list[Any]:
    """What each process has found."""
    world, folder = together
    return [json.loads((folder / f"found_{rank}.json").read_text())[what] for rank in range(world)]


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_processes_that_differ_do_not_start(together: tuple[int, Path], name: str) -> None:
    world, folder = together
    others = "rank 0 has" if world == 2 else f"each of ranks {', '.join(map(str, range(world - 1)))} has"
    expected = DISAGREEMENTS[name].format(others=others, last=f"rank {world - 1} has")
    heard = found(together, "disagreements")
    for rank in range(world):
        status, words = heard[rank][name]
        assert status == 2
        assert expected in words
        assert words.endswith(ALIKE)
    assert not any(list(path.glob("checkpoints/step_000006")) for path in folder.glob("own_*")), "nothing was trained"


def test_a_fault_of_one_process_stops_all(together: tuple[int, Path]) -> None:
    world, _ = together
    heard = found(together, "disagreements")
    for name, culprit, words in (
        ("missing", world - 1, 'nowhere": there is no such file or folder'),
        ("main cannot write", 0, "/proc/nowhere can not be written"),
    ):
        for rank in range(world):
            status, said = heard[rank][name]
            assert status == 2
            assert words in said
            assert (f"rank {culprit} of {world} can not go on, so all stop: " in said) is (rank != culprit)


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(together: tuple[int, Path]) -> None:
    _, folder = together
    heard = found(together, "signalled")
    assert [status for status, _ in heard] == [128 + signal.SIGUSR1] * len(heard)
    [step] = {
        re.search(r"stopped after step (\d+); .*/step_0000\d\d holds it. Go on with --resume", words)[1] for _, words in heard
    }
    assert 0 < int(step) < 16
    models = [(folder / name / "model" / "model.safetensors").read_bytes() for name in ("signalled", "undisturbed")]
    assert models[0] == models[1]


def test_processes_always_make_equal_numbers_of_backward_calls(together: tuple[int, Path]) -> None:
    counts = found(together, "backward calls")
    assert list(counts[0]) == ["25", "33", "35", "65"]
    assert all(count == counts[0] for count in counts)
    assert min(counts[0].values()) >= 2


@pytest.fixture(scope="module")
def machines(tiny_bit: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The folder that two machines of one process each filled, and how their agents ended, which meet by address."""
    folder = tmp_path_factory.mktemp("machines")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    meeting = [
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        address,
        "--rdzv-id",
        "test",
    ]
    launch = [*TORCHRUN, *meeting, str(WORKER), str(folder), str(tiny_bit), "machines"]
    agents = [subprocess.Popen(launch, env=environment(), stdout=PIPE, stderr=STDOUT, text=True) for _ in range(2)]
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    ranks = sorted(line for text in said for line in re.findall(r"world size \d, rank \d", text))
    assert ranks == ["world size 2, rank 0", "world size 2, rank 1"], "\n".join(said)
    assert all(len(re.findall(r"world size \d, rank \d", text)) == 1 for text in said), "one process on each machine"
    return folder, [agent.returncode for agent in agents]


def test_two_machines_compute_what_two_processes_of_one_compute(
    machines: tuple[Path, list[int]], together: tuple[int, Path]
) -> None:
    world, folder = together
    if world != 2:
        pytest.skip("of two processes")
    models = [(place / "whole" / "model" / "model.safetensors").read_bytes() for place in (machines[0], folder)]
    assert models[0] == models[1]


def test_a_process_that_dies_ends_the_run_with_a_message(machines: tuple[Path, list[int]]) -> None:
    folder, statuses = machines
    assert statuses == [1, 1], "torchrun on both machines says that the run has failed"
    [report] = [json.loads(path.read_text()) for path in folder.glob("bereft_*.json")]
    assert report["status"] == 2
    [last] = re.findall(
        r"another process of this run has ended or does not answer. The last whole checkpoint is (\S+); mend what ended it .*, "
        r"and start all processes again with --resume",
        report["words"],
    )
    assert Path(last) == RunFolder(folder / "bereft").list_checkpoints()[-1]
    assert report["seconds"] < 60
