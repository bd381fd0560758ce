"""A tiny model and small data sets that the tests of the data side share."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoConfig

from muco_ds.data.collator import Collator, Packer
from muco_ds.data.demo_scenes import row_texts, write_data
from muco_ds.data.index import QUESTION, SAMPLE, TURN, Index, Indexer, Part, open_index
from muco_ds.data.mixture import Mixture
from muco_ds.data.plan import Plan
from muco_ds.data.readers import M3T_SCHEMA, M3TReader
from muco_ds.data.stages.muco import MuCoStage
from muco_ds.flops import FlopsModel
from muco_ds.models.demo_model import write_model
from muco_ds.models.folder import Processing, Settings

TRAIN_SCENES, TEST_SCENES = 64, 16
MIN_PIXELS, MAX_PIXELS = 56 * 56, 112 * 112


@dataclass(frozen=True)
class Demo:
    """Folders of a demo: `model`, and `data` with train.parquet, test.parquet and images."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def train(self) -> Path:
        return self.root / "data" / "train.parquet"

    @property
    def images(self) -> Path:
        return self.root / "data" / "images"

    def packer(self, pool_token: str = "<|emb|>", short_side: int | None = None) -> Packer:
        settings = Settings(pool_token, MIN_PIXELS, MAX_PIXELS, short_side)
        return Processing.load(str(self.model), settings).packer()

    def flops(self) -> FlopsModel:
        return FlopsModel.from_config(AutoConfig.from_pretrained(self.model), train_vision=True)


@dataclass(frozen=True)
class Rows:
    """A data set that is ready to be planned and collated."""

    reader: M3TReader
    index: Index
    packer: Packer
    flops: FlopsModel

    def plan(
        self, world_size: int = 1, images: int = 8, pack_tokens: int = 8192, seed: int = 0, history: float = 0.5
    ) -> Plan:
        mixture = Mixture([len(self.index)], [None], images=images, run=1, seed=seed)
        return Plan(self.stage(seed, history), self.flops, mixture, pack_tokens=pack_tokens, world_size=world_size)

    def collator(self, seed: int = 0, history: float = 0.5) -> Collator:
        return Collator(self.stage(seed, history), self.packer)

    def stage(self, seed: int = 0, history: float = 0.5) -> MuCoStage:
        draw = {"query_history": history, "target_history": history}
        return MuCoStage(self.index, self.reader, self.packer.template, seed=seed, **draw)


def build_demo_folder(root: Path) -> Demo:
    rows = write_data(root / "data", TRAIN_SCENES, TEST_SCENES, seed=0)
    write_model(root / "model", row_texts(rows), seed=0)
    return Demo(root)


def run_here(monkeypatch: pytest.MonkeyPatch, tool: Path, *args: object) -> int:
    """Exit status of a tool run in this process: without the seconds that imports take."""
    monkeypatch.setattr(sys, "argv", [str(tool), *map(str, args)])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(tool), run_name="__main__")
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema | None = None) -> Path:
    """A parquet file of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), path)
    return path


def row(
    qry: list[list[str]], pos_text: list[str], qry_image_path: str = "", pos_image_path: str = ""
) -> dict[str, Any]:
    return {
        "qry": qry,
        "pos_text": pos_text,
        "qry_image_path": qry_image_path,
        "pos_image_path": pos_image_path,
        "qry_sentence": "",
        "pos_sentence": pos_text,
        "neg_text": [],
    }


def write_picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A noisy RGB picture, so that no two are alike and nothing compresses to a flat colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise_HWC = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise_HWC).save(path)
    return path


def mixed_rows(images: Path, count: int = 40) -> list[dict[str, Any]]:
    """Ragged rows: 1 to 5 turns, 1 to 3 paraphrases of unlike lengths, pictures of many sizes on both sides or none."""
    rng = np.random.default_rng(7)
    for i in range(12):
        write_picture(images / f"{i}.png", int(rng.integers(20, 200)), int(rng.integers(20, 200)), seed=i)
    words = ["red", "green", "blue", "big", "small", "square", "where", "what", "name", "the", "2", "a"]

    def text() -> str:
        return " ".join(rng.choice(words, int(rng.integers(1, 12))))

    rows = []
    for i in range(count):
        turns = int(rng.integers(1, 6))
        questions = [[f"<|image_1|>\n{text()}" for _ in range(int(rng.integers(1, 4)))] for _ in range(turns)]
        query_image = "" if i % 4 == 0 else f"{i % 12}.png"
        target_image = f"{(i + 5) % 12}.png" if i % 7 == 0 else ""
        rows.append(row(questions, [f"{text()} {i} {j}" for j in range(turns)], query_image, target_image))
    return rows


def open_data(demo: Demo, parquet: Path, images: Path, index_dir: Path, processes: int = 1) -> Rows:
    packer = demo.packer()
    reader = M3TReader(str(parquet), str(images))
    indexer = Indexer(reader, packer.template, packer.images)
    index = open_index(indexer, str(index_dir), builder=True, processes=processes, progress=False)
    return Rows(reader, index, packer, demo.flops())


def write_mixed(root: Path, count: int = 40) -> tuple[Path, Path]:
    """The parquet file and the picture folder of `mixed_rows`."""
    return write_rows(root / "mixed.parquet", mixed_rows(root / "images", count), M3T_SCHEMA), root / "images"


def synthetic_index(samples: int, seed: int = 0, paraphrases: int = 3) -> Index:
    """Rows of one to seven turns with pictures of 64 to 5120 patches, never read from a file."""
    rng = np.random.default_rng(seed)
    turns_S = rng.integers(1, 8, samples)
    sample_array, turn_array = np.zeros(samples, SAMPLE), np.zeros(turns_S.sum(), TURN)
    patches_S = 4 * rng.integers(16, 1280, samples)
    sample_array["row"] = np.arange(samples) * 3
    sample_array["turn_end"] = np.cumsum(turns_S)
    sample_array["query_images"] = 1
    sample_array["query_image_tokens"] = patches_S // 4
    sample_array["patches"], sample_array["patches_squared"] = patches_S, patches_S**2
    choices_N = rng.integers(1, paraphrases + 1, len(turn_array))
    turn_array["kind"] = np.concatenate([np.arange(turns) for turns in turns_S])
    turn_array["question_end"] = np.cumsum(choices_N)
    turn_array["target_tokens"] = rng.integers(1, 60, len(turn_array))
    questions = rng.integers(1, 60, choices_N.sum()).astype(QUESTION)
    parts = (Part("data.train", samples, 0),)
    return Index(Path("nowhere"), sample_array, turn_array, questions, 0, 0, "made up", parts)
