"""Stages that follow each other: what each is told follows from the ones before, unless the chain says otherwise.

nodes: 2                      # of each training; also gpus_per_node, time, partition, ... (Resources)
stages:
  - train: {recipe: launch/recipes/demo.yaml, run.max_steps: 100}
  - convert:                  # the newest training's checkpoint -> runs/NAME/model
  - mine: {max_share: .inf}   # negatives for the next training's data, by the newest model
  - train: {recipe: launch/recipes/demo_finetune.yaml}     # from the newest model, on what was mined
  - convert:
  - evaluate: {suite: m3t, data: demo/data/pairs_test.parquet}
"""

from __future__ import annotations

import difflib
import glob
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from muco_ds.config import RunConfig, check_paths
from muco_ds.config_cli import parse_args
from muco_ds.errors import UserError
from muco_ds.slurm.jobs import Job, Resources

OPTIONS = {
    "convert": ("dtype", "merge_lora", "base", "scores"),
    "mine": ("model", "data", "images", "corpus", "output", "negatives", "max_share", "skip", "depth", "pack_tokens"),
    "evaluate": (
        *("model", "suite", "data", "images", "output", "datasets", "rows", "convention", "pool", "seed"),
        *("pack_tokens", "dims"),
    ),
}
"""What a stage's program takes; `train` takes a recipe and any key of it."""

_RESOURCES = tuple(item.name for item in fields(Resources) if item.name != "options")


@dataclass(frozen=True)
class Stage:
    """One entry of the chain. `place` says which, in messages; empty where it is the only one."""

    place: str
    kind: str
    options: dict[str, Any]
    resources: dict[str, Any]


def read_chain(path: Path) -> tuple[dict[str, Any], list[Stage]]:
    """The chain's resources and its stages, in order.

    Raises:
        UserError: not a chain, an unknown stage or an unknown option.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--chain: cannot read '{path}': {error.strerror}; give the path of a YAML chain") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path}:{f' line {mark.line + 1}:' if mark else ''} not valid YAML") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("stages"), list) or not tree["stages"]:
        raise UserError(f"{path}: a chain has a list of stages: write stages: [{{train: {{recipe: FILE}}}}, ...]")
    shared = {name: value for name, value in tree.items() if name != "stages"}
    for name in shared:
        _known(name, [*_RESOURCES, "stages"], str(path))
    return shared, [_stage(entry, f"{path}: stage {i}") for i, entry in enumerate(tree["stages"], 1)]


def _stage(entry: Any, place: str) -> Stage:
    given = {entry: None} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or len(given) != 1:
        raise UserError(f"{place}: write one kind with its options: - train: {{recipe: FILE}}")
    ((kind, options),) = given.items()
    _known(kind, ["train", *OPTIONS], place)
    place = f"{place} ({kind})"
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise UserError(f"{place}: its options are a mapping, such as {{time: 60}}, not {options!r}")
    resources = {name: options.pop(name) for name in _RESOURCES if name in options}
    if kind != "train":
        for name in options:
            _known(name, [*OPTIONS[kind], *_RESOURCES], place)
    elif not isinstance(options.get("recipe"), str):
        raise UserError(f"{place}: no recipe: write - train: {{recipe: FILE}}")
    for name in {"evaluate": ("suite", "data")}.get(kind, ()):
        if name not in options:
            raise UserError(f"{place}: no {name}: write - evaluate: {{suite: NAME, data: PATH}}")
    return Stage(place, kind, options, resources)


def _known(name: Any, names: list[str], place: str) -> None:
    if name not in names:
        nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)[0]
        raise UserError(f"{place}: unknown {name!r}: did you mean '{nearest}'?")


@dataclass
class _Made:
    """What the stages so far leave behind."""

    run: Path | None = None
    model: Path | None = None
    mined: Path | None = None
    images: str | None = None


def jobs_of(stages: list[Stage], resources: Resources) -> list[Job]:
    """A job for each stage.

    Args:
        resources: of the trainings; another stage takes one node of them, or what it says itself.
    Raises:
        UserError: a stage needs what none before it makes, or two trainings write into one folder.
    """
    made, jobs, folders = _Made(), [], set()
    for i, stage in enumerate(stages):
        if stage.kind == "train":
            job = _train(stage, made, resources)
            if job.folder in folders:
                raise UserError(f"{stage.place}: {job.folder} is an earlier stage's: give this one its own run.name")
            folders.add(job.folder)
            made.run, made.model, made.mined = job.folder, None, None
        elif stage.kind == "convert":
            job = _convert(stage, made, resources)
            made.model = made.run and made.run / "model"
        elif stage.kind == "mine":
            later = next((other for other in stages[i + 1 :] if other.kind == "train"), None)
            job = _mine(stage, later, made, resources)
        else:
            job = _evaluate(stage, made, resources)
        with _told(stage):
            job.resources.check()
        jobs.append(job)
    return jobs


def _train(stage: Stage, made: _Made, resources: Resources) -> Job:
    config = _config(stage)
    # A stage's own words win over what the chain makes.
    implied = {"model.path": made.model, "data.train": made.mined, "data.images": made.mined and made.images}
    used = {key: str(value) for key, value in implied.items() if value is not None and key not in stage.options}
    checked = config
    if used:
        config = _config(stage, used)
        if "model.path" in used:
            checked = replace(config, model=replace(config.model, path="."))  # made later
        checked = replace(checked, data=_config(stage).data)
    with _told(stage):
        check_paths(checked)
    if made.mined is not None and not config.task.negatives:
        raise UserError(f"{stage.place}: task.negatives=0: what is mined before it would not be used: set it")
    own = replace(resources, **stage.resources)
    if own.cpus_per_rank is None:
        own = replace(own, cpus_per_rank=config.data.workers + 1)
    folder = Path(config.run.dir) / config.run.name
    return Job("train", folder, "train.sbatch", own, config=config, planned=not used)


def _config(stage: Stage, implied: Mapping[str, str] | None = None) -> RunConfig:
    overrides = {key: value for key, value in stage.options.items() if key != "recipe"} | dict(implied or {})
    words = [word for key, value in overrides.items() for word in (f"--{key}", _text(value))]
    with _told(stage):
        return parse_args(["--config", stage.options["recipe"], *words]).config


@contextmanager
def _told(stage: Stage) -> Iterator[None]:
    """Say in which stage of a chain."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{stage.place}: {error}" if stage.place else str(error)) from None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value) if isinstance(value, float) else json.dumps(value)


