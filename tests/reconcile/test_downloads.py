"""Whose download progress the operator reads, and how it reports it."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st
from latentflow.api.status import ConditionType
from latentflow.internal import sizes
from latentflow.internal.metrics import NODE, Instruments
from latentflow_operator.conditions import of_model
from latentflow_operator.container_failures import Failure
from latentflow_operator.downloads import Downloads, Progress, downloading_hosts, message
from latentflow_operator.objects import ObjectKey, Pod, conditions_of, parse
from latentflow_operator.store import Store

GIB = 1 << 30


def pod(name: str = "a", *, ip: str | None = "10.0.0.1", phase: str = "Running", ready: bool = False) -> dict[str, Any]:
    status: dict[str, Any] = {"phase": phase, "conditions": [{"type": "Ready", "status": "True" if ready else "False"}]}
    labels = {"latentflow.io/model": "vae-1"}
    metadata = {"namespace": "ns", "name": name, "uid": name, "resourceVersion": "1", "labels": labels}
    return {"kind": "Pod", "metadata": metadata, "status": status | ({"podIP": ip} if ip else {})}


def parsed(bodies: list[dict[str, Any]]) -> list[Pod]:
    return [one for body in bodies if isinstance(one := parse(body), Pod)]


def model(uri: str) -> dict[str, Any]:
    metadata = {"namespace": "ns", "name": "vae-1", "uid": "m", "resourceVersion": "1"}
    return {"kind": "DiffusionModel", "metadata": metadata, "spec": {"role": "VAE", "source": {"uri": uri}}}


@pytest.mark.parametrize(
    ("uri", "pods", "addresses"),
    [
        ("hf://org/repo", [pod()], ["10.0.0.1"]),
        ("s3://bucket/x", [pod(), pod("b", ip="10.0.0.2")], ["10.0.0.1", "10.0.0.2"]),
        ("hf://org/repo", [pod(), pod("b", ip="10.0.0.2", ready=True)], []),
        ("hf://org/repo", [pod(ip=None), pod("b", phase="Pending")], []),
        ("hf://org/repo", [], []),
        ("pvc://claim/x", [pod()], []),
        ("shapes", [pod()], []),
    ],
)
def test_only_servers_that_may_be_downloading_are_read(uri: str, pods: list[Any], addresses: list[str]) -> None:
    assert downloading_hosts(["shapes", uri], parsed(pods)) == addresses


@pytest.mark.parametrize(
    ("done", "total", "words"),
    [
        (1.2 * GIB, 6.9 * GIB, "1.2 of 6.9 GiB"),
        (0, 300 << 20, "0 of 300 MiB"),
        (1024, 4096, "1 of 4 KiB"),
        (0, 10, "0 of 10 bytes"),
    ],
)
def test_sizes_are_reported_in_the_unit_of_the_total(done: float, total: float, words: str) -> None:
    assert sizes.progress(done, total) == words


counts = st.integers(min_value=0, max_value=10 * GIB)


@given(st.lists(st.builds(Progress, done=counts, total=counts), max_size=4))
def test_the_progress_of_the_server_that_is_furthest_and_unfinished_is_reported(progress: list[Progress]) -> None:
    unfinished = [one for one in progress if one.done < one.total]
    text = message(progress)
    assert (text is None) == (not unfinished)
    if text is not None:
        first = max(unfinished, key=lambda one: one.done / one.total)
        assert text == f"A server downloads the weights: {sizes.progress(first.done, first.total)}."


@pytest.mark.parametrize(
    ("wanted", "pods", "unresolved", "reason"),
    [
        (1, [pod()], None, "Downloading"),
        (1, [pod(ready=True)], None, "ReplicasReady"),
        (0, [], None, "ScaledToZero"),
        (1, [], Failure(condition=ConditionType.WEIGHTS_AVAILABLE, reason="CannotLoad", message="No."), "CannotLoad"),
    ],
)
def test_a_download_is_reported_only_if_no_other_reason_applies(
    wanted: int, pods: list[Any], unresolved: Failure | None, reason: str
) -> None:
    statements = of_model(
        wanted=wanted,
        deployment=None,
        pods=parsed(pods),
        is_own=lambda container: True,
        previous={},
        lacks_signals=False,
        can_wake=True,
        unresolved=unresolved,
        downloading="1 of 2 GiB.",
    )
    found = {one.type: one for one in statements}
    assert found[ConditionType.READY].reason == reason
    reported = {one.reason for one in statements if one.message == "1 of 2 GiB."}
    assert reported == ({"Downloading"} if reason == "Downloading" else set())


async def test_a_change_is_reported_once_and_a_failed_read_changes_nothing() -> None:
    store, changed, node = Store(), list[ObjectKey](), Instruments(NODE, model="vae-1", role="VAE")
    port = node.serve(host="127.0.0.1", port=0)
    downloads = Downloads(store=store, on_change=changed.append, port=port)
    present = conditions_of({"conditions": [{"type": "Progressing", "reason": "Downloading", "message": "As before."}]})
    store.put(model("hf://org/repo"))
    store.put(pod(ip="127.0.0.1"))
    # Before the first round the message in the status is kept.
    assert downloads.progress(("ns", "vae-1"), present) == "As before."
    node.of("latentflow_download_total_bytes").set(8 * GIB)
    async with aiohttp.ClientSession() as session:
        await downloads.step(session)
        assert downloads.progress(("ns", "vae-1"), present) == "A server downloads the weights: 0.0 of 8.0 GiB."
        await downloads.step(session)
        assert changed == [("ns", "vae-1")]
        node.of("latentflow_download_bytes").set(2 * GIB)
        await downloads.step(session)
        assert changed == [("ns", "vae-1")] * 2
        node.close()
        await downloads.step(session)
        assert downloads.progress(("ns", "vae-1"), {}) == "A server downloads the weights: 2.0 of 8.0 GiB."
        store.drop(pod())
        await downloads.step(session)
        assert downloads.progress(("ns", "vae-1"), present) is None
    assert changed == [("ns", "vae-1")] * 3


async def test_a_download_reported_before_a_restart_is_cleared_once_it_has_ended() -> None:
    store, changed = Store(), list[ObjectKey]()
    reported = {"type": "Progressing", "status": "True", "reason": "Downloading", "message": "1 of 2 GiB."}
    store.put(model("hf://org/repo") | {"status": {"conditions": [reported]}})
    async with aiohttp.ClientSession() as session:
        await Downloads(store=store, on_change=changed.append).step(session)
    assert changed == [("ns", "vae-1")]


async def test_an_invalid_answer_of_a_server_counts_as_no_answer() -> None:
    async def invalid(_: web.Request) -> web.Response:
        return web.Response(text='# HELP a b\n# TYPE a gauge\na{x="y", ="w"} 1.0\n')

    application = web.Application()
    application.router.add_get("/metrics", invalid)
    store, changed = Store(), list[ObjectKey]()
    store.put(model("hf://org/repo"))
    store.put(pod(ip="127.0.0.1"))
    async with TestServer(application) as server, aiohttp.ClientSession() as session:
        await Downloads(store=store, on_change=changed.append, port=server.port).step(session)
    assert changed == []
