"""The device's memory: how much is free, how running out of it is recognised, and the errors that report it."""

from __future__ import annotations

from pathlib import Path

import torch
from latentflow.errors import FailedPreconditionError, LatentflowError, OverloadedError
from latentflow.reasons import Reason

_CGROUP = Path("/sys/fs/cgroup")
# On the CPU torch raises a RuntimeError; safetensors passes the message of the system on.
_MESSAGES = ("can't allocate memory", "Cannot allocate memory")


def free_bytes(device: torch.device) -> int:
    """Memory of a device that no process uses. On a CPU the page cache counts as free, because the kernel takes it back."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    machine = _number(Path("/proc/meminfo"), "MemAvailable:") * 1024
    limit = (_CGROUP / "memory.max").read_text().strip() if (_CGROUP / "memory.max").is_file() else "max"
    if limit == "max":
        return machine
    used = _number(_CGROUP / "memory.current") - _number(_CGROUP / "memory.stat", "inactive_file")
    return min(machine, max(0, int(limit) - used))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward pass or a load failed because its device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(one in str(error) for one in _MESSAGES)


def out_of_memory() -> LatentflowError:
    """The error of a request that does not fit even alone."""
    return FailedPreconditionError(
        "The memory of the server's device does not suffice for this request alone. Request a smaller image, or give the "
        "model a device with more memory or a half-precision dtype.",
        reason=Reason.OUT_OF_MEMORY,
    )


def device_full(error: BaseException) -> LatentflowError:
    """The error of a Wake whose weights or first forward pass do not fit."""
    problem = str(error).partition("\n")[0].rstrip(". ")
    return OverloadedError(
        f"The device has too little free memory for this server, which stays asleep ({problem}). Put another server on the "
        "device to sleep and repeat the Wake.",
        reason=Reason.DEVICE_FULL,
    )


def _number(file: Path, field: str = "") -> int:
    """The number in a file of the kernel, or in its line that begins with a field."""
    rows = (line.removeprefix(field).split() for line in file.read_text().splitlines() if line.startswith(field))
    return int(next(rows)[0])
