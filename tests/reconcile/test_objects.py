"""How the operator parses the API server's objects, including those that another version wrote."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from kubernetes import client as kube
from latentflow.internal.metrics import SCHEDULER, Instruments
from latentflow_operator.cluster import Cluster
from latentflow_operator.objects import Model, Workflow, parse
from latentflow_operator.scaling import Scaler
from latentflow_operator.settings import ScalingSettings
from latentflow_operator.store import Store
from latentflow_scheduler.signals import Signals


def body(kind: str, spec: dict[str, Any], *, name: str = "x", **more: Any) -> dict[str, Any]:
    metadata = {"namespace": "art", "name": name, "uid": f"uid-{name}", "resourceVersion": "1"}
    return {"apiVersion": "latentflow.io/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec} | more


def test_a_workflow_of_another_schema_is_still_served_by_its_models() -> None:
    bound = {"models": [{"name": "base", "role": "Denoiser", "model": "denoiser-1"}]}
    workflow = parse(body("DiffusionWorkflow", {"models": "of another version"}, status=bound))
    assert isinstance(workflow, Workflow)
    assert workflow.definition is None
    assert workflow.uses == {"denoiser-1"}


async def test_a_model_of_another_schema_does_not_stop_the_scaling_of_the_others() -> None:
    store, metrics = Store(), Instruments(SCHEDULER)
    store.put(body("DiffusionModel", {"role": "of another version"}, name="unreadable"))
    store.put(body("DiffusionModel", {"role": "VAE", "source": {"uri": "shapes"}}, name="vae-1"))
    scaler = Scaler(
        store=store,
        observe=store.put,
        cluster=Cluster(kube.ApiClient(kube.Configuration(host="http://127.0.0.1:9"))),
        settings=ScalingSettings(prometheus="http://127.0.0.1:9"),
        metrics=metrics,
    )
    await scaler.step(Signals(loads={}, replicas={}, held={}), {})
    labels = {"namespace": "art", "model": "vae-1"}
    assert metrics.registry.get_sample_value("latentflow_scheduler_replicas", labels) == 1


words = st.sampled_from(["uri", "revision", "subfolder", "other"])


@given(st.dictionaries(words, st.none() | st.text(max_size=3) | st.integers()) | st.text(max_size=3))
def test_any_recorded_source_is_parsed_or_ignored(source: Any) -> None:
    spec = {"role": "VAE", "source": {"uri": "shapes"}}
    model = parse(body("DiffusionModel", spec, status={"source": source}))
    assert isinstance(model, Model)
    assert all(found.uri == source["uri"] for found in model.resolved.values())


def test_managed_fields_are_not_kept() -> None:
    service = body("Service", {})
    service["metadata"]["managedFields"] = [{"manager": "kubectl"}]
    assert "managedFields" not in parse(service).manifest["metadata"]
