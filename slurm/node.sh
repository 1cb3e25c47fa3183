#!/usr/bin/env bash
# Runs a Python module of this project on one node of a job, in the environment that the site file describes.
#   node.sh once MODULE [ARGUMENT ...]     as it is
#   node.sh ranks MODULE [ARGUMENT ...]    as the ranks of this node, started by torchrun
# common.sh runs it with srun, inside the container image if the site has one, and sets TRD_* for it.
set -euo pipefail
trap '' USR1 # the request to save and end is for the ranks; torchrun, and ranks not ready for it, ignore it

environment() {
  local module file
  set +u # Lmod and Environment Modules read unset variables
  for module in ${TRD_MODULES:-}; do
    if ! declare -F module >/dev/null; then
      for file in /etc/profile.d/lmod.sh /etc/profile.d/modules.sh; do
        # shellcheck source=/dev/null
        [[ ! -f $file ]] || source "$file"
      done
    fi
    module load "$module"
  done
  set -u
  local venv=${TRD_VENV:-}
  if [[ -z ${TRD_CONTAINER_IMAGE:-} ]]; then # an image has its own python, which must come first
    [[ -z $venv || -x $venv/bin/python ]] || {
      echo "node.sh: TRD_VENV=$venv: no bin/python there on $SLURMD_NODENAME; mend it in slurm/site.env" >&2
      exit 2
    }
    venv=${venv:-$TRD_PROJECT/.venv}
  fi
  [[ ! -d $venv/bin ]] || export PATH="$venv/bin:$PATH"
  export PYTHONPATH="$TRD_PROJECT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  command -v python >/dev/null || {
    echo "node.sh: no python on $SLURMD_NODENAME: set TRD_VENV, TRD_MODULES or TRD_CONTAINER_IMAGE in slurm/site.env" >&2
    exit 2
  }
}

# Node ranks come from SLURM, and rank 0 is on the first node, whose address the job knows: no rendezvous is needed.
ranks() {
  local logs=$TRD_LOGS/$SLURMD_NODENAME streams i
  mkdir -p "$logs"
  : >"$logs/${1##*.}.started" # from here on a request to end is handled or pending; before, it would kill this script
  streams=0:$((SLURM_NODEID == 0 ? 2 : 3)) # rank 0 prints to the job's output; the rest goes to files
  for ((i = 1; i < TRD_RANKS_PER_NODE; i++)); do
    streams+=,$i:3
  done
  # When asked to end, torchrun gives the ranks as much time to save as SLURM gives the job.
  exec python -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$TRD_RANKS_PER_NODE" \
    --master-addr="$TRD_HEAD_ADDRESS" --master-port="$TRD_HEAD_PORT" --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts=0 --shutdown-timeout=86400 --event-log-handler=console \
    --log-dir="$logs" --redirects="$streams" -m "$@" 2>>"$logs/torchrun.log"
}

ulimit -Sn "$(ulimit -Hn)" || true # the default of a job is often 1,024, too few for three nodes of 8 ranks
environment
case $1 in
  once) exec python -m "${@:2}" ;;
  ranks) ranks "${@:2}" ;;
esac
