"""What the operator is told at its start: a YAML file, which the chart writes, and the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentflow.api.types import Typed
from latentflow.errors import InvalidRequestError
from latentflow_scheduler import policy
from pydantic import Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


class ScalingSettings(Typed):
    """What the scheduler reads, how often, and how it turns a load into replicas."""

    prometheus: str = Field(pattern="^https?://[^ ]+[^/ ]$", description="URL of the Prometheus server.")
    gateways: str | None = Field(
        default=None,
        pattern=r"^.+:\d+$",
        description="host:port of the gateways' /metrics, a name with the address of each; absent: what they hold is known "
        "from Prometheus only.",
    )
    interval_seconds: float = Field(default=10.0, gt=0, description="Between two decisions.")
    window_seconds: int = Field(
        default=60, ge=1, description="Over which rates are taken; at least four scrape intervals."
    )
    target_utilization: float = Field(
        default=policy.Settings.target_utilization,
        gt=0,
        le=1,
        description="Share of its time that a replica should compute.",
    )
    backlog_seconds: float = Field(
        default=policy.Settings.backlog_seconds, gt=0, description="In which those that wait should be worked off."
    )
    up_seconds: float = Field(
        default=policy.Settings.up_seconds, ge=0, description="Least time between two additions of replicas."
    )
    down_seconds: float = Field(
        default=policy.Settings.down_seconds, ge=0, description="For how long fewer replicas have to do before some go."
    )
    idle_seconds: float = Field(
        default=policy.Settings.idle_seconds,
        ge=0,
        description="For how long nobody has asked before a model with minReplicas 0 has none.",
    )

    def policy(self) -> policy.Settings:
        """What of it the policy takes."""
        return policy.Settings(
            target_utilization=self.target_utilization,
            backlog_seconds=self.backlog_seconds,
            up_seconds=self.up_seconds,
            down_seconds=self.down_seconds,
            idle_seconds=self.idle_seconds,
        )


class OperatorSettings(Typed):
    """How the pods are to look that the operator makes."""

    node_image: str = Field(min_length=1, description="Image of the model servers.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="As Container.imagePullPolicy."
    )
    model_root: dict[str, Any] | None = Field(
        default=None,
        description="A volume source, as in PodSpec.volumes without the name, that holds what relative URIs name; mounted "
        "read-only at /models. Absent: relative URIs cannot be served.",
    )
    cache: dict[str, Any] = Field(
        default_factory=lambda: {"emptyDir": {}}, description="A volume source for what is downloaded."
    )
    token_secret: str | None = Field(
        default=None, description="The Secret whose key `token` is the servers' shared secret."
    )
    hub_secret: str | None = Field(
        default=None, description="The Secret whose key `token` opens gated hf:// repositories."
    )
    hub_endpoint: str | None = Field(
        default=None, pattern="^https?://[^ ]+[^/ ]$", description="URL of a mirror of the hub; absent: the public one."
    )
    s3_secret: str | None = Field(
        default=None, description="The Secret whose keys are the AWS_* environment of servers with s3:// sources."
    )
    endpoint: str | None = Field(
        default=None, description="host:port of the gateways in the cluster, told in a workflow's status."
    )
    drain_seconds: int = Field(
        default=600,
        ge=0,
        le=86_400,
        description="How long a server that is told to stop may finish its requests: the longest request allowed.",
    )
    retire_seconds: int | None = Field(
        default=None,
        ge=0,
        le=86_400,
        description="How long a model that was changed away from stays, for requests that have begun with it; absent: as "
        "drainSeconds.",
    )
    scaling: ScalingSettings | None = Field(
        default=None, description="Scaling from Prometheus. Absent: nothing is scaled by itself."
    )


@dataclass(frozen=True, kw_only=True)
class Command:
    """The operator's command line.

    Attributes:
        namespaces: Where to work; empty: in all.
        liveness: Where to answer liveness probes, as an http:// URL; None: nowhere.
        metrics: host:port for /metrics; None: nowhere.
        lease: Namespace and name of the Lease to hold while writing; None: no other operator works there.
    """

    settings: OperatorSettings
    namespaces: tuple[str, ...]
    liveness: str | None
    lease: tuple[str, str] | None
    metrics: str | None
    log_format: Literal["console", "json"]


def parse(argv: list[str] | None = None) -> Command:
    """Settings from a command line; exits with a usage message on nonsense. InvalidRequestError for a bad file."""
    parser = argparse.ArgumentParser(
        prog="latentflow-operator",
        description="Turns DiffusionWorkflows into model servers, in the cluster it runs in or that the kubeconfig names.",
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, help="YAML file: how the model servers' pods are to look")
    add(
        "--namespace", action="append", default=[], help="a namespace to work in; several times for more (default: all)"
    )
    add("--liveness", help="answer liveness probes at this URL, such as http://0.0.0.0:8080/healthz")
    add("--metrics", help="host:port for /metrics (default: nowhere)")
    add(
        "--lease",
        type=_place,
        metavar="NAMESPACE/NAME",
        help="the Lease to hold while writing, so that of several operators one works (default: none, there is one)",
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


def _place(text: str) -> tuple[str, str]:
    namespace, slash, name = text.partition("/")
    if not (namespace and slash and name) or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAMESPACE/NAME")
    return namespace, name


def read(path: Path) -> OperatorSettings:
    """Settings from a YAML file. InvalidRequestError, with the field's name, for one that is missing or wrong."""
    try:
        data = YAML(typ="safe").load(path.read_text())
    except OSError as error:
        raise InvalidRequestError(f"The configuration {path} cannot be read: {error.strerror}.") from None
    except YAMLError as error:
        raise InvalidRequestError(f"The configuration {path} is no YAML: {error}") from None
    try:
        return OperatorSettings.model_validate(data)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors())
        raise InvalidRequestError(f"The configuration {path} is wrong: {said}.") from None
