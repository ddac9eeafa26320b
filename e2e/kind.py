"""The test cluster on machines with Docker: one node, made by kind. It has never been run.

Unlike `node.py` it needs no root, and it has DNS and a default StorageClass. Tests cannot reach its processes, which run in
a container, nor its Services, which have no address on this machine.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from support.apiserver import ApiServer
from support.paths import ROOT

NAME = "latentflow-e2e"
_NEEDED = ("docker", "kind", "kubectl", "helm")


@contextlib.contextmanager
def cluster(folder: Path, *, provide: Callable[[str], None]) -> Iterator[ApiServer]:
    """One node, Ready when entered and deleted when left. An existing cluster of that name is deleted first.

    Args:
        provide: Loads the images into the cluster; called with its name.
    """
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        sys.exit(f"Not installed: {', '.join(missing)}.")
    config, kubeconfig = folder / "kind.yaml", folder / "kubeconfig.yaml"
    # Tests mount their own folders, which are beside this one, into pods.
    config.write_text(yaml.safe_dump(configuration(ROOT / "models", folder.parent)))
    place = [f"--name={NAME}", f"--kubeconfig={kubeconfig}"]
    _run("kind", "delete", "cluster", *place)
    try:
        _run("kind", "create", "cluster", *place, f"--config={config}", "--wait=3m")
        provide(NAME)
        yield administered(folder, kubeconfig)
    finally:
        _run("kind", "delete", "cluster", *place)


def configuration(*folders: Path) -> dict[str, Any]:
    """The configuration of one node that mounts folders of this machine at the same paths: pure."""
    mounts = [{"hostPath": str(folder), "containerPath": str(folder)} for folder in folders]
    nodes = [{"role": "control-plane", "extraMounts": mounts}]
    return {"kind": "Cluster", "apiVersion": "kind.x-k8s.io/v1alpha4", "nodes": nodes}


def administered(folder: Path, kubeconfig: Path) -> ApiServer:
    """The API server of a kubeconfig, with the token of an administrator account that is created for it."""
    server = ApiServer(url="", folder=folder, kubeconfig=kubeconfig)
    view = server.kubectl("config", "view", "--raw", "--flatten", "--minify", "--output=json")
    found = json.loads(view)["clusters"][0]["cluster"]
    (folder / "ca.pem").write_bytes(base64.b64decode(found["certificate-authority-data"]))
    place, account = "--namespace=kube-system", f"--serviceaccount=kube-system:{NAME}"
    server.kubectl("create", "serviceaccount", NAME, place)
    server.kubectl("create", "clusterrolebinding", NAME, "--clusterrole=cluster-admin", account)
    token = server.kubectl("create", "token", NAME, place, "--duration=8h").strip()
    return dataclasses.replace(server, url=found["server"], token=token)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
