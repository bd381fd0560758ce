"""Runs a file in Triton's interpreter, which must be switched on before triton is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def run_interpreted(file: str) -> Any:
    """What the file, run as a program, writes to stdout as JSON."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, file], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
