#!/bin/bash
# @title@, made by slurm/submit.py from slurm/job.sh. Edit that one for your cluster.
# code: @commit@
@directives@

# What goes on in here is for the tasks: they save, and this script must live to see how they ended.
trap : TERM USR1 USR2
cd @directory@ || exit 1

@environment@

# The code as it was when the job was submitted, whatever lies in the folder by now.
code=@code@
export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

# Compiled kernels lie on a disk of each node, for this job alone; when it is requeued it may find them again.
cache=${TMPDIR:-/tmp}/mamba3_train-$SLURM_JOB_ID
export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor

# In one task of an array SLURM_JOB_ID is the array's number and stands for all of them; SLURM_ARRAY_JOB_ID may come
# from the job that submitted this one.
read -r job end <<< "$(squeue --noheader --array --jobs="$SLURM_JOB_ID" --format="%A %i %e" |
    sed -n "s/^$SLURM_JOB_ID //p")"
job=${job:-$SLURM_JOB_ID}
# For tasks that cannot ask Slurm, in a container for example.
[ -z "$end" ] || end=$(date -d "$end" +%s 2>/dev/null)
[ -z "$end" ] || export SLURM_JOB_END_TIME=$end
# Else srun would give its tasks a CPU each.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

logs=@logs@/$job
mkdir -p "$logs"
echo "$(date -Is) start ${SLURM_RESTART_COUNT:-0} of job $job on $SLURM_JOB_NODELIST, logs by rank in $logs"

# A task a GPU. Of tasks that lose one of them, the others have a minute to notice it and to end their logs.
srun --kill-on-bad-exit=0 --wait=60 --open-mode=append --output="$logs/rank-%4t.log" @container@\
    @python@ -m mamba3_train @arguments@
ended=$?

echo "$(date -Is) ended with exit code $ended"
# A job that was cancelled has another state, and is not to come back.
if [ "$ended" -eq @stopped@ ] && [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -lt @requeues@ ]; then
        scontrol requeue "$job" && exit
    else
        echo "requeued @requeues@ times already: submit it again to go on"
    fi
fi
exit "$ended"
