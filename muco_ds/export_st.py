"""What other libraries read beside the weights: chat template, processor and sentence-transformers files.

sentence-transformers sends every input through the chat template and pools the last token, so the template must render
the training prompt and end exactly at the pool token. For a compressed model it ends with the compression tokens, which
a module beside the weights pools.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from muco_ds.data.templates import END, IMAGE_PAD, SYSTEM_PROMPT, VISION_END, VISION_START, TemplateName
from muco_ds.families import FAMILIES
from muco_ds.models.backbones import COMPRESSION_TOKEN
from muco_ds.models.folder import Settings

_POOLING = "compression_pooling"
"""Module of this package that goes into the folder of a compressed model."""

# All output stands in expressions and every tag strips its surroundings, so the layout of this text renders as nothing.
_TEMPLATE = r"""
{#- Each user turn ends at the token(s) pooled to its embedding; pictures come before the text, as in training. -#}
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
    {{- SYSTEM_MESSAGE -}}
  {%- elif message['role'] == 'user' -%}
    {%- if loop.first -%}
      {{- 'OPENING' -}}
    {%- endif -%}
    {{- 'USER' -}}
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
    {%- if pictures.count and TEXT_OR_LINE -%}
      {{- '\n' -}}
    {%- endif -%}
    {{- TEXT + 'TAIL' -}}
    {%- if not loop.last -%}
      {{- 'CLOSING' -}}
    {%- endif -%}
  {%- else -%}
    {{- raise_exception('Give user messages, after at most one system message: the template writes the answers.') -}}
  {%- endif -%}
{%- endfor -%}
"""


def chat_template(pool_token: str, compression_tokens: int = 0, template: TemplateName = "chat") -> str:
    """Jinja template whose prompt equals `ChatTemplate.render` and ends with the token(s) that are pooled.

    A system message replaces the default one. `add_generation_prompt` changes nothing.

    Args:
        compression_tokens: how many stand in place of the pool token.
        template: as of `ChatTemplate`; "plain": nothing but pictures, texts and pooled tokens.
    """
    pooled = "".join(COMPRESSION_TOKEN.format(i) for i in range(compression_tokens)) or pool_token
    values = dict.fromkeys(("OPENING", "USER", "CLOSING"), "")
    values |= {"SYSTEM_MESSAGE": "raise_exception('Plain prompts have no system message.')", "TAIL": pooled}
    if template != "plain":
        values = {
            "SYSTEM_MESSAGE": rf"'<|im_start|>system\n' + text_of(content) + '{END}\n'",
            "OPENING": rf"<|im_start|>system\n{SYSTEM_PROMPT}{END}\n",
            "USER": r"<|im_start|>user\n",
            "TAIL": rf"{END}\n<|im_start|>assistant\n{pooled}",
            "CLOSING": r"\n" if pooled == END else rf"{END}\n",
        }
    values |= {"TEXT_OR_LINE": "text", "TEXT": "text", "VISION": VISION_START + IMAGE_PAD + VISION_END}
    if template == "muco":
        # Without its empty lines, which are all that a split leaves empty.
        lines = r"((text_of(content).split('\n') | select | join('\n')) + '\n' if text else '')"
        values |= {"TEXT_OR_LINE": "true", "TEXT": lines}
    written = _TEMPLATE.strip()
    for name, value in values.items():
        written = written.replace(name, value)
    return written


def write_processing(folder: Path, settings: Settings, model_type: str) -> None:
    """Turn the training run's processing files in `folder` into ones that stock classes load."""
    template = chat_template(settings.pool_token, settings.compression_tokens, settings.template)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

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


def write_sentence_transformers(folder: Path, dimension: int, settings: Settings) -> None:
    """The files that make `SentenceTransformer(folder)` embed texts, pictures and both (sentence-transformers 6.2).

    Without `modality_config` it would take text only and skip the chat template; without modules.json it would average.
    It has no field for the sizes a model was trained for: they stand in the model card, for people to pass
    `truncate_dim`. A compressed model brings its own pooling module, which people allow by `trust_remote_code=True`.
    """
    compression_tokens = settings.compression_tokens
    pooling_type = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    pooling: dict[str, Any] = {"embedding_dimension": dimension}
    if compression_tokens:
        shutil.copyfile(Path(__file__).with_name(f"{_POOLING}.py"), folder / f"{_POOLING}.py")
        pooling_type = f"{_POOLING}.CompressionPooling"
        pooling["compression_tokens"] = compression_tokens
    else:
        pooling |= {"pooling_mode": "lasttoken", "include_prompt": True}
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    modules = [
        ("", "sentence_transformers.base.modules.transformer.Transformer"),
        ("1_Pooling", pooling_type),
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
        "1_Pooling/config.json": pooling,
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


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
