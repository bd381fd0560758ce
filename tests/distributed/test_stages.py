"""Each stage against a reference written by hand: loss and every gradient, in float64, on 1 and 2 ranks, in any packs.

The reference runs the stock model with its dense mask on one prompt at a time, and sums the loss in plain loops over
what the rows of the data file say; from the package it takes only what was drawn (texts, masks, negatives).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModel, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from muco_ds.build import Data, build_data, build_task
from muco_ds.config import (
    BatchOptions,
    DataOptions,
    LossOptions,
    ModelOptions,
    OptimOptions,
    RunConfig,
    RunOptions,
    TaskOptions,
)
from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.config_curriculum import CurriculumOptions
from muco_ds.data.demo_scenes import row_texts, write_data
from muco_ds.data.images import decode
from muco_ds.data.schema import NEGATIVE, QUERY, Side, StepBatch
from muco_ds.distributed.testing import run_distributed
from muco_ds.models.backbones import load_backbone
from muco_ds.models.demo_model import write_model
from muco_ds.models.embedder import Embedder
from muco_ds.tasks.muco import MuCoTask

pytestmark = pytest.mark.distributed

IMAGES, STEP, TEMPERATURE = 10, 1, 0.1
MIN_PIXELS, MAX_PIXELS = 56 * 56, 84 * 84


@dataclass(frozen=True)
class Case:
    """A stage as it is configured, and the budget of a pack: all at once, or some on each rank."""

    task: TaskOptions
    symmetric: bool = False
    pack_tokens: int = 10**5
    exchange: str = "gather"
    sizes: tuple[int, ...] = ()
    same_target: str = "mask"
    margin: float | None = None
    curriculum: CurriculumOptions = field(default_factory=CurriculumOptions)
    compression_tokens: int = 0
    template: Literal["chat", "plain"] = "chat"


MUCO = TaskOptions(query_history=0.5, target_history=0.5, negatives=2)
JOINT = TaskOptions(name="finetune", reconstruct=True, negatives=1)
MATCH = TaskOptions(name="coma_match", negatives=1)
CASES = {
    "muco with negatives": Case(MUCO),
    "muco with negatives, packs": Case(MUCO, pack_tokens=600),
    "muco, on the way to four turns, packs": Case(
        replace(MUCO, turns=4, turn_weights={0: 0.5, 3: 4.0, 4: 0.0}),
        pack_tokens=400,
        curriculum=CurriculumOptions(steps=4, turns=1, negatives=1),
    ),
    "joint": Case(JOINT),
    "joint, symmetric, packs, ring": Case(JOINT, symmetric=True, pack_tokens=500, exchange="ring"),
    "separate, packs": Case(replace(JOINT, compound="separate"), pack_tokens=500),
    "separate, symmetric": Case(replace(JOINT, compound="separate"), symmetric=True),
    "muco, sizes": Case(MUCO, sizes=(24, 8)),
    "muco, symmetric, sizes, packs, ring": Case(MUCO, symmetric=True, pack_tokens=600, exchange="ring", sizes=(8, 24)),
    "joint, sizes, ring": Case(JOINT, exchange="ring", sizes=(8, 96)),
    "separate, symmetric, sizes": Case(replace(JOINT, compound="separate"), symmetric=True, sizes=(8,)),
    "no reconstruction": Case(TaskOptions(name="finetune", negatives=3), pack_tokens=300),
    "muco, equal targets are positives, a margin": Case(MUCO, same_target="positive", margin=0.05),
    "joint, a margin, sizes": Case(JOINT, margin=0.05, sizes=(32,)),
    "separate, equal targets are positives, symmetric, packs": Case(
        replace(JOINT, compound="separate"), symmetric=True, pack_tokens=500, same_target="positive", margin=0.02
    ),
    "matching by compression tokens, packs": Case(MATCH, pack_tokens=300, compression_tokens=5, template="plain"),
    "matching by one compression token": Case(MATCH, compression_tokens=1, template="plain", sizes=(16,)),
    "muco through compression tokens, packs": Case(MUCO, pack_tokens=600, compression_tokens=3),
    "muco through compression tokens, plain": Case(MUCO, compression_tokens=4, template="plain"),
    "joint through compression tokens": Case(JOINT, compression_tokens=3),
}


def m3t_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ragged turns and negatives, a third without a picture; some negatives are targets of the same batch."""
    made = []
    for i, row in enumerate(rows):
        turns = 1 + (3 * i) % 5
        others = [rows[(i + k + 1) % len(rows)] for k in range(i % 4)]
        made.append(
            {
                "qry": row["qry"][:turns],
                "pos_text": row["pos_text"][:turns],
                "qry_image_path": row["qry_image_path"] if i % 3 else "",
                "neg_text": [other["pos_text"][0] for other in others],
                "neg_image_path": [other["qry_image_path"] if k == 1 else "" for k, other in enumerate(others)],
            }
        )
    return made


