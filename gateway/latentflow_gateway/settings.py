"""The settings of a gateway, read from its command line and environment."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from latentflow.internal import rpc

# As browsers send it: without a path, and without a slash at the end.
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s]+")
_LEAST = {
    "max_running": 1,
    "max_queued": 0,
    "max_pixels": 1,
    "max_steps": 1,
    "max_images": 1,
    "max_control_image_bytes": 1,
    "ready_seconds": 0,
    "request_seconds": 0.1,
    "checkpoint_interval": 0,
    "drain": 0,
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest values of one request."""

    max_pixels: int = 2048 * 2048
    max_steps: int = 200
    max_images: int = 8
    max_control_image_bytes: int = 8 << 20
    max_prompt_chars: int = 10_000


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """Settings of one gateway.

    Attributes:
        directory: The directory file, which the gateway follows; None: it follows the objects of a Kubernetes cluster.
        namespaces: Namespaces of the cluster whose workflows are served; empty: all.
        listen: host:port for gRPC.
        http: host:port for the HTTP API; None: it is not served.
        cors_origins: Origins of web pages that may use the HTTP API, such as https://app.example; "*": all.
        metrics: host:port for /metrics.
        max_running: Requests that run at a time.
        max_queued: Requests that are queued beyond those; any further one is refused.
        checkpoint_interval: Steps between checkpoints. A request loses at most so many steps when a denoiser fails.
        request_seconds: The longest that a request may take, whatever its client's deadline is.
        ready_seconds: The longest that a request waits for a model without a ready replica.
        drain: Seconds that running requests get to finish after SIGTERM.
        token: The secret that gateways and model servers share.
        api_keys: A folder with one file for each client, which holds its API key. None: clients need no key.
        tls: For connections from clients, over gRPC and HTTP; None: without TLS.
        node_tls: For connections to model servers; None: without TLS.
    """

    directory: Path | None
    namespaces: tuple[str, ...] = ()
    listen: str = "127.0.0.1:8400"
    http: str | None = None
    cors_origins: tuple[str, ...] = ()
    metrics: str = "127.0.0.1:0"
    limits: Limits = field(default_factory=Limits)
    max_running: int = 32
    max_queued: int = 128
    checkpoint_interval: int = 10
    request_seconds: float = 600.0
    ready_seconds: float = 60.0
    drain: float = 30.0
    token: str | None = None
    api_keys: Path | None = None
    tls: rpc.Tls | None = None
    node_tls: rpc.Tls | None = None
    log_format: Literal["console", "json"] = "console"


