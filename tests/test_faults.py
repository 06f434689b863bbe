"""What happens when memory runs out, a signal comes, or a disk fails? The real faults, in this process where it survives them."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fault_worker as worker
import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from PIL import Image as Pillow
from test_cli import flags
from test_training import difference

import bit_mixup
from bit_mixup.checkpoint import save_checkpoint
from bit_mixup.cli import main as command
from bit_mixup.data import load_image_dataset
from bit_mixup.errors import BitMixupError, CheckpointError, DataError, Interrupted, MemoryShortError
from bit_mixup.examples import TrainingStream
from bit_mixup.hyperrule import HyperParameters
from bit_mixup.images import View
from bit_mixup.interruption import Interruption
from bit_mixup.laws import TrainingLaw
from bit_mixup.memory import control_group_rest, find_cuts, is_out_of_memory, largest_pass, memory_explained, smaller_cuts
from bit_mixup.models import load_bit
from bit_mixup.objectives import SoftmaxCrossEntropy
from bit_mixup.prediction import in_pieces_that_fit
from bit_mixup.runs import RunFolder
from bit_mixup.sampling import cut_batch
from bit_mixup.storage import whole_folder, write_bytes
from bit_mixup.training import train


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What became of the cases that need processes of their own."""
    folder = tmp_path_factory.mktemp("faults")
    launch = [sys.executable, worker.__file__, str(folder)]
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | worker.ALLOCATOR | {"PYTHONPATH": path}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, json.loads((folder / "outcomes.json").read_text())


# Memory

VIEW = View(resize_size=48, crop_size=40, flip=False, interpolation="bilinear")


