"""Does what is promised hold for every size, cut, number, text and file, or only for those that somebody has thought of?

What is drawn is the same in each run. Several processes are played by one after another, each with an accelerator that says
another index; what they would send each other is added up here.
"""

import contextlib
import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.models.resnetv2 import ResNetV2
from torch import Tensor

from bit_mixup.checkpoint import restore_checkpoint, save_checkpoint
from bit_mixup.cli import main
from bit_mixup.config import DistillConfig, PretrainConfig, TransferConfig, configure
from bit_mixup.data import load_image_dataset
from bit_mixup.environment import Speedups
from bit_mixup.errors import CheckpointError, ConfigError, DataError, WeightsError
from bit_mixup.evaluation import evaluate
from bit_mixup.examples import ArrayImages, EvaluationView
from bit_mixup.hyperrule import HyperParameters, Preset, bit_hyperrule, learning_rate
from bit_mixup.images import View, decode
from bit_mixup.laws import TrainingLaw
from bit_mixup.memory import Cuts, largest_pass, smaller_cuts
from bit_mixup.mixup import Mixup
from bit_mixup.models import Normalize, load_bit
from bit_mixup.objectives import SoftmaxCrossEntropy
from bit_mixup.prediction import predict_logits
from bit_mixup.runs import RunFolder
from bit_mixup.sampling import PositionBatches, cut_batch, group_sizes, row_at
from bit_mixup.storage import read_json, remove_leftovers, whole_folder, write_bytes, write_json
from bit_mixup.training import StepWork

QUIETLY = settings(deadline=None, derandomize=True, database=None)
EDGE = 16  # of a picture in pixels: the last feature map is 1 x 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the examples of a property write into, each over the one before."""
    return tmp_path_factory.mktemp("properties")


# --- cuts and order ---------------------------------------------------------------------------------------------------


@st.composite
def some_cuts(draw: st.DrawFn, *, batch_size: int, group_size: int) -> Cuts:
    """A batch, cut as any number of processes and any micro-batch that is possible have it."""
    sizes = group_sizes(batch_size, group_size)
    processes = draw(st.integers(1, min(len(sizes), 6)))
    micro_batch = draw(st.none() | st.integers(max(sizes), batch_size + 1))
    return cut_batch(batch_size, num_processes=processes, micro_batch=micro_batch, group_size=group_size)


@settings(QUIETLY, max_examples=100)
@given(st.data())
def test_starts_on_other_machines_go_on_with_the_same_rows(data: st.DataObject) -> None:
    """A run that is interrupted at any steps, and each time resumed with other processes and micro-batches."""
    num_examples, batch_size = data.draw(st.integers(1, 90), "examples"), data.draw(st.integers(1, 60), "batch")
    group_size, seed = data.draw(st.sampled_from([1, 8]), "group"), data.draw(st.integers(0, 9), "seed")
    stops = [0, *sorted(data.draw(st.sets(st.integers(1, 12), min_size=1, max_size=4), "stops"))]
    edges = set(itertools.accumulate(group_sizes(batch_size, group_size), initial=0))
    read: list[int] = []
    for first, last in itertools.pairwise(stops):
        cuts = data.draw(some_cuts(batch_size=batch_size, group_size=group_size), "cuts")
        assert {edge for share in cuts for cut in share for edge in (cut.start, cut.start + cut.size)} <= edges, "a group is cut"
        ranks = [iter(PositionBatches(share, batch_size=batch_size, first_step=first, steps=stops[-1])) for share in cuts]
        for _ in range(first, last):
            calls = [[next(rank) for _ in share] for rank, share in zip(ranks, cuts, strict=True)]
            assert len({len(own) for own in calls}) == 1, "backward calls"
            counted = [p for own, share in zip(calls, cuts, strict=True) for p, cut in zip(own, share, strict=True) if cut.weight]
            read += [position for positions in counted for position in positions]
    assert read == list(range(stops[-1] * batch_size))
    rows = [row_at(position, seed=seed, num_examples=num_examples) for position in read]
    for start in range(0, len(rows), num_examples):
        one_pass = rows[start : start + num_examples]
        assert len(set(one_pass)) == len(one_pass), "a row comes twice in a pass"
        assert set(one_pass) <= set(range(num_examples))


