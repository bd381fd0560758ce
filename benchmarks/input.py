#!/usr/bin/env python3
"""What a core of the input side gets done: pictures a second, and how many cores a GPU needs.

    python benchmarks/input.py [--gpu_images_per_s 40] [--pictures FOLDER]

Seconds are those of a core (CPU time of one thread): other work on the machine changes them little; only `loader` is by
the clock. Beside ours stands the stock image processor, float32 patches as it gives them; what the vision tower reads
is compared bit by bit. Pictures are JPEGs of 853 x 640 (M3T's limits set the short side to 640) of about 120 KB, or
those of a folder.

- decode, resize, layout, picture: of one picture; `stock_picture`: with the stock processor
- pack: a training pack from rows: reading, drawing turns, pictures, tokeniser, layout of the row
- handed_over: the same, and then moved to the memory that a worker shares with the training process
- loader: whole steps with 1 and 2 workers, their start included
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import Qwen2VLConfig

from muco_ds.config_lora import LoraOptions
from muco_ds.data.collator import Collator, Packer
from muco_ds.data.decode import decode, keep_memory
from muco_ds.data.demo_scenes import row_texts, write_data
from muco_ds.data.images import ImageLimits, ImagePipeline, Patches
from muco_ds.data.index import Indexer, open_index
from muco_ds.data.loader import StepDataset, step_batches
from muco_ds.data.mixture import Mixture
from muco_ds.data.plan import Plan
from muco_ds.data.readers import IMAGE_MARK, M3T_SCHEMA, M3TReader
from muco_ds.data.schema import ImageRef
from muco_ds.data.stages.muco import MuCoStage
from muco_ds.flops import PEAK_BF16_FLOPS, FlopsModel
from muco_ds.models.demo_model import write_model
from muco_ds.models.folder import Processing, Settings
from muco_ds.ops.patches import patch_values

from harness import ROOT, percentiles, provenance, record
from plan import MAX_PIXELS, MIN_PIXELS, QUESTION_TOKENS, SHORT_SIDE, TARGET_TOKENS

LIMITS = ImageLimits(MIN_PIXELS, MAX_PIXELS, SHORT_SIDE)
MFU = 0.45
"""That a GPU is taken to reach, to know how many pictures it takes."""

LORA = LoraOptions(rank=64)
TARGET = 60
"""Pictures a second and core that we want at least."""


class StockPipeline(ImagePipeline):
    """What was done until bytes crossed: the stock processor's float32 patches, a still picture's two frames each."""

    def patches(self, ref: ImageRef) -> Patches:
        image = decode(ref)
        size = self._first_size(*image.size)
        image = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
        limits = {"shortest_edge": self.limits.min_pixels, "longest_edge": self.limits.max_pixels}
        out = self.processor(images=[image], size=limits, return_tensors="np")
        return Patches(out["pixel_values"], tuple(out["image_grid_thw"][0].tolist()))


def write_picture(path: Path, width: int, height: int, seed: int) -> None:
    """Soft shapes under fine grain: as much to decode as in a photograph."""
    rng = np.random.default_rng(seed)
    grain = rng.normal(0, 4, (height, width, 1)).astype(np.float32)
    soft = Image.fromarray(rng.integers(0, 256, (18, 24, 3), dtype=np.uint8)).resize((width, height), 3)
    Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def write_rows(folder: Path, names: list[str], rows: int, vocabulary: list[str]) -> None:
    """Seven turns a picture, texts of words drawn from `vocabulary`."""
    rng = np.random.default_rng(0)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choice(vocabulary, int(rng.integers(least, most + 1))))

    table = [
        {
            "qry": [[IMAGE_MARK + text(*QUESTION_TOKENS)] for _ in TARGET_TOKENS],
            "pos_text": [text(*bounds) for bounds in TARGET_TOKENS],
            "qry_image_path": names[i % len(names)],
        }
        for i in range(rows)
    ]
    pq.write_table(pa.Table.from_pylist(table, schema=M3T_SCHEMA), folder / "rows.parquet")


def flops_2b() -> FlopsModel:
    """Of Qwen2-VL-2B, trained as in muco_2b_pretrain: adapters in the text tower, the vision tower frozen."""
    text = {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
    text |= {"intermediate_size": 8960, "vocab_size": 151936}
    config = Qwen2VLConfig(text_config=text, vision_config={"hidden_size": 1536})
    return FlopsModel.from_config(config, train_vision=False, lora=LORA)


class Bench:
    """Rows, packs and steps of one way to make patches, on files in a folder."""

    def __init__(self, folder: Path, images: ImagePipeline, packer: Packer, pack: int, steps: int) -> None:
        packer = Packer(packer.template, images, packer.vision)
        reader = M3TReader(str(folder / "rows.parquet"), str(folder / "images"))
        indexer = Indexer(reader, packer.template, images)
        index = open_index(indexer, str(folder / "index"), builder=True, processes=1, progress=False)
        stage = MuCoStage(index, reader, packer.template, seed=0, query_history=1.0, target_history=1.0)
        mixture = Mixture([len(index)], [None], images=pack, run=1, seed=0)
        plan = Plan(stage, flops_2b(), mixture, pack_tokens=10**6, world_size=1)
        self.collator = Collator(stage, packer)
        self.dataset = StepDataset(plan, self.collator, 0, max_steps=steps)
        self.rows = np.arange(pack)

    def pack(self) -> Any:
        return self.collator(self.rows, np.zeros_like(self.rows), 0)

    def handed_over(self) -> None:
        """As the loader does it: pickled, which moves tensors to shared memory."""
        ForkingPickler.dumps(self.pack())

    def load(self, workers: int) -> int:
        return sum(batch.images for batch in step_batches(self.dataset, 0, workers=workers, pin_memory=False))


def cpu_seconds(fns: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """As `harness.sample`, in seconds of this process's core."""
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    for turn in range(-1, repeats):
        for name, fn in fns.items():
            started = time.process_time()
            fn()
            if turn >= 0:
                seconds[name].append(time.process_time() - started)
    return seconds


