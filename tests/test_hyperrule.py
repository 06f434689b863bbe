"""Does the rule decide what the authors' code and paper say, at every step and on both sides of every boundary?"""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bit_mixup.config import TransferConfig, configure, resolve
from bit_mixup.errors import ConfigError
from bit_mixup.hyperrule import HyperParameters, Preset, bit_hyperrule, learning_rate, rate_table, size_class
from bit_mixup.weights import find_weights

SMALL_SIZES, MEDIUM_SIZES, LARGE_SIZES = (1, 1_000, 19_999), (20_000, 499_999), (500_000, 10_000_000)

# (first step, last step, rate), written down from google-research/big_transfer (bit_hyperrule.py, commit 140de6e) and from
# section 3.3 of the paper; a first piece that holds a string rises linearly from 0 at step 0 to the rate at the step after it.
WARMUP = "rising"
CODE = {
    SMALL_SIZES: [(0, 99, WARMUP), (100, 200, 3e-3), (201, 300, 3e-4), (301, 400, 3e-5), (401, 499, 3e-6)],
    MEDIUM_SIZES: [(0, 499, WARMUP), (500, 3000, 3e-3), (3001, 6000, 3e-4), (6001, 9000, 3e-5), (9001, 9999, 3e-6)],
    LARGE_SIZES: [(0, 499, WARMUP), (500, 6000, 3e-3), (6001, 12000, 3e-4), (12001, 18000, 3e-5), (18001, 19999, 3e-6)],
}
LIGHT = {
    SMALL_SIZES: [(0, 99, WARMUP), (100, 200, 1e-3), (201, 300, 1e-4), (301, 400, 1e-5), (401, 499, 1e-6)],
    MEDIUM_SIZES: [(0, 499, WARMUP), (500, 3000, 1e-3), (3001, 6000, 1e-4), (6001, 9000, 1e-5), (9001, 9999, 1e-6)],
    LARGE_SIZES: [(0, 499, WARMUP), (500, 6000, 1e-3), (6001, 12000, 1e-4), (12001, 18000, 1e-5), (18001, 19999, 1e-6)],
}
PAPER = {
    SMALL_SIZES: [(0, 150, 3e-3), (151, 300, 3e-4), (301, 450, 3e-5), (451, 499, 3e-6)],
    MEDIUM_SIZES: [(0, 3000, 3e-3), (3001, 6000, 3e-4), (6001, 9000, 3e-5), (9001, 9999, 3e-6)],
    LARGE_SIZES: [(0, 6000, 3e-3), (6001, 12000, 3e-4), (12001, 18000, 3e-5), (18001, 19999, 3e-6)],
}
TABLES: dict[Preset, Any] = {"code": CODE, "paper": PAPER, "light": LIGHT}
CASES = [(preset, size, pieces) for preset, table in TABLES.items() for sizes, pieces in table.items() for size in sizes]
RULE = bit_hyperrule(1_000, 32 * 32)


def written_out(pieces: list[tuple[int, int, Any]]) -> list[float]:
    """The rate of every step."""
    rates: list[float] = []
    for first, last, rate in pieces:
        assert len(rates) == first
        if rate == WARMUP:
            rates += [pieces[1][2] * step / (last + 1) for step in range(last + 1)]
        else:
            rates += [rate] * (last + 1 - first)
    return rates


def test_there_is_a_case_for_each_preset_and_size() -> None:
    assert len(CASES) == 3 * 7


@pytest.mark.parametrize(("preset", "size", "pieces"), CASES)
def test_rate_of_every_step(preset: Preset, size: int, pieces: list[tuple[int, int, Any]]) -> None:
    hyper = bit_hyperrule(size, 300 * 300, preset=preset)
    expected = written_out(pieces)
    assert hyper.steps == len(expected) == {1: 500, 2: 10_000, 4: 20_000}[1 + (size >= 20_000) + 2 * (size >= 500_000)]
    rates = [learning_rate(step, hyper) for step in range(hyper.steps)]
    wrong = [step for step, (rate, want) in enumerate(zip(rates, expected, strict=True)) if abs(rate - want) > 4 * math.ulp(want)]
    assert not wrong, (wrong[:5], rates[wrong[0]], expected[wrong[0]])
    assert rates[0] == (3e-3 if preset == "paper" else 0.0)


