"""What do the launcher and the machine say, before torch is asked?

`accelerate launch` and torchrun speak through environment variables. Whatever of them would change a run is read here, shown in
the plan, and refused where it contradicts what was asked.
"""

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from bit_mixup.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
MemoryFormat = Literal["channels_last", "contiguous"]
_PRECISIONS: dict[str, Precision] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
_PACKAGES = (
    "bit_mixup",
    "torch",
    "timm",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "torchmetrics",
    "pillow",
    "numpy",
)
CPU_INFO = Path("/proc/cpuinfo")  # of Linux
_CPU_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 twice, and ARM: flags of processors that compute in bf16
_TRUE = {"1", "true", "yes", "on", "y", "t"}


@dataclass(frozen=True, kw_only=True)
class Speedups:
    """How steps are computed. All of it changes time, and of the result nothing but rounding.

    Args:
        memory_format: how pictures and filters lie in memory.
        quick_layers: whether weight standardisation and group normalisation are computed by `bit_mixup.layers`, or as timm does.
        fused_norms: whether on a GPU group normalisation and ReLU are one kernel; with quick layers alone.
        keep_filters: whether filters are standardised once a step, or in each of its backward passes; with quick layers alone.
        fused_optimizer: whether a step of SGD is one operation.
    """

    memory_format: MemoryFormat = "channels_last"
    quick_layers: bool = True
    fused_norms: bool = True
    keep_filters: bool = True
    fused_optimizer: bool = True

    def as_text(self) -> str:
        """For a plan."""
        chosen = [
            self.memory_format.replace("_", " "),
            "quick layers" if self.quick_layers else "timm's layers",
            *(["on a GPU normalisation fused with ReLU"] if self.fused_norms and self.quick_layers else []),
            "filters standardised " + ("once a step" if self.keep_filters and self.quick_layers else "in each pass"),
            "fused SGD" if self.fused_optimizer else "plain SGD",
        ]
        return f"{', '.join(chosen)}: this changes time, and rounding"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a run finds around itself.

    Args:
        num_processes: that share the run.
        precision: of the forward and backward pass.
        precision_from: who decided it, or why.
        scoring_precision: of forward passes that give scores: fp32, unless half precision was asked for by name.
        threads: of torch in each process, for work on the CPU.
        notes: what the launcher has set and how it is met.
        local_processes: that share this machine.
    """

    num_processes: int
    precision: Precision
    precision_from: str
    scoring_precision: Precision
    threads: int
    notes: tuple[str, ...]
    local_processes: int = 1


def read_environment(
    *, precision: Precision | None, threads: int | None, variables: Mapping[str, str] | None = None
) -> Environment:
    """Reads the launcher's variables.

    Args:
        precision: as asked; None leaves it to Accelerate's configuration, and where that says "no" (as `accelerate launch` does
            when nobody has configured it) to the hardware.
        threads: as asked; None gives each process an equal share of the cores that this process may use. What
            OMP_NUM_THREADS says is not followed: launchers set it differently, and the number of threads shows in the last bits.
        variables: in place of os.environ.

    Raises:
        ConfigError: something is set that contradicts what was asked, or that would change the result silently.
    """
    variables = os.environ if variables is None else variables
    launched = variables.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in _PRECISIONS:
        raise ConfigError(
            f'the Accelerate configuration sets mixed precision "{launched}"; fp32 ("no"), bf16 and fp16 are supported.'
        )
    by_launcher = _PRECISIONS[launched]
    if precision is not None and launched != "no" and precision != by_launcher:
        raise ConfigError(
            f"--precision {precision} contradicts the Accelerate configuration, which sets {by_launcher}. Change one of the two."
        )
    accumulation = variables.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise ConfigError(
            f"the Accelerate configuration sets gradient accumulation to {accumulation}. Here it follows from the global batch: "
            "remove it there and use --micro-batch."
        )
    backend = variables.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise ConfigError(
            f'the Accelerate configuration compiles with "{backend}", which is not supported. Set dynamo_backend to "no".'
        )
    for name, what in (("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP"), ("MEGATRON_LM", "Megatron-LM")):
        if variables.get(f"ACCELERATE_USE_{name}", "false").lower() in _TRUE:
            raise ConfigError(
                f"the Accelerate configuration uses {what}, which is not supported. Use DDP (distributed_type MULTI_GPU)."
            )
    try:
        num_processes = int(variables.get("WORLD_SIZE", "1"))
        local = int(variables.get("LOCAL_WORLD_SIZE", str(num_processes)))
    except ValueError as error:
        raise ConfigError(f"WORLD_SIZE or LOCAL_WORLD_SIZE is not a whole number ({error}). Start with torchrun.") from error
    if not 1 <= local <= num_processes:
        raise ConfigError(
            f"WORLD_SIZE is {num_processes} and LOCAL_WORLD_SIZE {local}: expected 1 <= local <= all. Start with torchrun."
        )
    unset = [name for name in ("RANK", "MASTER_ADDR") if name not in variables]
    if num_processes > 1 and unset:
        raise ConfigError(
            f"WORLD_SIZE is {num_processes}, but {' and '.join(unset)} are not set. Start with torchrun or accelerate launch, "
            "which set all of them, or unset it."
        )
    notes = []
    if "ACCELERATE_MIXED_PRECISION" in variables:
        notes.append("started by accelerate launch; even_batches and split_batches do not apply, as batches are cut by position")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; it must be at least 1.")
    asked = precision or (by_launcher if launched != "no" else None)
    found, why = hardware_precision()
    return Environment(
        num_processes=num_processes,
        precision=asked or found,
        precision_from="asked" if precision else "Accelerate configuration" if asked else why,
        scoring_precision=asked or "fp32",
        threads=threads or max(1, available_cores() // local),
        notes=tuple(notes),
        local_processes=local,
    )


def hardware_precision() -> tuple[Precision, str]:
    """bf16 where the hardware computes in it, else fp32; and why.

    Torch is asked where it is loaded. Without it, as in a plan, of an accelerator only its presence is known.
    """
    if torch := sys.modules.get("torch"):
        if torch.accelerator.is_available():
            here = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            return ("bf16", "the GPU computes in it") if here else ("fp32", "the accelerator does not compute in bf16")
    elif any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return "bf16", "if the GPU computes in it, else fp32"
    if _CPU_BF16 & _cpu_flags():
        return "bf16", "this processor computes in it"
    return "fp32", "this processor does not compute in bf16"


def _cpu_flags() -> set[str]:
    """What the processor can do, as Linux says; nothing elsewhere."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":", 1)[1].split()}


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def feature_folder() -> Path:
    """Where the features of linear probes are kept: bit_mixup/features in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "bit_mixup" / "features"


def versions() -> dict[str, str]:
    """Of Python and of the libraries that have a say in the result; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
