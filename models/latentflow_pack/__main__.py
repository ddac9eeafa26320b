"""`python -m latentflow_pack train` trains the pack, `… eval` scores it."""

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
    train = commands.add_parser("train", help="train the stages that are not finished, in their order")
    train.add_argument("--only", nargs="+", metavar="STAGE", help=f"some of {' '.join(stages.names(Settings()))}")
    train.add_argument("--work", type=Path, help="checkpoints and latents (default: $LATENTFLOW_PACK_WORK)")
    score = commands.add_parser("eval", help="score the pack and draw a contact sheet")
    score.add_argument("--sheet", type=Path, default=Path("out/pack-eval.png"), help="file of the contact sheet")
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
    table = Table("figure", "value", "at least", "", title="The shapes pack, on prompts outside its training set")
    for name, value in figures.items():
        minimum = evaluation.MINIMUMS.get(name)
        mark = "" if minimum is None else ("ok" if value >= minimum else "BELOW")
        table.add_row(name, f"{value:.3f}", "" if minimum is None else f"{minimum:.2f}", mark)
    return table


def _eval(settings: Settings, path: Path) -> int:
    torch.set_num_threads(settings.threads)
    if not (settings.out / "unet").exists():
        print(f"{settings.out} holds no pack; run: {export.COMMAND}", file=sys.stderr)
        return 2
    result = evaluation.evaluate(settings)
    sheet.write(result.rows, path)
    Console(width=100).print(_table(result.figures))
    print(f"contact sheet: {path}")
    below_minimum = result.below_minimum()
    for complaint in below_minimum:
        print(f"below its minimum: {complaint}", file=sys.stderr)
    print(json.dumps({"figures": result.figures}), flush=True)
    return int(bool(below_minimum))


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
