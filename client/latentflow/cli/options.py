"""Options that the commands share, and the client they describe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from latentflow.cli.kube import reached
from latentflow.client import Client
from latentflow.errors import InvalidRequestError
from latentflow.internal.rpc import Tls

Target = Annotated[
    str | None,
    typer.Option(
        "--target", "-t", help="The gateway, as host:port.", envvar="LATENTFLOW_TARGET", show_default="127.0.0.1:8400"
    ),
]
Kube = Annotated[
    bool,
    typer.Option(
        "--kube", help="Reach the gateways of the cluster that the kubeconfig names, by kubectl port-forward."
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", help="With --kube: the workflow's namespace.", show_default="the kubeconfig's"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for everything, retries included.")]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", help="Key that the gateway asks for.", envvar="LATENTFLOW_API_KEY")
]
TlsCa = Annotated[
    Path | None, typer.Option("--tls-ca", exists=True, dir_okay=False, help="CA certificate, PEM; turns TLS on.")
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
    """A client as the options say, and the workflow's name as it knows it."""
    if kube and target is not None:
        raise InvalidRequestError("Either --kube or --target: both say where the gateway is.")
    if namespace is not None and not kube:
        raise InvalidRequestError("--namespace goes with --kube; elsewhere write --workflow NAMESPACE/NAME.")
    with ExitStack() as stack:
        host = None
        if kube:
            target, way = stack.enter_context(reached(workflow, namespace))
            workflow, host = way.workflow, way.host
        tls = Tls(ca=tls_ca, name=host) if tls_ca else None
        yield stack.enter_context(Client(target, timeout=timeout, api_key=api_key, tls=tls)), workflow
