"""How many threads of torch a thread of a server computes with: several only where the model runs.

OpenMP lets idle threads sleep at once if a process has more OpenMP threads than cores (decision 0004). Each thread that
computes in parallel has a team of them, and keeps it, so a single call elsewhere would slow down every later forward pass.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import torch


def compute_with(threads: int) -> None:
    """Sets the number of the calling thread."""
    torch.set_num_threads(threads)
    # The number takes effect with this query at the latest: a later one would read what another thread has set meanwhile.
    torch.get_num_threads()


def compute_alone_in_executor() -> None:
    """Threads of `asyncio.to_thread` compute with one thread. In a running event loop, before the first call."""
    executor = ThreadPoolExecutor(thread_name_prefix="executor", initializer=compute_with, initargs=(1,))
    asyncio.get_running_loop().set_default_executor(executor)