@pytest.mark.parametrize("name", worker.MEASURED)
def test_the_plans_estimate_of_memory_is_right_within_a_quarter(outcomes: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, codes = outcomes
    assert codes[name] == 0
    found = json.loads((folder / f"{name}.json").read_text())
    assert found["estimate"] == pytest.approx(found["measured"], rel=0.25)


def halvings(folder: Path, name: str) -> tuple[list[str], bool]:
    """The micro-batches that a run went on with, and whether it took to gradient checkpointing."""
    text = (folder / f"{name}.txt").read_text()
    return [part.split(" ")[0] for part in text.split("going on with ")[1:]], worker.took_to_checkpointing(folder, name)


@pytest.mark.parametrize(("end", "steps"), [("halved", ["8"]), ("checkpointed", ["8", "gradient"])])
def test_out_of_memory_leads_to_smaller_micro_batches_and_then_to_checkpointing(
    outcomes: tuple[Path, dict[str, Any]], end: str, steps: list[str]
) -> None:
    folder, codes = outcomes
    limited = codes["limits"][end]
    assert limited, f"no limit led to a run that was {end}"
    assert halvings(folder, "free") == ([], False)
    assert halvings(folder, limited) == (steps, end == "checkpointed")
    free, other = (safetensors.torch.load_file(folder / name / "model" / "model.safetensors") for name in ("free", limited))
    assert difference(free, other) < 1e-5
    assert len(RunFolder(folder / limited).read_metrics()) == 2


def test_where_nothing_fits_the_run_says_so(outcomes: tuple[Path, dict[str, Any]]) -> None:
    folder, codes = outcomes
    assert codes["limits"]["refused"]
    text = (folder / f"{codes['limits']['refused']}.txt").read_text()
    assert "bit-mixup: error: " in text
    assert "out of memory" in text
    assert "Traceback" not in text


class Greedy(SoftmaxCrossEntropy):
    """Asks for more memory than any machine has, whatever the batch."""

    def targets(self, labels: torch.Tensor, *, num_classes: int, dtype: torch.dtype) -> torch.Tensor:
        torch.empty(2**60)
        return super().targets(labels, num_classes=num_classes, dtype=dtype)


def test_where_not_even_the_least_fits_training_stops(tiny_bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = TrainingStream(part=load_image_dataset("digits").train, view=VIEW, seed=0)
    hyper = HyperParameters(
        resize_size=48, crop_size=40, steps=2, warmup_steps=0, decay_steps=(), batch_size=16, base_lr=0.003, mixup_alpha=0.4
    )
    model, law, run = load_bit(str(tiny_bit), num_classes=10), TrainingLaw(alpha=0.4), RunFolder(tmp_path)
    with pytest.raises(
        MemoryShortError, match=r"step 0: out of memory even with 8 example\(s\) at a time and gradient checkpointing"
    ):
        train(model, stream, hyper, Accelerator(cpu=True), law=law, cuts=cut_batch(16), run=run, objective=Greedy())
    said = capsys.readouterr().out
    assert "step 0: out of memory with micro-batches of 16; going on with 8 (2 a step)" in said
    assert "step 0: out of memory with micro-batches of 8, the smallest; going on with gradient checkpointing" in said
    assert run.list_checkpoints() == []


def test_auto_finds_a_micro_batch_that_fits_before_training(outcomes: tuple[Path, dict[str, Any]]) -> None:
    folder, codes = outcomes
    assert codes["auto"] == 0
    assert halvings(folder, "auto") == ([], False)
    sizes = json.loads((folder / "auto" / "plan.json").read_text())["environment"]["micro_batches"]
    assert max(sizes[0]) == 8  # of 16
    free, auto = (safetensors.torch.load_file(folder / name / "model" / "model.safetensors") for name in ("free", "auto"))
    assert difference(free, auto) < 1e-5


def test_auto_takes_the_whole_batch_where_it_fits_and_again_when_resumed(
    quick: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bit_mixup.transfer(**quick, micro_batch="auto")
    assert "1 micro-batch(es) of up to 16 (auto: tried before training)" in capsys.readouterr().out
    run = RunFolder(quick["output_dir"])
    plan = json.loads(run.plan.read_text())
    assert plan["environment"]["micro_batches"] == [[16]]
    plan["environment"]["micro_batches"] = [[8, 8]]  # as if less had fitted at the first start
    run.plan.write_text(json.dumps(plan))
    shutil.rmtree(run.checkpoint(6))
    result = bit_mixup.transfer(**quick, micro_batch="auto", resume=True)
    assert [cut.size for cut in result.plan.cuts[0]] == [8, 8]
    assert run.recorded_micro_batch(2) is None


def test_gradient_checkpointing_changes_no_bit(quick: dict[str, Any], tiny_bit: Path, tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load_bit(str(tiny_bit), num_classes=4)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.head.fc.weight)
        model.set_grad_checkpointing(checkpointing)
        images = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(1))
        model.train()(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])


@pytest.mark.parametrize(
    ("batch_size", "processes", "group_size", "sizes"),
    [(64, 1, 8, [64, 32, 16, 8]), (64, 2, 8, [32, 16, 8]), (17, 1, 8, [17, 9]), (6, 1, 1, [6, 3, 1]), (24, 3, 8, [8])],
)
def test_halving_keeps_whole_groups_and_the_batch(batch_size: int, processes: int, group_size: int, sizes: list[int]) -> None:
    cuts = cut_batch(batch_size, num_processes=processes, group_size=group_size)
    found = []
    while cuts is not None:
        found.append(largest_pass(cuts))
        assert sum(cut.size * cut.weight for share in cuts for cut in share) == batch_size
        assert len({len(share) for share in cuts}) == 1
        cuts = smaller_cuts(cuts, batch_size=batch_size, group_size=group_size)
    assert found == sizes


def test_auto_follows_the_estimate_then_the_trial() -> None:
    tried = []

    def attempt(cuts: Any, limit: int) -> bool:
        tried.append(largest_pass(cuts))
        return tried[-1] <= limit

    def search(free: int, limit: int) -> int:
        tried.clear()
        found = find_cuts(
            batch_size=64,
            num_processes=1,
            group_size=8,
            estimate=lambda n: 10 * n,
            free=free,
            attempt=lambda c: attempt(c, limit),
        )
        return largest_pass(found)

    assert (search(10_000, 64), tried) == (64, [64])
    assert (search(500, 64), tried) == (32, [32])
    assert (search(10_000, 16), tried) == (16, [64, 32, 16])
    assert (search(1, 64), tried) == (8, [8])
    with pytest.raises(MemoryShortError, match=r"not even 8 example\(s\) at a time"):
        search(10_000, 4)


def test_errors_of_memory_are_told_from_others() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60)
    assert is_out_of_memory(failed.value)
    assert is_out_of_memory(MemoryError())
    for text in (
        "could not create a primitive",
        "could not create a memory object",
        "std::bad_alloc",
        "mmap: Cannot allocate memory",
    ):
        assert is_out_of_memory(RuntimeError(text)), "so oneDNN, C++ and the system say it, as torch passes it on"
    with pytest.raises(RuntimeError) as failed:
        torch.zeros(2) @ torch.zeros(3)
    assert not is_out_of_memory(failed.value)
    assert not is_out_of_memory(OSError("Cannot allocate memory"))
    with pytest.raises(MemoryShortError, match="out of memory outside"), memory_explained():
        torch.empty(2**60)


