"""kopf's part: watches the cluster's objects and hands them to the reconciler. Writes nothing itself.

Only index and event handlers are used, which add no finalizer and no annotation: deleting never waits for the operator,
and a restart writes nothing. kopf calls event handlers only when every index is complete, that is when everything there
is has been listed, so no pass is made on half of the facts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import kopf
from kubernetes import client as kube
from kubernetes import config
from latentflow.api.types import MODEL_LABEL
from latentflow.errors import FailedPreconditionError

from latentflow_operator.cluster import MANAGER
from latentflow_operator.leadership import Lease
from latentflow_operator.manifests import MANAGED
from latentflow_operator.reconcile import Reconciler
from latentflow_operator.scaling import Scaler

_WATCHED: tuple[tuple[str, str, str, dict[str, Any] | None], ...] = (
    ("latentflow.io", "v1alpha1", "diffusionworkflows", None),
    ("latentflow.io", "v1alpha1", "diffusionmodels", None),
    ("apps", "v1", "deployments", {MODEL_LABEL: kopf.PRESENT, **MANAGED}),
    ("", "v1", "services", {MODEL_LABEL: kopf.PRESENT, **MANAGED}),
    ("policy", "v1", "poddisruptionbudgets", {MODEL_LABEL: kopf.PRESENT, **MANAGED}),
    ("", "v1", "pods", {MODEL_LABEL: kopf.PRESENT, **MANAGED}),
)


def registry(reconciler: Reconciler, *, listed: Callable[[], object]) -> kopf.OperatorRegistry:
    """kopf's handlers for a reconciler.

    Args:
        listed: Called, again and again, when everything there is has been seen.
    """
    handlers = kopf.OperatorRegistry()

    def index(body: kopf.Body, **_: Any) -> None:
        # Called for every object, before the handlers of any: the store is our index.
        reconciler.seen(dict(body))

    async def event(type: str | None, body: kopf.Body, **_: Any) -> None:
        listed()
        if type == "DELETED":
            reconciler.gone(dict(body))

    @kopf.on.login(registry=handlers)
    def login(**arguments: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)

    for group, version, plural, labels in _WATCHED:
        kopf.index(group, version, plural, id=f"index-{plural}", labels=labels, registry=handlers)(index)
        kopf.on.event(group, version, plural, id=f"event-{plural}", labels=labels, registry=handlers)(event)
    return handlers


async def operate(
    reconciler: Reconciler,
    *,
    namespaces: tuple[str, ...] = (),
    liveness: str | None = None,
    lease: Lease | None = None,
    scaler: Scaler | None = None,
) -> None:
    """Runs until a signal.

    Args:
        namespaces: Where to work; empty: in all.
        liveness: Where to answer liveness probes, as http://host:port/path.
        scaler: Scales models; None: nobody does here.
        lease: What to hold while writing; without one, nobody else may work in the same namespaces.

    Raises:
        LeaseLostError: Another operator may work now.
    """
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.watching.server_timeout = 600
    listed, stop = asyncio.Event(), asyncio.Event()

    async def lead() -> None:
        await listed.wait()
        if lease is not None:
            await lease.acquire()
        reconciler.queue.open()
        tasks = [asyncio.create_task(reconciler.downloads.run())]
        tasks += [asyncio.create_task(lease.hold())] if lease is not None else []
        tasks += [asyncio.create_task(scaler.run())] if scaler is not None else []
        try:
            await asyncio.gather(*tasks)
        finally:
            stop.set()
            for task in tasks:
                task.cancel()

    leading = asyncio.create_task(lead())
    async with reconciler.queue.running():
        await kopf.operator(
            registry=registry(reconciler, listed=listed.set),
            settings=settings,
            clusterwide=not namespaces,
            namespaces=namespaces,
            standalone=True,
            # Else kopf asks for the user's name, and in a container the user has none.
            identity=MANAGER,  # type: ignore[arg-type]
            liveness_endpoint=liveness,
            stop_flag=stop,
        )
    leading.cancel()
    (outcome,) = await asyncio.gather(leading, return_exceptions=True)
    if lease is not None:
        await lease.release()
    if isinstance(outcome, Exception):
        raise outcome


def connect() -> kube.ApiClient:
    """A client of the cluster it runs in, else of the kubeconfig's. FailedPreconditionError where there is none."""
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config()
        else:
            config.load_kube_config(config_file=os.environ.get("KUBECONFIG"))
    except config.ConfigException as error:
        raise FailedPreconditionError(
            f"No cluster to work in: {error} Run in a cluster with a ServiceAccount, or set KUBECONFIG."
        ) from None
    api = kube.ApiClient()
    api.user_agent = MANAGER
    return api
