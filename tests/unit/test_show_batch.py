"""tools/show_batch.py draws a packed batch of a user's data; as one process it is not held to a run's batch size."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from muco_ds.data.batch_picture import ROLES

from demo import MAX_PIXELS, MIN_PIXELS, Demo

TOOL = Path(__file__).parents[2] / "tools" / "show_batch.py"


def test_a_batch_that_needs_many_ranks_is_drawn_by_one(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {
        "run": {"name": "x", "epochs": 1},
        "model": {"path": str(demo.model)},
        "task": {"query_history": 0.0, "target_history": 1.0},
        "data": {
            "train": str(demo.train),
            "images": str(demo.images),
            "index_dir": str(tmp_path / "index"),
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
        },
        "batch": {"images": 64, "pack_tokens": 512},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "batch.png"
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--config", str(tmp_path / "recipe.yaml"), "--output", str(out)])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert exit_info.value.code == 0
    pixels = np.asarray(Image.open(out).convert("RGB")).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
    assert set(ROLES.values()) <= colours, "every role of a token is seen"
