"""From a configuration to the parts of a run: data, plan, model, engine."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations import HfDeepSpeedConfig

from muco_ds.config import RunConfig
from muco_ds.data.collator import Collator, Packer
from muco_ds.data.index import Index, Indexer, open_index
from muco_ds.data.loader import StepDataset, check_one_pack
from muco_ds.data.plan import Plan
from muco_ds.data.readers import M3TReader
from muco_ds.data.schema import Record
from muco_ds.distributed import env
from muco_ds.ds_config import build_deepspeed_config
from muco_ds.errors import UserError
from muco_ds.flops import FlopsModel
from muco_ds.models.backbones import load_backbone, load_config
from muco_ds.models.embedder import Embedder
from muco_ds.models.folder import Processing, Settings
from muco_ds.optim import build_optimizer
from muco_ds.tasks.muco import MuCoTask

log = logging.getLogger(__name__)


@dataclass
class Data:
    """The data side of a run. `validation` holds the held-out records, or None."""

    processing: Processing
    packer: Packer
    plan: Plan
    collator: Collator
    validation: list[Record] | None

    def steps(self, max_steps: int) -> StepDataset:
        """This rank's batches, by step."""
        return StepDataset(self.plan, self.collator, env.rank(), max_steps)


def build_data(config: RunConfig) -> Data:
    """Readers, length index (built by rank 0 if it is not there), plan and collator. Collective.

    Raises:
        UserError: wrong input of any kind.
    """
    with env.agreement():
        backbone = load_config(config.model.path)
        processing = Processing.load(config.model.path, Settings.of_run(config.model.pool_token, config.data))
        packer = processing.packer()
    reader, index = open_rows(config, packer, config.data.train, "data.train")
    histories = {"query_history": config.task.query_history, "target_history": config.task.target_history}
    with env.agreement():
        plan = Plan(
            index,
            packer.template,
            FlopsModel.from_config(backbone, train_vision=not config.model.freeze_vision),
            seed=config.run.seed,
            images=config.batch.images,
            pack_tokens=config.batch.pack_tokens,
            world_size=env.world_size(),
            **histories,
        )
    for step in range(
        min(8, plan.steps_per_epoch)
    ):  # later steps are like these; better now than after the model is built
        check_one_pack(plan, plan.step(step))
    collator = Collator(reader, index, packer, seed=config.run.seed, **histories)
    validation = _validation_records(config, packer) if config.validation.every else None
    return Data(processing, packer, plan, collator, validation)


def open_rows(config: RunConfig, packer: Packer, pattern: str, key: str) -> tuple[M3TReader, Index]:
    """Reader and length index of a data set; rank 0 builds the index if it is not there. Collective."""
    with env.agreement():
        reader = M3TReader(pattern, config.data.images, key)
    indexer = Indexer(reader, packer.template, packer.images)

    def opened() -> Index:
        return open_index(
            indexer,
            config.data.index_dir,
            builder=env.is_main(),
            processes=min(os.cpu_count() or 1, 16),
            progress=env.is_main(),
        )

    env.on_main(opened)
    with env.agreement():
        index = opened()
    if index.bad_rows and env.is_main():
        listing = index.folder / "bad_rows.jsonl"
        log.warning("%s: %d of %d rows left out, listed in %s", key, index.bad_rows, len(reader), listing)
    return reader, index


def _validation_records(config: RunConfig, packer: Packer) -> list[Record]:
    assert config.data.val is not None
    reader, index = open_rows(config, packer, config.data.val, "data.val")
    return [reader.record(int(row)) for row in index.samples["row"][: config.validation.rows]]


def build_engine(config: RunConfig, processing: Processing, device: torch.device) -> tuple[Any, MuCoTask]:
    """The DeepSpeed engine and the task it runs, partitioned from the start under ZeRO-3. Collective."""
    import deepspeed

    torch.manual_seed(config.run.seed)

    with env.agreement():
        ds_config = build_deepspeed_config(config, env.world_size())
    # transformers builds the model partitioned as long as such an object is alive.
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    if stage == 0 and config.run.precision == "bf16":
        raise UserError(
            f"{config.deepspeed}: ZeRO stage 0 with run.precision=bf16 would keep no fp32 master weights: "
            "use stage 1 or higher, or run.precision=fp32"
        )
    partitioned = HfDeepSpeedConfig(ds_config) if stage == 3 else None
    model = load_backbone(
        config.model.path,
        dtype=torch.bfloat16 if config.run.precision == "bf16" else torch.float32,
        attention=config.model.attention,
        vocabulary=len(processing.tokenizer),
    )
    del partitioned
    if config.model.activation_checkpointing:
        model.activation_checkpointing_enable()
    task = MuCoTask(Embedder(model, freeze_vision=config.model.freeze_vision), config.loss)
    if stage < 3:
        task.to(device)
    for module in task.modules():  # zero.Init places parameters; rotary tables are buffers
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    optimizer = build_optimizer(task, config.optim)
    engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=ds_config)
    engine.train()
    return engine, task
