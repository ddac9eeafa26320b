"""The contact sheet: pictures with their captions, for visual inspection."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .evaluation import Row

_SIDE, _GAP, _TITLE, _TEXT = 128, 6, 22, 58
_LETTERS = 22


def _height(row: Row) -> int:
    return _TITLE + _SIDE + _TEXT + _GAP


def compose(rows: Sequence[Row]) -> Image.Image:
    width = _GAP + max(len(row.images) for row in rows) * (_SIDE + _GAP)
    sheet = Image.new("RGB", (width, _GAP + sum(_height(row) for row in rows)), (225, 228, 232))
    pen, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(11), _GAP
    for row in rows:
        pen.text((_GAP, top + 3), row.title, fill=(20, 20, 20), font=ImageFont.load_default(14))
        for k, (text, image) in enumerate(zip(row.captions, row.images, strict=True)):
            left = _GAP + k * (_SIDE + _GAP)
            tile = Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, top + _TITLE))
            wrapped = "\n".join(textwrap.wrap(text, _LETTERS))
            pen.multiline_text((left, top + _TITLE + _SIDE + 2), wrapped, fill=(40, 40, 40), font=font, spacing=1)
        top += _height(row)
    return sheet


def write(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    compose(rows).save(path)
