"""Updates the tables in the pack's README from the manifest: training stages and hashes of the weights."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from . import export

README = "README.md"


def _stages(manifest: dict[str, Any]) -> list[str]:
    rows = ["| stage | steps | batch | rate | threads | minutes |", "|---|---|---|---|---|---|"]
    for name, stage in manifest["stages"].items():
        minutes = stage["seconds"] / 60
        rows.append(
            f"| {name} | {stage['steps']} | {stage['batch']} | {stage['rate']} | {stage['threads']} | {minutes:.1f} |"
        )
    return rows


def _hashes(manifest: dict[str, Any], folder: Path) -> list[str]:
    rows = ["| file | bytes | sha256 |", "|---|---|---|"]
    for name, digest in manifest["sha256"].items():
        rows.append(f"| `{name}` | {(folder / name).stat().st_size:,} | `{digest}` |")
    return rows


def _filled(text: str, name: str, rows: list[str]) -> str:
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return block.sub(lambda found: found[1] + "\n".join(rows) + "\n" + found[2], text)


def update(folder: Path) -> None:
    """Rewrites the marked tables of the README; does nothing in a folder without one."""
    path = folder / README
    if not path.exists():
        return
    manifest = json.loads((folder / export.MANIFEST).read_text(encoding="utf-8"))
    text = path.read_text(encoding="utf-8")
    text = _filled(text, "stages", _stages(manifest))
    text = _filled(text, "hashes", _hashes(manifest, folder))
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
