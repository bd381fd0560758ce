#!/usr/bin/env python3
"""Evaluate a model folder on tasks of mteb.

    python tools/evaluate_mteb.py --model runs/NAME/model --tasks Fashion200kT2IRetrieval CIRRIT2IRetrieval --output DIR
    python tools/evaluate_mteb.py --model runs/NAME/model --benchmark "MIEB(lite)" --output DIR

`python -c 'import mteb; print([task.metadata.name for task in mteb.get_tasks()])'` lists the tasks. Their data come
from the hub. A finished task is kept in mteb's own format below the output folder and not evaluated again;
results.json there holds the main score of each task that this model was ever scored on. What can't be fetched, or is
about sounds or films, is named, and the others are scored.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.files import replacing
from muco_ds.versions import check_versions


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder of a model")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="tasks by name")
    parser.add_argument("--benchmark", metavar="NAME", help="all tasks of a benchmark")
    parser.add_argument("--output", required=True, type=Path, help="folder of the results")
    parser.add_argument("--dim", type=int, help="use so many leading components of the embeddings; default: all")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--pack_tokens", type=int, help="token budget of one forward; default: by the device")
    return parser.parse_args()


def load_mteb() -> Any:
    """Raises UserError where it is not installed."""
    try:
        import mteb  # seconds
    except ImportError as error:
        raise UserError(f"mteb is not installed ({error}): pip install 'muco_ds[mteb]'") from error
    return mteb


def find_tasks(names: list[str], benchmark: str | None) -> list[Any]:
    """Raises UserError: none, or an unknown name, with the nearest ones."""
    mteb = load_mteb()
    if not names and benchmark is None:
        raise UserError("--tasks: name at least one, or a --benchmark")
    tasks = []
    known = {task.metadata.name: task for task in mteb.get_tasks(exclude_superseded=False)} if names else {}
    for name in names:
        if name not in known:
            raise UserError(f"--tasks: mteb has no task '{name}'{_nearest(name, list(known))}")
        tasks.append(known[name])
    if benchmark is not None:
        benchmarks = {one.name: one for one in mteb.get_benchmarks()}
        if benchmark not in benchmarks:
            raise UserError(f"--benchmark: mteb has no '{benchmark}'{_nearest(benchmark, list(benchmarks))}")
        tasks += benchmarks[benchmark].tasks
    return tasks


def _nearest(name: str, known: list[str]) -> str:
    lower = {one.lower(): one for one in known}
    near = [lower[one] for one in difflib.get_close_matches(name.lower(), lower, n=3)]
    return f": did you mean {' or '.join(near)}?" if near else ": see --help for how to list them"


def evaluate(model: Any, tasks: list[Any], output: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Score tasks one by one, and write results.json after each: (its entries, earlier ones of the same model among
    them; what kept tasks from being scored)."""
    mteb = load_mteb()
    entries = kept_entries(output, model)
    failures = []
    for task in tasks:
        metadata = task.metadata
        if other := sorted(set(metadata.modalities) - {"text", "image"}):
            failures.append(f"{metadata.name}: is about {' and '.join(other)}: the model embeds texts and pictures")
            continue
        for part in [task, *getattr(task, "tasks", [])]:
            part.load_data = _named(part.load_data, part.metadata)
        try:
            (result,) = mteb.evaluate(model, task, cache=mteb.ResultCache(output)).task_results
        except UserError as error:
            failures.append(str(error))
            continue
        entries[metadata.name] = {
            "main_score": result.get_score(),
            "metric": metadata.main_score,
            "type": metadata.type,
        }
        mean = sum(entry["main_score"] for entry in entries.values()) / len(entries)
        overall = {"main_score": mean, "tasks": len(entries), "revision": model.mteb_model_meta.revision}
        with replacing(output / "results.json") as work:
            work.write_text(json.dumps({"overall": overall, **entries}, indent=2))
    return entries, failures


def kept_entries(output: Path, model: Any) -> dict[str, dict[str, Any]]:
    """Tasks that results.json holds of the same model."""
    try:
        entries = json.loads((output / "results.json").read_text())
        same = entries.pop("overall")["revision"] == model.mteb_model_meta.revision
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return entries if same else {}


def _named(load: Any, metadata: Any) -> Any:
    """`load_data` whose failure is one line: the hub's own are as many as there are ways to be offline."""

    def loading(*args: Any, **kwargs: Any) -> None:
        try:
            load(*args, **kwargs)
        except Exception as error:
            where, problem = metadata.dataset.get("path"), (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{metadata.name}: its data set '{where}' can't be had: {problem}") from error

    return loading


@exit_on_user_error()
def main() -> int:
    args = arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    check_versions()
    if args.pack_tokens is not None and args.pack_tokens < 1:
        raise UserError(f"--pack_tokens {args.pack_tokens}: give at least 1")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output: '{args.output}' is no folder")
    from muco_ds.models.device import device_of  # seconds
    from muco_ds.models.recognise import recognise

    device, found = device_of(args.device), recognise(str(args.model))
    tasks = find_tasks(args.tasks, args.benchmark)
    from muco_ds.models.embedder import Embedder
    from muco_ds.mteb_model import MtebModel

    embedder = Embedder.from_pretrained(args.model, device=device)
    dtype = str(next(embedder.parameters()).dtype)
    digest = hashlib.blake2b(json.dumps([found.facts(), args.dim, dtype]).encode(), digest_size=8)
    name = f"local/{args.model.resolve().name}"
    model = MtebModel(embedder, name=name, revision=digest.hexdigest(), pack_tokens=args.pack_tokens, dim=args.dim)
    entries, failures = evaluate(model, tasks, args.output)
    width = max(map(len, entries), default=0)
    for task, entry in entries.items():
        print(f"{task:<{width}}  {entry['main_score']:.4f}  {entry['metric']}")
    if failures:
        more = f" ({len(failures)} of {len(tasks)} tasks have none)" if len(tasks) > 1 else ""
        raise UserError(f"{failures[0]}{more}")
    print(f"written to {args.output / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
