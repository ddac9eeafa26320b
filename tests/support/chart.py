"""The Helm chart, rendered by helm; `python -m support.chart` writes the golden files."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from support.apiserver import ApiServer
from support.paths import ROOT

CHART = ROOT / "charts/latentflow"
CASES = ROOT / "tests/chart/values"
GOLDEN = ROOT / "tests/chart/golden"
RELEASE = "latentflow"
_ACCOUNTS = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")


def helm(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Runs a helm command; returns the finished process."""
    return subprocess.run(["helm", *arguments], capture_output=True, text=True, check=False, **settings)


def template(*options: str, namespace: str = RELEASE) -> str:
    """The chart, rendered as YAML. AssertionError with helm's message where helm fails."""
    done = helm("template", RELEASE, str(CHART), f"--namespace={namespace}", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(*options: str, namespace: str = RELEASE) -> list[dict[str, Any]]:
    """The objects of the rendered chart."""
    return [body for body in yaml.safe_load_all(template(*options, namespace=namespace)) if body]


def install_accounts(server: ApiServer, namespace: str, *options: str) -> None:
    """Creates the chart's ServiceAccounts with their permissions in an existing namespace."""
    server.apply([body for body in objects(*options, namespace=namespace) if body["kind"] in _ACCOUNTS])


def cases() -> list[Path]:
    """The files of values that have a golden file."""
    return sorted(CASES.glob("*.yaml"))


def golden(case: Path) -> str:
    """The content of the golden file of a case, without the CustomResourceDefinitions, which another test compares."""
    return template(f"--values={case}", "--set=crds.install=false")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case in cases():
        (GOLDEN / case.name).write_text(golden(case))