def pair_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pictures on either side, both or none, some without a caption; negatives in literals; targets that come twice."""
    made = []
    for i, row in enumerate(rows):
        kind, other = i % 4, rows[(i + 5) % len(rows)]
        target_picture = other["qry_image_path"] if kind in (1, 2) else ""
        made.append(
            {
                "qry": row["qry"][3][0] if kind != 1 else row["qry_sentence"],
                "qry_image_path": row["qry_image_path"] if kind in (0, 2) else "",
                "qry_sentence": row["qry_sentence"] if i % 3 else "",
                "pos_text": "" if kind == 2 else "<|image_1|>\nThe picture.\n" if kind == 1 else row["pos_text"][0],
                "pos_image_path": target_picture,
                "pos_sentence": other["qry_sentence"] if i % 5 else "",
                "neg_text": str([rows[(i + 1 + k) % len(rows)]["pos_text"][0] for k in range(i % 3)]),
                "neg_image_path": str(["", row["qry_image_path"]][: i % 3]),
            }
        )
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    rows = write_data(folder / "data", 24, 1, seed=0)
    write_model(folder / "model", row_texts(rows), seed=0)
    pq.write_table(pa.Table.from_pylist(m3t_rows(rows)), folder / "muco.parquet")
    pq.write_table(pa.Table.from_pylist(pair_rows(rows)), folder / "pairs.parquet")
    return folder


def rows_file(case: Case) -> str:
    return "muco.parquet" if case.task.name == "muco" else "pairs.parquet"


def run_config(folder: Path, case: Case) -> RunConfig:
    images, data = str(folder / "data" / "images"), str(folder / rows_file(case))
    return RunConfig(
        run=RunOptions(name="stages", max_steps=2, precision="fp32", seed=3),
        model=ModelOptions(
            str(folder / "model"),
            freeze_vision=False,
            activation_checkpointing=ActivationCheckpointing(0),
            compression_tokens=case.compression_tokens,
            template=case.template,
        ),
        data=DataOptions(data, images, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS),
        task=case.task,
        curriculum=case.curriculum,
        batch=BatchOptions(images=IMAGES, pack_tokens=case.pack_tokens),
        optim=OptimOptions(warmup_steps=0),
        loss=LossOptions(
            temperature=TEMPERATURE,
            symmetric=case.symmetric,
            key_exchange=case.exchange,  # type: ignore[arg-type]
            matryoshka=list(case.sizes) or None,
            same_target=case.same_target,  # type: ignore[arg-type]
            false_negative_margin=case.margin,
        ),
    )


def trained(folder: Path) -> dict[str, tuple[dict[str, float], dict[str, torch.Tensor], int]]:
    """Of each case the global losses (of all, and of each size), the gradients averaged over the ranks, and the packs
    of a rank."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    results = {}
    for name, case in CASES.items():
        config = run_config(folder, case)
        data = build_data(config, world_size)
        vocabulary = len(data.processing.tokenizer)
        backbone = load_backbone(config.model.path, dtype=torch.float64, attention="sdpa", vocabulary=vocabulary)
        task = build_task(config, Embedder(backbone, freeze_vision=False))
        batch = data.steps(STEP + 1)[STEP]
        assert isinstance(batch, StepBatch) and batch.rows_per_rank[rank].negatives > 0
        assert isinstance(task, MuCoTask)
        result = task.loss([task(pack) for pack in batch.packs], batch.packs, batch.rows_per_rank)
        result.loss.backward()
        losses = {key: value.clone() for key, value in result.stats.items() if key.startswith("loss")}
        gradients = {}
        for parameter_name, parameter in backbone.named_parameters():
            assert parameter.grad is not None, f"{parameter_name} has no gradient on rank {rank}"
            gradients[parameter_name] = parameter.grad / world_size
        if world_size > 1:
            for tensor in (*losses.values(), *gradients.values()):
                dist.all_reduce(tensor)
        results[name] = ({key: float(loss) for key, loss in losses.items()}, gradients, len(batch.packs))
    return results


