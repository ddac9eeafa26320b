"""A LoRA store serves what its folder has: each adapter by itself, as it is now, and in its earlier version while in use."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from latentflow.errors import FailedPreconditionError, NotFoundError, UnavailableError
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2, control_pb2_grpc, stage_pb2
from latentflow_nodes.adapters.library import Library
from latentflow_nodes.adapters.lora import Adapter
from latentflow_nodes.roles import lora_store
from latentflow_nodes.server import serve
from latentflow_nodes.settings import NodeSettings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.adapters import save
from support.packs import SHAPES
from support.stack import Request, Stack

KEY = "unet.mid_block.attentions.0.proj_in"


def write(path: Path, value: float = 1.0, *, rank: int = 2) -> Path:
    save(path, {f"{KEY}.lora_A.weight": torch.full((rank, 8), value), f"{KEY}.lora_B.weight": torch.ones(8, rank)})
    return path


def value(adapter: Adapter) -> float:
    (layer,) = adapter.components["unet"].values()
    return float(layer.a[0, 0])


def library(folder: Path) -> Library:
    """The adapters of a folder, as a store has them at its start."""
    made = Library(folder)
    made.scan(settled=False)
    return made


def scan(made: Library) -> None:
    """As often as it takes until a changed file is in use."""
    made.scan()
    made.scan()


def problems(made: Library) -> dict[str, str]:
    return {name: one.problem for name, one in made.listed.items()}


def folder_as_peft_writes_it(path: Path) -> None:
    for component in ("unet", "text_encoder"):
        layer = "base_model.model.mid_block.x" if component == "unet" else "base_model.model.text_model.x"
        pair = {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}
        save(path / component / "adapter_model.safetensors", pair)
        (path / component / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')


def test_adapters_are_files_and_folders_and_nothing_else_is(tmp_path: Path) -> None:
    write(tmp_path / "plain.safetensors")
    write(tmp_path / "v1.5 détail.safetensors")
    write(tmp_path / "LOUD.SAFETENSORS")
    write(tmp_path / "saved/pytorch_lora_weights.safetensors")
    write(tmp_path / "saved/checkpoint-500/pytorch_lora_weights.safetensors")
    folder_as_peft_writes_it(tmp_path / "trained")
    write(tmp_path / ".hidden.safetensors")
    write(tmp_path / "._plain.safetensors")
    write(tmp_path / ".cache/x.safetensors")
    write(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    (tmp_path / "vae/config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name in ("README.md", "model.safetensors.index.json", "plain.png", "plain.civitai.info"):
        (tmp_path / name).write_text("")
    made = library(tmp_path)
    assert problems(made) == dict.fromkeys(("LOUD", "plain", "saved", "trained", "v1.5 détail"), "")
    assert made.listed["trained"].components == ("unet", "text_encoder")


def test_a_single_folder_of_peft_is_a_store_of_one_adapter(tmp_path: Path) -> None:
    folder_as_peft_writes_it(tmp_path)
    assert problems(library(tmp_path / "unet")) == {"adapter_model": ""}


def _truncated(path: Path) -> None:
    write(path / "odd.safetensors")
    (path / "odd.safetensors").write_bytes((path / "odd.safetensors").read_bytes()[:-10])


def _lengthened(path: Path) -> None:
    write(path / "odd.safetensors")
    (path / "odd.safetensors").write_bytes((path / "odd.safetensors").read_bytes() + b"0")


def _pipe(path: Path) -> None:
    os.mkfifo(path / "odd.safetensors")


def _link_in_a_folder(path: Path) -> None:
    (path / "odd").mkdir()
    (path / "odd/adapter_model.safetensors").symlink_to("nowhere")


def _directory(path: Path) -> None:
    (path / "odd.safetensors").mkdir()


def _twins(path: Path) -> None:
    write(path / "odd.safetensors")
    write(path / "odd/pytorch_lora_weights.safetensors")


def _twins_in_capitals(path: Path) -> None:
    write(path / "odd.safetensors")
    write(path / "odd.SAFETENSORS")


def _named_by_peft(path: Path) -> None:
    write(path / "odd/mine/adapter_model.safetensors")


def _checkpoints(path: Path) -> None:
    write(path / "odd/checkpoint-500/pytorch_lora_weights.safetensors")


def _several(path: Path) -> None:
    write(path / "odd/pytorch_lora_weights.safetensors")
    write(path / "odd/adapter_model.safetensors")


def _other_name(path: Path) -> None:
    write(path / "odd/odd-v2.safetensors")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (_truncated, "odd.safetensors is damaged or incomplete"),
        (lambda path: (path / "odd.safetensors").write_bytes(b""), "odd.safetensors is damaged or incomplete"),
        (
            lambda path: (path / "odd.safetensors").write_text("<html>404</html>"),
            "odd.safetensors is a web page instead of the weights; download the file itself.",
        ),
        (
            lambda path: (path / "odd.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0"
            ),
            "odd.safetensors is a pointer of Git LFS instead of the weights; run `git lfs pull`",
        ),
        (
            lambda path: (path / "odd.safetensors").write_text(
                '{"error":"Unauthorized","message":"Log in to download it"}'
            ),
            "odd.safetensors is JSON text instead of the weights, as a hub answers without a login",
        ),
        (
            lambda path: torch.save({"a": torch.ones(2)}, path / "odd.safetensors"),
            "odd.safetensors is a pickle or a ZIP archive by its content; convert it",
        ),
        (
            lambda path: torch.save({"a": 1}, path / "odd.safetensors", _use_new_zipfile_serialization=False),
            "odd.safetensors is a pickle or a ZIP archive by its content; convert it",
        ),
        (_lengthened, "odd.safetensors is damaged or incomplete"),
        (lambda path: (path / "odd.safetensors").symlink_to("nowhere"), "odd.safetensors cannot be read: No such file"),
        (
            lambda path: (path / "odd.safetensors").symlink_to("odd.safetensors"),
            "odd.safetensors cannot be read: Too many",
        ),
        (_link_in_a_folder, "odd/adapter_model.safetensors cannot be read: No such file"),
        (_pipe, "odd.safetensors is no regular file"),
        (
            _directory,
            "The folder odd.safetensors/ has neither pytorch_lora_weights.safetensors nor adapter_model.safetensors",
        ),
        (_twins, "The store has several files or folders for the LoRA odd; rename all but one of them."),
        (_twins_in_capitals, "The store has several files or folders for the LoRA odd"),
        (
            _named_by_peft,
            "The folder odd/ has no LoRA, but odd/mine/ has one; move mine/ into the folder of the store.",
        ),
        (_checkpoints, "The folder odd/ has no LoRA, but odd/checkpoint-500/ has one; move checkpoint-500/ into"),
        (lambda path: (path / "odd.PT").write_bytes(b"x"), "odd.PT is a pickle"),
        (_several, "The folder odd/ has several LoRAs"),
        (
            _other_name,
            "The folder odd/ has neither pytorch_lora_weights.safetensors nor adapter_model.safetensors; move "
            "odd-v2.safetensors into the folder of the store, or make odd/ the source of the store.",
        ),
        (lambda path: (path / "odd.pt").write_bytes(b"x"), "odd.pt is a pickle"),
        (lambda path: (path / "odd.ckpt").write_bytes(b"x"), "odd.ckpt is a pickle"),
    ],
)
def test_an_unusable_file_has_a_problem_and_affects_no_other(
    tmp_path: Path, make: Callable[[Path], object], problem: str
) -> None:
    write(tmp_path / "good.safetensors")
    make(tmp_path)
    made = library(tmp_path)
    assert value(made.get("good")) == 1.0
    (odd,) = made.listed.keys() - {"good"}
    assert odd.removesuffix(".safetensors") == "odd"
    assert problem in problems(made)[odd]
    with pytest.raises(FailedPreconditionError) as caught:
        made.get(odd)
    assert caught.value.reason == Reason.ADAPTER_UNREADABLE


def test_a_pickle_beside_its_converted_file_is_ignored(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors")
    for suffix in (".ckpt", ".pt"):
        (tmp_path / f"a{suffix}").write_bytes(b"x")
    assert problems(library(tmp_path)) == {"a": ""}


@pytest.mark.parametrize("name", [b"caf\xe9.pt", b"caf\xe9/pytorch_lora_weights.safetensors"])
def test_any_name_that_is_not_utf_8_can_be_described(tmp_path: Path, name: bytes) -> None:
    write(tmp_path / os.fsdecode(name))
    (listed,) = library(tmp_path).listed.values()
    assert listed.name == "caf\ufffd"
    assert "is not UTF-8; rename it." in listed.problem


def test_a_file_whose_name_is_not_utf_8_is_listed_with_its_problem(tmp_path: Path) -> None:
    write(tmp_path / "good.safetensors").rename(tmp_path / os.fsdecode(b"caf\xe9.safetensors"))
    (listed,) = library(tmp_path).listed.values()
    assert (listed.name, listed.problem) == ("caf\ufffd", "The name of caf\ufffd.safetensors is not UTF-8; rename it.")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_usable_once_it_may_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    path.chmod(0)
    made = library(tmp_path)
    assert "a.safetensors cannot be read: Permission denied" in problems(made)["a"]
    path.chmod(0o600)
    scan(made)
    assert problems(made) == {"a": ""}


def test_added_replaced_and_removed_files_are_followed(tmp_path: Path) -> None:
    made = library(tmp_path)
    assert dict(made.listed) == {}
    path = write(tmp_path / "a.safetensors", 1.0)
    scan(made)
    first = made.listed["a"].digest
    assert value(made.get("a")) == 1.0
    write(path, 2.0)
    scan(made)
    second = made.listed["a"].digest
    assert value(made.get("a")) == 2.0
    path.unlink()
    made.scan()
    assert dict(made.listed) == {}
    with pytest.raises(NotFoundError, match=r"no LoRA 'a' in this store; it has none"):
        made.get("a")
    # Requests in flight end with the version with which they began.
    assert [value(made.get("a", digest)) for digest in (first, second)] == [1.0, 2.0]


def test_a_file_that_is_still_written_is_not_read(tmp_path: Path) -> None:
    made = library(tmp_path)
    content = write(tmp_path / "elsewhere" / "a.safetensors", 3.0).read_bytes()
    shutil.rmtree(tmp_path / "elsewhere")
    path = tmp_path / "a.safetensors"
    for size in range(20, len(content) + 1, 20):
        path.write_bytes(content[:size])
        made.scan()
        assert dict(made.listed) == {}
    path.write_bytes(content)
    scan(made)
    assert problems(made) == {"a": ""}


def test_while_a_file_is_replaced_in_place_its_earlier_version_is_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", 1.0)
    made = library(tmp_path)
    first = made.listed["a"]
    path.write_bytes(path.read_bytes()[:-4])
    made.scan()
    assert made.listed["a"] == first
    made.scan()
    assert "a.safetensors is damaged or incomplete" in problems(made)["a"]
    assert value(made.get("a", first.digest)) == 1.0


def test_an_unusable_file_that_is_repaired_becomes_usable(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"")
    made = library(tmp_path)
    assert problems(made)["a"]
    write(path)
    scan(made)
    assert problems(made) == {"a": ""}


def test_a_change_of_peft_s_configuration_alone_is_a_new_version(tmp_path: Path) -> None:
    folder_as_peft_writes_it(tmp_path / "mine")
    made = library(tmp_path)
    config = tmp_path / "mine/unet/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 2', '"lora_alpha": 1'))
    scan(made)
    (layer,) = made.get("mine").components["unet"].values()
    assert layer.alpha == 1


def test_a_version_that_is_no_longer_in_memory_is_an_error_to_retry(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", 1.0, rank=2)
    made = Library(tmp_path, cache_bytes=1)
    made.scan(settled=False)
    digest = made.listed["a"].digest
    assert value(made.get("a", digest)) == 1.0
    write(path, 2.0)
    with pytest.raises(UnavailableError) as caught:
        made.get("a", digest)
    assert caught.value.reason == Reason.ADAPTER_CHANGED


def test_a_version_that_another_replica_saw_first_is_read_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", 1.0)
    here, there = library(tmp_path), library(tmp_path)
    write(path, 2.0)
    scan(there)
    assert value(here.get("a", there.listed["a"].digest)) == 2.0


def test_while_the_folder_is_away_its_adapters_stay(tmp_path: Path) -> None:
    write(tmp_path / "volume/a.safetensors")
    made = library(tmp_path / "volume")
    (tmp_path / "volume").rename(tmp_path / "away")
    with pytest.raises(OSError, match="No such file"):
        made.scan()
    assert value(made.get("a")) == 1.0


async def test_a_store_of_an_empty_folder_starts(tmp_path: Path) -> None:
    (tmp_path / "styles").mkdir()
    async with serve(NodeSettings(role="LoRAStore", uri="styles", model_root=tmp_path, identity="s")) as node:
        assert node.address


@pytest.mark.asyncio(loop_scope="session")
async def test_a_request_ends_with_the_version_of_an_adapter_with_which_it_began(
    shapes: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_store, "_SCAN_SECONDS", 0.02)
    folder = tmp_path / "styles"
    folder.mkdir()
    neon, outline = (SHAPES / "loras" / name / "pytorch_lora_weights.safetensors" for name in ("neon", "outline"))
    with safe_open(neon, framework="pt") as opened:
        header = opened.metadata()
    # With a header of its own it has a digest that no server has seen.
    save_file(load_file(neon), folder / "mine.safetensors", metadata=header | {"of": "this test"})
    async with serve(NodeSettings(role="LoRAStore", uri="styles", model_root=tmp_path, identity="s")) as store:

        async def digest() -> str:
            stub = control_pb2_grpc.ControlStub(shapes.peers.channel(store.address))
            request = control_pb2.DescribeRequest(protocol_version=1)
            response: control_pb2.DescribeResponse = await stub.Describe(request, timeout=60)
            return response.lora_store.adapters[0].digest

        ref = stage_pb2.AdapterRef(name="mine", weight=1, store=stage_pb2.Peer(address=store.address, model="s"))
        ref.digest = await digest()
        shutil.copy(outline, folder / "mine.safetensors")
        async with asyncio.timeout(60):
            while await digest() == ref.digest:
                pass
        latents = await denoised(shapes, [ref])
    assert torch.equal(latents, await denoised(shapes, await shapes.adapters([("neon", 1.0)], "unet")))


async def denoised(stack: Stack, adapters: Iterable[stage_pb2.AdapterRef]) -> torch.Tensor:
    opening = await stack.denoise_open(Request())
    opening.adapters.extend(adapters)
    async for event in stack.denoising(opening):
        if event.WhichOneof("event") == "result":
            return await stack.peers.fetch(event.result.latents, name="latents")
    raise AssertionError("Denoise ended without a result")
