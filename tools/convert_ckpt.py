#!/usr/bin/env python3
"""Convert a training checkpoint into a Hugging Face model folder.

    python tools/convert_ckpt.py CHECKPOINT OUT [--dtype bf16|fp32] [--overwrite] [--no-merge_lora] [--base DIR]
        [--scores results.json]

CHECKPOINT is runs/NAME/checkpoints/step_..., or runs/NAME for its newest complete one. OUT loads with
transformers.AutoModel and AutoProcessor, SentenceTransformer and muco_ds.Embedder; it is there only after it was loaded
again and gave the embeddings of the trained model. Its README.md is a model card: recipe, data, scores, and how to use
it. An adapter (model.lora) is added to its backbone's weights; with
--no-merge_lora OUT is the adapter alone, for peft.PeftModel.from_pretrained(BACKBONE, OUT).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from muco_ds.errors import exit_on_user_error
from muco_ds.versions import check_versions


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint folder, or the run's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; new or empty")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="type of the weights (default: the run's precision)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is an earlier export")
    parser.add_argument(
        "--merge_lora",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add an adapter to its backbone's weights (default), or write it alone in peft's format",
    )
    parser.add_argument("--base", metavar="DIR", help="backbone of an adapter (default: model.path of the run)")
    parser.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="results.json for the model card (default: those in the run's folder)",
    )
    return parser.parse_args(argv)


@exit_on_user_error()
def main() -> int:
    args = arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    check_versions()
    from muco_ds.export import export_checkpoint  # imports take seconds; a typo in the command line should not

    exported = export_checkpoint(
        args.checkpoint,
        args.out,
        dtype=args.dtype,
        overwrite=args.overwrite,
        merge_lora=args.merge_lora,
        base=args.base,
        scores=args.scores,
    )
    if exported.settings.short_side is not None:
        print(
            f"note: training resized each picture's short side to {exported.settings.short_side} px first, which stock "
            "processors can't: AutoProcessor and SentenceTransformer see other sizes, muco_ds.Embedder the same"
        )
    print(
        f"{exported.checkpoint} as {exported.dtype}: embeddings of the written model differ from the trained one's by "
        f"{exported.difference:.1e} (limit {exported.tolerance:.0e})"
    )
    print(exported.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
