"""Resolves the revisions of `hf://` sources to commits, once for each model, whose status records the commit.

So every replica loads the same weights, whatever happens to the branch. A pass over a model asks `Pins` and does not
wait: the pass runs again when the answer arrives, and again with backoff while the hub refuses.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from urllib.parse import urlparse

import structlog
from latentflow.api import Source
from latentflow.api.conditions import ConditionReason
from latentflow.api.types import ServedModel
from latentflow.internal import source_uri

Key = TypeVar("Key", bound=Hashable)
Served = TypeVar("Served", bound=ServedModel)
_log = structlog.get_logger()
_COMMIT = re.compile("[0-9a-f]{40}")
_FIRST_SECONDS, _MAX_SECONDS = 1.0, 60.0
# How long an answer is reused for other models, so that all models of a workflow load one commit.
_KEPT_SECONDS = 60.0
_TIMEOUT_SECONDS, _CONCURRENT_REQUESTS = 10.0, 4


class Refusal(Exception):
    """The hub returned no commit.

    Args:
        message: One sentence, which stays the same as long as the problem is the same.
    """

    def __init__(self, reason: ConditionReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def recorded(source: Source, resolved: Source | None) -> Source | None:
    """The source with a commit as its revision, if it is known without the hub.

    Sources of other schemes are returned unchanged.

    Args:
        resolved: The resolved source in the model's status, if any.
    """
    if urlparse(source.uri).scheme != "hf" or (source.revision and _COMMIT.fullmatch(source.revision)):
        return source
    if resolved is None or (resolved.uri, resolved.subfolder) != (source.uri, source.subfolder):
        return None
    if not _COMMIT.fullmatch(resolved.revision or ""):
        return None
    return source.model_copy(update={"revision": resolved.revision})


def all_recorded(model: Served, resolved: Mapping[str, Source]) -> Served | None:
    """A model with commits as the revisions of all its sources, if they are known without the hub.

    Args:
        resolved: The resolved sources in its status, named as `ServedModel.sources` names them.
    """
    found: dict[str, Source] = {}
    for name, source in model.sources().items():
        known = recorded(source, resolved.get(name))
        if known is None:
            return None
        found[name] = known
    return model.with_sources(found)


@dataclass(kw_only=True)
class _Lookup(Generic[Key]):
    """The lookup of one revision of one repository, and the keys that wait for it."""

    commit: str | None = None
    refusal: Refusal | None = None
    failures: int = 0
    pending: bool = False
    waiting: set[Key] = field(default_factory=set)


class Pins(Generic[Key]):
    """The commits of hub sources.

    Args:
        resolve: Returns the commit of a source or raises Refusal; blocks.
        notify: Called with a waiting key when the answer of `of` has changed.
    """

    def __init__(self, resolve: Callable[[Source], str], *, notify: Callable[[Key], None]) -> None:
        self._resolve = resolve
        self._notify = notify
        self._lookups: dict[tuple[str, str | None], _Lookup[Key]] = {}
        # Own threads, so that a hub that does not answer delays nothing else.
        self._threads = ThreadPoolExecutor(_CONCURRENT_REQUESTS, thread_name_prefix="hub")
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, source: Source, key: Key) -> Source | Refusal | None:
        """The source with its commit; the last Refusal, while the lookup is retried; None before the first answer."""
        lookup = self._lookups.setdefault((source.uri, source.revision), _Lookup())
        if lookup.commit is not None:
            return source.model_copy(update={"revision": lookup.commit})
        lookup.waiting.add(key)
        if not lookup.pending:
            lookup.pending = True
            task = asyncio.create_task(self._run(source, lookup))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return lookup.refusal

    async def _run(self, source: Source, lookup: _Lookup[Key]) -> None:
        loop = asyncio.get_running_loop()
        try:
            lookup.commit = await loop.run_in_executor(self._threads, self._resolve, source)
            loop.call_later(_KEPT_SECONDS, self._lookups.pop, (source.uri, source.revision), None)
            _log.info(
                "resolved a revision to a commit",
                source=source.uri,
                revision=source.revision,
                commit=lookup.commit,
            )
        except Exception as error:
            lookup.refusal = error if isinstance(error, Refusal) else _unexpected(source, error)
            lookup.failures += 1
            seconds = min(_MAX_SECONDS, _FIRST_SECONDS * 2 ** (lookup.failures - 1))
            loop.call_later(seconds, self._allow_retry, lookup)
            _log.warning(
                "could not resolve a revision to a commit; retrying",
                source=source.uri,
                seconds=seconds,
                reason=str(lookup.refusal),
            )
        self._notify_waiting(lookup)

    def _allow_retry(self, lookup: _Lookup[Key]) -> None:
        lookup.pending = False
        self._notify_waiting(lookup)

    def _notify_waiting(self, lookup: _Lookup[Key]) -> None:
        waiting = frozenset(lookup.waiting)
        # Keys stay registered until a retry is allowed. A key that still needs the commit then calls `of` again.
        if lookup.commit is not None or not lookup.pending:
            lookup.waiting.clear()
        for key in waiting:
            self._notify(key)


def _unexpected(source: Source, error: Exception) -> Refusal:
    details = " ".join(str(error).split())
    return Refusal(
        ConditionReason.HUB_UNREACHABLE,
        f"The request to the hub for {source.uri} failed: {type(error).__name__}: {details}"[:500],
    )


def resolve_commit(source: Source, *, endpoint: str | None) -> str:
    """Asks the hub for the commit of a source's revision, or of its main branch.

    Raises Refusal if the hub returns none.

    Args:
        endpoint: The hub's URL; None: that of HF_ENDPOINT, or the public one.
    """
    # Imported here, because an operator without hub sources need not spend the time and memory.
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi(endpoint=endpoint)
    repository = source_uri.repository(source.uri)
    try:
        commit = api.model_info(repository, revision=source.revision, timeout=_TIMEOUT_SECONDS).sha
    except GatedRepoError:
        raise Refusal(
            ConditionReason.REPOSITORY_GATED,
            f"The hub grants access to {repository} only to accounts that accepted its terms: accept them, and set "
            "operator.hubSecret and models.hubSecret of the chart to a token of that account.",
        ) from None
    except RepositoryNotFoundError:
        raise Refusal(
            ConditionReason.REPOSITORY_NOT_FOUND,
            f"The hub has no repository {repository}, or does not show it to this account: check the name; for a "
            "private repository set operator.hubSecret and models.hubSecret of the chart.",
        ) from None
    except HFValidationError:
        raise Refusal(
            ConditionReason.REPOSITORY_NOT_FOUND,
            f"{repository!r} is not a valid name of a repository of the hub: correct the source.",
        ) from None
    except RevisionNotFoundError:
        raise Refusal(
            ConditionReason.REVISION_NOT_FOUND,
            f"The repository {repository} has no branch, tag or commit {source.revision!r}: correct the revision.",
        ) from None
    except HfHubHTTPError as error:
        raise _unreachable(api.endpoint, f"answered with status {error.response.status_code}") from None
    except (httpx2.HTTPError, OSError) as error:
        raise _unreachable(api.endpoint, f"cannot be reached ({type(error).__name__})") from None
    if commit is None or not _COMMIT.fullmatch(commit):
        raise _unreachable(api.endpoint, f"returned no commit of {repository}")
    return commit


def _unreachable(endpoint: str, problem: str) -> Refusal:
    return Refusal(
        ConditionReason.HUB_UNREACHABLE,
        f"The hub at {endpoint} {problem}; the operator retries. Let the operator reach it, set models.hubEndpoint of "
        "the chart to a mirror, or give the commit as the revision.",
    )
