"""Weights from an S3 bucket: `s3://bucket/path` sources, by boto3, into a cache that several servers may share.

boto3 takes endpoint, region and credentials from the same places as AWS's own tools: environment, profile, the identity of
a pod or a machine. The files of a listing are downloaded into a folder, which is renamed to a hash of the listing when all
of them are there. So a folder of that name is complete, even if a process was killed during the download.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import structlog
from boto3.exceptions import S3TransferFailedError
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError
from filelock import FileLock, Timeout
from latentflow.errors import FailedPreconditionError
from latentflow.internal.weight_names import SUFFIX
from latentflow.reasons import Reason

from latentflow_nodes.weights.fetching import Progress, Wanted

_log = structlog.get_logger()
_FILES_AT_ONCE, _CONNECT_SECONDS, _SERVER_FAILED = 4, 10, 500
_CHANGED = "the files changed during the download; start again"
_DENIED = {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}


@dataclass(frozen=True, kw_only=True)
class _File:
    """A file of the source: its path, and what identifies its content."""

    path: str
    key: str
    size: int
    etag: str


def fetch(uri: str, *, wanted: Wanted, cache: Path, progress: Progress) -> Path:
    """The folder of the files under a prefix; FailedPreconditionError, in one sentence, where they cannot be fetched.

    Args:
        cache: Where downloads are kept; may be shared with servers of other nodes.
    """
    bucket, prefix = _split(uri)
    home = cache / "s3" / _digest([uri, wanted.allow, wanted.ignore])
    signed = True
    try:
        client, signed = _client()
        listed = functools.partial(_listed, client, bucket, prefix, wanted)
        files = listed()
        if files:
            return _download(client, bucket, files, home, progress, listed=listed)
        why = "it contains neither weights nor configuration of this role; check the path and the subfolder"
    except (BotoCoreError, ClientError, S3TransferFailedError, OSError, ValueError) as error:
        if _is_out_of_reach(error) and (kept := _newest(home)):
            _log.warning("bucket cannot be reached; serving the last download", source=uri, error=_line(error))
            return kept
        why = _why(error, bucket, cache, signed=signed)
    raise FailedPreconditionError(f"{uri} could not be fetched: {why}.", reason=Reason.WEIGHTS_UNAVAILABLE) from None


def names(uri: str) -> list[str]:
    """The paths of all files under a prefix; none where the store cannot list them."""
    try:
        client, _ = _client()
        return sorted(_entries(client, *_split(uri)))
    except (BotoCoreError, ClientError, OSError, ValueError):
        return []


def _split(uri: str) -> tuple[str, str]:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if prefix.endswith(SUFFIX):
        # A single file, which is read with what is beside it.
        prefix = prefix.rpartition("/")[0]
    return bucket, prefix.strip("/")


def _client() -> tuple[Any, bool]:
    """A client of the store, and whether it has credentials."""
    session = boto3.Session()
    signed = session.get_credentials() is not None
    # Public buckets need no credentials.
    config = Config(signature_version=None if signed else UNSIGNED, connect_timeout=_CONNECT_SECONDS)
    return session.client("s3", config=config), signed


def _entries(client: Any, bucket: str, prefix: str) -> dict[str, Any]:
    """What the store lists under a prefix, by the path behind it."""
    root = f"{prefix}/" if prefix else ""
    return {
        entry["Key"].removeprefix(root): entry
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=root)
        for entry in page.get("Contents", ())
    }


def _listed(client: Any, bucket: str, prefix: str, wanted: Wanted) -> list[_File]:
    found = _entries(client, bucket, prefix)
    return [
        _File(path=path, key=found[path]["Key"], size=found[path]["Size"], etag=found[path]["ETag"])
        for path in wanted.of(sorted(found))
        # An object's key may be any text; a file's path must stay in its folder.
        if not {"", ".", ".."} & set(path.split("/"))
    ]


def _download(
    client: Any,
    bucket: str,
    files: list[_File],
    home: Path,
    progress: Progress,
    *,
    listed: Callable[[], list[_File]],
) -> Path:
    whole = home / _digest([[file.path, file.size, file.etag] for file in files])
    if whole.is_dir():
        return whole
    home.mkdir(parents=True, exist_ok=True)
    with _alone(FileLock(f"{whole}.lock"), progress):
        if not whole.is_dir():
            part = whole.with_suffix(".part")
            _fill(client, bucket, files, part, progress)
            if listed() != files:
                shutil.rmtree(part)
                raise OSError(_CHANGED)
            part.rename(whole)
    return whole


def _alone(lock: FileLock, progress: Progress) -> AbstractContextManager[Any]:
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        progress.waiting()
        return lock.acquire()


def _fill(client: Any, bucket: str, files: list[_File], folder: Path, progress: Progress) -> None:
    """Downloads the missing files of a folder. A partial download has another name than the complete file."""
    missing = [file for file in files if not (folder / file.path).is_file()]
    for path in list(_inside(folder)):
        if str(path.relative_to(folder)) not in {file.path for file in files}:
            path.unlink()
    total = sum(file.size for file in files)
    done, lock = total - sum(file.size for file in missing), threading.Lock()

    def more(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress.at(done, total)

    more(0)
    for file in files:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)

    def one(file: _File) -> None:
        path = folder / file.path
        client.download_file(bucket, file.key, str(path), Callback=more)
        if path.stat().st_size != file.size:
            path.unlink()
            raise OSError(_CHANGED)

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        try:
            for _ in pool.map(one, missing):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def _inside(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _newest(home: Path) -> Path | None:
    whole = [path for path in home.glob("*") if path.is_dir() and path.suffix == ""]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)


def _is_out_of_reach(error: Exception) -> bool:
    if isinstance(error, ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) >= _SERVER_FAILED
    return isinstance(error, ConnectionError | HTTPClientError)


def _why(error: Exception, bucket: str, cache: Path, *, signed: bool) -> str:
    code = error.response.get("Error", {}).get("Code", "") if isinstance(error, ClientError) else ""
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket!r}; check the name and AWS_ENDPOINT_URL"
    if code in _DENIED:
        how = "its credentials (AWS_ACCESS_KEY_ID) may not read it" if signed else "there are no credentials"
        return f"the store refuses ({code}): {how}; check the Secret that gives them and the bucket's policy"
    if _is_out_of_reach(error):
        return f"{_line(error)}; check the network and AWS_ENDPOINT_URL"
    if isinstance(error, OSError):
        return f"{_line(error)}; check the space of the cache {cache}"
    return f"{_line(error)}; check the AWS_* environment"


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(". ")
