"""A server's forward passes use the memory that earlier ones freed, and a server that sleeps returns it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# A thread allocates and frees 36 MB in each pass, as activations. It ends where it would serve.
_PROGRAM = """
import resource, threading, torch
from latentflow_nodes import server

def compute():
    def passes(count):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(count):
            activations = [torch.zeros(300_000) for _ in range(30)]
            del activations
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    passes(10)
    print(passes(20))

def run(program, work):
    work.close()
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()

server.serving.run = run
server.main(["--role=VAE", "--uri=shapes"])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of another C library is left as it is")
def test_later_passes_take_no_new_memory_from_the_kernel() -> None:
    ended = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    # The passes write 20 times 8800 pages of 4 KiB.
    assert int(ended.stdout) < 1000


# Small blocks, such as activations, in a thread that ends and in the main one.
_FALL_ASLEEP = """
import threading, torch
from latentflow_nodes.engine import malloc
from latentflow_nodes.engine.device_memory import measure

def used():
    return measure(torch.device("cpu")).used

torch.set_num_threads(1)
def allocate():
    blocks = [torch.ones(200_000) for _ in range(250)]
    last = torch.ones(1000)
    del blocks
    kept.append(used())
    malloc.return_freed_memory()

kept = []
malloc.keep_freed_memory()
before = used()
thread = threading.Thread(target=allocate)
thread.start()
thread.join()
allocate()
print(min(kept) - before, used() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of another C library is left as it is")
def test_a_server_that_falls_asleep_returns_the_memory_that_it_kept() -> None:
    ended = subprocess.run([sys.executable, "-c", _FALL_ASLEEP], capture_output=True, text=True, check=True)
    kept, left = map(int, ended.stdout.split())
    # The blocks are 200 MB, of which glibc keeps at least one heap.
    assert kept > 50e6
    assert left < 20e6
