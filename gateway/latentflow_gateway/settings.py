"""What a gateway is told at its start; read from the command line, handed to everything else frozen."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from latentflow.internal import rpc


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    max_pixels: int = 2048 * 2048
    max_steps: int = 200
    max_images: int = 8
    max_control_image_bytes: int = 8 << 20
    max_prompt_chars: int = 10_000


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """Settings of one gateway.

    Attributes:
        directory: The directory file; read again whenever it changes. None: the cluster's own objects are followed.
        namespaces: Of a cluster, which to serve; empty: all.
        listen: host:port for gRPC.
        metrics: host:port for /metrics.
        max_running: Requests that are worked on at a time.
        max_queued: Requests that may wait for that; one more is refused.
        checkpoint_interval: Steps between checkpoints, which bound what a crash loses.
        request_seconds: The longest that a request may take, whatever deadline its client set.
        ready_seconds: How long a request waits for a model that has no ready replica.
        drain: Seconds that running requests get when the gateway is told to stop.
        token: Shared secret of the servers.
        api_keys: A folder with a file for each client, which holds its API key; looked at with every call. None: clients
            need no key.
        tls: What clients are served with; None: no TLS.
        node_tls: What model servers are called with; None: no TLS.
    """

    directory: Path | None
    namespaces: tuple[str, ...] = ()
    listen: str = "127.0.0.1:8400"
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
    """Settings from a command line and the environment; exits with a usage message on nonsense."""
    parser = argparse.ArgumentParser(
        prog="latentflow-gateway",
        description="Serves latentflow's Generation service over the model servers of a directory file or of a cluster.",
        epilog="The servers' shared secret is read from the environment variable LATENTFLOW_TOKEN.",
    )
    add = parser.add_argument
    limits = Limits()
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--directory", type=Path, help="the directory file: workflows and where their models listen")
    where.add_argument("--kube", action="store_true", help="serve the DiffusionWorkflows of the Kubernetes cluster")
    add("--namespace", action="append", default=[], help="with --kube: a namespace to serve; several times for more")
    add("--listen", default="127.0.0.1:8400", help="host:port for gRPC (default: 127.0.0.1:8400)")
    add("--metrics", default="127.0.0.1:0", help="host:port for /metrics (default: a free port)")
    add("--max-running", type=int, default=32, help="requests worked on at a time (default: 32)")
    add("--max-queued", type=int, default=128, help="requests that may wait for that (default: 128)")
    add("--max-pixels", type=int, default=limits.max_pixels, help="most pixels of an image (default: %(default)s)")
    add("--max-steps", type=int, default=limits.max_steps, help="most steps (default: %(default)s)")
    add("--max-images", type=int, default=limits.max_images, help="most images of a request (default: %(default)s)")
    add(
        "--max-control-image-bytes",
        type=int,
        default=limits.max_control_image_bytes,
        help="largest control image (default: %(default)s)",
    )
    add(
        "--ready-seconds",
        type=float,
        default=60.0,
        help="seconds a request waits for a model without ready replicas: for it to wake (default: 60)",
    )
    add(
        "--request-seconds",
        type=float,
        default=600.0,
        help="the longest that a request may take, whatever deadline its client set (default: 600)",
    )
    add("--checkpoint-interval", type=int, default=10, help="steps between checkpoints; 0: none (default: 10)")
    add("--drain", type=float, default=30.0, help="seconds running requests get at SIGTERM (default: 30)")
    add("--api-keys", type=Path, help="folder with a file for each client, its API key; others are refused")
    add("--tls-cert", type=Path, help="certificate for clients, PEM")
    add("--tls-key", type=Path, help="its key, PEM")
    add("--tls-ca", type=Path, help="CA of clients' certificates, PEM; makes TLS mutual")
    add("--node-tls-ca", type=Path, help="CA of the model servers' certificates, PEM; calls them with TLS")
    add("--node-tls-cert", type=Path, help="certificate to show to model servers, PEM")
    add("--node-tls-key", type=Path, help="its key, PEM")
    add("--log-format", choices=("console", "json"), default="console")
    args = parser.parse_args(argv)
    positive = ("max_running", "max_pixels", "max_steps", "max_images", "max_control_image_bytes")
    for name in positive:
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} has to be at least 1, not {getattr(args, name)}")
    if args.namespace and not args.kube:
        parser.error("--namespace goes with --kube")
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