def _convert(stage: Stage, made: _Made, resources: Resources) -> Job:
    if made.run is None:
        raise UserError(f"{stage.place}: nothing is trained before it: put a train stage first")
    one = replace(resources, gpus_per_node=min(resources.gpus_per_node, 1), ranks_per_node=1)
    words = ["tools/convert_ckpt.py", str(made.run), str(made.run / "model"), "--overwrite", *_words(stage.options)]
    return Job("convert", made.run, "tool.sbatch", _alone(one, stage), tuple(words))


def _mine(stage: Stage, later: Stage | None, made: _Made, resources: Resources) -> Job:
    if later is None:
        raise UserError(f"{stage.place}: no training after it reads what it finds: put a train stage behind it")
    if "model" not in stage.options and made.model is None:
        raise UserError(f"{stage.place}: no model before it: put convert first, or give model: FOLDER")
    config = _config(later)
    if len(config.data.sources()) > 1 and "data" not in stage.options:
        raise UserError(f"{later.place}: data.train names several data sets: say which to mine for, as data: FILE")
    source, folder = config.data.sources()[0], Path(config.run.dir) / config.run.name
    implied = {"model": made.model, "data": source.path, "images": source.images, "output": folder / "mined.parquet"}
    options = {name: str(value) for name, value in implied.items() if value is not None} | stage.options
    made.mined, made.images = Path(options["output"]), options["images"]
    words = ("tools/mine_negatives.py", *_words(options), "--overwrite")
    return Job("mine", folder, "tool.sbatch", _alone(resources, stage), words)


def _evaluate(stage: Stage, made: _Made, resources: Resources) -> Job:
    if "model" not in stage.options and made.model is None:
        raise UserError(f"{stage.place}: no model before it: put convert first, or give model: FOLDER")
    data = str(stage.options["data"])
    if not glob.glob(data):
        raise UserError(f"{stage.place}: data: no such file or folder '{data}'")
    model = Path(stage.options["model"]) if "model" in stage.options else made.model
    assert model is not None
    options = {"model": str(model), "output": str(model.parent / "evaluation")} | stage.options
    words = tuple(_words(options))
    return Job(
        "evaluate", Path(options["output"]).absolute().parent, "evaluate.sbatch", _alone(resources, stage), words
    )


def _alone(resources: Resources, stage: Stage) -> Resources:
    """One node, or as many as the stage says."""
    return replace(replace(resources, nodes=1), **stage.resources)


def _words(options: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words
