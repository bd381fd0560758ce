"""What a run will be like on a number of ranks, before any GPU is taken: plan, balance, fill, memory, and advice.

Shape suffixes: B examples of the global batch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from muco_ds.build import Data, build_data
from muco_ds.config import RunConfig
from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.data.assign import least_pack_tokens
from muco_ds.data.plan import Plan, StepPlan, spread_steps
from muco_ds.data.stages.base import longest_rows
from muco_ds.ds_config import build_deepspeed_config
from muco_ds.memory import GIB, Memory, estimate
from muco_ds.memory_activations import Load
from muco_ds.models.backbones import load_config, new_rows
from muco_ds.sizing import choices, least, overrides, with_checkpointing

POOR_FILL = 0.9
SPARE_TOKENS = 1.01  # of an advised budget: steps that were not looked at may need a little more
_OFFLOAD = "ds_configs/zero3_offload.json"


@dataclass(frozen=True)
class Planned:
    """One step of the plan, numbered as in metrics.jsonl, and what it puts on the ranks."""

    step: int
    pairs: int
    llm_tokens: int
    vit_patches: int
    tflop: float
    packs: int
    imbalance: float
    pack_fill: float
    load: Load
    least_pack_tokens: int  # with which it would take as many packs


@dataclass(frozen=True)
class Report:
    """The answer. `advice` is empty where there is nothing to mend."""

    ranks: int
    rows: int
    bad_rows: int
    steps_per_epoch: int
    steps: int
    images: int
    pack_tokens: int
    planned: list[Planned]
    memory: Memory
    gpu_memory_gib: float
    fits: bool
    advice: list[str]

    def as_json(self) -> dict[str, Any]:
        tree = asdict(self)
        tree["memory"]["total"] = self.memory.total
        for name in ("imbalance", "pack_fill", "packs"):
            values = [getattr(step, name) for step in self.planned]
            worst = min(values) if name == "pack_fill" else max(values)
            tree[name] = {"mean": float(np.mean(values)), "worst": worst}
        return tree


def preflight(config: RunConfig, ranks: int, gpu_memory_gib: float, most_steps: int, *, progress: bool) -> Report:
    """Plan up to `most_steps` steps, spread over the run, for `ranks` ranks, and estimate the memory of the fullest.

    Raises:
        UserError: wrong input of any kind.
    """
    build_deepspeed_config(config, ranks)  # its mistakes are found at once, an index takes a while
    data = build_data(config, ranks)
    plan = data.plan
    steps = config.run.steps(plan.mixture.steps_per_epoch)
    chosen = spread_steps(steps, most_steps)
    planned = [look_at(plan, plan.step(step)) for step in tqdm(chosen, "planning", disable=not progress)]
    memory = estimated(config, data, ranks, worst(planned))
    return Report(
        ranks=ranks,
        rows=len(plan.index),
        bad_rows=plan.index.bad_rows,
        steps_per_epoch=plan.mixture.steps_per_epoch,
        steps=steps,
        images=config.batch.images,
        pack_tokens=config.batch.pack_tokens,
        planned=planned,
        memory=memory,
        gpu_memory_gib=gpu_memory_gib,
        fits=memory.total <= gpu_memory_gib * GIB,
        advice=advise(config, data, ranks, planned, gpu_memory_gib),
    )


def look_at(plan: Plan, step: StepPlan) -> Planned:
    costs = plan.costs(step.samples_B, step.passes_B, step.step)
    tokens_B, attended_B, patches_B = costs.tokens_B, costs.attended_B, costs.patches_B
    packs = [pack for rank in step.packs for pack in rank]
    n_packs = len(step.packs[0])
    load = Load(
        packs=n_packs,
        tokens=max(int(tokens_B[pack].sum()) for pack in packs),
        attended=max(int(attended_B[pack].sum()) for pack in packs),
        read=max(int(costs.read_B[pack].sum()) for pack in packs),
        read_attended=max(int(costs.read_attended_B[pack].sum()) for pack in packs),
        patches=max(int(patches_B[pack].sum()) for pack in packs),
        rank_patches=max(int(patches_B[np.concatenate(rank)].sum()) for rank in step.packs),
        rank_rows=max(rows.queries + rows.keys for rows in step.rows_per_rank),
        keys=sum(rows.keys for rows in step.rows_per_rank),
        predicted=max(int(costs.predicted_B[pack].sum()) for pack in packs),
    )
    return Planned(
        step=step.step + 1,
        pairs=step.pairs,
        llm_tokens=step.tokens,
        vit_patches=step.patches,
        tflop=step.flops / 1e12,
        packs=n_packs,
        imbalance=step.imbalance,
        pack_fill=step.pack_fill,
        load=load,
        least_pack_tokens=least_pack_tokens(tokens_B, plan.world_size, n_packs, plan.pack_tokens),
    )


def worst(planned: list[Planned]) -> Load:
    """The largest of everything, though no single step may have it all."""
    loads = [asdict(step.load) for step in planned]
    return Load(**{name: max(load[name] for load in loads) for name in loads[0]})


def estimated(config: RunConfig, data: Data, ranks: int, load: Load) -> Memory:
    return estimate(
        load_config(config.model.path),
        build_deepspeed_config(config, ranks),
        load,
        vocabulary=len(data.processing.tokenizer),
        world_size=ranks,
        precision=config.run.precision,
        freeze_vision=config.model.freeze_vision,
        activation_checkpointing=config.model.activation_checkpointing,
        fused_attention=config.run.precision == "bf16" and config.model.attention != "sdpa",
        lora=config.model.lora,
        new_tokens=len(new_rows(data.processing.tokenizer)),
        matryoshka=config.loss.matryoshka or (),
        predicts_tokens=config.task.name == "coma_compress",
    )


def advise(config: RunConfig, data: Data, ranks: int, planned: list[Planned], gpu_memory_gib: float) -> list[str]:
    """What to change: where packs are poorly filled, and where memory does not suffice."""
    load, limit = worst(planned), gpu_memory_gib * GIB
    longest = int(longest_rows(data.plan.stage).max())  # no budget may be smaller
    advice = []
    least = max(longest, math.ceil(SPARE_TOKENS * max(step.least_pack_tokens for step in planned)))
    fill = np.mean([step.pack_fill for step in planned]) * config.batch.pack_tokens / least
    if min(step.pack_fill for step in planned) < POOR_FILL and least < config.batch.pack_tokens:
        advice.append(
            f"batch.pack_tokens={least} suffices for as many packs ({load.packs} a rank), at a fill of {fill:.2f}"
        )
    if estimated(config, data, ranks, load).total <= limit:
        return advice
    for text, total in _cures(config, data, ranks, load, limit, longest):
        if total <= limit:
            advice.append(f"{text} would bring it to {total / GIB:.1f} GiB")
    if not any("would bring" in line for line in advice):
        advice.append(
            "no single change suffices: combine more ranks, model.activation_checkpointing of 1, "
            f"a smaller batch.pack_tokens (the longest row needs {longest}) and deepspeed={_OFFLOAD}"
        )
    return advice


def _cures(config: RunConfig, data: Data, ranks: int, load: Load, limit: float, longest: int) -> list[tuple[str, int]]:
    """Single changes, and the estimated total with each."""
    cures = []

    def recomputing(choice: ActivationCheckpointing) -> int:
        return estimated(with_checkpointing(config, choice), data, ranks, load).total

    options = choices(config.model.activation_checkpointing, load_config(config.model.path), config.model.freeze_vision)
    if (choice := least(options, recomputing, limit)) is not None:
        keys = " ".join(f"{key}={share:g}" for key, share in overrides(choice).items())
        cures.append((keys, recomputing(choice)))
    budget = load.tokens
    while budget > longest:
        budget = max(longest, budget // 2)
        share = budget / load.tokens
        smaller = replace(
            load,
            packs=math.ceil(load.packs / share),
            tokens=budget,
            attended=int(load.attended * share),
            patches=int(load.patches * share),
        )
        total = estimated(config, data, ranks, smaller).total
        if total <= limit or budget == longest:
            cures.append((f"batch.pack_tokens={budget}", total))
            break
    if not config.deepspeed.endswith("_offload.json"):
        changed = replace(config, deepspeed=_OFFLOAD)
        cures.append((f"deepspeed={_OFFLOAD}", estimated(changed, data, ranks, load).total))
    more = 2 * ranks
    while more <= config.batch.images:
        total = estimated(config, data, more, replace(load, tokens=max(longest, load.tokens // (more // ranks)))).total
        if total <= limit:
            cures.append((f"--ranks {more}", total))
            break
        more *= 2
    return cures
