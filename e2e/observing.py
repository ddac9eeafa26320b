"""Queries of the cluster's Prometheus server, through the API server's proxy."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

from support.apiserver import ApiServer

_PROXY = "/api/v1/namespaces/monitoring/services/prometheus:9090/proxy/api/v1"
_DEPLOYMENT = ("deployment/prometheus", "--namespace=monitoring")


class Prometheus:
    """The server that `e2e/prometheus.yaml` installs."""

    def __init__(self, cluster: ApiServer) -> None:
        self._cluster = cluster

    def ready(self) -> None:
        """Returns when the server is ready."""
        self._cluster.kubectl("rollout", "status", *_DEPLOYMENT, "--timeout=2m")

    def stop(self) -> None:
        """Stops the server; returns when its pod is gone."""
        self._cluster.kubectl("scale", "--replicas=0", *_DEPLOYMENT)
        self._cluster.kubectl(
            "wait", "--for=delete", "pod", "--selector=app=prometheus", _DEPLOYMENT[1], "--timeout=1m"
        )

    def start(self) -> None:
        """Starts the server again, with an empty database; returns when it is ready."""
        self._cluster.kubectl("scale", "--replicas=1", *_DEPLOYMENT)
        self.ready()

    def query(self, promql: str, label: str) -> dict[str, float]:
        """Current values, by the value of a label."""
        return {
            sample["metric"].get(label, ""): float(sample["value"][1])
            for sample in self._get("query", query=promql)["result"]
        }

    def series(self, promql: str, label: str, *, start: float, end: float) -> dict[str, list[tuple[float, float]]]:
        """One value a second: pairs of Unix time and value, by the value of a label."""
        found = self._get("query_range", query=promql, start=f"{start:.3f}", end=f"{end:.3f}", step="1")
        return {
            line["metric"].get(label, ""): [(float(at), float(value)) for at, value in line["values"]]
            for line in found["result"]
        }

    def _get(self, call: str, **parameters: str) -> Any:
        answer = json.loads(self._cluster.kubectl("get", "--raw", f"{_PROXY}/{call}?{urlencode(parameters)}"))
        assert answer["status"] == "success", answer
        return answer["data"]