def compare(ours: ImagePipeline, stock: ImagePipeline, paths: list[str]) -> None:
    """What the vision tower reads is the same to the last bit."""
    palette_CV = torch.from_numpy(ours.palette_CV)
    for path in paths:
        own, other = ours.patches(path), stock.patches(path)
        values_PC = patch_values(torch.from_numpy(own.pixels_PY), palette_CV, 2, torch.float32)
        assert own.grid == other.grid and torch.equal(values_PC, torch.from_numpy(other.pixels_PY)), path


def each(fn: Callable[[Any], object], items: list[Any]) -> Callable[[], None]:
    def all_of_them() -> None:
        for item in items:
            fn(item)

    return all_of_them


def measure(folder: Path, paths: list[str], options: argparse.Namespace) -> dict[str, Any]:
    processing = Processing.load(str(folder / "model"), Settings("<|emb|>", MIN_PIXELS, MAX_PIXELS, SHORT_SIDE))
    packer = processing.packer()
    ours, stock = packer.images, StockPipeline(processing.image_processor, LIMITS)
    compare(ours, stock, paths[:2])
    steps = {
        name: Bench(folder, images, packer, options.pack, options.steps)
        for name, images in {"ours": ours, "stock": stock}.items()
    }
    decoded = [decode(path) for path in paths]
    free = ImagePipeline(processing.image_processor, ImageLimits(MIN_PIXELS, MAX_PIXELS))
    sizes = [(columns * 14, rows * 14) for _, rows, columns in (free.grid(*image.size) for image in decoded)]
    resized = [image.resize(size) for image, size in zip(decoded, sizes, strict=True)]
    packs = {name: side.pack() for name, side in steps.items()}
    per_picture: dict[str, Callable[[], object]] = {
        "decode": each(decode, paths),
        "resize": each(lambda pair: pair[0].resize(pair[1], 3), list(zip(decoded, sizes, strict=True))),
        "layout": each(free.patches, resized),
        "picture": each(ours.patches, paths),
        "stock_picture": each(stock.patches, paths),
    }
    per_pack: dict[str, Callable[[], object]] = {}
    for name, prefix in (("ours", ""), ("stock", "stock_")):
        per_pack[f"{prefix}pack"] = steps[name].pack
        per_pack[f"{prefix}handed_over"] = steps[name].handed_over
    times = cpu_seconds({**per_picture, **per_pack}, options.repeats)
    count = {**dict.fromkeys(per_picture, len(paths)), **dict.fromkeys(per_pack, options.pack)}
    cpu_ms = {name: percentiles([1e3 * s / count[name] for s in seconds]) for name, seconds in times.items()}
    batch = steps["ours"].dataset[0]
    assert not hasattr(batch, "args"), batch
    return {
        "shape": {
            "jpeg_bytes": round(np.mean([os.path.getsize(path) for path in paths])),
            "size": list(decoded[0].size),
            "resized": list(sizes[0]),
            "tokens_per_picture": round(packs["ours"].tokens / options.pack),
            "pictures_per_pack": options.pack,
        },
        "pixel_bytes_per_picture": {name: one.pixels_PY.nbytes // options.pack for name, one in packs.items()},
        "cpu_ms_per_picture": cpu_ms,
        "loader_pictures_per_s": {name: loader(side) for name, side in steps.items()},
        "load_average": round(os.getloadavg()[0], 1),
        "flops_per_picture": batch.cost["flops"] / batch.images,
    }


def loader(side: Bench) -> dict[str, float]:
    """Pictures a second by the clock, the workers' start included."""
    found = {}
    for workers in (1, 2):
        started = time.perf_counter()
        images = side.load(workers)
        found[f"{workers} workers"] = float(f"{images / (time.perf_counter() - started):.3g}")
    return found


def summary(found: dict[str, Any], gpu_images_per_s: float | None) -> dict[str, Any]:
    """Pictures a second of a core, in a pack that is handed over, and the cores that feed a GPU."""
    cpu_ms = {name: spread["p50"] for name, spread in found["cpu_ms_per_picture"].items()}
    rates = {side: 1e3 / cpu_ms[f"{side}handed_over"] for side in ("", "stock_")}
    computed = MFU * PEAK_BF16_FLOPS["H200"] / found["flops_per_picture"]
    images_per_s = computed if gpu_images_per_s is None else gpu_images_per_s
    source = f"computed: Qwen2-VL-2B, LoRA, seven turns, MFU {MFU} on an H200" if gpu_images_per_s is None else "given"
    return {
        "pictures_per_s_per_core": round(rates[""], 1),
        "pictures_per_s_per_core_stock": round(rates["stock_"], 1),
        "target": TARGET,
        "gpu_images_per_s": round(images_per_s, 1),
        "gpu_images_per_s_is": source,
        "cores_per_gpu": round(images_per_s / rates[""], 2),
        "cores_per_gpu_stock": round(images_per_s / rates["stock_"], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="folder of JPEGs to take instead of generated ones")
    parser.add_argument("--size", type=int, nargs=2, default=(853, SHORT_SIDE), help="of generated pictures")
    parser.add_argument("--pack", type=int, default=16, help="pictures of a pack")
    parser.add_argument("--steps", type=int, default=6, help="steps of a pack that the loader is timed for")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--gpu_images_per_s", type=float, help="default: computed from model FLOPs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "input.jsonl")
    options = parser.parse_args()
    own = sorted(options.pictures.glob("*.jp*g"))[: options.pack] if options.pictures else []
    if options.pictures and not own:
        parser.error(f"--pictures {options.pictures}: holds no JPEG")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core does all of it, as in a worker
    keep_memory()  # as in a worker
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary = row_texts(write_data(folder / "scenes", 32, 1, seed=0))
        write_model(folder / "model", vocabulary, seed=0)
        (folder / "images").mkdir()
        for i, path in enumerate(own):
            (folder / "images" / f"{i}.jpg").write_bytes(path.read_bytes())
        for i in range(0 if own else options.pack):
            write_picture(folder / "images" / f"{i}.jpg", options.size[0], options.size[1], seed=i)
        paths = sorted(str(path) for path in (folder / "images").iterdir())
        words = sorted({word for text in vocabulary for word in text.split()})
        write_rows(folder, [Path(path).name for path in paths], 2 * options.pack, words)
        found = measure(folder, paths, options)
    result = summary(found, options.gpu_images_per_s)
    record(options.results, {"benchmark": "input", **found, **result, **provenance()})
    print(
        f"{result['pictures_per_s_per_core']} pictures/s per core (stock processor: "
        f"{result['pictures_per_s_per_core_stock']}; wanted: {TARGET}); a GPU at {result['gpu_images_per_s']} "
        f"pictures/s ({result['gpu_images_per_s_is']}) needs {result['cores_per_gpu']} cores"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
