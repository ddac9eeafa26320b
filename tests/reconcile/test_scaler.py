"""The scheduler in a cluster, when what it needs is away."""

from __future__ import annotations

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes import client as kube
from latentflow.errors import UnavailableError
from latentflow.internal.metrics import SCHEDULER, Instruments
from latentflow_operator.cluster import Cluster
from latentflow_operator.scaling import Scaler
from latentflow_operator.settings import ScalingSettings
from latentflow_operator.store import Store
from latentflow_scheduler.policy import Load
from latentflow_scheduler.signals import Signals, read

PLACE = ("art", "denoiser-1")
MODEL = {
    "apiVersion": "latentflow.io/v1alpha1",
    "kind": "DiffusionModel",
    "metadata": {"namespace": PLACE[0], "name": PLACE[1], "uid": "1", "resourceVersion": "1"},
    "spec": {"role": "Denoiser", "source": {"uri": "shapes"}, "scaling": {"minReplicas": 1, "maxReplicas": 5}},
    "status": {"readyReplicas": 1},
}


async def test_a_decision_that_the_api_server_is_not_there_to_take_is_made_again() -> None:
    nobody = kube.Configuration(host="http://127.0.0.1:9")
    store, metrics = Store(), Instruments(SCHEDULER)
    store.put(MODEL)
    scaler = Scaler(
        store=store,
        seen=store.put,
        cluster=Cluster(kube.ApiClient(nobody)),
        settings=ScalingSettings(prometheus="http://127.0.0.1:9"),
        metrics=metrics,
    )
    busy = Load(arrival_rate=2.0, service_seconds=1.0, busy=2.0, queued=0.0, held=0.0)
    for _ in range(2):
        await scaler.step(Signals(loads={PLACE: busy}, replicas={PLACE: 1}, held={}), {})
        wanted = metrics.registry.get_sample_value(
            "latentflow_scheduler_replicas", {"namespace": PLACE[0], "model": PLACE[1]}
        )
        # Not "when what was added has started": nothing was.
        assert wanted == 3


@pytest.mark.parametrize(
    "body", ["null", "[]", '{"status": "success"}', '{"status": "success", "data": {"result": 1}}']
)
async def test_what_answers_and_is_no_prometheus_gives_no_signals(body: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=body, content_type="application/json")

    application = web.Application()
    application.router.add_get("/api/v1/query", answer)
    async with TestServer(application) as server, aiohttp.ClientSession() as session:
        with pytest.raises(UnavailableError, match="is not a Prometheus server"):
            await read(session, str(server.make_url("")).rstrip("/"), window=10)
