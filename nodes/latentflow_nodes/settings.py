"""The settings of a model server: read from the command line, frozen afterwards."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from latentflow.api.types import Engine, Net, Role, problems
from latentflow.internal import rpc
from pydantic import TypeAdapter, ValidationError

_CACHE = Path(os.path.expanduser("~/.cache/latentflow"))
_NETS = TypeAdapter(tuple[Net, ...])


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """Settings of one server.

    Attributes:
        role: The role to load and serve.
        uri, subfolder, revision, variant: The model's source.
        nets: Further nets of a ControlNet.
        model_root: The folder against which relative URIs resolve.
        cache: Where downloads from buckets are kept.
        identity: The model's identity, for logs and `Describe`.
        listen: host:port to serve gRPC on; port 0 lets the system choose.
        advertise: host:port that peers reach this server by; None: `listen`.
        metrics: host:port for /metrics.
        dtype: "float32", "float16" or "bfloat16".
        engine: How the model is run.
        tensor: Number of ranks among which the weights of a Denoiser are divided.
        lease: Lifetime of a handle in seconds, unless it is renewed.
        drain: Seconds that running requests may take after SIGTERM.
        compute_lock: Lock file; servers of one machine that name the same one compute one after the other. None: no lock.
        shared_memory: A folder on a tmpfs through which the servers that name it exchange tensors; None: they use gRPC.
        token: Shared secret of the servers; None: no secret is required.
    """

    role: Literal["TextEncoder", "Denoiser", "ControlNet", "LoRAStore", "VAE"]
    uri: str
    subfolder: str | None = None
    revision: str | None = None
    variant: str | None = None
    nets: tuple[Net, ...] = ()
    model_root: Path = Path("models")
    cache: Path = _CACHE
    identity: str = ""
    listen: str = "127.0.0.1:0"
    advertise: str | None = None
    metrics: str = "127.0.0.1:0"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    engine: Engine = field(default_factory=Engine)
    tensor: int = 1
    lease: float = 60.0
    drain: float = 30.0
    compute_lock: Path | None = None
    shared_memory: Path | None = None
    token: str | None = None
    tls: rpc.Tls | None = None
    log_format: Literal["console", "json"] = "console"

    @property
    def threads(self) -> int:
        """CPU threads of one forward pass, in each of its ranks."""
        return max(1, (self.engine.threads or usable_cores()) // self.tensor)

    @property
    def devices(self) -> tuple[str, ...]:
        """The device of each rank: the CPU, or consecutive GPUs from the engine's device on."""
        kind, _, first = self.engine.device.partition(":")
        if self.tensor == 1 or kind == "cpu":
            return (self.engine.device,) * self.tensor
        return tuple(f"{kind}:{int(first or 0) + rank}" for rank in range(self.tensor))


def usable_cores() -> int:
    """Cores this process may use: the cgroup's CPU limit, rounded up, or the affinity mask, whichever is less."""
    cores = len(os.sched_getaffinity(0))
    limit = _cgroup_limit()
    return cores if limit is None else max(1, min(cores, math.ceil(limit)))


