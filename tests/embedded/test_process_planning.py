"""The processes of a model on one machine, and the bounds between which it is scaled there."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow.api import DiffusionWorkflow, Model, Source, identity, load_workflows
from latentflow.errors import InvalidRequestError
from latentflow_local import addresses
from latentflow_local.planning import ProcessSpec, bounds, capacity, initial, max_pixels, next_gpu, plan_models
from latentflow_nodes import settings
from latentflow_scheduler.policy import Bounds
from support.paths import EXAMPLES

BASE: dict[str, Any] = {"name": "base", "role": "Denoiser", "source": {"uri": "shapes"}}


def model(**changes: Any) -> Model:
    return Model.model_validate(BASE | changes)


def here(scaling: dict[str, Any], *, cores: int = 8, threads: int | None = 1, device: str | None = None) -> Bounds:
    one = model(scaling=scaling)
    return bounds(one, capacity=capacity(one, threads=threads, device=device, cores=cores))


def first(*, threads: int | None, cores: int) -> ProcessSpec:
    """The first replica of a model."""
    return planned(threads=threads, cores=cores)[0]


def planned(
    *,
    threads: int | None = 1,
    cores: int = 1,
    device: str | None = None,
    gpus: int = 0,
    workflow: DiffusionWorkflow | None = None,
) -> list[ProcessSpec]:
    """The first replica of every model."""
    workflow = workflow or load_workflows(EXAMPLES / "shapes-minimal.yaml")[0]
    addresses = {identity(model): ("127.0.0.1:1", "127.0.0.1:2") for model in workflow.spec.models}
    return plan_models(
        [workflow],
        model_root=Path("/models"),
        addresses=addresses,
        threads=threads,
        device=device,
        cores=cores,
        gpus=gpus,
        compute_lock=Path("/lock"),
        shared_memory=None,
        log_format="console",
    )


def test_a_model_is_scaled_between_the_bounds_in_the_file() -> None:
    assert here({"minReplicas": 0, "maxReplicas": 4}) == Bounds(minimum=0, maximum=4)


def test_a_model_with_equal_bounds_is_not_scaled() -> None:
    assert here({}) == Bounds(minimum=1, maximum=1)
    assert here({"minReplicas": 3, "maxReplicas": 3}) == Bounds(minimum=3, maximum=3)


def test_an_external_model_keeps_its_initial_replicas() -> None:
    assert here({"minReplicas": 2, "maxReplicas": 4, "mode": "External"}) == Bounds(minimum=2, maximum=2)
    assert here({"minReplicas": 0, "maxReplicas": 4, "mode": "External"}) == Bounds(minimum=1, maximum=1)


@pytest.mark.parametrize(("threads", "maximum"), [(1, 8), (2, 4), (3, 2), (5, 1), (8, 1), (16, 1), (None, 1)])
def test_there_are_no_more_replicas_than_have_cores_of_their_own(threads: int | None, maximum: int) -> None:
    assert here({"maxReplicas": 100}, threads=threads) == Bounds(minimum=1, maximum=maximum)


def test_cores_do_not_limit_the_replicas_on_a_gpu() -> None:
    assert here({"maxReplicas": 100}, cores=1, device="cuda") == Bounds(minimum=1, maximum=100)


@given(st.integers(0, 20), st.integers(1, 20), st.sampled_from(["Managed", "External"]), st.integers(1, 64))
def test_a_model_starts_with_enough_replicas_to_serve_within_its_bounds(
    minimum: int, more: int, mode: str, cores: int
) -> None:
    scaling = {"minReplicas": minimum, "maxReplicas": minimum + more, "mode": mode}
    found = here(scaling, cores=cores)
    assert found.minimum <= initial(model(scaling=scaling)) <= found.maximum
    assert found.maximum <= minimum + more


def test_the_replicas_of_a_model_differ_only_in_name_and_addresses() -> None:
    one = first(threads=2, cores=2)
    other = one.another(2, address="127.0.0.1:3", metrics="127.0.0.1:4")
    assert other.name == f"{one.name}-2"
    assert f"--identity={one.model}" in other.argv
    assert {"--listen=127.0.0.1:3", "--metrics=127.0.0.1:4"} == set(other.argv) - set(one.argv)
    assert one.another(1, address=one.address, metrics=one.metrics) == one


def test_the_source_of_a_model_reaches_its_server() -> None:
    source = {"uri": "hf://org/repo", "subfolder": "vae", "revision": "main", "variant": "fp16"}
    workflow = load_workflows(EXAMPLES / "shapes-minimal.yaml")[0]
    models = [
        one.model_copy(update={"source": Source.model_validate(source)}) if one.role == "VAE" else one
        for one in workflow.spec.models
    ]
    spec = workflow.spec.model_copy(update={"models": models})
    specs = planned(workflow=workflow.model_copy(update={"spec": spec}))
    (found,) = (settings.parse(list(spec.argv)) for spec in specs if "--role=VAE" in spec.argv)
    assert {name: getattr(found, name) for name in source} == source


def test_the_nets_of_a_controlnet_reach_its_server() -> None:
    nets = [{"name": "layout", "source": {"uri": "shapes", "subfolder": "controlnet-layout"}}]
    (workflow,) = load_workflows(EXAMPLES / "shapes.yaml")
    body = workflow.model_dump(mode="json", by_alias=True, exclude_none=True)
    next(model for model in body["spec"]["models"] if model["name"] == "edges")["nets"] = nets
    specs = planned(workflow=DiffusionWorkflow.model_validate(body))
    with_nets = [found for spec in specs if (found := settings.parse(list(spec.argv))).nets]
    assert [(one.name, one.source.subfolder) for found in with_nets for one in found.nets] == [
        ("layout", "controlnet-layout")
    ]


@pytest.mark.parametrize(("threads", "cores", "locked"), [(2, 2, True), (2, 3, True), (2, 4, False), (1, 1, False)])
def test_models_share_a_compute_lock_if_two_would_compete_for_the_cores(threads: int, cores: int, locked: bool) -> None:
    assert ("--compute-lock=/lock" in first(threads=threads, cores=cores).argv) is locked


def devices(specs: list[ProcessSpec]) -> list[str]:
    return [settings.parse(list(spec.argv)).engine.device for spec in specs]


def test_models_on_cuda_are_spread_over_the_gpus() -> None:
    assert devices(planned(device="cuda", gpus=2)) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices(planned(device="cuda", gpus=1)) == ["cuda"] * 3


def divided(degree: int, **base: Any) -> DiffusionWorkflow:
    """A workflow whose denoiser is divided."""
    (one,) = load_workflows(EXAMPLES / "shapes-minimal.yaml")
    body = one.model_dump(mode="json", by_alias=True, exclude_none=True)
    for found in body["spec"]["models"]:
        if found["role"] == "Denoiser":
            found |= {"parallelism": {"tensor": degree}} | base
    return DiffusionWorkflow.model_validate(body)


def test_the_ranks_of_a_denoiser_use_consecutive_gpus_that_others_use_least() -> None:
    specs = planned(device="cuda", gpus=4, workflow=divided(2))
    ranks = {spec.role: settings.parse(list(spec.argv)).devices for spec in specs}
    assert ranks == {"TextEncoder": ("cuda:0",), "Denoiser": ("cuda:1", "cuda:2"), "VAE": ("cuda:3",)}
    assert next_gpu("cuda", specs, gpus=4) == 0
    # Not 1 and 2, of which the denoiser has both, nor one of them.
    assert next_gpu("cuda", [one for one in specs if one.role == "Denoiser"], gpus=5, ranks=2) == 3


def test_a_denoiser_of_more_ranks_than_gpus_is_refused() -> None:
    for gpus in (0, 1, 2):
        with pytest.raises(
            InvalidRequestError, match=f"parallelism.tensor 3 needs as many GPUs, and this machine has {gpus}"
        ):
            planned(device="cuda", gpus=gpus, workflow=divided(3))


@pytest.mark.parametrize(("threads", "each"), [(1, 1), (2, 1), (5, 2), (None, 4)])
def test_ranks_on_the_cpu_share_the_threads_of_their_replica(threads: int | None, each: int) -> None:
    specs = planned(threads=threads or 8, cores=8, workflow=divided(2))
    (found,) = (settings.parse(list(spec.argv)) for spec in specs if spec.role == "Denoiser")
    assert (found.threads, found.devices) == (each, ("cpu", "cpu"))
    one = model(parallelism={"tensor": 2})
    assert capacity(one, threads=threads, device=None, cores=8) == 8 // max(threads or 8, 2)


def test_models_on_one_numbered_gpu_all_use_that_gpu() -> None:
    assert devices(planned(device="cuda:1", gpus=2)) == ["cuda:1"] * 3
    assert devices(planned(gpus=2)) == ["cpu"] * 3


def test_another_replica_uses_the_gpu_with_the_fewest_processes() -> None:
    assert next_gpu("cuda", planned(device="cuda", gpus=4), gpus=4) == 3
    specs = planned(device="cuda", gpus=2)
    assert next_gpu("cuda", specs, gpus=2) == 1
    assert devices([specs[0].another(2, address="127.0.0.1:3", metrics="127.0.0.1:4", gpu=1)]) == ["cuda:1"]


@pytest.mark.skipif(sys.platform != "linux", reason="ports are reserved on Linux only")
def test_two_runtimes_choose_different_addresses_before_their_servers_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_PORTS", range(19_000, 19_010))
    with addresses.Addresses() as first:
        with addresses.Addresses() as second:
            chosen = [*first.free(2), *second.free(2), second.of("127.0.0.1:0"), *first.free(2)]
            assert len(set(chosen)) == 7
            second.keep(chosen[2:3])
            assert len(first.free(10)) == 5
        assert first.free(10) == [chosen[2]]


def test_an_address_that_a_server_listens_on_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, addresses.Addresses() as one:
        port = taken.getsockname()[1]
        monkeypatch.setattr(addresses, "_PORTS", range(port, port + 1))
        assert one.free(1) == []


def test_a_taken_port_of_first_choice_is_replaced_by_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        other = addresses.first_choice(address)
        assert other.startswith("127.0.0.1:")
        assert other != address
    assert addresses.first_choice(address) == address


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ([(64, 64)], 256 * 256),
        ([(64, 64), (96, 64)], 384 * 256),
        ([(512, 512)], 2048 * 2048),
        ([(1024, 1024), (64, 64)], 2048 * 2048),
        ([(4096, 2048)], 4096 * 2048),
    ],
)
def test_images_may_have_four_times_the_default_sides_of_a_workflow(sizes: list[tuple[int, int]], most: int) -> None:
    (one,) = load_workflows(EXAMPLES / "shapes-minimal.yaml")
    body = one.model_dump(mode="json", by_alias=True, exclude_none=True)
    workflows = []
    for width, height in sizes:
        body["spec"]["defaults"] = {"width": width, "height": height}
        workflows.append(DiffusionWorkflow.model_validate(body))
    assert max_pixels(workflows) == most
