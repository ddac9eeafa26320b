"""Connections to the gateways of a cluster by kubectl port-forward, to the endpoint in a workflow's status."""

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
    """The Service of the gateways that serve a workflow.

    Attributes:
        workflow: The workflow's full name, namespace/name.
        service, namespace, port: Of the gateways' Service.
    """

    workflow: str
    service: str
    namespace: str
    port: int

    @property
    def host(self) -> str:
        """The name in the gateways' certificate, where they serve TLS."""
        return f"{self.service}.{self.namespace}.svc"


def route(listing: dict[str, Any], workflow: str | None) -> Route:
    """The route to a workflow, from a list of DiffusionWorkflows. Pure.

    Args:
        workflow: The workflow's name; None where the list has only one.

    Raises:
        NotFoundError: The list is empty, or has no workflow of this name.
        InvalidRequestError: `workflow` is None and the list has several.
        UnavailableError: The workflow's status has no endpoint; the operator writes it.
    """
    found = {item["metadata"]["name"]: item for item in listing.get("items", ())}
    if not found:
        raise NotFoundError("There is no DiffusionWorkflow in this namespace; choose another with --namespace.")
    if workflow is None and len(found) > 1:
        raise InvalidRequestError(
            f"There are several workflows; choose one with --workflow: {', '.join(sorted(found))}."
        )
    name = workflow if workflow is not None else next(iter(found))
    if name not in found:
        raise NotFoundError(
            f"There is no DiffusionWorkflow {name!r} in this namespace; it has {', '.join(sorted(found))}."
        )
    endpoint = _ENDPOINT.fullmatch(found[name].get("status", {}).get("endpoint", ""))
    if endpoint is None:
        raise UnavailableError(
            f"The status of DiffusionWorkflow {name!r} has no endpoint. Check that the operator runs: "
            "kubectl get pods --all-namespaces --selector app.kubernetes.io/name=latentflow"
        )
    full = f"{found[name]['metadata']['namespace']}/{name}"
    return Route(
        workflow=full, service=endpoint["service"], namespace=endpoint["namespace"], port=int(endpoint["port"])
    )


@contextmanager
def forwarded(workflow: str | None, namespace: str | None) -> Iterator[tuple[str, Route]]:
    """A local address that is forwarded to a workflow's gateways while entered, and the route that it takes.

    Args:
        namespace: The workflow's; None: the kubeconfig's.
    """
    if workflow is not None and "/" in workflow:
        own, _, workflow = workflow.partition("/")
        namespace = namespace or own
    options = [f"--namespace={namespace}"] if namespace else []
    listed = _kubectl("get", "diffusionworkflows.latentflow.io", "--output=json", *options)
    found = route(json.loads(listed), workflow)
    command = ["port-forward", f"--namespace={found.namespace}", "--address=127.0.0.1", f"service/{found.service}"]
    with subprocess.Popen(
        ["kubectl", *command, f":{found.port}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as forward:
        try:
            assert forward.stdout is not None
            assert forward.stderr is not None
            local = _FORWARDED.match(forward.stdout.readline())
            if local is None:
                raise UnavailableError(
                    f"The gateways are unreachable: kubectl port-forward: {forward.stderr.read().strip()}"
                )
            yield f"127.0.0.1:{local[1]}", found
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
