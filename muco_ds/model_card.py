"""README.md of an exported model: how to use it, how it was trained, on what, and its scores.

It goes where the folder goes, so it names files and folders by their last part alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PretrainedConfig

from muco_ds.errors import UserError
from muco_ds.families import FAMILIES
from muco_ds.model_card_snippets import ADAPTED, COMPRESSION, MATRYOSHKA, PICTURES, SNIPPETS
from muco_ds.models.folder import Settings

Results = Mapping[str, Mapping[str, Any]]
"""Entries of results.json: data set, turn type or "overall" -> scores and counts."""

_RELEASED = re.compile(r"(Qwen(?:2|2\.5|3)-VL-\d+B(?:-Instruct|-Thinking)?)(?![\w.-])")
_STAGES = {
    "muco": "multi-turn contrastive learning (MuCo, arXiv 2602.06393)",
    "finetune": "contrastive fine-tuning on single pairs (MuCo, arXiv 2602.06393)",
    "coma_compress": "compression alone (CoMa's first stage, arXiv 2511.08480): not trained to match anything yet",
    "coma_match": "contrastive learning after compression (CoMa, arXiv 2511.08480)",
}
_SCORES = ("precision@", "recall@", "ndcg@", "main_score", "loss", "perplexity")
_COUNTS = ("queries", "candidates", "chance")


def model_card(
    config: PretrainedConfig,
    settings: Settings,
    meta: Mapping[str, Any],
    scores: Sequence[tuple[str, Results]],
    *,
    adapter: bool = False,
) -> str:
    """The card of a model, in Markdown with a YAML head for the hub.

    Args:
        meta: meta.json of its checkpoint.
        scores: where they are from, and what they are.
        adapter: the folder holds an adapter alone.
    """
    run, width = meta["config"], config.text_config.hidden_size
    parts = [
        _head(config, settings, run, adapter),
        f"# {_plain(run['run']['name'])}\n",
        f"Texts, pictures and both as unit vectors of {width} components. {_size(config)}, trained with muco_ds by "
        f"{_STAGES.get(run['task']['name'], run['task']['name'])}.\n",
        _use(settings, width, adapter),
        _section("Recipe", _table(("", ""), _recipe(settings, meta))),
        _section("Data", _data(meta)),
        *(_section(f"Scores: {_plain(title)}", _scores(results)) for title, results in scores),
    ]
    return "\n".join(parts)


def find_scores(checkpoint: Path, given: Path | None) -> list[tuple[str, Results]]:
    """What is known of a checkpoint's quality: its run's last validation, and results of evaluations.

    Args:
        given: results.json of an evaluation; else, for the run's newest checkpoint, those in its folder that are
            younger: beside an older one they may be of a later export.
    Raises:
        UserError: `given` is none.
    """
    run = checkpoint.parent.parent
    step, written = json.loads((checkpoint / "meta.json").read_text())["step"], (checkpoint / "meta.json").stat()
    found: list[tuple[str, Results]] = []
    if (run / "metrics.jsonl").is_file() and (held_out := _validation(run / "metrics.jsonl", step)) is not None:
        found.append(held_out)
    newest = max((path.name for path in checkpoint.parent.glob("step_*") if path.suffix != ".tmp"), default="")
    results_files = sorted(run.glob("*/results.json")) if checkpoint.name == newest else []
    files = [given] if given else [file for file in results_files if file.stat().st_mtime > written.st_mtime]
    for file in files:
        try:
            results = json.loads(file.read_text())
            entries = {name: dict(entry) for name, entry in results.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            if given:
                raise UserError(f"--scores: '{file}' is no results.json of an evaluation ({error})") from error
            continue
        found.append((f"{file.parent.name}/{file.name}" if given is None else file.name, entries))
    return found


def _validation(file: Path, step: int) -> tuple[str, Results] | None:
    """The last validation up to a step."""
    last: dict[str, Any] = {}
    for line in file.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # the line that a killed run was writing
            continue
        if values["step"] <= step and any(key.startswith("val/") for key in values):
            last = values
    results: dict[str, dict[str, Any]] = {}
    for key, value in last.items():
        _, *names, score = key.split("/") if key.startswith("val/") else ("", "")
        if score:
            results.setdefault("/".join(names) or "all", {})[score] = value
    return (f"held-out rows of the run, step {last['step']}", results) if results else None


def _head(config: PretrainedConfig, settings: Settings, run: Mapping[str, Any], adapter: bool) -> str:
    tags = ["muco_ds", "multimodal", config.model_type]
    tags += [] if adapter else ["sentence-transformers"]
    tags += ["matryoshka"] * bool(settings.matryoshka) + ["custom_code"] * bool(settings.compression_tokens)
    head: dict[str, Any] = {"library_name": "peft" if adapter else "sentence-transformers"}
    head["pipeline_tag"] = "feature-extraction"
    if base := _RELEASED.findall(run["model"]["path"]):
        head["base_model"] = f"Qwen/{base[-1]}"
    return f"---\n{yaml.safe_dump({**head, 'tags': tags}, sort_keys=False)}---\n"


def _size(config: PretrainedConfig) -> str:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in FAMILIES[config.model_type].model(config).parameters())
    name = config.model_type.replace("_vl", "-VL").replace("qwen", "Qwen").replace("_", ".")
    size = f"{parameters / 1e9:.2g} billion" if parameters >= 1e9 else f"{parameters / 1e6:.2g} million"
    return f"A {name} of {size} parameters"


def _use(settings: Settings, width: int, adapter: bool) -> str:
    tokens = settings.compression_tokens
    values = {
        "WIDTH": str(width),
        "SAME": ", but for sizes of pictures (below)" if settings.short_side is not None else "",
        "TRUST": ", trust_remote_code=True" if tokens else "",
        "POOLED": f"[-{tokens}:].mean(0)" if tokens else "[-1]",
        "PLACE": f"the last {tokens} tokens" if tokens else "the last token",
        "TOKENS": str(tokens),
        "SIZES": ", ".join(map(str, settings.matryoshka)),
        "SMALLEST": str(min(settings.matryoshka, default=width)),
    }
    parts = [ADAPTED] if adapter else [SNIPPETS]
    parts += [COMPRESSION] * bool(tokens and not adapter) + [MATRYOSHKA] * bool(settings.matryoshka and not adapter)
    if settings.short_side is not None:
        parts.append(PICTURES.replace("SIDE", str(settings.short_side)))
    text = "\n".join(parts)
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def _recipe(settings: Settings, meta: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    config = meta["config"]
    model, optim, task, loss = (config[name] for name in ("model", "optim", "task", "loss"))
    lora = model.get("lora", {})
    yield "backbone", Path(model["path"]).name
    if lora.get("rank"):
        kind = "DoRA" if lora["dora"] else "LoRA"
        yield "trained", f"{kind} of rank {lora['rank']}, alpha {lora['alpha']}, on: {lora['targets']}"
    else:
        yield "trained", "all weights but the vision tower's" if model["freeze_vision"] else "all weights"
    yield "steps", meta["step"]
    yield "examples a step", config["batch"]["images"]
    yield "learning rate", f"{optim['lr']:g}, {optim['schedule']}, {optim['warmup_steps']} steps of warm-up"
    if task["name"] != "coma_compress":
        schedule = config.get("temperature", {}).get("schedule", "fixed")
        yield "temperature", f"{loss['temperature']:g}, {schedule}"
    if task["name"] == "muco":
        yield "turns see earlier ones", f"queries {task['query_history']:g}, targets {task['target_history']:g}"
    if task.get("negatives"):
        yield "hard negatives of a row", f"up to {task['negatives']}"
    yield (
        "read at",
        f"{settings.compression_tokens} compression tokens" if settings.compression_tokens else (settings.pool_token),
    )
    yield "pixels of a picture", f"{settings.min_pixels} to {settings.max_pixels}"
    yield "precision", config["run"]["precision"]
    yield "seed", config["run"]["seed"]
    yield "ranks, ZeRO stage", f"{meta['world_size']}, {meta['zero_stage']}"
    yield "software", ", ".join(f"{name} {number}" for name, number in meta.get("versions", {}).items())


def _data(meta: Mapping[str, Any]) -> str:
    train = meta["config"]["data"]["train"]
    sources = [{"path": train}] if isinstance(train, str) else train
    rows = [(_name(source["path"]), source.get("weight") or "by its rows") for source in sources]
    usable = meta.get("data", {}).get("rows")
    return _table(("data set", "weight"), rows) + (f"\n{usable} usable rows in all.\n" if usable else "")


def _name(path: str) -> str:
    """Last part of a path; of a glob, with the folder before it."""
    name, folder = Path(path).name, Path(path).parent.name
    return f"{folder}/{name}" if "*" in name and folder else name


def _scores(results: Results) -> str:
    names = {key for entry in results.values() for key, value in entry.items() if _is_number(value)}
    counts = [name for name in _COUNTS if name in names]
    scores = sorted(name for name in names if name.startswith(_SCORES))
    rows = [(name, *(_number(entry.get(key)) for key in [*scores, *counts])) for name, entry in results.items()]
    return _table(("", *scores, *counts), rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> str:
    return "" if not _is_number(value) else str(value) if isinstance(value, int) else f"{value:.4f}"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(_plain(cell) for cell in line) + " |\n" for line in lines)


def _plain(value: Any) -> str:
    """What shows as it is in a cell of Markdown."""
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", " ".join(str(value).split()))
