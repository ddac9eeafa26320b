"""The parts of `e2e/kind.py` that need no Docker: kind's configuration, and access to a cluster by its kubeconfig."""

from __future__ import annotations

from pathlib import Path

import kind
from support.apiserver import ApiServer
from support.kubectl import new_namespace


def test_folders_of_this_machine_have_the_same_paths_in_the_node() -> None:
    (node,) = kind.configuration(Path("/clone/models"), Path("/tmp/run"))["nodes"]
    assert [(mount["hostPath"], mount["containerPath"]) for mount in node["extraMounts"]] == [
        ("/clone/models", "/clone/models"),
        ("/tmp/run", "/tmp/run"),
    ]


def test_a_kubeconfig_is_enough_to_administer_a_cluster(api_server: ApiServer, tmp_path: Path) -> None:
    server = kind.administered(tmp_path, api_server.kubeconfig)
    assert server.url == api_server.url
    assert server.token != api_server.token
    with new_namespace(server, "kind") as namespace:
        assert (
            server.kubectl("get", "namespace", namespace.name, "--output=name").strip() == f"namespace/{namespace.name}"
        )
