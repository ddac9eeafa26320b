"""Options that commands share, and the client that they configure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from latentflow.cli.kube import forwarded
from latentflow.client import Client
from latentflow.errors import InvalidRequestError
from latentflow.internal.rpc import Tls

Workflow = Annotated[
    str | None,
    typer.Option("--workflow", "-w", help="Workflow, as NAME or NAMESPACE/NAME. Optional where only one is served."),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        help="Address of the gateway, as host:port.",
        envvar="LATENTFLOW_TARGET",
        show_default="127.0.0.1:8400",
    ),
]
Kube = Annotated[
    bool,
    typer.Option("--kube", help="Connect to the gateways of a Kubernetes cluster, by kubectl port-forward."),
]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", help="With --kube: namespace of the workflow.", show_default="the kubeconfig's"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for the whole command, including retries.")]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", help="API key, where the gateway requires one.", envvar="LATENTFLOW_API_KEY")
]
TlsCa = Annotated[
    Path | None,
    typer.Option("--tls-ca", exists=True, dir_okay=False, help="CA certificate of the gateway, PEM; turns TLS on."),
]


@contextmanager
def client(
    target: str | None,
    *,
    timeout: float,
    api_key: str | None,
    tls_ca: Path | None,
    kube: bool = False,
    namespace: str | None = None,
    workflow: str | None = None,
) -> Iterator[tuple[Client, str | None]]:
    """A client with these options, and the workflow's name for its requests."""
    if kube and target is not None:
        raise InvalidRequestError("Use either --kube or --target: both choose the gateway.")
    if namespace is not None and not kube:
        raise InvalidRequestError("--namespace needs --kube; without it, write --workflow NAMESPACE/NAME.")
    with ExitStack() as stack:
        host = None
        if kube:
            target, route = stack.enter_context(forwarded(workflow, namespace))
            workflow, host = route.workflow, route.host
        tls = Tls(ca=tls_ca, name=host) if tls_ca else None
        yield stack.enter_context(Client(target, timeout=timeout, api_key=api_key, tls=tls)), workflow
