"""Weights from a hub of models: `hf://` sources, by huggingface_hub, whose cache several servers may share.

That library caches files, resumes interrupted downloads, locks a file during its download, and sends no request for a
commit that is completely in the cache.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from latentflow.errors import FailedPreconditionError
from latentflow.internal import source_uri
from latentflow.reasons import Reason
from tqdm.auto import tqdm

from latentflow_nodes.weights.fetching import Progress, Wanted


def fetch(uri: str, *, revision: str | None, wanted: Wanted, progress: Progress) -> Path:
    """The folder of a repository's files; FailedPreconditionError, in one sentence, where it cannot be fetched."""
    at = f"{uri}@{revision}" if revision else uri
    try:
        return Path(
            snapshot_download(
                source_uri.repository(uri),
                revision=revision,
                allow_patterns=list(wanted.allow),
                ignore_patterns=list(wanted.ignore),
                # Read at each call; the library itself reads it only at its import.
                endpoint=os.environ.get("HF_ENDPOINT"),
                tqdm_class=_bars(progress),
            )
        )
    except GatedRepoError:
        why = "the repository is gated; accept its terms, and set HF_TOKEN to a token of that account"
    except RepositoryNotFoundError:
        why = "the hub has no such repository, or it is private; check the name and HF_TOKEN"
    except RevisionNotFoundError:
        why = "the repository has no such branch, tag or commit; check the revision"
    except HFValidationError as error:
        why = f"that is not the name of a repository ({_line(error)}); check the uri"
    except (IncompleteSnapshotError, LocalEntryNotFoundError):
        why = "the hub cannot be reached and the cache is incomplete; check the network and HF_ENDPOINT"
    except HfHubHTTPError as error:
        why = f"the hub answered {error.response.status_code}; try again later, or check HF_ENDPOINT and HF_TOKEN"
    except (httpx2.HTTPError, OSError) as error:
        why = f"{_line(error)}; check the network, HF_ENDPOINT and the space of the cache"
    raise FailedPreconditionError(f"{at} could not be fetched: {why}.", reason=Reason.WEIGHTS_UNAVAILABLE) from None


def names(uri: str, *, revision: str | None) -> list[str]:
    """The paths of all files of a repository; none where the hub cannot list them."""
    try:
        return HfApi(endpoint=os.environ.get("HF_ENDPOINT")).list_repo_files(
            source_uri.repository(uri), revision=revision
        )
    except (HfHubHTTPError, httpx2.HTTPError, OSError):
        return []


def _bars(progress: Progress) -> type[tqdm[Any]]:
    """A class of progress bars, as the library expects, that reports to `progress` instead of drawing.

    The library makes several bars. Those that count bytes matter; which of them advances depends on the transfer protocol.
    """
    lock, bars = threading.Lock(), list[Any]()

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": True})
            self._counts_bytes = options.get("unit") == "B"
            if self._counts_bytes:
                bars.append(self)

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                self._report()

        def refresh(self, *args: Any, **options: Any) -> None:
            with lock:
                self._report()

        def _report(self) -> None:
            if self._counts_bytes:
                progress.at(int(max(bar.n for bar in bars)), int(max(bar.total or 0 for bar in bars)))

    return Bar


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__
