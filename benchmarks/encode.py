#!/usr/bin/env python3
"""Embedder.encode against sentence-transformers' padded encode of the same exported folder.

    python benchmarks/encode.py [--preset {toy,cpu,gpu}] [--only WORKLOAD ...] [--repeats 5]

Both load one folder with random weights, in the same dtype with the same threads. sentence-transformers sorts by length
by itself and gets the best of several batch sizes for each workload (and of its attention implementations); ours runs
as it comes. Pictures are files that neither side has to resize; sentence-transformers gets them opened but not decoded,
because its sorting looks at their sizes. Before anything is timed, the embeddings of both must agree.

`ratio` is the seconds of sentence-transformers over ours; `ratio_cpu_seconds` that of the time of all cores, for a
machine that others use as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from harness import ROOT, percentiles, provenance, record, sample
from torchvision_operators import prepare_torchvision

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest difference of a component; 16 bits round differently where batches differ."""


@dataclass(frozen=True)
class Preset:
    """A model's shape and how much it encodes."""

    device: str
    dtype: torch.dtype
    text: dict[str, int]
    vision: dict[str, int]
    sections: list[int]  # of mRoPE
    items: int  # of each workload
    sides: tuple[int, int]  # of pictures, in merged patches
    batch_sizes: tuple[int, ...]


def _text(hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (hidden, inner, layers, heads, kv), strict=True))


def _vision(width: int, depth: int, heads: int) -> dict[str, int]:
    return {"embed_dim": width, "depth": depth, "num_heads": heads}


PRESETS = {
    "toy": Preset(
        "cpu", torch.float32, _text(96, 256, 2, 4, 2), _vision(64, 2, 4), [4, 4, 4], 8, (2, 4), batch_sizes=(4,)
    ),
    "cpu": Preset(
        "cpu",
        torch.float32,
        _text(384, 1024, 4, 6, 2),
        _vision(256, 4, 4),
        [8, 12, 12],
        56,
        (4, 16),
        (1, 2, 4, 8),
    ),
    "gpu": Preset(
        "cuda",
        torch.bfloat16,
        _text(1536, 8960, 28, 12, 2),
        _vision(1280, 32, 16),
        [16, 24, 24],
        512,
        (8, 24),
        (16, 64, 256),
    ),
}


def write_model(folder: Path, preset: Preset) -> None:
    """A folder with random weights as tools/convert_ckpt.py leaves it."""
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration

    from muco_ds.data.demo_scenes import row_texts, write_data
    from muco_ds.export_st import write_processing, write_sentence_transformers
    from muco_ds.models.demo_model import write_model as write_demo
    from muco_ds.models.folder import Processing, Settings

    start = folder / "start"
    write_demo(start, row_texts(write_data(folder / "data", 64, 1, seed=0)), seed=0)
    config = AutoConfig.from_pretrained(start)
    text, vision = config.text_config, config.vision_config
    text.update(preset.text)
    text.rope_parameters = {**text.rope_parameters, "mrope_section": preset.sections}
    text.head_dim, text.layer_types = text.hidden_size // text.num_attention_heads, None
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    vision.update(preset.vision)
    vision.hidden_size = text.hidden_size
    config.architectures = ["Qwen2VLModel"]
    settings = Settings("<|emb|>", 28 * 28, 28 * 28 * 1280, short_side=None)
    processing = Processing.load(str(start), settings)
    model = folder / "model"
    processing.save(model, config)
    torch.manual_seed(0)
    with torch.device(preset.device):
        Qwen2VLForConditionalGeneration(config).model.to(preset.dtype).save_pretrained(model)
    write_processing(model, settings, config.model_type)
    write_sentence_transformers(model, text.hidden_size, settings)


@dataclass(frozen=True)
class Workload:
    """The same items for both: `ours` with paths of pictures, `theirs` with what opens them."""

    ours: list[Any]
    rows: int

    def theirs(self) -> list[Any]:
        """The items with their pictures opened anew, so that each run decodes them."""

        def opened(item: Any) -> Any:
            if isinstance(item, str):
                return item
            return Image.open(item["image"]) if "text" not in item else {**item, "image": Image.open(item["image"])}

        return [opened(item) for item in self.ours]


class Writer:
    """Draws texts by their number of tokens, and pictures."""

    def __init__(self, folder: Path, preset: Preset, template: Any) -> None:
        from muco_ds.models.demo_model import ENGLISH

        self.folder, self.preset, self.rng = folder, preset, np.random.default_rng(0)
        self.words = ENGLISH.split()
        self.tokens_of = np.array([len(ids) for ids in template.encode_words(" ".join(self.words))])

    def text(self, tokens: int) -> str:
        """Words of at least so many tokens."""
        drawn = self.rng.integers(len(self.words), size=tokens)
        needed = int(np.searchsorted(self.tokens_of[drawn].cumsum(), tokens)) + 1
        return " ".join(self.words[i] for i in drawn[:needed])

    def texts(self, count: int) -> list[str]:
        """Log-normal lengths, 5 to 400 tokens, half of them under 40."""
        lengths = np.exp(self.rng.normal(np.log(40), 1, count)).clip(5, 400).astype(int)
        return [self.text(length) for length in lengths.tolist()]

    def picture(self, i: int) -> str:
        """Path of a JPEG of whole merged patches."""
        path = self.folder / f"{i}.jpg"
        width, height = 28 * self.rng.integers(self.preset.sides[0], self.preset.sides[1], 2, endpoint=True)
        coarse = self.rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path, quality=90)
        return str(path)


