"""Is every draw a function of seed and place alone, and does every cut of a batch hold each position exactly once?"""

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bit_mixup.errors import ConfigError
from bit_mixup.sampling import (
    MicroBatch,
    PositionBatches,
    Purpose,
    cut_batch,
    few_shot_rows,
    generator,
    group_sizes,
    row_at,
    stratified_rows,
)

QUIETLY = settings(deadline=None, derandomize=True)
BATCHES = st.integers(1, 600)
GROUPS = st.sampled_from([1, 8])
LABELS = st.lists(st.integers(0, 4), min_size=2, max_size=80).map(np.array)


# --- draws -----------------------------------------------------------------------------------------------------------


def test_purposes_have_streams_of_their_own() -> None:
    assert len(Purpose.__members__) == len(set(Purpose)) == 18
    draws = {
        tuple(generator(seed, purpose, index).integers(2**63, size=2))
        for seed in (0, 1)
        for purpose in Purpose
        for index in (0, 1)
    }
    assert len(draws) == 2 * 18 * 2


def test_a_draw_depends_on_nothing_that_was_drawn_before() -> None:
    before = generator(5, Purpose.LAM, 9).random(4)
    np.random.default_rng().random()
    generator(5, Purpose.LAM, 8).random(100)
    np.testing.assert_array_equal(generator(5, Purpose.LAM, 9).random(4), before)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed is -1"):
        generator(-1, Purpose.LAM)


@pytest.mark.parametrize("num_examples", [1, 2, 7, 100])
def test_each_pass_takes_every_row_once(num_examples: int) -> None:
    passes = [
        [row_at(epoch * num_examples + offset, seed=3, num_examples=num_examples) for offset in range(num_examples)]
        for epoch in range(8)
    ]
    assert all(sorted(rows) == list(range(num_examples)) for rows in passes)
    if num_examples == 100:
        assert len({tuple(rows) for rows in passes}) == 8, "passes repeat an order"
        other = [row_at(offset, seed=4, num_examples=100) for offset in range(100)]
        assert other not in passes


def test_rows_can_be_asked_in_any_order() -> None:
    positions = list(range(200))
    forward = {p: row_at(p, seed=1, num_examples=11) for p in positions}
    np.random.default_rng(0).shuffle(positions)  # across more passes than the cache holds
    assert {p: row_at(p, seed=1, num_examples=11) for p in positions} == forward


# --- groups and cuts -------------------------------------------------------------------------------------------------


@QUIETLY
@given(BATCHES, GROUPS)
def test_groups_make_up_the_batch_and_nobody_is_alone(batch_size: int, group_size: int) -> None:
    sizes = group_sizes(batch_size, group_size)
    assert sum(sizes) == batch_size
    assert all(size == group_size for size in sizes[:-1])
    assert 1 <= sizes[-1] <= (group_size + 1 if group_size > 1 else 1)
    assert batch_size == 1 or group_size == 1 or min(sizes) >= 2


@settings(QUIETLY, max_examples=600)
@given(BATCHES, st.integers(1, 8), st.none() | st.integers(1, 40) | st.integers(1, 700), GROUPS)
def test_every_cut_holds_each_position_once(batch_size: int, processes: int, micro_batch: int | None, group_size: int) -> None:
    number = batch_size if group_size == 1 else max(1, batch_size // 8 + (batch_size % 8 > 1))
    largest = 1 if group_size == 1 else 9 if batch_size % 8 == 1 and batch_size > 1 else min(batch_size, 8)
    if processes > number or (micro_batch is not None and micro_batch < largest):
        with pytest.raises(ConfigError, match=r"processes can not share|micro_batch"):
            cut_batch(batch_size, num_processes=processes, micro_batch=micro_batch, group_size=group_size)
        return
    cuts = cut_batch(batch_size, num_processes=processes, micro_batch=micro_batch, group_size=group_size)
    real = [cut for share in cuts for cut in share if cut.weight == 1]
    # In order of process and pass the real cuts run through the batch, and their groups are those of the whole batch.
    assert [position for cut in real for position in cut.positions(0, batch_size)] == list(range(batch_size))
    assert [size for cut in real for size in cut.groups] == group_sizes(batch_size, group_size)
    assert len(cuts) == processes
    assert len({len(share) for share in cuts}) == 1
    assert micro_batch is None or max(cut.size for share in cuts for cut in share) <= micro_batch
    assert micro_batch is not None or len(cuts[0]) == 1
    for share in cuts:  # idle passes come last and repeat what the process has just seen
        for cut, before in zip(share[1:], share, strict=False):
            assert cut.weight == 1 or (cut.weight == 0 and (cut.start, cut.groups) == (before.start, before.groups))
        assert share[0].weight == 1
        assert [cut.weight for cut in share] in ([1.0] * len(share), [1.0] * (len(share) - 1) + [0.0])
        counts = [len(cut.groups) for cut in share if cut.weight]
        assert max(counts) - min(counts) <= 1
    shares = [sum(len(cut.groups) for cut in share if cut.weight) for share in cuts]
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 16, "num_processes": 3}, "3 processes can not share a batch of 16: it has 2 group"),
        ({"batch_size": 2, "num_processes": 3, "group_size": 1}, "3 processes can not share a batch of 2"),
        ({"batch_size": 16, "micro_batch": 7}, "micro_batch 7 is too small: .* at least 8"),
        ({"batch_size": 17, "micro_batch": 8}, "micro_batch 8 is too small: .* at least 9"),
        ({"batch_size": 16, "micro_batch": 0, "group_size": 1}, "micro_batch is 0; it must be at least 1"),
    ],
)
def test_impossible_cuts_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cut_batch(**arguments)


