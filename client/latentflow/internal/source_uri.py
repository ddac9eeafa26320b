"""What the URIs of sources name: paths of this machine, repositories of a hub, and single files."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlparse

# Of a file that holds all weights of a model.
SINGLE_FILE = ".safetensors"
_HUBS = ("huggingface.co", "www.huggingface.co", "hf.co")
# Organisations and repositories of a hub.
_HUB_NAME = re.compile(r"(?!.*(?:--|\.\.))(?!.*\.git$)\w(?:[\w.-]{0,94}\w)?", re.ASCII)
# The path in the address of a file's web page: the kind of the page, the revision, the path of the file.
_PAGE = re.compile(r"(blob|resolve|raw)/([^/]+)/(.+)")


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


def doubt_of_repository(uri: str) -> str | None:
    """Why an `hf:` URI of the right form is probably mistyped, as a clause; None if nothing shows that."""
    named, path = repository(uri), path_in_repository(uri)
    organisation, name = named.split("/")
    if organisation.lower() in _HUBS:
        return f"{organisation} is the address of the hub; write hf://ORGANISATION/{name}"
    for part in (organisation, name):
        if not _HUB_NAME.fullmatch(part):
            return (
                f"{part!r} in {uri} is no name on a hub: names have up to 96 letters, digits, '-', '_' and '.', begin and end "
                "with none of '-' and '.', have no '--' and no '..', and do not end with .git"
            )
    if page := _PAGE.fullmatch(path):
        kind, revision, file = page.groups()
        return f"{kind}/{revision} is part of the address of a web page; write hf://{named}/{file} and revision: {revision}"
    return None


def bare_repository(uri: str) -> str | None:
    """The repository of a hub that a relative URI may mean, with or without the host of the hub; None if it has another form."""
    host, _, rest = uri.partition("/")
    named = rest if host.lower() in _HUBS else uri
    organisation, _, name = named.partition("/")
    return named if _HUB_NAME.fullmatch(organisation) and _HUB_NAME.fullmatch(name) else None


def hub_of_missing(uri: str, model_root: Path) -> str:
    """The `hf:` URI that a missing relative source may mean, as the end of a clause; empty if nothing shows that.

    Args:
        uri: A relative URI that the model root does not have.
    """
    repository = bare_repository(uri)
    if repository is None or (model_root / repository.split("/")[0]).exists():
        return ""
    return f"; for the repository of a hub, write hf://{repository}"


def hub_of_page(uri: str) -> str | None:
    """The `hf:` URI of the repository that the address of a hub's web page names; None for another address."""
    parsed = urlparse(uri)
    if parsed.scheme not in ("http", "https") or parsed.netloc.lower() not in _HUBS:
        return None
    named = bare_repository("/".join(parsed.path.split("/")[1:3]))
    return f"hf://{named}" if named else None


def is_single_file(uri: str) -> bool:
    """Whether a source names a file that holds all weights of a model."""
    return uri.endswith(SINGLE_FILE)
