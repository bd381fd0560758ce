#!/usr/bin/env python3
"""Train: `deepspeed launch/train.py --config launch/recipes/X.yaml [--section.key value ...]`.

Also under torchrun and srun, and as a plain program on one device.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader forks; the tokenizer's threads would not survive

from muco_ds.config import RunConfig, check_paths
from muco_ds.config_cli import parse_args
from muco_ds.distributed import env, signals
from muco_ds.ends import RunEnd
from muco_ds.errors import exit_on_user_error
from muco_ds.versions import check_versions


@exit_on_user_error()
def main() -> int:
    env.adopt_launcher()
    invocation = parse_args(sys.argv[1:])
    logging.basicConfig(level=logging.INFO if env.is_main() else logging.ERROR, format="%(message)s")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch 2.13 deprecates: nothing the reader of this log can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    config = invocation.config
    check_versions()
    if invocation.dry_run:
        check_paths(config)
        from muco_ds.trainer import Trainer

        Trainer(config, env.start(config.run.timeout_s)).dry_run()
        env.stop()
        return 0
    end = RunEnd(Path(config.run.dir) / config.run.name)
    signals.listen(config.run.deadline_s, end.forced)
    with exit_on_user_error(end):
        return train(config, end)


def train(config: RunConfig, end: RunEnd) -> int:
    """Exit status of a run that ended as it should."""
    check_paths(config)
    from muco_ds.health import Health
    from muco_ds.trainer import Trainer  # imports take seconds; a typo in the command line should not

    device = env.start(config.run.timeout_s)
    with Health(end.folder, timeout_s=config.run.timeout_s) as health:
        trainer = Trainer(config, device, health)
        end.steps = lambda: trainer.lockstep.steps
        finished = trainer.fit()
    if env.is_main():
        if finished:
            end.steps = lambda: trainer.max_steps
            end.record(0, "finished")
        else:
            end.record(signals.EXIT_REQUEUE, f"signal {signal.Signals(trainer.lockstep.stopped_by).name}")
    env.stop()
    return 0 if finished else signals.EXIT_REQUEUE


if __name__ == "__main__":
    sys.exit(main())
