"""Builds the tokenizer: a byte-pair vocabulary in which every word of the grammar is one token.

Other words become byte tokens, which training never used, so that every prompt is accepted.
"""

from __future__ import annotations

import itertools
from collections import Counter

from transformers import CLIPTokenizer

from .grammar import words
from .settings import TOKENS

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def _byte_letters() -> list[str]:
    """The printable characters by which byte-level BPE represents the 256 bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + k) for k in range(len(rest))]


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def _merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Merges the most frequent pair first, until every word is one piece; BPE applies merges in the same order."""
    split = [[*word[:-1], word[-1] + _WORD_END] for word in vocabulary]
    merges = []
    while pairs := Counter(pair for word in split for pair in itertools.pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = [_merged(word, best) for word in split]
    return merges


def build() -> CLIPTokenizer:
    letters = _byte_letters()
    merges = _merges(words())
    pieces = [*letters, *(letter + _WORD_END for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)
