# shellcheck shell=bash
# Functions shared by the scripts in this folder. To be sourced.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() { # one line, and the exit code of bad input
  echo "$(basename "$0"): $1" >&2
  exit 2
}

need() {
  command -v "$1" >/dev/null || fail "$1 not found: this needs SLURM's commands; 'megatron-trd train' runs without them"
}

# Export every KEY=value of the site file that is not in the environment already.
load_site() {
  local file=${TRD_SITE:-$project/slurm/site.env} line number=0
  if [[ ! -f $file ]]; then
    [[ -z ${TRD_SITE:-} ]] || fail "TRD_SITE=$TRD_SITE: no such file; slurm/site.example.env shows what it may hold"
    return
  fi
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] || fail "$file line $number: expected KEY=value, found '$line'"
    [[ -v ${BASH_REMATCH[1]} ]] || export "${BASH_REMATCH[1]}=${BASH_REMATCH[2]}"
  done <"$file"
}

# Stop with one line if the number of ranks per node is set and is not a number.
check_ranks() {
  [[ ${TRD_RANKS_PER_NODE:-1} =~ ^[1-9][0-9]*$ ]] || fail "TRD_RANKS_PER_NODE=$TRD_RANKS_PER_NODE: expected a number"
}

recipes() {
  basename --multiple --suffix=.py "$project"/recipes/[!_]*.py | grep -vx common | xargs
}

# Split `[sbatch options] RECIPE|FILE.yaml [key=value ...]` into `options`, `recipe`, its short `name`, `script` (with
# its first arguments) and `overrides`.
split_arguments() {
  options=()
  while [[ ${1:-} == -* ]]; do
    options+=("$1")
    shift
  done
  recipe=${1:-}
  [[ -n $recipe ]] ||
    fail "usage: $(basename "$0") [sbatch options] RECIPE|FILE.yaml [key=value ...]; recipes: $(recipes)"
  [[ ! $recipe =~ ^[0-9:-]+$ ]] ||
    fail "recipe '$recipe': an option of sbatch and its value are one word here, as in --nodes=2"
  name=$(basename "${recipe%.*}")
  script=("$project/slurm/$recipe.sh")
  if ! grep -qs " train $recipe " "${script[0]}"; then # it has no script of its own
    script=("$project/slurm/train.sh" "$recipe")
    options=(--job-name="${SBATCH_JOB_NAME:-$name}" "${options[@]}")
  fi
  overrides=("${@:2}")
}

# The number of ranks that the job will have, from `options`, the environment or its script; nothing if SLURM determines
# the number of GPUs.
ranks_of_job() {
  local option nodes gpus counted=yes
  nodes=$(sed -n 's/^#SBATCH --nodes=//p' "${script[0]}")
  gpus=${SBATCH_GPUS_PER_NODE:-$(sed -n 's/^#SBATCH --gpus-per-node=//p' "${script[0]}")}
  [[ -z ${SBATCH_GPUS:-}${SBATCH_GRES:-} ]] || counted=no
  for option in "${options[@]}"; do
    case $option in
      --nodes=*) nodes=${option#*=} ;;
      --gpus-per-node=*) gpus=${option#*=} ;;
      -N* | -G* | --gpus* | --gres*) counted=no ;;
    esac
  done
  gpus=${TRD_RANKS_PER_NODE:-${gpus##*:}}
  [[ $counted == no || ! $nodes =~ ^[0-9]+$ || ! $gpus =~ ^[0-9]+$ ]] || echo $((nodes * gpus))
}

# Checks before nodes are allocated: stop with one line if the job of `recipe` with `overrides` cannot start.
check_here() {
  local ranks python=${TRD_VENV:-$project/.venv}/bin/python
  check_ranks
  [[ -z ${TRD_VENV:-} || -n ${TRD_CONTAINER_IMAGE:-} || -x $python ]] ||
    fail "TRD_VENV=$TRD_VENV: no bin/python there; set it in slurm/site.env to the environment that the jobs are to use"
  if [[ -n ${TRD_CONTAINER_IMAGE:-} || ! -x $python ]]; then # the job makes the same check on its nodes
    echo "$(basename "$0"): not checked here: $python cannot be run or is not what the job uses" >&2
    return
  fi
  ranks=$(ranks_of_job)
  PYTHONPATH=$project "$python" -m megatron_trd.cli check "$recipe" "${overrides[@]}" \
    ${ranks:+--ranks="$ranks"} --resume >&2 || exit
}
