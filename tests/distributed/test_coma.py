"""CoMa's first stage against a reference written by hand: loss and every gradient, float64, 1 and 2 ranks, any packs.

The reference runs the stock Qwen2.5-VL with a vocabulary head and a dense 4-D mask on one conversation at a time, and
sums cross-entropies token by token over what the data file says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from local_engine import LocalEngine
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from muco_ds.build import build_data, build_task
from muco_ds.config import (
    BatchOptions,
    DataOptions,
    ModelOptions,
    OptimOptions,
    PromptOptions,
    RunConfig,
    RunOptions,
    TaskOptions,
)
from muco_ds.data.demo_scenes import row_texts, write_data
from muco_ds.data.images import decode
from muco_ds.data.schema import StepBatch
from muco_ds.distributed.testing import run_distributed
from muco_ds.models.backbones import load_backbone
from muco_ds.models.demo_model import write_model
from muco_ds.models.embedder import Embedder

from tiny_folders import change_family

pytestmark = pytest.mark.distributed

IMAGES, STEP = 9, 1
MIN_PIXELS, MAX_PIXELS = 56 * 56, 84 * 84
PROMPTS = PromptOptions(compress_picture="All of it:", compress_text="In short:")


@dataclass(frozen=True)
class Case:
    """A task as it is configured, how many tokens, the budget of a pack, and whether the head is the table."""

    task: TaskOptions = field(default_factory=lambda: TaskOptions(name="coma_compress"))
    tokens: int = 6
    pack_tokens: int = 10**5
    tied: bool = True


def task(**options: Any) -> TaskOptions:
    return TaskOptions(name="coma_compress", **options)


CASES = {
    "answers": Case(),
    "answers, packs": Case(pack_tokens=300),
    "answers, a head of its own, packs": Case(tied=False, pack_tokens=250),
    "questions too, one token": Case(task(train_questions=True), tokens=1),
    "two turns, the prompt is seen, packs": Case(task(turns=2, answers_see="prompt"), pack_tokens=250),
    "all is seen, a head of its own": Case(task(answers_see="all", train_questions=True), tied=False),
    "nothing is seen": Case(task(answers_see="nothing")),
}


def conversation_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ragged, some with two pictures, some with text beside the picture, some with text alone."""
    made: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        turns = [
            {"from": speaker, "value": text}
            for question, answer in zip(row["qry"], row["pos_text"], strict=True)
            for speaker, text in (("human", question[0]), ("gpt", answer))
        ][: 2 + 2 * (i % 4)]
        image: Any = row["qry_image_path"]
        made.append({"id": i, "image": [image, rows[i - 1]["qry_image_path"]] if i % 5 == 2 else image})
        if i % 3 == 0:
            made[-1] |= {"image": None}
        if i % 3 == 0 or i % 4 == 1:
            made[-1]["compression"] = json.dumps({"image": None, "query": row["qry_sentence"]})
        made[-1]["conversations"] = turns
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coma")
    rows = write_data(folder / "data", 20, 1, seed=0)
    for name in ("tied", "untied"):
        write_model(folder / name, row_texts(rows), seed=0)
        change_family(folder / name, "qwen2_5_vl")
    config = json.loads((folder / "untied" / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "untied" / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "untied" / "model.safetensors")
    shape = (config["text_config"]["vocab_size"], config["text_config"]["hidden_size"])
    tensors["lm_head.weight"] = 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(5))
    save_file(tensors, folder / "untied" / "model.safetensors", metadata={"format": "pt"})
    lines = [json.dumps(row) for row in conversation_rows(rows)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run_config(folder: Path, case: Case) -> RunConfig:
    return RunConfig(
        run=RunOptions(name="coma", max_steps=2, precision="fp32", seed=3),
        model=ModelOptions(
            str(folder / ("tied" if case.tied else "untied")),
            compression_tokens=case.tokens,
            freeze_vision=False,
            activation_checkpointing=False,
        ),
        data=DataOptions(
            str(folder / "rows.jsonl"),
            str(folder / "data" / "images"),
            min_pixels=MIN_PIXELS,
            max_pixels=MAX_PIXELS,
        ),
        task=case.task,
        prompts=PROMPTS,
        batch=BatchOptions(images=IMAGES, pack_tokens=case.pack_tokens),
        optim=OptimOptions(warmup_steps=0),
    )


def trained(folder: Path) -> dict[str, tuple[float, dict[str, torch.Tensor], int]]:
    """Of each case the global loss, the gradients averaged over the ranks, and the packs of a rank."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    results = {}
    for name, case in CASES.items():
        config = run_config(folder, case)
        data = build_data(config, world_size)
        vocabulary = len(data.processing.tokenizer)
        backbone = load_backbone(config.model.path, dtype=torch.float64, attention="sdpa", vocabulary=vocabulary)
        stage_task = build_task(config, Embedder(backbone, freeze_vision=False))
        batch = data.steps(STEP + 1)[STEP]
        assert isinstance(batch, StepBatch)
        engine = LocalEngine(stage_task)
        result = stage_task.backward(engine, batch, 1.0)
        assert engine.reductions == 1
        loss, gradients = result.stats["loss"].double(), {}
        for parameter_name, parameter in stage_task.named_parameters():
            assert parameter.grad is not None, f"{parameter_name} has no gradient"
            gradients[parameter_name] = parameter.grad / world_size
        if world_size > 1:
            for tensor in (loss, *gradients.values()):
                dist.all_reduce(tensor)
        results[name] = (float(loss), gradients, len(batch.packs))
    return results


# ---- the reference


class Stock:
    """The stock model with its head, in float64, on one conversation at a time."""

    def __init__(self, folder: Path, case: Case) -> None:
        path = str(folder / ("tied" if case.tied else "untied"))
        self.case, config = case, AutoConfig.from_pretrained(path)
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, config=config, dtype=torch.float64, attn_implementation="eager"
        )
        head = load_file(Path(path) / "model.safetensors").get("lm_head.weight")
        assert case.tied or torch.equal(self.model.lm_head.weight.detach().float(), head)  # type: ignore[arg-type]
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.tokens = [f"<|ctoken_pad_{i}|>" for i in range(case.tokens)]
        self.tokenizer.add_tokens(self.tokens, special_tokens=True)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def losses(self, row: dict[str, Any], images: Path) -> list[torch.Tensor]:
        """Cross-entropy of each token that is to be predicted."""
        extra: dict[str, torch.Tensor] = {}
        ids: list[int] = []
        names = [row["image"]] if isinstance(row["image"], str) else row["image"] or []
        if names:
            size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
            pictures = [decode(str(images / name)) for name in names]
            out = self.image_processor(images=pictures, size=size, return_tensors="pt")
            extra = {"pixel_values": out["pixel_values"].double(), "image_grid_thw": out["image_grid_thw"]}
            for grid in out["image_grid_thw"]:
                ids += self.ids("<|vision_start|>" + "<|image_pad|>" * (int(grid.prod()) // 4) + "<|vision_end|>")
        context = json.loads(row["compression"])["query"] if "compression" in row else ""
        if context:
            ids += [*(self.ids("\n") if names else []), *self.ids(context)]
        prompt = len(ids)
        ids += [*(self.ids("\n") if ids else []), *self.ids("All of it:" if names else "In short:")]
        first = len(ids)
        ids += self.ids("".join(self.tokens))
        compressed = len(ids)
        answers: list[int] = []
        talk = row["conversations"][: 2 * (self.case.task.turns or 99)]
        for j in range(0, len(talk), 2):
            question, answer = talk[j]["value"].replace("<image>", "").strip(), talk[j + 1]["value"]
            ids += self.ids(
                f"{'' if j == 0 else chr(10)}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            )
            start = len(ids)
            ids += self.ids(f"{answer}<|im_end|>")
            answers += range(start, len(ids))
        if self.case.task.train_questions:
            answers = list(range(compressed, len(ids)))
        seen = {"tokens": first, "prompt": prompt, "all": 0, "nothing": compressed}[self.case.task.answers_see]
        mask_LL = torch.zeros(len(ids), len(ids), dtype=torch.float64)
        for i in range(len(ids)):
            for j in range(len(ids)):
                hidden = i >= compressed and j < seen
                if j > i or hidden:
                    mask_LL[i, j] = torch.finfo(torch.float64).min
        ids_1L = torch.tensor([ids])
        kinds_1L = (ids_1L == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        grids = extra.get("image_grid_thw")
        positions_31L, _ = self.model.model.get_rope_index(ids_1L, kinds_1L, grids)
        logits_LV = self.model(
            input_ids=ids_1L,
            position_ids=positions_31L,
            attention_mask={"full_attention": mask_LL[None, None]},
            mm_token_type_ids=kinds_1L,
            use_cache=False,
            **extra,
        ).logits[0]
        return [logits_LV[i - 1].logsumexp(0) - logits_LV[i - 1, ids[i]] for i in answers]


@cache
def reference(folder: Path) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    results = {}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for name, case in CASES.items():
        data = build_data(run_config(folder, case), 1)
        stock = Stock(folder, case)
        chosen = [int(data.plan.index.samples["row"][sample]) for sample in data.plan.step(STEP).samples_B]
        losses = [loss for row in chosen for loss in stock.losses(rows[row], folder / "data" / "images")]
        loss = torch.stack(losses).mean()
        loss.backward()
        gradients = {}
        for parameter_name, parameter in stock.model.named_parameters():
            inner = parameter_name.removeprefix("model.")
            ours = "head.weight" if inner == "lm_head.weight" else f"embedder.model.{inner}"
            assert parameter.grad is not None
            gradients[ours] = parameter.grad
        results[name] = (loss.item(), gradients)
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_loss_and_gradients_are_those_written_by_hand(folder: Path, world_size: int) -> None:
    for results in run_distributed(trained, world_size, folder, timeout_s=300.0):
        for name, (expected, expected_gradients) in reference(folder).items():
            loss, gradients, packs = results[name]
            assert packs == 1 or "packs" in name, name
            assert packs > 2 or "packs" not in name or world_size > 1, name
            assert loss == pytest.approx(expected, rel=1e-6), name
            assert gradients.keys() == expected_gradients.keys(), name
            whole = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm()
            for parameter, gradient in expected_gradients.items():
                error = (gradients[parameter] - gradient).norm() / max(gradient.norm(), 1e-5 * whole)
                assert error < 1e-5, f"{name}, {parameter}: relative error {error:.1e} on {world_size} ranks"
