#!/bin/bash
# A worker of a sweep; several as an array, with what python -m mamba3_train.sweep gets behind the file's name:
#     sbatch --array=0-7 --gpus=1 --time=24:00:00 slurm/sweep.sh +recipe=180m_siso sweep=lr
# `python` is the one of the shell that submits. Any other option of sbatch may be given, or written here.
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# What goes on in here is for the sweep: it saves, and this script must live to see how it ended.
trap : TERM USR1 USR2

# Else srun would give its task one CPU.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

srun python -m mamba3_train.sweep "$@"
ended=$?

# In one task of an array SLURM_JOB_ID is the array's number and stands for all of them.
read -r job state <<< "$(squeue --noheader --array --jobs="$SLURM_JOB_ID" --format="%A %i %T" |
    sed -n "s/^$SLURM_JOB_ID //p")"
# Stopped with trials left. A job that was cancelled has another state, and is not to come back.
if [ "$ended" -eq 85 ] && [ "$state" = RUNNING ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$job" && exit
fi
exit "$ended"
