"""Code blocks of documents, for the tests that run them."""

from __future__ import annotations

import re

from support.paths import ROOT


def blocks(document: str, language: str) -> list[str]:
    """The code blocks of a language in a document."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
