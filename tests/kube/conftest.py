from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from kubernetes import client as kube
from support.apiserver import ApiServer, running
from support.chart import install_accounts
from support.kubectl import Namespace, new_namespace
from support.operating import Operator
from support.paths import ROOT


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A real API server with the project's CustomResourceDefinitions."""
    with running(tmp_path_factory.mktemp("api-server")) as server:
        install_crds(server)
        yield server


@pytest.fixture(scope="session")
def accounts(api_server: ApiServer) -> Iterator[dict[str, Path]]:
    """Kubeconfigs of the chart's ServiceAccounts "operator" and "gateway", with the permissions of its RBAC."""
    with new_namespace(api_server, "accounts") as namespace:
        install_accounts(api_server, namespace.name)
        yield {
            component: api_server.kubeconfig_of(namespace.name, f"latentflow-{component}")
            for component in ("operator", "gateway")
        }


@pytest.fixture(scope="module")
def controllers(api_server: ApiServer) -> Iterator[None]:
    with api_server.controller_manager():
        yield


@pytest.fixture(scope="module")
def operator(
    accounts: dict[str, Path], controllers: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operator]:
    process = Operator(accounts["operator"], tmp_path_factory.mktemp("operator"))
    process.start()
    yield process
    process.stop()


@pytest.fixture
def namespace(api_server: ApiServer, request: pytest.FixtureRequest) -> Iterator[Namespace]:
    with new_namespace(api_server, request.node.originalname) as created:
        yield created


@pytest.fixture
def elsewhere(api_server: ApiServer) -> Iterator[Namespace]:
    with new_namespace(api_server, "elsewhere") as created:
        yield created


def install_crds(server: ApiServer, folder: Path = ROOT / "crds") -> None:
    """Installs the definitions of a folder and waits until all are served."""
    extensions = kube.ApiextensionsV1Api(server.client())
    names = []
    for path in sorted(folder.glob("*.yaml")):
        definition = yaml.safe_load(path.read_text())
        extensions.create_custom_resource_definition(definition)
        names.append(definition["metadata"]["name"])
    for name in names:
        wait_established(extensions, name)


def wait_established(extensions: kube.ApiextensionsV1Api, name: str) -> None:
    """Waits until a definition is established."""
    from kubernetes import watch

    for event in watch.Watch().stream(
        extensions.list_custom_resource_definition, field_selector=f"metadata.name={name}", timeout_seconds=60
    ):
        conditions = event["object"].status.conditions or []
        if any(c.type == "Established" and c.status == "True" for c in conditions):
            return
    raise AssertionError(f"{name} was not established within a minute")
