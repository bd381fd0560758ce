"""Steps as batches: worker processes decode, tokenise and pack ahead of the training loop."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from muco_ds.data.collator import Collator
from muco_ds.data.decode import keep_memory
from muco_ds.data.plan import Plan
from muco_ds.data.readers import RowError
from muco_ds.data.schema import StepBatch
from muco_ds.errors import UserError


class StepDataset(Dataset[StepBatch | UserError]):
    """step -> this rank's StepBatch. A user's mistake is returned, because raised in a worker it gets a traceback."""

    def __init__(self, plan: Plan, collator: Collator, rank: int, max_steps: int) -> None:
        self.plan, self.collator, self.rank, self.max_steps = plan, collator, rank, max_steps

    def __len__(self) -> int:
        return self.max_steps

    def __getitem__(self, step: int) -> StepBatch | UserError:
        try:
            plan = self.plan.step(step)
            packs = [self.collator(plan.samples_B[pack], plan.passes_B[pack], step) for pack in plan.packs[self.rank]]
        except UserError as error:
            return error
        except RowError as error:
            return changed_row(error)
        return StepBatch(
            step=step,
            epoch=step // self.plan.mixture.steps_per_epoch,
            packs=packs,
            plan_digest=plan.digest(),
            rows_per_rank=plan.rows_per_rank,
            samples=plan.samples_B[np.concatenate(plan.packs[self.rank])],
            images=plan.images,
            pairs=plan.pairs,
            cost={
                "llm_tokens": plan.tokens,
                "vit_patches": plan.patches,
                "flops": plan.flops,
                "pack_fill": plan.pack_fill,
                "imbalance": plan.imbalance,
            },
        )


def changed_row(error: RowError) -> UserError:
    """What to say of a row that is not as it was indexed."""
    return UserError(f"{error}: it changed after it was indexed: run tools/index_data.py with --rebuild")


def step_batches(dataset: StepDataset, start: int, *, workers: int, pin_memory: bool) -> Iterator[StepBatch]:
    """This rank's batches of steps start .. max_steps, in order, prepared by `workers` processes (0: inline).

    Raises:
        UserError: what a worker found wrong, as one line.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, len(dataset)),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        # Workers only touch numpy, Pillow and the tokenizer: forking is safe and starts in milliseconds.
        multiprocessing_context="fork" if workers else None,
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    keep_memory()
    # Schedulers and launchers signal whole process groups. What a signal means is for the training process to decide;
    # a worker that died of it would take the run down before it could save. Workers end with the loop or its process.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
