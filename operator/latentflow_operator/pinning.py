"""Which commit an `hf://` source means: asked of the hub once for a model and then recorded in its status.

So every replica that is ever started loads the same, whatever becomes of the branch. A pass over a model asks `Pins` and
waits for nothing: it is made again when the answer is there, and again, later and later, while there is none.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import urlparse

import structlog
from latentflow.api import Source

Key = TypeVar("Key", bound=Hashable)
_log = structlog.get_logger()
_COMMIT = re.compile("[0-9a-f]{40}")
_FIRST_SECONDS, _MOST_SECONDS = 1.0, 60.0
# For so long an answer also serves those who ask later, so that the models of one workflow load one commit.
_KEPT_SECONDS = 60.0
_ANSWER_SECONDS, _AT_ONCE = 10.0, 4


class Refusal(Exception):
    """The hub names no commit.

    Args:
        reason: One CamelCase word, as in a condition.
        message: One sentence, the same as long as the trouble is the same.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def recorded(source: Source, status: Mapping[str, Any]) -> Source | None:
    """The source with its commit, as far as it is known without a hub; other schemes have none and stay as they are.

    Args:
        status: Of the model.
    """
    if urlparse(source.uri).scheme != "hf" or (source.revision and _COMMIT.fullmatch(source.revision)):
        return source
    known = status.get("source", {})
    revision = known.get("revision", "")
    if (known.get("uri"), known.get("subfolder")) != (source.uri, source.subfolder) or not _COMMIT.fullmatch(revision):
        return None
    return source.model_copy(update={"revision": revision})


@dataclass(kw_only=True)
class _Question(Generic[Key]):
    """What is known of one revision of one repository, and who waits for it."""

    commit: str | None = None
    refusal: Refusal | None = None
    failures: int = 0
    open: bool = False
    waiting: set[Key] = field(default_factory=set)


class Pins(Generic[Key]):
    """The commits of sources.

    Args:
        ask: The commit of a source, or a Refusal; blocks.
        wake: Called with who asked when there is something new to know.
    """

    def __init__(self, ask: Callable[[Source], str], *, wake: Callable[[Key], None]) -> None:
        self._ask = ask
        self._wake = wake
        self._questions: dict[tuple[str, str | None], _Question[Key]] = {}
        # Threads of their own: a hub that does not answer keeps nothing else waiting.
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="hub")
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, source: Source, key: Key) -> Source | Refusal | None:
        """The source with its commit; why there is none, while it is asked for again; None before the first answer."""
        question = self._questions.setdefault((source.uri, source.revision), _Question())
        if question.commit is not None:
            return source.model_copy(update={"revision": question.commit})
        question.waiting.add(key)
        if not question.open:
            question.open = True
            task = asyncio.create_task(self._answer(source, question))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return question.refusal

    async def _answer(self, source: Source, question: _Question[Key]) -> None:
        loop = asyncio.get_running_loop()
        try:
            question.commit = await loop.run_in_executor(self._threads, self._ask, source)
            loop.call_later(_KEPT_SECONDS, self._questions.pop, (source.uri, source.revision), None)
            _log.info("pinned", source=source.uri, revision=source.revision, commit=question.commit)
        except Exception as error:
            question.refusal = error if isinstance(error, Refusal) else _unexpected(source, error)
            question.failures += 1
            seconds = min(_MOST_SECONDS, _FIRST_SECONDS * 2 ** (question.failures - 1))
            loop.call_later(seconds, self._reopen, question)
            _log.warning("could not pin; trying again", source=source.uri, seconds=seconds, why=str(question.refusal))
        self._tell(question)

    def _reopen(self, question: _Question[Key]) -> None:
        question.open = False
        self._tell(question)

    def _tell(self, question: _Question[Key]) -> None:
        waiting = frozenset(question.waiting)
        # Of those who are told of a refusal, who still wants to know asks again when the question is open again.
        if question.commit is not None or not question.open:
            question.waiting.clear()
        for key in waiting:
            self._wake(key)


def _unexpected(source: Source, error: Exception) -> Refusal:
    said = " ".join(str(error).split())
    return Refusal("HubUnreachable", f"Asking the hub about {source.uri} failed: {type(error).__name__}: {said}"[:500])


def ask_hub(source: Source, *, endpoint: str | None) -> str:
    """The commit of a source's revision, or of its main branch. Refusal where the hub names none.

    Args:
        endpoint: The hub's URL; None: as HF_ENDPOINT says, or the public one.
    """
    # Imported here: it takes time and memory that an operator without such sources need not spend.
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
    repository = urlparse(source.uri).netloc + urlparse(source.uri).path
    try:
        commit = api.model_info(repository, revision=source.revision, timeout=_ANSWER_SECONDS).sha
    except GatedRepoError:
        raise Refusal(
            "RepositoryGated",
            f"The hub gives {repository} only to those who accepted its terms: accept them, and set operator.hubSecret and "
            "models.hubSecret of the chart to a token of that account.",
        ) from None
    except RepositoryNotFoundError:
        raise Refusal(
            "RepositoryNotFound",
            f"The hub has no repository {repository}, or shows it to others only: check the name; for a private one set "
            "operator.hubSecret and models.hubSecret of the chart.",
        ) from None
    except HFValidationError:
        raise Refusal(
            "RepositoryNotFound", f"No repository of the hub can be named {repository!r}: correct the source."
        ) from None
    except RevisionNotFoundError:
        raise Refusal(
            "RevisionNotFound",
            f"The repository {repository} has no branch, tag or commit {source.revision!r}: correct the revision.",
        ) from None
    except HfHubHTTPError as error:
        raise _unreachable(api.endpoint, f"answered {error.response.status_code}") from None
    except (httpx2.HTTPError, OSError) as error:
        raise _unreachable(api.endpoint, f"cannot be reached ({type(error).__name__})") from None
    if commit is None or not _COMMIT.fullmatch(commit):
        raise _unreachable(api.endpoint, f"named no commit of {repository}")
    return commit


def _unreachable(endpoint: str, what: str) -> Refusal:
    return Refusal(
        "HubUnreachable",
        f"The hub at {endpoint} {what}; it is asked again. Let the operator reach it, set models.hubEndpoint of the chart to "
        "a mirror, or give the commit as the revision.",
    )
