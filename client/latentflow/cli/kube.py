"""The way from a laptop to the gateways of a cluster: kubectl's port-forward, to the endpoint that a workflow's status names."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from latentflow.errors import InvalidRequestError, NotFoundError, UnavailableError

_ENDPOINT = re.compile(r"(?P<service>[^.:]+)\.(?P<namespace>[^.:]+)\.svc(\.[^:]+)?:(?P<port>\d+)")
_FORWARDED = re.compile(r"Forwarding from 127\.0\.0\.1:(\d+)")


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where a workflow is served.

    Attributes:
        workflow: The workflow's full name, namespace/name.
        service: Of the gateways, in `namespace`.
    """

    workflow: str
    service: str
    namespace: str
    port: int

    @property
    def host(self) -> str:
        """Whose certificate the gateways show, if they serve TLS."""
        return f"{self.service}.{self.namespace}.svc"


def route(listing: dict[str, Any], workflow: str | None) -> Route:
    """The route to a workflow out of a listing of DiffusionWorkflows: pure.

    Args:
        workflow: Its name; None where there is only one.

    Raises:
        NotFoundError: There is none, or none of that name.
        InvalidRequestError: There are several, and none was named.
        UnavailableError: No operator has said yet where its gateways are.
    """
    found = {item["metadata"]["name"]: item for item in listing.get("items", ())}
    if not found:
        raise NotFoundError("There is no DiffusionWorkflow in this namespace; choose another with --namespace.")
    if workflow is None and len(found) > 1:
        raise InvalidRequestError(f"Say which workflow with --workflow: {', '.join(sorted(found))}.")
    name = workflow if workflow is not None else next(iter(found))
    if name not in found:
        raise NotFoundError(
            f"There is no DiffusionWorkflow {name!r} in this namespace, but {', '.join(sorted(found))}."
        )
    endpoint = _ENDPOINT.fullmatch(found[name].get("status", {}).get("endpoint", ""))
    if endpoint is None:
        raise UnavailableError(
            f"The status of DiffusionWorkflow {name!r} names no endpoint: does the operator run? "
            "See kubectl get pods --all-namespaces --selector app.kubernetes.io/name=latentflow"
        )
    full = f"{found[name]['metadata']['namespace']}/{name}"
    return Route(
        workflow=full, service=endpoint["service"], namespace=endpoint["namespace"], port=int(endpoint["port"])
    )


@contextmanager
def reached(workflow: str | None, namespace: str | None) -> Iterator[tuple[str, Route]]:
    """The gateways' address on this machine, while entered, and the way that it stands for.

    Args:
        namespace: Of the workflow; None: the kubeconfig's.
    """
    if workflow is not None and "/" in workflow:
        inside, _, workflow = workflow.partition("/")
        namespace = namespace or inside
    place = [f"--namespace={namespace}"] if namespace else []
    listed = _kubectl("get", "diffusionworkflows.latentflow.io", "--output=json", *place)
    way = route(json.loads(listed), workflow)
    command = ["port-forward", f"--namespace={way.namespace}", "--address=127.0.0.1", f"service/{way.service}"]
    with subprocess.Popen(
        ["kubectl", *command, f":{way.port}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as forward:
        try:
            assert forward.stdout is not None
            assert forward.stderr is not None
            said = _FORWARDED.match(forward.stdout.readline())
            if said is None:
                raise UnavailableError(
                    f"The gateways cannot be reached: kubectl port-forward: {forward.stderr.read().strip()}"
                )
            yield f"127.0.0.1:{said[1]}", way
        finally:
            forward.terminate()


def _kubectl(*arguments: str) -> str:
    try:
        done = subprocess.run(["kubectl", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UnavailableError("--kube needs kubectl; install it, or use --target.") from None
    if done.returncode != 0:
        raise UnavailableError(f"kubectl {arguments[0]}: {done.stderr.strip()}")
    return done.stdout
