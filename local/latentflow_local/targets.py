"""The file by which a Prometheus server finds the processes of this runtime, in the format of its `file_sd_configs`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentflow.errors import FailedPreconditionError
from latentflow.internal import replacing

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
        """Replaces the file. Prometheus reads it again by itself.

        FailedPreconditionError where the file cannot be written.
        """
        models = [_target(one.metrics, process=one.name, model=one.model, role=one.role) for one in replicas]
        # A Prometheus server of another user reads it.
        try:
            replacing.write(self._path, json.dumps([*self._always, *models], indent=2), mode=0o644)
        except OSError as error:
            raise FailedPreconditionError(
                f"The targets for Prometheus cannot be written to {self._path}: {error.strerror}. Choose another file."
            ) from None


def _target(address: str, **labels: str) -> Mapping[str, Sequence[str] | Mapping[str, Any]]:
    return {"targets": [address], "labels": labels}
