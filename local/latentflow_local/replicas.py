"""Starts and ends the replicas of every model on this machine, and writes their addresses to the directory file.

The gateway follows that file. A replica to be ended is removed from the file first, and then completes its running
requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path

from latentflow.api import DiffusionWorkflow, Role
from latentflow.internal import directory

from latentflow_local.addresses import Addresses
from latentflow_local.planning import ProcessSpec, next_gpu
from latentflow_local.supervisor import State, Supervisor
from latentflow_local.targets import TargetsFile


class Replicas:
    """The replicas that should run.

    Args:
        specs: The first replicas, at least one of each model. The supervisor runs them.
        gpus: GPUs of this machine, over which replicas on "cuda" are spread.
        path: The directory file, which is written at once.
        targets: Lists them for Prometheus; None: no file does.
        addresses: Reserves those of the replicas.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        workflows: Sequence[DiffusionWorkflow],
        gpus: int,
        path: Path,
        targets: TargetsFile | None,
        supervisor: Supervisor,
        addresses: Addresses,
    ) -> None:
        self._workflows = tuple(workflows)
        self._gpus = gpus
        self._path = path
        self._targets = targets
        self._supervisor = supervisor
        self._addresses = addresses
        self._template = {spec.model: spec for spec in specs}
        self._present = {model: [spec for spec in specs if spec.model == model] for model in self._template}
        self._write()

    def count(self, model: str) -> int:
        """How many replicas of a model should run."""
        return len(self._present[model])

    def ready(self, model: str) -> list[ProcessSpec]:
        """The replicas of a model that accept requests."""
        return [spec for spec in self._present[model] if self._state(spec) is State.READY]

    def scale(self, model: str, replicas: int) -> None:
        """Starts or ends replicas until `replicas` of them run.

        It ends those that are not ready first, then the newest.
        """
        present = self._present[model]
        # The sort is stable, so that the oldest of equals are kept.
        kept = sorted(present, key=lambda spec: self._state(spec) is not State.READY)[:replicas]
        removed = [spec for spec in present if spec not in kept]
        self._present[model] = [spec for spec in present if spec in kept]
        for _ in range(replicas - len(kept)):
            spec = self._another(model)
            self._present[model].append(spec)
            self._supervisor.add(spec)
        self._write()
        for spec in removed:
            self._supervisor.remove(spec.name)

    def _state(self, spec: ProcessSpec) -> State:
        return self._supervisor.supervised[spec.name].state

    def _another(self, model: str) -> ProcessSpec:
        """One more replica, with the first name that no process uses. Processes that are draining still use theirs."""
        present = {one.spec.name: one.spec for one in self._supervisor.supervised.values()}
        assigned = {address for spec in present.values() for address in (spec.address, spec.metrics)}
        self._addresses.keep(assigned)
        address, metrics = self._addresses.free(2)
        template = self._template[model]
        gpu = next_gpu(template.device, present.values(), gpus=self._gpus, ranks=template.ranks)
        specs = (template.another(number, address=address, metrics=metrics, gpu=gpu) for number in count(1))
        return next(spec for spec in specs if spec.name not in present)

    def _write(self) -> None:
        models = {
            model: directory.Replicas(
                role=Role(self._template[model].role), replicas=tuple(spec.address for spec in present)
            )
            for model, present in self._present.items()
        }
        directory.Directory(workflows=self._workflows, models=models).write(self._path)
        if self._targets is not None:
            self._targets.write(spec for present in self._present.values() for spec in present)
