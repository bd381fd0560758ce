"""A training checkpoint as a stock Hugging Face folder, proven equal to the model that was trained.

DeepSpeed keeps the weights as flat fp32 pieces, one file per rank. They are mapped, not read, and put together one
tensor at a time. DeepSpeed's own `zero_to_fp32` holds the whole model for ZeRO-1 and 2, and all frozen weights for
ZeRO-3, in memory.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PretrainedConfig

from muco_ds.checkpoint import TAG, Place, read_meta
from muco_ds.errors import UserError
from muco_ds.export_adapter import Adapter, Weight, stored_weight
from muco_ds.export_st import read_json, write_json, write_processing, write_sentence_transformers
from muco_ds.families import FAMILIES
from muco_ds.manifest import MANIFEST, damaged, incomplete
from muco_ds.model_card import find_scores, model_card
from muco_ds.models.adapters import with_adapter
from muco_ds.models.backbones import load_backbone, load_config
from muco_ds.models.embedder import Embedder
from muco_ds.models.encode import encode_dialogues
from muco_ds.models.folder import SETTINGS_FILE, Processing, Settings, read_settings
from muco_ds.models.head import NAME as HEAD_NAME
from muco_ds.models.head import enlarged, tied
from muco_ds.models.probe import probe_dialogues
from muco_ds.safe_load import tensors_only

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PREFIX = "embedder.model."
"""Where the task keeps the stock model; behind it stand the stock model's own names."""

HEAD, TIED_ROWS = "head.weight", "head.trained_rows"
"""What the task that predicts tokens has beside it; a tied head's weights stand in `PREFIX`, too."""

MAX_SHARD = "4GB"

TOLERANCE = {"fp32": 1e-5, "bf16": 0.1}
"""Largest allowed L2 distance between unit vectors of the trained and the reloaded model.

The same kernels give 0. fp32: another packing gives 2e-6 with 28 layers of random weights. bf16: ZeRO-3's linear layer
rounds before it adds the bias, the stock one after, which gives 5e-3 with the demo's three layers and 0.036 with 28, as
much as bf16 differs from fp32; 0.1 is a cosine of 0.995. It also holds where only one of the two sides is bf16.
"""


@dataclass(frozen=True)
class Exported:
    """`difference` is the largest L2 distance between an embedding by the trained model and by the written one."""

    folder: Path
    checkpoint: Path
    dtype: str
    difference: float
    tolerance: float
    settings: Settings


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    merge_lora: bool = True,
    base: str | None = None,
    scores: Path | None = None,
    max_shard: str = MAX_SHARD,
    progress: bool = True,
) -> Exported:
    """Write `out` as a folder for AutoModel, AutoProcessor, SentenceTransformer and Embedder.

    It appears under its name only after it was loaded again and gave the embeddings that the checkpoint holds.

    Args:
        checkpoint: a `checkpoints/step_...` folder, or the folder of a run, of which the newest complete one is taken.
        out: new or empty; an earlier export with `overwrite`.
        dtype: "bf16" or "fp32"; default the run's precision. The fp32 master weights are rounded once.
        merge_lora: an adapter is added to its backbone's weights; else `out` is the adapter alone, for peft.
        base: the backbone of an adapter, if it is not any more where it was in training.
        scores: results.json of an evaluation, for the model card; default: those in the run's folder (`find_scores`).
        max_shard: largest safetensors file, such as "4GB".
    Raises:
        UserError: no complete checkpoint, a weight that is missing, embeddings that differ, `out` in use, `scores` that
            are none; an adapter of another model, or none to write alone.
    """
    _check_free(out, overwrite)
    checkpoint = _intact(find_checkpoint(checkpoint))
    meta, found = read_meta(checkpoint), find_scores(checkpoint, scores)
    dtype = dtype or meta["config"]["run"]["precision"]
    config = load_config(str(checkpoint / "hf"))
    weights, adapter = _stock_weights(checkpoint, meta, config, base)
    if adapter is None and not merge_lora:
        raise UserError(f"{checkpoint}: holds a whole model, no adapter: leave out --no-merge_lora")
    settings, work = read_settings(str(checkpoint / "hf")), out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(checkpoint / "hf", work)
        alone = None if merge_lora else adapter
        (work / "README.md").write_text(model_card(config, settings, meta, found, adapter=alone is not None), "utf-8")
        if alone is not None:
            (work / "config.json").unlink()  # it is no model by itself
            alone.write(work, config, DTYPES[dtype])
            embedder = _adapted(alone.base, work, settings, DTYPES[dtype])
        else:
            _write_stock(work, settings, config, DTYPES[dtype])
            write_weights(work, weights, DTYPES[dtype], max_shard, progress)
            embedder = Embedder.from_pretrained(str(work), dtype=DTYPES[dtype])
        difference, tolerance = _verify(embedder, checkpoint, meta, dtype)
        if overwrite:
            shutil.rmtree(out, ignore_errors=True)
        work.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: can't be written ({error}): free space or choose another folder") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Exported(out, checkpoint, dtype, difference, tolerance, settings)


