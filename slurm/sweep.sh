#!/usr/bin/env bash
# Submit a job array with one run for every combination of values, each in a run folder of its own:
#   slurm/sweep.sh [sbatch options] RECIPE|FILE.yaml [key=value,value,... ...]
#   slurm/sweep.sh opsd_qwen3_8b method=trd-opsd,opsd-forward-kl seed=0,1,2
# run_dir=DIR holds the run folders; the default is runs/sweeps/RECIPE-DATE-TIME. TRD_AT_ONCE=N runs at most N of them
# at a time: 1 makes a chain.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Each of `points` has one run's overrides, separated by tabs; each of `names` has those that distinguish the run.
points=('') names=('')

multiply() { # KEY VALUE...: every point so far with every value
  local key=$1 value i new_points=() new_names=()
  for i in "${!points[@]}"; do
    for value in "${@:2}"; do
      new_points+=("${points[i]}$key=$value"$'\t')
      new_names+=("${names[i]}$([[ $# == 2 ]] || printf '%s' "${names[i]:+,}$key=${value//\//-}")")
    done
  done
  points=("${new_points[@]}") names=("${new_names[@]}")
}

load_site
need sbatch
split_arguments "$@"
folder=runs/sweeps/$name-$(date +%Y%m%d-%H%M%S)
for override in "${overrides[@]}"; do
  [[ $override == *=* ]] || fail "'$override': expected key=value,value,..."
  if [[ $override == run_dir=* ]]; then
    folder=${override#*=}
  else
    IFS=, read -ra values <<<"${override#*=}"
    [[ -z $(printf '%s\n' "${values[@]}" | sort | uniq -d) ]] || fail "'$override': a value is there twice"
    multiply "${override%%=*}" "${values[@]:-}"
  fi
done
for i in "${!points[@]}"; do
  points[i]+=run_dir=$folder/${names[i]:-run}
  IFS=$'\t' read -ra overrides <<<"${points[i]}"
  check_here
done
mkdir -p "$folder"
# A task reads its line when it starts, or is requeued: another sweep into this folder must not replace the file.
TRD_POINTS=$(mktemp --suffix=.tsv "$(realpath "$folder")/points-XXXXXX")
export TRD_POINTS
printf '%s\n' "${points[@]}" >"$TRD_POINTS"
exec sbatch --array="0-$((${#points[@]} - 1))${TRD_AT_ONCE:+%$TRD_AT_ONCE}" "${options[@]}" "${script[@]}"
