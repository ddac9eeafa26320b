"""Which commit a source means, and how seldom the hub is asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow.api import Source
from latentflow_operator.pinning import Pins, Refusal, recorded

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
def test_what_has_no_branch_needs_no_hub(source: Source) -> None:
    assert recorded(source, {}) == source


def test_what_was_recorded_stands() -> None:
    status = {"source": {"uri": "hf://org/repo", "revision": COMMIT}}
    assert recorded(MAIN, status) == Source(uri="hf://org/repo", revision=COMMIT)


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
def test_only_a_commit_of_the_same_source_stands(source: dict[str, str]) -> None:
    same = source == {"uri": "hf://org/repo", "revision": COMMIT}
    assert (recorded(MAIN, {"source": source}) is not None) == same


class Asked:
    """A hub that answers when it is let, and who was woken."""

    def __init__(self, answer: Callable[[], str]) -> None:
        self.sources: list[Source] = []
        self.let = threading.Event()
        self.woken: asyncio.Queue[str] = asyncio.Queue()
        self._answer = answer
        self.pins: Pins[str] = Pins(self._ask, wake=self.woken.put_nowait)

    def _ask(self, source: Source) -> str:
        self.sources.append(source)
        self.let.wait(30)
        return self._answer()


async def test_the_models_of_a_source_get_one_commit_by_one_question() -> None:
    asked = Asked(lambda: COMMIT)
    decoder = MAIN.model_copy(update={"subfolder": "vae"})
    assert asked.pins.of(MAIN, "base") is None
    assert asked.pins.of(decoder, "pixels") is None
    asked.let.set()
    assert {await asked.woken.get(), await asked.woken.get()} == {"base", "pixels"}
    assert asked.pins.of(decoder, "pixels") == Source(uri="hf://org/repo", subfolder="vae", revision=COMMIT)
    assert asked.pins.of(MAIN, "text") == Source(uri="hf://org/repo", revision=COMMIT)
    assert asked.sources == [MAIN]


async def test_a_refusal_is_told_to_all_who_ask_and_the_hub_is_left_in_peace_meanwhile() -> None:
    def refuse() -> str:
        raise Refusal("RepositoryNotFound", "There is none.")

    asked = Asked(refuse)
    asked.let.set()
    assert asked.pins.of(MAIN, "base") is None
    assert await asked.woken.get() == "base"
    for key in ("base", "pixels", "base"):
        answer = asked.pins.of(MAIN, key)
        assert isinstance(answer, Refusal)
        assert answer.reason == "RepositoryNotFound"
    assert asked.sources == [MAIN]


async def test_what_goes_wrong_unexpectedly_is_told_and_asked_again() -> None:
    outcomes = iter([ValueError("no JSON"), None])

    def answer() -> str:
        if error := next(outcomes):
            raise error
        return COMMIT

    asked = Asked(answer)
    asked.let.set()
    asked.pins.of(MAIN, "base")
    while not isinstance(known := asked.pins.of(MAIN, "base"), Source):
        await asked.woken.get()
        if isinstance(known, Refusal):
            assert known.message == "Asking the hub about hf://org/repo failed: ValueError: no JSON"
    assert known.revision == COMMIT
    assert len(asked.sources) == 2
