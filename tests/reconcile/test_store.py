"""What the operator knows of the API server's objects, whichever way the news comes."""

from __future__ import annotations

from typing import Any

from latentflow_operator.store import Store


def service(*, uid: str = "1", version: int = 1) -> dict[str, Any]:
    metadata = {"namespace": "art", "name": "vae-1", "uid": uid, "resourceVersion": str(version)}
    return {"kind": "Service", "metadata": metadata}


def version(store: Store) -> str | None:
    known = store.get("Service", "art", "vae-1")
    return None if known is None else str(known["metadata"]["resourceVersion"])


def test_the_newer_body_stays_whichever_comes_last() -> None:
    store = Store()
    assert store.put(service(version=2))
    assert not store.put(service(version=1))
    assert version(store) == "2"


def test_an_answer_that_comes_after_the_news_of_the_deletion_brings_nothing_back() -> None:
    store = Store()
    store.put(service(version=1))
    store.drop(service(version=3))
    assert not store.put(service(version=2))
    assert version(store) is None


def test_an_object_that_was_made_again_is_not_taken_for_the_one_that_went() -> None:
    store = Store()
    store.put(service(uid="1"))
    store.put(service(uid="2", version=5))
    assert not store.drop(service(uid="1", version=4))
    assert version(store) == "5"
