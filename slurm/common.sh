#!/usr/bin/env bash
# The job itself, which the scripts for sbatch run on the first node of their allocation.
#   common.sh train RECIPE|FILE.yaml [key=value ...]
#   common.sh eval RUN_DIR|MODEL DATA [key=value ...]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

margin=60             # seconds before the time limit at which a job that has not saved ends its ranks, to be requeued

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # for an array, only this task
job=${job:-$SLURM_JOB_ID}
asked=no              # to save and end
trap 'asked=yes' USR1 # by SLURM ahead of the time limit (--signal=B:USR1@…), or by the user
trap ':' TERM         # SLURM signals all processes of the job: the ranks save, and this script waits for them

# Set `first` and `all`: node.sh on the first node and on each node of the job.
step_commands() {
  # set for the allocation; here the single task of a node has all of its GPUs
  unset SLURM_GPUS SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
  local options=(--ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none --quiet) site=() mounts
  if [[ -n ${TRD_CONTAINER_IMAGE:-} ]]; then
    mounts=$TRD_PROJECT:$TRD_PROJECT,$PWD:$PWD${TRD_CONTAINER_MOUNTS:+,$TRD_CONTAINER_MOUNTS}
    options+=(--container-image="$TRD_CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD")
  fi
  read -ra site <<<"${TRD_SRUN_OPTIONS:-}"
  options+=("${site[@]}" bash "$TRD_PROJECT/slurm/node.sh")
  first=(srun --nodes=1 --ntasks=1 "${options[@]}")
  all=(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" "${options[@]}")
}

ranks_per_node() {
  local gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
  gpus=${TRD_RANKS_PER_NODE:-${gpus##*:}}
  [[ $gpus =~ ^[1-9][0-9]*$ ]] ||
    fail "no GPUs in this allocation: submit with --gpus-per-node=N, or set TRD_RANKS_PER_NODE in slurm/site.env"
  echo "$gpus"
}

head_address() { # of the first node, reachable from the others
  local hosts node address
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  node=$(scontrol show node "${hosts[0]}" --oneliner)
  [[ $node =~ \ NodeAddr=([^ ]+) ]] && address=${BASH_REMATCH[1]}
  getent ahosts "${address:=${hosts[0]}}" >/dev/null ||
    fail "the address '$address' of the first node, ${hosts[0]}, is not known here: set TRD_HEAD_ADDRESS in slurm/site.env"
  echo "$address"
}

job_line() { # what SLURM knows about this job
  scontrol show job "$job" --oneliner
}

seconds_left() { # until the time limit; nothing without one
  local end
  [[ $(job_line) =~ \ EndTime=([^ ]+) ]] && end=$(date -d "${BASH_REMATCH[1]}" +%s 2>/dev/null) || return 0
  echo $((end - $(date +%s)))
}

# Whether each node has begun to start its ranks, so that the request to save and end does not kill it.
all_started() {
  local started
  mapfile -t started < <(compgen -G "$TRD_LOGS/*/worker.started")
  ((${#started[@]} == SLURM_JOB_NUM_NODES))
}

# Wait for the ranks, whose srun is process $1, and forward requests to this script meanwhile.
wait_for_ranks() {
  local left
  while kill -0 "$1" 2>/dev/null; do
    if [[ $asked == yes ]]; then
      # repeated, because ranks that are starting do not handle it yet
      ! all_started || scancel --signal=USR1 "$job" || true
      left=$(seconds_left)
      if [[ -n $left ]] && ((left < margin)); then
        echo "common.sh: the step under way did not end in time; submit with an earlier --signal=B:USR1@SECONDS" >&2
        kill "$1"
        asked=told
      fi
    fi
    sleep 2 &
    wait $! || true # a signal ends the wait
  done
  wait "$1"
}

# Export the ids of this user's unfinished jobs, for ranks without squeue, as in a container (training/run_lock.py);
# nothing if SLURM does not answer.
export_active_jobs() {
  local jobs unfinished=pending,running,suspended,completing,configuring,stopped
  unset TRD_ACTIVE_JOBS # may come from a job that submitted this one
  jobs=$(squeue --user="$(id -un)" --noheader --format=%A --states="$unfinished") || return 0
  export TRD_ACTIVE_JOBS=${jobs//$'\n'/ }
}

train() {
  (($# >= 1)) || fail "usage: sbatch slurm/train.sh RECIPE|FILE.yaml [key=value ...]"
  local recipe=$1 overrides=("${@:2}") points doctor status=0 line verdict
  if [[ -n ${TRD_POINTS:-} ]]; then # a sweep: this task's line of the file
    mapfile -t points <"$TRD_POINTS"
    IFS=$'\t' read -ra points <<<"${points[SLURM_ARRAY_TASK_ID]}"
    overrides+=("${points[@]}")
  fi
  TRD_LOGS=$("${first[@]}" once megatron_trd.training.slurm_job begin \
    --ranks=$((SLURM_JOB_NUM_NODES * TRD_RANKS_PER_NODE)) "$recipe" "${overrides[@]}") || exit
  export TRD_LOGS
  if [[ ${TRD_DOCTOR:-} != skip ]]; then
    read -ra doctor <<<"${TRD_DOCTOR_OPTIONS:-}"
    "${all[@]}" ranks megatron_trd.cli doctor --quick "${doctor[@]}" "$recipe" "${overrides[@]}" ||
      fail "these nodes cannot run the job, see above and $TRD_LOGS"
  fi
  "${all[@]}" ranks megatron_trd.training.worker "$recipe" "${overrides[@]}" --resume &
  wait_for_ranks $! || status=$?
  until line=$(job_line); do sleep 5; done # slurmctld may be restarting, and only it can requeue the job
  # Cancelled, or pre-empted and requeued by SLURM itself: there is nothing to decide.
  [[ $line == *" JobState=RUNNING "* ]] || exit "$status"
  verdict=$("${first[@]}" once megatron_trd.training.slurm_job end --logs="$TRD_LOGS" --status="$status" \
    --restarts="${TRD_MAX_RESTARTS:-3}" "$recipe" "${overrides[@]}") || exit
  [[ $verdict == requeue ]] || exit "$verdict"
  scontrol requeue "$job" || fail "job $job cannot be requeued: submit it again, it goes on from its newest checkpoint"
}

evaluate() {
  (($# >= 2)) || fail "usage: sbatch slurm/eval.sh RUN_DIR|MODEL DATA [key=value ...]"
  local model=$1 data=$2 steps
  if [[ -d $model/checkpoints ]]; then # a run folder: its newest checkpoint
    mapfile -t steps < <(printf '%s\n' "$model"/checkpoints/step_*[0-9] | sort -V)
    model=${steps[-1]}
  fi
  "${first[@]}" once megatron_trd.cli eval --model "$model" --data "$data" "world_size=$TRD_RANKS_PER_NODE" "${@:3}"
}

need srun
load_site
check_ranks
export TRD_PROJECT=${TRD_PROJECT:-$project}
TRD_RANKS_PER_NODE=$(ranks_per_node) || exit
TRD_HEAD_ADDRESS=${TRD_HEAD_ADDRESS:-$(head_address)} || exit
TRD_HEAD_PORT=${TRD_HEAD_PORT:-$((10000 + SLURM_JOB_ID % 10000))}
step_commands
export_active_jobs
export TRD_RANKS_PER_NODE TRD_HEAD_ADDRESS TRD_HEAD_PORT
case ${1:-} in
  train) train "${@:2}" ;;
  eval) evaluate "${@:2}" ;;
  *) fail "usage: common.sh train|eval ..." ;;
esac
