"""The replicas of every model on this machine: adds and removes them, and says in the directory file where they listen.

The gateway follows the file. A replica that goes is taken out of it first, and then ends what it has begun.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path

from latentflow.api import DiffusionWorkflow, Role
from latentflow.internal import directory

from latentflow_local import addresses
from latentflow_local.planning import ProcessSpec
from latentflow_local.supervisor import State, Supervisor


class Replicas:
    """Which replicas there shall be.

    Args:
        specs: Those that there are at first, at least one of each model. The supervisor runs them.
        path: The directory file, written at once.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        workflows: Sequence[DiffusionWorkflow],
        path: Path,
        supervisor: Supervisor,
    ) -> None:
        self._workflows = tuple(workflows)
        self._path = path
        self._supervisor = supervisor
        self._any = {spec.model: spec for spec in specs}
        self._present = {model: [spec for spec in specs if spec.model == model] for model in self._any}
        self._write()

    def count(self, model: str) -> int:
        """How many replicas of a model there shall be."""
        return len(self._present[model])

    def ready(self, model: str) -> list[ProcessSpec]:
        """Those that take requests."""
        return [spec for spec in self._present[model] if self._state(spec) is State.READY]

    def scale(self, model: str, replicas: int) -> None:
        """Adds and removes processes, so that there shall be so many. Those that are not ready go first, then the newest."""
        present = self._present[model]
        # A stable sort: among equals the oldest stay.
        stay = sorted(present, key=lambda spec: self._state(spec) is not State.READY)[:replicas]
        gone = [spec for spec in present if spec not in stay]
        self._present[model] = [spec for spec in present if spec in stay]
        for _ in range(replicas - len(stay)):
            spec = self._another(model)
            self._present[model].append(spec)
            self._supervisor.add(spec)
        self._write()
        for spec in gone:
            self._supervisor.remove(spec.name)

    def _state(self, spec: ProcessSpec) -> State:
        return self._supervisor.supervised[spec.name].state

    def _another(self, model: str) -> ProcessSpec:
        """One more replica, with the first name that no process has, one that is still ending included."""
        there = {one.spec.name: one.spec for one in self._supervisor.supervised.values()}
        given = {address for spec in there.values() for address in (spec.address, spec.metrics)}
        address, metrics = addresses.free(2, but=given)
        specs = (self._any[model].another(number, address=address, metrics=metrics) for number in count(1))
        return next(spec for spec in specs if spec.name not in there)

    def _write(self) -> None:
        models = {
            model: directory.Replicas(
                role=Role(self._any[model].role), replicas=tuple(spec.address for spec in present)
            )
            for model, present in self._present.items()
        }
        directory.Directory(workflows=self._workflows, models=models).write(self._path)
