#!/usr/bin/env bash
# Any recipe, or a run of your own: sbatch slurm/train.sh RECIPE|FILE.yaml [key=value ...]; see docs/slurm.md.
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail
: "${SLURM_JOB_ID:?is not set: start this script with sbatch}"
# sbatch runs a copy of this file; the shared part is where it was submitted from, or in TRD_PROJECT.
read -r script < <(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')
exec bash "${TRD_PROJECT:-${script%/slurm/*}}/slurm/common.sh" train "$@"
