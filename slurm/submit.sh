#!/usr/bin/env bash
# Check a recipe here, then submit its job with the account, partition and other settings of the site file:
#   slurm/submit.sh [sbatch options] RECIPE|FILE.yaml [key=value ...]
# Options of sbatch are written with '=': --nodes=2 --time=4:00:00
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

load_site
need sbatch
split_arguments "$@"
check_here
exec sbatch "${options[@]}" "${script[@]}" "${overrides[@]}"
