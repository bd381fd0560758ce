#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes on one of H200 class: benchmarks and tests/gpu; a short table last.
#
#     benchmarks/run_gpu.sh [PART ...]        parts: ceilings pooler attention info_nce step_2b tests input encode step_7b
#
# Every part has a time limit of its own (parts that are named have all that is left) and may fail without the others.
# Lines go to benchmarks/results/*.jsonl when a GPU made them, and with the log to $OUT where that is set.
# BUDGET_S: seconds for all (585). PYTHON: the interpreter.
# Without a GPU the sizes are toys and what needs one says that it is skipped: to see that all commands run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$(command -v python || command -v python3)}
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
log="$folder/run_gpu.log"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

all="ceilings pooler attention info_nce step_2b tests input encode step_7b"
wanted=" ${*:-$all} " named=$#
for name in $wanted; do
    case " $all " in *" $name "*) ;; *) echo "error: no part '$name'; parts: $all" >&2; exit 2 ;; esac
done

gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))') || exit 1
if [ "$gpu" = 1 ]; then
    sizes() { :; }
else
    echo "no CUDA GPU: toy sizes; the kernels, bf16, tests/gpu and the presets h200_2b and h200_7b are skipped"
    sizes() { echo "$*"; }
fi

part() { # NAME LIMIT COMMAND...: its output to the log too; what failed is said and listed at the end
    local name=$1 limit=$2 left status started=$SECONDS
    shift 2
    case "$wanted" in *" $name "*) ;; *) return 0 ;; esac
    left=$((${BUDGET_S:-585} - SECONDS))
    if [ "$limit" -gt "$left" ] || [ "$named" -gt 0 ]; then limit=$left; fi
    if [ "$limit" -lt 10 ]; then
        failed="$failed $name(no time left)"
        return 0
    fi
    echo "== $name, at most $limit s" | tee -a "$log"
    timeout -k 10 "$limit" "$python" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || failed="$failed $name(status $status)"
    echo "== $name: $((SECONDS - started)) s" | tee -a "$log"
}

benchmark() { # NAME LIMIT FILE OPTIONS...
    local name=$1 limit=$2 file=$3
    shift 3
    part "$name" "$limit" "benchmarks/$file.py" "$@" --results "$folder/$file.jsonl"
}

failed=""
SECONDS=0
# shellcheck disable=SC2046 # options are words
{
    benchmark ceilings 40 ceilings $(sizes --repeats 1)
    benchmark pooler 60 pooler $(sizes --embeddings 64 --dim 64 --repeats 2)
    benchmark attention 80 attention --repeats 7 $(sizes --dialogues 2 --picture 40 --turn 4 --repeats 2 --systems sdpa padded)
    benchmark info_nce 80 info_nce --only cuda keys --repeats 5 $(sizes --rows 64 --keys 128 512 --repeats 2)
    benchmark step_2b 330 step --preset h200_2b --workloads seven_turns --repeats 3
    part tests 120 -m pytest tests/gpu -q -rs -p no:cacheprovider --maxfail 10 --durations 5 --deselect tests/gpu/test_train_2b_gpu.py
    benchmark input 40 input --repeats 3 $(sizes --pack 2 --steps 1 --repeats 1 --size 96 84)
    benchmark encode 70 encode --only mixed seven_questions --repeats 2 $(sizes --preset toy)
    benchmark step_7b 200 step --preset h200_7b --workloads seven_turns --repeats 2 --systems ours padded_best
}

if [ "$gpu" = 1 ]; then
    for file in "$folder"/*.jsonl; do
        [ ! -s "$file" ] || cat "$file" >> "benchmarks/results/$(basename "$file")"
    done
fi
if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT" && cp "$folder"/* "$OUT"/
fi
echo "== $SECONDS s in all"
"$python" benchmarks/short_table.py "$folder"
if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