def parse(argv: list[str] | None = None) -> GatewaySettings:
    """Settings from a command line and the environment; exits with a usage message where they are invalid."""
    parser = argparse.ArgumentParser(
        prog="latentflow-gateway",
        description="Serves the workflows of a directory file or of a Kubernetes cluster to clients.",
        epilog="The secret that gateways and model servers share is read from the environment variable LATENTFLOW_TOKEN.",
    )
    add = parser.add_argument
    limits = Limits()
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--directory", type=Path, help="file with the workflows and the addresses of their models' servers"
    )
    where.add_argument("--kube", action="store_true", help="serve the DiffusionWorkflows of a Kubernetes cluster")
    add(
        "--namespace",
        action="append",
        default=[],
        help="with --kube: serve only this namespace; may be repeated (default: all namespaces)",
    )
    add("--listen", default="127.0.0.1:8400", help="host:port on which to serve gRPC (default: 127.0.0.1:8400)")
    add(
        "--http-listen",
        default="127.0.0.1:8402",
        help="host:port on which to serve the HTTP API, or none (default: 127.0.0.1:8402)",
    )
    add(
        "--http-cors-origin",
        action="append",
        default=[],
        help="origin of web pages that may use the HTTP API, such as https://app.example, or * for all; may be repeated "
        "(default: none)",
    )
    add("--metrics", default="127.0.0.1:0", help="host:port on which to serve /metrics (default: a free port)")
    add("--max-running", type=int, default=32, help="requests that run at a time (default: 32)")
    add(
        "--max-queued",
        type=int,
        default=128,
        help="requests that are queued beyond those; any further one is refused (default: 128)",
    )
    add(
        "--max-pixels",
        type=int,
        default=limits.max_pixels,
        help="most pixels of an image, width times height (default: %(default)s)",
    )
    add(
        "--max-steps",
        type=int,
        default=limits.max_steps,
        help="most denoising steps of a request (default: %(default)s)",
    )
    add("--max-images", type=int, default=limits.max_images, help="most images of a request (default: %(default)s)")
    add(
        "--max-control-image-bytes",
        type=int,
        default=limits.max_control_image_bytes,
        help="largest control image, in bytes (default: %(default)s)",
    )
    add(
        "--ready-seconds",
        type=float,
        default=60.0,
        help="longest wait of a request for a model without a ready replica, in seconds (default: 60)",
    )
    add(
        "--request-seconds",
        type=float,
        default=600.0,
        help="longest time of a request, whatever its client's deadline is, in seconds (default: 600)",
    )
    add(
        "--checkpoint-interval",
        type=int,
        default=10,
        help="steps between checkpoints of a request; 0: no checkpoints (default: 10)",
    )
    add(
        "--drain",
        type=float,
        default=30.0,
        help="seconds that running requests get to finish after SIGTERM (default: 30)",
    )
    add(
        "--api-keys",
        type=Path,
        help="folder with one file for each client, which holds its API key (default: clients need no key)",
    )
    add("--tls-cert", type=Path, help="certificate shown to clients, PEM; turns TLS on")
    add("--tls-key", type=Path, help="key of --tls-cert, PEM")
    add("--tls-ca", type=Path, help="CA of the clients' certificates, PEM; clients without one are then refused")
    add("--node-tls-ca", type=Path, help="CA of the model servers' certificates, PEM; turns TLS to them on")
    add("--node-tls-cert", type=Path, help="certificate shown to model servers, PEM")
    add("--node-tls-key", type=Path, help="key of --node-tls-cert, PEM")
    add("--log-format", choices=("console", "json"), default="console", help="form of log lines (default: console)")
    args = parser.parse_args(argv)
    for name, least in _LEAST.items():
        # "not" refuses NaN too.
        if not getattr(args, name) >= least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    for origin in args.http_cors_origin:
        if not _ORIGIN.fullmatch(origin):
            parser.error(f"--http-cors-origin: {origin!r} is not an origin, such as https://app.example, or *")
    if args.namespace and not args.kube:
        parser.error("--namespace needs --kube")
    tls = node_tls = None
    if args.tls_cert or args.tls_key or args.tls_ca:
        if not (args.tls_cert and args.tls_key):
            parser.error("TLS needs both --tls-cert and --tls-key")
        tls = rpc.Tls(ca=args.tls_ca, certificate=args.tls_cert, key=args.tls_key)
    if args.node_tls_ca or args.node_tls_cert or args.node_tls_key:
        if not args.node_tls_ca or bool(args.node_tls_cert) != bool(args.node_tls_key):
            parser.error("TLS to model servers needs --node-tls-ca, and --node-tls-cert and --node-tls-key together")
        node_tls = rpc.Tls(ca=args.node_tls_ca, certificate=args.node_tls_cert, key=args.node_tls_key)
    return GatewaySettings(
        directory=args.directory,
        namespaces=tuple(args.namespace),
        listen=args.listen,
        http=None if args.http_listen == "none" else args.http_listen,
        cors_origins=tuple(args.http_cors_origin),
        metrics=args.metrics,
        limits=Limits(
            max_pixels=args.max_pixels,
            max_steps=args.max_steps,
            max_images=args.max_images,
            max_control_image_bytes=args.max_control_image_bytes,
        ),
        max_running=args.max_running,
        max_queued=args.max_queued,
        checkpoint_interval=args.checkpoint_interval,
        ready_seconds=args.ready_seconds,
        drain=args.drain,
        request_seconds=args.request_seconds,
        token=os.environ.get("LATENTFLOW_TOKEN") or None,
        api_keys=args.api_keys,
        tls=tls,
        node_tls=node_tls,
        log_format=args.log_format,
    )
