"""Models scaled by what a real Prometheus server sees of a steady load, on a real cluster."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest
from conftest import VALUES, gateway_address, models_claim, on_a_node_of_ours
from latentflow import AsyncClient
from matplotlib.figure import Figure
from observing import Prometheus
from support.apiserver import ApiServer
from support.kubectl import Body, Namespace, condition, new_namespace
from support.paths import ROOT
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed
from test_path import threaded, wait_until_ready

# The load dials the Service's address.
pytestmark = on_a_node_of_ours
PROMPT = "a large red circle on the left, white background"
STEPS, MOST = 20, 5
# What the load asks of the denoiser, in replicas that compute all the time.
WORK = 1.8
FULL = 0.7
WINDOW = VALUES["scaling"]["windowSeconds"]
CALLS = 'call=~"Encode|Denoise|Decode"'
DONE = f"sum by (model) (rate(latentflow_requests_total{{{CALLS},NS}}[{WINDOW}s]))"
BUSY = f"sum by (model) (rate(latentflow_step_seconds_sum{{NS}}[{WINDOW}s]))"
QUEUE = "sum by (model) (latentflow_queue_depth{NS})"
REPLICAS = "count by (model) (latentflow_ready{NS} == 1)"


def workflow() -> Body:
    """One image at a time and denoiser; each replica has a share of a core, so that another adds to what they do."""
    body = threaded("shapes-minimal.yaml")
    for model in body["spec"]["models"]:
        limited = "300m" if model["role"] == "Denoiser" else "250m"
        model["resources"] = {"limits": {"cpu": limited}, "requests": {"cpu": "10m"}}
        model["engine"] |= {"maxRunning": 1, "maxWaiting": 512}
        model["scaling"] = {"minReplicas": 1, "maxReplicas": MOST}
        if model["role"] == "VAE":
            model["scaling"]["mode"] = "External"
    return body


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A workflow whose models may be scaled, and what is seen of them. `models` by role."""

    release: ApiServer
    namespace: Namespace
    prometheus: Prometheus
    target: str
    models: dict[str, str]

    def now(self, promql: str) -> dict[str, float]:
        return self.prometheus.query(self._of_mine(promql), "model")

    def over(self, promql: str, *, start: float, end: float) -> dict[str, list[tuple[float, float]]]:
        return self.prometheus.series(self._of_mine(promql), "model", start=start, end=end)

    def model(self, role: str) -> Body:
        found = self.namespace.get("DiffusionModel", self.models[role])
        assert found is not None
        return found

    def ready(self, role: str, fewest: int, most: int, *, seconds: float) -> None:
        """Returns when the model has so many replicas that take requests."""
        self.namespace.until(
            "DiffusionModel",
            lambda found: fewest <= found[self.models[role]].get("status", {}).get("readyReplicas", 0) <= most,
            seconds=seconds,
        )

    @retry(retry=retry_if_exception_type(AssertionError), stop=stop_after_delay(90), wait=wait_fixed(1), reraise=True)
    def seen(self, role: str, replicas: int) -> None:
        """Returns when Prometheus has seen no more for ten seconds: those that were too many have finished and gone."""
        assert self.now(f"max_over_time(({REPLICAS})[10s:1s])")[self.models[role]] == replicas

    def _of_mine(self, promql: str) -> str:
        return promql.replace("NS", f'namespace="{self.namespace.name}"')


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


@dataclass
class Load:
    """Requests that come at a steady rate, whether those before them are done or not. `done`: when each ended."""

    done: list[float] = field(default_factory=list)
    _told: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def end(self) -> None:
        async with self._told:
            self.done.append(time.monotonic())
            self._told.notify_all()

    async def more(self, count: int) -> float:
        """Returns when so many more have ended: how many that was per second."""
        before, began = len(self.done), time.monotonic()
        async with self._told:
            await self._told.wait_for(lambda: len(self.done) >= before + count)
        return count / (time.monotonic() - began)


@contextlib.asynccontextmanager
async def load(scaled: Scaled, rate: float) -> AsyncIterator[Load]:
    """So many requests per second while entered; every one of them gets its image."""
    outcome = Load()
    async with AsyncClient(scaled.target, timeout=300) as client, asyncio.TaskGroup() as requests:

        async def ask() -> None:
            await client.generate(PROMPT, steps=STEPS, workflow=f"{scaled.namespace.name}/shapes-minimal")
            await outcome.end()

        async def come() -> None:
            loop = asyncio.get_running_loop()
            due = loop.time()
            while True:
                requests.create_task(ask())
                due += 1 / rate
                await asyncio.sleep(max(0.0, due - loop.time()))

        coming = requests.create_task(come())
        yield outcome
        coming.cancel()


