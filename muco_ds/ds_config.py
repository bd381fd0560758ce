"""The DeepSpeed JSON, completed with the numbers that the run's config owns.

One owner per number: the JSON says "auto" (or nothing) for what `RunConfig` decides, and a different number there is an
error. To DeepSpeed a micro batch is one packed row per rank, so its batch sizes count packs, not examples, and gradient
accumulation stays at 1: accumulating a contrastive loss over packs would be another loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from muco_ds.config import RunConfig
from muco_ds.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent

# Gradients are summed and exchanged in fp32 unless the JSON asks otherwise: DeepSpeed's default is the model's bf16.
_DEFAULTS: dict[str, Any] = {"data_types.grad_accum_dtype": "fp32", "communication_data_type": "fp32"}

_NO_ACCUMULATION = (
    "a contrastive loss is not the sum of its parts' losses: accumulating them leaves out a part's negatives in the "
    "others; what does not fit in one pack goes through the gradient cache"
)

_REFUSED = {
    "optimizer": "the optimizer comes from the run's optim.* keys",
    "scheduler": "the schedule comes from the run's optim.* keys",
    "fp16": "fp16 is not supported, run.precision is fp32 or bf16",
}


def build_deepspeed_config(config: RunConfig, world_size: int, *, load_universal: bool = False) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`: the JSON named by `config.deepspeed` with every number filled in.

    Args:
        config: the run.
        world_size: number of data-parallel ranks.
        load_universal: the engine loads checkpoints in DeepSpeed's universal form.

    Raises:
        UserError: the JSON is missing or malformed, disagrees with the run's config, holds a section that the run
            owns, or keeps an "auto" that nobody fills.
    """
    path = resolve_deepspeed_path(config.deepspeed)
    tree = _read_json(path)
    for refused, reason in _REFUSED.items():
        if refused in tree:
            raise UserError(f"{path}: remove '{refused}': {reason}")
    owned: dict[str, tuple[Any, str]] = {
        "train_batch_size": (world_size, "the number of ranks (one pack each)"),
        "train_micro_batch_size_per_gpu": (1, "one pack per rank"),
        "gradient_accumulation_steps": (1, _NO_ACCUMULATION),
        "gradient_clipping": (config.optim.max_grad_norm, "the run's optim.max_grad_norm"),
        "checkpoint.load_universal": (load_universal, "the number of ranks that wrote the run's checkpoint"),
        "bf16.enabled": (config.run.precision == "bf16", f"the run's precision, {config.run.precision}"),
        "bf16.check_grad_overflow": (True, "a step whose gradient is not finite is skipped"),
    }
    for key, (value, owner) in owned.items():
        _fill_owned(tree, key, value, owner, path)
    for key, value in _DEFAULTS.items():
        section, name = _section_of(tree, key, path)
        section.setdefault(name, value)
    zero = tree.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("compute_grad_norm") is False:
        raise UserError(f"{path}: remove 'zero_optimization.compute_grad_norm': steps are checked by that norm")
    for key in _autos(tree):
        raise UserError(f"{path}: '{key}' is \"auto\", which nothing fills in: write a number or remove the key")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if stage == 0 and config.run.precision == "bf16":
        raise UserError(
            f"{path}: ZeRO stage 0 with run.precision=bf16 would keep no fp32 master weights: "
            "use stage 1 or higher, or run.precision=fp32"
        )
    return tree


def resolve_deepspeed_path(name: str) -> Path:
    """The JSON's path: as given (relative to the current directory), else relative to the repository."""
    for path in (Path(name), REPOSITORY / name):
        if path.is_file():
            return path
    raise UserError(f"deepspeed: no such file '{name}': set it to a JSON such as ds_configs/zero3.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; give a DeepSpeed JSON") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a DeepSpeed config is a JSON object, not a {type(tree).__name__}")
    return tree


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: '{twice}' is set twice; keep one")
    return tree


def _section_of(tree: dict[str, Any], key: str, path: Path) -> tuple[dict[str, Any], str]:
    """The dict that holds the last part of a dotted key, made where absent, and that last part."""
    *parents, name = key.split(".")
    section: Any = tree
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise UserError(f"{path}: '{parent}' must be a JSON object, not {json.dumps(section)}")
    return section, name


def _fill_owned(tree: dict[str, Any], key: str, value: Any, owner: str, path: Path) -> None:
    section, name = _section_of(tree, key, path)
    given = section.get(name, "auto")
    # Identity of types too: 1 == True in Python, and "enabled": 1 deserves a look.
    if given != "auto" and (given != value or isinstance(given, bool) != isinstance(value, bool)):
        raise UserError(
            f"{path}: '{key}' is {json.dumps(given)} but must be {json.dumps(value)} ({owner}): "
            'write "auto" there or change the run\'s config'
        )
    section[name] = value


def _autos(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _autos(value, f"{prefix}.{name}" if prefix else name)
    elif tree == "auto":
        yield prefix
