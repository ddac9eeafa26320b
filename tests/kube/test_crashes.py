"""The operator may die between any two writes: the next one ends in the same objects."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from kube.acting import KINDS, report, workflow
from kube.test_colocated import workflow as colocated
from latentflow_operator.cluster import Cluster
from latentflow_operator.reconcile import Reconciler
from latentflow_operator.settings import OperatorSettings
from support.apiserver import ApiServer
from support.kubectl import Body, Namespace, new_namespace

SETTINGS = OperatorSettings(node_image="latentflow-node:test", model_root={"emptyDir": {}}, retire_seconds=0)
SEEN = ("DiffusionWorkflow", *KINDS, "Pod")


class Mortal(Cluster):
    """Dies at its n-th write: before that has reached the server, or after, without having heard of it."""

    def __init__(self, server: ApiServer, *, dies_at: int | None = None, heard: bool = False) -> None:
        super().__init__(server.client())
        self.writes = 0
        self._dies_at = dies_at
        self._heard = heard

    def _call(self, method: str, path: str, body: Any, query: list[tuple[str, str]], **kind: Any) -> Any:
        self.writes += 1
        if self._dies_at is not None and self.writes >= self._dies_at:
            if self._heard and self.writes == self._dies_at:
                super()._call(method, path, body, query, **kind)
            raise ConnectionError("dead")
        return super()._call(method, path, body, query, **kind)


def live(namespace: Namespace, cluster: Mortal, *, twice: bool = False, settings: OperatorSettings = SETTINGS) -> int:
    """One life of an operator: it lists what is there, and works until there is nothing to do. How much it wrote."""

    async def run() -> None:
        reconciler = Reconciler(cluster=cluster, settings=settings, clock=lambda: datetime(2026, 1, 1, tzinfo=UTC))
        for kind in SEEN:
            for body in namespace.list(kind).values():
                for _ in range(2 if twice else 1):
                    reconciler.seen(body)
        async with reconciler.queue.running():
            reconciler.queue.open()
            await reconciler.queue.idle()

    asyncio.run(run())
    return cluster.writes


def settle(server: ApiServer, namespace: Namespace, settings: OperatorSettings = SETTINGS) -> None:
    """Lives of operators until one finds nothing to do."""
    for _ in range(10):
        if live(namespace, Mortal(server), settings=settings) == 0:
            return
    raise AssertionError("ten operators have not come to an end")


def outcome(namespace: Namespace) -> str:
    """Everything that users and controllers read, without what differs from one namespace to another."""
    said: dict[str, Any] = {}
    for kind in ("DiffusionWorkflow", *KINDS):
        for name, body in namespace.list(kind).items():
            metadata = body["metadata"]
            said[f"{kind}/{name}"] = {
                "spec": {k: v for k, v in body["spec"].items() if k not in ("clusterIP", "clusterIPs")},
                "status": _plain(body),
                "labels": metadata.get("labels"),
                "owners": [(o["kind"], o["name"]) for o in metadata.get("ownerReferences", ())],
            }
    return json.dumps(said, indent=1, sort_keys=True)


def _plain(body: Body) -> Body:
    kept = ("conditions", "models", "modelsReady", "replicas", "readyReplicas", "selector")
    status = {key: value for key, value in body.get("status", {}).items() if key in kept}
    return status if body["kind"].startswith("Diffusion") else {}


def create(server: ApiServer, namespace: Namespace) -> None:
    namespace.create(workflow())


def create_colocated(server: ApiServer, namespace: Namespace) -> None:
    namespace.create(colocated())


def change(server: ApiServer, namespace: Namespace) -> None:
    """A workflow that serves, and whose denoiser was changed to one that is ready."""
    create(server, namespace)
    settle(server, namespace)
    first = namespace.list("DiffusionModel")
    for model in first:
        _pod(namespace, model)
    settle(server, namespace)
    namespace.apply(workflow(source={"uri": "other"}))
    settle(server, namespace)
    for model in namespace.list("DiffusionModel").keys() - first.keys():
        _pod(namespace, model)


def _pod(namespace: Namespace, model: str) -> None:
    labels = {"latentflow.io/model": model, "app.kubernetes.io/managed-by": "latentflow-operator"}
    spec = {"containers": [{"name": "node", "image": "x"}]}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": model, "labels": labels}, "spec": spec}
    namespace.create(body)
    report(namespace, model, ready=True)


@pytest.mark.parametrize("scenario", [create, create_colocated, change])
@pytest.mark.parametrize("heard", [False, True], ids=["before", "after"])
def test_dying_at_any_write_changes_nothing_in_the_outcome(api_server: ApiServer, scenario: Any, heard: bool) -> None:
    with new_namespace(api_server, "undisturbed") as namespace:
        scenario(api_server, namespace)
        writes = live(namespace, Mortal(api_server))
        settle(api_server, namespace)
        wanted = outcome(namespace)
    assert writes > 3
    for dies_at in range(1, writes + 1):
        with new_namespace(api_server, f"dies-at-{dies_at}") as namespace:
            scenario(api_server, namespace)
            live(namespace, Mortal(api_server, dies_at=dies_at, heard=heard))
            settle(api_server, namespace)
            assert outcome(namespace) == wanted


def test_every_object_delivered_twice_or_late_changes_nothing_in_the_outcome(api_server: ApiServer) -> None:
    with new_namespace(api_server, "once") as namespace:
        create(api_server, namespace)
        settle(api_server, namespace)
        wanted = outcome(namespace)
        # Late: what was known before comes again, by an operator that has written since.
        assert live(namespace, Mortal(api_server), twice=True) == 0
        assert outcome(namespace) == wanted


def test_a_model_that_was_changed_away_from_stays_for_the_requests_that_have_begun_with_it(
    api_server: ApiServer,
) -> None:
    with new_namespace(api_server, "retiring") as namespace:
        change(api_server, namespace)
        settle(api_server, namespace, SETTINGS.model_copy(update={"retire_seconds": 3600}))
        (body,) = namespace.list("DiffusionWorkflow").values()
        bound = {entry["model"] for entry in body["status"]["models"]}
        there = namespace.list("DiffusionModel").keys()
        assert len(bound) == 4
        assert bound < there
        settle(api_server, namespace)
        assert namespace.list("DiffusionModel").keys() == bound
