"""Models scaled by what a real Prometheus server scrapes under a steady load, on a real cluster.

The load is a number of requests in flight, not a rate, so that the replicas it needs do not depend on how fast the machine
is. Bounds come from the policy's own formula over the signals that were measured during the load.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean

import pytest
from conftest import VALUES, gateway_address, models_claim, on_a_node_of_ours
from latentflow import AsyncClient
from latentflow_scheduler import policy
from latentflow_scheduler.policy import Load
from matplotlib.figure import Figure
from observing import Prometheus
from support.apiserver import ApiServer
from support.kubectl import Body, Namespace, condition, new_namespace
from support.paths import ROOT
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed
from test_path import threaded, wait_until_ready

# The load connects to the Service's cluster address.
pytestmark = on_a_node_of_ours
PROMPT = "a large red circle on the left, white background"
STEPS, MAX_REPLICAS = 20, 5
# Requests of the steady load, and those that come all at once before it and make a backlog.
IN_FLIGHT, BURST = 2, 20
POLICY = policy.Settings()
SCALING = VALUES["scaling"]
WINDOW = SCALING["windowSeconds"]
# A number of replicas that the policy keeps for so long after its last decision is what the signals of that time ask for:
# fewer would have been decided on after `downSeconds`; a round and a scrape are late by two seconds each.
STEADY_SECONDS = SCALING["downSeconds"] + 2 * SCALING["intervalSeconds"] + 4
CALLS = 'call=~"Encode|Denoise|Decode"'
ARRIVALS = f"sum by (model) (rate(latentflow_requests_started_total{{{CALLS},NS}}[{WINDOW}s]))"
DONE = f"sum by (model) (rate(latentflow_requests_total{{{CALLS},NS}}[{WINDOW}s]))"
BUSY = f"sum by (model) (rate(latentflow_step_seconds_sum{{NS}}[{WINDOW}s]))"
QUEUE = "sum by (model) (latentflow_queue_depth{NS})"
REPLICAS = "count by (model) (latentflow_ready{NS} == 1)"


def workflow() -> Body:
    """One image at a time and denoiser; each replica has a share of a core, so that another one adds throughput."""
    body = threaded("shapes-minimal.yaml")
    for model in body["spec"]["models"]:
        limit = "300m" if model["role"] == "Denoiser" else "250m"
        model["resources"] = {"limits": {"cpu": limit}, "requests": {"cpu": "10m"}}
        model["engine"]["maxWaiting"] = 512
        model["scaling"] = {"minReplicas": 1, "maxReplicas": MAX_REPLICAS}
        if model["role"] == "Denoiser":
            model["engine"]["maxRunning"] = 1
        if model["role"] == "VAE":
            model["scaling"]["mode"] = "External"
    return body


@dataclass(frozen=True, kw_only=True)
class Steady:
    """What was measured while the number of replicas did not change.

    Attributes:
        replicas: That number.
        fewest, most: What the policy's formula asks for by the signals measured in that time.
        busy: Seconds of computing per second, over all replicas.
        service_seconds: Of computing that one request cost.
    """

    replicas: int
    fewest: int
    most: int
    busy: float
    service_seconds: float


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A workflow whose models may be scaled, and what is measured of them. `models`: names by role."""

    release: ApiServer
    namespace: Namespace
    prometheus: Prometheus
    target: str
    models: dict[str, str]

    def now(self, promql: str) -> dict[str, float]:
        return self.prometheus.query(self._in_namespace(promql), "model")

    def over(self, promql: str, *, start: float, end: float) -> dict[str, list[tuple[float, float]]]:
        return self.prometheus.series(self._in_namespace(promql), "model", start=start, end=end)

    def model(self, role: str) -> Body:
        found = self.namespace.get("DiffusionModel", self.models[role])
        assert found is not None
        return found

    def ready(self, role: str, replicas: int) -> None:
        """Returns when so many replicas of the model take requests."""
        name = self.models[role]
        self.namespace.until(
            "DiffusionModel",
            lambda found: found[name].get("status", {}).get("readyReplicas", 0) == replicas,
            seconds=300,
        )

    def loads(self, role: str, *, start: float, end: float) -> list[Load]:
        """The model's signals, every second, from its servers' metrics."""
        series = [
            dict(self.over(promql, start=start, end=end).get(self.models[role], ()))
            for promql in (ARRIVALS, DONE, BUSY, QUEUE)
        ]
        times = sorted(set.intersection(*map(set, series)))
        found = []
        for arrivals, done, busy, queued in ([one[at] for one in series] for at in times):
            service = busy / done if done else 0.0
            found.append(Load(arrival_rate=arrivals, service_seconds=service, busy=busy, queued=queued, held=0.0))
        return found

    @retry(retry=retry_if_exception_type(AssertionError), stop=stop_after_delay(400), wait=wait_fixed(2), reraise=True)
    def steady(self, role: str, *, since: float) -> Steady:
        """Returns when the model's number of replicas is what its signals ask for, and has not changed for STEADY_SECONDS.

        Args:
            since: Unix time from which on signals count.
        """
        body, now = self.model(role), time.time()
        replicas, scheduling = body["spec"]["replicas"], body["status"].get("scheduling")
        assert scheduling, "no decision yet"
        start = max(since, datetime.fromisoformat(scheduling["time"]).timestamp())
        assert now - start >= STEADY_SECONDS, scheduling
        assert body["status"]["readyReplicas"] == replicas
        loads = self.loads(role, start=start, end=now)
        wanted = [between(load) for load in loads]
        fewest, most = min(fewest for fewest, _ in wanted), max(most for _, most in wanted)
        assert fewest <= replicas <= most, (fewest, replicas, most, scheduling, loads)
        return Steady(
            replicas=replicas,
            fewest=fewest,
            most=most,
            busy=fmean(load.busy for load in loads),
            service_seconds=fmean(load.service_seconds for load in loads),
        )

    @retry(retry=retry_if_exception_type(AssertionError), stop=stop_after_delay(90), wait=wait_fixed(1), reraise=True)
    def scraped(self, role: str, replicas: int) -> None:
        """Returns when Prometheus has scraped no more replicas for ten seconds: the others have drained and are gone."""
        assert self.now(f"max_over_time(({REPLICAS})[10s:1s])")[self.models[role]] == replicas

    def _in_namespace(self, promql: str) -> str:
        return promql.replace("NS", f'namespace="{self.namespace.name}"')


