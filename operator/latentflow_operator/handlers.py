"""kopf's handlers, which watch the cluster's objects and pass them to the reconciler. They write nothing.

They are index and event handlers only, which add no finalizer and no annotation: a deletion never waits for the
operator, and a restart writes nothing. kopf calls event handlers only after every index is complete, that is after all
objects have been listed, so that no pass runs on incomplete state.
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
        listed: Called once or more after all objects have been listed.
    """
    handlers = kopf.OperatorRegistry()

    def index(body: kopf.Body, **_: Any) -> None:
        # kopf calls it for every object before any event handler. The store serves as the index.
        reconciler.observe(dict(body))

    async def event(type: str | None, body: kopf.Body, **_: Any) -> None:
        listed()
        if type == "DELETED":
            reconciler.forget(dict(body))

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
        namespaces: The namespaces to watch; empty: all.
        liveness: host:port of /healthz, for liveness probes; None: not served.
        lease: The Lease to hold while writing; None: no other operator may run in these namespaces.
        scaler: Scales models; None: no model is scaled automatically.

    Raises:
        LeaseLostError: Another operator may write now.
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
            # Without an identity kopf looks up the user's name, and a container's user has none.
            identity=MANAGER,  # type: ignore[arg-type]
            liveness_endpoint=f"http://{liveness}/healthz" if liveness else None,
            stop_flag=stop,
        )
    leading.cancel()
    (outcome,) = await asyncio.gather(leading, return_exceptions=True)
    if lease is not None:
        await lease.release()
    if isinstance(outcome, Exception):
        raise outcome


def connect() -> kube.ApiClient:
    """A client of the cluster of this pod, or else of the kubeconfig's. FailedPreconditionError if there is neither."""
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config()
        else:
            config.load_kube_config(config_file=os.environ.get("KUBECONFIG"))
    except config.ConfigException as error:
        raise FailedPreconditionError(
            f"There is no cluster to connect to: {error} Run in a pod with a ServiceAccount, or set KUBECONFIG."
        ) from None
    api = kube.ApiClient()
    api.user_agent = MANAGER
    return api
