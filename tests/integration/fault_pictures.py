"""Pictures that break, or are meant to break, whatever opens them."""

from __future__ import annotations

import shutil

from fault_arena import RANKS, Arena, Outcome
from hostile_pictures import GOOD, write_all
from programs import metrics

_STEPS = 8  # one pass over the demo's rows


def pictures(arena: Arena) -> list[Outcome]:
    """The demo's pictures are replaced by hostile ones, once before they are indexed and once after."""
    out = arena.new("pictures")
    kinds = write_all(out / "kinds")
    overrides = {
        **{"data.images": out / "images", "data.index_dir": out / "index"},
        **{"run.max_steps": _STEPS, "data.max_pixels": 7056},
    }
    outcomes = []
    shutil.copytree(arena.demo.data / "images", out / "images")
    # In training: indexed when they were whole.
    arena.programs.run(arena.argv(out / "indexed", overrides | {"run.max_steps": 2}), ranks=RANKS).check()
    replaced = sorted((out / "images").rglob("*.*"))[: len(kinds)]
    for path, kind in zip(replaced, kinds.values(), strict=False):
        path.unlink()
        path.symlink_to(kind) if kind.is_symlink() or not kind.is_file() else shutil.copyfile(kind, path)
    for name, moment in (("indexed", "after"), ("unindexed", "before")):
        if moment == "before":
            shutil.rmtree(out / "index")
        arena.programs.run(arena.argv(out / name, overrides), ranks=RANKS, timeout=300).check()
        lines = metrics(out / name)
        swapped, memory = sum(line["replaced_images"] for line in lines), max(line["peak_mem_gib"] for line in lines)
        assert len(lines) == _STEPS and memory < 4, (len(lines), memory)
        if moment == "after":
            assert swapped > 0
        happened = f"finished; {swapped} replaced and counted; a rank held at most {memory:.1f} GiB"
        fault = f"hostile pictures, {moment} indexing ({len(replaced)} of {len(kinds)} kinds, {len(GOOD)} decode)"
        outcomes.append(Outcome(fault, len(replaced), happened, "nothing"))
    return outcomes