def between(load: Load) -> tuple[int, int]:
    """Fewest and most replicas that the policy's formula asks for at signals that are exact to one request in the window."""
    demand, one = policy.demand(load, POLICY), load.service_seconds / WINDOW
    # No replica is removed that is needed for what is computed now.
    return tuple(
        min(max(math.ceil(work / POLICY.target_utilization), 1), MAX_REPLICAS)
        for work in (demand - one, max(demand, load.busy) + one)
    )


@pytest.fixture
def scaled(release: ApiServer, prometheus: Prometheus) -> Iterator[Scaled]:
    with new_namespace(release, "scaling") as namespace:
        models_claim(release, namespace)
        namespace.apply(workflow())
        wait_until_ready(release, namespace, "shapes-minimal")
        models = {body["spec"]["role"]: name for name, body in namespace.list("DiffusionModel").items()}
        yield Scaled(
            release=release, namespace=namespace, prometheus=prometheus, target=gateway_address(release), models=models
        )


@contextlib.asynccontextmanager
async def load(scaled: Scaled) -> AsyncIterator[asyncio.Future[list[None]]]:
    """IN_FLIGHT requests at any time while entered, and at first BURST more, the end of which is yielded. Each gets its image."""
    left = asyncio.Event()
    async with AsyncClient(scaled.target, timeout=600) as client, asyncio.TaskGroup() as group:

        async def request() -> None:
            await client.generate(PROMPT, steps=STEPS, workflow=f"{scaled.namespace.name}/shapes-minimal")

        async def requests() -> None:
            while not left.is_set():
                await request()

        for _ in range(IN_FLIGHT):
            group.create_task(requests())
        yield asyncio.gather(*(group.create_task(request()) for _ in range(BURST)))
        left.set()


