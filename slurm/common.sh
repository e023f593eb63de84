# shellcheck shell=bash
# What the batch scripts share: where logs go, how ranks are started and listened to, what happens when they have ended.
# Sourced by each script after its block of settings; the functions are called in the order in which they stand here.
#
# Read from the environment, all optional and set by `megalm launch slurm`:
#   MEGALM_SLURM      the folder with these scripts (default: slurm/ where the job was submitted)
#   MEGALM_LOGS       the folder for the logs (default: logs/JOB_ID where the job was submitted)
#   MEGALM_JOB        the folder with job.json, the record of a chain of jobs
#   MEGALM_CONTAINER  a container image; the option needs the pyxis plug-in and is left out otherwise
#   MEGALM_MPI        srun's MPI plug-in, such as pmix, where the ranks are to speak MPI too
#   MEGALM_MOUNTS     what the container sees besides (default: the folder where the job was submitted)

logs="${MEGALM_LOGS:-$SLURM_SUBMIT_DIR/logs/$SLURM_JOB_ID}"
mkdir -p "$logs"
# shellcheck source=slurm/env.sh
source "${MEGALM_SLURM:-$SLURM_SUBMIT_DIR/slurm}/env.sh"

usage() { # TEXT; ends the job with status 2, the user's mistake, which is never requeued
    echo "usage: $1" >&2
    exit 2
}

# begin_run RECIPE [key=value ...]; notes how far the run is, so that a job without progress is told from one with.
begin_run() {
    python -m megalm.launch.requeue begin --logs "$logs" -- "$@"
}

# What each task runs: the command, then one line in its log that says how it ended. A rank that has saved and stopped
# (75) ends with 0, or --kill-on-bad-exit would kill its peers while they still close their files. Slurm's signals go
# to this shell as well as to the command; it waits for the command, whose business they are.
# shellcheck disable=SC2016
rank='
trap "signal=SIGTERM" TERM
trap "signal=SIGUSR1" USR1
"$@"
status=$?
end="rank $SLURM_PROCID on ${SLURMD_NODENAME:-$HOSTNAME} ended with status $status${signal:+ after $signal}"
printf "%s at %(%Y-%m-%dT%H:%M:%S%z)T\n" "$end" -1
((status != 75)) || status=0
exit $status'

# run_ranks COMMAND...; one task a GPU, each a rank with a log of its own; leaves srun's exit status in $status.
# The tasks find each other through the SLURM_* variables; torchrun in between would leave orphans behind when the job
# is signalled. Since 22.05 srun does not take --cpus-per-task over from the job.
run_ranks() {
    local container=() srun signalled=1
    [[ -z ${MEGALM_CONTAINER:-} ]] || container=(--container-image="$MEGALM_CONTAINER" --container-workdir="$PWD"
        --container-mounts="${MEGALM_MOUNTS:-$PWD:$PWD}")
    echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, logs in $logs"
    srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 --open-mode=append \
        --output="$logs/rank-%t.log" ${MEGALM_MPI:+--mpi="$MEGALM_MPI"} "${container[@]}" bash -c "$rank" rank "$@" &
    srun=$!
    # The ranks must be asked by USR1: at SIGTERM srun would kill them instead of passing it on.
    trap 'signalled=1; kill -USR1 "$srun" 2>/dev/null || true' TERM USR1
    while ((signalled)); do # a signal ends `wait` early; the next one gives srun's status even if it has ended since
        signalled=0
        wait "$srun" && status=0 || status=$?
    done
}

# end_run: done, requeue, leave it to the next job of the chain, or stop and say why; the rules are in
# megalm/launch/requeue.py. Without a begin_run the job has nothing to resume from and is repeated only if pre-empted.
end_run() {
    trap '' TERM USR1 # inherited: no late signal may end the decision
    exec python -m megalm.launch.requeue end --logs "$logs" --job "$SLURM_JOB_ID" --status "$status" \
        --record "${MEGALM_JOB:-}"
}
