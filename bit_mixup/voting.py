"""What do the processes of a run decide together, before its first step and at the end of each?

Processes that started from different commands, data, weights or checkpoints would train on without a word, each on a part of
another run; and where one stops for a fault of its own, the others would wait for it. So they compare and tell.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator

from bit_mixup.errors import ProcessError

_SHOWN = 4  # differences that a message names
_LOST = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "NCCL", "TCPStore", "store->get")


class Council:
    """Lets all processes hear what one of them has met: a signal, the end of its memory, a fault, another configuration.

    They speak over their hosts, not over their devices, so that no device is waited for. Whatever is said here, all processes
    have to say together.

    Args:
        accelerator: of this process.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.is_main, self._count = bool(accelerator.is_main_process), int(accelerator.num_processes)
        over_hosts = self._count > 1 and accelerator.device.type != "cpu"
        self._group: Any = torch.distributed.new_group(backend="gloo") if over_hosts else None

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over all processes."""
        if self._count == 1:
            return list(values)
        votes = torch.tensor(values, dtype=torch.int64)
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return [int(vote) for vote in votes]

    def gather(self, text: str) -> list[str]:
        """What each process says, in order of rank."""
        if self._count == 1:
            return [text]
        own = torch.tensor(list(text.encode()) or [0], dtype=torch.uint8)
        padded = torch.zeros(self.largest(len(own))[0], dtype=torch.uint8)
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self._count)]
        torch.distributed.all_gather(parts, padded, group=self._group)
        return [bytes(part.tolist()).rstrip(b"\0").decode() for part in parts]

    @contextmanager
    def sharing_faults(self) -> Iterator[None]:
        """Stops all processes where one of them meets an error within. All wait for each other at the end.

        Raises:
            ProcessError: in the processes that have met none.
        """
        fault: Exception | None = None
        try:
            yield
        except Exception as error:
            if self._count == 1:
                raise
            fault = error
        reports = self.gather("" if fault is None else str(fault) or type(fault).__name__)
        if fault is not None:
            raise fault
        stopped = [rank for rank, report in enumerate(reports) if report]
        if stopped:
            raise ProcessError(f"{_ranks(stopped)} of {self._count} can not go on, so all stop: {reports[stopped[0]]}")

    def agree(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Sees that all processes hold the same facts.

        Args:
            facts: plain values by what people call them; not asked for where there is one process.

        Raises:
            ProcessError: in all processes: what differs, and who holds what.
        """
        if self._count == 1:
            return
        held = [json.loads(text) for text in self.gather(json.dumps(facts(), default=str))]
        differences = []
        for name in {name: None for one in held for name in one}:
            holders: dict[str, list[int]] = {}
            for rank, one in enumerate(held):
                holders.setdefault(json.dumps(one.get(name)), []).append(rank)
            if len(holders) > 1:
                values = ", ".join(f"{_ranks(ranks)} has {_shortened(value)}" for value, ranks in holders.items())
                differences.append(f"{name}: {values}")
        if differences:
            more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise ProcessError(
                f"processes differ in {'; '.join(differences[:_SHOWN])}{more}. Start all with the same command and versions, on "
                "the same data and the same run folder."
            )


def _ranks(ranks: list[int]) -> str:
    """ "rank 0", or "each of ranks 0, 1"."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"each of ranks {', '.join(map(str, ranks))}"


def _shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process has ended or does not answer."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)
