# Sourced by launch/quickstart.sh, launch/rounds.sh and tests/run.sh, which then call `make_environment`.
#
# make_environment puts a Python with muco_ds (this checkout, editable) and its dev tools first in PATH: the current one where
# it already can, else the virtual environment .venv, made and filled on the first call and left alone until setup.py,
# pyproject.toml or the constraints change. On a machine without a GPU, point PIP_EXTRA_INDEX_URL at PyTorch's index of CPU
# builds first, or pip fetches the CUDA build with its gigabytes of libraries.

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    echo "error: $*" >&2
    exit 1
}

# Whether Python $1 imports this checkout and what the programs and tests need. Run from / : the current directory is on
# sys.path, where muco_ds would be found without being installed.
has_muco_ds() {
    (cd / && REPOSITORY="$REPOSITORY" "$1" - 2>/dev/null) <<'PYTHON'
import importlib.util, os, pathlib, sys
import muco_ds
here = pathlib.Path(muco_ds.__file__).resolve().parent.parent == pathlib.Path(os.environ["REPOSITORY"]).resolve()
needed = ("torch", "deepspeed", "transformers", "datasets", "jsonargparse", "pytest", "xdist", "sentence_transformers", "faiss", "peft", "openai", "hypothesis")
sys.exit(not (here and all(importlib.util.find_spec(name) for name in needed)))
PYTHON
}

# Prints a Python 3.10 to 3.12 that can make virtual environments; 3.10 last, as it gets older libraries.
find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3 python python3.10; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
            >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

install_muco_ds() {
    local pip="$REPOSITORY/.venv/bin/python -m pip --disable-pip-version-check" constraints="constraints-cpu.txt"
    cd "$REPOSITORY"
    $pip install --upgrade pip || return
    # torch alone first: whether it is a CUDA build decides which Triton fits.
    $pip install -c constraints.txt torch || return
    if .venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
        constraints="constraints.txt"
    fi
    # DeepSpeed compiles the operators it needs on first use; building all of them here needs a CUDA compiler.
    DS_BUILD_OPS=0 $pip install -c "$constraints" -e '.[dev]' || return
    # Only tests of exported models need torchvision. It stays out of site-packages because its PyPI wheel beside a CPU build of
    # torch breaks `import transformers`.
    $pip install --no-deps --target .venv/torchvision-only -c constraints.txt torchvision
}

make_environment() {
    local venv="$REPOSITORY/.venv" python stamp
    if command -v python >/dev/null && has_muco_ds python; then
        return
    fi
    stamp="$(cd "$REPOSITORY" && cat setup.py pyproject.toml constraints.txt constraints-cpu.txt | cksum)"
    if [ "$(cat "$venv/installed" 2>/dev/null)" != "$stamp" ] || ! has_muco_ds "$venv/bin/python"; then
        if ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
            python="$(find_python)" || fail "no Python 3.10 to 3.12 with the venv module found (Debian, Ubuntu: apt install python3-venv)"
            "$python" -m venv --clear "$venv" || fail "cannot make the virtual environment $venv with $python"
        fi
        echo "installing into $venv (minutes on the first call; log: $venv/install.log)"
        (set +e; install_muco_ds) >"$venv/install.log" 2>&1 || {
            tail -n 5 "$venv/install.log" >&2
            fail "the installation failed: see $venv/install.log"
        }
        echo "$stamp" >"$venv/installed"
    fi
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
}

# Sets `ranks`: what the deepspeed launcher is told besides the program. All GPUs, or two processes on a CPU.
choose_ranks() {
    ranks=()
    if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        ranks=(--num_gpus 2)
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) > 3 ? $(nproc) / 2 : 1))}"
    fi
}