@pytest.mark.parametrize(
    ("preset", "architecture", "large"),
    [
        ("code", "resnetv2_50x1_bit", (512, 480)),
        ("code", "resnetv2_152x4_bit", (512, 480)),
        ("light", "resnetv2_50x1_bit", (512, 480)),
        ("paper", "resnetv2_50x1_bit", (448, 384)),
        ("paper", "resnetv2_152x2_bit", (448, 384)),
        ("paper", "resnetv2_152x4_bit", (512, 480)),
        ("paper", "resnetv2_152x4_bit.goog_in21k", (512, 480)),
    ],
)
def test_resolution_on_both_sides_of_96_by_96(preset: Preset, architecture: str, large: tuple[int, int]) -> None:
    def sizes(area: float) -> tuple[int, int]:
        hyper = bit_hyperrule(1_000, area, preset=preset, architecture=architecture)
        return hyper.resize_size, hyper.crop_size

    assert sizes(95 * 96) == (160, 128)
    assert sizes(100 * 92) == (160, 128)  # longer than 96, but smaller by area
    assert sizes(96 * 96 - 0.5) == (160, 128)  # a median may fall between two areas
    assert sizes(96 * 96) == large
    assert sizes(97 * 96) == large


@pytest.mark.parametrize("preset", TABLES)
def test_all_other_numbers(preset: Preset) -> None:
    for size, alpha, name in ((19_999, 0.0, "small"), (20_000, 0.1, "medium"), (499_999, 0.1, "medium"), (500_000, 0.1, "large")):
        hyper = bit_hyperrule(size, 9_999, preset=preset)
        assert (hyper.mixup_alpha, size_class(size)) == (alpha, name)
        assert (hyper.batch_size, hyper.base_lr) == ((128, 0.001) if preset == "light" else (512, 0.003))
        assert (hyper.momentum, hyper.weight_decay) == (0.9, 0.0)


def resolved(num_examples: int = 1_000, **options: Any) -> HyperParameters:
    config = configure(TransferConfig, dataset="digits", **options)
    weights = find_weights("resnetv2_50x1_bit.goog_in21k")
    return resolve(config, num_examples=num_examples, image_area=32 * 32, weights=weights).hyper


@pytest.mark.parametrize("preset", TABLES)
@pytest.mark.parametrize("num_examples", [1_000, 20_000])
@pytest.mark.parametrize("times", [2, 7])
def test_a_run_of_so_many_times_the_steps_has_the_same_rates_spread_out(preset: str, num_examples: int, times: int) -> None:
    rule = resolved(num_examples, preset=preset)
    longer = resolved(num_examples, preset=preset, steps=times * rule.steps)
    rates = [learning_rate(times * step, longer) for step in range(rule.steps)]
    assert len(rates) == rule.steps >= 500
    np.testing.assert_allclose(rates, [learning_rate(step, rule) for step in range(rule.steps)], rtol=1e-15)


def test_steps_scales_warm_up_and_decays_in_proportion() -> None:
    assert (half := resolved(steps=250)).warmup_steps == 50
    assert half.decay_steps == (100, 150, 200)
    assert [learning_rate(s, half) for s in (0, 49, 50, 100)] == pytest.approx([0, 0.003 * 49 / 50, 0.003, 0.003])
    assert [learning_rate(s, half) for s in (101, 151, 201)] == pytest.approx([3e-4, 3e-5, 3e-6])
    for steps in range(1, 700):
        hyper = resolved(steps=steps)
        assert hyper.steps == steps
        for scaled, of_500 in zip((hyper.warmup_steps, *hyper.decay_steps), (100, 200, 300, 400), strict=True):
            assert abs(scaled - of_500 * steps / 500) <= 0.5


