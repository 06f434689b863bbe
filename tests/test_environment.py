"""Is the precision of a run what was asked for, or what the hardware is good at, and are scores none the worse for it?"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import bit_mixup
from bit_mixup import environment
from bit_mixup.config import TransferConfig, configure
from bit_mixup.environment import Speedups, hardware_precision, read_environment
from bit_mixup.examples import EvaluationView
from bit_mixup.models import load_bit
from bit_mixup.planning import make_plan
from bit_mixup.prediction import predict_logits
from bit_mixup.storage import read_json

X86 = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu sse2 {}avx512_vnni\nbogomips\t: 5000\n"


@pytest.fixture
def processor_with_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "cpuinfo").write_text(X86.format("avx512_bf16 "))
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "cpuinfo")
    yield
    AcceleratorState._reset_state()  # it is one for all of the process


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        (X86.format("avx512_bf16 "), "bf16"),
        (X86.format("amx_bf16 amx_tile "), "bf16"),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", "bf16"),
        (X86.format(""), "fp32"),
        (X86.format("").replace("Some CPU", "avx512_bf16"), "fp32"),
        ("", "fp32"),
    ],
)
def test_bf16_is_chosen_where_the_processor_computes_in_it(
    text: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "cpuinfo")
    assert hardware_precision()[0] == precision
    assert read_environment(precision=None, threads=1, variables={}).precision == precision


@pytest.mark.usefixtures("processor_with_bf16")
@pytest.mark.parametrize(
    ("asked", "launched", "precision", "scoring", "why"),
    [
        (None, None, "bf16", "fp32", "this processor computes in it"),
        (None, "no", "bf16", "fp32", "this processor computes in it"),  # `accelerate launch` sets "no" unasked
        ("fp32", None, "fp32", "fp32", "asked"),
        ("fp32", "no", "fp32", "fp32", "asked"),
        ("bf16", None, "bf16", "bf16", "asked"),
        (None, "bf16", "bf16", "bf16", "Accelerate configuration"),
    ],
)
def test_who_decides_the_precision(asked: Any, launched: str | None, precision: str, scoring: str, why: str) -> None:
    variables = {"ACCELERATE_MIXED_PRECISION": launched} if launched else {}
    found = read_environment(precision=asked, threads=1, variables=variables)
    assert (found.precision, found.scoring_precision, found.precision_from) == (precision, scoring, why)


@pytest.mark.usefixtures("processor_with_bf16")
def test_a_run_in_bf16_that_nobody_asked_for_is_scored_in_fp32(quick: dict[str, Any]) -> None:
    """The scores are those of the saved model, as `bit-mixup predict` computes them."""
    result = bit_mixup.transfer(**quick)
    assert read_json(quick["output_dir"] / "plan.json")["resolved"]["precision"] == "bf16"
    assert "bf16 (this processor computes in it)" in result.plan.text()
    saved = load_bit(str(quick["output_dir"] / "model"), keep_head=True)
    view = EvaluationView(part=result.plan.data.test, view=result.plan.view)
    in_fp32 = predict_logits(saved, view, Accelerator(cpu=True), batch_size=16)
    torch.testing.assert_close(result.logits, in_fp32)
    in_bf16 = predict_logits(saved, view, Accelerator(cpu=True), batch_size=16, precision="bf16")
    assert in_bf16.dtype == torch.float32
    assert not torch.equal(in_bf16, in_fp32)
    torch.testing.assert_close(in_bf16, in_fp32, atol=0.15 * float(in_fp32.abs().max()), rtol=0)


def test_a_plan_says_how_steps_are_computed(quick: dict[str, Any]) -> None:
    plan = make_plan(configure(TransferConfig, **quick))
    on = "channels last, quick layers, on a GPU normalisation fused with ReLU, filters standardised once a step, fused SGD"
    assert f"{on}: this changes time, and rounding" in plan.text()
    off = {"memory_format": "contiguous", "quick_layers": False, "fused_optimizer": False}
    plan = make_plan(configure(TransferConfig, **quick, **off))
    assert "contiguous, timm's layers, filters standardised in each pass, plain SGD" in plan.text()
    assert plan.config.speedups == Speedups(**off)
