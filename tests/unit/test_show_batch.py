"""tools/show_batch.py draws a packed batch of a user's data; as one process it is not held to a run's batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from muco_ds.data import batch_picture as batch_picture_module
from muco_ds.data.batch_picture import ROLES

from demo import MAX_PIXELS, MIN_PIXELS, Demo, run_here

TOOL = Path(__file__).parents[2] / "tools" / "show_batch.py"


SECTIONS: dict[str, Any] = {
    "turns": {"task": {"query_history": 0.0, "target_history": 1.0}},
    "conversations": {"task": {"name": "coma_compress"}, "model": {"compression_tokens": 6}},
}


def drawn(demo: Demo, folder: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]) -> np.ndarray:
    """Pixels of the picture of a batch that is larger than a pack."""
    data = {"images": str(demo.images), "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
    data["train"] = str(demo.train.with_name("conversations_train.jsonl") if "model" in sections else demo.train)
    recipe = {
        "run": {"name": "x", "epochs": 1},
        "task": sections["task"],
        "model": {"path": str(demo.model), **sections.get("model", {})},
        "data": {**data, "index_dir": str(folder / "index")},
        "batch": {"images": 64, "pack_tokens": 512},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = folder / "batch.png"
    assert run_here(monkeypatch, TOOL, "--config", folder / "recipe.yaml", "--output", out) == 0
    return np.asarray(Image.open(out).convert("RGB"))


@pytest.mark.parametrize("name", SECTIONS)
def test_a_batch_that_needs_many_ranks_is_drawn_by_one(
    name: str, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = drawn(demo, tmp_path, monkeypatch, SECTIONS[name]).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
    assert set(ROLES.values()) <= colours, "every role of a token is seen"


def test_answers_are_drawn_to_see_the_tokens_and_no_picture(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = drawn(demo, tmp_path, monkeypatch, SECTIONS["conversations"])
    left = batch_picture_module._PAD + batch_picture_module._BAR // 2  # in the bar of roles beside the plot
    seen: dict[str, set[tuple[int, ...]]] = {role: set() for role in ROLES}
    for line in pixels[:, : 2 * batch_picture_module._PAD + batch_picture_module._BAR + batch_picture_module._PLOT]:
        for role, colour in ROLES.items():
            if tuple(line[left]) == colour:
                seen[role] |= {tuple(pixel) for pixel in line[left + batch_picture_module._BAR :].tolist()}
    for role in ("question", "target"):
        assert ROLES["pooled token"] in seen[role] and ROLES["target"] in seen[role]
        assert ROLES["picture"] not in seen[role]
    assert ROLES["picture"] in seen["pooled token"] and ROLES["target"] not in seen["pooled token"]
