"""How does a run take hold of its processes, threads and device, and what does it write down about them?"""

import atexit
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from bit_mixup.config import RunConfig
from bit_mixup.environment import Environment, available_cores, versions
from bit_mixup.errors import ConfigError, did_you_mean
from bit_mixup.runs import TRACKER_PROJECT
from bit_mixup.sampling import MicroBatch

_TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")
_DISTRIBUTED = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU}


def join_processes(environment: Environment, *, tracker: str | None, folder: Path) -> Accelerator:
    """The accelerator of this process, joined with the others that the launcher has started.

    Args:
        environment: what the plan has found.
        tracker: of Accelerate, to log through.
        folder: of the run.

    Raises:
        ConfigError: launcher, device or tracker are not what the run needs.
    """
    _check_tracker(tracker)
    AcceleratorState._reset_state()  # a notebook's next run may ask for another precision
    accelerator = Accelerator(
        mixed_precision="no" if environment.precision == "fp32" else environment.precision,
        log_with=tracker,
        project_dir=str(folder),
        cpu=not torch.accelerator.is_available(),  # else, on the CPU, Accelerate takes no notice of torchrun's processes
    )
    if accelerator.num_processes != environment.num_processes:
        raise ConfigError(
            f"the launcher announces {environment.num_processes} processes, but Accelerate joins "
            f"{accelerator.num_processes}. Start with torchrun or accelerate launch."
        )
    if environment.precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("precision fp16 needs an accelerator, but the run is on the CPU. Use bf16 or fp32.")
    atexit.register(accelerator.state.destroy_process_group)  # not sooner: this process may start another run
    if accelerator.distributed_type not in _DISTRIBUTED:
        raise ConfigError(f"distributed type {accelerator.distributed_type.value} is not supported; use DDP.")
    return accelerator


def _check_tracker(tracker: str | None) -> None:
    if tracker is None:
        return
    if tracker not in _TRACKERS:
        raise ConfigError(f'tracker "{tracker}"{did_you_mean(tracker, _TRACKERS)}: Accelerate knows {", ".join(_TRACKERS)}.')
    if find_spec(tracker) is None:
        raise ConfigError(
            f'tracker "{tracker}" is not installed. Install it with `pip install {tracker}`, or leave --tracker out.'
        )


def start_tracker(accelerator: Accelerator, config: RunConfig) -> None:
    """Tells the tracker, where there is one, what was asked of the run."""
    if config.tracker:
        values = {name: value for name, value in config.as_json().items() if isinstance(value, int | float | str)}
        accelerator.init_trackers(TRACKER_PROJECT, config=values)


def default_workers(accelerator: Accelerator) -> int:
    """Processes that decode pictures: none on the CPU, where they would take cores from training."""
    if accelerator.device.type == "cpu":
        return 0
    share: int = available_cores() // accelerator.num_processes
    return min(8, max(1, share))


def record_environment(environment: Environment, cuts: list[list[MicroBatch]]) -> dict[str, Any]:
    """What may show in a result's last bits, as plain values."""
    return {
        "processes": environment.num_processes,
        "threads": environment.threads,
        "micro_batches": [[cut.size for cut in share] for share in cuts],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else str(find_device()),
        "versions": versions(),
        "command": sys.argv,
    }


def note_other_environment(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Says what a resumed run does otherwise than its first start, where that may show in the last bits."""
    for name in ("processes", "threads", "micro_batches", "device", "versions"):
        if before[name] != now[name]:
            print(f"{'':<9} NOTE: resumed with other {name}: {before[name]} -> {now[name]}; the last bits may differ")


def find_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Sets torch's threads for the time of a run."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
