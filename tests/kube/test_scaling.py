"""Scaling from a real Prometheus on a real API server; the tests set the metrics of the model servers."""

from __future__ import annotations

import math
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from kube.simulated_kubelet import workflow
from latentflow.errors import UnavailableError
from latentflow.internal.metrics import GATEWAY, NODE, Instruments
from latentflow_scheduler import signals
from support.apiserver import ApiServer
from support.kubectl import Body, Namespace, condition, new_namespace
from support.operating import Operator
from support.prometheus import Prometheus, scraping
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

# Fast, so that a test does not wait; the scrape interval is a second.
SCALING = {"intervalSeconds": 0.5, "windowSeconds": 5, "upSeconds": 1, "downSeconds": 4, "idleSeconds": 4}
MOST = 5
SCALE = "diffusionmodels/scale"


class Servers:
    """The metrics of a model's servers, which together serve a number of requests per second."""

    def __init__(self, model: str) -> None:
        self._nodes = [Instruments(NODE, model=model, role="Denoiser") for _ in range(MOST)]
        self.addresses = [f"127.0.0.1:{node.serve(host='127.0.0.1', port=0)}" for node in self._nodes]
        for node in self._nodes:
            node.of("latentflow_ready").set(1)
        self.rate, self.seconds = 0.0, 0.5
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        now = time.monotonic()
        while not self._stopped.wait(0.1):
            before, now = now, time.monotonic()
            done = self.rate * (now - before) / MOST
            for node in self._nodes:
                node.of("latentflow_requests_started_total", call="Denoise").inc(done)
                node.of("latentflow_requests_total", call="Denoise", code="OK").inc(done)
                node.of("latentflow_step_seconds").observe(done * self.seconds)

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        for node in self._nodes:
            node.close()


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A workflow whose denoiser may have up to five replicas, and its sources of signals."""

    namespace: Namespace
    servers: Servers
    gateway: Instruments
    prometheus: Prometheus
    model: str

    def until(self, replicas: int) -> Body:
        """Waits until the denoiser should have this number of replicas, and returns it."""
        return self.namespace.until(
            "DiffusionModel", lambda found: found[self.model]["spec"].get("replicas", 1) == replicas
        )[self.model]

    def reported(self, words: str) -> Body:
        """Waits until the denoiser's status contains this reason of a decision, and returns it."""
        return self.namespace.until("DiffusionModel", lambda found: words in _reason(found[self.model]))[self.model]


def _reason(body: Body) -> str:
    return str(body.get("status", {}).get("scheduling", {}).get("reason", ""))


def _degraded(body: Body) -> str:
    return str(condition(body, "Degraded").get("reason", ""))


def expected(scaled: Scaled) -> int:
    """Arrival rate × service time over the target utilization."""
    return math.ceil(scaled.servers.rate * scaled.servers.seconds / 0.7)


@pytest.fixture
def scaled(
    api_server: ApiServer, accounts: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Scaled]:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed; on Debian: tools/debian")
    scaling = getattr(request, "param", {"minReplicas": 1, "maxReplicas": MOST})
    with new_namespace(api_server, "scaling") as namespace:
        namespace.create(workflow(scaling=scaling))
        operator = Operator(accounts["operator"], tmp_path / "first", f"--namespace={namespace.name}")
        operator.start()
        models = namespace.until("DiffusionModel", lambda found: len(found) == 4)
        operator.stop()
        (model,) = (name for name, body in models.items() if body["spec"]["role"] == "Denoiser")
        servers, gateway = Servers(model), Instruments(GATEWAY)
        gateways = f"127.0.0.1:{gateway.serve(host='127.0.0.1', port=0)}"
        addresses = [*servers.addresses, gateways]
        with scraping(tmp_path, addresses, namespace=namespace.name) as prometheus:
            operator = Operator(
                accounts["operator"],
                tmp_path / "second",
                f"--namespace={namespace.name}",
                scaling=SCALING | {"prometheus": prometheus.url, "gateways": gateways},
            )
            operator.start()
            yield Scaled(namespace=namespace, servers=servers, gateway=gateway, prometheus=prometheus, model=model)
            operator.stop()
        gateway.close()
        servers.close()


