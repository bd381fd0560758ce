"""DeepSpeed's checkpoint files are pickles: here they may hold tensors and what DeepSpeed puts beside them, no more.

DeepSpeed asks torch.load for everything a pickle can do (weights_only=False), which includes running any program.
Torch has a variable that overrules the caller, and a list of the classes that are allowed then.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from muco_ds.errors import UserError

_FORCED, _OVERRULED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_NAMED = re.compile(r"GLOBAL ([\w.]+)")


@contextmanager
def tensors_only(path: Path) -> Iterator[None]:
    """All of this process's torch.load, DeepSpeed's too, refuse what our own checkpoints do not hold.

    Args:
        path: the file or folder that is loaded, for the message.
    Raises:
        UserError: it holds something else; nothing of that was run.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler  # seconds
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    members = ZeroStageEnum.__members__

    def member(kind: object, name: object) -> Any:
        """In place of `getattr`: early releases of Python 3.11 (Debian 12's) pickle members of enumerations by it."""
        if kind is not ZeroStageEnum or not isinstance(name, str) or name not in members:
            raise pickle.UnpicklingError("GLOBAL getattr of more than DeepSpeed's own names")
        return members[name]

    allowed = [LossScaler, ZeroStageEnum, fragment_address, (member, "builtins.getattr")]
    before = {name: os.environ.pop(name, None) for name in (_FORCED, _OVERRULED)}
    os.environ[_FORCED] = "1"
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, error)) from error
    finally:
        os.environ.pop(_FORCED)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _refusal(path: Path, error: pickle.UnpicklingError) -> str:
    named = _NAMED.search(str(error))
    what = f"more than tensors ({named[1]})" if named else "what torch does not load"
    return f"{path}: holds {what}: it is damaged or was not written by this program, and was not run: remove it"
