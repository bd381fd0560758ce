#!/usr/bin/env python3
"""Draw a packed batch of your own data: `python tools/show_batch.py --config RECIPE --output batch.png [--examples N]`.

Shows the first examples of a training step as they are packed: tokens by role, the attention plan, the dialogues.
Other options are those of launch/train.py.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from muco_ds.build import build_data
from muco_ds.config import check_paths
from muco_ds.config_cli import parse_args
from muco_ds.data.batch_picture import batch_picture
from muco_ds.errors import exit_on_user_error


@exit_on_user_error()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", default="batch.png", help="PNG to write")
    parser.add_argument("--step", type=int, default=0, help="which training step")
    parser.add_argument("--examples", type=int, default=2, help="how many examples of it; a mask of all is unreadable")
    options, rest = parser.parse_known_args()
    config = parse_args(rest).config
    check_paths(config)
    data = build_data(config)
    samples, passes = data.plan.mixture.batch(options.step)
    sides = data.collator.sides(samples[: options.examples], passes[: options.examples], options.step)
    batch = data.packer.pack(sides, replace_broken=True)
    batch_picture(batch, sides, data.packer.template).save(options.output)
    pairs = data.plan.costs(samples[: options.examples], passes[: options.examples], options.step).pairs_B.sum()
    print(f"{options.output}: {batch.tokens} tokens, {pairs} pairs, {batch.patches} patches")
    return 0


if __name__ == "__main__":
    sys.exit(main())