def test_replicas_follow_arrival_rate_times_service_time_up_and_down(
    scaled: Scaled,
) -> None:
    scaled.servers.rate = 3.4
    scaled.until(expected(scaled))
    # It may have decided on two replicas first.
    body = scaled.reported("up to 3")
    assert body["status"]["scheduling"]["replicas"] == 3
    assert re.match(r"up to 3: \d\.\d\d/s × 0\.50 s, load \d\.\d\d", _reason(body))
    scaled.servers.rate = 0.4
    assert scaled.until(1)
    scaled.reported("down to 1")


def test_models_without_requests_keep_their_replicas(scaled: Scaled, api_server: ApiServer) -> None:
    scaled.servers.rate = 3.4
    scaled.until(3)
    scaled.reported("up to 3")
    written = {
        write[3] for write in api_server.writes("latentflow") if write[:3] == ("patch", scaled.namespace.name, SCALE)
    }
    assert written == {scaled.model}
    for body in scaled.namespace.list("DiffusionModel").values():
        for entry in body["metadata"]["managedFields"]:
            assert "f:replicas" not in entry["fieldsV1"].get("f:spec", {})


def test_a_decision_is_recorded_as_an_event_with_its_reason(scaled: Scaled) -> None:
    scaled.servers.rate = 3.4
    scaled.until(3)
    events = scaled.namespace.until(
        "Event", lambda found: any(event["note"].startswith("up to 3: ") for event in found.values())
    )
    recorded = [event for event in events.values() if event["reason"] == "ScaledUp"]
    assert {event["regarding"]["name"] for event in recorded} == {scaled.model}


def test_the_scheduler_writes_only_its_decision_into_a_status(scaled: Scaled) -> None:
    scaled.servers.rate = 3.4
    body = scaled.reported("up to 3")
    fields = {
        (entry["manager"], field)
        for entry in body["metadata"]["managedFields"]
        if entry.get("subresource") == "status"
        for field in entry["fieldsV1"]["f:status"]
    }
    assert {field for manager, field in fields if manager == "latentflow-scheduler"} == {"f:scheduling"}
    assert {manager for manager, field in fields if field == "f:scheduling"} == {"latentflow-scheduler"}


def test_without_prometheus_replicas_stay_and_missing_signals_are_reported_once(scaled: Scaled) -> None:
    scaled.servers.rate = 3.4
    scaled.until(3)
    scaled.prometheus.program.stop()
    scaled.servers.rate = 0.0
    body = scaled.reported("holding: no signals")
    assert body["spec"]["replicas"] == 3
    scaled.namespace.until("DiffusionModel", lambda found: _degraded(found[scaled.model]) == "SignalsMissing")
    scaled.namespace.until("DiffusionWorkflow", lambda found: _degraded(*found.values()) == "SignalsMissing")
    scaled.prometheus.program.start()
    scaled.until(1)
    scaled.namespace.until("DiffusionWorkflow", lambda found: _degraded(*found.values()) == "AsExpected")
    events = scaled.namespace.until(
        "Event", lambda found: any(event["reason"] == "SignalsRestored" for event in found.values())
    )
    reasons = [event["reason"] for event in events.values()]
    assert reasons.count("SignalsMissing") == reasons.count("SignalsRestored") == 1


@pytest.mark.parametrize("scaled", [{"minReplicas": 0, "maxReplicas": 2}], indirect=True)
def test_an_idle_model_is_scaled_to_zero_and_a_held_request_wakes_it(scaled: Scaled) -> None:
    scaled.until(0)
    held = scaled.gateway.of("latentflow_gateway_held", model=f"{scaled.namespace.name}/{scaled.model}")
    held.set(1)
    scaled.until(1)


