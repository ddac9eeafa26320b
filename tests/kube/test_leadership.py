"""Of several operators one writes; another takes over when it stops, is killed, or cannot renew its lease."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from kube.simulated_kubelet import KINDS, workflow
from latentflow_operator import leadership
from support.apiserver import ApiServer
from support.chart import install_accounts
from support.kubectl import Body, Namespace, new_namespace
from support.operating import Operator

LEASE = "latentflow-operator"


@pytest.fixture
def namespace(api_server: ApiServer) -> Iterator[Namespace]:
    with new_namespace(api_server, "leadership") as created:
        yield created


@pytest.fixture
def operators(api_server: ApiServer, namespace: Namespace, tmp_path: Path) -> Iterator[tuple[Operator, Operator]]:
    """Two operators for one namespace: the first has reconciled a workflow, the second has started after it."""
    install_accounts(api_server, namespace.name, f"--set=namespaces={{{namespace.name}}}")
    kubeconfig = api_server.kubeconfig_of(namespace.name, "latentflow-operator")
    options = (f"--namespace={namespace.name}", f"--lease={namespace.name}/{LEASE}")
    first, second = (Operator(kubeconfig, tmp_path / name, *options) for name in ("first", "second"))
    first.start()
    namespace.create(workflow())
    namespace.until("PodDisruptionBudget", lambda found: len(found) == 4)
    second.start()
    yield first, second
    for operator in (first, second):
        operator.stop(signal.SIGKILL)


def holder(namespace: Namespace) -> str:
    found = namespace.until("Lease", lambda found: bool(found.get(LEASE, {}).get("spec", {}).get("holderIdentity")))
    return str(found[LEASE]["spec"]["holderIdentity"])


def takeover(namespace: Namespace, before: str) -> Body:
    """Returns the lease once another operator holds it and has reconciled a second workflow."""
    found = namespace.until("Lease", lambda found: found[LEASE]["spec"].get("holderIdentity") not in (None, "", before))
    namespace.create(workflow("second", source={"uri": "other"}))
    for kind in KINDS:
        namespace.until(kind, lambda found: len(found) == 5)
    return found[LEASE]


def test_while_one_operator_holds_the_lease_another_only_watches(
    operators: tuple[Operator, Operator], namespace: Namespace, api_server: ApiServer
) -> None:
    operators[1].wait_for_log("another operator holds the lease")
    namespace.create(workflow("second", source={"uri": "other"}))
    namespace.until("PodDisruptionBudget", lambda found: len(found) == 5)
    # A later write of the same operator, so that the audit log contains all earlier ones.
    namespace.create(workflow("third", source={"uri": "third"}))
    namespace.until("PodDisruptionBudget", lambda found: len(found) == 6)
    made = Counter(
        write[2:]
        for write in api_server.writes("latentflow-operator")
        if write[1] == namespace.name and write[2] in ("deployments", "services", "poddisruptionbudgets")
    )
    assert len(made) >= 15
    assert set(made.values()) == {1}


def test_an_operator_that_stops_releases_the_lease_at_once(
    operators: tuple[Operator, Operator], namespace: Namespace
) -> None:
    operators[1].wait_for_log("another operator holds the lease")
    before = holder(namespace)
    assert operators[0].stop() == 0
    # It has released the lease: the next operator does not wait until it expires.
    assert namespace.list("Lease")[LEASE]["spec"].get("holderIdentity") != before
    takeover(namespace, before)


def test_another_operator_takes_over_when_the_lease_of_a_killed_one_expires(
    operators: tuple[Operator, Operator], namespace: Namespace
) -> None:
    operators[1].wait_for_log("another operator holds the lease")
    before = holder(namespace)
    operators[0].stop(signal.SIGKILL)
    renewed = datetime.fromisoformat(namespace.list("Lease")[LEASE]["spec"]["renewTime"])
    acquired = datetime.fromisoformat(takeover(namespace, before)["spec"]["acquireTime"])
    assert (acquired - renewed).total_seconds() >= leadership.DURATION_SECONDS


def test_an_operator_that_lost_its_lease_ends_with_a_message(
    operators: tuple[Operator, Operator], namespace: Namespace
) -> None:
    operators[1].stop(signal.SIGKILL)
    holder(namespace)
    namespace.patch("Lease", LEASE, {"spec": {"holderIdentity": "somebody-else", "leaseDurationSeconds": 3600}})
    assert operators[0].wait(leadership.RENEW_SECONDS + 20) == 1
    assert "could not be renewed" in operators[0].log.read_text()


@pytest.mark.parametrize("lease", ["latentflow-operator", "a/b/c", "/b", "a/"])
def test_a_lease_that_is_not_namespace_and_name_is_refused_at_start_up(
    lease: str, api_server: ApiServer, tmp_path: Path
) -> None:
    operator = Operator(api_server.kubeconfig, tmp_path, f"--lease={lease}")
    operator.start()
    assert operator.wait(30) == 2
    assert f"'{lease}' is not NAMESPACE/NAME" in operator.log.read_text()
