"""Weights from a hub and from a bucket, over real HTTP: what is fetched, once, whole, and what is said when it is not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from latentflow.errors import FailedPreconditionError
from latentflow.internal.metrics import NODE, Instruments
from latentflow.internal.source_folder import SourceFolder
from latentflow_nodes import families
from latentflow_nodes.weights.fetching import Progress, wanted
from latentflow_nodes.weights.source import locate
from support import forked
from support.bucket import BUCKET, Store
from support.hub import Hub
from support.packs import SHAPES
from support.stack import Request, Stack, started


@dataclass(kw_only=True)
class Remote:
    """A place that has the shapes pack, and pickles beside it, and what fetches from there on this machine."""

    server: Hub | Store
    uri: str
    environment: dict[str, str]
    cache: Path

    @property
    def files(self) -> Counter[str]:
        """How often each file was sent, by its name in the pack."""
        sent = (key.removeprefix("GET ").removeprefix("packs/shapes/") for key in self.server.requests.elements())
        return Counter(name for name in sent if "/" in name or name.endswith(".json"))

    def fetch(self, role: str = "VAE", *, metrics: Instruments | None = None, **source: str | None) -> Path:
        progress = Progress(metrics or Instruments(NODE, model="m", role=role), source="s")
        return locate(
            uri=source.get("uri") or self.uri,
            subfolder=source.get("subfolder"),
            revision=source.get("revision"),
            variant=source.get("variant"),
            role=role,
            parts=families.parts(role),
            model_root=Path(),
            cache=self.cache,
            progress=progress,
        ).pipeline

    def process(self) -> ForkServerProcess:
        """A process that has begun to fetch the VAE."""
        begun = forked.context().Event()
        child = forked.start(forked.fetch_vae, self.uri, self.cache, begun, environment=self.environment)
        assert begun.wait(60)
        return child


@pytest.fixture(params=["hub", "bucket"])
def remote(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    pack = tmp_path / "shapes"
    shutil.copytree(SHAPES, pack)
    (pack / "vae/diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (pack / "vae/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
    cache = tmp_path / "cache"
    if request.param == "hub":
        hub = Hub()
        hub.push("org/shapes", pack)
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache)}
        # Read when the library was imported, which another test may have done.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        uri = "hf://org/shapes"
        made: AbstractContextManager[Hub | Store] = hub.running()
    else:
        store = Store()
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
        environment = keys | {"AWS_ENDPOINT_URL": store.url, "AWS_MAX_ATTEMPTS": "1"}
        uri = f"s3://{BUCKET}/packs/shapes"
        made = store.running()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with made as server:
        if isinstance(server, Store):
            server.upload(pack, "packs/shapes")
        yield Remote(server=server, uri=uri, environment=environment, cache=cache)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FULL = "vae/diffusion_pytorch_model.safetensors"
VAE = {"model_index.json", "vae/config.json", FULL}


@pytest.mark.asyncio(loop_scope="session")
async def test_a_fetched_pack_serves_the_image_of_the_folder(remote: Remote, shapes: Stack, tmp_path: Path) -> None:
    async with started(tmp_path, remote.uri, cache=remote.cache) as fetched:
        _, image = await fetched.generate(Request())
    _, same = await shapes.generate(Request())
    assert image.tobytes() == same.tobytes()


def test_a_role_fetches_what_it_reads_and_no_pickle(remote: Remote) -> None:
    assert content(remote.fetch()) == {name: (SHAPES / name).read_bytes() for name in VAE}


def test_of_a_variant_only_its_weights_are_fetched(remote: Remote) -> None:
    found = content(remote.fetch(variant="fp16"))
    assert found.keys() == {*(VAE - {FULL}), "vae/diffusion_pytorch_model.fp16.safetensors"}


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ("fp16.safetensors", "vae holds its weights only as the variant fp16. Set source.variant: fp16"),
        ("bin", "vae holds a pickle (diffusion_pytorch_model.bin) and no safetensors"),
    ],
)
def test_weights_that_are_left_out_are_named(remote: Remote, tmp_path: Path, kept: str, words: str) -> None:
    for path in (tmp_path / "shapes/vae").glob("diffusion_pytorch_model.*"):
        if not path.name.endswith(f"model.{kept}"):
            path.unlink()
    if isinstance(remote.server, Hub):
        remote.server.push("org/shapes", tmp_path / "shapes")
    else:
        remote.server.client().delete_object(Bucket=BUCKET, Key=f"packs/shapes/{FULL}")
        if kept == "bin":
            half = "packs/shapes/vae/diffusion_pytorch_model.fp16.safetensors"
            remote.server.client().delete_object(Bucket=BUCKET, Key=half)
    with pytest.raises(FailedPreconditionError) as caught:
        remote.fetch()
    assert words in caught.value.message


@pytest.mark.parametrize("remote", ["hub"], indirect=True)
def test_a_repository_with_a_single_file_is_refused_with_its_name(remote: Remote, tmp_path: Path) -> None:
    assert isinstance(remote.server, Hub)
    (tmp_path / "single").mkdir()
    (tmp_path / "single/anime.safetensors").write_bytes(b"weights")
    remote.server.push("org/single", tmp_path / "single")
    with pytest.raises(FailedPreconditionError, match=r"org/single holds anime.safetensors, .* name it in the uri"):
        remote.fetch(uri="hf://org/single")
    (tmp_path / "single/anime.safetensors").rename(tmp_path / "single/model.safetensors")
    remote.server.push("org/single", tmp_path / "single")
    with pytest.raises(FailedPreconditionError, match=r"holds model.safetensors and no config.json .* in the uri"):
        remote.fetch(uri="hf://org/single")


@pytest.mark.parametrize("role", ["VAE", "Denoiser", "TextEncoder"])
def test_a_repository_may_be_a_component_of_its_own(remote: Remote, role: str) -> None:
    part = {"VAE": "vae", "Denoiser": "unet", "TextEncoder": "text_encoder"}[role]
    if isinstance(remote.server, Hub):
        remote.server.push("org/alone", SHAPES / part)
    else:
        remote.server.upload(SHAPES / part, "packs/alone")
    found = remote.fetch(role, uri=remote.uri.replace("shapes", "alone"))
    assert content(found) == content(SHAPES / part)


@pytest.mark.parametrize("role", ["VAE", "TextEncoder"])
def test_of_a_single_file_that_file_and_the_role_s_folders_beside_it_are_fetched(remote: Remote, role: str) -> None:
    beside = {"VAE": ["vae"], "TextEncoder": ["text_encoder", "tokenizer"]}[role]
    folder = remote.cache.parent / "ckpt"
    for part in (*beside, "unet", "scheduler"):
        shutil.copytree(SHAPES / part, folder / f"deep/{part}", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "deep/a[1].safetensors").write_bytes(b"weights")
    (folder / "deep/other.safetensors").write_bytes(b"other weights")
    if isinstance(remote.server, Hub):
        remote.server.push("org/ckpt", folder)
        uri = "hf://org/ckpt/deep/a[1].safetensors"
    else:
        remote.server.upload(folder, "packs/ckpt")
        uri = f"s3://{BUCKET}/packs/ckpt/deep/a[1].safetensors"
    found = content(remote.fetch(role, uri=uri))
    assert {name.partition("/")[0] for name in found} == {"a[1].safetensors", "unet", *beside}


def test_a_subfolder_limits_what_is_fetched(remote: Remote) -> None:
    found = content(remote.fetch("LoRAStore", subfolder="loras"))
    assert {name.partition("/")[0] for name in found} == {"model_index.json", "loras"}


def test_a_second_server_of_the_same_cache_fetches_nothing(remote: Remote) -> None:
    first = remote.fetch()
    assert remote.files == dict.fromkeys(VAE, 1)
    assert remote.fetch() == first
    assert remote.files == dict.fromkeys(VAE, 1)


def test_two_servers_that_start_at_once_fetch_each_file_once(remote: Remote) -> None:
    remote.server.flowing.clear()
    one, other = remote.process(), remote.process()
    assert remote.server.paused.wait(60)
    remote.server.flowing.set()
    one.join(60)
    other.join(60)
    assert (one.exitcode, other.exitcode) == (0, 0)
    assert remote.files == dict.fromkeys(VAE, 1)


def test_the_partial_download_of_a_killed_server_is_never_served(remote: Remote) -> None:
    remote.server.flowing.clear()
    child = remote.process()
    assert remote.server.paused.wait(60)
    child.kill()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    remote.server.flowing.set()
    assert content(remote.fetch()) == {name: (SHAPES / name).read_bytes() for name in VAE}


def test_a_complete_download_is_served_while_its_source_is_unreachable(remote: Remote) -> None:
    before = remote.fetch()
    if isinstance(remote.server, Hub):
        remote.server.down = True
    else:
        remote.server.stop()
    assert remote.fetch() == before
    with pytest.raises(FailedPreconditionError, match=r"could not be fetched: .*check the network"):
        remote.fetch("TextEncoder")


def test_the_metrics_show_the_progress_of_a_download(remote: Remote) -> None:
    metrics = Instruments(NODE, model="m", role="VAE")
    total = sum((SHAPES / name).stat().st_size for name in VAE)
    seen: list[tuple[int, int]] = []

    class Watched(Progress):
        def at(self, done: int, total: int) -> None:
            super().at(done, total)
            seen.append((done, total))

    locate(
        uri=remote.uri,
        subfolder=None,
        revision=None,
        role="VAE",
        parts=["vae"],
        model_root=Path(),
        cache=remote.cache,
        progress=Watched(metrics, source="s"),
    )
    labels = {"model": "m", "role": "VAE"}
    assert metrics.registry.get_sample_value("latentflow_download_bytes", labels) == total
    assert metrics.registry.get_sample_value("latentflow_download_total_bytes", labels) == total
    assert any(0 < done < total for done, total in seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("remote", ["hub"], indirect=True)
@pytest.mark.parametrize(
    ("uri", "revision", "words"),
    [
        ("hf://org/nothing", None, "no such repository, or it is private; check the name and HF_TOKEN"),
        ("hf://org/shapes", "v9", "no such branch, tag or commit; check the revision"),
        ("hf://org/a--b", None, "that is not the name of a repository"),
    ],
)
def test_a_missing_repository_or_revision_is_named_in_one_sentence(
    remote: Remote, uri: str, revision: str | None, words: str
) -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        remote.fetch(uri=uri, revision=revision)
    assert caught.value.message.startswith(uri)
    assert words in caught.value.message


@pytest.mark.parametrize("remote", ["hub"], indirect=True)
def test_a_private_repository_needs_its_token(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(remote.server, Hub)
    remote.server.token = "hub-token"
    with pytest.raises(FailedPreconditionError, match="it is private; check the name and HF_TOKEN"):
        remote.fetch()
    monkeypatch.setenv("HF_TOKEN", "hub-token")
    assert content(remote.fetch()).keys() == VAE


@pytest.mark.parametrize("remote", ["bucket"], indirect=True)
@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://nowhere/packs/shapes", "there is no bucket 'nowhere'; check the name and AWS_ENDPOINT_URL"),
        (f"s3://{BUCKET}/packs/shape", "it contains neither weights nor configuration of this role; check the path"),
    ],
)
def test_a_missing_bucket_or_path_is_named_in_one_sentence(remote: Remote, uri: str, words: str) -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        remote.fetch(uri=uri)
    assert caught.value.message.startswith(f"{uri} could not be fetched")
    assert words in caught.value.message


@pytest.mark.parametrize("remote", ["bucket"], indirect=True)
def test_weights_overwritten_during_a_download_are_never_served_as_a_mixture(remote: Remote) -> None:
    assert isinstance(remote.server, Store)
    remote.server.flowing.clear()
    child = remote.process()
    assert remote.server.paused.wait(60)
    name = "packs/shapes/vae/diffusion_pytorch_model.safetensors"
    size = (SHAPES / "vae/diffusion_pytorch_model.safetensors").stat().st_size
    remote.server.client().put_object(Bucket=BUCKET, Key=name, Body=bytes(size))
    remote.server.flowing.set()
    child.join(60)
    assert child.exitcode == 1
    assert not list(remote.cache.rglob("*.safetensors"))


@pytest.mark.parametrize("remote", ["bucket"], indirect=True)
@pytest.mark.parametrize(("keys", "words"), [(True, "may not read it"), (False, "there are no credentials")])
def test_wrong_or_missing_credentials_are_named(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, keys: bool, words: str
) -> None:
    assert isinstance(remote.server, Store)
    remote.server.denied = True
    if not keys:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(remote.cache / "none"))
    with pytest.raises(FailedPreconditionError, match=words):
        remote.fetch()


@pytest.mark.parametrize("remote", ["bucket"], indirect=True)
def test_an_endpoint_that_is_not_a_url_is_named(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "minio:9000")
    with pytest.raises(FailedPreconditionError, match=r"Invalid endpoint: minio:9000; check the AWS_\* environment"):
        remote.fetch()


@pytest.mark.parametrize("remote", ["bucket"], indirect=True)
def test_a_changed_object_is_fetched_beside_the_old_download(remote: Remote, tmp_path: Path) -> None:
    assert isinstance(remote.server, Store)
    before = remote.fetch()
    remote.server.client().put_object(Bucket=BUCKET, Key="packs/shapes/vae/config.json", Body=b"{}")
    after = remote.fetch()
    assert (after / "vae/config.json").read_bytes() == b"{}"
    assert content(before) == {name: (SHAPES / name).read_bytes() for name in VAE}


@pytest.mark.parametrize("remote", ["bucket"], indirect=True)
def test_a_server_that_cannot_fetch_exits_with_2_and_the_cause(remote: Remote) -> None:
    command = [sys.executable, "-m", "latentflow_nodes.server", "--role=VAE", "--uri=s3://nowhere/shapes"]
    done = subprocess.run(command, env=os.environ | remote.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("latentflow-node: s3://nowhere/shapes could not be fetched")


def test_a_server_ends_at_once_at_a_signal_during_a_download(remote: Remote) -> None:
    remote.server.flowing.clear()
    command = [sys.executable, "-m", "latentflow_nodes.server", "--role=VAE", f"--uri={remote.uri}"]
    child = subprocess.Popen([*command, f"--cache={remote.cache}"], env=os.environ | remote.environment)
    assert remote.server.paused.wait(60)
    child.terminate()
    assert child.wait(60) == 0


def test_in_a_store_each_file_is_an_adapter_whatever_its_name() -> None:
    assert wanted("LoRAStore", "loras", parts=()).of(
        ["loras/a.fp16.safetensors", "loras/B.SAFETENSORS", "loras/a.bin", "vae/config.json"]
    ) == ["loras/a.fp16.safetensors", "loras/B.SAFETENSORS"]


def test_a_controlnet_repository_may_be_the_component_itself() -> None:
    paths = ["config.json", "diffusion_pytorch_model.safetensors", "README.md", "sd/unet/config.json"]
    assert wanted("ControlNet", None, parts=families.parts("ControlNet")).of(paths) == paths[:2]
    folder = SHAPES / "controlnet-edges"
    assert SourceFolder(pipeline=folder).part("controlnet") == folder
    assert SourceFolder(pipeline=SHAPES).part("controlnet") == SHAPES / "controlnet"