def test_what_is_asked_by_name_stands_and_nothing_follows_the_batch() -> None:
    hyper = resolved(steps=1_000, warmup_steps=7, decay_steps=(10, 20))
    assert (hyper.steps, hyper.warmup_steps, hyper.decay_steps) == (1_000, 7, (10, 20))
    for batch_size in (1, 64, 4_096):
        assert resolved(batch_size=batch_size) == replace(RULE, batch_size=batch_size)
    assert resolved(base_lr=0.01) == replace(RULE, base_lr=0.01)


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_the_printed_pieces_cover_every_step_with_its_rate(data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, 120))
    hyper = replace(
        RULE,
        steps=steps,
        warmup_steps=data.draw(st.integers(0, steps)),
        decay_steps=tuple(sorted(data.draw(st.lists(st.integers(0, 150), max_size=4)))),
    )
    table = rate_table(hyper)
    assert [step for first, last, *_ in table for step in range(first, last + 1)] == list(range(steps))
    for first, last, start, end in table:
        for step in range(first, last + 1):
            between = start + (end - start) * (step - first) / max(last - first, 1)
            assert learning_rate(step, hyper) == pytest.approx(between, rel=1e-12, abs=0)
    assert len(table) <= 1 + (hyper.warmup_steps > 0) + len(set(hyper.decay_steps))


@pytest.mark.parametrize("preset", TABLES)
def test_the_printed_pieces_of_the_rule_are_those_of_the_table(preset: Preset) -> None:
    for sizes, pieces in TABLES[preset].items():
        table = rate_table(bit_hyperrule(sizes[0], 1, preset=preset))
        assert [piece[:2] for piece in table] == [piece[:2] for piece in pieces]
        assert all(start == end for (_, _, start, end), piece in zip(table, pieces, strict=True) if piece[2] != WARMUP)


def test_rates_never_rise_after_warm_up() -> None:
    hyper = replace(RULE, steps=500, warmup_steps=0)
    assert all(a >= b for a, b in itertools.pairwise(learning_rate(s, hyper) for s in range(500)))


@pytest.mark.parametrize("step", [-1, 500, 501])
def test_a_step_outside_of_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} is outside of a run of 500"):
        learning_rate(step, RULE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"crop_size": 0}, "crop_size is 0"),
        ({"resize_size": -4}, "resize_size is -4"),
        ({"crop_size": 161}, "crop_size 161 is larger than resize_size 160"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmup_steps": 501}, "warmup_steps is 501"),
        ({"decay_steps": (200, 100)}, "rising order"),
        ({"decay_steps": (-1, 100)}, "none of them negative"),
        ({"base_lr": 0.0}, "base_lr is 0.0"),
        ({"base_lr": math.nan}, "base_lr is nan"),
        ({"base_lr": math.inf}, "base_lr is inf"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"mixup_alpha": -0.1}, "mixup_alpha is -0.1"),
        ({"mixup_alpha": math.nan}, "mixup_alpha is nan"),
        ({"mixup_alpha": 0.1, "batch_size": 1}, "batch_size is 1"),
    ],
)
def test_impossible_numbers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(RULE, **changes)


def test_extreme_numbers_that_make_sense_are_not_refused() -> None:
    replace(RULE, mixup_alpha=math.inf, warmup_steps=500, decay_steps=(), momentum=0.0, crop_size=160)


@pytest.mark.parametrize(("size", "area"), [(0, 100.0), (-5, 100.0), (10, 0.0), (10, -1.0), (10, math.nan)])
def test_the_rule_needs_examples_and_an_area(size: int, area: float) -> None:
    with pytest.raises(ConfigError, match="the rule needs"):
        bit_hyperrule(size, area)