def _stock_weights(
    checkpoint: Path, meta: dict[str, Any], config: PretrainedConfig, base: str | None
) -> tuple[dict[str, Weight], Adapter | None]:
    """All weights of the stock model, and the adapter that went into them, if there is one."""
    weights, adapter = checkpoint_weights(checkpoint / TAG, meta["zero_stage"]), None
    head = weights.pop(HEAD, None)  # a tied one is the embedding table
    if meta["config"]["model"].get("lora", {}).get("rank"):  # older checkpoints have no such section
        adapter = Adapter.of(checkpoint, meta, weights, base)
        weights = adapter.merged(config)
    _check_complete(weights, config, checkpoint)
    if meta["config"]["task"]["name"] == "coma_compress" and not tied(config):
        # A head that is not trained is still that of the backbone.
        if head is None:
            assert adapter is not None
            head = _untrained_head(adapter.base, config.text_config.vocab_size)
        weights[HEAD_NAME] = head
    return weights, adapter


def _untrained_head(base: str, rows: int) -> Weight:
    """That of a backbone, as training used it."""
    stored = stored_weight(base, HEAD_NAME)
    shape = torch.Size((max(rows, stored.shape[0]), stored.shape[1]))
    return Weight(shape, lambda: enlarged(stored.read(), rows))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest complete one of a run. Raises UserError."""
    if (path / MANIFEST).is_file() or path.name.startswith("step_"):
        return path
    for folder in (path, path / "checkpoints"):
        complete = Place(folder).complete()
        if complete:
            return complete[0]
    raise UserError(f"{path}: holds no complete checkpoint: give a runs/NAME or runs/NAME/checkpoints/step_... folder")


def _intact(checkpoint: Path) -> Path:
    if incomplete(checkpoint) is None and (problem := damaged(checkpoint)) is not None:
        raise UserError(f"{checkpoint}: {problem}: convert an older checkpoint")
    return checkpoint


def checkpoint_weights(folder: Path, stage: int) -> dict[str, Weight]:
    """The weights in DeepSpeed's files, under the stock model's names: fp32 masters where the optimizer has them.

    Raises:
        UserError: files that do not load or do not belong together, a ZeRO stage that is not known.
    """
    from deepspeed.utils.zero_to_fp32 import natural_keys  # seconds; a wrong path should not cost them

    if stage not in range(4):
        raise UserError(f"{folder}: written under ZeRO stage {stage}; stages 0 to 3 can be converted")

    def files(kind: str) -> list[Path]:
        return sorted(folder.glob(f"*_{kind}_states.pt"), key=lambda path: natural_keys(path.name))

    models = [_load(path) for path in files("model")]
    optimizers = [_load(path)["optimizer_state_dict"] for path in files("optim")]
    try:
        weights = _zero3_weights(models, optimizers) if stage == 3 else _zero12_weights(models[0], optimizers)
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{folder}: not laid out as DeepSpeed 0.19 writes ZeRO stage {stage} ({error!r})") from error
    return {name.removeprefix(PREFIX): weight for name, weight in weights.items() if name != TIED_ROWS}


def _load(path: Path) -> dict[str, Any]:
    try:
        with tensors_only(path):
            return torch.load(path, map_location="cpu", mmap=True)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{path}: does not load ({type(error).__name__}): convert another checkpoint") from error


def _zero3_weights(models: list[dict], optimizers: list[dict]) -> dict[str, Weight]:
    """Every rank holds the same rows of its part of each tensor; frozen tensors stand apart, in the model's dtype."""
    ranks = len(optimizers)
    flats = [state["fp32_flat_groups"] for state in optimizers]
    weights, offset = {}, 0
    frozen = models[0]["frozen_param_shapes"] or {}  # None where they were not saved
    for shapes in models[0]["param_shapes"]:
        for name, shape in shapes.items():
            part = math.ceil(shape.numel() / ranks)
            weights[name] = _joined(shape, [(flat, offset, part) for flat in flats])
            offset += part
    for name, shape in frozen.items():
        fragments = [model["frozen_param_fragments"][name] for model in models]
        weights[name] = _joined(shape, [([fragment], 0, fragment.numel()) for fragment in fragments])
    return weights


def _zero12_weights(model: dict, optimizers: list[dict]) -> dict[str, Weight]:
    """Each group of tensors is one long vector cut over the ranks. What no optimizer holds is whole in the model file.

    Also stage 0, where bf16 training has such vectors and fp32 training has none.
    """
    weights = {name: Weight(tensor.shape, tensor.detach) for name, tensor in model["module"].items()}
    if not optimizers:
        return weights
    paddings = optimizers[0].get("param_alignment_paddings")
    for group, shapes in enumerate(model["param_shapes"]):
        vector = [state["single_partition_of_fp32_groups"][group] for state in optimizers]
        offset = 0
        for i, (name, shape) in enumerate(shapes.items()):
            weights[name] = _joined(shape, [(vector, offset, shape.numel())])
            offset += shape.numel() + (paddings[group][i] if paddings else 0)
    return weights


