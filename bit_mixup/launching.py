"""How does a run take hold of its processes, threads and device, and what does it write down about them?"""

import atexit
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import filter_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from bit_mixup.config import RunConfig
from bit_mixup.environment import Environment, available_cores, versions
from bit_mixup.errors import ConfigError, ProcessError, did_you_mean
from bit_mixup.repeating import git_state
from bit_mixup.runs import TRACKER_PROJECT, RunFolder
from bit_mixup.sampling import MicroBatch
from bit_mixup.voting import Council, is_lost_process

_TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")
_DISTRIBUTED = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU}

# A process that ends is noticed at once, by its closed connections. This is for one that hangs, or whose machine has lost its
# power; it must outlast the longest that one process does alone: a download, a scan, a checkpoint on a slow disk.
PATIENCE = timedelta(minutes=30)

# What processes may be asked differently: their machines' matters, and where each finds the folder whose content is compared.
_OWN_MATTERS = {"threads", "num_workers", "output_dir"}
_DECIDING = ("bit_mixup", "torch", "timm", "numpy", "pillow")  # whose versions show in the bits

Result = TypeVar("Result")


class Planned(Protocol):
    """What the plans of all kinds of run have."""

    @property
    def config(self) -> RunConfig:
        """What was asked."""

    @property
    def run(self) -> RunFolder:
        """Where files go."""

    def resolved(self) -> dict[str, Any]:
        """What has a say in the result, as plain values."""


PlanKind = TypeVar("PlanKind", bound=Planned)


def join_processes(environment: Environment, *, tracker: str | None) -> Accelerator:
    """The accelerator of this process, joined with the others that the launcher has started.

    Args:
        environment: what the launcher says.
        tracker: of Accelerate, to log through.

    Raises:
        ConfigError: launcher, device or tracker are not what the run needs.
    """
    _check_tracker(tracker)
    AcceleratorState._reset_state()  # a notebook's next run may ask for another precision
    accelerator = Accelerator(
        mixed_precision="no" if environment.precision == "fp32" else environment.precision,
        cpu=not torch.accelerator.is_available(),  # else, on the CPU, Accelerate takes no notice of torchrun's processes
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
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


def plan_together(accelerator: Accelerator, make: Callable[[], PlanKind]) -> PlanKind:
    """The plan that each process makes, if all have made the same.

    Raises:
        BitMixupError: the plan can not be made.
        ProcessError: another process can not make it, or has made another: other options, versions, data or checkpoints.
    """
    council = Council(accelerator)
    with lost_processes_explained():
        with council.sharing_faults():
            plan = make()
        council.agree(lambda: _facts(plan))
    return plan


def _facts(plan: Planned) -> dict[str, Any]:
    """What processes must have in common, by the names that people know."""
    asked = {name: value for name, value in plan.config.as_json().items() if name not in _OWN_MATTERS}
    resolved = {f"{part} {name}": value for part, values in plan.resolved().items() if isinstance(values, dict)
                for name, value in values.items()}  # fmt: skip
    found = plan.run.list_checkpoints()
    return {
        **{f"--{name.replace('_', '-')}": value for name, value in asked.items()},
        "--resume": plan.config.resume,
        "--overwrite": plan.config.overwrite,
        **{f"the version of {name}": version for name, version in versions().items() if name in _DECIDING},
        "the newest checkpoint": found[-1].name if found else "none",
        **{f"what the plan found ({name})": value for name, value in resolved.items()},
    }


def main_first(council: Council, work: Callable[[], Result]) -> Result:
    """What some work gives: the main process does it first and downloads, the others find it in the cache.

    Raises:
        ProcessError: another process could not do it.
    """
    for turn in (True, False):
        with council.sharing_faults():
            if council.is_main is turn:
                result = work()
    return result


@contextmanager
def lost_processes_explained(run: RunFolder | None = None) -> Iterator[None]:
    """Turns what the libraries say of a process that has ended into words that help.

    Args:
        run: that trains, if it has come so far.

    Raises:
        ProcessError: in place of theirs.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        found = run.list_checkpoints() if run else []
        left = f"The last whole checkpoint is {found[-1]}" if found else "There is no checkpoint yet"
        raise ProcessError(
            f"another process of this run has ended or does not answer. {left}; mend what ended it (see its own messages), and "
            f"start all processes again{' with --resume' if found else ''}. The connection said: {str(error).splitlines()[0]}"
        ) from error


def start_tracker(accelerator: Accelerator, config: RunConfig, folder: Path) -> None:
    """Tells the tracker, where there is one, what was asked of the run, and in which folder it may write."""
    if config.tracker:
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.log_with = filter_trackers(config.tracker, str(folder))
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
        "git": git_state(),
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
