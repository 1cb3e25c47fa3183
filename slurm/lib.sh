# shellcheck shell=bash
# What the scripts of this folder share. To be sourced.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() { # one line, and the exit code of bad input
  echo "$(basename "$0"): $1" >&2
  exit 2
}

need() {
  command -v "$1" >/dev/null || fail "$1 not found: this needs SLURM's commands; 'megatron-trd train' runs without them"
}

# Export every KEY=value of the site file that the environment does not have already.
load_site() {
  local file=${TRD_SITE:-$project/slurm/site.env} line number=0
  if [[ ! -f $file ]]; then
    [[ -z ${TRD_SITE:-} ]] || fail "TRD_SITE=$TRD_SITE: no such file; slurm/site.example.env shows what it may hold"
    return
  fi
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    [[ $line =~ ^([A-Z_][A-Z0-9_]*)=(.*)$ ]] || fail "$file line $number: expected KEY=value, found '$line'"
    [[ -v ${BASH_REMATCH[1]} ]] || export "${BASH_REMATCH[1]}=${BASH_REMATCH[2]}"
  done <"$file"
}

# Stop with one line unless the ranks of a node, where they are given, are a number.
check_ranks() {
  [[ ${TRD_RANKS_PER_NODE:-1} =~ ^[1-9][0-9]*$ ]] || fail "TRD_RANKS_PER_NODE=$TRD_RANKS_PER_NODE: expected a number"
}

recipes() { # that have a job script
  sed -n 's/^exec .* train \([^ ]*\) .*/\1/p' "$project"/slurm/*.sh | xargs
}

# Take `[sbatch options] RECIPE [key=value ...]` apart into `options`, `recipe`, `script` and `overrides`.
split_arguments() {
  options=()
  while [[ ${1:-} == -* ]]; do
    options+=("$1")
    shift
  done
  recipe=${1:-}
  [[ -n $recipe ]] || fail "usage: $(basename "$0") [sbatch options] RECIPE [key=value ...]; recipes: $(recipes)"
  script=$project/slurm/$recipe.sh
  grep -qs " train $recipe " "$script" ||
    fail "no job script for recipe '$recipe': $(recipes)"
  overrides=("${@:2}")
}

# What can be known before nodes are taken: stop with one line if the job of `recipe` with `overrides` cannot start.
check_here() {
  local option nodes gpus ranks=()
  local python=${TRD_VENV:-$project/.venv}/bin/python
  check_ranks
  if [[ -n ${TRD_CONTAINER_IMAGE:-} || ! -x $python ]]; then # the job checks the same once it has its nodes
    echo "$(basename "$0"): not checked here: $python cannot be run or is not what the job uses" >&2
    return
  fi
  nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$script")
  gpus=$(sed -n 's/^#SBATCH --gpus-per-node=//p' "$script")
  for option in "${options[@]}"; do
    case $option in
      --nodes=*) nodes=${option#*=} ;;
      --gpus-per-node=*) gpus=${option##*[=:]} ;;
      -N* | -G* | --gpus* | --gres*) nodes='' ;; # how many ranks there will be is SLURM's to say
    esac
  done
  gpus=${TRD_RANKS_PER_NODE:-$gpus}
  [[ ! $nodes =~ ^[0-9]+$ ]] || ranks=(--ranks="$((nodes * gpus))")
  PYTHONPATH=$project "$python" -m megatron_trd.cli check "$recipe" "${overrides[@]}" "${ranks[@]}" --resume >&2 || exit
}
