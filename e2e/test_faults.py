"""Under a steady load, one fault at a time: with the client's retries every request ends in its image."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import images
import psutil
import pytest
import pytest_asyncio
from conftest import RELEASE_NAMESPACE, deploy, gateway_address, models_claim, on_a_node_of_ours
from latentflow import AsyncClient
from latentflow.errors import LatentflowError
from latentflow.retries import NO_RETRIES, Retries
from observing import Prometheus
from support.apiserver import ApiServer, ready
from support.kubectl import Body, Namespace, new_namespace
from test_path import threaded, wait_until_ready

pytestmark = on_a_node_of_ours
PROMPT = "a large red circle on the left, white background"
STEPS = 8
CLIENTS = 2
# Requests of each kind without a fault, and after one.
COUNT = 40


@dataclass
class Load:
    """How requests have ended: their seconds, and the errors of those that had none to show."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _told: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def tell(self, outcome: float | str) -> None:
        """A request has ended: its seconds, or its error."""
        async with self._told:
            if isinstance(outcome, str):
                self.errors.append(outcome)
            else:
                self.seconds.append(outcome)
            self._told.notify_all()

    async def more(self, count: int) -> None:
        """Returns when so many more requests have ended."""
        wanted = self.ended + count
        async with self._told:
            await self._told.wait_for(lambda: self.ended >= wanted)

    @property
    def ended(self) -> int:
        return len(self.seconds) + len(self.errors)

    @property
    def p95(self) -> float:
        return statistics.quantiles(self.seconds, n=20)[-1]


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A workflow that is served, its denoiser by two replicas, and the gateways' address."""

    release: ApiServer
    prometheus: Prometheus
    namespace: Namespace
    target: str

    def pods(self, role: str) -> list[Body]:
        return [
            pod
            for pod in self.namespace.list("Pod").values()
            if pod["metadata"]["labels"].get("latentflow.io/role") == role
            and "deletionTimestamp" not in pod["metadata"]
        ]

    def component(self, name: str) -> list[Body]:
        selector = f"--selector=app.kubernetes.io/component={name}"
        found = self.release.kubectl("get", "pods", f"--namespace={RELEASE_NAMESPACE}", selector, "--output=json")
        return list(json.loads(found)["items"])


def workflow(**engine: int) -> Body:
    body = threaded("shapes-minimal.yaml")
    for model in body["spec"]["models"]:
        if model["role"] == "Denoiser":
            model["scaling"] = {"minReplicas": 2, "maxReplicas": 2}
            model["engine"] |= engine
    return body


@pytest.fixture(scope="module")
def serving(release: ApiServer, prometheus: Prometheus) -> Iterator[Serving]:
    with new_namespace(release, "faults") as namespace:
        models_claim(release, namespace)
        namespace.apply(workflow())
        wait_until_ready(release, namespace, "shapes-minimal")
        serving = Serving(release=release, prometheus=prometheus, namespace=namespace, target=gateway_address(release))
        two_ready(serving)
        yield serving


def two_ready(serving: Serving) -> None:
    """Returns when the denoiser has two replicas that take requests, and nothing is on its way."""
    serving.namespace.until(
        "DiffusionModel",
        lambda found: (
            [
                body.get("status", {}).get("readyReplicas")
                for body in found.values()
                if body["spec"]["role"] == "Denoiser"
            ]
            == [2]
        ),
        seconds=180,
    )


@contextlib.asynccontextmanager
async def load(serving: Serving, retries: Retries | None) -> AsyncIterator[Load]:
    """Clients that ask without end, while entered; who has asked last gets an answer."""
    outcome, stop = Load(), asyncio.Event()

    async def ask() -> None:
        async with AsyncClient(serving.target, timeout=60, retries=retries) as client:
            while not stop.is_set():
                began = time.monotonic()
                try:
                    await client.generate(PROMPT, steps=STEPS, workflow=f"{serving.namespace.name}/shapes-minimal")
                except LatentflowError as error:
                    await outcome.tell(f"{type(error).__name__}: {error.message}")
                else:
                    await outcome.tell(time.monotonic() - began)

    clients = [asyncio.create_task(ask()) for _ in range(CLIENTS)]
    try:
        yield outcome
    finally:
        stop.set()
        await asyncio.gather(*clients)


def kill(words: str) -> None:
    """kill -9 of one process in a container, found by its command line."""
    for process in psutil.process_iter(["pid", "cmdline"]):
        if words in " ".join(process.info["cmdline"] or ()) and "latentflow-" in " ".join(process.info["cmdline"]):
            os.kill(process.info["pid"], signal.SIGKILL)
            return
    raise AssertionError(f"no process runs with {words!r}")


