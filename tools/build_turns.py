#!/usr/bin/env python3
"""Make training data of a folder of pictures: questions and answers by a model behind an OpenAI-compatible endpoint.

    python tools/build_turns.py --images FOLDER --output OUT.parquet --url http://localhost:8000/v1 --model NAME
    python tools/build_turns.py --kind conversations --images FOLDER --output OUT.jsonl --url ... --model NAME

writes a caption and M3T's seven turns a picture, or CoMa's conversations of three to five turns (docs/data.md).
Interrupted, the same command goes on; pictures that failed are in OUT.failed.jsonl and are tried again by it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from muco_ds.errors import UserError, exit_on_user_error

if TYPE_CHECKING:
    from muco_ds.factory.build import Build, BuildOptions


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path, help="folder of pictures, with its subfolders")
    parser.add_argument("--output", required=True, type=Path, help=".parquet for m3t, .jsonl for conversations")
    parser.add_argument("--kind", choices=("m3t", "conversations"), default="m3t", help="kind of rows (default m3t)")
    parser.add_argument("--url", required=True, help="the endpoint's base URL, such as http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="name of a model there that sees pictures")
    parser.add_argument(
        "--pairs_from", choices=("caption", "picture"), default="caption", help="of m3t (default caption)"
    )
    parser.add_argument("--pairs_model", help="another model to write m3t's pairs from the captions")
    parser.add_argument("--pairs_url", help="where that one is; default: --url")
    parser.add_argument("--key_variable", default="OPENAI_API_KEY", help="environment variable with the key, if any")
    parser.add_argument("--prompts", type=Path, help="YAML file with other wordings of the requests")
    parser.add_argument("--paraphrases", type=int, default=3, help="wordings of each question of m3t (default 3)")
    parser.add_argument("--concurrency", type=int, default=16, help="pictures at a time (default 16)")
    parser.add_argument("--requests_per_minute", type=float, default=0, help="of each endpoint (default 0: no limit)")
    parser.add_argument("--timeout", type=float, default=120, help="seconds to wait for a reply (default 120)")
    parser.add_argument("--request_retries", type=int, default=5, help="after timeouts, 429 and 5xx (default 5)")
    parser.add_argument("--retries", type=int, default=2, help="after a reply that can't be used (default 2)")
    parser.add_argument("--temperature", type=float, default=0.7, help="of sampling (default 0.7)")
    parser.add_argument("--max_tokens", type=int, default=2048, help="longest reply (default 2048)")
    parser.add_argument("--max_side", type=int, default=1024, help="longer side of a picture as sent (default 1024)")
    parser.add_argument("--limit", type=int, help="only so many pictures, the first by name")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """What can be said before anything is read."""
    for name in ("paraphrases", "concurrency", "timeout", "max_tokens", "max_side", "limit"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value:g}: give more than 0")
    for name in ("requests_per_minute", "request_retries", "retries", "temperature"):
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name} {getattr(args, name):g}: give at least 0")
    if (args.pairs_model or args.pairs_url) and (args.kind != "m3t" or args.pairs_from != "caption"):
        raise UserError("--pairs_model and --pairs_url are for --kind m3t with --pairs_from caption")


def options_of(args: argparse.Namespace) -> BuildOptions:
    from muco_ds.factory.build import BuildOptions
    from muco_ds.factory.endpoint import EndpointOptions
    from muco_ds.factory.prompts import Prompts

    def endpoint(url: str, model: str) -> EndpointOptions:
        return EndpointOptions(
            url,
            model,
            key_variable=args.key_variable,
            timeout=args.timeout,
            request_retries=args.request_retries,
            requests_per_minute=args.requests_per_minute,
            temperature=args.temperature,
            max_tokens=args.max_tokens,
        )

    other = args.pairs_model or args.pairs_url
    return BuildOptions(
        args.images,
        args.output,
        endpoint(args.url, args.model),
        kind=args.kind,
        pairs_endpoint=endpoint(args.pairs_url or args.url, args.pairs_model or args.model) if other else None,
        pairs_from=args.pairs_from,
        prompts=Prompts.from_yaml(args.prompts),
        paraphrases=args.paraphrases,
        retries=args.retries,
        concurrency=args.concurrency,
        max_side=args.max_side,
        limit=args.limit,
    )


def show(build: Build) -> None:
    report, options = build.report, build.options
    failed = build.failures.summary() + (f", listed in {options.failed}" if build.failures.total else "")
    print(f"pictures    {report['done']} of {report['pictures']} done, {report['done_before']} of them before")
    print(f"failed      {failed}")
    for name in ("endpoint", "pairs_endpoint"):
        if traffic := report.get(name):
            limited = f", {traffic['rate_limited']} turned away with 429" if traffic["rate_limited"] else ""
            tokens = traffic["tokens"]
            print(f"requests    {traffic['requests']} to {traffic['model']}{limited}")
            print(f"tokens      {tokens['prompt']} read, {tokens['completion']} written")
    print(f"asked again {report['asked_again']} times, after replies that could not be used")
    print(f"seconds     {report['seconds']:g}")


@exit_on_user_error()
def main() -> int:
    args = arguments()
    check(args)
    for number in (signal.SIGINT, signal.SIGTERM):  # so that half-written files go away
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    from muco_ds.factory.build import Build  # imports take seconds; a typo in the command line should not

    build = Build(options_of(args))
    ended_by = build.run()
    show(build)
    if ended_by:
        print(f"stopped by {signal.Signals(ended_by).name}: the same command goes on, {args.output} is not written yet")
        return 128 + ended_by
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
