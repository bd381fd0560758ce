from __future__ import annotations

import subprocess
import sys
import textwrap

from muco_ds.lost_threads import told_of_lost_threads

PROGRAM = """
import os, resource, sys, threading, time
from muco_ds.errors import exit_on_user_error

@exit_on_user_error()
def main():
    {body}

main()
"""
LOST = """
    threading.Thread(target=print).start()  # whose stack the next thread gets
    time.sleep(0.5)
    limit = 2**20  # less than is taken: nothing more is given
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    threading.Thread(target=print, daemon=True).start()
    """


def program(body: str) -> subprocess.CompletedProcess[str]:
    code = PROGRAM.format(body=textwrap.dedent(body).strip().replace("\n", "\n    "))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_thread_without_memory_ends_the_program() -> None:
    done = program(LOST)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "out of memory for a thread" in lines[0] and "more host memory" in lines[0]


def test_other_unraisable_errors_are_shown_as_ever() -> None:
    done = program("""
    class Broken:
        def __del__(self):
            raise RuntimeError("in the end")
    Broken()
    time.sleep(0.5)
    """)
    assert done.returncode == 0 and "Exception ignored in" in done.stderr and "RuntimeError: in the end" in done.stderr


def test_in_forked_processes_too() -> None:
    done = program("""
    class Broken:
        def __del__(self):
            raise RuntimeError(f"in {os.getpid()}")
    child = os.fork()
    if child == 0:
        Broken()
        os._exit(0)
    os.waitpid(child, 0)
    print(child)
    """)
    assert done.returncode == 0 and f"RuntimeError: in {done.stdout.strip()}" in done.stderr


def test_the_hook_is_put_back() -> None:
    before = sys.unraisablehook
    with told_of_lost_threads(print):
        assert sys.unraisablehook is not before
    assert sys.unraisablehook is before
