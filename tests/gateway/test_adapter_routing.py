"""Of equally busy replicas, a request gets the one that had its LoRAs before."""

from __future__ import annotations

from pathlib import Path

import pytest
from latentflow import AsyncClient
from latentflow_gateway.replicas import AdapterSet, Replica, preferred
from support.pods import HOSTS, pods
from support.scraping import value

NEON: AdapterSet = (("neon", "d", 0.8),)
OUTLINE: AdapterSet = (("outline", "e", 1.0),)


def replica(adapters: AdapterSet, *, outstanding: int = 0, host: str = "a") -> Replica:
    one = Replica(identity="m", address=f"{host}:1", channel=None)  # type: ignore[arg-type]
    one.adapters, one.outstanding = adapters, outstanding
    return one


@pytest.mark.parametrize(
    ("ready", "adapters", "expected"),
    [
        ([replica(OUTLINE), replica(NEON)], NEON, 1),
        ([replica(OUTLINE), replica(())], NEON, 1),
        ([replica(OUTLINE), replica(())], (), 1),
        ([replica(OUTLINE), replica((("neon", "d", 0.5),))], NEON, 0),
        ([replica(()), replica(NEON, outstanding=1)], NEON, 0),
        ([replica(NEON, host="b"), replica(())], NEON, 1),
    ],
)
def test_demand_and_host_come_before_the_adapter_set(ready: list[Replica], adapters: AdapterSet, expected: int) -> None:
    assert preferred(ready, near="a:9", adapters=adapters) is ready[expected]


def with_nets(*nets: str, outstanding: int = 0, host: str = "a") -> Replica:
    one = replica((), outstanding=outstanding, host=host)
    one.nets = frozenset(nets)
    return one


@pytest.mark.parametrize(
    ("ready", "expected"),
    [
        ([with_nets("", "depth"), with_nets("", "pose")], 1),
        ([with_nets("", "depth"), with_nets("")], 1),
        ([with_nets("", "pose"), with_nets("pose")], 1),
        ([with_nets("depth"), with_nets("pose", outstanding=1)], 0),
        ([with_nets("pose", host="b"), with_nets("depth")], 1),
    ],
)
def test_of_equally_busy_replicas_one_with_the_net_on_its_device_is_chosen(ready: list[Replica], expected: int) -> None:
    assert preferred(ready, near="a:9", net="pose") is ready[expected]


async def test_requests_with_two_loras_in_turn_are_merged_once_each(tmp_path: Path) -> None:
    async with pods(tmp_path) as both, AsyncClient(both.gateway) as client:
        for lora in ("neon", "outline") * 3:
            await client.generate("a red circle", steps=2, loras={lora: 0.8}, timeout=120)
        merges = [
            value(f"127.0.0.1:{both.nodes[host, 'base'].metrics_port}", "latentflow_loads_total", kind="merge")
            for host in HOSTS
        ]
    assert merges == [1, 1]
