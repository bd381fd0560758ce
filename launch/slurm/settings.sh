# Sourced by train.sbatch, evaluate.sbatch and tool.sbatch on the first machine of a job: checks what SLURM gave, sets what
# every rank inherits, and defines `on_ranks` (one srun over all of them) and `requeue`.

fail() {
    echo "error: $*" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "no SLURM job: submit this file with sbatch, or python launch/slurm/submit.py RECIPE --nodes N"
export MUCO_DS_REPOSITORY="${MUCO_DS_REPOSITORY:-$SLURM_SUBMIT_DIR}"
restart="${SLURM_RESTART_COUNT:-0}"
# A job array would have several jobs write one run; of a heterogeneous job the other parts would idle.
[ -z "${SLURM_ARRAY_JOB_ID:-}${SLURM_HET_SIZE:-}" ] || fail "this is a job array or a heterogeneous job: submit one plain job for each run"
[[ "${MAX_FAILURES:=3}" =~ ^[1-9][0-9]*$ ]] || fail "MAX_FAILURES=$MAX_FAILURES: give a whole number of at least 1"
# From another folder: what is only found in this one the programs would not find.
(cd / && python -c 'import muco_ds') || fail "$(command -v python || echo python) can't import muco_ds: submit from the environment it is installed in"

# --- ranks: one per GPU; without GPUs as many as --ntasks-per-node says
gpus="${SLURM_GPUS_PER_NODE##*:}" # may be written h100:8
gpus="${gpus:-${SLURM_GPUS_ON_NODE:-0}}"
ranks="${SLURM_NTASKS_PER_NODE:-${gpus/#0/1}}"
[[ "$ranks" =~ ^[0-9]+$ ]] || fail "--ntasks-per-node=$ranks: give one number"
[ "$gpus" = 0 ] || [ "$gpus" = "$ranks" ] || fail "$gpus GPUs but $ranks tasks on each node: give --gpus-per-node and --ntasks-per-node the same number"
cpus="${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / ranks > 0 ? SLURM_CPUS_ON_NODE / ranks : 1))}"

# --- rendezvous
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
[ -n "$first" ] || fail "scontrol does not say which machines the job has: is it in PATH here, as it was where the job was submitted?"
# The address that SLURM itself reaches the machine by; its name need not resolve on the others.
MASTER_ADDR="$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
export MASTER_ADDR="${MASTER_ADDR:-$first}"
# Below the ports that the kernel hands out (32768 and up). By job, for jobs that share a machine; by restart, as the last
# one's socket may linger. 31 restarts pass before a job takes the first port of the next one.
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 31 + restart) % 12000))
# What a site's modules or an interactive torchrun may have left behind would be taken for this job's.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK

# --- collectives
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" # which transport fails and why; INFO where it is slow. NCCL_SOCKET_IFNAME, NCCL_IB_HCA: the site's
# A failed collective ends its process (torch's default, which environments made for older versions change): srun then ends
# the others. Without it they wait for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3
# A collective that times out has every rank write the last ones it was in, for `torchfrtrace`; where to is set by the caller.
export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=2000
# A rank whose watchdog hangs inside CUDA is ended after this many seconds; torch's 480, said here because it bounds a hang.
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC="${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-480}"

# --- memory
# Packs differ in length from step to step; segments that grow leave no holes between them. torch reads the older name first.
[ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ] || export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# The loader's processes are the parallelism; a thread pool in each of them would fight over the same cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# --- files
# Models and data are folders: a compute node that asks the hub waits for a network it may not have.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
# Compiled kernels go to the machine's own disk: thousands of small files, and locks that network disks do not keep. A new
# folder for each restart, because a killed compilation leaves a lock that later ones wait for. Programs are loaded from it,
# so that no other user of the machine may guess its name and make it first.
local_disk="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/muco_ds-$SLURM_JOB_ID-$restart-$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')"
export TRITON_CACHE_DIR="$local_disk/triton" TORCH_EXTENSIONS_DIR="$local_disk/torch_extensions"
ulimit -c 0                       # a core file of each rank holds all its memory, and would fill the disk
ulimit -n "$(ulimit -Hn)" || true # loaders hand batches over as open files

# --- the log
export PYTHONUNBUFFERED=1   # the last lines before a kill are the ones to read
export PYTHONFAULTHANDLER=1 # a crash in native code leaves a stack

# srun hands SIGUSR1 and SIGTERM on to the ranks, which save and exit; this shell has to outlive them to read the status.
trap : USR1 TERM

echo "== job $SLURM_JOB_ID, restart $restart: $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST) of $ranks ranks and $gpus GPUs, rendezvous at $MASTER_ADDR:$MASTER_PORT, $(date -u +%FT%TZ)"

# One step over all nodes. The first rank that fails ends the others, which would wait for it. No GPU binding: every rank
# sees the GPUs of its machine and takes the one of its local rank, and NCCL finds the direct ways between them. CPUs are
# said again because srun does not take them from sbatch.
on_ranks() {
    srun --kill-on-bad-exit=1 --ntasks="$((SLURM_JOB_NUM_NODES * ranks))" --ntasks-per-node="$ranks" --cpus-per-task="$cpus" --gpu-bind=none "$@"
}

# What SLURM ends by itself (scancel, the time limit, preemption with its own requeue) is COMPLETING by now: requeueing a
# cancelled job would bring it back.
requeue() {
    local state attempt
    state="$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)"
    if [ "${state:-RUNNING}" != RUNNING ]; then
        echo "== not requeued by this script: SLURM is ending the job ($state)"
        exit 75
    fi
    for attempt in 1 2 3 4 5; do
        scontrol requeue "$SLURM_JOB_ID" && exit 75
        sleep $((attempt * 10)) # the controller may be restarting
    done
    fail "scontrol requeue $SLURM_JOB_ID failed: submit the job again, it goes on from what was saved"
}
