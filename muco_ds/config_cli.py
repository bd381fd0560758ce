"""From the command line to a checked `RunConfig`.

`--config recipe.yaml` (several: the later wins), then dotted overrides (`--optim.lr 1e-4`), `--print_config` (show the
result and exit), `--dry_run`. jsonargparse does types, defaults and merging. The keys are checked here before it sees
them, because its messages for an unknown key neither fit a line nor name the file or the nearest key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from muco_ds.config import RunConfig, Source, validate
from muco_ds.errors import UserError

_FLAGS = ("print_config", "help")
_MIXTURE = "str | list[Source]"  # the type of a list of data sets, as written in the dataclass


@dataclass
class Invocation:
    """What one command line asks for: the run, and whether only to check that it fits (`--dry_run`)."""

    config: RunConfig
    dry_run: bool


def parse_args(argv: Sequence[str]) -> Invocation:
    """Build and validate the config of one command line (without the program's name).

    Inputs on disk other than the recipe are not looked at: call `muco_ds.config.check_paths` for that. The
    `--local_rank` that the deepspeed launcher puts first is ignored (ranks come from the environment).

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing key or a failed cross-check, in one line.
        SystemExit: after `--print_config` or `--help`.
    """
    arguments = _without_local_rank(argv)
    dry_run = "--dry_run" in arguments
    # Kept from jsonargparse, or --print_config would print it and the output would not be a recipe.
    arguments = [argument for argument in arguments if argument != "--dry_run"]
    sources = _check_keys(arguments)
    parser = _parser()
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(_explain(str(error), sources)) from None
    parsed.pop("config")
    config = _build(RunConfig, parsed.as_dict())
    validate(config)
    return Invocation(config, dry_run)


def load_config(path: str | Path) -> RunConfig:
    """Read a config saved by `muco_ds.config.save_config` (or any recipe). Errors as in `parse_args`."""
    return parse_args(["--config", str(path)]).config


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="train.py",
        description="Train a multimodal embedding model. Relative paths are relative to the current directory. "
        "With --dry_run, only check that the largest packs fit, then exit.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML recipe")
    parser.add_class_arguments(RunConfig)
    return parser


def _build(cls: type, values: dict[str, Any]) -> Any:
    hints = get_type_hints(cls)
    return cls(**{key: _build_value(hints[key], value) for key, value in values.items()})


def _build_value(hint: Any, value: Any) -> Any:
    if is_dataclass(hint):
        return _build(cast(type, hint), value)
    if isinstance(value, list) and hint == str | list[Source]:
        return [_build(Source, dict(item)) for item in value]
    return value


def _known_keys(cls: type = RunConfig, prefix: str = "") -> dict[str, str]:
    """Dotted key -> its type as written in the dataclass."""
    hints = get_type_hints(cls)
    known: dict[str, str] = {}
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            known |= _known_keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            known[prefix + item.name] = str(item.type)
    return known


@dataclass
class _Source:
    """Where a key was set, for the message about it."""

    value: Any
    place: str


def _without_local_rank(argv: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip_value = False
    for argument in argv:
        if skip_value:
            skip_value = False
        elif argument in ("--local_rank", "--local-rank"):
            skip_value = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def _check_keys(argv: Sequence[str]) -> dict[str, _Source]:
    """Refuse unknown keys on the command line and in its recipes; return where every known one was last set."""
    known = _known_keys()
    sources: dict[str, _Source] = {}
    overrides: dict[str, _Source] = {}
    for key, value in _options(argv):
        if key == "config":
            for name, item in _recipe_items(value, known):
                sources[name] = _Source(item, value)
        elif key in known:
            overrides[key] = _Source(value, "the command line")
            if known[key] == _MIXTURE and value.lstrip().startswith("["):
                _check_list(key, yaml.safe_load(value), "the command line")
        elif key not in _FLAGS:
            raise _unknown(key, "the command line", [*known, "config", "dry_run", *_FLAGS])
    return sources | overrides


def _options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, value) of every `--key value`, `--key=value` and flag ("")."""
    arguments = iter(argv)
    for argument in arguments:
        if argument == "-h":
            continue
        if not argument.startswith("--"):
            raise UserError(f"unexpected argument {argument!r} on the command line: write --section.key VALUE")
        key, equals, value = argument[2:].partition("=")
        if not equals and key not in _FLAGS:
            value = next(arguments, "--")
            if value.startswith("--"):
                raise UserError(f"--{key} needs a value: write --{key} VALUE")
        yield key, value


def _recipe_items(path: str, known: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf in the YAML file, refusing unknown keys."""
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise UserError(f"--config: cannot read '{path}': {error.strerror}; give the path of a YAML recipe") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; give the path of a YAML recipe") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{line} not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections (run:, model:, data: ...), not {_type_name(tree)}")
    yield from _section_items(tree, known, path)


def _section_items(tree: dict, known: dict[str, str], path: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`_recipe_items` of one section, or of the whole file, and of the sections in it."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        inside = [other for other in known if other.startswith(f"{key}.")]
        if inside and not isinstance(value, dict):
            cure = f", such as {{{inside[0].removeprefix(key + '.')}: ...}}"
            raise UserError(f"{path}: section '{key}' must be a mapping of keys{cure}, not {_type_name(value)}")
        if inside:
            yield from _section_items(value, known, path, f"{key}.")
        elif key in known:
            if known[key] == _MIXTURE:
                _check_list(key, value, path)
            yield key, value
        else:
            sections = {other.partition(".")[0] for other in known if "." in other}
            raise _unknown(key, path, list(known) if prefix else [*known, *sections])


def _check_list(key: str, value: Any, path: str) -> None:
    """Refuse a list (of a mixture's data sets) in which an entry has an unknown key or lacks its path."""
    names = [item.name for item in fields(Source)]
    for i, entry in enumerate(value if isinstance(value, list) and key == "data.train" else []):
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise UserError(f"{path}: {key}[{i}] has no path: write - {{path: FILE, images: FOLDER, weight: NUMBER}}")
        for name in entry:
            if name not in names:
                raise _unknown(f"{key}[{i}].{name}", path, [f"{key}[{i}].{known}" for known in names])


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader keeps the last of two equal keys in silence; this one refuses the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key_node.value}' is set twice; keep one", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _unknown(key: str, place: str, candidates: list[str]) -> UserError:
    completions = [candidate for candidate in candidates if candidate.startswith(key)]
    nearest = (completions or difflib.get_close_matches(key, candidates, n=1, cutoff=0.0))[0]
    return UserError(f"unknown key '{key}' in {place}: did you mean '{nearest}'?")


def _type_name(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


def _explain(message: str, sources: dict[str, _Source]) -> str:
    """jsonargparse's multi-line complaint as one line: key, value, place and expected type."""
    known = _known_keys()
    missing = re.search(r"following arguments are required: (.*)", message)
    if missing:
        first = missing[1].split(",")[0]
        return f"{missing[1]} must be set: in the recipe or as --{first} VALUE"
    for key in sorted(known, key=len, reverse=True):
        if key in sources and re.search(rf'["\']?(--)?{re.escape(key)}["\']?:', message):
            source = sources[key]
            return f"{key} is {source.value!r} in {source.place}: expected {known[key]}"
    return " ".join(message.split())
