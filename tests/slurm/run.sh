#!/usr/bin/env bash
# A real SLURM of two nodes on this machine trains the demo with launch/slurm/train.sbatch, and is disturbed: every run must
# end with the losses of the one that was left alone. About ten minutes on two cores.
#
#   tests/slurm/run.sh [CASE ...]        KEEP=1 leaves the scratch folder
#
# Cases: preempted time_limit cancelled rank_killed node_lost batch_node_lost fails_alike user_error chain
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/environment.sh
source tests/slurm/cluster.sh
cases=("$@")
[ $# -gt 0 ] || cases=(preempted time_limit cancelled rank_killed node_lost batch_node_lost fails_alike user_error chain)

scratch="$(mktemp -d)"
table="$scratch/table" failed=0
finish() {
    stop_cluster
    [ -n "${KEEP:-}" ] && echo "kept: $scratch" || rm -rf "$scratch"
}
trap finish EXIT
trap 'exit 130' INT TERM
install_slurm
make_environment
export OMP_NUM_THREADS=1
start_cluster

repository="$PWD"
cd "$scratch" || exit
python "$repository/tools/make_demo.py" demo --scenes 400 --test_scenes 20 >/dev/null 2>&1 || fail "the demo was not made"
cat >recipe.yaml <<'RECIPE'
run: {name: alone, max_steps: 24, precision: fp32}
model: {path: demo/model, freeze_vision: false, activation_checkpointing: {text: 0.0}}
task: {query_history: 0.0, target_history: 0.0}
data: {train: demo/data/train.parquet, images: demo/data/images, workers: 1, min_pixels: 3136, max_pixels: 7056}
batch: {images: 8, pack_tokens: 8192}
optim: {lr: 2.0e-3, warmup_steps: 10, schedule: constant}   # constant: a longer run starts with the losses of a shorter
loss: {temperature: 0.03}
checkpoint: {every: 10}
log: {every: 1}
RECIPE
cp "$repository/launch/recipes/demo_finetune.yaml" .

submit() { # ARGUMENTS of submit.py: sets `job`, or the numbers of a chain's jobs
    python "$repository/launch/slurm/submit.py" "$@" >submitted 2>&1 || { cat submitted; return 1; }
    job="$(sed -n 's/^job \([0-9]*\):.*/\1/p' submitted | tr '\n' ' ')"
    job="${job% }"
}
train() { # NAME [ARGUMENTS]
    submit recipe.yaml --nodes 2 --gpus_per_node 0 --ranks_per_node 1 --no_preflight --run.name "$@"
    run="runs/$1"
}
state() { scontrol show job "$1" 2>/dev/null | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'; }
restarts() { scontrol show job "$1" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p'; }
ended() { [[ "$(state "$1")" =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)$ ]]; }
running_again() { [ "$(state "$1")" = RUNNING ] && [ "$(restarts "$1")" -ge "$2" ]; }
reached() { [ -e "$run/metrics.jsonl" ] && [ "$(tail -n 1 "$run/metrics.jsonl" | sed -n 's/^{"step": \([0-9]*\),.*/\1/p')" -ge "$1" ] 2>/dev/null; }
at_step() { wait_for 180 reached "$1" || { echo "$run does not reach step $1"; tail -n 5 "$run"/job/*.log; return 1; }; }
parent() { ps -o ppid= -p "$1" | tr -d ' '; }
rank_pid() { # RANK of $job: its process, not the loaders it forked
    local pid
    for pid in $(pgrep -f launch/train.py); do
        grep -qzx "SLURM_CONF=$SLURM_CONF" "/proc/$pid/environ" 2>/dev/null && grep -qzx "SLURM_JOB_ID=$job" "/proc/$pid/environ" &&
            grep -qzx "SLURM_PROCID=$1" "/proc/$pid/environ" && [[ "$(ps -o comm= -p "$(parent "$pid")")" = slurmstepd* ]] && echo "$pid"
    done
}
rank_there() { [ -n "$(rank_pid "$1")" ]; }
lose_node() { # NODE RANK: its daemon and all that it started are gone at once
    local pid
    pid="$(rank_pid "$2")"
    kill -9 "$(cat "slurmd.$1.pid")" "$(parent "$pid")" "$pid"
}
lose_batch() { # the job's script, and the daemon that watches it
    local pid
    for pid in $(pgrep -f "slurmd/job|spool.node1/job"); do
        grep -qzx "SLURM_JOB_ID=$job" "/proc/$pid/environ" 2>/dev/null && kill -9 "$(parent "$pid")" "$pid" 2>/dev/null
    done
}

# The losses of $run are those of runs/alone: each step once, and bit for bit the same.
same_losses() {
    python - runs/alone/metrics.jsonl "$run/metrics.jsonl" <<'PYTHON'
import json, sys
alone, other = ([(line["step"], line["loss"]) for line in map(json.loads, open(path))] for path in sys.argv[1:])
both = min(len(alone), len(other))
assert both >= 24 and [step for step, _ in other] == list(range(1, len(other) + 1)), f"steps {[step for step, _ in other]}"
different = [(a, b) for a, b in zip(alone, other) if a != b]
assert not different, f"first different: {different[0]}"
PYTHON
}
row() { printf '%s|%s|%s|%s\n' "$1" "$2" "$3" "$(($(date +%s) - began)) s" >>"$table"; }
verify() { # WHAT WAS DONE, WHAT HAPPENED, RESTARTS (0): $run is finished, after so many at least, with the losses of the undisturbed one
    local happened="$2" equal=yes
    wait_for 400 ended "$job" || happened="$happened; not ended"
    [ "$(state "$job")" = COMPLETED ] || { equal=NO; happened="$happened; $(state "$job")"; }
    same_losses 2>losses.err || { equal="NO: $(tail -n 1 losses.err)"; }
    [ "${3:-0}" -le "$(restarts "$job")" ] || { equal=NO; happened="$happened; was not disturbed"; }
    [ "$equal" = yes ] || { failed=1; tail -n 30 "$run"/job/*"-$job.log" | tr '\r' '\n' | tail -n 30; }
    row "$1" "$happened" "$equal"
}
said() { tr '\r' '\n' <"$(ls -t "$run"/job/*"-$job.log")" | grep "^== job $job, restart" | grep -v nodes | sed -n "$1p" | sed 's/.*restart [0-9]*: //; s/ (status.*)//'; }

alone() { train alone --run.max_steps 240 && verify "nothing" "240 steps on two nodes" || failed=1; }
preempted() {
    train preempted && at_step 13 && scancel --signal=USR1 "$job"
    wait_for 120 running_again "$job" 1
    verify "scancel --signal=USR1 at step 13" "$(said 1), restarts: $(restarts "$job")" 1
}
time_limit() { # SLURM looks twice a minute, and half a minute ahead: the steps must take longer than one
    # By plain sbatch: submit.py would refuse so short a limit.
    job="$(MUCO_DS_REPOSITORY="$repository" sbatch --parsable --nodes=2 --ntasks-per-node=1 --time=1 --signal=USR1@5 --output=time_limit-%j.log \
        "$repository/launch/slurm/train.sbatch" recipe.yaml --run.name time_limit --run.max_steps 240)"
    run=runs/time_limit
    mkdir -p "$run/job" && ln -s "$PWD/time_limit-$job.log" "$run/job/1_train-$job.log"
    wait_for 90 running_again "$job" 1
    local first
    first="$(said 1)"
    wait_for 120 ended "$job"
    verify "--time 1" "$first, restarts: $(restarts "$job")" 1
}
cancelled() {
    train cancelled && at_step 13 && scancel "$job"
    wait_for 120 ended "$job"
    local first="job $job: $(state "$job"), $(said 1)"
    [ "$(state "$job")" = CANCELLED ] || failed=1
    train cancelled
    verify "scancel at step 13, submitted again" "$first"
}
rank_killed() {
    train rank_killed && at_step 13 && kill -9 "$(rank_pid 1)"
    wait_for 120 running_again "$job" 1
    verify "kill -9 of rank 1 at step 13" "$(said 1), restarts: $(restarts "$job")" 1
}
node_lost() {
    train node_lost && at_step 13 && lose_node node2 1
    wait_for 120 restarted_or_pending
    start_daemon node2
    wait_for 120 running_again "$job" 1
    # A late order to end the step that was lost may reach the next one, which then saves and is requeued once more.
    verify "node2 (daemon, step, rank) killed at step 13" "requeued, restarts: $(restarts "$job")" 1
}
batch_node_lost() {
    train batch_node_lost && at_step 13 && lose_batch && lose_node node1 0
    wait_for 120 restarted_or_pending
    start_daemon node1
    wait_for 120 running_again "$job" 1
    verify "node1, with the job's script, killed at step 13" "requeued by SLURM, restarts: $(restarts "$job")" 1
}
restarted_or_pending() { [ "$(restarts "$job")" -ge 1 ]; }
fails_alike() {
    train fails_alike
    local i
    for i in 0 1 2; do
        wait_for 120 running_again "$job" "$i" && wait_for 60 rank_there 1
        sleep 1
        kill -9 "$(rank_pid 1)"
    done
    wait_for 120 ended "$job"
    local equal="none compared"
    [ "$(state "$job")" = FAILED ] && [ "$(restarts "$job")" = 2 ] && grep -q "3 ends in a row like this" "$run"/job/*.log || { equal=NO failed=1; }
    row "kill -9 of rank 1 in each start" "$(state "$job") after the third, restarts: $(restarts "$job")" "$equal"
}
user_error() {
    mv demo/data/images away
    submit recipe.yaml --nodes 2 --gpus_per_node 0 --ranks_per_node 1 --no_preflight --run.name user_error && echo "submitted without pictures" && failed=1
    mv away demo/data/images
    train user_error --sbatch "--begin=now+3" && mv demo/model away
    wait_for 120 ended "$job"
    mv away demo/model
    local equal="none compared"
    [ "$(state "$job")" = FAILED ] && [ "$(restarts "$job")" = 0 ] && grep -q "won't mend itself" "$run"/job/*.log || { equal=NO failed=1; }
    row "model's folder moved away after submission" "$(state "$job"), restarts: $(restarts "$job"): $(said 1 | cut -c 1-60)" "$equal"
}
chain() {
    cat >chain.yaml <<'CHAIN'
nodes: 2
gpus_per_node: 0
ranks_per_node: 1
stages:
  - train: {recipe: recipe.yaml, run.name: chained, run.max_steps: 24}
  - convert:
  - mine: {max_share: .inf}
  - train: {recipe: demo_finetune.yaml, run.name: chained_finetune, run.max_steps: 10, optim.warmup_steps: 2, batch.images: 8, validation.every: 0}
  - convert:
  - evaluate: {suite: m3t, data: demo/data/pairs_test.parquet, images: demo/data/images}
CHAIN
    run=runs/chained
    submit --chain chain.yaml --no_preflight || { failed=1; return; }
    local numbers="$job" last="${job##* }"
    job="${job%% *}"
    at_step 5 && scancel --signal=USR1 "$job"
    wait_for 900 ended "$last"
    verify "chain of six, its first job preempted" "$(for job in $numbers; do state "$job"; done | sort | uniq -c | tr -s ' \n' ' '), results.json: $([ -e runs/chained_finetune/evaluation/results.json ] && echo there || echo MISSING)" 1
    [ -e runs/chained_finetune/evaluation/results.json ] || failed=1
}

began=$(date +%s)
echo "done|what happened|losses equal|after" >"$table"
for case in alone "${cases[@]}"; do
    began=$(date +%s)
    echo "-- $case"
    "$case"
done
echo
column -t -s '|' "$table"
exit "$failed"
