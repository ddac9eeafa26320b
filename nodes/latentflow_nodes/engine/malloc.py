"""Lets the C library keep the memory that forward passes free, until the server sleeps.

A forward pass allocates and frees its activations in turn. By default glibc gives much of that memory back to the kernel at
once, more so in a thread other than the main one, and the next pass takes a page fault for every 4 KiB of it, in which the
kernel clears the page. How much depends on the sizes and on the addresses that the process happens to have (decision 0014).
A server that sleeps has no next pass, and returns it all.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

# The parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3

# The largest threshold that glibc accepts. A larger block is mapped by itself and returned when it is freed.
_LARGEST_BLOCK = 32 << 20
# The size of a heap of another thread than the main one: such heaps are neither shrunk nor unmapped.
_HEAP = 64 << 20
# A block that comes from a heap, and large enough that its return shrinks the heap.
_BLOCK = 1 << 20


def keep_freed_memory() -> None:
    """Sets the allocator of this process, for all threads. Has no effect where the C library is not glibc.

    Free memory at the end of a heap stays with the process: at most 64 MiB of the main thread's heap, and of another thread
    as much as it has used at a time.
    """
    if (mallopt := _function("mallopt")) is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _HEAP)
        mallopt(_M_TOP_PAD, _HEAP)


def return_freed_memory() -> None:
    """Returns free memory to the kernel: all of the calling thread's heap, and of the other heaps all but the end.

    A thread that ends calls it for its own heap. Has no effect where the C library is not glibc.
    """
    mallopt, malloc_trim = _function("mallopt"), _function("malloc_trim")
    if mallopt is None or malloc_trim is None:
        return
    mallopt(_M_TRIM_THRESHOLD, 0)
    mallopt(_M_TOP_PAD, 0)
    # The end of the heap of another thread than the main one is returned only by a call that frees a block in it.
    malloc, free = _function("malloc"), _function("free")
    malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    free(malloc(ctypes.c_size_t(_BLOCK)))
    malloc_trim(0)
    keep_freed_memory()


def _function(name: str) -> Any:
    """A function of the C library; None where that is not glibc."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
