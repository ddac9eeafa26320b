"""All benches of the engine, one after the other, each in a process of its own. The last line is JSON with all figures."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

BENCHES = ("overhead", "batching", "arrivals", "steering", "merging", "loras", "parallelism", "tensor", "sleeping")


def bench(name: str) -> tuple[dict[str, float], bool]:
    """Runs one bench and passes its output on; its figures, and whether they are within their ranges.

    RuntimeError for a bench that ended without figures.
    """
    program = Path(__file__).with_name(f"{name}.py")
    last = ""
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line
    try:
        figures: dict[str, float] = json.loads(last)["figures"]
    except (ValueError, KeyError, TypeError):
        raise RuntimeError(f"{program} ended with {process.returncode} and without figures.") from None
    return figures, process.returncode == 0


def main() -> int:
    """Measures; returns 1 where a figure is outside its range."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    figures: dict[str, float] = {}
    are_within = True
    for name in parser.parse_args().only:
        print(f"== {name}", flush=True)
        found, is_within = bench(name)
        figures |= found
        are_within = are_within and is_within
    print(json.dumps({"figures": figures}))
    return int(not are_within)


if __name__ == "__main__":
    sys.exit(main())
