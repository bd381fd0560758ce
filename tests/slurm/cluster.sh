# Sourced by run.sh: a SLURM of this user's own, one controller and the nodes node1 and node2, all on this machine and in
# the folder $scratch. Nothing in /etc is read or written.

skip() {
    echo "SKIPPED: $*"
    exit 0
}

install_slurm() {
    local needed=(slurmctld slurmd munged sbatch srun) program missing=()
    PATH="$PATH:/usr/sbin:/sbin"
    for program in "${needed[@]}"; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
        skip "no ${missing[*]}, and only root on Debian can install them (apt-get install slurm-wlm munge)"
    echo "installing slurm-wlm and munge"
    (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge) \
        >"$scratch/apt.log" 2>&1 || skip "slurm-wlm and munge can't be installed here: $(tail -n 1 "$scratch/apt.log")"
}

free_ports() { # N: so many ports that nobody listens on
    python - "$1" <<'PYTHON'
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in sockets:
    one.bind(("", 0))
print(*(one.getsockname()[1] for one in sockets))
PYTHON
}

start_daemon() { # node1 or node2
    slurmd -f "$SLURM_CONF" -N "$1" -c
}

start_cluster() {
    local controller port1 port2
    read -r controller port1 port2 < <(free_ports 3)
    mkdir -p "$scratch/munge" "$scratch/state"
    chmod 700 "$scratch/munge"
    (umask 077 && head -c 1024 /dev/urandom >"$scratch/munge/key")
    chmod 711 "$scratch/munge"
    munged --force --key-file="$scratch/munge/key" --socket="$scratch/munge/socket" --pid-file="$scratch/munge/pid" \
        --log-file="$scratch/munge/log" --seed-file="$scratch/munge/seed" 2>"$scratch/munge/err" ||
        skip "munged does not start here: $(tail -n 1 "$scratch/munge/err")"
    # cred_expire: a requeued job waits until its credential has expired, two minutes by default.
    cat >"$scratch/slurm.conf" <<CONFIG
ClusterName=scratch
SlurmctldHost=localhost
SlurmctldPort=$controller
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$scratch/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$scratch/state
SlurmdSpoolDir=$scratch/spool.%n
SlurmctldPidFile=$scratch/slurmctld.pid
SlurmdPidFile=$scratch/slurmd.%n.pid
SlurmctldLogFile=$scratch/slurmctld.log
SlurmdLogFile=$scratch/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=15
MessageTimeout=30
KillWait=20
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimits=NONE
NodeName=node1 NodeAddr=localhost NodeHostname=$(hostname) Port=$port1 CPUs=8
NodeName=node2 NodeAddr=localhost NodeHostname=$(hostname) Port=$port2 CPUs=8
PartitionName=demo Nodes=node1,node2 Default=YES State=UP
CONFIG
    export SLURM_CONF="$scratch/slurm.conf"
    slurmctld -f "$SLURM_CONF" -c || skip "slurmctld does not start here: $(tail -n 1 "$scratch/slurmctld.log")"
    start_daemon node1 && start_daemon node2 || skip "two slurmd on one machine do not start here"
    wait_for 20 nodes_idle || skip "the nodes do not come up: $(sinfo -h -o '%N %T %E' 2>&1 | tr '\n' ';')"
}

nodes_idle() { [ "$(sinfo -h -N -o %T 2>/dev/null | grep -c '^idle$')" = 2 ]; }

# Processes of this cluster's jobs: whoever runs with its configuration.
processes_of_jobs() {
    local environment
    for environment in /proc/[0-9]*/environ; do
        if grep -qzx "SLURM_CONF=$SLURM_CONF" "$environment" 2>/dev/null &&
            grep -qz '^SLURM_JOB_ID=' "$environment" 2>/dev/null; then
            basename "$(dirname "$environment")"
        fi
    done
}

stop_cluster() {
    local pid
    if [ -n "${SLURM_CONF:-}" ]; then
        scancel --user "$(id -un)" 2>/dev/null
        wait_for 25 no_processes
        for pid in $(processes_of_jobs); do kill -9 "$pid" 2>/dev/null; done
    fi
    for pid in "$scratch"/slurmd.*.pid "$scratch/slurmctld.pid" "$scratch/munge/pid"; do
        [ ! -e "$pid" ] || kill "$(cat "$pid")" 2>/dev/null
    done
    sleep 1
}

no_processes() { [ -z "$(processes_of_jobs)" ]; }

wait_for() { # SECONDS COMMAND...: until it succeeds
    local deadline=$(($(date +%s) + $1))
    shift
    until "$@"; do
        [ "$(date +%s)" -lt "$deadline" ] || return 1
        sleep 0.5
    done
}
