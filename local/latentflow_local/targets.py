"""The file by which a Prometheus server finds the processes of this runtime, in the format of its `file_sd_configs`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentflow_local.planning import ProcessSpec


class TargetsFile:
    """A file that lists the `/metrics` of processes.

    Args:
        always: host:port of the processes that do not change, by name.
    """

    def __init__(self, path: Path, *, always: Mapping[str, str]) -> None:
        self._path = path
        self._always = [_target(address, process=name) for name, address in always.items()]

    def write(self, replicas: Iterable[ProcessSpec]) -> None:
        """Replaces the file. Prometheus reads it again by itself."""
        models = [_target(one.metrics, process=one.name, model=one.model, role=one.role) for one in replicas]
        handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
        with os.fdopen(handle, "w") as stream:
            json.dump([*self._always, *models], stream, indent=2)
        # A Prometheus server of another user has to read it.
        os.chmod(temporary, 0o644)
        os.replace(temporary, self._path)


def _target(address: str, **labels: str) -> Mapping[str, Sequence[str] | Mapping[str, Any]]:
    return {"targets": [address], "labels": labels}
