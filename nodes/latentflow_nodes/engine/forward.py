"""How long a model's forward passes take, measured by hooks on its modules.

The model servers report it with every answer; the benchmark puts the same hooks on a plain diffusers pipeline, so that
what is left of a request's wall time means the same on both sides.
"""

from __future__ import annotations

import time
from typing import Any

import torch


class ForwardTimer:
    """Adds up the wall time inside modules' forward passes, in nanoseconds.

    Nested hooked modules would count twice: give it only modules that do not contain each other. On CUDA a pass ends
    when its kernels do, so the timer waits for the device.
    """

    def __init__(self, *modules: torch.nn.Module) -> None:
        self.total_ns = 0
        self._started = 0
        for module in modules:
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end)

    def take(self) -> int:
        """Nanoseconds since the last `take`."""
        taken, self.total_ns = self.total_ns, 0
        return taken

    def _begin(self, _module: torch.nn.Module, _args: Any) -> None:
        self._started = time.perf_counter_ns()

    def _end(self, _module: torch.nn.Module, _args: Any, _output: Any) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.total_ns += time.perf_counter_ns() - self._started
