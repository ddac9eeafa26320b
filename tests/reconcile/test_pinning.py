"""Which commit a source is resolved to, and how often the hub is hub."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow.api import Source
from latentflow.api.conditions import ConditionReason
from latentflow.api.types import ModelSpec
from latentflow_operator.objects import sources_of
from latentflow_operator.pinning import Pins, Refusal, all_recorded, recorded

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MAIN = Source(uri="hf://org/repo", revision="main")


@pytest.mark.parametrize(
    "source",
    [
        Source(uri="shapes"),
        Source(uri="s3://bucket/shapes"),
        Source(uri="oci://registry/shapes:1"),
        Source(uri="hf://org/repo", revision=COMMIT),
    ],
    ids=lambda source: source.uri,
)
def test_a_source_without_a_branch_is_resolved_without_the_hub(source: Source) -> None:
    assert recorded(source, None) == source


def test_a_recorded_commit_is_kept() -> None:
    status = {"source": {"uri": "hf://org/repo", "revision": COMMIT}}
    assert recorded(MAIN, sources_of(status).get("")) == Source(uri="hf://org/repo", revision=COMMIT)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "uri": st.sampled_from(["hf://org/repo", "hf://org/other"]),
            "subfolder": st.sampled_from(["vae", "unet"]),
            "revision": st.sampled_from([COMMIT, COMMIT.upper(), COMMIT[:39], "main", ""]),
        },
    )
)
def test_only_a_recorded_commit_of_the_same_source_is_used(source: dict[str, str]) -> None:
    same = source == {"uri": "hf://org/repo", "revision": COMMIT}
    assert (recorded(MAIN, sources_of({"source": source}).get("")) is not None) == same


def test_every_net_of_a_model_needs_its_own_commit() -> None:
    nets = [{"name": name, "source": MAIN.model_dump(exclude_none=True)} for name in ("depth", "pose")]
    spec = ModelSpec.model_validate({"role": "ControlNet", "source": {"uri": "shapes"}, "nets": nets})
    known = [one | {"source": {"uri": MAIN.uri, "revision": COMMIT}} for one in nets]
    assert all_recorded(spec, sources_of({"nets": known[:1]})) is None
    pinned = all_recorded(spec, sources_of({"source": {"uri": "shapes"}, "nets": known}))
    assert pinned is not None
    assert pinned.source == Source(uri="shapes")
    assert [net.source.revision for net in pinned.nets or ()] == [COMMIT, COMMIT]


class FakeHub:
    """A hub that answers once it is released, and the keys that `Pins` notified."""

    def __init__(self, answer: Callable[[], str]) -> None:
        self.sources: list[Source] = []
        self.released = threading.Event()
        self.notified: asyncio.Queue[str] = asyncio.Queue()
        self._answer = answer
        self.pins: Pins[str] = Pins(self._resolve, notify=self.notified.put_nowait)

    def _resolve(self, source: Source) -> str:
        self.sources.append(source)
        self.released.wait(30)
        return self._answer()


async def test_the_models_of_a_source_get_one_commit_from_one_request() -> None:
    hub = FakeHub(lambda: COMMIT)
    decoder = MAIN.model_copy(update={"subfolder": "vae"})
    assert hub.pins.of(MAIN, "base") is None
    assert hub.pins.of(decoder, "pixels") is None
    hub.released.set()
    assert {await hub.notified.get(), await hub.notified.get()} == {"base", "pixels"}
    assert hub.pins.of(decoder, "pixels") == Source(uri="hf://org/repo", subfolder="vae", revision=COMMIT)
    assert hub.pins.of(MAIN, "text") == Source(uri="hf://org/repo", revision=COMMIT)
    assert hub.sources == [MAIN]


async def test_every_model_gets_a_refusal_and_the_hub_is_not_asked_again_meanwhile() -> None:
    def refuse() -> str:
        raise Refusal(ConditionReason.REPOSITORY_NOT_FOUND, "There is none.")

    hub = FakeHub(refuse)
    hub.released.set()
    assert hub.pins.of(MAIN, "base") is None
    assert await hub.notified.get() == "base"
    for key in ("base", "pixels", "base"):
        answer = hub.pins.of(MAIN, key)
        assert isinstance(answer, Refusal)
        assert answer.reason == "RepositoryNotFound"
    assert hub.sources == [MAIN]


async def test_an_unexpected_error_is_reported_and_the_request_is_retried() -> None:
    outcomes = iter([ValueError("no JSON"), None])

    def answer() -> str:
        if error := next(outcomes):
            raise error
        return COMMIT

    hub = FakeHub(answer)
    hub.released.set()
    hub.pins.of(MAIN, "base")
    while not isinstance(known := hub.pins.of(MAIN, "base"), Source):
        await hub.notified.get()
        if isinstance(known, Refusal):
            assert known.message == "The request to the hub for hf://org/repo failed: ValueError: no JSON"
    assert known.revision == COMMIT
    assert len(hub.sources) == 2
