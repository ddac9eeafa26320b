"""What the URIs of sources name: paths of this machine, repositories of a hub, and single files."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlparse

# Of a file that holds all weights of a model.
SINGLE_FILE = ".safetensors"


def file_path(uri: str) -> Path:
    """The absolute path of a `file:` URI (RFC 8089).

    ValueError for another machine's file, a relative path, a query or a fragment.
    """
    parsed = urlparse(uri)
    if parsed.netloc not in ("", "localhost") or not parsed.path.startswith("/"):
        raise ValueError("a file URI names an absolute path: file:///abs/path, with three slashes")
    if "?" in uri or "#" in uri or "%00" in uri:
        raise ValueError("? and # end the path of a URI; write %3F and %23 for those of a folder's name")
    return Path(unquote(parsed.path))


def repository(uri: str) -> str:
    """The repository of an `hf:` URI, such as org/repo."""
    return "/".join(uri.removeprefix("hf://").split("/")[:2])


def path_in_repository(uri: str) -> str:
    """The path of the file in its repository that an `hf:` URI names; empty if it names a repository."""
    return "/".join(uri.removeprefix("hf://").split("/")[2:])


def is_single_file(uri: str) -> bool:
    """Whether a source names a file that holds all weights of a model."""
    return uri.endswith(SINGLE_FILE)
