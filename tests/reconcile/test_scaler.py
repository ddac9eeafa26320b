"""The scheduler in a cluster while the API server or Prometheus is unavailable."""

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

MODEL_KEY = ("art", "denoiser-1")
MODEL = {
    "apiVersion": "latentflow.io/v1alpha1",
    "kind": "DiffusionModel",
    "metadata": {"namespace": MODEL_KEY[0], "name": MODEL_KEY[1], "uid": "1", "resourceVersion": "1"},
    "spec": {"role": "Denoiser", "source": {"uri": "shapes"}, "scaling": {"minReplicas": 1, "maxReplicas": 5}},
    "status": {"readyReplicas": 1},
}


async def test_a_decision_is_made_again_if_the_api_server_did_not_receive_it() -> None:
    unreachable = kube.Configuration(host="http://127.0.0.1:9")
    store, metrics = Store(), Instruments(SCHEDULER)
    store.put(MODEL)
    scaler = Scaler(
        store=store,
        observe=store.put,
        cluster=Cluster(kube.ApiClient(unreachable)),
        settings=ScalingSettings(prometheus="http://127.0.0.1:9"),
        metrics=metrics,
    )
    busy = Load(arrival_rate=2.0, service_seconds=1.0, busy=2.0, queued=0.0, held=0.0)
    for _ in range(2):
        await scaler.step(Signals(loads={MODEL_KEY: busy}, replicas={MODEL_KEY: 1}, held={}), {})
        wanted = metrics.registry.get_sample_value(
            "latentflow_scheduler_replicas", {"namespace": MODEL_KEY[0], "model": MODEL_KEY[1]}
        )
        # The decision is not held back by the time between two scale-ups, because no replica was added.
        assert wanted == 3


@pytest.mark.parametrize(
    "body", ["null", "[]", '{"status": "success"}', '{"status": "success", "data": {"result": 1}}']
)
async def test_a_server_that_is_not_prometheus_gives_no_signals(body: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=body, content_type="application/json")

    application = web.Application()
    application.router.add_get("/api/v1/query", answer)
    async with TestServer(application) as server, aiohttp.ClientSession() as session:
        with pytest.raises(UnavailableError, match="is not a Prometheus server"):
            await read(session, str(server.make_url("")).rstrip("/"), window=10)
