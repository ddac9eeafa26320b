"""Servers of one machine compute one after the other when they share a turn file."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.synchronize import Event
from pathlib import Path

from latentflow_nodes.engine.compute_lock import Turn

SECONDS = 30


def _hold(path: Path, held: Event) -> None:
    with Turn(path):
        held.set()
        signal.pause()


def test_the_turn_of_a_killed_server_passes_on(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "turn", held))
    holder.start()
    assert held.wait(SECONDS)
    entered = threading.Event()

    def wait() -> None:
        with Turn(tmp_path / "turn"):
            entered.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert not entered.wait(0.1)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    assert entered.wait(SECONDS)
    holder.join(SECONDS)
    waiting.join(SECONDS)


def test_who_waits_for_another_server_passes_the_turn_on(tmp_path: Path) -> None:
    answered = threading.Event()

    def answer() -> None:
        with Turn(tmp_path / "turn"):
            answered.set()

    with Turn(tmp_path / "turn") as turn:
        peer = threading.Thread(target=answer, daemon=True)
        peer.start()
        with turn.passed_on():
            assert answered.wait(SECONDS)
    peer.join(SECONDS)


def test_without_a_file_it_is_always_a_server_s_turn() -> None:
    with Turn(None), Turn(None) as inner, inner.passed_on():
        pass
