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
