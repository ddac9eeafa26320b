"""Servers of one machine that share a lock file compute one after the other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.synchronize import Event
from pathlib import Path

from latentflow_nodes.engine.compute_lock import ComputeLock

SECONDS = 30


def _hold(path: Path, held: Event) -> None:
    with ComputeLock(path):
        held.set()
        signal.pause()


def test_the_lock_of_a_killed_server_is_released(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "lock", held))
    holder.start()
    assert held.wait(SECONDS)
    entered = threading.Event()

    def wait() -> None:
        with ComputeLock(tmp_path / "lock"):
            entered.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert not entered.wait(0.1)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    assert entered.wait(SECONDS)
    holder.join(SECONDS)
    waiting.join(SECONDS)


def test_a_server_that_waits_for_another_releases_the_lock(tmp_path: Path) -> None:
    answered = threading.Event()

    def answer() -> None:
        with ComputeLock(tmp_path / "lock"):
            answered.set()

    with ComputeLock(tmp_path / "lock") as lock:
        peer = threading.Thread(target=answer, daemon=True)
        peer.start()
        with lock.released():
            assert answered.wait(SECONDS)
    peer.join(SECONDS)


def test_without_a_file_the_lock_is_always_free() -> None:
    with ComputeLock(None), ComputeLock(None) as inner, inner.released():
        pass


# In a process of its own, because the number of OpenMP threads belongs to the process.
_TEAM = """
import os, sys, threading
from pathlib import Path
import torch
from latentflow_nodes.engine.compute_lock import ComputeLock

def compute():
    torch.set_num_threads(2)
    before = len(os.listdir("/proc/self/task"))
    with ComputeLock(Path(sys.argv[1])) as lock:
        image = torch.ones(1000, 1000)
        image.add(1)
        computing = len(os.listdir("/proc/self/task"))
        with lock.released():
            waiting = len(os.listdir("/proc/self/task"))
        image.add(1)
        again = len(os.listdir("/proc/self/task"))
        print(computing - before, waiting - before, again - before, torch.get_num_threads())

torch.set_num_threads(1)
thread = threading.Thread(target=compute)
thread.start()
thread.join()
"""


def test_a_server_that_waits_for_another_has_no_openmp_threads(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _TEAM, str(tmp_path / "lock")], capture_output=True, text=True, check=True
    )
    assert ended.stdout.split() == ["1", "0", "1", "2"]


def test_only_the_thread_of_the_model_computes_in_parallel() -> None:
    # In a process of its own, because the number of threads belongs to the process. It ends where it would serve.
    program = """
import torch
from latentflow_nodes import server
server.serving.run = lambda program, work: (work.close(), print(torch.get_num_threads()))
server.main(["--role=VAE", "--uri=shapes", '--engine={"threads": 2}'])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == "1\n"
