#!/usr/bin/env python3
"""Train: `deepspeed launch/train.py --config launch/recipes/X.yaml [--section.key value ...]`.

Also under torchrun and srun, and as a plain program on one device.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader forks; the tokenizer's threads would not survive

from muco_ds.config import check_paths
from muco_ds.config_cli import parse_args
from muco_ds.distributed import env
from muco_ds.distributed.lockstep import EXIT_REQUEUE
from muco_ds.errors import exit_on_user_error


@exit_on_user_error()
def main() -> int:
    env.adopt_launcher()
    invocation = parse_args(sys.argv[1:])
    logging.basicConfig(level=logging.INFO if env.is_main() else logging.ERROR, format="%(message)s")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch 2.13 deprecates: nothing the reader of this log can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    check_paths(invocation.config)
    from muco_ds.trainer import Trainer  # imports take seconds; a typo in the command line should not

    trainer = Trainer(invocation.config, env.start())
    if invocation.dry_run:
        trainer.dry_run()
        finished = True
    else:
        finished = trainer.fit()
    env.stop()
    return 0 if finished else EXIT_REQUEUE


if __name__ == "__main__":
    sys.exit(main())
