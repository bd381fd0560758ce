"""CoMa's first stage written by hand: the stock model with its vocabulary head on one conversation at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from muco_ds.config import PromptOptions, TaskOptions
from muco_ds.data.demo_pairs import IMAGE_MARK
from muco_ds.data.images import decode

MIN_PIXELS, MAX_PIXELS = 56 * 56, 84 * 84
HEAD = "lm_head.weight"


def untie(folder: Path) -> None:
    """Give the model in a folder a vocabulary head of its own."""
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    shape = (config["text_config"]["vocab_size"], config["text_config"]["hidden_size"])
    tensors[HEAD] = 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(5))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def conversation_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ragged, some with two pictures, some with text beside the picture, some with text alone."""
    made: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        turns = [
            {"from": speaker, "value": text}
            for question, answer in zip(row["qry"], row["pos_text"], strict=True)
            for speaker, text in (("human", question[0].removeprefix(IMAGE_MARK)), ("gpt", answer))
        ][: 2 + 2 * (i % 4)]
        image: Any = row["qry_image_path"]
        made.append({"id": i, "image": [image, rows[i - 1]["qry_image_path"]] if i % 5 == 2 else image})
        if i % 3 == 0:
            made[-1] |= {"image": None}
        if i % 3 == 0 or i % 4 == 1:
            made[-1]["compression"] = json.dumps({"image": None, "query": row["qry_sentence"]})
        made[-1]["conversations"] = turns
    return made


class Stock:
    """The model of a folder in float64, as transformers loads it, on one conversation at a time.

    Args:
        tokens: compression tokens, which the folder's tokenizer may lack.
    """

    def __init__(self, folder: Path, task: TaskOptions, tokens: int, prompts: PromptOptions) -> None:
        path = str(folder)
        self.task, self.prompts, config = task, prompts, AutoConfig.from_pretrained(path)
        self.model, loading = AutoModelForImageTextToText.from_pretrained(
            path, config=config, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
        )
        assert not any(loading.values()), loading
        head, table = self.model.lm_head.weight, self.model.get_input_embeddings().weight
        stored = load_file(folder / "model.safetensors").get(HEAD)
        assert config.tie_word_embeddings == (stored is None) == (head is table)
        assert stored is None or torch.equal(head.detach().float(), stored)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.tokens = [f"<|ctoken_pad_{i}|>" for i in range(tokens)]
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
        asked = self.prompts.compress_picture if names else self.prompts.compress_text
        ids += [*(self.ids("\n") if ids else []), *self.ids(asked)]
        first = len(ids)
        ids += self.ids("".join(self.tokens))
        compressed = len(ids)
        answers: list[int] = []
        talk = row["conversations"][: 2 * (self.task.turns or 99)]
        for j in range(0, len(talk), 2):
            question, answer = talk[j]["value"].replace("<image>", "").strip(), talk[j + 1]["value"]
            ids += self.ids(
                f"{'' if j == 0 else chr(10)}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            )
            start = len(ids)
            ids += self.ids(f"{answer}<|im_end|>")
            answers += range(start, len(ids))
        if self.task.train_questions:
            answers = list(range(compressed, len(ids)))
        seen = {"tokens": first, "prompt": prompt, "all": 0, "nothing": compressed}[self.task.answers_see]
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
