"""The loop: build, resume, step, log, validate, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from muco_ds.build import build_data, build_engine, build_suites, build_validation
from muco_ds.checkpoint import Checkpoints, load_files
from muco_ds.config import RunConfig, save_config
from muco_ds.data.draws import DROPOUT, draw_u64
from muco_ds.data.loader import step_batches
from muco_ds.data.plan import spread_steps
from muco_ds.data.schema import StepBatch
from muco_ds.distributed import env
from muco_ds.distributed.lockstep import Lockstep
from muco_ds.errors import UserError
from muco_ds.eval.held_out import Validation
from muco_ds.flops import peak_flops
from muco_ds.health import Health
from muco_ds.heartbeat import SAVING, VALIDATING
from muco_ds.metrics import Meter, MetricsWriter, peak_memory_gib, spread
from muco_ds.models.encode import encode_dialogues
from muco_ds.models.probe import probe_dialogues
from muco_ds.nonfinite import NonFiniteGuard
from muco_ds.optim import learning_rate
from muco_ds.reshard import load_universal, universal_form, unusable
from muco_ds.resume import Start, check_base, check_same_run, describe_base, describe_data
from muco_ds.temperature import Temperature

log = logging.getLogger(__name__)

_LAST_WRITE_S = 600.0

VERSIONED = ("torch", "deepspeed", "transformers", "muco_ds")


class Trainer:
    """One run. Every rank builds one and calls `fit`.

    Args:
        health: what is told how the run goes on; nothing is by default.

    Raises:
        UserError: whatever of the user's input turns out wrong, on every rank.
    """

    def __init__(self, config: RunConfig, device: torch.device, health: Health | None = None) -> None:
        self.config, self.device = config, device
        self.folder = Path(config.run.dir) / config.run.name
        self.health = health or Health(self.folder)
        self.lockstep = Lockstep()
        self.data = build_data(config)  # first, because its mistakes are found in seconds
        self.validations: list[tuple[int, Validation]] = []  # and the steps between two
        if (validation := build_validation(config, self.data)) is not None:
            self.validations.append((config.validation.every, validation))
        for name, suite in build_suites(config, self.data.packer).items():
            self.validations.append((config.evaluation.scheduled()[name].every, suite))
        self.max_steps = config.run.steps(self.data.plan.mixture.steps_per_epoch)
        self.guard = NonFiniteGuard(config.optim.max_skipped, self.folder, self.data.plan.index)
        self.temperature = Temperature(config.temperature, config.loss.temperature, device)
        with env.agreement():
            self.base = describe_base(config.model)
        self.checkpoints = self._checkpoints()
        start = self._find_start()
        universal = start is not None and start.universal
        self.engine, self.task = build_engine(config, self.data.processing, device, load_universal=universal)
        self.start_step = 0 if start is None else self._resume(start)
        with env.agreement():
            self.metrics = self._open_folder() if env.is_main() else None
        log.info(
            "%s: steps %d to %d of %d examples, %.1f epochs of %d rows; ZeRO stage %d on %d ranks, %s",
            *(self.folder, self.start_step, self.max_steps, config.batch.images),
            *(self.max_steps / self.data.plan.mixture.steps_per_epoch, len(self.data.plan.index)),
            *(self.engine.zero_optimization_stage(), env.world_size(), config.run.precision),
        )

    def _checkpoints(self) -> Checkpoints:
        options = self.config.checkpoint
        return Checkpoints(
            self.folder / "checkpoints",
            options.keep,
            keep_every=options.keep_every,
            copies=None if options.copy_to is None else Path(options.copy_to) / self.config.run.name,
            background=options.background,
            frozen=self.config.model.lora.rank == 0,  # beside an adapter the weights stay those of model.path
        )

    def _open_folder(self) -> MetricsWriter:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.folder / "config.yaml")
            metrics = MetricsWriter(self.folder, self.start_step)
        except OSError as error:
            problem = f"run.dir: can't write to '{self.folder}' ({error.strerror}): set another folder"
            raise UserError(problem) from error
        metrics.config(asdict(self.config))
        return metrics

    def fit(self) -> bool:
        """Train to the last step. False when a signal ended the run early (state saved)."""
        bar = tqdm(total=self.max_steps, initial=self.start_step, desc=self.config.run.name, disable=not env.is_main())
        written = nullcontext() if self.metrics is None else closing(self.metrics)
        with bar, written:
            try:
                return self._steps(bar)
            except Exception as error:
                # What is being written is a good state. Where a user's mistake ends this rank the others are still
                # there to finish it; where anything else does, one of several may be gone.
                if isinstance(error, UserError) or env.world_size() == 1:
                    self.checkpoints.wait(_LAST_WRITE_S)
                raise

    def _steps(self, bar: tqdm) -> bool:
        """Step, log, validate and save to the end of the run or to a signal."""
        config, meter, health = self.config, Meter(), self.health
        step = saved = self.start_step
        stopped = False
        health.begin(step, self.max_steps)
        for batch, waited in self._batches():
            health.edge(waited)
            if stopped := self.lockstep.stop_before(batch, now=self.checkpoints.failed):
                break
            met = health.training()
            stats = self.train_step(batch)
            step = batch.step + 1
            last = step == self.max_steps
            health.stepped(step)
            meter.add(batch, waited, met)
            bar.update()
            held_out: dict[str, float] = {}
            for every, validation in self.validations:
                if _due(step, every, last):
                    with health.during(VALIDATING), meter.paused():
                        held_out |= self._validate(validation, step)
            if held_out or _due(step, config.log.every, last):
                bar.set_postfix_str(self._log(batch, stats, meter, held_out))
            if _due(step, config.checkpoint.every, last):
                with health.during(SAVING), meter.paused():
                    self._save(step)
                saved = step
        with health.during(SAVING):
            if step > saved:
                self._save(step)
            self.checkpoints.finish()
        health.end(finished=not stopped)
        return not stopped

    def dry_run(self, most_steps: int = 50) -> None:
        """Forward and backward of the largest of some steps of the run, without an update: fail in the first minute."""
        plans = [self.data.plan.step(step) for step in spread_steps(self.max_steps, most_steps)]
        largest = max(plans, key=lambda plan: plan.tokens)
        batch = self.data.steps(self.max_steps)[largest.step]
        if isinstance(batch, UserError):
            raise batch
        result = self.task.backward(self.engine, batch, self.temperature.at(largest.step))
        log.info(
            "dry run: %d steps planned, %d per epoch; largest step %d has %d tokens (fill %.2f, imbalance %.3f), "
            "loss %.3f, peak memory %.2f GiB",
            self.max_steps,
            self.data.plan.mixture.steps_per_epoch,
            largest.step,
            largest.tokens,
            largest.pack_fill,
            largest.imbalance,
            env.sum_over_ranks(result.stats["loss"].clone()).item(),
            peak_memory_gib(self.device),
        )

    def train_step(self, batch: StepBatch) -> dict[str, torch.Tensor]:
        """One optimizer step; returns the local sums of the loss's statistics, on the device."""
        # Dropout is a function of seed, step and rank, so that a resumed run draws as it would have.
        torch.manual_seed(int(draw_u64(self.config.run.seed, batch.step, np.array([env.rank()]), DROPOUT)[0]))
        result = self.task.backward(self.engine, batch, self.temperature.at(batch.step))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["lr_ratio"] * learning_rate(batch.step, self.max_steps, self.config.optim)
        self.guard.step(self.engine, batch, result.stats["loss"])  # clip, AdamW; not where the gradient is not finite
        self.temperature.step(taken=self.guard.in_a_row == 0)
        return result.stats

    def _batches(self) -> Iterator[tuple[StepBatch, float]]:
        """Batches with the seconds the loop had to wait for each."""
        batches = step_batches(
            self.data.steps(self.max_steps),
            self.start_step,
            workers=self.config.data.workers,
            pin_memory=self.device.type == "cuda",
        )
        while True:
            self.health.loading()
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            yield batch, time.perf_counter() - start

    def _log(self, batch: StepBatch, stats: dict[str, torch.Tensor], meter: Meter, held_out: dict[str, float]) -> str:
        """Write this step's values and the window's rates; returns the progress bar's text. Collective."""
        names = sorted(stats)
        replaced = torch.tensor(float(meter.replaced_images), device=self.device)
        totals = env.sum_over_ranks(torch.stack([*(stats[name].float() for name in names), replaced])).tolist()
        total = dict(zip([*names, "replaced_images"], totals, strict=True))
        own_RV = env.rows_of_ranks(meter.own(self.device).to(self.device))
        rates = meter.rates(env.world_size(), peak_flops(self.device))
        values: dict[str, float | int | None] = {
            "step": batch.step + 1,
            "epoch": batch.epoch,
            **{name: total[name] for name in names if name.startswith("loss")},
            "lr": learning_rate(batch.step, self.max_steps, self.config.optim),
            "grad_norm": None if self.guard.grad_norm is None else float(self.guard.grad_norm),
            "temperature": self.temperature.used,
            "pairs": batch.pairs,
            "negatives": sum(rows.negatives for rows in batch.rows_per_rank),
            "images": batch.images,
            "llm_tokens": int(batch.cost["llm_tokens"]),
            "vit_patches": int(batch.cost["vit_patches"]),
            **rates,
            "pack_fill": batch.cost["pack_fill"],
            "imbalance": batch.cost["imbalance"],
            **spread(own_RV.cpu().numpy()),
            **self.task.metrics(total),
            "replaced_images": int(total["replaced_images"]),
            "skipped_steps": self.guard.skipped,
            **held_out,
        }
        if self.metrics is not None:
            self.metrics.write(values)
        top1 = "" if values["in_batch_top1"] is None else f" top1 {values['in_batch_top1']:.2f}"
        return f"loss {total['loss']:.3f}{top1} {rates['pairs_per_s']:.0f} pairs/s"

    def _validate(self, validation: Validation, step: int) -> dict[str, float]:
        """What held-out rows or a benchmark say, for the log. Collective."""
        self.engine.eval()
        found = validation(self.engine, self.device)
        self.engine.train()
        if self.metrics is not None:
            self.metrics.show(found.shown, step)
        return found.values

    def _probe(self) -> torch.Tensor:
        """Embeddings of the fixed probe items by the model as it is now. Collective."""
        pack_tokens = self.config.batch.pack_tokens
        self.engine.eval()
        probe_ND = encode_dialogues(
            self.engine, self.data.packer, probe_dialogues(), pack_tokens=pack_tokens, device=self.device, shared=True
        )
        self.engine.train()
        return probe_ND

    def _save(self, step: int) -> None:
        probe_ND = self._probe()
        if not torch.isfinite(probe_ND).all():  # saving would push healthy checkpoints out
            problem = (
                f"step {step}: the weights are not finite any more: lower optim.lr and start again, it goes on from "
            )
            raise UserError(f"{problem}the newest checkpoint", on_every_rank=True)

        def write_beside(path: Path) -> None:
            self.data.processing.save(path / "hf", self.task.embedder.model.config)
            save_file({"probe_ND": probe_ND.contiguous()}, path / "probe.safetensors")

        meta = {
            "config": asdict(self.config),
            "world_size": env.world_size(),
            "data": describe_data(self.data.plan.index),
            "base": self.base,
            "zero_stage": self.engine.zero_optimization_stage(),
            "nonfinite": self.guard.counts(),
            "temperature": self.temperature.state(),
            "versions": {name: version(name) for name in VERSIONED},
        }
        self.checkpoints.save(self.engine, step, meta, write_beside)

    def _find_start(self) -> Start | None:
        """The newest intact checkpoint of this run, if there is one, made ready for this number of ranks."""
        newest = self.checkpoints.newest_intact()
        if newest is None:
            return None
        with env.agreement():
            if not self.config.checkpoint.resume:
                raise UserError(f"{self.folder} holds checkpoints: set checkpoint.resume=true or another run.name")
            check_same_run(newest, asdict(self.config), describe_data(self.data.plan.index))
            if not self.checkpoints.frozen:
                check_base(newest, self.config.model.path, self.base)
            start = Start.of(newest, env.world_size())
        if start.universal:
            env.on_main(partial(universal_form, newest))
            with env.agreement():
                if (problem := unusable(newest)) is not None:
                    raise UserError(
                        f"rank {env.rank()} does not see what rank 0 made of {newest} ({problem}): start again"
                    )
        return start

    def _resume(self, start: Start) -> int:
        """Load a checkpoint and prove that it is the model that was saved; returns the step to go on from."""
        with env.agreement():
            start.check_stage(self.engine.zero_optimization_stage())
        if start.universal:
            load_universal(self.engine, start.checkpoint)
        else:
            load_files(self.engine, start.checkpoint, frozen=self.checkpoints.frozen)
        self.guard.restore(start.nonfinite)
        self.temperature.restore(start.temperature)
        probe_ND = self._probe()
        with env.agreement():
            start.check_probe(probe_ND, self.config.run.precision)
        if env.is_main():
            log.info("resumed from %s", start.checkpoint)
        return start.step


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)
