"""What do the processes of a run decide together, at the end of a step?"""

from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator


class Council:
    """Lets all processes hear what one of them has met: a signal, or the end of its memory.

    They speak over their hosts, not over their devices, so that no device is waited for.

    Args:
        accelerator: of this process.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._alone = accelerator.num_processes == 1
        over_hosts = not self._alone and accelerator.device.type != "cpu"
        self._group: Any = torch.distributed.new_group(backend="gloo") if over_hosts else None

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over all processes, which all have to call this together."""
        if self._alone:
            return list(values)
        votes = torch.tensor(values, dtype=torch.int64)
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return [int(vote) for vote in votes]
