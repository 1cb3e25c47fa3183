#!/usr/bin/env bash
# A throw-away SLURM on one machine, to try and test the job scripts: munged, slurmctld and a few slurmd, as packaged by
# Debian, with all state in one folder. Needs no root, no systemd and no database; starts in about a second.
#
#   eval "$(slurm/dev_cluster.sh up)"    start it, or what is missing of it
#   eval "$(slurm/dev_cluster.sh env)"   talk to the one that is running
#   slurm/dev_cluster.sh down            cancel its jobs, stop it, delete the folder
#
# Exit code 3: a program of SLURM is not installed.
# Every node is this machine under another name (n1, n2, ...) and pretends to have TRD_CLUSTER_GPUS GPUs.
set -euo pipefail

dir=${TRD_CLUSTER_DIR:-${TMPDIR:-/tmp}/trd-cluster-$(id -u)} # short: the path of a unix socket has at most 107 characters
nodes=${TRD_CLUSTER_NODES:-2}
gpus=${TRD_CLUSTER_GPUS:-8}
cpus=64 # per node; far more than exist, so that no test waits for another's

PATH=$PATH:/usr/sbin:/sbin # the daemons' folders, often not in the path of an ordinary user

fail() { # MESSAGE [EXIT CODE]
  echo "dev_cluster.sh: $1" >&2
  exit "${2:-1}"
}

# The first port, followed by one for each node: those of the existing cluster, or else free ones.
choose_port() {
  local i
  if [[ -f $dir/slurm.conf ]]; then
    port=$(sed -n 's/^SlurmctldPort=//p' "$dir/slurm.conf")
    return
  fi
  for ((port = 20000; port < 28000; port += nodes + 1)); do
    for ((i = 0; i <= nodes; i++)); do
      ! (: <"/dev/tcp/127.0.0.1/$((port + i))") 2>/dev/null || continue 2
    done
    return
  done
  fail "no free ports"
}

# The folder's content is run with this user's rights, and anyone may create names in /tmp.
own() {
  [[ ! -e $dir && ! -L $dir ]] || [[ -d $dir && -O $dir && ! -L $dir ]] ||
    fail "'$dir' is not a folder of $(id -un): remove it, or set TRD_CLUSTER_DIR"
}

alive() { # the process of a pid file
  [[ -s $1 ]] && kill -0 "$(<"$1")" 2>/dev/null
}

# Job numbers differ between the clusters of a machine: a job's ranks meet at a port that follows from its number.
configuration() {
  local i host
  host=$(hostname -s)
  cat <<END
ClusterName=trd
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
FirstJobId=$(((port - 20000) * 100 + 1))
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
KillWait=10
MailProg=/bin/true
GresTypes=gpu
END
  for ((i = 1; i <= nodes; i++)); do
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=$cpus RealMemory=64000 Gres=gpu:$gpus"
  done
  echo "PartitionName=debug Nodes=ALL Default=YES"
}

devices() { # files that represent the GPUs: slurmd only checks that they are devices
  local i
  echo "AutoDetect=off"
  for ((i = 0; i < gpus; i++)); do
    ln -sfn /dev/null "$dir/gpu$i"
    echo "Name=gpu Flags=no_gpu_env File=$dir/gpu$i"
  done
}

ready() {
  [[ $(sinfo --noheader --Node --states=idle,alloc,mix --format=%N 2>/dev/null | sort -u | wc -l) == "$nodes" ]]
}

up() {
  local program i
  for program in munged slurmctld slurmd sinfo; do
    command -v "$program" >/dev/null ||
      fail "$program not found: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge" 3
  done
  choose_port
  umask 022
  (umask 077 && mkdir -p "$dir")
  own
  mkdir -p "$dir"/{state,spool,log,munge}
  chmod 700 "$dir/munge"
  [[ -s $dir/munge/key ]] || (umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
  if alive "$dir/slurmctld.pid" && [[ $(configuration) != "$(<"$dir/slurm.conf")" ]]; then
    fail "the cluster of '$dir' runs with other settings: 'slurm/dev_cluster.sh down' first, or set TRD_CLUSTER_DIR"
  fi
  configuration >"$dir/slurm.conf"
  devices >"$dir/gres.conf"
  export SLURM_CONF=$dir/slurm.conf

  alive "$dir/munged.pid" || munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
    --pid-file="$dir/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" >&2
  alive "$dir/slurmctld.pid" || slurmctld >&2
  for ((i = 1; i <= nodes; i++)); do
    mkdir -p "$dir/spool/n$i"
    alive "$dir/slurmd-n$i.pid" || slurmd -N "n$i" >&2
  done
  for ((i = 0; i < 100; i++)); do
    ! ready || break
    sleep 0.1
  done
  ready || fail "the nodes did not come up within 10 s; see $dir/log"
  env_lines
}

env_lines() {
  [[ -f $dir/slurm.conf ]] || fail "no cluster in '$dir': 'slurm/dev_cluster.sh up' first"
  printf 'export SLURM_CONF=%q\n' "$dir/slurm.conf"
}

down() {
  local file i
  [[ -f $dir/slurm.conf ]] || return 0
  export SLURM_CONF=$dir/slurm.conf
  if alive "$dir/slurmctld.pid"; then
    scancel --user="$(id -un)" 2>/dev/null || true
    for ((i = 0; i < 150; i++)); do
      [[ -n $(squeue --noheader 2>/dev/null) ]] || break
      sleep 0.1
    done
  fi
  for file in "$dir"/slurmd-*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
    ! alive "$file" || kill -KILL "$(<"$file")" # on SIGTERM they would take seconds to save what is deleted next
  done
  rm -rf "$dir"
}

own
case ${1:-} in
  up) up ;;
  env) env_lines ;;
  down) down ;;
  *) fail "usage: slurm/dev_cluster.sh up|down|env" 2 ;;
esac
