#!/usr/bin/env python3
"""A page to search embedded items by a question, a picture or both.

    python tools/search.py --model DIR --input items.jsonl --embeddings emb.npy

Model, items and embeddings are those of tools/encode.py. The page is served to this machine alone unless --host says
otherwise; Ctrl+C ends it. The search is exact and holds a block of embeddings in memory at a time.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.models.folder import read_settings
from muco_ds.versions import check_versions


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder written by tools/convert_ckpt.py")
    parser.add_argument("--input", required=True, help="items that were embedded: file, folder or glob")
    parser.add_argument(
        "--embeddings", required=True, type=Path, help="what tools/encode.py wrote: .npy file or folder"
    )
    parser.add_argument("--images", type=Path, help="folder the picture paths start from; default: that of the input")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: every one of this machine")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--top", type=int, default=24, help="results shown at first")
    parser.add_argument("--device", help="default: the GPU if there is one")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """What can be said before anything is read."""
    if args.top < 1:
        raise UserError(f"--top {args.top}: give at least 1")
    if not args.embeddings.exists():
        raise UserError(f"--embeddings: no such file '{args.embeddings}': write it with tools/encode.py")
    read_settings(str(args.model))


@exit_on_user_error()
def main() -> int:
    args = arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    check_versions()
    check(args)
    try:
        import nicegui  # noqa: F401
    except ImportError as error:
        raise UserError(f"the page needs NiceGUI ({error}): pip install nicegui") from error
    from muco_ds.models.device import device_of
    from muco_ds.models.embedder import Embedder
    from muco_ds.pages.collection import open_collection
    from muco_ds.pages.search_page import check_port, serve
    from muco_ds.pages.searcher import Searcher

    check_port(args.host, args.port)  # before the seconds that follow
    device = device_of(args.device)
    collection = open_collection(args.input, args.embeddings, args.images)
    embedder = Embedder.from_pretrained(str(args.model), device=device)
    serve(Searcher(embedder, collection), host=args.host, port=args.port, top=args.top)
    return 0


if __name__ == "__main__":
    sys.exit(main())
