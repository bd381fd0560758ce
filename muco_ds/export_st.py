"""What other libraries read beside the weights: chat template, processor and sentence-transformers files.

sentence-transformers sends every input through the chat template and pools the last token, so the template must render
the training prompt and end exactly at the pool token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muco_ds.data.templates import END, IMAGE_PAD, SYSTEM_PROMPT, VISION_END, VISION_START
from muco_ds.families import FAMILIES
from muco_ds.models.folder import Settings

# All output stands in expressions and every tag strips its surroundings, so the layout of this text renders as nothing.
_TEMPLATE = r"""
{#- Each user turn ends at the token whose state is its embedding; pictures come before the text, as in training. -#}
{%- macro text_of(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content if 'text' in part -%}
      {{- part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- if message['role'] == 'system' and loop.first -%}
    {{- '<|im_start|>system\n' + text_of(content) + 'END\n' -}}
  {%- elif message['role'] == 'user' -%}
    {%- if loop.first -%}
      {{- '<|im_start|>system\nSYSTEM_PROMPTEND\n' -}}
    {%- endif -%}
    {{- '<|im_start|>user\n' -}}
    {%- set pictures = namespace(count=0) -%}
    {%- if content is not string -%}
      {%- for part in content -%}
        {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
          {%- set pictures.count = pictures.count + 1 -%}
          {{- 'VISION' -}}
        {%- elif 'text' not in part -%}
          {{- raise_exception('This model embeds texts and pictures, no other content.') -}}
        {%- endif -%}
      {%- endfor -%}
    {%- endif -%}
    {%- set text = text_of(content) | trim -%}
    {%- if pictures.count and text -%}
      {{- '\n' -}}
    {%- endif -%}
    {{- text + 'END\n<|im_start|>assistant\nPOOL' -}}
    {%- if not loop.last -%}
      {{- 'CLOSING' -}}
    {%- endif -%}
  {%- else -%}
    {{- raise_exception('Give user messages, after at most one system message: the template writes the answers.') -}}
  {%- endif -%}
{%- endfor -%}
"""


def chat_template(pool_token: str) -> str:
    """Jinja template whose prompt equals `ChatTemplate.render` and ends at the pool token.

    A system message replaces the default one. `add_generation_prompt` changes nothing.
    """
    values = {
        "SYSTEM_PROMPT": SYSTEM_PROMPT,
        "VISION": VISION_START + IMAGE_PAD + VISION_END,
        "CLOSING": r"\n" if pool_token == END else END + r"\n",
        "POOL": pool_token,
        "END": END,
    }
    template = _TEMPLATE.strip()
    for name, value in values.items():
        template = template.replace(name, value)
    return template


def write_processing(folder: Path, settings: Settings, model_type: str) -> None:
    """Turn the training run's processing files in `folder` into ones that stock classes load."""
    (folder / "chat_template.jinja").write_text(chat_template(settings.pool_token), encoding="utf-8")

    tokenizer = read_json(folder / "tokenizer_config.json")
    # Truncation would cut the pool token off, and sentence-transformers would pool another one without a word.
    tokenizer.pop("model_max_length", None)
    tokenizer.pop("chat_template", None)
    write_json(folder / "tokenizer_config.json", tokenizer)

    images = read_json(folder / "preprocessor_config.json")
    for old_name in ("min_pixels", "max_pixels"):
        images.pop(old_name, None)
    images["size"] = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    images["image_processor_type"] = "Qwen2VLImageProcessor"
    write_json(folder / "preprocessor_config.json", images)

    videos = {name: value for name, value in images.items() if name != "image_processor_type"}
    # Written by hand: the stock processor needs torchvision to be built, and saves nothing without its video part.
    processor = {
        "processor_class": FAMILIES[model_type].processor,
        "image_processor": images,
        "video_processor": {**videos, "video_processor_type": FAMILIES[model_type].video_processor},
    }
    write_json(folder / "processor_config.json", processor)


def write_sentence_transformers(folder: Path, dimension: int, sizes: Sequence[int]) -> None:
    """The files that make `SentenceTransformer(folder)` embed texts, pictures and both (sentence-transformers 6.2).

    Without `modality_config` it would take text only and skip the chat template; without modules.json it would average.
    It has no field for the sizes a model was trained for: they stand in the model card, for people to pass
    `truncate_dim`.
    """
    if sizes:
        (folder / "README.md").write_text(_sizes_card(sizes), encoding="utf-8")
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    modules = [
        ("", "sentence_transformers.base.modules.transformer.Transformer"),
        ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
        ("2_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
    ]
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": forward, "image": forward, "message": {**forward, "format": "structured"}},
            "module_output_name": "token_embeddings",
            "unpad_inputs": False,
        },
        "1_Pooling/config.json": {
            "embedding_dimension": dimension,
            "pooling_mode": "lasttoken",
            "include_prompt": True,
        },
        "2_Normalize/config.json": {},
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, content)


def _sizes_card(sizes: Sequence[int]) -> str:
    return f"""---
library_name: sentence-transformers
pipeline_tag: feature-extraction
tags:
- sentence-transformers
- matryoshka
---

# Sizes of the embeddings

Trained as Matryoshka embeddings (arXiv 2205.13147) of {", ".join(map(str, sizes))} components: cut to one of these
sizes they are embeddings as well. The two give the same vectors:

```python
SentenceTransformer(PATH, truncate_dim={sizes[0]}).encode(items, normalize_embeddings=True)
muco_ds.Embedder.from_pretrained(PATH).encode(items, dim={sizes[0]})
```

Without `normalize_embeddings=True` sentence-transformers gives the leading components of the whole embedding, which are
shorter than unit length: cosines, as of `SentenceTransformer.similarity`, are the same, inner products are not.
"""


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