def test_a_model_that_becomes_external_no_longer_reports_missing_signals(scaled: Scaled) -> None:
    scaled.prometheus.program.stop()
    scaled.namespace.until("DiffusionModel", lambda found: _degraded(found[scaled.model]) == "SignalsMissing")
    external = {"minReplicas": 1, "maxReplicas": MOST, "mode": "External"}
    scaled.namespace.apply(workflow(scaling=external))
    scaled.namespace.until("DiffusionModel", lambda found: _degraded(found[scaled.model]) == "AsExpected")


@pytest.mark.parametrize("scaled", [{"minReplicas": 0, "maxReplicas": 2}], indirect=True)
def test_a_held_request_wakes_a_model_while_prometheus_is_unavailable(scaled: Scaled) -> None:
    scaled.until(0)
    scaled.prometheus.program.stop()
    scaled.reported("holding: no signals")
    held = scaled.gateway.of("latentflow_gateway_held", model=f"{scaled.namespace.name}/{scaled.model}")
    held.set(1)
    scaled.until(1)


@pytest.mark.parametrize("scaled", [{"minReplicas": 1, "maxReplicas": MOST, "mode": "External"}], indirect=True)
def test_the_scheduler_does_not_scale_an_external_model(scaled: Scaled, api_server: ApiServer) -> None:
    api_server.kubectl("scale", "--replicas=2", f"dm/{scaled.model}", f"--namespace={scaled.namespace.name}")
    scaled.servers.rate = 3.4
    (vae,) = (n for n, body in scaled.namespace.list("DiffusionModel").items() if body["spec"]["role"] == "VAE")
    # The same rounds scale the VAE back into its bounds, so that two rounds have passed.
    for _ in range(2):
        scaled.namespace.patch("DiffusionModel", vae, {"spec": {"replicas": 3}}, subresource="scale")
        scaled.namespace.until("DiffusionModel", lambda found: found[vae]["spec"]["replicas"] == 1)
    body = scaled.until(2)
    assert "scheduling" not in body.get("status", {})


async def test_service_time_counts_completed_requests_and_load_excludes_refused_ones(
    tmp_path: Path,
) -> None:
    old, new = (Instruments(NODE, model="denoiser-1", role="Denoiser") for _ in range(2))
    stopped = threading.Event()

    def serve() -> None:
        now = time.monotonic()
        while not stopped.wait(0.1):
            before, now = now, time.monotonic()
            passed = now - before
            for code, count in (("OK", passed), ("RESOURCE_EXHAUSTED", 9 * passed)):
                old.of("latentflow_requests_started_total", call="Denoise").inc(count)
                old.of("latentflow_requests_total", call="Denoise", code=code).inc(count)
            old.of("latentflow_step_seconds").observe(0.5 * passed)
            # Computes all the time and has completed no request.
            new.of("latentflow_step_seconds").observe(passed)

    @retry(
        retry=retry_if_exception_type((AssertionError, KeyError, UnavailableError)),
        stop=stop_after_delay(60),
        wait=wait_fixed(0.5),
        reraise=True,
    )
    async def seen(url: str) -> None:
        async with aiohttp.ClientSession() as session:
            load = (await signals.read(session, url, window=5)).loads["art", "denoiser-1"]
        assert load.busy == pytest.approx(1.5, rel=0.1)
        assert load.service_seconds == pytest.approx(0.5, rel=0.1)
        assert load.arrival_rate == pytest.approx(1.0, rel=0.2)

    addresses = []
    for node in (old, new):
        node.of("latentflow_ready").set(1)
        addresses.append(f"127.0.0.1:{node.serve(host='127.0.0.1', port=0)}")
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with scraping(tmp_path, addresses, namespace="art") as prometheus:
            await seen(prometheus.url)
    finally:
        stopped.set()
        thread.join()
        old.close()
        new.close()
