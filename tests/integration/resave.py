"""launch/train.py without the training: load the checkpoint, and save what was loaded in its place."""

from __future__ import annotations

import sys

from muco_ds.config_cli import parse_args
from muco_ds.distributed import env
from muco_ds.trainer import Trainer

trainer = Trainer(parse_args(sys.argv[1:]).config, env.start())
assert trainer.start_step > 0, "nothing was loaded"
trainer._save(trainer.start_step)
trainer.checkpoints.finish()
env.stop()
