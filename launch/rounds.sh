#!/usr/bin/env bash
# Rounds of mining and training: bash launch/rounds.sh MODEL RECIPE ROUNDS [--section.key value ...]
#
# Each round mines hard negatives for the recipe's data with the newest model (MODEL at first), trains that model on them and
# converts it: DIR/NAME_round1/{mined.parquet,checkpoints,model}, ..., with the recipe's run.dir and run.name. Called again, it
# goes on where it was ended. Further arguments go to the training; those for tools/mine_negatives.py are given as
# MINE="--negatives 8 --skip 2".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
[ $# -ge 3 ] && [[ "$3" =~ ^[1-9][0-9]*$ ]] || fail "usage: bash launch/rounds.sh MODEL RECIPE ROUNDS [--section.key value ...]"
model="$1" recipe="$2" rounds="$3"
asked="$1 $2 ${*:4} MINE=${MINE:-}"
shift 3
# Whoever has what mining needs is not given the tests' environment.
python -c 'import muco_ds, faiss' 2>/dev/null || make_environment
choose_ranks
read -ra mining <<<"${MINE:-}"

settings="$(python - --config "$recipe" "$@" <<'PYTHON'
import shlex, sys
from muco_ds.config_cli import parse_args
from muco_ds.errors import UserError, exit_on_user_error

with exit_on_user_error():
    config = parse_args(sys.argv[1:]).config
    if not config.task.negatives:
        raise UserError("task.negatives=0: mined negatives would not be used: set how many of a row come along")
    if len(config.data.sources()) > 1:
        raise UserError("data.train names several data sets: mine for one, and join it with the others afterwards")
    (source,) = config.data.sources()
    values = {"name": config.run.name, "folder": config.run.dir, "data": source.path, "images": source.images}
    print(*(f"{key}={shlex.quote(str(value))}" for key, value in values.items()))
PYTHON
)"
eval "$settings"
made="$folder/${name}_rounds.txt"
[ ! -e "$made" ] || [ "$(cat "$made")" = "$asked" ] ||
    fail "$made: the rounds here were made with other arguments ($(cat "$made")): give those, or another run.name"
mkdir -p "$folder" && echo "$asked" >"$made"

step() { printf '\n== %s\n' "$*"; }

for ((round = 1; round <= rounds; round++)); do
    run="$folder/${name}_round$round"
    if [ -e "$run/model" ]; then
        step "round $round of $rounds: $run/model is there"
    else
        if [ ! -e "$run/mined.parquet" ]; then
            step "round $round of $rounds: mining with $model -> $run/mined.parquet"
            deepspeed "${ranks[@]}" tools/mine_negatives.py --model "$model" --data "$data" --images "$images" \
                --output "$run/mined.parquet" "${mining[@]}"
        fi
        step "round $round of $rounds: training -> $run"
        deepspeed "${ranks[@]}" launch/train.py --config "$recipe" "$@" --run.name "${name}_round$round" \
            --model.path "$model" --data.train "$run/mined.parquet" --data.images "$images"
        step "round $round of $rounds: checkpoint -> $run/model"
        python tools/convert_ckpt.py "$run" "$run/model"
    fi
    model="$run/model"
done
step "done: $model"