Slice = tuple[Sequence[torch.Tensor], int, int]
"""Elements start .. start + length of some vectors laid end to end."""


def _joined(shape: torch.Size, slices: list[Slice]) -> Weight:
    def read() -> torch.Tensor:
        pieces = []
        for vectors, start, length in slices:
            for vector in vectors:
                piece = vector[start : start + length] if start < vector.numel() else vector[:0]
                pieces.append(piece)
                length -= piece.numel()
                start = max(start - vector.numel(), 0)
        joined = torch.cat(pieces)
        # ZeRO-3 pads the last rank's part.
        return joined[: shape.numel()].view(shape)

    return Weight(shape, read)


def _check_complete(weights: dict[str, Weight], config: PretrainedConfig, checkpoint: Path) -> None:
    with torch.device("meta"):
        expected = {name: weight.shape for name, weight in FAMILIES[config.model_type].model(config).named_parameters()}
    for name, shape in expected.items():
        if name not in weights:
            raise UserError(f"{checkpoint}: lacks the weight '{name}': convert another checkpoint")
        if weights[name].shape != shape:
            raise UserError(f"{checkpoint}: '{name}' is {tuple(weights[name].shape)}, its config says {tuple(shape)}")
    extra = sorted(weights.keys() - expected.keys())
    if extra:
        raise UserError(f"{checkpoint}: '{extra[0]}' is no weight of a {config.model_type} model")


@torch.no_grad()
def write_weights(folder: Path, weights: dict[str, Weight], dtype: torch.dtype, max_shard: str, progress: bool) -> None:
    """Write safetensors files, holding one of them in memory at a time, and the index if there are several."""
    sizes = {name: torch.empty(weight.shape, dtype=dtype, device="meta") for name, weight in sorted(weights.items())}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard)
    with tqdm(total=len(weights), desc="writing", unit="tensor", disable=not progress) as bar:

        def converted(name: str) -> torch.Tensor:
            bar.update()
            return weights[name].read().to(dtype, copy=True)

        for file, names in split.filename_to_tensors.items():
            save_file({name: converted(name) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _write_stock(folder: Path, settings: Settings, config: PretrainedConfig, dtype: torch.dtype) -> None:
    """What stock classes and sentence-transformers read beside the weights."""
    write_processing(folder, settings, config.model_type)
    write_sentence_transformers(folder, config.text_config.hidden_size, settings)
    raw = read_json(folder / "config.json")
    raw["architectures"] = [FAMILIES[config.model_type].model.__name__]
    for section in (raw, raw["text_config"], raw["vision_config"]):
        section["dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", raw)


def _adapted(base: str, folder: Path, settings: Settings, dtype: torch.dtype) -> Embedder:
    """The backbone with the adapter in a folder, by peft's means."""
    processing = Processing.load(str(folder), settings)
    vocabulary = len(processing.tokenizer)
    model = with_adapter(load_backbone(base, dtype=dtype, attention="auto", vocabulary=vocabulary), str(folder))
    embedder = Embedder(model, freeze_vision=True).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    embedder.packer = processing.packer(model.config)
    return embedder


def _verify(embedder: Embedder, checkpoint: Path, meta: dict, dtype: str) -> tuple[float, float]:
    """Compare embeddings of what was written and loaded with the checkpoint's: (largest L2 distance, limit)."""
    assert embedder.packer is not None
    probe_ND = encode_dialogues(
        embedder,
        embedder.packer,
        probe_dialogues(),
        pack_tokens=meta["config"]["batch"]["pack_tokens"],
        device=next(embedder.parameters()).device,
        shared=False,
    )
    trained_ND = load_file(checkpoint / "probe.safetensors")["probe_ND"]
    difference = (probe_ND - trained_ND).norm(dim=-1).max().item()
    tolerance = max(TOLERANCE[dtype], TOLERANCE[meta["config"]["run"]["precision"]])
    if not difference <= tolerance:  # also catches NaN
        raise UserError(
            f"{checkpoint}: the written model's embeddings differ from the trained one's by {difference:.1e} (limit "
            f"{tolerance:.0e}): its files are damaged, or it was trained on another kind of device (convert it there)"
        )
    return difference, tolerance


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file: give a folder to write")
    if not any(out.iterdir()):
        return
    exported = any((out / name).is_file() for name in ("modules.json", "adapter_config.json"))
    if not ((out / SETTINGS_FILE).is_file() and exported):
        raise UserError(f"{out}: holds files that are no exported model: choose another folder")
    if not overwrite:
        raise UserError(f"{out}: holds an exported model: add --overwrite or choose another folder")
