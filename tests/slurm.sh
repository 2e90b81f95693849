#!/usr/bin/env bash
# A Slurm of one node for a test: fetched, started and torn down in one folder, without installing anything.
#
#   tests/slurm.sh up FOLDER      unpacks Debian's slurm-wlm and munge there, starts munged, slurmctld and slurmd
#   tests/slurm.sh down FOLDER    kills the jobs, ends the three and waits until they are gone
#
# It disturbs nothing: the packages are unpacked, not installed, so no service is registered or started; the munge key,
# the configuration, the sockets, the state and the logs lie in FOLDER; the ports are free high ones on loopback;
# processes are tracked through /proc, and cgroups are off. `. FOLDER/env` puts its commands on PATH.
# Exit codes: 0 done; 77 where this machine can't run it, with the reason in the last line; 2 bad usage.
set -euo pipefail

usage() {
  echo "slurm.sh: got '$*'; wanted: slurm.sh up FOLDER, or slurm.sh down FOLDER" >&2
  exit 2
}

unable() {
  echo "no Slurm here: $1"
  exit 77
}

[ $# -eq 2 ] || usage "$@"
mkdir -p "$2"
folder=$(cd "$2" && pwd)

down() {
  local name pid
  # First what runs: a job outlives the daemons.
  if [ -f "$folder/slurmctld.pid" ]; then
    # shellcheck source=/dev/null
    (. "$folder/env" && scancel --quiet --full --signal=KILL --state=RUNNING --user "$(id -un)" &&
      scancel --quiet --user "$(id -un)" &&
      for _ in $(seq 100); do
        [ -n "$(squeue --noheader)" ] || break
        sleep 0.2
      done) >>"$folder/down.log" 2>&1 || true
  fi
  for name in slurmd slurmctld munged; do
    pid=$(cat "$folder/$name.pid" 2>/dev/null) || continue
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 100); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
  done
}

fetch() {
  local packages
  command -v apt-get >/dev/null || unable "no apt-get; the packages are Debian's"
  mkdir -p "$folder/packages" "$folder/root"
  # What slurm-wlm would install here, by name: what is there already is not fetched again.
  packages=$(apt-get --simulate --no-install-recommends install slurm-wlm munge 2>/dev/null | awk '/^Inst/ {print $2}') || true
  if [ -z "$packages" ]; then
    command -v slurmctld >/dev/null || unable "apt-get knows no package slurm-wlm (apt-get update may help)"
    packages="slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libmunge2"
  fi
  # shellcheck disable=SC2086 # one word a package
  (cd "$folder/packages" && apt-get --quiet download $packages) >"$folder/fetch.log" 2>&1 ||
    unable "the packages can't be fetched ($(tail -n 1 "$folder/fetch.log"))"
  for package in "$folder"/packages/*.deb; do
    dpkg -x "$package" "$folder/root"
  done
  # Debian chooses between variants by links that only an installation makes.
  for name in slurmctld slurmd slurmstepd; do
    ln -sf "$name-wlm" "$folder/root/usr/sbin/$name"
  done
}

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

configure() {
  local host user plugins
  host=$(hostname -s) user=$(id -un)
  plugins=$(dirname "$(find "$folder/root/usr/lib" -name libslurmfull.so)")
  mkdir -p "$folder/state" "$folder/spool"
  cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
PluginDir=$plugins
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ReturnToService=2
JobRequeue=1
KillWait=30
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
  cat >"$folder/env" <<ENV
export SLURM_CONF="$folder/slurm.conf"
export PATH="$folder/root/usr/bin:$folder/root/usr/sbin:\$PATH"
export LD_LIBRARY_PATH="$plugins:$(dirname "$plugins")\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
ENV
  (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
}

start() {
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" >>"$folder/start.log" 2>&1 ||
    unable "munged does not start ($(tail -n 1 "$folder/start.log"))"
  slurmctld -c >>"$folder/start.log" 2>&1 || unable "slurmctld does not start ($(tail -n 1 "$folder/start.log"))"
  slurmd -c -d "$folder/root/usr/sbin/slurmstepd" >>"$folder/start.log" 2>&1 ||
    unable "slurmd does not start ($(tail -n 1 "$folder/slurmd.log" 2>/dev/null || tail -n 1 "$folder/start.log"))"
  for _ in $(seq 100); do
    if [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ]; then
      return
    fi
    sleep 0.2
  done
  unable "the node is not idle after 20 s ($(tail -n 1 "$folder/slurmd.log"))"
}

case $1 in
up)
  trap '[ $? -eq 0 ] || down' EXIT
  fetch
  configure
  # shellcheck source=/dev/null
  . "$folder/env"
  start
  echo "Slurm $(sinfo --version | cut -d ' ' -f 2) runs in $folder"
  ;;
down) down ;;
*) usage "$@" ;;
esac
