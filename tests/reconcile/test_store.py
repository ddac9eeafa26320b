"""The known state of the API server's objects, in whichever order watch events and responses arrive."""

from __future__ import annotations

from typing import Any

from latentflow_operator.store import Store


def service(*, uid: str = "1", version: int = 1) -> dict[str, Any]:
    metadata = {"namespace": "art", "name": "vae-1", "uid": uid, "resourceVersion": str(version)}
    return {"kind": "Service", "metadata": metadata}


def version(store: Store) -> int | None:
    known = store.get("Service", "art", "vae-1")
    return known.resource_version if known is not None else None


def test_the_newer_object_is_kept_in_whichever_order_both_arrive() -> None:
    store = Store()
    assert store.put(service(version=2))
    assert not store.put(service(version=1))
    assert version(store) == 2


def test_a_response_that_arrives_after_the_deletion_does_not_restore_the_object() -> None:
    store = Store()
    store.put(service(version=1))
    store.drop(service(version=3))
    assert not store.put(service(version=2))
    assert version(store) is None


def test_a_recreated_object_is_not_mistaken_for_the_deleted_one() -> None:
    store = Store()
    store.put(service(uid="1"))
    store.put(service(uid="2", version=5))
    assert not store.drop(service(uid="1", version=4))
    assert version(store) == 5
