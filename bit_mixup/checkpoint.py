"""What must be kept so that an interrupted run goes on to the same bits?

The parameters, SGD's momentum, the fp16 loss scale, and one whole number: the step. All randomness is a function of seed,
step and position, so nothing else exists. Safetensors and JSON, no pickles; a checkpoint is complete or absent.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bit_mixup.errors import CheckpointError
from bit_mixup.runs import RunFolder
from bit_mixup.storage import read_json, remove_folder, whole_folder, write_json

_MODEL, _MOMENTUM, _STATE = "model.safetensors", "momentum.safetensors", "state.json"


def save_checkpoint(
    run: RunFolder,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    scaler: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Writes the state after `step` optimizer steps, then removes all but the newest `keep` checkpoints.

    Args:
        run: whose checkpoint it is.
        step: optimizer steps done.
        model: not wrapped.
        optimizer: SGD over the model's parameters.
        scaler: state of the fp16 loss scale, numbers only.
        keep: how many checkpoints stay, at least 1.

    Raises:
        CheckpointError: it can not be written; those from before are whole.
    """
    if not run.path.is_dir():
        raise CheckpointError(
            f"{run.path} is gone, with all checkpoints: somebody has removed the run's folder, or its disk. Training has stopped "
            f"at step {step}. Bring it back and go on with --resume, or start anew."
        )
    target = run.checkpoint(step)
    momentum = {
        name: optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in model.named_parameters()
        if optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
    }
    with whole_folder(target) as part:
        safetensors.torch.save_file(_on_cpu(model.state_dict()), part / _MODEL)
        safetensors.torch.save_file(_on_cpu(momentum), part / _MOMENTUM)
        write_json(part / _STATE, {"step": step, "scaler": dict(scaler) if scaler else None})
    for old in run.list_checkpoints()[:-keep]:
        remove_folder(old)
    return target


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def restore_checkpoint(run: RunFolder, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, scaler: Any = None) -> int:
    """Loads the newest checkpoint of a run, if there is one, into model, optimizer and scaler.

    Returns:
        Optimizer steps done; 0 if there is no checkpoint.

    Raises:
        CheckpointError: it can not be read or does not fit the model.
    """
    found = run.list_checkpoints()
    if not found:
        return 0
    newest = found[-1]
    state = read_json(newest / _STATE)
    try:
        model.load_state_dict(safetensors.torch.load_file(newest / _MODEL))
        momentum = safetensors.torch.load_file(newest / _MOMENTUM)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {newest} can not be read: {error}. Remove it to go on from the one before.") from error
    for name, parameter in model.named_parameters():
        if name in momentum:
            buffer = torch.empty_like(parameter).copy_(momentum[name])  # in the parameter's memory layout
            optimizer.state[parameter]["momentum_buffer"] = buffer.detach()
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def digest_weights(model: torch.nn.Module) -> str:
    """A hash of all parameters and buffers of a model, by name."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
