"""One typed, validated, saved object per run.

`RunConfig` is a tree of dataclasses, one per section; `muco_ds.config_cli.parse_args` builds it from a YAML recipe and
dotted overrides, `validate` checks what can be known without touching a file, `check_paths` what needs the disk, and
`save_config` writes it so that the saved file is itself a recipe. Relative paths are relative to the current directory,
not to the recipe.
"Paper" is MuCo (multi-turn contrastive learning) unless another is named.
"""

from __future__ import annotations

import glob
import math
import os
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Literal

import yaml

from muco_ds.config_activations import RANGES as ACTIVATION_RANGES
from muco_ds.config_activations import ActivationCheckpointing, check_activations
from muco_ds.config_checkpoint import CHECKPOINT_RANGES, CheckpointOptions
from muco_ds.config_curriculum import RANGES as CURRICULUM_RANGES
from muco_ds.config_curriculum import CurriculumOptions, check_curriculum
from muco_ds.config_evaluation import RANGES as EVALUATION_RANGES
from muco_ds.config_evaluation import EvaluationOptions, check_evaluation
from muco_ds.config_lora import LoraOptions, check_adapter
from muco_ds.config_loss import RANGES as LOSS_RANGES
from muco_ds.config_loss import LossOptions, TemperatureOptions
from muco_ds.config_matryoshka import check_sizes
from muco_ds.config_optim import RANGES as OPTIM_RANGES
from muco_ds.config_optim import OptimOptions
from muco_ds.config_task import PromptOptions, TaskOptions, check_compress, check_task
from muco_ds.errors import UserError

DEFAULT_DEEPSPEED = "ds_configs/zero3.json"
DEFAULT_POOL_TOKEN = "<|emb|>"


@dataclass
class RunOptions:
    """Which run this is and when it ends.

    Args:
        name: Name of the run: its folder is `dir/name`.
        dir: Folder that holds the runs.
        seed: Seed of the data order, the draws and the initial weights.
        max_steps: End after this many optimizer steps. With `epochs` too: whichever comes first.
        epochs: End after this many passes over the training rows (a fraction is allowed). Of a mixture: after as many
            examples as its rows together times this, whatever the weights.
        precision: Compute type; "bf16" keeps fp32 master weights and gradients, "fp32" is for CPUs and parity tests.
        deadline_s: Seconds from a signal (SIGUSR1, SIGTERM, Ctrl-C) to the end, saved or not. Less than what the
            scheduler gives: `--signal=USR1@300` gives 300.
        timeout_s: Seconds for which a rank waits for another in one collective before the run ends.
    """

    name: str
    dir: str = "runs"
    seed: int = 0
    max_steps: int | None = None
    epochs: float | None = None
    precision: Literal["fp32", "bf16"] = "bf16"
    deadline_s: float = 240.0
    timeout_s: float = 1800.0

    def steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        limits = [] if self.max_steps is None else [self.max_steps]
        if self.epochs is not None:
            limits.append(math.ceil(self.epochs * steps_per_epoch))
        return min(limits)


@dataclass
class ModelOptions:
    """The backbone and how it is run.

    Args:
        path: Folder of a Hugging Face model (Qwen2-VL, Qwen2.5-VL or Qwen3-VL).
        pool_token: Token whose last state is the embedding; "<|im_end|>" needs no new token.
        compression_tokens: Read each turn through so many tokens of their own, whose states' mean is the embedding, in
            place of `pool_token` (CoMa paper: 32); 0: none. A compressed model must be given its own number.
        template: Text around a turn: the backbone's "chat" format (MuCo), or none, "plain" (CoMa).
        freeze_vision: Keep the vision tower's weights fixed (paper: yes).
        attention: Backend of the packed attention; "auto" takes the fastest that is installed.
        kernels: Norms, SwiGLU and rotary positions by liger-kernel, or by plain "torch"; "auto" takes liger-kernel on a
            GPU in bf16 where it is installed.
        activation_checkpointing: Recompute layers in the backward pass: less memory, up to a third more compute.
        lora: Train an adapter in place of the weights.
    """

    path: str
    pool_token: str = DEFAULT_POOL_TOKEN
    compression_tokens: int = 0
    template: Literal["chat", "plain"] = "chat"
    freeze_vision: bool = True
    attention: Literal["auto", "flash_attn", "varlen", "sdpa"] = "auto"
    kernels: Literal["auto", "liger", "torch"] = "auto"
    activation_checkpointing: ActivationCheckpointing = field(default_factory=ActivationCheckpointing)
    lora: LoraOptions = field(default_factory=LoraOptions)


@dataclass
class Source:
    """One data set of a mixture.

    Args:
        path: Parquet file (conversations: JSON lines too), folder of them, or glob.
        images: Folder that its image paths are relative to; null: `data.images`.
        weight: Share of the examples drawn, relative to the other data sets'; null (on all of them): its rows.
    """

    path: str
    images: str | None = None
    weight: float | None = None


