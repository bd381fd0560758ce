"""From a configuration to the parts of a run: data, plan, model, engine."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from muco_ds.config import RunConfig, Source
from muco_ds.data.collator import Collator, Packer
from muco_ds.data.compression import ConversationTemplate
from muco_ds.data.conversations import ConversationReader
from muco_ds.data.index import Index, Indexer, open_index
from muco_ds.data.joined import JoinedReader, join_indices
from muco_ds.data.loader import StepDataset
from muco_ds.data.mixture import Mixture
from muco_ds.data.plan import Plan
from muco_ds.data.readers import M3TReader, PairReader, Reader, SourceReader
from muco_ds.data.schema import TURNS_PER_SAMPLE
from muco_ds.data.stages.base import Stage
from muco_ds.data.stages.compress import CompressStage
from muco_ds.data.stages.curriculum import Limit
from muco_ds.data.stages.finetune import FineTuneStage
from muco_ds.data.stages.muco import MuCoStage, check_kinds
from muco_ds.distributed import env
from muco_ds.distributed.gradient_cache import prepare
from muco_ds.ds_config import build_deepspeed_config
from muco_ds.errors import UserError
from muco_ds.eval.answers import AnswerValidation
from muco_ds.eval.held_out import RetrievalValidation, SuiteValidation, Validation
from muco_ds.eval.suites import SuiteOptions, open_suite
from muco_ds.flops import FlopsModel
from muco_ds.models.backbones import draw_rows, load_backbone, load_config, new_rows, unknown_compression_ids
from muco_ds.models.embedder import Embedder
from muco_ds.models.folder import Processing, Settings
from muco_ds.models.head import check_head, tied, vocabulary_head
from muco_ds.models.liger import use_liger
from muco_ds.models.lora import add_adapter
from muco_ds.models.recompute import recompute_layers
from muco_ds.optim import build_optimizer
from muco_ds.tasks.base import Task
from muco_ds.tasks.compress import CompressTask
from muco_ds.tasks.finetune import FineTuneTask
from muco_ds.tasks.muco import MuCoTask

log = logging.getLogger(__name__)


@dataclass
class Data:
    """The data side of a run."""

    processing: Processing
    packer: Packer
    plan: Plan
    collator: Collator

    def steps(self, max_steps: int) -> StepDataset:
        """This rank's batches, by step."""
        return StepDataset(self.plan, self.collator, env.rank(), max_steps)


def build_data(config: RunConfig, world_size: int | None = None) -> Data:
    """Readers, length index (built by rank 0 if it is not there), plan and collator. Collective.

    Args:
        world_size: ranks to plan for; default: those of this run.
    Raises:
        UserError: wrong input of any kind.
    """
    with env.agreement():
        backbone = load_config(config.model.path)
        if config.task.name == "coma_compress":
            check_head(config.model.path)
        processing = load_processing(config)
        packer = build_packer(config, processing)
    reader, index = open_sources(config, packer)
    with env.agreement():
        stage = build_stage(config, index, reader, packer)
        check_kinds(index, config.task.turn_weights)
        if config.task.negatives and not len(index.negatives):
            raise UserError(
                f"task.negatives={config.task.negatives} but no row of data.train holds any: fill the columns neg_text "
                "or neg_image_path, or set it to 0"
            )
        mixture = Mixture(
            np.diff([0, *(part.end for part in index.parts)]).tolist(),
            [source.weight for source in config.data.sources()],
            images=config.batch.images,
            run=config.batch.source_run,
            seed=config.run.seed,
        )
        ranks = world_size or env.world_size()
        if config.batch.images < ranks:
            raise UserError(
                f"batch.images={config.batch.images} is less than {ranks} ranks: raise it or use fewer ranks"
            )
        plan = Plan(stage, _flops(config, backbone), mixture, pack_tokens=config.batch.pack_tokens, world_size=ranks)
    return Data(processing, packer, plan, Collator(stage, packer))


def load_processing(config: RunConfig) -> Processing:
    """Tokenizer and image processor with what the run needs of them. Raises UserError."""
    settings = Settings.of_run(config, load_config(config.model.path).text_config.hidden_size)
    return Processing.load(config.model.path, settings, masks=config.task.reconstruct)


