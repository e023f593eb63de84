#!/usr/bin/env bash
# A real multi-node Slurm cluster on one Debian or Ubuntu machine, for the tests of slurm/ and megalm.launch (root only).
#   local-cluster.sh up [N]      install what is missing, start N nodes (default 2); safe to repeat
#   local-cluster.sh down        stop everything this script started, jobs too; the logs stay
#   local-cluster.sh status      daemons, nodes, queue; exit 0 only if every daemon is alive
#   local-cluster.sh env         print exports:  eval "$(tests/slurm/local-cluster.sh env)" && sinfo
#   local-cluster.sh crash NODE  power-cut a node: slurmd, steps and network vanish; `up` boots it again
#
# Every node is a net+uts+pid+mount namespace on a private bridge: it has its own hostname, IP, eth0, /dev/shm, process
# table, and an /etc/hosts that resolves all nodes. So addresses, port clashes and node death behave as on a real
# cluster, and no --enable-multiple-slurmd is needed. The file system is shared, as with NFS. Nothing is written
# outside $CLUSTER_DIR.
#
# Environment, read when a stopped cluster comes up: CLUSTER_DIR (/tmp/megalm-cluster), CLUSTER_NET (10.213.20: a /24
# for the bridge; clusters of different third numbers live side by side), CLUSTER_GPUS (2 pretended GPUs a node),
# CLUSTER_CPUS (8 pretended CPUs a node), CLUSTER_EXTRA (more slurm.conf lines), CLUSTER_SACCT (1: also MariaDB and
# slurmdbd from local-accounting.sh, so that sacct works).
set -euo pipefail; shopt -s nullglob
DIR=${CLUSTER_DIR:-/tmp/megalm-cluster} NET=${CLUSTER_NET:-10.213.20}
GPUS=${CLUSTER_GPUS:-2} CPUS=${CLUSTER_CPUS:-8} SACCT=${CLUSTER_SACCT:-0}
BRIDGE=mlbr${NET##*.} VETH=ml${NET##*.}n PORT=$((16000 + 2 * ${NET##*.})) SELF=$(readlink -f "$0")
PACKAGES=(munge slurmctld slurmd slurm-client libpmix-dev iproute2)
export SLURM_CONF=$DIR/etc/slurm.conf
die() { echo "local-cluster.sh: $*" >&2; exit 1; }

# --- processes: a pid file holds "pid starttime", so a recycled pid is never taken for ours ------
starttime() { sed -n 's/.*) \([^Z]\)/\1/p' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; } # no zombies
save_pid() { echo "$2 $(starttime "$2")" >"$DIR/run/$1.pid"; } # NAME PID
alive() { # NAME; prints its pid if that very process still runs
    local pid start
    read -r pid start 2>/dev/null <"$DIR/run/$1.pid" || return 1
    [[ -n $start && $(starttime "$pid") == "$start" ]] && echo "$pid"
}
spawn() { # NAME COMMAND...; does not hold our lock (fd 9)
    setsid "${@:2}" </dev/null >>"$DIR/log/$1.out" 2>&1 9>&- &
    save_pid "$1" $!
}
gone() { ! alive "$1"; }
stop() { # NAME SIGNAL; SIGKILL after 5 s
    local pid
    if pid=$(alive "$1"); then kill -"$2" "$pid"; wait_for 5 gone "$1" || kill -KILL "$pid"; fi
    rm -f "$DIR/run/$1.pid"
}
wait_for() { # SECONDS COMMAND...
    local end=$((SECONDS + $1)); shift
    until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || return 1; sleep 0.1; done
}
nodes() { cat "$DIR/run/nodes" 2>/dev/null || echo 0; }
children() { cat "/proc/$1/task/$1/children"; } # PID

install_packages() { # the distribution's own services must not start
    local missing=() p mine='' rc=0
    for p in "${PACKAGES[@]}"; do
        dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
    done
    ((${#missing[@]})) || return 0; echo "installing: ${missing[*]}"
    p=/usr/sbin/policy-rc.d
    [[ -e $p ]] || { printf '#!/bin/sh\nexit 101\n' >$p; chmod +x $p; mine=1; }
    install() {
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}"
    }
    { install || { apt-get update -qq && install; }; } >"$DIR/log/apt.log" 2>&1 9>&- || rc=$?
    [[ -z $mine ]] || rm -f $p
    ((rc == 0)) || die "apt-get failed, see $DIR/log/apt.log"
}
write_config() { # N
    local n=$1 k ctl; ctl=$(hostname -s)
    rm -rf "${DIR:?}"/{state,spool,dev}; mkdir -p "$DIR"/{state,spool,dev}   # no jobs of a past life
    [[ -s $DIR/munge/key ]] || (umask 077; head -c 128 /dev/urandom >"$DIR/munge/key")
    # v4-mapped names: for c10d's reverse look-ups (there is no DNS inside a node)
    printf '127.0.0.1 localhost\n%s.254 %s\n' "$NET" "$ctl" >"$DIR/etc/hosts"
    for ((k = 1; k <= n; k++)); do printf "%s node$k\n" "$NET.$k" "::ffff:$NET.$k"; done >>"$DIR/etc/hosts"
    # Fake GPUs: Slurm insists on character devices (195 is nvidia's; with no driver they open
    # nothing), then counts and binds them and sets CUDA_VISIBLE_DEVICES.
    for ((k = 0; k < GPUS; k++)); do mknod "$DIR/dev/nvidia$k" c 195 "$k"; done
    : >"$DIR/etc/gres.conf"
    ((GPUS == 0)) || echo "Name=gpu File=$DIR/dev/nvidia[0-$((GPUS - 1))]" >"$DIR/etc/gres.conf"
    # /tmp is common to the nodes, so PMIx's per-step directories would collide there.
    echo "PMIxCliTmpDirBase=/dev/shm" >"$DIR/etc/mpi.conf"
    cat >"$DIR/etc/slurm.conf" <<CONF
ClusterName=slurmlocal
SlurmctldHost=$ctl($NET.254)
SlurmctldPort=$PORT
SlurmUser=root
# cred_expire is also how long a requeued job is held back (default 120 s)
AuthInfo=socket=$DIR/munge/socket,cred_expire=10
StateSaveLocation=$DIR/state
SlurmctldPidFile=$DIR/run/slurmctld.raw
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdSpoolDir=$DIR/spool/%n
SlurmdPidFile=$DIR/spool/%n.pid
SlurmdLogFile=$DIR/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
# a line per ended job; \`sacct -c\` reads it even without slurmdbd
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.txt
# a dead node is noticed in 10-30 s; SIGTERM to SIGKILL takes 5 s; ended jobs stay visible 1 h
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
ReturnToService=2
JobFileAppend=1
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
DefMemPerCPU=$((64000 / CPUS))
GresTypes=gpu
NodeName=node[1-$n] NodeAddr=$NET.[1-$n] CPUs=$CPUS RealMemory=64000 Gres=gpu:$GPUS
# jobs in "low" are pre-empted by "batch": SIGTERM, 60 s of grace, requeue
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=batch Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
${CLUSTER_EXTRA:-}
CONF
    echo "$n" >"$DIR/run/nodes"
}

start_control() { # bridge, munged, slurmctld (and, before that, slurmdbd)
    ip link add "$BRIDGE" type bridge; ip link set "$BRIDGE" up
    ip addr add "$NET.254/24" dev "$BRIDGE"
    rm -f "$DIR"/munge/socket*
    spawn munged munged --foreground --socket="$DIR/munge/socket" --key-file="$DIR/munge/key" \
        --pid-file="$DIR/run/munged.raw" --seed-file="$DIR/munge/seed" --log-file="$DIR/log/munged.log"
    wait_for 5 munge -S "$DIR/munge/socket" -n || die "munged: see $DIR/log/munged.*"
    ((SACCT == 0)) || start_slurmdbd
    spawn slurmctld slurmctld -D
    wait_for 15 scontrol ping || die "slurmctld: see $DIR/log/slurmctld.log"
}
start_node() { # K
    local name=node$1 veth=$VETH$1 pid
    alive "$name" >/dev/null && alive "$name.slurmd" >/dev/null && return
    # A reboot within SlurmdTimeout would go unnoticed and leave its jobs hanging: report it.
    [[ ! -d $DIR/spool/$name ]] || scontrol update NodeName="$name" State=DOWN Reason=rebooted
    stop "$name" KILL; ip link del "$veth" 2>/dev/null || true; rm -f "$DIR/spool/$name.pid"
    spawn "$name" unshare -n -u -m -p --fork --kill-child --mount-proc bash "$SELF" _node "$1"
    pid=$(alive "$name") || die "$name: see $DIR/log/$name.out"
    wait_for 5 grep . "/proc/$pid/task/$pid/children" || die "unshare: see $DIR/log/$name.out"
    ip link add "$veth" type veth peer name eth0 netns "$pid"; ip link set "$veth" master "$BRIDGE" up
    wait_for 10 test -s "$DIR/spool/$name.pid" || die "$name: see $DIR/log/slurmd-$name.log"
    for pid in $(children "$(children "$pid" | tr -d ' ')"); do   # of the node's process 1
        [[ $(cat "/proc/$pid/comm") != slurmd ]] || save_pid "$name.slurmd" "$pid"
    done
}
node_init() { # K; process 1 of a node
    hostname "node$1"; mount --bind "$DIR/etc/hosts" /etc/hosts
    mount -t tmpfs -o mode=1777 shm /dev/shm
    wait_for 5 ip link show eth0
    ip link set lo up; ip addr add "$NET.$1/24" dev eth0; ip link set eth0 up
    slurmd -D -N "node$1" &
    while :; do wait -n || [[ $? != 127 ]] || sleep 1; done   # reap orphans, outlive slurmd
}
nodes_ready() { ! sinfo -h -N -o %t | grep -vE '^(idle|mix|alloc|comp)$'; }
up() {
    local n=${1:-$(nodes)} k; [[ $n != 0 ]] || n=2
    [[ $n =~ ^[1-9][0-9]?$ ]] || die "N must be 1..99"
    install_packages
    if ! alive munged >/dev/null || ! alive slurmctld >/dev/null || ((n != $(nodes))); then
        stop_all; write_config "$n"; start_control
    fi
    for ((k = 1; k <= n; k++)); do start_node "$k"; done
    wait_for 20 nodes_ready || { sinfo -N -o '%N %T %E'; die "nodes not ready, see $DIR/log"; }
    echo "up: $n nodes; now  eval \"\$($SELF env)\""
}
stop_all() {
    local f; rm -f "$DIR"/run/node*.slurmd.pid   # they die with their node
    for f in "$DIR"/run/node*.pid; do
        f=${f##*/} f=${f%.pid}
        stop "$f" KILL; ip link del "$VETH${f#node}" 2>/dev/null || true
    done
    for f in slurmctld slurmdbd mariadbd munged; do stop $f TERM; done
    ip link del "$BRIDGE" 2>/dev/null || true
    rm -f "$DIR/run/nodes"
}
status() {
    local f rc=0; alive slurmctld >/dev/null || rc=1
    for f in "$DIR"/run/*.pid; do
        f=${f##*/} f=${f%.pid}
        alive "$f" >/dev/null || rc=1
        printf '%-14s %s\n' "$f" "$(alive "$f" || echo down)"
    done
    ! alive slurmctld >/dev/null || { sinfo -N -o '%8N %9P %11T %5c %10G %E'; squeue; }
    return $rc
}
# shellcheck source=tests/slurm/local-accounting.sh
[[ $SACCT == 0 ]] || . "${SELF%/*}/local-accounting.sh"
case ${1:-} in up | down | crash)
    [[ $EUID == 0 ]] || die "needs root (namespaces, bridge)"
    mkdir -p "$DIR"/{etc,run,log,munge}; chmod 755 "$DIR" "$DIR/munge"
    exec 9>"$DIR/run/lock"; flock -w 60 9 || die "another local-cluster.sh is at work" ;; esac
case ${1:-} in
    up)     up "${2:-}" ;;
    down)   stop_all; echo "down; logs in $DIR/log" ;;
    crash)  alive "${2:-?}" >/dev/null || die "no such running node"; stop "$2" KILL ;;
    status) status ;;
    env)    echo "export SLURM_CONF=$SLURM_CONF" ;;
    _node)  node_init "$2" ;;
    *)      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$SELF"; exit 2 ;;
esac
