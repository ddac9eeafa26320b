"""Servers of one machine that share a lock file compute one after the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from latentflow_nodes.engine.compute_lock import ComputeLock
from support import forked
from support.locks import until_locked

SECONDS = 30


def _hold(path: Path, held: Event) -> None:
    with ComputeLock(path):
        held.set()
        signal.pause()


def test_the_lock_of_a_killed_server_is_released(tmp_path: Path) -> None:
    context = forked.context()
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


def test_a_server_that_takes_the_lock_again_at_once_comes_after_the_waiting_one(tmp_path: Path) -> None:
    order: list[str] = []
    first, second = ComputeLock(tmp_path / "lock"), ComputeLock(tmp_path / "lock")

    def follow() -> None:
        with second:
            order.append("second")

    following = threading.Thread(target=follow, daemon=True)
    first.take()
    following.start()
    with (tmp_path / "lock.next").open() as next_place:
        until_locked(next_place)
    with first:
        order.append("first")
    with first:
        order.append("first again")
    following.join(SECONDS)
    assert order == ["first", "second", "first again"]


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


# A server's process whose server is replaced by a model that computes in parallel, beside a call in another thread.
_OTHERS = """
import asyncio, contextlib, os
import torch
from latentflow.internal.metrics import NODE, Instruments
from latentflow_nodes import server
from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.load import Load, PassSize
from latentflow_nodes.engine.worker import Worker

def compute():
    torch.ones(1000, dtype=torch.float64).sqrt()
    torch.ones(1000, 1000).add(1)
    return torch.get_num_threads()

@contextlib.asynccontextmanager
async def serve(node):
    load = Load(Instruments(NODE, model="x", role="VAE"))
    worker = Worker(lambda items: [compute() for _ in items], threads=2, max_running=1, max_waiting=1,
                    lock=ComputeLock(None), load=load)
    size = PassSize(rows=1, height=8, width=8)
    first = await worker.run(None, group=None, size=size)
    before = len(os.listdir("/proc/self/task"))
    elsewhere = await asyncio.to_thread(compute)
    started = len(os.listdir("/proc/self/task")) - before
    print(first, elsewhere, compute(), started, await worker.run(None, group=None, size=size))
    worker.close()
    raise SystemExit
    yield

server.serve = serve
server.main(["--role=VAE", "--uri=shapes", "--log-format=json"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_only_the_thread_of_the_model_computes_in_parallel() -> None:
    # In a process of its own, because the number of threads belongs to the process.
    ended = subprocess.run([sys.executable, "-c", _OTHERS], capture_output=True, text=True, check=False)
    # The one thread that starts is that of the call.
    assert ended.stdout.split() == ["2", "1", "1", "1", "2"], ended.stderr
