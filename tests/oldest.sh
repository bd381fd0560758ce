#!/usr/bin/env bash
# Installs the oldest versions that setup.py allows into an environment of its own, .venv-oldest, and runs the unit tests and
# a short training through the launcher with them. `tests/oldest.sh short`: a selection of the tests, with the training.
# torch 2.10.0 comes as its CUDA build from PyPI (gigabytes) unless PIP_EXTRA_INDEX_URL names PyTorch's index of CPU builds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

venv="$REPOSITORY/.venv-oldest"
stamp="$(cat setup.py constraints-oldest.txt | cksum)"
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$stamp" ]; then
    python="$(find_python)" || fail "no Python 3.10 to 3.12 with the venv module found (Debian, Ubuntu: apt install python3-venv)"
    echo "installing into $venv (log: $venv/install.log)"
    "$python" -m venv --clear "$venv"
    (
        "$venv/bin/python" -m pip install --upgrade pip
        DS_BUILD_OPS=0 "$venv/bin/python" -m pip install -c constraints-oldest.txt -e . \
            faiss-cpu hypothesis matplotlib pytest pytest-xdist
    ) >"$venv/install.log" 2>&1 || {
        tail -n 5 "$venv/install.log" >&2
        fail "the installation failed: see $venv/install.log"
    }
    echo "$stamp" >"$venv/installed"
fi
export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
choose_ranks
python tools/make_demo.py "$work/demo" --scenes 60 --test_scenes 30 >/dev/null
deepspeed "${ranks[@]}" launch/train.py --config launch/recipes/demo.yaml --run.dir "$work/runs" --run.max_steps 4 --optim.warmup_steps 1 \
    --model.path "$work/demo/model" --data.train "$work/demo/data/train.parquet" --data.images "$work/demo/data/images" \
    --data.val "$work/demo/data/test.parquet"
python tools/convert_ckpt.py "$work/runs/demo" "$work/model"

if [ "${1:-}" = short ]; then
    python -m pytest -q -n 2 tests/unit/test_{config,readers,conversations,images,hostile_pictures,safe_load,collator,loader,versions}.py
else
    # These need the factory's, the pages' and mteb's libraries, which bring their own requirements.
    python -m pytest -q -n 2 tests/unit --ignore=tests/unit/test_{mteb_model,search_page,secrets}.py
fi
