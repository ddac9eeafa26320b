r"""PEFT's patterns of layer names, by which a configuration gives some layers another rank or alpha. Pure.

PEFT accepts every regular expression. Some of them take exponential time, in which Python's matcher holds the interpreter,
so that one file would stop the server. Accepted is the part that names of layers need: characters, `.`, classes of
characters such as `[02]` and `\d`, `.*`, and the anchors. It is matched without exponential backtracking.
"""

from __future__ import annotations

import re

_CHARACTER = r"[\w.-]|\\[dw.-]|\[[\w.-]+\]"
_PATTERN = re.compile(rf"\^?(?:\.\*|{_CHARACTER})*\$?", re.ASCII)
_PIECE = re.compile(rf"\.\*|{_CHARACTER}", re.ASCII)
_ANYTHING = ".*"


def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern whose `match` finds the layers that PEFT finds: by the whole name, or by its last segments.

    Raises:
        ValueError: It is another regular expression. The message is the end of a sentence.
    """
    if not _PATTERN.fullmatch(pattern):
        raise ValueError("is no name of layers; write names, with .* for any text and an entry for each alternative")
    chunks = [""]
    for piece in _PIECE.findall(pattern.removeprefix("^").removesuffix("$")):
        if piece == _ANYTHING:
            chunks.append("")
        else:
            chunks[-1] += piece
    is_whole = pattern.startswith("^")
    first, *others = chunks
    if not others:
        text = first if is_whole else rf"(?:.*\.)?{first}"
    else:
        *middle, last = others
        # The first place of each chunk leaves the most text for the others, so it is final: the groups are atomic.
        start = first if is_whole else rf"(?:.*?\.)??{first}"
        text = f"(?>{start})" + "".join(f"(?>.*?{chunk})" for chunk in middle) + f".*{last}"
    try:
        return re.compile(text + "$")
    except re.error as error:
        raise ValueError(f"is no pattern ({error})") from None
