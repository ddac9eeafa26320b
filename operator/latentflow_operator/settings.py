"""What the operator is told at its start: how the pods it makes are to look."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class OperatorSettings:
    """Settings of the operator.

    Attributes:
        node_image: Image of the model servers.
        pull_policy: As Container.imagePullPolicy.
        model_root: A volume source (as in PodSpec.volumes, without the name) that holds what relative URIs name; mounted
            read-only at /models. None: relative URIs cannot be served.
        cache: A volume source for what is downloaded; None: a volume of the pod's own.
        token_secret: Name of the Secret whose key `token` is the servers' shared secret; None: none.
        hub_secret: Name of the Secret whose key `token` opens gated hf:// repositories; None: none.
        endpoint: host:port of the gateways in the cluster, told in a workflow's status; None: not told.
        drain_seconds: How long a server that is told to stop may finish its requests: the longest request allowed.
    """

    node_image: str
    pull_policy: str = "IfNotPresent"
    model_root: dict[str, Any] | None = None
    cache: dict[str, Any] = field(default_factory=lambda: {"emptyDir": {}})
    token_secret: str | None = None
    hub_secret: str | None = None
    endpoint: str | None = None
    drain_seconds: int = 600
