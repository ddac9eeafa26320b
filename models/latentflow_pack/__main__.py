"""`python -m latentflow_pack train` makes the pack, `… eval` scores it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table

from . import evaluation, export, sheet, stages
from .settings import Settings


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="latentflow_pack", description=__doc__)
    parser.add_argument("--out", type=Path, help="the pack's folder (default: models/shapes)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train what is not finished yet, stage by stage")
    train.add_argument("--only", nargs="+", metavar="STAGE", help=f"some of {' '.join(stages.names(Settings()))}")
    train.add_argument("--work", type=Path, help="checkpoints and latents (default: $LATENTFLOW_PACK_WORK)")
    score = commands.add_parser("eval", help="score the pack and draw a contact sheet")
    score.add_argument("--sheet", type=Path, default=Path("out/pack-eval.png"), help="where the contact sheet goes")
    return parser.parse_args()


def _train(settings: Settings, only: list[str] | None) -> int:
    known = stages.names(settings)
    wanted = only or known
    if unknown := sorted(set(wanted) - set(known)):
        print(f"no such stage: {', '.join(unknown)}; choose from {', '.join(known)}", file=sys.stderr)
        return 2
    stages.Training(settings).run(wanted)
    return 0


def _table(figures: dict[str, float]) -> Table:
    table = Table("figure", "value", "bar", "", title="The shapes pack, on prompts outside its training set")
    for name, value in figures.items():
        bar = evaluation.BARS.get(name)
        mark = "" if bar is None else ("ok" if value >= bar else "MISSED")
        table.add_row(name, f"{value:.3f}", "" if bar is None else f"≥ {bar:.2f}", mark)
    return table


def _eval(settings: Settings, path: Path) -> int:
    torch.set_num_threads(settings.threads)
    if not (settings.out / "unet").exists():
        print(f"{settings.out} holds no pack; run: {export.COMMAND}", file=sys.stderr)
        return 2
    result = evaluation.whole(settings)
    sheet.write(result.rows, path)
    Console(width=100).print(_table(result.figures))
    print(f"contact sheet: {path}")
    missed = result.missed()
    for line in missed:
        print(f"bar missed: {line}", file=sys.stderr)
    print(json.dumps({"figures": result.figures}), flush=True)
    return 1 if missed else 0


def main() -> int:
    arguments = _arguments()
    settings = Settings(threads=arguments.threads)
    if arguments.out:
        settings = replace(settings, out=arguments.out)
    if arguments.command == "train":
        if arguments.work:
            settings = replace(settings, work=arguments.work)
        return _train(settings, arguments.only)
    return _eval(settings, arguments.sheet)


if __name__ == "__main__":
    sys.exit(main())
