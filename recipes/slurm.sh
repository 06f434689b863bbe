#!/usr/bin/env bash
# Fine-tunes on several machines of a SLURM cluster: one torchrun on each, which meet at the first one's address.
#
#     sbatch --nodes 2 recipes/slurm.sh --dataset uoft-cs/cifar10 --model resnetv2_50x1_bit.goog_in21k --output-dir /shared/run
#
# The run folder must be on a file system that all machines see. Two minutes before the time limit SLURM warns: all processes stop
# at the end of their step with a checkpoint, and the job is queued again and goes on from there.
#SBATCH --job-name=bit_mixup
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

TORCHRUN="${TORCHRUN:-torchrun}"              # such as .venv/bin/torchrun
RECIPE="${RECIPE:-recipes/fine_tune.py}"
PROCESSES="${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}" # on each machine
read -r FIRST < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
PORT="$((20000 + SLURM_JOB_ID % 20000))"

WARNED=""
warn() {
    WARNED=1
    trap "" USR1 # once will do
    scancel --signal=USR1 "$SLURM_JOB_ID" # to all processes of the step; B: above has told this script alone
}
trap warn USR1

# torchrun itself would end at the warning, and its workers with it: it ignores it, while each worker has a handler of its own.
srun bash -c 'trap "" USR1; exec "$@"' - \
    "$TORCHRUN" --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$PROCESSES" \
    --rdzv-backend c10d --rdzv-endpoint "$FIRST:$PORT" --rdzv-id "$SLURM_JOB_ID" \
    "$RECIPE" --resume "$@" &
STATUS=0
wait $! || STATUS=$?
if [[ -n "$WARNED" ]]; then # the first wait has ended with the warning, not with the run
    STATUS=0
    wait $! || STATUS=$?
    if [[ "$STATUS" -ne 0 ]]; then
        echo "stopped before the time limit; queued again to go on with --resume"
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$STATUS"