@settings(QUIETLY, max_examples=100)
@given(st.data())
def test_less_memory_leads_to_ever_smaller_cuts_of_the_same_batch(data: st.DataObject) -> None:
    batch_size, group_size = data.draw(st.integers(1, 300), "batch"), data.draw(st.sampled_from([1, 8]), "group")
    cuts: Cuts | None = data.draw(some_cuts(batch_size=batch_size, group_size=group_size), "cuts")
    assert cuts is not None
    processes, smallest, most, before = len(cuts), max(group_sizes(batch_size, group_size)), batch_size, batch_size + 1
    while cuts is not None:
        assert len(cuts) == processes
        assert largest_pass(cuts) <= most, "no less than half"
        assert largest_pass(cuts) < before, "no less at all"
        before = largest_pass(cuts)
        most = max(before // 2, smallest)
        real = [cut for share in cuts for cut in share if cut.weight]
        assert [p for cut in real for p in cut.positions(0, batch_size)] == list(range(batch_size))
        assert [size for cut in real for size in cut.groups] == group_sizes(batch_size, group_size)
        assert len({len(share) for share in cuts}) == 1
        cuts = smaller_cuts(cuts, batch_size=batch_size, group_size=group_size)
    assert before == smallest, "it could be smaller"


# --- the gradient -----------------------------------------------------------------------------------------------------


class Rank(Accelerator):
    """The accelerator of one of several processes, the others of which are not there.

    Args:
        index: of the process.
        count: of all.
        sent: what each has sent to be gathered; it is filled as they are run.
    """

    def __init__(self, index: int, count: int, sent: dict[int, Tensor] | None = None) -> None:
        self._index, self._count, self._sent = index, count, {} if sent is None else sent
        super().__init__(cpu=True)

    @property
    def process_index(self) -> int:
        return self._index

    @property
    def num_processes(self) -> int:
        return self._count

    def gather(self, tensor: Tensor) -> Tensor:
        self._sent[self._index] = tensor
        return torch.cat([self._sent.get(index, torch.full_like(tensor, torch.nan)) for index in range(self._count)])


@dataclass(frozen=True)
class Noise:
    """A stream of random pictures (N, 3, 16, 16), each a function of its position."""

    num_classes: int

    def ids(self, positions: Sequence[int]) -> list[str]:
        return [str(position) for position in positions]

    def __getitems__(self, positions: Sequence[int]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        images = [np.random.default_rng(p).integers(256, size=(3, EDGE, EDGE), dtype=np.uint8) for p in positions]
        return np.stack(images), np.array([(p * 7 + p // 5) % self.num_classes for p in positions])


@lru_cache
def network(tiny_bit: Path, num_classes: int) -> ResNetV2:
    """In double precision, with a head that lets gradients through to the body."""
    model = load_bit(str(tiny_bit), num_classes=num_classes).double().train()
    torch.nn.init.normal_(model.head.fc.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def gradient(model: ResNetV2) -> Tensor:
    """All of it in one vector, which is then taken out of the model."""
    vector = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return vector


LAWS = {
    "plain": TrainingLaw(),
    "mixup": TrainingLaw(alpha=0.4),
    "mixup by example": TrainingLaw(alpha=0.4, lam="example"),
    "manifold": TrainingLaw(alpha=1.0, stage=2, label_smoothing=0.1),
    "noise": TrainingLaw(input_noise=0.1, feature_dropout=0.3),
}


@settings(QUIETLY, max_examples=12)
@given(data=st.data())
def test_a_gradient_is_that_of_the_batch_however_it_is_cut(data: st.DataObject, tiny_bit: Path) -> None:
    """Of as many processes as there are, before and after memory has run out in them any number of times."""
    law, num_classes = LAWS[data.draw(st.sampled_from(sorted(LAWS)), "law")], data.draw(st.sampled_from([2, 3, 7]), "classes")
    batch_size, step = data.draw(st.integers(2, 27), "batch"), data.draw(st.integers(0, 3), "step")
    cuts = data.draw(some_cuts(batch_size=batch_size, group_size=law.group_size), "cuts")
    retreats = data.draw(st.integers(0, 3), "retreats")
    model, stream, count = network(tiny_bit, num_classes), Noise(num_classes), len(cuts)
    hyper = HyperParameters(
        resize_size=EDGE, crop_size=EDGE, steps=4, warmup_steps=0, decay_steps=(), batch_size=batch_size, mixup_alpha=law.alpha
    )

    def shares(cuts: Cuts, retreats: int) -> tuple[Tensor, Tensor]:
        """Gradient and loss, summed over the processes."""
        total: tuple[Tensor, Tensor] = (torch.tensor(0.0), torch.tensor(0.0))
        for index in range(len(cuts)):
            work = StepWork(model, stream, hyper, Rank(index, len(cuts)), law, SoftmaxCrossEntropy(), None, Speedups(), 5, 0)
            work.cut(cuts, first_step=step)
            for _ in range(retreats):
                if not work.checkpointing:
                    work.retreat(step)
            loss, _ = work.backward(step, work.own)
            model.set_grad_checkpointing(False)
            total = (total[0] + gradient(model), total[1] + loss)
        return total

    whole = shares(cut_batch(batch_size, group_size=law.group_size), 0)
    in_pieces = shares(cuts, retreats)
    for one, other in zip(whole, in_pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(one.abs().max()), msg=f"{count} processes")
    if law in (LAWS["plain"], LAWS["mixup"], LAWS["mixup by example"]):
        first = step * batch_size
        pictures, labels = stream.__getitems__(range(first, first + batch_size))
        images = Normalize.of(model)(torch.from_numpy(pictures), torch.float64)
        targets = F.one_hot(torch.from_numpy(labels), num_classes).double()
        mixup = Mixup(alpha=law.alpha, lam=law.lam)
        images, targets = mixup(images, targets, seed=5, step=step, start=first, groups=group_sizes(batch_size))
        F.cross_entropy(model(images), targets).backward()
        written_out = gradient(model)
        torch.testing.assert_close(whole[0], written_out, rtol=1e-9, atol=1e-9 * float(written_out.abs().max()))


# --- scores -----------------------------------------------------------------------------------------------------------


@settings(QUIETLY, max_examples=20)
@given(data=st.data())
def test_logits_do_not_depend_on_batches_and_processes(data: st.DataObject, tiny_bit: Path) -> None:
    """With more processes than examples too, some of which then have nothing to do but to send padding."""
    num_examples, processes = data.draw(st.integers(1, 30), "examples"), data.draw(st.integers(1, 5), "processes")
    batch_size, asked = data.draw(st.integers(1, 40), "batch"), data.draw(st.integers(0, processes - 1), "rank")
    pictures, labels = Noise(3).__getitems__(range(num_examples))
    part = ArrayImages(images=pictures.transpose(0, 2, 3, 1), labels=labels, class_names=("a", "b", "c"))
    view = EvaluationView(part=part, view=View(resize_size=EDGE, crop_size=EDGE, flip=False, interpolation="bilinear"))
    model = network(tiny_bit, 3)
    with torch.no_grad():
        expected = model.eval()(Normalize.of(model)(torch.from_numpy(pictures), torch.float64))
    sent: dict[int, Tensor] = {}
    for index in (*range(processes), asked):  # the last one hears what all have sent
        logits = predict_logits(model, view, Rank(index, processes, sent), batch_size=batch_size)
    model.train()
    assert logits.shape == (num_examples, 3)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)
    assert len({len(rows) for rows in sent.values()}) == 1, "what is gathered must be of one length"


@settings(QUIETLY, max_examples=30)
@given(st.integers(1, 80), st.integers(2, 12), st.integers(0, 10_000))
def test_scores_are_those_of_counting(num_examples: int, num_classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(num_examples, num_classes)), rng.integers(num_classes, size=num_examples)
    names = [f"class {index}" for index in range(num_classes)]
    report = evaluate(torch.from_numpy(logits), torch.from_numpy(labels), names)
    ranks = (logits > logits[np.arange(num_examples), labels, None]).sum(1)  # logits that are larger than the label's
    assert report.num_examples == num_examples
    assert report.accuracy == (ranks == 0).mean()
    assert report.top5_accuracy == ((ranks < 5).mean() if num_classes > 5 else None)
    recalls = {name: (ranks == 0)[labels == k].mean() if (labels == k).any() else None for k, name in enumerate(names)}
    assert report.class_support == {name: int((labels == k).sum()) for k, name in enumerate(names)}
    assert report.class_accuracy == {
        name: recall if recall is None else pytest.approx(recall, rel=1e-6) for name, recall in recalls.items()
    }
    assert report.balanced_accuracy == pytest.approx(np.mean([r for r in recalls.values() if r is not None]), rel=1e-6)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    assert report.nll == pytest.approx(-np.log(shares[np.arange(num_examples), labels]).mean(), rel=1e-9)
    order = rng.permutation(num_examples)
    again = evaluate(torch.from_numpy(logits[order]), torch.from_numpy(labels[order]), names)
    assert (again.accuracy, again.top5_accuracy, again.class_support) == (
        report.accuracy,
        report.top5_accuracy,
        report.class_support,
    )


# --- the rule ---------------------------------------------------------------------------------------------------------


def reference_rate(step: int, num_examples: int, base_lr: float) -> float | None:
    """The authors' `get_lr`, from their PyTorch code; None where training ends."""
    if num_examples < 20_000:
        supports = [100, 200, 300, 400, 500]
    elif num_examples < 500_000:
        supports = [500, 3000, 6000, 9000, 10_000]
    else:
        supports = [500, 6000, 12_000, 18_000, 20_000]
    if step < supports[0]:
        return base_lr * step / supports[0]
    if step >= supports[-1]:
        return None
    for support in supports[1:]:
        if support < step:
            base_lr /= 10
    return base_lr


SIZES = st.integers(1, 2_000_000) | st.sampled_from([19_999, 20_000, 499_999, 500_000])
AREAS = st.floats(1, 1e6) | st.sampled_from([96 * 96 - 1, 96 * 96, 96 * 96 + 1])


@settings(QUIETLY, max_examples=150)
@given(st.sampled_from(get_args(Preset)), st.tuples(SIZES, SIZES), st.tuples(AREAS, AREAS), st.integers(0, 21_000))
def test_the_rule_is_the_authors_and_never_falls(preset: Preset, sizes: tuple[int, int], areas: Any, step: int) -> None:
    small, large = (bit_hyperrule(n, a, preset=preset) for n, a in zip(sorted(sizes), sorted(areas), strict=True))
    for name in ("steps", "resize_size", "crop_size", "mixup_alpha", "warmup_steps", "decay_steps"):
        assert getattr(small, name) <= getattr(large, name), name
    if preset == "paper":
        return
    for hyper, num_examples, area in ((small, min(sizes), min(areas)), (large, max(sizes), max(areas))):
        assert (hyper.resize_size, hyper.crop_size) == ((160, 128) if area < 96 * 96 else (512, 480))
        assert hyper.mixup_alpha == (0.0 if num_examples < 20_000 else 0.1)
        expected = reference_rate(step, num_examples, 0.003 if preset == "code" else 0.001)
        if expected is None:
            assert step >= hyper.steps
        else:
            assert learning_rate(step, hyper) == expected


# --- what is written --------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
PLAIN = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8)


@settings(QUIETLY, max_examples=60)
@given(value=VALUES)
def test_json_comes_back_as_it_went(value: Any, place: Path) -> None:
    write_json(place / "value.json", value)
    assert read_json(place / "value.json") == value


@settings(QUIETLY, max_examples=30)
@given(old=st.none() | st.dictionaries(st.sampled_from("abc"), st.binary(max_size=20)), new=st.lists(st.binary(max_size=20)),
       fails_at=st.none() | st.integers(0, 4))  # fmt: skip
def test_a_folder_is_the_old_one_or_the_new_one(
    old: dict[str, bytes] | None, new: list[bytes], fails_at: int | None, place: Path
) -> None:
    folder = place / "folder"

    def write(files: dict[str, bytes], stop: int | None) -> None:
        with whole_folder(folder) as part:
            for number, (name, content) in enumerate(files.items()):
                if number == stop:
                    raise KeyboardInterrupt
                write_bytes(part / name, content)

    def content() -> dict[str, bytes] | None:
        return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else None

    with whole_folder(folder):
        pass
    folder.rmdir()
    if old is not None:
        write(old, None)
    files = {str(number): data for number, data in enumerate(new)}
    fails = fails_at is not None and fails_at < len(files)
    with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext():
        write(files, fails_at)
    assert content() == (old if fails else files)
    remove_leftovers(place)
    assert content() == (old if fails else files)
    for file in [*folder.iterdir()] if folder.exists() else []:
        file.unlink()


@settings(QUIETLY, max_examples=25)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4), steps=st.lists(st.integers(1, 10**6), min_size=1, max_size=4,
       unique=True), keep=st.integers(1, 3), momentum=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_a_checkpoint_comes_back_to_the_bit(
    sizes: list[int], steps: list[int], keep: int, momentum: bool, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = RunFolder(tmp_path_factory.mktemp("run"))

    def fresh() -> tuple[torch.nn.Module, torch.optim.SGD]:
        model = torch.nn.Sequential(*(torch.nn.Linear(*pair) for pair in itertools.pairwise(sizes)))
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def bits(model: torch.nn.Module, optimizer: torch.optim.SGD) -> list[bytes]:
        buffers = [optimizer.state[parameter].get("momentum_buffer") for parameter in model.parameters()]
        return [tensor.detach().numpy().tobytes() for tensor in [*model.parameters(), *buffers] if tensor is not None]

    torch.manual_seed(seed)
    model, optimizer = fresh()
    for step in sorted(steps):
        if momentum:
            model(torch.randn(3, sizes[0])).square().sum().backward()
            optimizer.step()
        save_checkpoint(run, step, model, optimizer, keep=keep)
    assert run.list_checkpoints() == [run.checkpoint(step) for step in sorted(steps)[-keep:]]
    other, other_optimizer = fresh()
    assert restore_checkpoint(run, other, other_optimizer) == max(steps)
    assert bits(other, other_optimizer) == bits(model, optimizer)


NUMBERS = st.floats(0.01, 0.9) | st.sampled_from([1e-12, 1 / 3])
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "dataset": TEXTS.map(lambda text: text.replace("\0", "")),
    "steps": st.none() | st.integers(1, 2**31),
    "decay_steps": st.none() | st.lists(st.integers(0, 10**6), max_size=4).map(tuple),
    "base_lr": st.none() | NUMBERS,
    "mixup_alpha": st.sampled_from([None, 0.0, 0.2, math.inf]),
    "micro_batch": st.none() | st.integers(1, 512) | st.just("auto"),
    "output_dir": st.none() | TEXTS.map(lambda text: Path(text.replace("\0", ""))),
    "flip": st.booleans(),
    "label_smoothing": NUMBERS,
    "seed": st.integers(0, 2**32),
}


@settings(QUIETLY, max_examples=60)
@given(options=st.fixed_dictionaries(OPTIONS))
def test_a_configuration_comes_back_as_it_went(options: dict[str, Any], place: Path) -> None:
    config = TransferConfig(**options)
    write_json(place / "config.json", config.as_json())
    assert TransferConfig.from_json(place / "config.json") == config


# --- whatever is typed ------------------------------------------------------------------------------------------------

FLAGS = ["processes", "config", *(field.name.replace("_", "-") for field in fields(TransferConfig))]
ODD_NUMBERS = ["-1", "0", "1", "007", "1_0", "1e3", "1e400", "-0.0", "nan", "inf", "²", "٣", "9" * 30, "9" * 5000, "0x10", "1,5"]
WORDS = st.text(st.characters(exclude_characters="\0"), max_size=8)
LENGTHENED = st.builds(lambda text, times: text * times, WORDS, st.sampled_from([1, 1, 1, 90]))
# Nothing that leads out of the empty folder where this is tried.
TYPED = st.sampled_from(ODD_NUMBERS) | st.integers().map(str) | st.floats().map(repr) | LENGTHENED.map(lambda t: t.lstrip("/.~"))


@dataclass
class Said:
    code: object
    out: str
    err: str


def run_command(arguments: Sequence[str]) -> Said:
    """A command, with streams as strict as those of a terminal: what is not UTF-8 can not be printed."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as left:
            code = left.code
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return Said(code, *texts)


@settings(QUIETLY, max_examples=150)
@given(flag=st.sampled_from(FLAGS), value=TYPED)
@example(flag="processes", value="²")
@example(flag="dataset", value="a" * 300)
@example(flag="model", value="a" * 300)
@example(flag="config", value="a" * 300)
@example(flag="output-dir", value="a" * 300)
@example(flag="train-split", value="\udcff")
@example(flag="dataset", value="~nobody-of-that-name/set")
@example(flag="model", value="~nobody-of-that-name/model")
@example(flag="output-dir", value="~nobody-of-that-name/run")
def test_a_plan_is_made_or_refused_in_words(flag: str, value: str, tiny_bit: Path, place: Path) -> None:
    with contextlib.chdir(place):
        said = run_command(["plan", "--dataset", "digits", "--model", str(tiny_bit), f"--{flag}", value])
    assert said.code in (0, 2)
    assert "Traceback" not in said.err
    if said.code == 0:
        assert said.out
    else:
        assert said.out == ""
        culprits = (flag, flag.replace("-", "_"), value, "Unrecognized options")
        assert any(culprit in said.err for culprit in culprits), said.err
        boxed = said.err.lstrip().startswith("╭")  # the parser's own, which comes before ours
        assert boxed or (said.err.startswith("bit-mixup: error: ") and said.err.count("bit-mixup: error:") == 1)


@settings(QUIETLY, max_examples=60)
@given(
    arguments=st.lists(
        st.sampled_from(["plan", "models", "fine-tune", "--help", "--dataset", "--", "-", "--steps"]) | TEXTS, max_size=3
    )
)
def test_any_words_end_in_words(arguments: list[str], place: Path) -> None:
    if "digits" in arguments:
        return
    with contextlib.chdir(place):
        said = run_command(arguments)
    assert said.code in (0, 2)
    assert "Traceback" not in said.err
    assert bool(said.out) == (said.code == 0)
    assert bool(said.err) == (said.code == 2)


# --- whatever is in a file --------------------------------------------------------------------------------------------


Result = TypeVar("Result")


def attempt(kind: type[Exception], action: Callable[[], Result]) -> tuple[Result | None, str]:
    """What comes of it; or None, and what is said where it is refused with an error of that kind. Other errors pass."""
    try:
        return action(), ""
    except kind as error:
        return None, str(error)


def mangled(content: bytes) -> st.SearchStrategy[bytes]:
    """A file with some bytes overwritten, cut short or not; or bytes of nothing."""

    def apply(edits: list[tuple[float, bytes]], length: float) -> bytes:
        changed = bytearray(content)
        for where, replacement in edits:
            start = int(where * len(content))
            changed[start : start + len(replacement)] = replacement
        return bytes(changed[: max(int(length * len(changed)), 1)])

    edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=6)), max_size=4)
    return st.builds(apply, edits, st.just(1.0) | st.floats(0, 1)) | st.binary(max_size=60)


def picture(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(256, size=(9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6
PICTURES = [
    picture("png"),
    picture("png", "P"),
    picture("png", "RGBA"),
    picture("jpeg", exif=EXIF.tobytes()),
    picture("jpeg", "CMYK"),
    picture("gif", "P"),
    picture("webp"),
    picture("tiff", compression="tiff_lzw"),
    picture("bmp"),
    picture("ppm"),
]


@settings(QUIETLY, max_examples=400)
@given(st.sampled_from(PICTURES).flatmap(mangled))
def test_any_bytes_are_a_picture_or_refused(content: bytes) -> None:
    decoded, refusal = attempt(DataError, lambda: decode({"bytes": content, "path": None}, where="train, row 3"))
    if decoded is None:
        assert refusal.startswith("train, row 3")
    else:
        assert decoded.mode == "RGB"
        assert min(decoded.size) > 0


CONFIG = json.dumps(TransferConfig(dataset="digits", decay_steps=(3, 5), output_dir=Path("x"), base_lr=0.1).as_json()).encode()


@settings(QUIETLY, max_examples=150)
@given(content=mangled(CONFIG) | VALUES.map(lambda value: json.dumps(value).encode()), kind=st.sampled_from(
    [TransferConfig, PretrainConfig, DistillConfig]))  # fmt: skip
@example(content=b"[" * 100_000, kind=TransferConfig)
@example(content=b'{"steps": ' + b"9" * 5_000 + b"}", kind=TransferConfig)
def test_any_bytes_are_a_configuration_or_refused(content: bytes, kind: type[TransferConfig], place: Path) -> None:
    path = place / "any.json"
    path.write_bytes(content)
    config, refusal = attempt(ConfigError, lambda: kind.from_json(path))
    assert config or refusal
    _, refusal = attempt(CheckpointError, lambda: read_json(path))
    assert not refusal or str(path) in refusal


@settings(QUIETLY, max_examples=60)
@given(options=st.dictionaries(st.sampled_from([f.name for f in fields(TransferConfig)]), VALUES | TYPED, max_size=4))
def test_any_values_are_options_or_refused(options: dict[str, Any]) -> None:
    config, refusal = attempt(ConfigError, lambda: configure(TransferConfig, **{"dataset": "digits", **options}))
    assert config or any(name in refusal for name in options)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An .npz file of pictures."""
    path = tmp_path_factory.mktemp("arrays") / "set.npz"
    images = np.zeros((3, 4, 4), np.uint8)
    np.savez_compressed(path, images=images, labels=np.array([0, 1, 1]), class_names=np.array(["a", "b"]))
    return path.read_bytes()


@settings(QUIETLY, max_examples=150)
@given(data=st.data())
def test_any_npz_is_arrays_or_refused(data: st.DataObject, arrays: bytes, place: Path) -> None:
    path = place / "any.npz"
    path.write_bytes(data.draw(mangled(arrays)))
    part, refusal = attempt(DataError, lambda: ArrayImages.load(path))
    assert part or refusal
    with pytest.raises(WeightsError, match=str(path)):  # whatever is left of it, weights it is not
        load_bit(str(path), num_classes=2)


@settings(QUIETLY, max_examples=60)
@given(data=st.data())
def test_any_weights_are_loaded_or_refused(data: st.DataObject, tiny_bit: Path, place: Path) -> None:
    folder = place / "weights"
    folder.mkdir(exist_ok=True)
    config, weights = ((tiny_bit / name).read_bytes() for name in ("config.json", "model.safetensors"))
    header = 8 + int.from_bytes(weights[:8], "little")
    which = data.draw(st.sampled_from(["header", "length", "configuration"]))
    if which == "header":
        weights = data.draw(mangled(weights[:header])) + weights[header:]
    elif which == "length":
        weights = weights[: data.draw(st.integers(0, len(weights)))]
    else:
        config = data.draw(mangled(config))
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(weights)
    model, refusal = attempt(WeightsError, lambda: load_bit(str(folder), num_classes=2))
    assert model or str(folder) in refusal


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Data files of pictures and labels, by ending."""
    folder = tmp_path_factory.mktemp("table")
    rows = [{"image": {"bytes": picture("png"), "path": None}, "label": label} for label in (0, 1, 0, 1, 2, 2)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    lines = "\n".join(json.dumps({"image": "a.png", "label": row["label"]}) for row in rows)
    return {
        "parquet": (folder / "a.parquet").read_bytes(),
        "jsonl": lines.encode(),
        "csv": b"image,label\n" + b"a.png,1\nb.png,0\n",
    }


@settings(QUIETLY, max_examples=25)
@given(data=st.data())
def test_any_data_file_is_read_or_refused(data: st.DataObject, table: dict[str, bytes], place: Path) -> None:
    kind = data.draw(st.sampled_from(sorted(table)))
    path = place / f"any.{kind}"
    path.write_bytes(data.draw(mangled(table[kind])))
    data_set, refusal = attempt(DataError, lambda: load_image_dataset(str(path)))
    assert data_set or refusal
