#!/usr/bin/env bash
# Installs what is missing and runs the tests. Arguments go to pytest: tests/run.sh -k config, tests/run.sh tests/unit/test_config.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment

# One thread per process: two workers, or the ranks of a distributed test, share the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

run_pytest() {
    local status=0
    python -m pytest "$@" || status=$?
    # 5: nothing in this group matches the arguments.
    [ "$status" -eq 5 ] || [ "$status" -eq 0 ] || failed=1
}

failed=0
for argument in "$@"; do
    if [ -e "${argument%%::*}" ]; then
        exec python -m pytest "$@"
    fi
done
run_pytest tests/unit -n 2 "$@"
# Most of their time these wait: for processes to start, for each other, for what must time out. A file stays on one worker.
# xdist's own order, by the number of tests, would leave one worker with the longest files at the end: they hold few tests.
run_pytest tests/distributed tests/integration tests/gpu -n 3 --dist loadfile --no-loadscope-reorder "$@"
exit "$failed"