@dataclass
class DataOptions:
    """The training rows, their pictures, and how pictures are sized.

    Args:
        train: Parquet file (conversations: JSON lines too), folder of them, or glob; or a list of data sets to mix,
            each with `path`, `images` and `weight`.
        images: Folder that the rows' image paths are relative to.
        val: Held-out rows, same forms as `train`; null: none.
        index_dir: Folder of the length index; null: beside the data.
        workers: Loader processes per rank; 0 loads in the training process.
        min_pixels: Smaller pictures are enlarged to this many pixels (paper: 256 * 28 * 28; a token of Qwen3-VL is
            32 * 32 pixels).
        max_pixels: Larger pictures are reduced to this many pixels (paper: 1280 * 28 * 28).
        short_side: Resize the short side to this many pixels first; null: do not (paper's pre-training: 640).
    """

    train: str | list[Source]
    images: str
    val: str | None = None
    index_dir: str | None = None
    workers: int = 2
    min_pixels: int = 256 * 28 * 28
    max_pixels: int = 1280 * 28 * 28
    short_side: int | None = None

    def sources(self) -> list[Source]:
        """`train` as a list, every `images` filled in."""
        given = [Source(self.train)] if isinstance(self.train, str) else self.train
        return [replace(source, images=source.images or self.images) for source in given]


@dataclass
class BatchOptions:
    """The global batch, however many ranks share it.

    Args:
        images: Examples (one image each) per optimizer step, over all ranks.
        pack_tokens: Most text-tower tokens in one packed row.
        source_run: Of a mixture, this many examples in a row come from the same data set: 1 mixes them, `images` makes
            every batch homogeneous (CoMa paper: 64).
    """

    images: int = 1024
    pack_tokens: int = 16384
    source_run: int = 1


@dataclass
class ValidationOptions:
    """Held-out rows during training: retrieval, or the loss of answers in compression.

    Args:
        every: Steps between validations; 0: none.
        rows: How many rows of `data.val` to use.
    """

    every: int = 0
    rows: int = 64


@dataclass
class LogOptions:
    """Metrics.

    Args:
        every: Steps between lines of metrics.
    """

    every: int = 10