def build_packer(config: RunConfig, processing: Processing) -> Packer:
    """What renders the stage's dialogues, or conversations."""
    packer = processing.packer()
    if config.task.name == "coma_compress":
        packer.conversations = ConversationTemplate(
            packer.template,
            picture_prompt=config.prompts.compress_picture,
            text_prompt=config.prompts.compress_text,
            answers_see=config.task.answers_see,
            train_questions=config.task.train_questions,
        )
    return packer


def _flops(config: RunConfig, backbone: PretrainedConfig) -> FlopsModel:
    model = config.model
    # Rows of a tied table that alone are trained cost the product for all of them.
    head = model.lora.rank == 0 or (model.lora.train_embeddings != "none" and tied(backbone))
    return FlopsModel.from_config(backbone, train_vision=not model.freeze_vision, lora=model.lora, train_head=head)


def build_stage(config: RunConfig, index: Index, reader: Reader, packer: Packer) -> Stage:
    """The data half of the stage that `task.name` names, over these rows."""
    task, curriculum, seed = config.task, config.curriculum, config.run.seed

    def limit(last: int, first: int | None) -> Limit:
        return Limit(last) if first is None else Limit(last, first, curriculum.steps)

    template, negatives = packer.template, limit(task.negatives, curriculum.negatives)
    turns = limit(TURNS_PER_SAMPLE if task.turns is None else task.turns, curriculum.turns)
    if packer.conversations is not None:
        return CompressStage(index, reader, packer.conversations, seed=seed, turns=turns)
    if task.name in ("finetune", "coma_match"):
        return FineTuneStage(
            index,
            reader,
            template,
            seed=seed,
            reconstruct=task.reconstruct,
            after_query=config.prompts.after_query,
            after_target=config.prompts.after_target,
            negatives=negatives,
        )
    return MuCoStage(
        index,
        reader,
        template,
        seed=seed,
        query_history=task.query_history,
        target_history=task.target_history,
        turns=turns,
        turn_weights=task.turn_weights,
        negatives=negatives,
    )


def build_task(config: RunConfig, embedder: Embedder) -> MuCoTask | CompressTask:
    """The loss half of the stage that `task.name` names."""
    if config.task.name == "coma_compress":
        trained = config.model.lora.rank == 0
        return CompressTask(embedder, vocabulary_head(embedder.model, config.model.path, trained=trained))
    if config.task.name in ("finetune", "coma_match"):
        forms = 2 if config.task.reconstruct else 1
        return FineTuneTask(embedder, config.loss, forms=forms, compound=config.task.compound)
    return MuCoTask(embedder, config.loss)


def build_reader(config: RunConfig, source: Source, key: str) -> SourceReader:
    """The rows of a data set as the stage needs them; held-out rows are questions and answers alone."""
    assert source.images is not None
    if config.task.name == "coma_compress":
        return ConversationReader(source.path, source.images, key)
    if key == "data.val":
        return M3TReader(source.path, source.images, key)
    kind = PairReader if config.task.name in ("finetune", "coma_match") else M3TReader
    return kind(source.path, source.images, key, negatives=config.task.negatives > 0)


def open_sources(config: RunConfig, packer: Packer) -> tuple[Reader, Index]:
    """Reader and length index of `data.train`, several data sets joined to one. Collective."""
    if isinstance(config.data.train, str):
        return open_rows(config, packer, config.data.sources()[0], "data.train")
    opened = [open_rows(config, packer, source, f"data.train[{i}]") for i, source in enumerate(config.data.sources())]
    readers, indices = [reader for reader, _ in opened], [index for _, index in opened]
    env.on_main(lambda: join_indices(indices, readers, config.data.index_dir, builder=True))
    with env.agreement():
        joined = join_indices(indices, readers, config.data.index_dir, builder=False)
    return JoinedReader(readers), joined


def open_rows(config: RunConfig, packer: Packer, source: Source, key: str) -> tuple[SourceReader, Index]:
    """Reader and length index of a data set; rank 0 builds the index if it is not there. Collective."""
    with env.agreement():
        reader = build_reader(config, source, key)
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
    if index.uncaptioned and config.task.reconstruct and env.is_main():
        cure = "pictures without qry_sentence or pos_sentence are restated without a word about them"
        log.warning("%s: %d of %d rows lack a caption: %s", key, index.uncaptioned, len(reader), cure)
    return reader, index


