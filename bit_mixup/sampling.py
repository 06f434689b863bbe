"""Which example stands at each position of a run, what is drawn there, and how is a batch cut?

A run of `steps` optimizer steps with `batch_size` examples each has `steps * batch_size` positions. Position p belongs to
step p // batch_size. Every random draw of a run is a function of the seed and of a position or a step, never of a generator's
state: so the order of processes, workers, micro-batches and interruptions can not change it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from bit_mixup.errors import ConfigError

GROUP_SIZE = 8  # consecutive positions among which mixup looks for partners; a micro-batch holds whole groups


class Purpose(IntEnum):
    """What a draw is for. Each purpose has a stream of its own; the numbers are part of what a seed means: never reuse one."""

    SHUFFLE = 1
    CROP_AND_FLIP = 2
    LAM = 3
    PARTNER = 4
    FEW_SHOT = 5
    SPLIT = 6
    SIZE_SAMPLE = 7
    DISTORTION = 8
    CALIBRATION = 9
    CORRUPTION = 10
    DIAGNOSTICS = 11
    NOISE = 12
    DROPOUT = 13
    PARTNER_ROW = 14
    PARTNER_VIEW = 15
    MEAN_IMAGE = 16
    STREAM_PASS = 17
    BOOTSTRAP = 18


def generator(seed: int, purpose: Purpose, index: int = 0) -> np.random.Generator:
    """The generator of one draw: a pure function of its arguments (NumPy's PCG64 on a seed sequence of the three).

    Raises:
        ConfigError: a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be 0 or a positive whole number.")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, int(purpose), index))))


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> npt.NDArray[np.int64]:
    return generator(seed, Purpose.SHUFFLE, epoch).permutation(num_examples)


def row_at(position: int, *, seed: int, num_examples: int) -> int:
    """The row of the data set at a position of the run.

    Shuffled passes over the data set are laid end to end, so rows are drawn without replacement within a pass, and a batch
    larger than the data set simply spans several passes.
    """
    epoch, offset = divmod(position, num_examples)
    return int(_epoch_order(seed, epoch, num_examples)[offset])


def group_sizes(batch_size: int, group_size: int = GROUP_SIZE) -> list[int]:
    """Sizes of the groups of a global batch, in order of position.

    All hold `group_size` positions but the last, which holds what remains; a remainder of one joins the group before it, so that
    no position is without a partner. A batch of no more than `group_size` is one group.
    """
    full, rest = divmod(batch_size, group_size)
    sizes = [group_size] * full + ([rest] if rest else [])
    if group_size > 1 and rest == 1 and full:
        sizes[-2:] = [group_size + 1]
    return sizes


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A run of consecutive groups of one global batch, for one backward pass.

    Args:
        start: its first position, counted from the start of the global batch.
        groups: the sizes of its groups.
        weight: 1; or 0 for a repetition that only keeps the number of backward passes equal in all processes.
    """

    start: int
    groups: tuple[int, ...]
    weight: float = 1.0

    @property
    def size(self) -> int:
        return sum(self.groups)

    def positions(self, step: int, batch_size: int) -> range:
        """Its positions in the run, at a step."""
        first = step * batch_size + self.start
        return range(first, first + self.size)


def _even_shares(count: int, parts: int) -> list[int]:
    return [count // parts + (index < count % parts) for index in range(parts)]


def cut_batch(
    batch_size: int, *, num_processes: int = 1, micro_batch: int | None = None, group_size: int = GROUP_SIZE
) -> list[list[MicroBatch]]:
    """Cuts a global batch into micro-batches of whole groups: one list for each process, all of the same length.

    Shares and micro-batches are as even as whole groups allow. `micro_batch` is the most examples of one backward pass
    (None: a process's whole share). The cut has no say in what is computed: rows, crops, lam and partners belong to
    positions. Where one process has a group less than it has passes, its last pass repeats a group with weight 0.

    Raises:
        ConfigError: more processes than groups, or a micro-batch too small for a group.
    """
    sizes = group_sizes(batch_size, group_size)
    if num_processes > len(sizes):
        raise ConfigError(
            f"{num_processes} processes can not share a batch of {batch_size}: it has {len(sizes)} group(s) of up to "
            f"{group_size} for mixup. Raise batch_size to at least {num_processes * group_size} or start fewer processes."
        )
    per_pass = len(sizes)
    if micro_batch is not None:
        largest = max(sizes)
        if micro_batch < largest:
            raise ConfigError(
                f"micro_batch {micro_batch} is too small: mixup's partners are chosen in groups of up to {largest}, which "
                f"stay together. Use at least {largest}, or turn mixup off with mixup_alpha 0."
                if group_size > 1
                else f"micro_batch is {micro_batch}; it must be at least 1."
            )
        per_pass = (micro_batch - (largest > group_size)) // min(group_size, largest)  # one group may be larger, by one
    shares = _even_shares(len(sizes), num_processes)
    passes = -(-max(shares) // per_pass)
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    processes: list[list[MicroBatch]] = []
    group = 0
    for share in shares:
        cuts: list[MicroBatch] = []
        for count in _even_shares(share, passes):
            if count:
                cuts.append(MicroBatch(start=starts[group], groups=tuple(sizes[group : group + count])))
                group += count
            else:
                cuts.append(MicroBatch(start=cuts[-1].start, groups=cuts[-1].groups, weight=0.0))
        processes.append(cuts)
    return processes


ACTIVATION_BUDGET = 6 * 1024**3  # bytes of saved activations that a micro-batch may take unless asked otherwise


def fitting_micro_batch(activation_bytes: int, *, mixed: bool) -> int:
    """Most examples of a backward pass whose saved activations fit into 6 GiB, but at least a group where partners are mixed.

    A function of model and resolution alone, never of the memory that happens to be free: rounding depends on the cut.
    """
    fitting = ACTIVATION_BUDGET // activation_bytes
    return max(fitting // GROUP_SIZE * GROUP_SIZE or fitting, GROUP_SIZE + 1 if mixed else 1)


class PositionBatches:
    """The lists of positions that one process reads, micro-batch by micro-batch, from `first_step` to the run's end.

    A batch sampler for torch's DataLoader: it has a length and can be iterated over any number of times.
    """

    def __init__(self, cuts: list[MicroBatch], *, batch_size: int, first_step: int, steps: int) -> None:
        self.cuts, self.batch_size, self.first_step, self.steps = cuts, batch_size, first_step, steps

    def __len__(self) -> int:
        return max(self.steps - self.first_step, 0) * len(self.cuts)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps):
            for cut in self.cuts:
                yield list(cut.positions(step, self.batch_size))


def stratified_rows(labels: npt.NDArray[np.int64], fraction: float, *, seed: int) -> npt.NDArray[np.int64]:
    """Rows of a seeded, stratified share of a data set, in rising order.

    Each class gives `fraction` of its rows, rounded, but at least one and never all (a class with a single row gives none).
    """
    chosen = []
    for index, label in enumerate(np.unique(labels)):
        rows = np.flatnonzero(labels == label)
        count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        chosen.append(generator(seed, Purpose.SPLIT, index).permutation(rows)[:count])
    return np.sort(np.concatenate(chosen))


def few_shot_rows(labels: npt.NDArray[np.int64], examples_per_class: int, *, seed: int) -> npt.NDArray[np.int64]:
    """Rows of a balanced subset drawn without replacement, in rising order. Every class must have enough rows."""
    chosen = [
        generator(seed, Purpose.FEW_SHOT, index).permutation(np.flatnonzero(labels == label))[:examples_per_class]
        for index, label in enumerate(np.unique(labels))
    ]
    return np.sort(np.concatenate(chosen))
