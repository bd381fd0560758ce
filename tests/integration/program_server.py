"""Runs programs in forks of a process that has imported the heavy libraries, which saves each start ten seconds.

One JSON request a line on stdin: {"argv": [program, ...], "ranks": n or null, "env": {...}, "cwd": ..., "folder": ...};
the answer is the process id of the job. A job is a process group of its own: a parent and one process a rank (null: one
process that no launcher describes), each of which runs the file as `__main__`, "{rank}" in an argument replaced.
Outputs go to FOLDER/{stdout,stderr}.RANK, process ids to FOLDER/pid.RANK, and the exit statuses, in rank order, to
FOLDER/status.json once every rank has ended.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
from typing import Any

PRELOADED = ("muco_ds.trainer", "muco_ds.config_cli", "deepspeed", "tensorboard", "muco_ds.models.embedder")


def serve() -> None:
    """Answer requests until stdin ends; in a rank's process, run its program instead."""
    requests = os.fdopen(os.dup(0), "r")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print while they are imported
    for name in PRELOADED:
        importlib.import_module(name)
    answers.write("ready\n")
    answers.flush()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # jobs are reaped by the kernel
    while line := requests.readline():
        request = json.loads(line)
        job = os.fork()
        if job == 0:
            requests.close()
            answers.close()
            _job(request)
            return
        answers.write(f"{job}\n")
        answers.flush()


def _job(request: dict[str, Any]) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    pids = []
    for rank in range(request["ranks"] or 1):
        pid = os.fork()
        if pid == 0:
            _rank(request, rank)
            return
        pids.append(pid)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a test may signal the whole group; the ranks' statuses are wanted
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    path = os.path.join(request["folder"], "status.json")
    with open(path + ".tmp", "w") as file:
        json.dump(codes, file)
    os.replace(path + ".tmp", path)
    os._exit(0)


def _rank(request: dict[str, Any], rank: int) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(os.path.join(request["folder"], f"{name}.{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    with open(os.path.join(request["folder"], f"pid.{rank}"), "w") as pid_file:
        pid_file.write(str(os.getpid()))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if request["ranks"]:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["ranks"]))
    sys.argv = [argument.replace("{rank}", str(rank)) for argument in request["argv"]]
    runpy.run_path(sys.argv[0], run_name="__main__")  # its sys.exit ends this process in the ordinary way


if __name__ == "__main__":
    serve()
