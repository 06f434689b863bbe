"""What can be computed at a time, in the memory that there is?

A micro-batch has no say in what a step computes, but for rounding: where memory runs out, smaller ones lead to the same result.
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from bit_mixup.errors import MemoryShortError
from bit_mixup.sampling import MicroBatch, cut_batch, group_sizes

USED_SHARE = 0.8  # of the free memory that an estimate may fill: it is right within a quarter
_ONEDNN = "could not create a primitive"
_OTHERS = (_ONEDNN, "could not create a memory", "Cannot allocate memory", "bad_alloc")  # what Accelerate does not know

_UNLIMITED = 2**62
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_GROUP_FILES = {  # by the controllers that a line of the kernel's list names: limit, use, and what of it is page cache
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}

Cuts = list[list[MicroBatch]]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a device or on the CPU."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(text in str(error) for text in _OTHERS)


@contextmanager
def memory_explained() -> Iterator[None]:
    """Says in one line that memory has run out, where there is nothing that could be done at a smaller scale.

    Raises:
        MemoryShortError: in place of whatever the libraries raise then.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryShortError(
            f"out of memory outside of the steps of training ({str(error).splitlines()[0][:160]}). What was written before is "
            "whole. Free some memory, choose a smaller model, or lower --num-workers; then go on with --resume."
        ) from error


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Lets the C library keep what a step frees for the next one, on the CPU; at the end what is not in use goes back.

    Left alone, glibc gives the end of its heap back to the operating system in each step and gets it anew in the next, each page
    with a fault: 3 to 7 % of a step's time. Whoever has set the size from which blocks are mapped is not overruled.
    """
    if device.type != "cpu" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        yield
        return
    _set_glibc(mapped_from=2**25, trimmed_from=2**31 - 1, padding=2**26)
    try:
        yield
    finally:
        _set_glibc(mapped_from=2**25, trimmed_from=2**26, padding=2**17)  # as glibc itself would have come to set it by then
        _trim_heap()


def _set_glibc(*, mapped_from: int, trimmed_from: int, padding: int) -> None:
    """Sizes in bytes: from which on blocks are mapped one by one, or the free end of the heap goes back; and what the heap
    grows by beyond what is needed."""
    with suppress(OSError, AttributeError):  # other C libraries have no such calls
        glibc = ctypes.CDLL(None)
        for name, value in ((_M_MMAP_THRESHOLD, mapped_from), (_M_TRIM_THRESHOLD, trimmed_from), (_M_TOP_PAD, padding)):
            glibc.mallopt(name, value)


def _trim_heap() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def release_memory() -> None:
    """Gives back what is not in use: to the device, and where the C library can, to the operating system.

    On the CPU glibc keeps freed blocks of up to 32 MB for later, in a heap that falls to pieces. Once memory has run out, blocks
    of a megabyte and more go back at once: slower, but then what is free can be had.
    """
    clear_device_cache(garbage_collection=True)
    _set_glibc(mapped_from=2**20, trimmed_from=2**20, padding=0)
    _trim_heap()


def avoid_broken_primitives(error: BaseException) -> None:
    """Turns oneDNN off where an error came from it.

    It remembers that it could not create a primitive, and fails at the next one of that kind even with memory in plenty (seen
    with torch 2.15); torch's own convolutions, though slower, do not.
    """
    if _ONEDNN in str(error):
        torch.backends.mkldnn.set_flags(False)


def largest_pass(cuts: Sequence[Sequence[MicroBatch]]) -> int:
    """Examples of the largest backward pass of any process."""
    return max(cut.size for share in cuts for cut in share)


def smaller_cuts(cuts: Cuts, *, batch_size: int, group_size: int) -> Cuts | None:
    """The same global batch in micro-batches of half the size; None where they can not be smaller.

    Args:
        cuts: for each process, as `bit_mixup.sampling.cut_batch` gives them.
        batch_size: examples of a step.
        group_size: of mixup's groups, which stay together; 1 without.
    """
    largest, smallest = largest_pass(cuts), max(group_sizes(batch_size, group_size))
    if largest <= smallest:
        return None
    micro_batch = max(largest // 2, smallest)
    return cut_batch(batch_size, num_processes=len(cuts), micro_batch=micro_batch, group_size=group_size)


def free_bytes(device: torch.device, *, local_processes: int = 1) -> int:
    """Memory in bytes that one process may still take on a device.

    On the CPU the least of what the machine has available, what the process's control group may still take (containers, SLURM),
    both shared by the processes of this machine, and what the limit of the address space leaves (ulimit -v).
    """
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    shared = min(int(psutil.virtual_memory().available), control_group_rest())
    return min(shared // local_processes, _address_space_rest())


def control_group_rest(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory in bytes that this process's control group (version 2 or 1) and those above it may still take.

    What they keep of files that were read (the page cache) counts as free, as it gives way.

    Args:
        groups: the kernel's list of the groups of this process.
        root: where the groups' files are.
    """
    rest = [_UNLIMITED]
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return _UNLIMITED
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers not in _GROUP_FILES:
            continue
        limit_file, used_file, cached_key = _GROUP_FILES[controllers]
        top = root / controllers
        folder = top / place.lstrip("/")
        for group in (folder, *(parent for parent in folder.parents if parent.is_relative_to(top))):
            try:
                limit, used = ((group / name).read_text(encoding="utf-8").strip() for name in (limit_file, used_file))
                counts = dict(entry.split() for entry in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
            except OSError:  # not the folder of a group, or not ours to read
                continue
            if limit != "max":
                rest.append(int(limit) - int(used) + int(counts.get(cached_key, 0)))
    return min(rest)


def _address_space_rest() -> int:
    if os.name != "posix":
        return _UNLIMITED
    import resource  # there is none on Windows

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return _UNLIMITED if limit == resource.RLIM_INFINITY else limit - int(psutil.Process().memory_info().vms)


def find_cuts(
    *,
    batch_size: int,
    num_processes: int,
    group_size: int,
    estimate: Callable[[int], int],
    free: int,
    attempt: Callable[[Cuts], bool],
) -> Cuts:
    """The largest micro-batches that are estimated to fit and then do, for `--micro-batch auto`.

    Args:
        batch_size: examples of a step.
        num_processes: that share it.
        group_size: of mixup's groups; 1 without.
        estimate: memory in bytes of a process, by the examples of its largest backward pass.
        free: memory in bytes that there is.
        attempt: tries one backward pass of these cuts in all processes; whether it fits in each of them.

    Raises:
        MemoryShortError: not even the smallest fits.
    """
    cuts: Cuts | None = cut_batch(batch_size, num_processes=num_processes, group_size=group_size)
    size = batch_size
    while cuts is not None:
        size = largest_pass(cuts)
        smaller = smaller_cuts(cuts, batch_size=batch_size, group_size=group_size)
        if (estimate(size) <= USED_SHARE * free or smaller is None) and attempt(cuts):
            return cuts
        cuts = smaller
    raise MemoryShortError(
        f"micro_batch auto: not even {size} example(s) at a time fit into memory ({free / 1e9:.3g} GB free). Lower crop_size, "
        "or choose a smaller model or --precision bf16."
    )
