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