def workloads(writer: Writer, items: int) -> dict[str, Workload]:
    few = max(items // 7, 2)
    paths = [writer.picture(i) for i in range(few)]
    pictures = [{"image": path} for path in paths]
    mixed: list[Any] = writer.texts(items - items // 4)
    mixed += [{"image": path, "text": writer.text(12)} for path in paths[: items // 8]] + pictures[-(items // 8) :]
    order = writer.rng.permutation(len(mixed))
    asked = [{"image": path, "text": writer.text(int(writer.rng.integers(6, 30)))} for path in paths for _ in range(7)]
    found: dict[str, list[Any]] = {
        "texts": writer.texts(items),
        "pictures": pictures,
        "mixed": [mixed[i] for i in order],
        "seven_questions": asked,
    }
    return {name: Workload(given, len(given)) for name, given in found.items()}


class Theirs:
    """SentenceTransformer at its best batch size, and its best attention where there is a choice."""

    def __init__(self, path: Path, preset: Preset) -> None:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import is_flash_attn_2_available

        kinds = ["sdpa"]
        if preset.device == "cuda" and is_flash_attn_2_available():
            kinds.append("flash_attention_2")
        self.models = {
            kind: SentenceTransformer(
                str(path),
                device=preset.device,
                local_files_only=True,
                model_kwargs={"dtype": preset.dtype, "attn_implementation": kind},
            )
            for kind in kinds
        }
        self.batch_sizes, self.on_cpu = preset.batch_sizes, preset.device == "cpu"

    def encode(self, workload: Workload, setting: tuple[str, int]) -> np.ndarray:
        kind, batch_size = setting
        items = workload.theirs()
        return np.asarray(
            self.models[kind]
            .encode(items, batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True)
            .float()
            .cpu()
        )

    def best(self, workload: Workload) -> tuple[tuple[str, int], dict[str, float]]:
        """Setting with the least seconds, the faster of two runs each, and those of all."""
        seconds: dict[tuple[str, int], float] = {}
        for kind in self.models:
            for batch_size in self.batch_sizes:
                setting = kind, batch_size
                try:
                    seconds[setting] = min(
                        timed(partial(self.encode, workload, setting), self.on_cpu) for _ in range(2)
                    )
                except torch.OutOfMemoryError:
                    break
        best = min(seconds, key=seconds.__getitem__)
        return best, {f"{kind}/{size}": round(value, 4) for (kind, size), value in seconds.items()}


def timed(work: Callable[[], object], on_cpu: bool) -> float:
    """Seconds; those of all cores where they compute, so that the choice is not the machine's mood."""
    clock = time.process_time if on_cpu else time.perf_counter
    started = clock()
    work()
    return clock() - started


def measure(name: str, workload: Workload, ours: Any, theirs: Theirs, preset: Preset, repeats: int) -> dict[str, Any]:
    def run_ours() -> np.ndarray:
        return ours.encode(workload.ours)

    setting, tried = theirs.best(workload)
    difference = float(np.abs(run_ours() - theirs.encode(workload, setting)).max())
    limit = TOLERANCE[preset.dtype]
    assert difference <= limit, f"{name}: embeddings differ by {difference:.1e} (limit {limit:.0e})"
    used: dict[str, list[float]] = {"ours": [], "theirs": []}
    runs: dict[str, Callable[[], object]] = {"ours": run_ours, "theirs": partial(theirs.encode, workload, setting)}
    times = sample({side: partial(_counted, run, used[side]) for side, run in runs.items()}, repeats)
    spread = {side: percentiles(values) for side, values in times.items()}
    # What a busy machine leaves alone; of all threads, and of no meaning where a GPU computes.
    cpu = {side: percentiles(values[-repeats:]) for side, values in used.items()} if preset.device == "cpu" else {}
    return {
        "benchmark": f"encode/{name}",
        "rows": workload.rows,
        "dtype": str(preset.dtype).removeprefix("torch."),
        "text": preset.text,
        "vision": preset.vision,
        "max_difference": float(f"{difference:.2g}"),
        "sentence_transformers": {"setting": "/".join(map(str, setting)), "seconds_of_settings": tried},
        "seconds": spread,
        "cpu_seconds": cpu,
        "rows_per_s": {side: round(workload.rows / found["p50"], 1) for side, found in spread.items()},
        "ratio": round(spread["theirs"]["p50"] / spread["ours"]["p50"], 2),
        "ratio_cpu_seconds": round(cpu["theirs"]["p50"] / cpu["ours"]["p50"], 2) if cpu else None,
    }


def _counted(run: Callable[[], object], seconds: list[float]) -> None:
    started = time.process_time()
    run()
    seconds.append(time.process_time() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "gpu" if torch.cuda.is_available() else "cpu"
    names = ["texts", "pictures", "mixed", "seven_questions"]
    parser.add_argument("--preset", choices=PRESETS, default=default, help="default: by the device")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "encode.jsonl")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    missing = [name for name in ("sentence_transformers", "torchvision") if importlib.util.find_spec(name) is None]
    if missing or (preset.device == "cuda" and not torch.cuda.is_available()):
        print(f"skipped: {' and '.join(missing)} not installed" if missing else "skipped: there is no GPU")
        return 0
    libraries = prepare_torchvision()  # before transformers is imported; must stay alive

    from muco_ds import Embedder

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), preset)
        path = Path(folder) / "model"
        ours = Embedder.from_pretrained(str(path), device=preset.device, dtype=preset.dtype)
        assert ours.packer is not None
        theirs = Theirs(path, preset)
        found = workloads(Writer(Path(folder), preset, ours.packer.template), preset.items)
        for name in args.only:
            entry = measure(name, found[name], ours, theirs, preset, args.repeats)
            record(args.results, {**entry, "preset": args.preset, **provenance()})
    del libraries
    return 0


if __name__ == "__main__":
    sys.exit(main())
