#!/bin/bash
# A batch job as a SLURM array, a share a task. From the checkout, on a disk that all nodes see:
#
#   sbatch deploy/batch/slurm.sh requests.jsonl --bundle bundles/mini --out /scratch/lesions
#   sbatch --array=0-63 --gres=gpu:1 deploy/batch/slurm.sh ...          # options of your site
#   sbatch --array=3,7 deploy/batch/slurm.sh ... --shard slurm/0-15     # two tasks again, of 0-15
#
# Whatever stops a task (preemption, time limit, a lost node, scancel), what it drew is kept, and
# the same command goes on.
#
#SBATCH --job-name=dermaflux-batch
#SBATCH --array=0-15
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=08:00:00
#SBATCH --output=%x-%A_%a.log
# A task that is put back goes on in the same log.
#SBATCH --open-mode=append
# Preempted and lost tasks are put back into the queue by SLURM.
#SBATCH --requeue
# Two minutes before the time limit, SIGTERM to what srun started (with B: it would go to this shell
# alone): the batch under way gets written, and the command ends with 130.
#SBATCH --signal=TERM@120

set -euo pipefail

python=${PYTHON:-.venv/bin/python}
# A task that makes no headway between two limits must not come back for ever.
restarts=${RESTARTS:-50}

status=0
# srun, so that signals reach the command. It does not take over sbatch's --cpus-per-task since 22.05.
# As many threads as CPUs: by itself an engine takes all of the node's, and the last bits of a picture
# depend on how many they are.
cpus=${SLURM_CPUS_PER_TASK:-1}
srun --ntasks=1 --cpus-per-task="$cpus" \
    "$python" -m serving.batch --shard slurm --threads "$cpus" "$@" || status=$?

case $status in
0) echo "share done" ;;
1)
    echo "something failed, see failed.jsonl: submit this task again to try pictures again; lines that" \
        "are bad do not go away by that, mend them in the file first" >&2
    ;;
3) echo "the disk is full: free space, then submit this task again" >&2 ;;
130)
    # SLURM itself puts back what it preempts, but not what reaches the time limit.
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$restarts" ]; then
        echo "interrupted: back into the queue" >&2
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    else
        echo "interrupted $restarts times: give it more --time" >&2
    fi
    ;;
esac
exit "$status"
