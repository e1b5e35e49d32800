#!/usr/bin/env bash
# A throw-away SLURM of one node on this machine, from Debian's packages, with a pretended GPU, for the tests.
#
#   apt-get install -y --no-install-recommends slurm-wlm munge
#   tests/slurm_up.sh up DIR      configuration, state and logs in DIR; links in /etc/slurm (needs root)
#   tests/slurm_up.sh down DIR
#
# No accounting database: jobs are watched with squeue (see docs/full-study.md).
set -euo pipefail
verb=${1:?up or down}
dir=$(mkdir -p "${2:?a folder}" && cd "$2" && pwd)

case "$verb" in
  up)
    host=$(hostname -s)
    memory=$(slurmd -C | grep -o 'RealMemory=[0-9]*' | cut -d= -f2)
    mkdir -p "$dir"/state "$dir"/spool /etc/slurm
    cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MinJobAge=3600
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$((memory - 1000)) Gres=gpu:1 State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    echo "Name=gpu File=/dev/null" >"$dir/gres.conf"
    ln -sf "$dir/slurm.conf" "$dir/gres.conf" /etc/slurm/
    mkdir -p /run/munge && chown munge: /run/munge
    pgrep -x munged >/dev/null || runuser -u munge -- munged
    slurmctld -f "$dir/slurm.conf"
    slurmd -f "$dir/slurm.conf"
    for _ in $(seq 100); do sinfo -h -o %T 2>/dev/null | grep -q idle && exit 0; sleep 0.2; done
    echo "slurm_up.sh: no idle node after 20 s; see $dir/*.log" >&2
    exit 1
    ;;
  down)
    scontrol shutdown || true
    for _ in $(seq 50); do pgrep -x slurmctld >/dev/null || pgrep -x slurmd >/dev/null || break; sleep 0.2; done
    runuser -u munge -- munged --stop || true
    rm -f /etc/slurm/slurm.conf /etc/slurm/gres.conf
    ;;
  *) echo "slurm_up.sh: up or down, not '$verb'" >&2; exit 2 ;;
esac
