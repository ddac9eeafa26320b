"""Servers that share a memory exchange tensors through its pages: bit for bit, without leftovers, else over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latentflow.errors import FailedPreconditionError
from latentflow.internal import images
from latentflow.internal.metrics import NODE, Instruments
from latentflow.v1 import stage_pb2
from latentflow_nodes.tensors.peers import Peers
from latentflow_nodes.tensors.shared_memory import Memory, PageError, private_folder
from latentflow_nodes.tensors.step_stream import ResidualStream
from latentflow_nodes.tensors.transfer import Receiver, Sender, Transport
from PIL import Image
from support.packs import MODELS
from support.scraping import value
from support.stack import Request, Stack, png, started
from support.tensors import bundles, equal

SECONDS = 120
on_the_stack = pytest.mark.asyncio(loop_scope="session")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


@pytest.fixture
def memory(folder: Path) -> Iterator[Memory]:
    with contextlib.closing(Memory(folder)) as one:
        yield one


def transport(memory: Memory | None) -> Transport:
    return Transport(memory=memory, metrics=Instruments(NODE, model="m", role="VAE"))


def received(sender: Sender, receiver: Receiver, bundle: dict[str, torch.Tensor], memory: Memory) -> Receiver:
    messages = list(sender.pieces(bundle, memory=memory.id))
    assert [receiver.add(message) for message in messages][-1]
    return receiver


def pages(folder: Path) -> list[Path]:
    return [page for owner in folder.iterdir() if owner.is_dir() for page in owner.iterdir()]


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not await asyncio.to_thread(claim):
            pass


@settings(deadline=None)
@given(bundle=bundles())
def test_a_bundle_comes_back_from_a_page(folder: Path, bundle: dict[str, torch.Tensor]) -> None:
    with contextlib.closing(Memory(folder)) as ours, contextlib.closing(Memory(folder)) as theirs:
        with transport(theirs).sender() as sender:
            receiver = received(sender, transport(ours).receiver(), bundle, ours)
        assert receiver.tensors.keys() == bundle.keys()
        assert all(equal(receiver.tensors[name], tensor) for name, tensor in bundle.items())
        assert (receiver.kind == "shared-memory") == (receiver.size > 0)


def test_a_sender_overwrites_its_one_page_and_removes_it(folder: Path, memory: Memory) -> None:
    with transport(memory).sender() as sender:
        for length in (7, 3, 100_000):
            bundle = {"a": torch.arange(length)}
            assert equal(
                received(sender, transport(memory).receiver(), bundle, memory).tensors["a"], torch.arange(length)
            )
            assert len(pages(folder)) == 1
    assert not pages(folder)


def test_servers_recognise_a_shared_memory_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with contextlib.ExitStack() as stack:
        first, second, other = (stack.enter_context(contextlib.closing(Memory(tmp_path / name))) for name in "aab")
        assert first.id == second.id != other.id
        message = next(transport(first).sender().pieces({"a": torch.ones(2)}, memory=other.id))
        assert message.data
        assert not message.page


@pytest.mark.parametrize("path", ["absent", "file", "/proc/self"])
def test_an_unusable_folder_is_refused_by_name(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPreconditionError, match=f"The shared memory {tmp_path / path} cannot be used"):
        Memory(tmp_path / path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_memory_of_another_user_is_refused(tmp_path: Path) -> None:
    Memory(tmp_path).close()
    os.chown(tmp_path / "id", 12345, 12345)
    with pytest.raises(FailedPreconditionError, match="it belongs to another user"):
        Memory(tmp_path)


HEX = "0123456789abcdef"
NAMES = st.one_of(
    st.text(max_size=80),
    st.text(alphabet=HEX + "/.", max_size=80),
    st.sampled_from(["../../etc/passwd", f"{'a' * 32}/../id", f"{'a' * 32}/{'b' * 32}\n", f"/{'a' * 31}/{'b' * 32}"]),
)


@settings(deadline=None)
@given(name=NAMES)
def test_a_reader_opens_only_pages(folder: Path, name: str) -> None:
    with contextlib.closing(Memory(folder)) as ours, pytest.raises(PageError):
        ours.read(name, [memoryview(bytearray(1))])


def test_a_reader_follows_no_link_and_blocks_on_no_pipe(tmp_path: Path) -> None:
    secret, shared = tmp_path / "secret", tmp_path / "shared"
    secret.mkdir()
    shared.mkdir()
    (secret / ("f" * 32)).write_text("values of another's file")
    (shared / ("a" * 32)).symlink_to(secret)
    with contextlib.closing(Memory(shared)) as ours:
        owner = next(one for one in shared.iterdir() if one.is_dir() and not one.is_symlink())
        (owner / ("b" * 32)).symlink_to(secret / ("f" * 32))
        os.mkfifo(owner / ("c" * 32))
        for name in (f"{'a' * 32}/{'f' * 32}", f"{owner.name}/{'b' * 32}", f"{owner.name}/{'c' * 32}"):
            with pytest.raises(PageError, match="cannot be read"):
                ours.read(name, [memoryview(bytearray(1))])


def test_a_truncated_page_is_detected(memory: Memory) -> None:
    page = memory.page()
    page.write([memoryview(b"abc")])
    with pytest.raises(PageError, match="ends after 3 bytes"):
        memory.read(page.name, [memoryview(bytearray(4))])
    page.close()


def test_a_bundle_without_room_is_sent_as_bytes_and_leaves_no_page(folder: Path, memory: Memory) -> None:
    bundle = {"a": torch.arange(10_000)}
    with transport(memory).sender() as sender:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            receiver = received(sender, transport(memory).receiver(), bundle, memory)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert receiver.kind == "grpc"
        assert not pages(folder)
        again = received(sender, transport(memory).receiver(), bundle, memory)
        assert again.kind == "shared-memory"
        assert equal(receiver.tensors["a"], again.tensors["a"])


PRELUDE = """
import signal, sys
from pathlib import Path
from latentflow_nodes.tensors.shared_memory import Memory, private_folder
"""
OWN_A_PAGE = """
page = Memory(Path(sys.argv[1])).page()
page.write([memoryview(b"abc")])
print("held", flush=True)
signal.pause()
"""
OWN_A_FOLDER = """
with private_folder(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("abc")
    print("held", flush=True)
    signal.pause()
"""


@contextlib.contextmanager
def running(program: str, folder: Path) -> Iterator[None]:
    """Another process, which is killed at the end."""
    with subprocess.Popen([sys.executable, "-c", PRELUDE + program, folder], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            yield
        finally:
            process.kill()


def test_the_sweep_removes_pages_of_killed_servers_only(tmp_path: Path) -> None:
    with contextlib.closing(Memory(tmp_path)) as survivor:
        page = survivor.page()
        with running(OWN_A_PAGE, tmp_path):
            survivor.sweep()
            assert len(pages(tmp_path)) == 2
        survivor.sweep()
        assert [one.name for one in pages(tmp_path)] == [page.name.split("/")[1]]
        page.close()
    assert [one.name for one in tmp_path.iterdir()] == ["id"]


def test_a_runtime_removes_the_folders_of_killed_runtimes(tmp_path: Path) -> None:
    with running(OWN_A_FOLDER, tmp_path):
        (left,) = tmp_path.iterdir()
        with private_folder(tmp_path):
            assert left.exists()
    with private_folder(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())


def test_a_machine_without_shared_memory_uses_grpc(tmp_path: Path) -> None:
    with private_folder(tmp_path / "absent") as folder:
        assert folder is None


CONTROLS = {"edges": "controlnet-edges", "layout": "controlnet-layout"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sharing(folder: Path) -> AsyncIterator[Stack]:
    """The shapes workflow over one memory; only the layout ControlNet has another."""
    elsewhere = folder.parent / f"{folder.name}-elsewhere"
    elsewhere.mkdir()
    own: dict[str, dict[str, object]] = {"layout": {"shared_memory": elsewhere}}
    async with started(MODELS, "shapes", controls=CONTROLS, loras="loras", own=own, shared_memory=folder) as stack:
        yield stack


def moved(stack: Stack, name: str, transport: str, direction: str) -> float:
    address = f"127.0.0.1:{stack.nodes[name].metrics_port}"
    return value(address, "latentflow_tensor_bytes_total", transport=transport, direction=direction)


def release_all(stack: Stack) -> None:
    """Releases handles, as a gateway does at the end of a request."""
    for node in stack.nodes.values():
        node.context.store.close()


@on_the_stack
async def test_the_result_equals_that_over_grpc_bit_for_bit(
    sharing: Stack, shapes: Stack, edge_image: Image.Image, layout_image: Image.Image
) -> None:
    controls = [("edges", edge_image, 0.7), ("layout", layout_image, 0.9)]
    request = Request(controls=controls, loras=[("outline", 0.8)], steps=6)
    expected_latents, expected_image = await shapes.generate(request)
    latents, image = await sharing.generate(request)
    assert torch.equal(latents, expected_latents)
    assert image.tobytes() == expected_image.tobytes()


@on_the_stack
async def test_metrics_count_transfers_by_transport(
    sharing: Stack, edge_image: Image.Image, layout_image: Image.Image
) -> None:
    def all_moved() -> dict[tuple[str, str, str], float]:
        return {
            (name, kind, direction): moved(sharing, name, kind, direction)
            for name in sharing.nodes
            for kind in ("grpc", "shared-memory")
            for direction in ("send", "receive")
        }

    before = all_moved()
    controls = [("edges", edge_image, 0.7), ("layout", layout_image, 0.9)]
    await sharing.denoise(Request(controls=controls))
    now = {key: moved - before[key] for key, moved in all_moved().items()}
    conditioning = now["layout", "grpc", "receive"]
    residuals = now["layout", "grpc", "send"]
    assert conditioning > 0
    assert residuals > 0
    assert {key: moved for key, moved in now.items() if moved} == {
        ("text", "shared-memory", "send"): 2 * conditioning,
        ("text", "grpc", "send"): conditioning,
        ("edges", "shared-memory", "receive"): conditioning,
        ("edges", "shared-memory", "send"): residuals,
        ("layout", "grpc", "receive"): conditioning,
        ("layout", "grpc", "send"): residuals,
        ("base", "shared-memory", "receive"): conditioning + residuals,
        ("base", "grpc", "receive"): residuals,
    }


@on_the_stack
async def test_a_long_request_uses_one_page_for_residuals_and_leaves_none(
    sharing: Stack, folder: Path, edge_image: Image.Image
) -> None:
    release_all(sharing)
    request = await sharing.denoise_open(Request(controls=[("edges", edge_image, 0.7)], steps=30))
    request.checkpoint_interval = 1
    seen = []
    async for _ in sharing.denoising(request):
        seen.append({page.name for page in pages(folder)})
    # Of the two halves of the conditioning, and of the stream.
    assert max(len(now) for now in seen) == 3
    assert len(set().union(*seen)) == 3
    release_all(sharing)
    await until(lambda: not pages(folder))


@on_the_stack
async def test_a_cancelled_request_leaves_no_page(sharing: Stack, folder: Path, edge_image: Image.Image) -> None:
    request = await sharing.denoise_open(Request(controls=[("edges", edge_image, 0.7)], steps=900))
    call = sharing.denoising(request)
    await call.read()
    assert len(pages(folder)) == 3
    call.cancel()
    release_all(sharing)
    await until(lambda: not pages(folder))


@on_the_stack
async def test_values_of_vanished_pages_are_requested_as_bytes(
    sharing: Stack, shapes: Stack, folder: Path, edge_image: Image.Image
) -> None:
    asked = Request(controls=[("edges", edge_image, 0.7)], steps=12)
    expected, _ = await shapes.generate(asked)
    before = moved(sharing, "base", "grpc", "receive")
    request = await sharing.denoise_open(asked)
    request.checkpoint_interval = 1
    async for event in sharing.denoising(request):
        for page in pages(folder):
            page.unlink()
        if event.WhichOneof("event") == "result":
            latents = await sharing.peers.fetch(event.result.latents, name="latents")
    assert torch.equal(latents, expected)
    assert moved(sharing, "base", "grpc", "receive") > before


@on_the_stack
async def test_an_early_request_for_a_step_does_not_overwrite_the_last_answer(
    sharing: Stack, edge_image: Image.Image
) -> None:
    conditioning = (await sharing.encode(Request())).conditioning
    opening = stage_pb2.ResidualsOpen(
        conditioning=conditioning,
        half=stage_pb2.GUIDANCE_HALF_BOTH,
        image=images.png(png(edge_image)),
        width=64,
        height=64,
    )
    ref = stage_pb2.ControlNetRef(peer=sharing.peer("edges"))
    samples = [torch.full((2, 4, 8, 8), float(i)) for i in range(6)]

    async def asked(peers: Peers, *, together: bool) -> list[torch.Tensor]:
        answers = []
        async with ResidualStream(peers, ref, opening) as stream:
            for i, sample in enumerate(samples):
                answers.append(asyncio.wrap_future(stream.request(step=i, timestep=500.0, sample=sample, scale=1.0)))
                if not together:
                    await answers[-1]
            return [(await answer).mid for answer in answers]

    expected = await asked(sharing.peers, together=False)
    found = await asked(sharing.nodes["base"].context.peers, together=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], found[1])


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A memory with room for little more than its folders."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@on_the_stack
async def test_a_full_memory_is_replaced_by_grpc(shapes: Stack, small: Path, edge_image: Image.Image) -> None:
    request = Request(controls=[("edges", edge_image, 0.7)])
    expected, _ = await shapes.generate(request)
    async with started(MODELS, "shapes", controls=CONTROLS, shared_memory=small) as stack:
        latents, _ = await stack.generate(request)
        assert torch.equal(latents, expected)
        assert moved(stack, "edges", "grpc", "send") > 0
        assert moved(stack, "edges", "shared-memory", "send") == 0
        assert moved(stack, "base", "shared-memory", "receive") > 0
