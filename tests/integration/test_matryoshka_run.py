"""A run with several sizes of the embedding, from the recipe to sentence-transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from muco_ds import Embedder

from programs import EVALUATE, REPOSITORY, Demo, Programs, metrics, refusal

CONVERT = REPOSITORY / "tools" / "convert_ckpt.py"
SIZES, WIDTH = [8, 24], 96
TRUNCATED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from sentence_transformers_check import prepare_torchvision
libraries = prepare_torchvision()
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[2], device="cpu", local_files_only=True, truncate_dim=int(sys.argv[3]))
items = json.loads(sys.argv[4])
given = model.encode(items)
print(json.dumps({
    "given": given.tolist(),
    "unit": model.encode(items, normalize_embeddings=True).tolist(),
    "similarity": model.similarity(given, given).tolist(),
}))
"""


@pytest.fixture(scope="module")
def out(demo: Demo, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run on two ranks with two packs each, and its newest checkpoint converted to out/model."""
    out = tmp_path_factory.mktemp("sizes")
    overrides: dict[str, object] = {
        **{"loss.matryoshka": json.dumps(SIZES), "run.max_steps": 3, "batch.pack_tokens": 600},
        **{"validation.every": 3, "validation.rows": 4, "optim.lr": 1e-3},
        **{"evaluation.m3t.every": 3, "evaluation.m3t.rows": 4, "evaluation.m3t.data": demo.data / "test.parquet"},
    }
    programs.run(demo.train(out, overrides), ranks=2).check()
    programs.run([CONVERT, out / "run", out / "model"]).check()
    return out


def test_each_size_has_its_loss_and_its_validation(out: Path) -> None:
    for line in metrics(out):
        by_size = [line[f"loss_{size}"] for size in (*SIZES, WIDTH)]
        assert line["loss"] == pytest.approx(sum(by_size) / 3, rel=1e-5) and len(set(by_size)) == 3
    last = metrics(out)[-1]
    for name in ("overall", "turn_0"):
        scores = [last[f"val/{name}/precision@1{suffix}"] for suffix in ("", "@8", "@24")]
        assert all(0 <= score <= 1 for score in scores)
        # The same rows, by the way that benchmarks go.
        assert scores == [last[f"m3t/{name}/precision@1{suffix}"] for suffix in ("", "@8", "@24")]


def test_sizes_are_recorded_and_evaluated(out: Path, demo: Demo, programs: Programs, tmp_path: Path) -> None:
    assert json.loads((out / "model" / "muco_ds.json").read_text())["matryoshka"] == [*SIZES, WIDTH]
    assert Embedder.from_pretrained(str(out / "model"), device="cpu").sizes == [*SIZES, WIDTH]
    argv = [EVALUATE, "--model", out / "model", "--suite", "m3t", "--data", demo.data / "test.parquet"]
    jobs = [
        programs.start([*argv, "--output", tmp_path / name, *dims], ranks=2)
        for name, dims in (("recorded", []), ("asked", ["--dims", "4"]))
    ]
    for name, job, sizes in zip(("recorded", "asked"), jobs, (SIZES, [4]), strict=True):
        done, results = job.wait().check(), json.loads((tmp_path / name / "results.json").read_text())
        for entry in results.values():
            keys = {"precision@1", "queries", "candidates", "chance", *(f"precision@1@{size}" for size in sizes)}
            assert entry.keys() - {"left_out", "version"} == keys
        header = done.stdout[0].splitlines()[0].split()
        assert header == ["precision@1", *(f"precision@1@{size}" for size in sizes), "queries", "candidates", "chance"]
    too_many = programs.run([*argv, "--output", tmp_path / "no", "--dims", "4", "128"], ranks=2)
    assert "--dims holds 128 but the model's embeddings have 96 components" in refusal(too_many)


def test_sentence_transformers_cuts_to_the_same_embeddings(out: Path) -> None:
    apart = Path(sys.prefix) / "torchvision-only"
    if not apart.is_dir() and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: stock processors of these models need it")
    pytest.importorskip("sentence_transformers")
    items, paths = ["A blue square.", "No."], [str(REPOSITORY), *([str(apart)] if apart.is_dir() else [])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", TRUNCATED, str(Path(__file__).parent), str(out / "model"), "8", json.dumps(items)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = {name: np.array(value) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}
    ours_ND = Embedder.from_pretrained(str(out / "model"), device="cpu").encode(items, dim=8)
    np.testing.assert_allclose(seen["unit"], ours_ND, atol=1e-5)
    length_N1 = np.linalg.norm(seen["given"], axis=1, keepdims=True)
    assert (length_N1 < 0.99).all()  # what the model card says
    np.testing.assert_allclose(seen["given"] / length_N1, ours_ND, atol=1e-5)
    np.testing.assert_allclose(seen["similarity"], ours_ND @ ours_ND.T, atol=1e-5)
    assert "of 8, 24, 96 components" in (out / "model" / "README.md").read_text()


def test_a_size_that_the_model_has_not_is_refused(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    done = programs.run(demo.train(tmp_path, {"loss.matryoshka": "[64, 97]"}), ranks=2)
    assert "loss.matryoshka holds 97 but the model's embeddings have 96 components" in refusal(done)
    assert not (tmp_path / "run" / "checkpoints").exists()