# ---- the reference


@dataclass
class Key:
    """An embedding, and what the data file says it is."""

    emb_D: torch.Tensor
    pair: Any
    form: int
    image: Any
    target: Any

    def cut(self, size: int) -> Key:
        head_D = self.emb_D[:size]
        return replace(self, emb_D=head_D / head_D.square().sum().sqrt())


class Stock:
    """The stock model in float64 with a dense mask, on one dialogue at a time."""

    def __init__(self, folder: Path) -> None:
        path = str(folder / "model")
        self.model = AutoModel.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.own = self.tokenizer
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)

    def speak(self, case: Case) -> None:
        """As the case's turns are written: what is around them, and the tokens that are read."""
        tokens = [f"<|ctoken_pad_{i}|>" for i in range(case.compression_tokens)] or ["<|emb|>", "<|mask|>"]
        self.tokenizer = copy.deepcopy(self.own)
        self.tokenizer.add_tokens([*tokens, *(["<|mask|>"] if case.task.reconstruct else [])], special_tokens=True)
        self.read = case.compression_tokens or 1
        pooled = "".join(tokens[: self.read])
        chat = case.template == "chat"
        self.opening = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" if chat else ""
        self.between = "<|im_end|>\n<|im_start|>user\n" if chat else ""
        self.closing = f"<|im_end|>\n<|im_start|>assistant\n{pooled}" if chat else pooled

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def embeddings(self, side: Side) -> list[torch.Tensor]:
        """Of each turn: with the turns before it, or of a prompt of its own."""
        turns = [self.ids(turn) if isinstance(turn, str) else list(turn) for turn in side.dialogue.turns]
        prompts = [turns] if side.history else [[turn] for turn in turns]
        return [emb_D for prompt in prompts for emb_D in self._prompt(prompt, side.dialogue.images)]

    def _prompt(self, turns: Sequence[list[int]], images: Sequence[Any]) -> list[torch.Tensor]:
        extra: dict[str, torch.Tensor] = {}
        ids = self.ids(self.opening)
        if images:
            size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
            out = self.image_processor(images=[decode(image) for image in images], size=size, return_tensors="pt")
            extra = {"pixel_values": out["pixel_values"].double(), "image_grid_thw": out["image_grid_thw"]}
            for grid in out["image_grid_thw"]:
                ids += self.ids("<|vision_start|>" + "<|image_pad|>" * (int(grid.prod()) // 4) + "<|vision_end|>")
        pooled = []
        for j, turn in enumerate(turns):
            ids += self.ids(self.between) if j else self.ids("\n") if images and turn else []
            ids += [*turn, *self.ids(self.closing)]
            pooled.append(range(len(ids) - self.read, len(ids)))
        ids_1L = torch.tensor([ids])
        if images:
            extra["mm_token_type_ids"] = (ids_1L == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        self.model.rope_deltas = None
        hidden_LD = self.model(input_ids=ids_1L, use_cache=False, **extra).last_hidden_state[0]
        return [torch.nn.functional.normalize(hidden_LD[list(rows)].mean(0), dim=0) for rows in pooled]


def keys_of(data: Data, stock: Stock, rows: list[dict[str, Any]]) -> tuple[list[Key], list[Key], list[Key]]:
    """Queries, targets and negatives of the global batch."""
    planned = data.plan.step(STEP)
    sides: tuple[list[Key], list[Key], list[Key]] = ([], [], [])
    for sample, number in zip(planned.samples_B.tolist(), planned.passes_B.tolist(), strict=True):
        number_of_row = int(data.plan.index.samples["row"][sample])
        row = rows[number_of_row]
        image = row["qry_image_path"] or number_of_row
        _, targets, *_ = made = data.plan.stage.sides(sample, number, STEP)
        for side in made:
            of_turn = targets.dialogue if side.kind == QUERY else side.dialogue
            pairs = row["qry"] is not None and not isinstance(row["qry"], str)  # M3T: each turn is a pair
            for j, emb_D in enumerate(stock.embeddings(side)):
                text = of_turn.turns[j if pairs else 0]
                target = (text.lower(), of_turn.images)
                if side.kind == NEGATIVE:
                    sides[NEGATIVE].append(Key(emb_D, None, 0, None, (side.dialogue.turns[0].lower(), of_turn.images)))  # type: ignore[union-attr]
                else:
                    pair, form = ((sample, j), 0) if pairs else (sample, j)
                    sides[side.kind].append(Key(emb_D, pair, form, image, target))
    return sides


def one_way(case: Case, rows: list[Key], keys: list[Key], others: list[Key]) -> torch.Tensor:
    """Sum over the forms of the rows and of the keys of the mean loss, written out."""
    forms, joint = (2 if case.task.reconstruct else 1), case.task.compound == "joint"
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        for form in range(forms):
            ours = [key for key in [*keys, *others] if joint or key.pair is None or key.form == form]
            (own,) = (key for key in ours if key.pair == row.pair and key.form == form)
            limit = 2.0 if case.margin is None else float(row.emb_D @ own.emb_D) + case.margin
            positives, all_logits = [], []
            for key in ours:
                similarity = row.emb_D @ key.emb_D
                same_target = key.target == row.target
                if key is own or (same_target and case.same_target == "positive"):
                    positives.append(similarity / TEMPERATURE)
                elif (
                    key.image == row.image or (same_target and case.same_target == "mask") or float(similarity) > limit
                ):
                    continue
                all_logits.append(similarity / TEMPERATURE)
            total = total + torch.stack(all_logits).logsumexp(0) - sum(positives) / len(positives)
    return total / (len(rows) / forms)


def loss_of(case: Case, queries: list[Key], targets: list[Key], negatives: list[Key]) -> torch.Tensor:
    """Of the embeddings as they are."""
    loss = one_way(case, queries, targets, negatives)
    if case.symmetric:
        loss = (loss + one_way(case, targets, queries, [])) / 2
    return loss


@cache
def reference(folder: Path) -> dict[str, tuple[dict[str, float], dict[str, torch.Tensor]]]:
    stock, results = Stock(folder), {}
    for name, case in CASES.items():
        data = build_data(run_config(folder, case), 1)
        stock.speak(case)
        rows = pq.read_table(folder / rows_file(case)).to_pylist()
        sides = queries, _, negatives = keys_of(data, stock, rows)
        assert any(negative.target == query.target for negative in negatives for query in queries) or "joint" in name
        sizes = sorted({*case.sizes, len(queries[0].emb_D)})
        by_size = [loss_of(case, *([key.cut(size) for key in keys] for keys in sides)) for size in sizes]
        loss = sum(by_size) / len(sizes)
        losses = {"loss": loss.item()}
        if case.sizes:
            losses |= {f"loss_{size}": part.item() for size, part in zip(sizes, by_size, strict=True)}
        stock.model.zero_grad()
        loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in stock.model.named_parameters()}
        results[name] = (losses, gradients)
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_loss_and_gradients_are_those_written_by_hand(folder: Path, world_size: int) -> None:
    for results in run_distributed(trained, world_size, folder, timeout_s=300.0):
        for name, (expected, expected_gradients) in reference(folder).items():
            losses, gradients, packs = results[name]
            assert packs == 1 or "packs" in name or "no " in name, name
            assert packs > 1 or "packs" not in name or world_size > 1, name
            assert losses == pytest.approx(expected, rel=1e-6), name
            assert gradients.keys() == expected_gradients.keys()
            whole = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm()
            for parameter, gradient in expected_gradients.items():
                error = (gradients[parameter] - gradient).norm() / max(gradient.norm(), 1e-5 * whole)
                assert error < 1e-5, f"{name}, {parameter}: relative error {error:.1e} on {world_size} ranks"