async def a_denoiser_is_killed(serving: Serving) -> None:
    kill(f"--advertise={serving.pods('Denoiser')[0]['status']['podIP']}")


async def the_operator_is_killed(serving: Serving) -> None:
    kill("--lease=")


async def a_gateway_is_killed(serving: Serving) -> None:
    kill("--kube")


async def the_api_server_restarts(serving: Serving) -> None:
    program = serving.release.program
    assert program is not None
    program.stop()
    program.start()
    await asyncio.to_thread(ready, serving.release)


async def a_pod_is_evicted(serving: Serving) -> None:
    metadata = {"name": serving.pods("Denoiser")[0]["metadata"]["name"], "namespace": serving.namespace.name}
    path = f"/api/v1/namespaces/{serving.namespace.name}/pods/{metadata['name']}/eviction"
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    await asyncio.to_thread(serving.namespace.call, "POST", path, body)


async def a_changed_model_is_rolled_out(serving: Serving) -> None:
    before = {pod["metadata"]["labels"]["latentflow.io/model"] for pod in serving.pods("Denoiser")}
    await asyncio.to_thread(serving.namespace.apply, workflow(maxRunning=3))
    await asyncio.to_thread(
        serving.namespace.until, "DiffusionModel", lambda found: not before & found.keys(), seconds=180
    )


async def prometheus_goes_and_comes_back(serving: Serving) -> None:
    await asyncio.to_thread(serving.prometheus.stop)
    await asyncio.to_thread(serving.prometheus.start)


async def the_release_is_upgraded(serving: Serving) -> None:
    tags = [f"--set=images.{image}.tag={images.NEXT_TAG}" for image in ("control", "node")]
    await asyncio.to_thread(deploy, serving.release, "upgrade", "--reuse-values", *tags)
    await asyncio.to_thread(rolled_out, serving.release, serving.namespace, images.NEXT_TAG)


def rolled_out(release: ApiServer, namespace: Namespace, tag: str) -> None:
    """Returns when every model's pods have an image of this tag, and no others are left."""
    namespace.until(
        "Deployment",
        lambda found: all(
            container["image"].endswith(f":{tag}")
            for body in found.values()
            for container in body["spec"]["template"]["spec"]["containers"]
        ),
    )
    for name in namespace.list("Deployment"):
        release.kubectl("rollout", "status", f"deployment/{name}", f"--namespace={namespace.name}", "--timeout=5m")


Fault = Callable[[Serving], Awaitable[None]]
# How many requests may fail where the client does not retry: those that were with the victim.
LOST: list[tuple[Fault, int]] = [
    (a_denoiser_is_killed, CLIENTS),
    (the_operator_is_killed, 0),
    (a_gateway_is_killed, CLIENTS),
    (the_api_server_restarts, 0),
    (a_pod_is_evicted, 0),
    (a_changed_model_is_rolled_out, 0),
    (prometheus_goes_and_comes_back, 0),
    (the_release_is_upgraded, 0),
]
# An upgrade starts everything anew at the same time; on a node of few cores that is in the requests' way.
SLOW = {the_release_is_upgraded}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(serving: Serving) -> float:
    """P95 in seconds while nothing happens."""
    async with load(serving, None) as patient, load(serving, NO_RETRIES) as impatient:
        await patient.more(COUNT)
        await impatient.more(COUNT)
    assert patient.errors == impatient.errors == []
    return patient.p95


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("fault", "lost"), LOST, ids=[fault.__name__ for fault, _ in LOST])
async def test_no_request_is_lost_when(serving: Serving, undisturbed: float, fault: Fault, lost: int) -> None:
    async with load(serving, None) as patient, load(serving, NO_RETRIES) as impatient:
        await patient.more(COUNT // 2)
        await fault(serving)
        await patient.more(COUNT)
        await impatient.more(COUNT)
        await asyncio.to_thread(two_ready, serving)
    print(
        f"{fault.__name__}: P95 {undisturbed:.3f} -> {patient.p95:.3f} s, {len(patient.seconds)} requests, without retries {len(impatient.errors)} of {impatient.ended} lost: {impatient.errors[:2]}"
    )
    assert patient.errors == []
    assert len(impatient.errors) <= lost, impatient.errors
    assert fault in SLOW or patient.p95 <= 3 * undisturbed
