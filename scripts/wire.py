"""Keeps the compiled descriptors of each release of the wire, and compares the protos with those of the last one.

`check` fails if the protos break a peer that runs the last release. `release VERSION` writes the descriptors of a new
release. A file of protos/releases never changes once its version is published.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUF = Path(sys.executable).with_name("buf")


def last_release(root: Path) -> Path:
    """The descriptors of the last release under a repository root. SystemExit if there is none."""
    kept = sorted((root / "protos/releases").glob("*.binpb"), key=lambda path: _numbers(path.stem))
    if not kept:
        sys.exit("protos/releases holds no descriptors; run `make wire-release VERSION=...`.")
    return kept[-1]


def check(root: Path) -> int:
    """Exit status of `buf breaking` over the protos under a repository root; it prints each breaking change."""
    return subprocess.run([BUF, "breaking", "--against", last_release(root)], cwd=root, check=False).returncode


def release(root: Path, version: str) -> None:
    """Writes the descriptors of the protos under a repository root. SystemExit if the version has been released."""
    _numbers(version)
    path = root / f"protos/releases/{version}.binpb"
    if path.exists():
        sys.exit(f"{path.relative_to(root)} exists; a release does not change. Choose another version.")
    path.parent.mkdir(exist_ok=True)
    # Without comments and positions, which are no part of the contract.
    subprocess.run([BUF, "build", "--exclude-source-info", "--output", path], cwd=root, check=True)


def _numbers(version: str) -> tuple[int, ...]:
    """A version for comparison. SystemExit where it is not three numbers."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        sys.exit(f"{version!r} is not a version; write three numbers, such as 0.2.0.")
    return tuple(int(number) for number in version.split("."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="compare the protos with the last release")
    commands.add_parser("release", help="keep the descriptors of a new release").add_argument("version")
    arguments = parser.parse_args()
    if arguments.command == "release":
        release(ROOT, arguments.version)
    else:
        sys.exit(check(ROOT))


if __name__ == "__main__":
    main()