@QUIETLY
@given(st.integers(16, 60), st.integers(1, 2), st.integers(9, 40), st.integers(0, 4), st.integers(0, 4))
def test_processes_read_each_position_of_the_run_once(batch: int, processes: int, micro: int, first: int, steps: int) -> None:
    cuts = cut_batch(batch, num_processes=processes, micro_batch=micro)
    read: Counter[int] = Counter()
    for share in cuts:
        batches = PositionBatches(share, batch_size=batch, first_step=first, steps=steps)
        lists = list(batches)
        assert list(batches) == lists, "can be iterated over again"
        assert len(batches) == len(lists) == max(steps - first, 0) * len(share)
        for number, positions in enumerate(lists):
            cut = share[number % len(share)]
            assert len(positions) == cut.size
            read.update(positions if cut.weight else [])
    assert read == Counter(range(first * batch, steps * batch))


def test_a_micro_batch_knows_its_place_in_the_run() -> None:
    cut = MicroBatch(start=8, groups=(8, 3))
    assert (cut.size, list(cut.positions(2, 19))) == (11, list(range(46, 57)))


# --- subsets ---------------------------------------------------------------------------------------------------------


@QUIETLY
@given(LABELS, st.floats(0.01, 0.99))
def test_a_stratified_share_takes_its_part_of_each_class(labels: npt.NDArray[np.int64], fraction: float) -> None:
    rows = stratified_rows(labels, fraction, seed=7)
    assert list(rows) == sorted(set(rows.tolist()))
    total, taken = Counter(labels.tolist()), Counter(labels[rows].tolist())
    for label, count in total.items():
        if count == 1:
            assert taken[label] == 0
        else:
            assert 1 <= taken[label] <= count - 1
            assert abs(taken[label] - fraction * count) <= 0.5 or taken[label] in (1, count - 1)


@QUIETLY
@given(LABELS, st.integers(1, 3))
def test_a_few_shot_subset_is_balanced_and_without_replacement(labels: npt.NDArray[np.int64], shots: int) -> None:
    labels = np.concatenate([labels, np.repeat(np.unique(labels), shots)])  # enough rows in each class
    rows = few_shot_rows(labels, shots, seed=0)
    assert list(rows) == sorted(set(rows.tolist()))
    assert Counter(labels[rows].tolist()) == dict.fromkeys(set(labels.tolist()), shots)


def test_subsets_are_functions_of_the_seed_and_every_row_is_as_likely() -> None:
    labels = np.arange(60) % 3
    seeds = range(500)
    few = [tuple(few_shot_rows(labels, 5, seed=seed)) for seed in seeds]
    part = [tuple(stratified_rows(labels, 0.25, seed=seed)) for seed in seeds]
    for subsets in (few, part):
        assert all(len(rows) == 15 for rows in subsets)
        assert len(set(subsets)) == len(seeds)
        shares = np.bincount(np.concatenate(subsets), minlength=60) / len(seeds)
        assert np.abs(shares - 0.25).max() < 4.5 * (0.25 * 0.75 / len(seeds)) ** 0.5
    assert [tuple(few_shot_rows(labels, 5, seed=seed)) for seed in seeds] == few
    assert [tuple(stratified_rows(labels, 0.25, seed=seed)) for seed in seeds] == part
    assert set(few).isdisjoint(part)
