from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import images
import kind
import node
import pytest
import yaml
from observing import Prometheus
from support.apiserver import ApiServer
from support.chart import CHART, helm
from support.kubectl import Namespace, new_namespace
from support.paths import ROOT

CLUSTER = os.environ.get("CLUSTER", "node")
CLUSTERS: dict[str, Callable[[Path], AbstractContextManager[ApiServer]]] = {
    "node": functools.partial(node.cluster, provide=images.provide),
    "kind": functools.partial(kind.cluster, provide=images.load),
}
# Marks tests that use the node's processes or its network.
on_a_node_of_ours = pytest.mark.skipif(
    CLUSTER != "node", reason=f"a cluster of {CLUSTER} hides its processes and network"
)
RELEASE_NAMESPACE = "latentflow"
VALUES: dict[str, Any] = {
    "images": {
        "control": {"repository": images.CONTROL.rpartition(":")[0], "tag": images.TAG, "pullPolicy": "Never"},
        "node": {"repository": images.NODE.rpartition(":")[0], "tag": images.TAG, "pullPolicy": "Never"},
    },
    "models": {
        "modelRoot": {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
        # Also the longest time of a request: a loaded machine takes minutes for a backlog.
        "drainSeconds": 300,
        # A request takes about a second here.
        "retireSeconds": 20,
    },
    "gateway": {"drainSeconds": 300},
    # Shorter than the defaults, so that a test lasts minutes.
    "scaling": {
        "prometheus": "http://prometheus.monitoring.svc:9090",
        "intervalSeconds": 2,
        "windowSeconds": 15,
        "upSeconds": 15,
        "downSeconds": 30,
    },
}
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A real cluster with DNS."""
    with CLUSTERS[CLUSTER](tmp_path_factory.mktemp("cluster")) as server:
        yield server


@pytest.fixture(scope="session")
def prometheus(cluster: ApiServer) -> Prometheus:
    """A Prometheus server in the cluster."""
    cluster.apply(list(yaml.safe_load_all((ROOT / "e2e/prometheus.yaml").read_text())))
    found = Prometheus(cluster)
    found.ready()
    return found


@pytest.fixture(scope="session")
def release(cluster: ApiServer, prometheus: Prometheus, tmp_path_factory: pytest.TempPathFactory) -> ApiServer:
    """The cluster with the chart installed in a namespace that enforces restricted Pod Security."""
    cluster.apply(
        [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": RELEASE_NAMESPACE, "labels": RESTRICTED}}]
    )
    values = tmp_path_factory.mktemp("release") / "values.yaml"
    values.write_text(yaml.safe_dump(VALUES))
    deploy(cluster, "install", f"--values={values}")
    return cluster


def deploy(cluster: ApiServer, verb: str, *options: str) -> None:
    """`helm install` or `helm upgrade` of the release; returns when its objects are ready."""
    target = [f"--kubeconfig={cluster.kubeconfig}", f"--namespace={RELEASE_NAMESPACE}"]
    done = helm(verb, "latentflow", str(CHART), *target, *options, "--wait", "--timeout=5m")
    assert done.returncode == 0, done.stdout + done.stderr + cluster.kubectl("get", "events", "-A")


def gateway_address(release: ApiServer) -> str:
    """host:port of the gateways' Service, reachable from the node."""
    service = ["get", "service", "latentflow-gateway", f"--namespace={RELEASE_NAMESPACE}"]
    return f"{release.kubectl(*service, '--output=jsonpath={.spec.clusterIP}')}:8400"


@pytest.fixture
def namespace(release: ApiServer) -> Iterator[Namespace]:
    """A namespace for workflows that enforces restricted Pod Security and has a claim with the repository's models."""
    with new_namespace(release, "art", labels=RESTRICTED) as namespace:
        models_claim(release, namespace)
        yield namespace


def models_claim(release: ApiServer, namespace: Namespace) -> None:
    """Creates a PersistentVolumeClaim of the namespace that holds the repository's models."""
    volume = f"models-{namespace.name}"
    spec = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
    size = {"storage": "1Gi"}
    release.apply(
        [
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": volume},
                "spec": spec | {"capacity": size, "hostPath": {"path": str(ROOT / "models")}},
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": "models", "namespace": namespace.name},
                "spec": spec | {"volumeName": volume, "resources": {"requests": size}},
            },
        ]
    )