def test_scoring_goes_on_in_halves_and_says_where_one_picture_does_not_fit() -> None:
    """What asks for too much memory really does: more than any machine has, for more pictures than fit."""
    images, sizes = torch.arange(7.0).reshape(7, 1, 1, 1).expand(7, 3, 4, 5), []

    def scores(part: torch.Tensor, fitting: int) -> torch.Tensor:
        sizes.append(len(part))
        return torch.empty(2**60) if len(part) > fitting else part.flatten(1)

    assert torch.equal(in_pieces_that_fit(lambda part: scores(part, 2), images), images.flatten(1))
    assert sizes == [7, 4, 2, 2, 3, 2, 1]
    with pytest.raises(MemoryShortError, match="a picture of 4 x 5 pixels alone does not fit into memory with this model"):
        in_pieces_that_fit(lambda part: scores(part, 0), images)


def test_a_control_group_limits_what_is_free(tmp_path: Path) -> None:
    """The kernel's files, version 2 and 1, as containers and SLURM see them."""
    two = tmp_path / "slurm" / "job"
    two.mkdir(parents=True)
    for folder, limit, used, cached in ((two, "max", 300, 50), (two.parent, "1000", 600, 100), (tmp_path, "5000", 600, 0)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    (tmp_path / "two").write_text("0::/slurm/job\n")
    assert control_group_rest(tmp_path / "two", tmp_path) == 500
    one = tmp_path / "memory" / "box"
    one.mkdir(parents=True)
    (one / "memory.limit_in_bytes").write_text("800\n")
    (one / "memory.usage_in_bytes").write_text("700\n")
    (one / "memory.stat").write_text("total_inactive_file 20\n")
    (tmp_path / "one").write_text("4:memory:/box\n3:cpuset:/\n")
    assert control_group_rest(tmp_path / "one", tmp_path) == 120
    assert control_group_rest(tmp_path / "none", tmp_path) > 2**60


# Signals


@contextmanager
def once(condition: Callable[[], object], act: Callable[[], object]) -> Iterator[None]:
    """Acts in another thread as soon as a condition holds."""
    stopped = threading.Event()

    def wait() -> None:
        while not stopped.is_set():
            if condition():
                act()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


@pytest.mark.parametrize(
    ("name", "workers", "code"), [("SIGTERM", 0, 143), ("SIGINT", 0, 130), ("SIGUSR1", 0, 138), ("SIGTERM", 1, 143)]
)
def test_a_signal_leads_to_a_checkpoint_and_resume_to_the_same_bits(
    quick: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, workers: int, code: int
) -> None:
    options = quick | {"steps": 40, "save_every": 1000, "log_every": 1, "mixup_alpha": 0.4, "num_workers": workers}
    run = RunFolder(quick["output_dir"])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def send() -> None:
        """As schedulers do: to all processes of a job, from another one. Torch forgives a worker that its parent ends."""
        processes = [child.pid for child in multiprocessing.active_children()] if workers else []
        subprocess.run(["sh", "-c", f"kill -s {name[3:]} {' '.join(map(str, [*processes, os.getpid()]))}"], check=True)

    with once(run.metrics.is_file, send), pytest.raises(SystemExit) as stopped:
        command(["fine-tune", *flags(options)])
    assert stopped.value.code == code
    step = int(run.list_checkpoints()[-1].name.removeprefix("step_"))
    assert 0 < step < 40
    assert [row["step"] for row in run.read_metrics()] == list(range(step))
    assert not run.model.exists()
    shown = capfd.readouterr().err
    assert f"bit-mixup: {name}: stopping at the end of this step" in shown
    assert f"stopped after step {step}; {run.checkpoint(step)} holds it. Go on with --resume." in shown
    assert {number: signal.getsignal(number) for number in before} == before
    command(["fine-tune", *flags(options | {"num_workers": 0}), "--resume"])
    whole = bit_mixup.transfer(**(options | {"output_dir": tmp_path / "whole", "num_workers": 0}))
    assert (run.model / "model.safetensors").read_bytes() == (whole.output_dir / "model" / "model.safetensors").read_bytes()


def test_a_second_signal_ends_the_process_at_once(outcomes: tuple[Path, dict[str, Any]]) -> None:
    folder, codes = outcomes
    assert codes["twice"] == 143
    assert codes["seconds"] < 2  # the step alone takes many
    assert "SIGTERM again: stopped at once." in (folder / "twice.txt").read_text()
    assert RunFolder(folder / "twice").list_checkpoints() == []


def test_outside_of_training_a_signal_stops_at_once() -> None:
    def at_once() -> None:
        with Interruption(deferring=False):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(5)
            raise AssertionError("it went on")

    def where_it_ends() -> None:
        with Interruption(deferring=True) as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            while not signals.number:
                time.sleep(0.01)

    with pytest.raises(Interrupted, match="stopped by SIGUSR1") as stopped:
        at_once()
    assert stopped.value.exit_code == 138
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        where_it_ends()


# Disks


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Lets no file grow beyond some bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(
    quick: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(quick["output_dir"])
    options = quick | {"steps": 30, "save_every": 2}
    full = file_limit(20_000)  # metrics go on, a checkpoint does not fit
    with once(lambda: run.checkpoint(4).is_dir(), full.__enter__), pytest.raises(SystemExit) as stopped:
        command(["fine-tune", *flags(options)])
    full.__exit__(None, None, None)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert "can not be written: it would be larger than a file may be here" in shown
    assert "What was written before is whole" in shown
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [path.name for path in run.list_checkpoints()]
    command(["fine-tune", *flags(options), "--resume"])
    whole = bit_mixup.transfer(**(options | {"output_dir": tmp_path / "whole"}))
    assert (run.model / "model.safetensors").read_bytes() == (whole.output_dir / "model" / "model.safetensors").read_bytes()


def test_a_full_device_is_told(tmp_path: Path) -> None:
    """/dev/full answers each write as a full disk does."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl can not be written: the disk is full\. Make room"):
        RunFolder(tmp_path).add_metrics([{"step": 0}])

    def write_model() -> None:
        with whole_folder(tmp_path / "model") as folder:
            (folder / "README.md").symlink_to("/dev/full")
            (folder / "README.md").write_text("a card")

    with pytest.raises(CheckpointError, match="the disk is full"):
        write_model()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_too_small_a_disk_is_told_before_training(quick: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"GB of room, but checkpoints and the model take .* lower --keep-checkpoints"):
        bit_mixup.transfer(**quick, keep_checkpoints=10**9)
    assert not quick["output_dir"].exists()


def unwritable(tmp_path: Path) -> Path:
    """A folder in which nobody may write, even as root."""
    if os.geteuid() == 0:
        return Path("/sys/kernel")
    tmp_path.chmod(0o500)
    return tmp_path


def test_a_folder_that_can_not_be_written_is_told_before_training(
    quick: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(["fine-tune", *flags(quick | {"output_dir": unwritable(tmp_path) / "bit_mixup-run"})])
    tmp_path.chmod(0o700)
    assert stopped.value.code == 2
    assert "you may not write there" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="a part of the path is a file, not a folder"):
        bit_mixup.transfer(**(quick | {"output_dir": tmp_path / "file" / "run"}))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_vanishes_during_training_is_told(
    quick: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(quick["output_dir"])
    with once(run.checkpoint(2).is_dir, lambda: run.path.rename(tmp_path / "elsewhere")), pytest.raises(SystemExit) as stopped:
        command(["fine-tune", *flags(quick | {"steps": 200, "save_every": 2, "log_every": 1})])
    assert stopped.value.code == 2
    assert "gone" in capsys.readouterr().err
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(CheckpointError, match="is gone, with all checkpoints"):
        save_checkpoint(RunFolder(run.path / "other"), 3, model, optimizer)
    assert not (run.path / "other").exists()


def test_a_cache_that_fills_up_is_told(tmp_path: Path) -> None:
    """The members of an archive go into the cache of the `datasets` library."""
    noise = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
            with archive.open(name, "w") as file:
                Pillow.fromarray(noise.integers(0, 256, (99, 99, 3), dtype=np.uint8)).save(file, "png")
    with file_limit(20_000), pytest.raises(DataError, match=r"pictures.zip can not be read: .*File too large"):
        load_image_dataset(str(tmp_path / "pictures.zip"))
    assert len(load_image_dataset(str(tmp_path / "pictures.zip")).train) == 2


def test_a_write_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"old")
    with file_limit(10), pytest.raises(CheckpointError, match="a can not be written: it would be larger"):
        write_bytes(tmp_path / "a", b"new" * 100)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert issubclass(CheckpointError, BitMixupError)
    assert not issubclass(Interrupted, Exception)  # so that no decoder's "except Exception" swallows it
    assert Accelerator(cpu=True).num_processes == 1