@dataclass
class RunConfig:
    """Everything that decides a run.

    Args:
        run: Which run this is and when it ends.
        model: The backbone.
        data: Rows and pictures.
        task: The objective.
        curriculum: From easy to hard.
        prompts: Wording of the turns that ask for a reconstruction.
        batch: The global batch.
        optim: AdamW and its schedule.
        loss: InfoNCE.
        temperature: How the loss's temperature changes.
        validation: Held-out rows during training.
        evaluation: Benchmarks during training.
        checkpoint: Saving and resuming.
        log: Metrics.
        deepspeed: Path of the DeepSpeed JSON, relative to the current directory or, failing that, to the repository.
    """

    run: RunOptions
    model: ModelOptions
    data: DataOptions
    task: TaskOptions = field(default_factory=TaskOptions)
    curriculum: CurriculumOptions = field(default_factory=CurriculumOptions)
    prompts: PromptOptions = field(default_factory=PromptOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    temperature: TemperatureOptions = field(default_factory=TemperatureOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    log: LogOptions = field(default_factory=LogOptions)
    deepspeed: str = DEFAULT_DEEPSPEED


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write `config` as YAML; the file is a valid `--config`."""
    Path(path).write_text(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


# Dotted key -> (smallest allowed value, whether that value itself is allowed, largest allowed value).
_RANGES: dict[str, tuple[float, bool, float]] = {
    "run.seed": (0, True, 2**32 - 1),  # numpy's largest seed
    "run.max_steps": (1, True, math.inf),
    "run.epochs": (0, False, math.inf),
    "run.deadline_s": (0, False, 1e6),
    "run.timeout_s": (5, True, 1e6),  # more would leave the range of some timers
    "model.compression_tokens": (0, True, 1024),
    "model.lora.rank": (0, True, math.inf),
    "model.lora.alpha": (1, True, math.inf),
    "model.lora.dropout": (0, True, 1 - 1e-9),
    "task.query_history": (0, True, 1),
    "task.target_history": (0, True, 1),
    "task.negatives": (0, True, math.inf),
    "task.turns": (1, True, math.inf),
    **ACTIVATION_RANGES,
    **CURRICULUM_RANGES,
    "data.workers": (0, True, math.inf),
    "data.min_pixels": (1, True, math.inf),
    "data.max_pixels": (1, True, math.inf),
    "data.short_side": (1, True, math.inf),
    "batch.images": (2, True, math.inf),  # one example has no negatives
    "batch.pack_tokens": (1, True, math.inf),
    "batch.source_run": (1, True, math.inf),
    **OPTIM_RANGES,
    **LOSS_RANGES,
    "validation.every": (0, True, math.inf),
    "validation.rows": (1, True, math.inf),
    **EVALUATION_RANGES,
    **CHECKPOINT_RANGES,
    "log.every": (1, True, math.inf),
}


def _check_range(key: str, value: float) -> None:
    low, low_allowed, high = _RANGES[key]
    above = value >= low if low_allowed else value > low
    if above and value <= high and math.isfinite(value):
        return
    bounds = f"{'at least' if low_allowed else 'above'} {low:g}"
    if high < math.inf:
        bounds += f" and at most {high:.10g}"
    raise UserError(f"{key} is {value}: it must be a finite number {bounds}")


def validate(config: RunConfig) -> None:
    """Check what needs no file. Raises UserError naming the key(s), their values and the cure."""
    for key in _RANGES:
        value = attrgetter(key)(config)
        if value is not None:
            _check_range(key, value)
    run, data, optim = config.run, config.data, config.optim
    if not run.name or run.name in (".", "..") or "/" in run.name:
        raise UserError(f"run.name is {run.name!r}: give a plain name, it becomes a folder under {run.dir!r}")
    if run.max_steps is None and run.epochs is None:
        raise UserError("run.max_steps and run.epochs are both null: set one of them, or the run has no end")
    if not config.model.pool_token:
        raise UserError(f"model.pool_token is empty: name a token, for example {DEFAULT_POOL_TOKEN}")
    if config.model.compression_tokens and config.model.pool_token != DEFAULT_POOL_TOKEN:
        raise UserError(
            f"model.pool_token is {config.model.pool_token} but turns are read through model.compression_tokens="
            f"{config.model.compression_tokens}: leave out one of the two"
        )
    check_adapter(config.model.lora, config.model.freeze_vision, optim.vision_lr)
    check_activations(config.model.activation_checkpointing, config.model.freeze_vision)
    if config.batch.images % config.batch.source_run:
        problem = f"batch.source_run is {config.batch.source_run}, which does not divide batch.images"
        raise UserError(f"{problem}, {config.batch.images}: set it to a divisor")
    _check_weights(data.sources())
    check_sizes(config.loss.matryoshka or [], "loss.matryoshka")
    config.temperature.check(config.loss.temperature)
    check_curriculum(config.curriculum, config.task)
    same = {name: getattr(config.loss, name) for name in ("same_target", "mask_same_image")}
    check_task(config.task, config.prompts, config.model.compression_tokens, **same)
    if config.task.name == "coma_compress":
        check_compress(config.loss, config.temperature, config.curriculum.negatives)
    if run.precision == "fp32" and config.model.attention in ("flash_attn", "varlen"):
        raise UserError(f"model.attention={config.model.attention} needs run.precision=bf16: set model.attention=auto")
    if data.min_pixels > data.max_pixels:
        raise UserError(f"data.min_pixels is {data.min_pixels}, above data.max_pixels, {data.max_pixels}: swap them")
    if run.max_steps is not None and optim.warmup_steps > run.max_steps:
        raise UserError(
            f"optim.warmup_steps is {optim.warmup_steps}, above run.max_steps, {run.max_steps}: "
            "the run would end before the warm-up does; lower the first"
        )
    if config.validation.every > 0 and data.val is None:
        raise UserError(
            f"validation.every is {config.validation.every} but data.val is null: "
            "set data.val to held-out rows, or validation.every to 0"
        )
    check_evaluation(config.evaluation, config.task.name)


def _check_weights(sources: list[Source]) -> None:
    if not sources:
        raise UserError("data.train is an empty list: name at least one data set")
    weights = [source.weight for source in sources]
    for i, weight in enumerate(weights):
        if weight is None and any(weights):
            raise UserError(f"data.train[{i}] has no weight but others have: give all of them one, or none")
        if weight is not None and not (0 < weight < math.inf):
            raise UserError(f"data.train[{i}].weight is {weight}: it must be a finite number above 0")


def check_paths(config: RunConfig) -> None:
    """Check that the inputs named by `config` exist. Raises UserError naming the key and the path."""
    data = config.data
    for i, source in enumerate(data.sources()):
        key = "data.train" if isinstance(data.train, str) else f"data.train[{i}].path"
        _check_rows(key, source.path)
    if data.val is not None:
        _check_rows("data.val", data.val)
    folders = {"data.images": data.images}
    if not isinstance(data.train, str):
        folders |= {f"data.train[{i}].images": source.images for i, source in enumerate(data.train) if source.images}
    for key, folder in folders.items():
        if not os.path.isdir(folder):
            raise UserError(
                f"{key}: no such folder '{folder}': set it to the folder that the rows' image paths are relative to"
            )
    if not os.path.isdir(config.model.path):
        raise UserError(
            f"model.path: no such folder '{config.model.path}': set it to a model's folder "
            "(a model of the hub is fetched once with `hf download NAME --local-dir FOLDER`)"
        )


def _check_rows(key: str, path: str) -> None:
    kinds = ("*.parquet", "*.jsonl")
    patterns = [os.path.join(path, "**", kind) for kind in kinds] if os.path.isdir(path) else [path]
    if not (os.path.isfile(path) or any(glob.glob(pattern, recursive=True) for pattern in patterns)):
        what = f"no {' or '.join(kinds)} file in folder" if os.path.isdir(path) else "no such file or folder"
        raise UserError(
            f"{key}: {what} '{path}': set it to a parquet or JSON lines file, a folder of them or a glob pattern"
        )