def build_validation(config: RunConfig, data: Data) -> Validation | None:
    """The judgement by the first usable held-out rows, as many as `validation.rows` says; None if there is none."""
    if not config.validation.every:
        return None
    assert config.data.val is not None
    packer = data.packer
    reader, index = open_rows(config, packer, Source(config.data.val, config.data.images), "data.val")
    if len(index) < config.validation.rows and env.is_main():
        log.warning("validation uses the %d usable rows of data.val", len(index))
    rows = min(len(index), config.validation.rows)
    if config.task.name == "coma_compress":
        with env.agreement():
            stage = build_stage(config, index, reader, packer)
            mixture = Mixture([rows], [None], images=rows, run=rows, seed=config.run.seed)
            pack_tokens, world_size = config.batch.pack_tokens, env.world_size()
            plan = Plan(stage, data.plan.flops, mixture, pack_tokens=pack_tokens, world_size=world_size)
            return AnswerValidation(plan, Collator(stage, packer))
    records = [reader.record(int(row)) for row in index.samples["row"][:rows]]
    sizes = config.loss.matryoshka or ()
    return RetrievalValidation(records, packer, pack_tokens=config.batch.pack_tokens, sizes=sizes)


def build_suites(config: RunConfig, packer: Packer) -> dict[str, SuiteValidation]:
    """The benchmarks of `evaluation`, their files found. Raises UserError, on every rank."""
    suites = {}
    with env.agreement():
        for name, schedule in config.evaluation.scheduled().items():
            assert schedule.data is not None
            try:
                suite = open_suite(SuiteOptions(name, schedule.data, schedule.images, schedule.datasets, schedule.rows))
            except UserError as error:
                raise UserError(f"evaluation.{name}: {error}") from error
            suites[name] = SuiteValidation(
                suite,
                packer,
                pack_tokens=config.batch.pack_tokens,
                sizes=config.loss.matryoshka or (),
                seconds=schedule.seconds,
            )
    return suites


def build_engine(
    config: RunConfig, processing: Processing, device: torch.device, *, load_universal: bool = False
) -> tuple[Any, Task]:
    """The DeepSpeed engine and the task it runs, partitioned from the start under ZeRO-3. Collective.

    Args:
        load_universal: the engine will load a checkpoint's universal form (`reshard.load_universal`).
    """
    import deepspeed

    torch.manual_seed(config.run.seed)

    with env.agreement():
        ds_config = build_deepspeed_config(config, env.world_size(), load_universal=load_universal)
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    if config.model.attention in ("flash_attn", "varlen") and device.type == "cpu":
        problem = (
            f"model.attention={config.model.attention} needs a GPU, this machine has none: set model.attention=auto"
        )
        raise UserError(problem, on_every_rank=True)
    model = _build_model(config, processing, ds_config if stage == 3 else None)
    recompute_layers(model, config.model.activation_checkpointing, freeze_vision=config.model.freeze_vision)
    with env.agreement():  # a head of its own is read here; the engine will partition it
        task = build_task(config, Embedder(model, freeze_vision=config.model.freeze_vision))
        use_liger(model, config.model.kernels, device)
    if stage < 3:
        task.to(device)
    for module in task.modules():  # zero.Init places parameters; rotary tables are buffers
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    optimizer = build_optimizer(task, config.optim)
    engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=ds_config)
    prepare(engine)
    engine.train()
    return engine, task


def _build_model(config: RunConfig, processing: Processing, partition: dict[str, Any] | None) -> PreTrainedModel:
    """The backbone, with its adapter if there is one. `partition`: the DeepSpeed configuration of ZeRO-3."""
    lora, tokens = config.model.lora, len(processing.tokenizer)
    unknown = unknown_compression_ids(config.model.path, processing.tokenizer)
    rows = load_config(config.model.path).text_config.vocab_size
    if lora.rank and lora.train_embeddings == "none" and (tokens > rows or unknown):
        raise UserError(
            f"model.lora.train_embeddings is none but new tokens are unknown to '{config.model.path}': set it to new",
            on_every_rank=True,
        )
    # transformers builds the model partitioned, and peft gathers what it needs, as long as such an object is alive.
    partitioned = None if partition is None else HfDeepSpeedConfig(partition)
    model = load_backbone(
        config.model.path,
        dtype=torch.bfloat16 if config.run.precision == "bf16" else torch.float32,
        attention=config.model.attention,
        vocabulary=tokens,
    )
    if unknown:
        draw_rows(model, unknown, config.run.seed)
    if lora.rank:
        add_adapter(model, lora, new_rows(processing.tokenizer), config.run.seed)
    del partitioned
    return model