async def service_seconds(scaled: Scaled) -> float:
    """Seconds of computing that one image costs the denoiser, one after the other."""
    denoiser = scaled.models["Denoiser"]
    async with AsyncClient(scaled.target, timeout=120) as client:
        while True:
            for _ in range(10):
                await client.generate(PROMPT, steps=STEPS, workflow=f"{scaled.namespace.name}/shapes-minimal")
            done, busy = [(await asyncio.to_thread(scaled.now, of)).get(denoiser, 0.0) for of in (DONE, BUSY)]
            if done and busy:
                return busy / done


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
    axes[0].set_title(f"a steady load that asks for {WORK} denoisers' work, at most {FULL:.0%} each")
    axes[-1].set_xlabel("seconds")
    (ROOT / "out").mkdir(exist_ok=True)
    figure.savefig(ROOT / "out/scaling.png", dpi=120)


@pytest.mark.timeout(900)
async def test_a_steady_load_scales_the_bottleneck_alone_and_it_returns_to_one(scaled: Scaled) -> None:
    began = time.time()
    external = f"dm/{scaled.models['VAE']}"
    scaled.release.kubectl("scale", "--replicas=2", external, f"--namespace={scaled.namespace.name}")
    scaled.ready("VAE", 2, 2, seconds=120)
    seconds = await service_seconds(scaled)
    rate = WORK / seconds
    expected = math.ceil(rate * seconds / FULL)
    async with load(scaled, rate) as requests:
        alone = await requests.more(20)
        await asyncio.to_thread(scaled.ready, "Denoiser", expected - 1, MOST, seconds=120)
        # What has waited is worked off by more replicas than the load alone needs.
        while (await asyncio.to_thread(scaled.now, QUEUE))[scaled.models["Denoiser"]] > 1:
            await requests.more(math.ceil(2 * rate))
        await asyncio.to_thread(scaled.ready, "Denoiser", expected - 1, expected + 1, seconds=120)
        together = await requests.more(int(20 * rate))
        body = scaled.model("Denoiser")
    replicas = body["status"]["readyReplicas"]
    print(
        f"{seconds:.3f} s each, {rate:.2f}/s: {expected} replicas by rate × service time, {replicas} were there; "
        f"{alone:.2f}/s done by one, {together:.2f}/s then: {body['status']['scheduling']}"
    )
    assert abs(replicas - expected) <= 1
    assert together >= 1.4 * alone
    assert together == pytest.approx(rate, rel=0.15)
    await asyncio.to_thread(scaled.ready, "Denoiser", 1, 1, seconds=180)
    await asyncio.to_thread(scaled.seen, "Denoiser", 1)
    draw(scaled, start=began, end=time.time())
    scheduling = scaled.model("Denoiser")["status"]["scheduling"]
    assert scheduling["reason"].startswith("down to 1: ")
    told = scaled.namespace.list("Event").values()
    scaled_ones = {event["regarding"]["name"] for event in told if event["reason"] in ("ScaledUp", "ScaledDown")}
    assert scaled_ones == {scaled.models["Denoiser"]}
    assert scaled.model("TextEncoder")["status"]["readyReplicas"] == 1
    assert scaled.model("VAE")["status"]["readyReplicas"] == 2


@pytest.mark.timeout(900)
def test_without_prometheus_every_model_stays_and_says_so(scaled: Scaled) -> None:
    scaled.prometheus.stop()

    def degraded(found: dict[str, Body]) -> bool:
        return condition(found["shapes-minimal"], "Degraded").get("reason") == "SignalsMissing"

    scaled.namespace.until("DiffusionWorkflow", degraded)
    assert scaled.model("Denoiser")["status"]["scheduling"]["signals"] == "Missing"
    scaled.prometheus.start()
    scaled.namespace.until("DiffusionWorkflow", lambda found: not degraded(found))
    assert {body["status"]["readyReplicas"] for body in scaled.namespace.list("DiffusionModel").values()} == {1}
