"""How do pictures travel from the data set to the device?"""

from collections.abc import Generator, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bit_mixup.interruption import ignore_signals


class BatchSource(Protocol):
    """A map-style data set that is asked for a whole batch at a time."""

    def __getitems__(self, indices: Sequence[int], /) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]] | Exception:
        """Images (N, 3, H, W), or features (N, F) in their place, and labels (N,); or the error to raise."""
        ...


class Stream(BatchSource, Protocol):
    """What a run is trained on: its index is the position in the run."""

    def ids(self, positions: Sequence[int]) -> list[str]:
        """How people find the examples at these positions."""
        ...


def _as_tensors(batch: Any) -> Any:
    return batch if isinstance(batch, Exception) else tuple(torch.from_numpy(array) for array in batch)


def load_batches(
    source: BatchSource, batches: Iterable[list[int]], *, num_workers: int, device: torch.device
) -> Generator[tuple[Tensor, Tensor]]:
    """Images (N, 3, H, W) uint8, or features (N, F), and labels (N,) int64 on the device, a pair for each list of indices.

    Any number of worker processes gives the same pairs in the same order. To be closed (`contextlib.closing`), or an error's
    traceback would keep worker processes alive.

    Raises:
        DataError: a picture is broken.
    """
    loader: DataLoader[Any] = DataLoader(
        source,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=_as_tensors,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
        worker_init_fn=ignore_signals,
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        images, labels = batch
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
