"""Installed versions that are known to train wrong, to break or to be unsafe here: said at the start, with the cure.

Imports nothing of what it looks at, since some of it breaks while it is imported. The reasons are in docs/log.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from muco_ds.ends import launcher_int
from muco_ds.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """Versions of a package below `below`. `fatal`: no run with it may start."""

    package: str
    below: str
    problem: str
    fatal: bool = True


KNOWN = (
    Known("torch", "2.10", "has no torch.nn.attention.varlen"),
    Known("deepspeed", "0.19.8", "breaks recomputation of frozen layers under ZeRO-3"),
    Known("transformers", "5.20", "hands the text's lengths to the vision tower's attention"),
    Known("transformers", "5.23", "rounds rotary tables to bf16 under ZeRO-3, which such a run refuses", fatal=False),
    Known("pyarrow", "14.0.1", "runs the pickles in a parquet file (CVE-2023-47248)"),
    Known("pillow", "11.0", "turns TIFFs by another rule and opens 16-bit PNGs as white", fatal=False),
)

_ITS_OWN = ("huggingface-hub", "tokenizers", "safetensors")
"""Packages of which transformers takes a range only, and says so by an ImportError of many lines."""


def check_versions() -> None:
    """Warn of what is installed and known to be bad. Raises UserError for what no run can start with."""
    for line, fatal in problems():
        if fatal:
            raise UserError(line, on_every_rank=True)
        if launcher_int("RANK") == 0:
            log.warning(line)


def problems() -> Iterator[tuple[str, bool]]:
    """Lines with their cures, and whether they are fatal; the fatal ones of a package come first."""
    for known in KNOWN:
        found = _version(known.package)
        if found is not None and found < Version(known.below):
            cure = f"pip install '{known.package}>={known.below}'"
            yield f"{known.package} {found} {known.problem}: {cure}", known.fatal
    for needed in _requirements("transformers"):
        found = _version(needed.name)
        if needed.name in _ITS_OWN and found is not None and not needed.specifier.contains(found, prereleases=True):
            told = f"transformers {_version('transformers')} needs {needed.name}{needed.specifier}"
            yield f"{needed.name} {found} is installed but {told}: pip install '{needed.name}{needed.specifier}'", True
    yield from _beside_torch()


def _beside_torch() -> Iterator[tuple[str, bool]]:
    torch, vision, triton = map(_version, ("torch", "torchvision", "triton"))
    if torch is None:
        return
    if vision is not None and torch.local == "cpu" and vision.local != "cpu":
        problem = f"torchvision {vision} is built for CUDA and torch {torch} is not: importing transformers breaks"
        yield f"{problem}: pip uninstall torchvision, which training does not need", True
    for needed in _requirements("torch"):
        if needed.name == "triton" and triton is not None and not needed.specifier.contains(triton, prereleases=True):
            problem = f"triton {triton} is installed but torch {torch} was built with triton{needed.specifier}"
            yield f"{problem}: pip install 'triton{needed.specifier}'", False


def _version(package: str) -> Version | None:
    try:
        return Version(metadata.version(package))
    except (metadata.PackageNotFoundError, InvalidVersion, TypeError):  # TypeError: a package without its metadata
        return None


def _requirements(package: str) -> Iterator[Requirement]:
    """Those that count on this machine, without extras."""
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return
    for line in lines:
        try:
            needed = Requirement(line)
        except InvalidRequirement:
            continue
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            yield needed
