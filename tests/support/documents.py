"""Code blocks of documents, for the tests that run them."""

from __future__ import annotations

import re
import textwrap

from support.paths import ROOT


def blocks(document: str, language: str) -> list[str]:
    """The code blocks of a language in a document."""
    found = re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    # Blocks in lists are indented.
    return [textwrap.dedent(block) for block in found]
