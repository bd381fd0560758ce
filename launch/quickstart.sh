#!/usr/bin/env bash
# From nothing to an embedding model in about ten minutes: installs, makes a demo data set and a tiny model, trains under
# ZeRO-3 (all GPUs, or two processes on a CPU), converts, evaluates, embeds. Arguments go to the training: --run.max_steps 50.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment
choose_ranks

step() { printf '\n== %s\n' "$*"; }

step "demo data and a tiny model -> demo/"
python tools/make_demo.py demo

step "training -> runs/demo/ (watch it with: tensorboard --logdir runs)"
deepspeed "${ranks[@]}" launch/train.py --config launch/recipes/demo.yaml "$@"

step "checkpoint -> Hugging Face folder runs/demo/model"
python tools/convert_ckpt.py runs/demo runs/demo/model --overwrite

step "held-out precision@1"
deepspeed "${ranks[@]}" launch/evaluate.py --model runs/demo/model --suite m3t --data demo/data/test.parquet --output runs/demo/evaluation

step "two queries through Embedder"
python - <<'PYTHON'
from muco_ds import Embedder

embedder = Embedder.from_pretrained("runs/demo/model")
query = embedder.encode([{"image": "demo/data/images/test/00000.png", "text": "Describe the picture."}, "a red circle"])
print("shape", query.shape, "cosine of the two", round(float(query[0] @ query[1]), 4))
PYTHON

printf '\n%s\n' "Done. Curves and pictures: tensorboard --logdir runs    Scores: runs/demo/evaluation/results.json    Model: runs/demo/model"
