"""The path that a `file:` URI names (RFC 8089)."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlparse


def path(uri: str) -> Path:
    """The absolute path. ValueError for another machine's file, a relative path, a query or a fragment."""
    parsed = urlparse(uri)
    if parsed.netloc not in ("", "localhost") or not parsed.path.startswith("/"):
        raise ValueError("a file URI names an absolute path: file:///abs/path, with three slashes")
    if "?" in uri or "#" in uri or "%00" in uri:
        raise ValueError("? and # end the path of a URI; write %3F and %23 for those of a folder's name")
    return Path(unquote(parsed.path))
