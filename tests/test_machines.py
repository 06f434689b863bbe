"""Do the recipes for several machines say what the launchers understand?"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import DistributedType

RECIPES = Path(__file__).parent.parent / "recipes"
CONFIGURATIONS = sorted((RECIPES / "accelerate").glob("*.yaml"))


def test_there_is_a_configuration_for_each_kind_of_machine() -> None:
    assert [path.stem for path in CONFIGURATIONS] == ["cpu", "gpu", "gpus", "nodes"]


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path: Path) -> None:
    config = ClusterConfig.from_yaml_file(str(path))  # refuses keys that it does not know
    assert config.distributed_type == (DistributedType.NO if path.stem in ("cpu", "gpu") else DistributedType.MULTI_GPU)
    assert config.use_cpu is (path.stem == "cpu")
    assert config.mixed_precision == ("no" if path.stem == "cpu" else "bf16")
    assert config.num_machines == (2 if path.stem == "nodes" else 1)
    assert config.num_processes == (1 if path.stem in ("cpu", "gpu") else -1), "how many there are is said with the command"
    first = path.read_text(encoding="utf-8").splitlines()
    assert f"--config_file recipes/accelerate/{path.name}" in "".join(first[:3])


# Stand-ins of SLURM's commands on one machine. The step's processes are those of Python that carry the run's folder.
COMMANDS = {
    "srun": '"$@" &\nPID=$!\ntrap "" USR1\nwait $PID',
    "scontrol": 'if [ "$1" = show ]; then printf "127.0.0.1\\nother\\n"; else echo "scontrol $*"; fi',
    "scancel": 'echo "scancel $*"; pkill -USR1 -f "python.*$RUN --steps"',
}


@pytest.mark.slow
def test_a_slurm_job_is_warned_stops_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    for name, lines in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "run"
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "1", "PROCESSES": "2", "RUN": str(run)}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | slurm | {"PATH": path, "TORCHRUN": str(Path(sys.executable).parent / "torchrun")}
    options = "--dataset digits --model bundled --preset light --resolution model --no-flip --log-every 2 --threads 1".split()
    options += ["--examples-per-class", "4", "--output-dir", str(run), "--steps", "60"]
    command = ["bash", str(RECIPES / "slurm.sh"), *options]
    with (tmp_path / "said").open("w+") as said:
        job = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT, cwd=RECIPES.parent)
        while not (run / "metrics.jsonl").exists() and job.poll() is None:
            time.sleep(0.1)
        job.send_signal(10)  # SIGUSR1, as --signal=B:USR1@120 asks for
        status = job.wait(timeout=120)
        said.seek(0)
        text = said.read()
    assert status == 1, text
    assert text.count("scancel --signal=USR1 77") == text.count("scontrol requeue 77") == 1
    assert text.count("holds it. Go on with --resume.") == 2
    assert not (run / "report.json").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=RECIPES.parent, timeout=200, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "requeue" not in again.stdout
    assert (run / "report.json").exists()
