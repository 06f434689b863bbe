"""What does it take to do a run again?"""

import shlex
import subprocess
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

from bit_mixup.config import DistillConfig, PretrainConfig, RunConfig, TransferConfig
from bit_mixup.environment import versions

_COMMANDS: dict[type[RunConfig], str] = {TransferConfig: "fine-tune", PretrainConfig: "pretrain", DistillConfig: "distill"}
_OF_ONE_START = ("resume", "overwrite")


def command_line(config: RunConfig) -> str:
    """The command that asks for the same: what is not a default, as flags."""
    words = ["bit-mixup", _COMMANDS[type(config)]]
    for field in fields(config):
        value = getattr(config, field.name)
        default = None if field.default is MISSING else field.default
        if value == default or field.name in _OF_ONE_START:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


@cache
def git_state() -> str | None:
    """Commit of the checkout that this package runs from, "-dirty" behind it if files were changed; None where there is none."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of somebody else
        return None


def facts(record: dict[str, Any], seed: int) -> list[tuple[str, str]]:
    """Names and values, for people, of what else has a say in a run's result.

    Args:
        record: of `plan.json`.
        seed: of the run.
    """
    resolved, environment = record["resolved"], record["environment"]
    data, weights = resolved["data"], resolved["weights"]
    found = [
        ("seed", str(seed)),
        ("data", f"{data['name']}{_at(data['revision'])}, fingerprint {data['fingerprint']} (rows and labels, not pixels)"),
        ("weights", f"{weights['name']} ({weights['architecture']}){_at(weights['revision'])}"),
        ("precision", resolved["precision"]),
        ("device", f"{environment['device']}, {environment['processes']} process(es) of {environment['threads']} thread(s)"),
        ("versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())),
    ]
    if environment.get("git"):
        found.append(("git", environment["git"]))
    return found


def present_facts(device: str) -> list[tuple[str, str]]:
    """Names and values, for people, of what has a say in what is computed by this process."""
    found = [("device", device), ("versions", ", ".join(f"{name} {version}" for name, version in versions().items()))]
    return [*found, ("git", state)] if (state := git_state()) else found


def _at(revision: str | None) -> str:
    return f" @ {revision}" if revision else ""
