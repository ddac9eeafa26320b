"""Peers that exchange tensors are chosen on one host, which in a cluster is one pod, where the host has them."""

from __future__ import annotations

from pathlib import Path

from latentflow import AsyncClient, ControlImage
from PIL import Image
from support.pods import HOSTS, Pods, pods

EDGES = Image.new("RGB", (64, 64))


async def make(pods: Pods) -> None:
    """Two images at a time, so that both denoisers have one."""
    async with AsyncClient(pods.gateway) as client:
        result = await client.generate(
            "a red circle",
            images=2,
            steps=3,
            control_images={"edges": ControlImage(image=EDGES)},
            loras={"outline": 0.8},
            timeout=120,
        )
    assert len(result.images) == 2


async def test_controlnet_adapters_and_decoder_are_used_on_the_host_of_the_denoiser(tmp_path: Path) -> None:
    async with pods(tmp_path) as both:
        await make(both)
        for host in HOSTS:
            for name in ("base", "edges", "styles", "pixels"):
                assert both.calls(host, name) == 1, (host, name)


async def test_a_peer_on_another_host_is_used_where_the_denoiser_s_host_has_none(tmp_path: Path) -> None:
    first, second = HOSTS
    async with pods(tmp_path, (second, "edges"), (second, "styles")) as servers:
        await make(servers)
        assert servers.calls(first, "edges") == 2
        assert (servers.calls(first, "base"), servers.calls(second, "base")) == (1, 1)