def parse(argv: list[str] | None = None) -> NodeSettings:
    """Settings from a command line and the environment; exits with a usage message where they are invalid."""
    parser = argparse.ArgumentParser(
        prog="latentflow-node",
        description="Serves one model of a workflow over gRPC.",
        epilog="The servers' shared secret is read from the environment variable LATENTFLOW_TOKEN.",
    )
    add = parser.add_argument
    add("--role", required=True, choices=[role.value for role in Role], help="role of the model")
    add(
        "--uri",
        required=True,
        help="the source: a folder under the model root, file:///abs, hf://org/repo or s3://bucket/path",
    )
    add("--subfolder", help="one component of the source")
    add("--revision", help="revision of an hf:// source")
    add("--variant", help="variant of the weight files, such as fp16")
    add(
        "--nets",
        type=_nets,
        default=(),
        metavar="JSON",
        help='further nets of a ControlNet: a list as "nets" has in a workflow, such as \'[{"name": "depth", "source": '
        '{"uri": "depth"}}]\' (default: none)',
    )
    add(
        "--model-root",
        type=Path,
        default=Path("models"),
        help="folder against which relative URIs resolve (default: models)",
    )
    add(
        "--cache",
        type=Path,
        default=_CACHE,
        help="folder of downloads from buckets (default: ~/.cache/latentflow); HF_HOME sets the folder of downloads from hubs",
    )
    add("--identity", default="", help="identity of the model, for logs and Describe")
    add("--listen", default="127.0.0.1:0", help="host:port for gRPC (default: a free port of this host)")
    add("--advertise", help="host:port by which peers reach this server (default: as --listen)")
    add("--metrics", default="127.0.0.1:0", help="host:port for /metrics (default: a free port)")
    add(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="element type (default: float32)"
    )
    add(
        "--engine",
        type=_engine,
        default=Engine(),
        metavar="JSON",
        help='how the model is run: an object of the options that "engine" has in a workflow, such as '
        '\'{"device": "cuda"}\' (default: every option\'s default)',
    )
    add(
        "--tensor",
        type=int,
        default=1,
        metavar="RANKS",
        help="number of processes, each on a device of its own, among which the weights of a Denoiser are divided (default: 1)",
    )
    add("--lease", type=float, default=60.0, help="lifetime of a handle in seconds unless it is renewed (default: 60)")
    add("--drain", type=float, default=30.0, help="seconds that running requests may take after SIGTERM (default: 30)")
    add(
        "--compute-lock",
        type=Path,
        metavar="FILE",
        help="servers of one machine that name the same file compute one after the other",
    )
    add(
        "--shared-memory",
        type=Path,
        metavar="FOLDER",
        help="folder on a tmpfs through which the servers that name it exchange tensors (default: none)",
    )
    add("--tls-cert", type=Path, help="certificate, PEM")
    add("--tls-key", type=Path, help="its key, PEM")
    add("--tls-ca", type=Path, help="CA of peers' certificates, PEM; makes TLS mutual")
    add("--log-format", choices=("console", "json"), default="console")
    args = parser.parse_args(argv)
    for name, least in (("lease", 1.0), ("drain", 0.0)):
        if not getattr(args, name) >= least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    try:
        args.engine.check(Role(args.role))
    except ValueError as error:
        parser.error(f"--engine: {error}")
    if not 1 <= args.tensor <= 16:
        parser.error(f"--tensor must be from 1 to 16, not {args.tensor}")
    if args.tensor > 1 and args.role != Role.DENOISER:
        parser.error(f"--tensor is an option of Denoiser, not of {args.role}")
    if args.nets and args.role != Role.CONTROL_NET:
        parser.error(f"--nets: only a ControlNet has nets, a {args.role} has none")
    if args.variant and args.role == Role.LORA_STORE:
        parser.error("--variant: the files of a LoRAStore have no variants")
    tls = None
    if args.tls_cert or args.tls_key or args.tls_ca:
        if not (args.tls_cert and args.tls_key):
            parser.error("TLS needs both --tls-cert and --tls-key")
        tls = rpc.Tls(ca=args.tls_ca, certificate=args.tls_cert, key=args.tls_key)
    plain = {k: v for k, v in vars(args).items() if not k.startswith("tls_")}
    return NodeSettings(**plain, tls=tls, token=os.environ.get("LATENTFLOW_TOKEN") or None)


def _engine(text: str) -> Engine:
    try:
        return Engine.model_validate_json(text, by_alias=True, by_name=False)
    except ValidationError as error:
        raise argparse.ArgumentTypeError(problems(error)) from None


def _nets(text: str) -> tuple[Net, ...]:
    try:
        return _NETS.validate_json(text, by_alias=True, by_name=False)
    except ValidationError as error:
        raise argparse.ArgumentTypeError(problems(error)) from None


def _cgroup_limit() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text())
        period_us = int(Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text())
        return None if quota_us <= 0 else quota_us / period_us
    except (OSError, ValueError):
        return None
