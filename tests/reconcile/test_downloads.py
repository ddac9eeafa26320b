"""Whose downloads are looked at, and what is said of them."""

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
from latentflow_operator.downloads import Downloads, Reading, sentence, watched
from latentflow_operator.store import Place, Store
from latentflow_operator.troubles import Trouble

GIB = 1 << 30


def pod(name: str = "a", *, ip: str | None = "10.0.0.1", phase: str = "Running", ready: bool = False) -> dict[str, Any]:
    status: dict[str, Any] = {"phase": phase, "conditions": [{"type": "Ready", "status": "True" if ready else "False"}]}
    labels = {"latentflow.io/model": "vae-1"}
    metadata = {"namespace": "ns", "name": name, "uid": name, "resourceVersion": "1", "labels": labels}
    return {"kind": "Pod", "metadata": metadata, "status": status | ({"podIP": ip} if ip else {})}


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
def test_only_servers_that_may_be_fetching_are_asked(uri: str, pods: list[Any], addresses: list[str]) -> None:
    assert watched(uri, pods) == addresses


@pytest.mark.parametrize(
    ("done", "total", "words"),
    [
        (1.2 * GIB, 6.9 * GIB, "1.2 of 6.9 GiB"),
        (0, 300 << 20, "0 of 300 MiB"),
        (1024, 4096, "1 of 4 KiB"),
        (0, 10, "0 of 10 bytes"),
    ],
)
def test_sizes_are_told_in_the_unit_of_the_whole(done: float, total: float, words: str) -> None:
    assert sizes.progress(done, total) == words


counts = st.integers(min_value=0, max_value=10 * GIB)


@given(st.lists(st.builds(Reading, done=counts, total=counts), max_size=4))
def test_the_server_that_will_serve_first_speaks_and_none_that_is_done(readings: list[Reading]) -> None:
    fetching = [one for one in readings if one.done < one.total]
    said = sentence(readings)
    assert (said is None) == (not fetching)
    if said is not None:
        first = max(fetching, key=lambda one: one.done / one.total)
        assert said == f"A server fetches the weights: {sizes.progress(first.done, first.total)}."


@pytest.mark.parametrize(
    ("wanted", "pods", "refused", "reason"),
    [
        (1, [pod()], None, "Downloading"),
        (1, [pod(ready=True)], None, "ReplicasReady"),
        (0, [], None, "ScaledToZero"),
        (1, [], Trouble(about=ConditionType.WEIGHTS_AVAILABLE, reason="CannotLoad", message="No."), "CannotLoad"),
    ],
)
def test_a_download_is_told_only_of_a_model_that_waits_for_nothing_else(
    wanted: int, pods: list[Any], refused: Trouble | None, reason: str
) -> None:
    statements = of_model(
        wanted=wanted,
        deployment=None,
        pods=pods,
        is_own=lambda container: True,
        before={},
        blind=False,
        wakes=True,
        refused=refused,
        downloading="1 of 2 GiB.",
    )
    said = {one.type: one for one in statements}
    assert said[ConditionType.READY].reason == reason
    told = {one.reason for one in statements if one.message == "1 of 2 GiB."}
    assert told == ({"Downloading"} if reason == "Downloading" else set())


async def test_a_change_is_told_once_and_what_does_not_answer_changes_nothing() -> None:
    store, changed, node = Store(), list[Place](), Instruments(NODE, model="vae-1", role="VAE")
    port = node.serve(host="127.0.0.1", port=0)
    downloads = Downloads(store=store, changed=changed.append, port=port)
    told = {"Progressing": {"reason": "Downloading", "message": "As before."}}
    store.put(model("hf://org/repo"))
    store.put(pod(ip="127.0.0.1"))
    # The operator has just started, and what was said stands.
    assert downloads.said(("ns", "vae-1"), told) == "As before."
    node.of("latentflow_download_total_bytes").set(8 * GIB)
    async with aiohttp.ClientSession() as session:
        await downloads.step(session)
        assert downloads.said(("ns", "vae-1"), told) == "A server fetches the weights: 0.0 of 8.0 GiB."
        await downloads.step(session)
        assert changed == [("ns", "vae-1")]
        node.of("latentflow_download_bytes").set(2 * GIB)
        await downloads.step(session)
        assert changed == [("ns", "vae-1")] * 2
        node.close()
        await downloads.step(session)
        assert downloads.said(("ns", "vae-1"), {}) == "A server fetches the weights: 2.0 of 8.0 GiB."
        store.drop(pod())
        await downloads.step(session)
        assert downloads.said(("ns", "vae-1"), told) is None
    assert changed == [("ns", "vae-1")] * 3


async def test_what_was_told_of_a_download_before_a_restart_does_not_outlive_it() -> None:
    store, changed = Store(), list[Place]()
    told = {"type": "Progressing", "status": "True", "reason": "Downloading", "message": "1 of 2 GiB."}
    store.put(model("hf://org/repo") | {"status": {"conditions": [told]}})
    async with aiohttp.ClientSession() as session:
        await Downloads(store=store, changed=changed.append).step(session)
    assert changed == [("ns", "vae-1")]


async def test_a_server_that_answers_nonsense_is_as_one_that_does_not_answer() -> None:
    async def nonsense(_: web.Request) -> web.Response:
        return web.Response(text='# HELP a b\n# TYPE a gauge\na{x="y", ="w"} 1.0\n')

    application = web.Application()
    application.router.add_get("/metrics", nonsense)
    store, changed = Store(), list[Place]()
    store.put(model("hf://org/repo"))
    store.put(pod(ip="127.0.0.1"))
    async with TestServer(application) as server, aiohttp.ClientSession() as session:
        await Downloads(store=store, changed=changed.append, port=server.port).step(session)
    assert changed == []
