"""`--kube`: the route to a cluster's gateways, and the errors where there is none."""

from __future__ import annotations

from typing import Any

import pytest
from latentflow.cli import kube
from latentflow.errors import InvalidRequestError, LatentflowError, NotFoundError, UnavailableError
from typer.testing import CliRunner


def listing(*names: str, endpoint: str | None = "latentflow-gateway.flow.svc:8400") -> dict[str, Any]:
    status = {"endpoint": endpoint} if endpoint else {}
    return {"items": [{"metadata": {"name": name, "namespace": "art"}, "status": status} for name in names]}


def test_the_route_is_the_service_that_the_workflow_s_status_names() -> None:
    wanted = kube.Route(workflow="art/shapes", service="latentflow-gateway", namespace="flow", port=8400)
    assert kube.route(listing("shapes"), None) == wanted
    assert kube.route(listing("other", "shapes"), "shapes") == wanted


@pytest.mark.parametrize(
    ("found", "workflow", "error", "words"),
    [
        (listing(), None, NotFoundError, "no DiffusionWorkflow in this namespace"),
        (listing("a", "b"), None, InvalidRequestError, "choose one with --workflow: a, b"),
        (listing("a", "b"), "c", NotFoundError, "no DiffusionWorkflow 'c' in this namespace; it has a, b"),
        (listing("a", endpoint=None), None, UnavailableError, "Check that the operator runs"),
        (listing("a", endpoint="elsewhere:1"), None, UnavailableError, "has no endpoint"),
    ],
)
def test_a_missing_route_is_reported_with_its_cause(
    found: dict[str, Any], workflow: str | None, error: type[LatentflowError], words: str
) -> None:
    with pytest.raises(error, match=words):
        kube.route(found, workflow)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kube", "--target", "x:1"], "Use either --kube or --target"),
        (["--namespace", "art"], "--namespace needs --kube"),
        (["--kube"], "--kube needs kubectl"),
    ],
)
def test_options_that_exclude_each_other_or_need_a_missing_program_are_refused(
    options: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentflow.cli import app

    monkeypatch.setenv("PATH", "/nowhere")
    done = CliRunner().invoke(app, ["generate", "a red circle", *options])
    assert isinstance(done.exception, LatentflowError)
    assert words in done.exception.message
