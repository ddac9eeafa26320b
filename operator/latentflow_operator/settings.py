"""The operator's settings: a YAML file, which the chart writes, and the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentflow.api.types import Typed
from latentflow.errors import InvalidRequestError
from latentflow.internal import hosts
from latentflow_scheduler import policy
from pydantic import Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


class ScalingSettings(Typed):
    """Settings of the scheduler: its sources of signals, its interval, and the parameters of its policy."""

    prometheus: str = Field(pattern="^https?://[^ ]+[^/ ]$", description="URL of the Prometheus server.")
    gateways: str | None = Field(
        default=None,
        pattern=r"^.+:\d+$",
        description="host:port of the gateways' /metrics; the name resolves to every gateway. Absent: held requests are "
        "read from Prometheus only.",
    )
    interval_seconds: float = Field(default=10.0, gt=0, description="Time between two decisions.")
    window_seconds: int = Field(
        default=60, ge=1, description="Time over which rates are computed; at least four scrape intervals."
    )
    target_utilization: float = Field(
        default=policy.Settings.target_utilization,
        gt=0,
        le=1,
        description="Share of its time that a replica should compute.",
    )
    backlog_seconds: float = Field(
        default=policy.Settings.backlog_seconds, gt=0, description="Time in which queued requests should be completed."
    )
    up_seconds: float = Field(
        default=policy.Settings.up_seconds, ge=0, description="Minimum time between two additions of replicas."
    )
    down_seconds: float = Field(
        default=policy.Settings.down_seconds,
        ge=0,
        description="How long fewer replicas have to be enough before some are removed.",
    )
    idle_seconds: float = Field(
        default=policy.Settings.idle_seconds,
        ge=0,
        description="How long a model with minReplicas 0 has to be idle before its last replica is removed.",
    )

    def policy(self) -> policy.Settings:
        """The parameters of the policy."""
        return policy.Settings(
            target_utilization=self.target_utilization,
            backlog_seconds=self.backlog_seconds,
            up_seconds=self.up_seconds,
            down_seconds=self.down_seconds,
            idle_seconds=self.idle_seconds,
        )


class OperatorSettings(Typed):
    """Settings of the operator, mostly of the pods that it creates."""

    node_image: str = Field(min_length=1, description="Image of the model servers.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="As Container.imagePullPolicy."
    )
    model_root: dict[str, Any] | None = Field(
        default=None,
        description="A volume source, as in PodSpec.volumes without the name, with the weights of relative URIs; mounted "
        "read-only at /models. Absent: relative URIs cannot be served.",
    )
    cache: dict[str, Any] = Field(
        default_factory=lambda: {"emptyDir": {}}, description="A volume source for downloaded weights."
    )
    token_secret: str | None = Field(
        default=None, description="The Secret whose key `token` is the shared token of the servers."
    )
    hub_secret: str | None = Field(
        default=None, description="The Secret whose key `token` grants access to private and gated hf:// repositories."
    )
    hub_endpoint: str | None = Field(
        default=None, pattern="^https?://[^ ]+[^/ ]$", description="URL of a mirror of the hub; absent: the public hub."
    )
    s3_secret: str | None = Field(
        default=None, description="The Secret whose keys are the AWS_* environment of servers with s3:// sources."
    )
    endpoint: str | None = Field(
        default=None, description="host:port of the gateways in the cluster, for the status of workflows."
    )
    drain_seconds: int = Field(
        default=600,
        ge=0,
        le=86_400,
        description="How long a server that is terminated may complete its requests: the longest request allowed.",
    )
    retire_seconds: int | None = Field(
        default=None,
        ge=0,
        le=86_400,
        description="How long a model that was replaced is kept for requests that began with it; absent: drainSeconds.",
    )
    scaling: ScalingSettings | None = Field(
        default=None, description="Scaling by the load in Prometheus. Absent: no model is scaled automatically."
    )


@dataclass(frozen=True, kw_only=True)
class Command:
    """The operator's command line.

    Attributes:
        namespaces: The namespaces to watch; empty: all.
        liveness: host:port of /healthz, for liveness probes; None: not served.
        metrics: host:port of /metrics; None: not served.
        lease: Namespace and name of the Lease to hold while writing; None: no other operator may run.
    """

    settings: OperatorSettings
    namespaces: tuple[str, ...]
    liveness: str | None
    lease: tuple[str, str] | None
    metrics: str | None
    log_format: Literal["console", "json"]


def parse(argv: list[str] | None = None) -> Command:
    """Parses a command line. Exits with a usage message if it is invalid; InvalidRequestError for an invalid file."""
    parser = argparse.ArgumentParser(
        prog="latentflow-operator",
        description="Runs the model servers of DiffusionWorkflows, in the cluster of this pod or in that of the kubeconfig.",
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, help="YAML file with the settings")
    add("--namespace", action="append", default=[], help="a namespace to watch; repeat for more (default: all)")
    add("--liveness", type=_address, help="host:port of /healthz, for liveness probes (default: not served)")
    add("--metrics", help="host:port of /metrics (default: not served)")
    add(
        "--lease",
        type=_key,
        metavar="NAMESPACE/NAME",
        help="the Lease to hold while writing, so that only one of several operators writes (default: none, for a single operator)",
    )
    add("--log-format", choices=("console", "json"), default="console")
    args = parser.parse_args(argv)
    return Command(
        settings=read(args.config),
        namespaces=tuple(args.namespace),
        liveness=args.liveness,
        lease=args.lease,
        metrics=args.metrics,
        log_format=args.log_format,
    )


def _address(text: str) -> str:
    try:
        # Kubernetes gives the address of an IPv6 pod without brackets.
        return hosts.join(*hosts.split(text))
    except InvalidRequestError as error:
        raise argparse.ArgumentTypeError(error.message) from None


def _key(text: str) -> tuple[str, str]:
    namespace, slash, name = text.partition("/")
    if not (namespace and slash and name) or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAMESPACE/NAME")
    return namespace, name


def read(path: Path) -> OperatorSettings:
    """Reads settings from a YAML file.

    InvalidRequestError, with the field's name, if the file is missing or invalid.
    """
    try:
        data = YAML(typ="safe").load(path.read_text())
    except OSError as error:
        raise InvalidRequestError(f"The configuration {path} cannot be read: {error.strerror}.") from None
    except YAMLError as error:
        raise InvalidRequestError(f"The configuration {path} is not valid YAML: {error}") from None
    try:
        return OperatorSettings.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors())
        raise InvalidRequestError(f"The configuration {path} is invalid: {problems}.") from None
