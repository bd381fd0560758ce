"""The 36 data sets of MMEB V1: meta-task, whether it is trained on (IND) or not (OOD), how its texts are composed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from muco_ds.errors import UserError

Parser = Literal["cls", "qa", "i2t", "t2i", "i2i"]
"""Which of VLM2Vec's parsers composes the texts; see `mmeb_text`."""

META_TASKS = ("Classification", "VQA", "Retrieval", "Grounding")

# IND first, then OOD: the order of the published tables.
_NAMES = {
    "Classification": (
        "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
        "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ),
    "VQA": (
        "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
        "ScienceQA VizWiz GQA TextVQA",
    ),
    "Retrieval": (
        "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
        "FashionIQ Wiki-SS-NQ OVEN EDIS",
    ),
    "Grounding": ("MSCOCO", "RefCOCO RefCOCO-Matching Visual7W-Pointing"),
}
_RETRIEVAL: dict[str, Parser] = {
    **dict.fromkeys(("MSCOCO_i2t", "VisualNews_i2t"), "i2t"),
    **dict.fromkeys(("VisDial", "MSCOCO_t2i", "VisualNews_t2i", "WebQA", "EDIS", "Wiki-SS-NQ"), "t2i"),
}


@dataclass(frozen=True)
class MMEBDataset:
    """One of the 36. `in_distribution`: its training part belongs to MMEB-train."""

    name: str
    meta_task: str
    in_distribution: bool

    @property
    def parser(self) -> Parser:
        if self.meta_task == "Classification":
            return "cls"
        return "qa" if self.meta_task == "VQA" else _RETRIEVAL.get(self.name, "i2i")

    @property
    def means(self) -> tuple[str, str, str]:
        """The means that it counts for."""
        return "overall", "IND" if self.in_distribution else "OOD", self.meta_task


DATASETS: dict[str, MMEBDataset] = {
    name: MMEBDataset(name, meta_task, in_distribution)
    for meta_task, both in _NAMES.items()
    for in_distribution, names in zip((True, False), both, strict=True)
    for name in names.split()
}

MEANS = ("overall", "IND", "OOD", *META_TASKS)


def plain(name: str) -> str:
    """A name without what its spellings differ in: ImageNet-1K is ImageNet_1K in MMEB-train."""
    return name.lower().replace("_", "-")


_BY_PLAIN = {plain(name): name for name in DATASETS}


def chosen(names: Iterable[str]) -> list[str]:
    """Data sets by any spelling of their names, in the table's order.

    Raises:
        UserError: a name that is none of the 36, with the nearest ones.
    """
    found = set()
    for name in names:
        if plain(name) not in _BY_PLAIN:
            nearest = difflib.get_close_matches(plain(name), _BY_PLAIN, n=3, cutoff=0.0)
            choices = ", ".join(_BY_PLAIN[near] for near in nearest)
            raise UserError(f"--datasets: MMEB has no data set '{name}': the nearest names are {choices}")
        found.add(_BY_PLAIN[plain(name)])
    return [name for name in DATASETS if name in found]
