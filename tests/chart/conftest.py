from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kube.conftest import install_crds
from support.apiserver import ApiServer, running
from support.paths import ROOT


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A real API server with the definitions of the project, the Prometheus operator and the Gateway API."""
    command = [str(ROOT / "tools/build"), "definitions"]
    others = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    with running(tmp_path_factory.mktemp("api-server")) as server:
        install_crds(server)
        install_crds(server, Path(others))
        yield server
