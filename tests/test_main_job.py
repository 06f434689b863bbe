"""Does the README's main job give what the README says?"""

import shlex
import subprocess
from pathlib import Path

import pytest

from bit_mixup.cli import main as command
from bit_mixup.storage import read_json

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_main_job_transfers_to_the_digits(tmp_path: Path) -> None:
    """As `make fine-tune` starts it: about two minutes on one core. The README's figure is from this seed."""
    shown = subprocess.run(["make", "-n", "fine-tune"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in shown.splitlines() if "bit-mixup fine-tune" in line]
    command([*shlex.split(line)[1:], "--output-dir", str(tmp_path / "run")])
    report = read_json(tmp_path / "run" / "report.json")
    assert report["num_examples"] == 797
    assert report["accuracy"] > 0.98
