"""Options that the commands share, and the client they describe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentflow.client import Client
from latentflow.rpc import Tls

Target = Annotated[
    str | None,
    typer.Option(
        "--target", "-t", help="The gateway, as host:port.", envvar="LATENTFLOW_TARGET", show_default="127.0.0.1:8400"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for everything, retries included.")]
Token = Annotated[str | None, typer.Option("--token", help="Bearer token.", envvar="LATENTFLOW_CLIENT_TOKEN")]
TlsCa = Annotated[
    Path | None, typer.Option("--tls-ca", exists=True, dir_okay=False, help="CA certificate, PEM; turns TLS on.")
]


def client(target: str | None, *, timeout: float, token: str | None, tls_ca: Path | None) -> Client:
    """A client as the options say."""
    return Client(target, timeout=timeout, token=token, tls=Tls(ca=tls_ca) if tls_ca else None)
