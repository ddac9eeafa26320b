"""The known state of the API server's objects, filled by the watches and by the responses to the operator's own writes.

The passes read only this store, so that a read costs no call. The response to a write is newer than the watch until the
watch catches up; the object with the higher resourceVersion wins. There is no lock: everything runs in the event loop's
thread.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable

from latentflow_operator.objects import Body, KubeObject, Model, ObjectKey, Pod, Workflow, key_of, parse

_REMEMBERED_DELETIONS = 256


class Store:
    """Objects by kind, namespace and name; also workflows by model used, and pods by model served."""

    def __init__(self) -> None:
        self._objects: dict[str, dict[ObjectKey, KubeObject]] = defaultdict(dict)
        self._workflows: dict[ObjectKey, Workflow] = {}
        self._models: dict[ObjectKey, Model] = {}
        self._users: dict[ObjectKey, set[str]] = defaultdict(set)
        self._pods: dict[ObjectKey, dict[str, Pod]] = defaultdict(dict)
        # UIDs of objects deleted lately. The response to a write may arrive after the watch has reported the deletion.
        self._deleted: deque[str] = deque(maxlen=_REMEMBERED_DELETIONS)

    def put(self, body: Body) -> KubeObject | None:
        """Adds or replaces an object and returns it; None if the stored one is as new, or if it has been deleted."""
        if body["metadata"]["uid"] in self._deleted:
            return None
        stored = self._objects[body["kind"]].get(key_of(body))
        if (
            stored is not None
            and stored.resource_version >= int(body["metadata"]["resourceVersion"])
            and stored.uid == body["metadata"]["uid"]
        ):
            return None
        new = parse(body)
        self._objects[new.kind][new.key] = new
        if isinstance(new, Workflow):
            self._index(new.key, new)
        elif isinstance(new, Model):
            self._models[new.key] = new
        elif isinstance(new, Pod):
            self._pods[new.namespace, new.model or ""][new.name] = new
        return new

    def drop(self, body: Body) -> KubeObject | None:
        """Removes a deleted object and returns it; None if it is not stored, or if its name belongs to a new object."""
        self._deleted.append(body["metadata"]["uid"])
        stored = self._objects[body["kind"]].get(key_of(body))
        if stored is None or stored.uid != body["metadata"]["uid"]:
            return None
        del self._objects[stored.kind][stored.key]
        if isinstance(stored, Workflow):
            self._index(stored.key, None)
        elif isinstance(stored, Model):
            del self._models[stored.key]
        elif isinstance(stored, Pod):
            self._pods[stored.namespace, stored.model or ""].pop(stored.name, None)
        return stored

    def get(self, kind: str, namespace: str, name: str) -> KubeObject | None:
        """An object of any kind; None if it does not exist."""
        return self._objects[kind].get((namespace, name))

    def model(self, namespace: str, name: str) -> Model | None:
        """A DiffusionModel; None if it does not exist."""
        return self._models.get((namespace, name))

    def models(self) -> list[Model]:
        """Every DiffusionModel."""
        return list(self._models.values())

    def workflow(self, namespace: str, name: str) -> Workflow | None:
        """A DiffusionWorkflow; None if it does not exist."""
        return self._workflows.get((namespace, name))

    def users(self, namespace: str, model: str) -> list[Workflow]:
        """The workflows that name a model or are still served by it, without those that are being deleted."""
        names = sorted(self._users.get((namespace, model), ()))
        return [one for name in names if not (one := self._workflows[namespace, name]).deleting]

    def pods(self, namespace: str, model: str) -> Iterable[Pod]:
        """The pods of a model."""
        return self._pods.get((namespace, model), {}).values()

    def _index(self, key: ObjectKey, new: Workflow | None) -> None:
        namespace, name = key
        before = self._workflows.pop(key, None)
        for model in before.uses if before else ():
            self._users[namespace, model].discard(name)
        if new is not None:
            self._workflows[key] = new
            for model in new.uses:
                self._users[namespace, model].add(name)
