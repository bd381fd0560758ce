"""A checkpoint for another number of ranks: through DeepSpeed's universal form, in which every tensor is whole.

step_0000100/universal/
    model/          what `deepspeed.checkpoint.ds_to_universal` makes of the checkpoint's shards
    manifest.json   every file with its size and checksum, and which checkpoint it was made from; written last

Whole or not there, like the checkpoint; made when first asked for, and removed by the run's next checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from muco_ds.checkpoint import TAG, UNIVERSAL, load_files, read_meta
from muco_ds.errors import UserError
from muco_ds.manifest import MANIFEST, damaged, flushed, incomplete, seal
from muco_ds.safe_load import tensors_only

log = logging.getLogger(__name__)

WORKERS = 4


def is_sharded(meta: dict[str, Any]) -> bool:
    """Whether a checkpoint's optimizer is cut over its ranks. Without ZeRO any number of ranks loads it as it is."""
    return meta["zero_stage"] > 0


def universal_form(checkpoint: Path, *, workers: int = WORKERS) -> Path:
    """The universal form of a complete checkpoint, made if it is not there. For one process alone.

    Args:
        workers: processes that read shards, each of which holds one in memory.
    Returns: the folder for `load_universal`.
    Raises:
        UserError: it can't be read or written; the checkpoint itself is untouched.
    """
    meta, final = read_meta(checkpoint), checkpoint / UNIVERSAL
    assert is_sharded(meta)
    problem = unusable(checkpoint) or damaged(final)
    if problem is None:
        return final
    if final.exists():
        log.warning("%s (%s): making it again", final, problem)
    size = sum(path.stat().st_size for path in (checkpoint / TAG).glob("*_optim_states.pt")) / 1e9
    log.info(
        "%s: converting what %d ranks wrote for any number of ranks: %.1f GB are read and written twice",
        *(checkpoint, meta["world_size"], size),
    )
    # A name of its own each time: the workers of a start that was killed may still be writing to theirs.
    work = checkpoint / f"{UNIVERSAL}.{uuid4().hex}.tmp"
    try:
        for stale in checkpoint.glob(f"{UNIVERSAL}.*"):
            shutil.rmtree(stale, ignore_errors=True)
        work.mkdir()
        _apart(_convert, checkpoint / TAG, work / TAG, workers, meta["zero_stage"])
        paths = [path for path in work.rglob("*") if path.is_file()]
        files = {str(path.relative_to(work)): flushed(path) for path in sorted(paths)}
        seal(work, final, files, of=_fingerprint(checkpoint))
    except BrokenProcessPool:
        problem = f"{checkpoint}: the process that converts it was killed; if memory ran out, give it more or run"
        raise UserError(f"{problem} tools/reshard_ckpt.py --workers 1") from None
    except UserError:
        raise
    except Exception as error:  # a full disk and damaged shards raise almost anything
        problem = f"{checkpoint}: can't be converted for another number of ranks ({type(error).__name__}: {error})"
        raise UserError(f"{problem.splitlines()[0]}: free space, or start as many as wrote it") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def unusable(checkpoint: Path) -> str | None:
    """Why the universal form of a checkpoint can't be loaded, or None."""
    folder = checkpoint / UNIVERSAL
    problem = incomplete(folder)
    if problem is None and json.loads((folder / MANIFEST).read_text()).get("of") != _fingerprint(checkpoint):
        problem = "made from another checkpoint"
    return problem


def load_universal(engine: Any, checkpoint: Path) -> None:
    """Load a checkpoint's universal form into an engine whose configuration has checkpoint.load_universal. Collective.

    Weights that are not trained keep what they were built with: DeepSpeed restores what its optimizer holds.
    """
    load_files(engine, checkpoint / UNIVERSAL)  # what is not trained is not looked for
    for parameter, state in engine.optimizer.optimizer.state.items():
        # DeepSpeed's ZeRO-3 hands one tensor to all groups, each of which would count it up once a step, and leaves it
        # on the CPU, where a fused optimizer on a GPU can't have it.
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(parameter.device, copy=True)


def _fingerprint(checkpoint: Path) -> str:
    """What tells a checkpoint from another one, of the same run or not: its settings, and embeddings by its weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("meta.json", "probe.safetensors"):
        digest.update((checkpoint / name).read_bytes())
    return digest.hexdigest()


def _apart(work: Callable[..., None], *args: Any) -> None:
    """Call it in a process of its own: DeepSpeed forks workers, which a process with threads and a GPU must not do."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(work, *args).result()


def _convert(shards: Path, out: Path, workers: int, stage: int) -> None:
    """DeepSpeed's conversion. Its progress bars are kept, its messages are not."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        # Schedulers signal every process of a job. What it means is for the training process to decide, when it can.
        signal.signal(number, signal.SIG_IGN)
    logging.disable(logging.WARNING)
    set_start_method("fork", force=True)  # for its workers, which then need not import torch again
    from deepspeed.checkpoint import ds_to_universal

    args = Namespace(
        **{"input_folder": str(shards), "output_folder": str(out), "keep_temp_folder": False, "strict": True},
        **{"num_extract_workers": workers, "num_merge_workers": workers},
        inject_missing_state=True,  # a note on tensor parallelism, which no run here has
    )
    with redirect_stdout(StringIO()), tensors_only(shards):  # its workers inherit that
        ds_to_universal.main(args)
    if stage == 3:
        _drop_first_shard(out / "zero" / "optimizer_state.pt")


def _drop_first_shard(path: Path) -> None:
    """DeepSpeed keeps rank 0's whole shard in this file, which every rank reads, for the sake of its step counters."""
    with tensors_only(path):
        state = torch.load(path, map_location="cpu")
    state.pop("fp32_flat_groups")
    optimizer = state["optimizer_state_dict"]
    optimizer["state"] = {key: {"step": values["step"]} for key, values in optimizer["state"].items()}
    torch.save(state, path)
