"""Disks that are full or read-only, and files that are not what was written."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fault_arena import EVERY, RANKS, STEPS, Arena, Outcome, last_checkpoint, last_step, wait_for
from programs import refusal

_SPARE = 16 * 2**20  # muco_ds.checkpoint's


def can_mount(folder: Path) -> bool:
    """Whether small disks can be made here: they need root."""
    try:
        with _disk(folder / "probe", 2**20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def short_of_space(arena: Arena) -> Outcome:
    """Room for one checkpoint: the second is refused before anything of it is written."""
    out = arena.new("short_of_space")
    with _disk(out, int(1.6 * _checkpoint_bytes(arena)) + _SPARE):
        line = refusal(arena.programs.run(arena.argv(out), ranks=RANKS))
        assert "GB are needed" in line and "GB are free" in line and "older ones are intact" in line, line
        assert last_checkpoint(out) == EVERY
        _resize(out, 40 * _checkpoint_bytes(arena) + _SPARE)
        arena.finish(out)
    return Outcome("disk short of space", 1, f"refused before writing: `{_short(line)}`", "nothing; resumed", 0.0)


def filled_while_writing(arena: Arena, tries: int) -> Outcome:
    """Somebody else fills the disk at a random instant of a run."""
    said = set()
    for _ in range(tries):
        out = arena.new("filled")
        with _disk(out, 8 * _checkpoint_bytes(arena) + _SPARE):
            job = arena.programs.start(arena.argv(out), ranks=RANKS)
            after = arena.rng.randrange(1, STEPS // 2)
            wait_for(lambda after=after, out=out: last_step(out) >= after, 120)  # type: ignore[misc]
            filler = out / "filler"
            with open(filler, "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(2**16))
                except OSError:
                    pass
            result = job.wait()
            assert all(code in (1, 2, -15) for code in result.codes), result
            lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
            assert lines and "Traceback" not in result.output, result.output[-3000:]
            assert any("space" in line for line in lines), lines
            said.update(_short(line) for line in lines)
            filler.unlink()
            arena.finish(out)
    return Outcome("disk filled by others", tries, " / ".join(f"`{line}`" for line in sorted(said)), "nothing; resumed")


def read_only(arena: Arena) -> Outcome:
    """The run's folder can't be written from the start."""
    out = arena.new("read_only")
    with _disk(out, 2**20):
        subprocess.run(["mount", "-o", "remount,ro", str(out)], check=True)
        line = refusal(arena.programs.run(arena.argv(out), ranks=RANKS))
    assert "run.dir" in line and str(out) in line, line
    return Outcome("read-only disk", 1, f"refused: `{_short(line)}`", "nothing")


def altered_checkpoints(arena: Arena, tries: int) -> Outcome:
    """One file of the newest checkpoint is cut short, loses a bit, is emptied or removed."""
    part = arena.new("part")
    arena.programs.run(arena.argv(part, {"run.max_steps": STEPS // 2}), ranks=RANKS).check()
    kinds: dict[str, int] = {}
    for _ in range(tries):
        out = arena.new("altered")
        shutil.copytree(part, out, dirs_exist_ok=True)
        newest = out / "run" / "checkpoints" / f"step_{last_checkpoint(out):07d}"
        file = arena.rng.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        kind = _alter(arena, file)
        kinds[kind] = kinds.get(kind, 0) + 1
        output = arena.finish(out)
        assert f"{newest} is" in output and "passed over" in output, f"{kind} {file}: {output[-2000:]}"
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(kinds))
    return Outcome(f"checkpoint file {counts}", tries, "named and passed over; the older one taken", "nothing")


def altered_rows(arena: Arena, tries: int) -> Outcome:
    """The training file is cut short or loses a bit before a run starts."""
    refused, as_before = 0, 0
    rows = Path("data") / "train.parquet"
    for _ in range(tries):
        out = arena.new("rows")
        file = out / rows.name
        shutil.copyfile(arena.demo.folder / rows, file)
        kind = _alter(arena, file, kinds=("cut short", "flipped"))
        result = arena.programs.run(
            arena.argv(out, {"data.train": file, "run.max_steps": 4, "data.index_dir": out / "index"}), ranks=RANKS
        )
        if any(result.codes):
            assert str(file) in refusal(result), f"{kind}: {result.output[-2000:]}"
            refused += 1
        else:  # a byte that no reader looks at
            line = [step for step, loss in _losses(out).items() if loss != arena.losses[step]]
            assert not line, f"{kind} {file}: trained on other rows without a word"
            as_before += 1
    happened = f"{refused} refused in one line that names the file, {as_before} trained on the rows as they were"
    return Outcome("parquet file cut short or a bit flipped", tries, happened, "nothing")


def _losses(out: Path) -> dict[int, float]:
    from programs import losses

    return losses(out)


def _alter(arena: Arena, file: Path, kinds: tuple[str, ...] = ("cut short", "flipped", "emptied", "removed")) -> str:
    kind = arena.rng.choice(kinds)
    content = bytearray(file.read_bytes())
    if kind == "removed":
        file.unlink()
    elif kind == "emptied" or not content:
        file.write_bytes(b"")
    elif kind == "cut short":
        file.write_bytes(content[: arena.rng.randrange(len(content))])
    else:
        content[arena.rng.randrange(len(content))] ^= 1 << arena.rng.randrange(8)
        file.write_bytes(content)
    return kind


def _checkpoint_bytes(arena: Arena) -> int:
    newest = arena.undisturbed / "run" / "checkpoints" / f"step_{STEPS:07d}"
    return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())


@contextmanager
def _disk(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def _short(line: str) -> str:
    """The line without the folders of this machine."""
    words = line.removeprefix("error: ").split(" ")
    return " ".join(word if not word.strip("'\"(:").startswith("/") else f".../{Path(word).name}" for word in words)
