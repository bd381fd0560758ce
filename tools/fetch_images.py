#!/usr/bin/env python3
"""Download the pictures of a data set's URL column.

    python tools/fetch_images.py --data M3T.parquet --url_column url --name_column qry_image_path --output FOLDER
    python tools/fetch_images.py --data URLS.parquet --url_column url --named DATA.parquet --output FOLDER

puts each under its name below FOLDER. Data without names get them from their URLs, written to DATA.parquet. Called
again, it fetches what is not there yet; what failed is in FOLDER.failed.jsonl with its reason (docs/data.md).
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from muco_ds.errors import UserError, exit_on_user_error

if TYPE_CHECKING:
    from muco_ds.factory.fetch import Fetch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="parquet file with a column of URLs")
    parser.add_argument("--url_column", default="url", help="its name (default url)")
    parser.add_argument("--name_column", default="qry_image_path", help="column of paths (default qry_image_path)")
    parser.add_argument("--named", type=Path, help="for data without that column: copy to write, with names")
    parser.add_argument("--output", required=True, type=Path, help="folder of the pictures")
    parser.add_argument("--concurrency", type=int, default=32, help="downloads at a time (default 32)")
    parser.add_argument("--timeout", type=float, default=30, help="seconds for one attempt (default 30)")
    parser.add_argument("--retries", type=int, default=3, help="after timeouts, 429, 5xx and the like (default 3)")
    parser.add_argument("--max_bytes", type=int, default=50_000_000, help="of one picture (default 50,000,000)")
    parser.add_argument("--short_side", type=int, help="make larger pictures smaller, to this shorter side")
    own = "URLs may lead to this machine and its networks, too: for data of your own"
    parser.add_argument("--allow_private", action="store_true", help=own)
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """What can be said before anything is read."""
    for name in ("concurrency", "timeout", "max_bytes", "short_side"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value:g}: give more than 0")
    if args.retries < 0:
        raise UserError(f"--retries {args.retries}: give at least 0")
    if args.named is not None and (args.named.suffix != ".parquet" or args.named.exists()):
        raise UserError(f"--named: '{args.named}' is there already or does not end in .parquet: give a new name")


def show(fetch: Fetch) -> None:
    report = fetch.report
    failed = fetch.failures.summary() + (f", listed in {fetch.options.failed}" if fetch.failures.total else "")
    print(f"rows      {report['rows']}, {report['without_url']} without a URL, {report['repeated']} repeat a picture")
    print(f"pictures  {report['fetched']} fetched ({report['bytes']:,} bytes), {report['there_before']} there before")
    print(f"failed    {failed}")
    print(f"seconds   {report['seconds']:g}")


@exit_on_user_error()
def main() -> int:
    args = arguments()
    check(args)
    for number in (signal.SIGINT, signal.SIGTERM):  # so that half-written files go away
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    from muco_ds.factory.download import DownloadOptions  # imports take seconds; a typo above should not
    from muco_ds.factory.fetch import Fetch, FetchOptions

    download = DownloadOptions(args.timeout, args.retries, args.max_bytes, args.short_side, args.allow_private)
    options = FetchOptions(
        args.data, args.output, download, args.url_column, args.name_column, args.named, args.concurrency
    )
    if args.allow_private:
        print("--allow_private: URLs and redirects may lead to this machine and its own networks")
    fetch = Fetch(options)
    ended_by = fetch.run()
    show(fetch)
    if ended_by:
        print(f"stopped by {signal.Signals(ended_by).name}: the same command goes on")
        return 128 + ended_by
    print(f"written to {args.output}" + (f" and {args.named}" if args.named else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
