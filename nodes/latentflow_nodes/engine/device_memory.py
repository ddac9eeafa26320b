"""The memory of a server's device: how much there is, how much is free, and how much this process uses.

A scheduler that lets servers share a device needs these figures as measured, not as computed from the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from latentflow_nodes.engine.memory import free_bytes

_KIB = 1024


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """A device and its memory, all sizes in bytes.

    Attributes:
        kind: "cpu" or "cuda".
        uuid: As the device's driver reports it; empty for a CPU.
        name: The product; empty for a CPU.
        total: The device's memory. On a CPU the memory limit of the container, or the machine's memory.
        free: What no process uses. On a CPU the page cache counts as free, because the kernel takes it back.
        used: What this process uses. On a CPU that is its resident memory, which contains the files that it has mapped; on a
            GPU the memory of torch, without the CUDA context.
        peak: The most that it has used since it started.
    """

    kind: str
    uuid: str = ""
    name: str = ""
    total: int
    free: int
    used: int
    peak: int


def measure(device: torch.device) -> DeviceMemory:
    """Measures a device now."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return DeviceMemory(
            kind=device.type,
            uuid=f"GPU-{properties.uuid}",
            name=properties.name,
            total=properties.total_memory,
            free=free_bytes(device),
            used=torch.cuda.memory_reserved(device),
            peak=torch.cuda.max_memory_reserved(device),
        )
    process, total = _fields("/proc/self/status"), _fields("/proc/meminfo").get("MemTotal", 0)
    if (limit := _cgroup_limit()) is not None:
        total = min(total, limit)
    return DeviceMemory(
        kind=device.type,
        total=total,
        free=free_bytes(device),
        used=process.get("VmRSS", 0),
        peak=process.get("VmHWM", 0),
    )


def _fields(path: str) -> dict[str, int]:
    """The sizes in a file of the kernel with lines such as `VmRSS:   1024 kB`, in bytes; empty on other systems."""
    try:
        rows = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {row[0].rstrip(":"): int(row[1]) * _KIB for row in rows if len(row) == 3 and row[2] == "kB"}


def _cgroup_limit() -> int | None:
    """The memory limit of this container; None where it has none."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return None
