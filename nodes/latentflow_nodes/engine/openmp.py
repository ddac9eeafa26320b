"""Ends the OpenMP threads of the calling thread, which otherwise keep a core busy for a while after each forward pass.

A thread that computes in parallel has a team of OpenMP threads. After a parallel region they spin for some milliseconds, so
that the next region of a forward pass starts at once. Where another server of the machine computes next, that takes a
core from it.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path

# GNU's library under the names of torch's wheels and of distributions, LLVM's and Intel's.
_LIBRARY = re.compile(r"lib(gomp|omp|iomp5)[-.\w]*$")
_SOFT = 1


def find_pause() -> Callable[[], object] | None:
    """OpenMP 5.0's `omp_pause_resource_all`, in soft mode, of the library that torch has loaded; None: it has none.

    It ends the team of the calling thread. The next parallel region makes a new one, which takes about 0.1 ms.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    # The path is the sixth column.
    columns = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    for path in {row[5] for row in columns if len(row) > 5 and _LIBRARY.search(row[5])}:
        try:
            pause = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY).omp_pause_resource_all
        except (OSError, AttributeError):
            continue
        return lambda: pause(_SOFT)
    return None
