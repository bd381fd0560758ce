"""The log of one rank: whatever it says, warns or fails with, while the console keeps showing rank 0."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import socket
import sys
import threading
import time
import warnings
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

MOST_BYTES = 8 * 2**20
"""Of a file; one older one is kept beside it."""

VERSIONED = ("muco_ds", "torch", "deepspeed", "transformers")


def log_path(folder: Path, rank: int) -> Path:
    return folder / "logs" / f"rank_{rank:04d}.log"


def restarts() -> int:
    """How often the scheduler or the launcher has started this job again."""
    counts = (os.environ.get(name, "") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return max(int(count) if count.isdigit() else 0 for count in counts)


class _Utc(logging.Formatter):
    converter = staticmethod(time.gmtime)  # type: ignore[assignment]


class RankLog:
    """Appends to `folder/logs/rank_NNNN.log`, from a header line on, what Python's logging of this process gets at INFO
    or above on any rank, its warnings, and by `failed` what ended it. What the console shows stays as it is.

    Raises:
        OSError: the file can't be opened. Later failures of the disk are passed over: a log must not end a run.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        path = log_path(folder, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handler = RotatingFileHandler(path, maxBytes=MOST_BYTES, backupCount=1, encoding="utf-8")
        self._handler.setFormatter(_Utc("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ"))
        self._handler.setLevel(logging.INFO)
        self._handler.handleError = lambda record: None  # type: ignore[method-assign]
        self._file = logging.Logger("rank")  # of no hierarchy: what goes here is on the console already
        self._file.addHandler(self._handler)
        self._file.info(self._header(rank))
        self._attach()
        self._thread_failed = threading.excepthook
        threading.excepthook = self._failed_in_thread
        self._show_warning = warnings.showwarning
        warnings.showwarning = self._warn  # type: ignore[assignment]

    def _header(self, rank: int) -> str:
        versions = [f"python {sys.version.split()[0]}"]
        versions += [f"{name} {importlib.metadata.version(name)}" for name in VERSIONED]
        facts = [f"rank {rank} of {os.environ.get('WORLD_SIZE', '1')}", f"host {socket.gethostname()}"]
        facts += [f"pid {os.getpid()}", f"job {os.environ.get('SLURM_JOB_ID', '-')}", f"restart {restarts()}"]
        return f"start: {', '.join([*facts, *versions])}"

    def _attach(self) -> None:
        root = logging.getLogger()
        self._console = [(handler, handler.level) for handler in root.handlers]
        for handler, level in self._console:
            handler.setLevel(max(level, root.level))
        self._level = root.level
        root.setLevel(min(root.level, logging.INFO))
        # Libraries (DeepSpeed, transformers) keep loggers that print by themselves and hand nothing on.
        known = [logger for logger in root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
        self._attached = [root, *(logger for logger in known if logger.handlers and not logger.propagate)]
        for logger in self._attached:
            logger.addHandler(self._handler)

    def _warn(self, message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        self._show_warning(message, category, filename, lineno, *rest)
        self._file.warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)

    def _failed_in_thread(self, args: threading.ExceptHookArgs) -> None:
        """A thread's end, TensorBoard's on a full disk: the console gets a line, as what comes of it is said there."""
        name = "a thread" if args.thread is None else args.thread.name
        print(f"{name} ended: {args.exc_type.__name__}: {args.exc_value}", file=sys.stderr, flush=True)
        self._file.error("%s ended", name, exc_info=args.exc_value)

    def failed(self, error: BaseException, *, traceback: bool) -> None:
        """What ended this rank."""
        self._file.error("%s: %s", type(error).__name__, error, exc_info=error if traceback else None)

    def close(self) -> None:
        warnings.showwarning = self._show_warning
        threading.excepthook = self._thread_failed
        for logger in self._attached:
            logger.removeHandler(self._handler)
        for handler, level in self._console:
            handler.setLevel(level)
        logging.getLogger().setLevel(self._level)
        self._handler.close()
