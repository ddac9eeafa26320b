"""How the work queue processes keys."""

from __future__ import annotations

import asyncio
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from latentflow_operator.workqueue import WorkQueue


async def test_a_key_that_is_added_several_times_while_queued_is_processed_once() -> None:
    done: Counter[str] = Counter()

    async def work(key: str) -> None:
        done[key] += 1

    queue: WorkQueue[str] = WorkQueue(work, workers=2)
    for _ in range(5):
        queue.add("a")
    queue.add("b")
    async with queue.running():
        assert not done
        queue.open()
        await queue.idle()
    assert done == {"a": 1, "b": 1}


async def test_a_key_added_while_it_is_processed_is_processed_again_afterwards() -> None:
    running, most, turns = 0, 0, 0
    entered, leave = asyncio.Event(), asyncio.Event()

    async def work(key: str) -> None:
        nonlocal running, most, turns
        running += 1
        most, turns = max(most, running), turns + 1
        entered.set()
        await leave.wait()
        running -= 1

    queue: WorkQueue[str] = WorkQueue(work, workers=4)
    queue.open()
    async with queue.running():
        queue.add("a")
        await entered.wait()
        queue.add("a")
        queue.add("a")
        leave.set()
        await queue.idle()
    assert (most, turns) == (1, 2)


async def test_failed_work_is_retried_and_does_not_block_other_keys() -> None:
    tries: Counter[str] = Counter()
    succeeded = asyncio.Event()

    async def work(key: str) -> None:
        tries[key] += 1
        if key == "bad" and tries[key] < 2:
            raise ConnectionError("away")
        if key == "bad":
            succeeded.set()

    queue: WorkQueue[str] = WorkQueue(work, workers=1)
    queue.open()
    async with queue.running():
        queue.add("bad")
        queue.add("good")
        await queue.idle()
        assert tries == {"bad": 1, "good": 1}
        await asyncio.wait_for(succeeded.wait(), 10)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=20), st.integers(1, 4))
def test_every_key_is_processed_after_it_was_added(keys: list[str], workers: int) -> None:
    async def run() -> set[str]:
        done: set[str] = set()

        async def work(key: str) -> None:
            await asyncio.to_thread(lambda: None)
            done.add(key)

        queue: WorkQueue[str] = WorkQueue(work, workers=workers)
        queue.open()
        async with queue.running():
            for key in keys:
                done.discard(key)
                queue.add(key)
            await queue.idle()
        return done

    assert asyncio.run(run()) == set(keys)
