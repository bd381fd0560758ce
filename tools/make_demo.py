"""Build the demo: a tiny Qwen2-VL with random weights and some thousands of rendered scenes in M3T's columns.

    python tools/make_demo.py OUT [--scenes 3000] [--test_scenes 100] [--seed 0]

writes OUT/model, OUT/data/{train,test,pairs_train,pairs_test}.parquet, OUT/data/conversations_{train,test}.jsonl and
OUT/data/images. A demo already made with the same arguments is left alone.
"""

import argparse
import sys
from pathlib import Path

from muco_ds.errors import UserError
from muco_ds.models.demo_model import build_demo


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the demo; new, empty, or an earlier demo")
    parser.add_argument("--scenes", type=int, default=3000, help="number of training scenes")
    parser.add_argument("--test_scenes", type=int, default=100, help="number of held-out scenes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes, the questions and the weights")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        built = build_demo(args.out, args.scenes, args.test_scenes, args.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {'demo written' if built else 'holds this demo already, left as it is'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
