#!/usr/bin/env python3
"""Write a run down as one page: `python tools/report.py runs/NAME [--output FILE] [--evaluation DIR ...]`.

The page holds configuration, curves, speed, examples and results, and needs no network. It can be written while the
run goes on. Results of launch/evaluate.py are found below the run's folder; those elsewhere are named.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.files import replacing
from muco_ds.pages.report import render
from muco_ds.pages.run_folder import read_run


@exit_on_user_error()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run, runs/NAME")
    parser.add_argument("--output", type=Path, help="page to write; default: report.html in the run's folder")
    parser.add_argument("--evaluation", type=Path, nargs="+", default=[], help="outputs of launch/evaluate.py")
    args = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    output: Path = args.output or args.run / "report.html"
    page = render(read_run(args.run, args.evaluation))
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output: '{output}' is no name of a file in a folder that is there: give another")
    with replacing(output) as work:
        work.write_text(page, encoding="utf-8")
    print(f"{output}: {len(page) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
