"""What the API server is known to hold: filled by the watches and by the answers to our own writes.

The reconcilers read only this, so that reading costs no call. An answer to a write is newer than what the watch has shown
until the watch catches up; the higher resourceVersion wins. Not locked: everything runs on the event loop's thread.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from latentflow.api import DiffusionWorkflow, placed
from latentflow.api.types import MODEL_LABEL
from pydantic import ValidationError

from latentflow_operator.binding import Owner

Body = dict[str, Any]
Place = tuple[str, str]
_REMEMBERED = 256


@dataclass(frozen=True, kw_only=True)
class Known:
    """A workflow: as the API server has it, and as we read it. `owner` is None where it says what we cannot read."""

    body: Body
    owner: Owner | None
    uses: frozenset[str]


class Store:
    """Bodies by kind, namespace and name; workflows also by the models they use, pods by the model they serve."""

    def __init__(self) -> None:
        self._bodies: dict[str, dict[Place, Body]] = defaultdict(dict)
        self._workflows: dict[Place, Known] = {}
        self._users: dict[Place, set[str]] = defaultdict(set)
        self._pods: dict[Place, dict[str, Body]] = defaultdict(dict)
        # Deleted lately: an answer to a write of ours may come after the news that the object has gone.
        self._gone: deque[str] = deque(maxlen=_REMEMBERED)

    def put(self, body: Body) -> bool:
        """Takes a body in; False where what is known is as new, or that the object was deleted."""
        place, kind = place_of(body), body["kind"]
        if _uid(body) in self._gone:
            return False
        known = self._bodies[kind].get(place)
        if known is not None and _version(known) >= _version(body) and _uid(known) == _uid(body):
            return False
        body = _trimmed(body)
        self._bodies[kind][place] = body
        if kind == "DiffusionWorkflow":
            self._index(place, _read(body))
        if kind == "Pod":
            self._pods[place[0], body["metadata"]["labels"][MODEL_LABEL]][place[1]] = body
        return True

    def drop(self, body: Body) -> bool:
        """Forgets a body that was deleted; False where it is known no more, or another has its name since."""
        place, kind = place_of(body), body["kind"]
        self._gone.append(_uid(body))
        known = self._bodies[kind].get(place)
        if known is None or _uid(known) != _uid(body):
            return False
        del self._bodies[kind][place]
        if kind == "DiffusionWorkflow":
            self._index(place, None)
        if kind == "Pod":
            self._pods[place[0], known["metadata"]["labels"][MODEL_LABEL]].pop(place[1], None)
        return True

    def get(self, kind: str, namespace: str, name: str) -> Body | None:
        """What is known of an object; None where there is none."""
        return self._bodies[kind].get((namespace, name))

    def all(self, kind: str) -> list[Body]:
        """Every object of a kind."""
        return list(self._bodies[kind].values())

    def workflow(self, namespace: str, name: str) -> Known | None:
        """A workflow."""
        return self._workflows.get((namespace, name))

    def users(self, namespace: str, model: str) -> list[Known]:
        """The workflows that name a model or are still served by it, and are not on their way out."""
        known = [self._workflows[namespace, name] for name in sorted(self._users.get((namespace, model), ()))]
        return [one for one in known if "deletionTimestamp" not in one.body["metadata"]]

    def pods(self, namespace: str, model: str) -> Iterable[Body]:
        """The pods of a model."""
        return self._pods.get((namespace, model), {}).values()

    def _index(self, place: Place, known: Known | None) -> None:
        before = self._workflows.pop(place, None)
        for model in before.uses if before else ():
            self._users[place[0], model].discard(place[1])
        if known is not None:
            self._workflows[place] = known
            for model in known.uses:
                self._users[place[0], model].add(place[1])


def place_of(body: Body) -> Place:
    """Namespace and name."""
    return body["metadata"]["namespace"], body["metadata"]["name"]


def bound_models(body: Body) -> dict[str, str]:
    """Which DiffusionModel serves each model of a workflow, as its status says."""
    return {entry["name"]: entry["model"] for entry in body.get("status", {}).get("models", ())}


def _read(body: Body) -> Known:
    metadata = body["metadata"]
    bound = frozenset(bound_models(body).values())
    try:
        workflow = DiffusionWorkflow.of_object(body)
    except ValidationError:
        # Of another version's schema; the API server would have refused it today. What serves it stays.
        return Known(body=body, owner=None, uses=bound)
    owner = Owner(workflow=workflow, uid=metadata["uid"], created=metadata["creationTimestamp"])
    return Known(body=body, owner=owner, uses=bound | set(placed(workflow).values()))


def _trimmed(body: Body) -> Body:
    """Without what nobody reads, as there may be thousands."""
    metadata = {key: value for key, value in body["metadata"].items() if key != "managedFields"}
    kept = dict(body) | {"metadata": metadata}
    if body["kind"] == "Pod":
        kept.pop("spec", None)
    return kept


def _version(body: Body) -> int:
    return int(body["metadata"]["resourceVersion"])


def _uid(body: Body) -> str:
    return str(body["metadata"]["uid"])