def draw(scaled: Scaled, *, start: float, end: float) -> None:
    """out/scaling.png: rate, queue and replicas of each model over time."""
    names = {model: role for role, model in scaled.models.items()}
    figure = Figure(figsize=(9, 8), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    panels = ((DONE, "requests done per second"), (QUEUE, "requests waiting"), (REPLICAS, "replicas ready"))
    for axis, (promql, title) in zip(axes, panels, strict=True):
        for model, points in sorted(scaled.over(promql, start=start, end=end).items()):
            axis.plot(
                [at - start for at, _ in points],
                [value for _, value in points],
                label=names[model],
                drawstyle="steps-post" if promql is REPLICAS else "default",
            )
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    axes[0].legend(loc="upper right")
    axes[0].set_title(
        f"{IN_FLIGHT} requests in flight after a burst of {BURST}; replicas compute at most {POLICY.target_utilization:.0%} of their time"
    )
    axes[-1].set_xlabel("seconds")
    (ROOT / "out").mkdir(exist_ok=True)
    figure.savefig(ROOT / "out/scaling.png", dpi=120)


@pytest.mark.timeout(1500)
async def test_a_steady_load_scales_the_bottleneck_alone_and_it_returns_to_one(scaled: Scaled) -> None:
    began = time.time()
    external = f"dm/{scaled.models['VAE']}"
    scaled.release.kubectl("scale", "--replicas=2", external, f"--namespace={scaled.namespace.name}")
    scaled.ready("VAE", 2)
    async with load(scaled) as burst:
        await burst
        # From here on there is no backlog, and a window later none in the rates either.
        steady = await asyncio.to_thread(scaled.steady, "Denoiser", since=time.time() + WINDOW)
    body = scaled.model("Denoiser")
    print(f"{steady}: {body['status']['scheduling']}")
    # More than one replica can compute.
    assert steady.busy >= 1.4
    await asyncio.to_thread(scaled.ready, "Denoiser", 1)
    await asyncio.to_thread(scaled.scraped, "Denoiser", 1)
    draw(scaled, start=began, end=time.time())
    assert scaled.model("Denoiser")["status"]["scheduling"]["reason"].startswith("down to 1: ")
    events = scaled.namespace.list("Event").values()
    changed = {event["regarding"]["name"] for event in events if event["reason"] in ("ScaledUp", "ScaledDown")}
    assert changed == {scaled.models["Denoiser"]}
    assert scaled.model("TextEncoder")["status"]["readyReplicas"] == 1
    assert scaled.model("VAE")["status"]["readyReplicas"] == 2


@pytest.mark.timeout(900)
def test_without_prometheus_every_model_keeps_its_replicas_and_reports_it(scaled: Scaled) -> None:
    scaled.prometheus.stop()

    def degraded(found: dict[str, Body]) -> bool:
        return condition(found["shapes-minimal"], "Degraded").get("reason") == "SignalsMissing"

    scaled.namespace.until("DiffusionWorkflow", degraded)
    # Each model reports by itself: another one may have made the workflow degraded.
    denoiser = scaled.models["Denoiser"]
    scaled.namespace.until(
        "DiffusionModel", lambda found: found[denoiser]["status"].get("scheduling", {}).get("signals") == "Missing"
    )
    scaled.prometheus.start()
    scaled.namespace.until("DiffusionWorkflow", lambda found: not degraded(found))
    assert {body["status"]["readyReplicas"] for body in scaled.namespace.list("DiffusionModel").values()} == {1}
