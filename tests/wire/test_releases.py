"""The wire is compared with its last release, and a release is kept once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the protos, of their kept releases and of the script that compares them."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/wire.py", tmp_path / "scripts")
    return tmp_path


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/wire.py", *arguments]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)


def change(tree: Path, name: str, old: str, new: str) -> None:
    path = tree / f"protos/latentflow/v1/{name}"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_the_wire_breaks_no_peer_of_the_last_release(tree: Path) -> None:
    done = run(tree, "check")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "old", "new", "found"),
    [
        ("stage.proto", "  bool strict_prompt = 6;\n", "", 'field "6" with name "strict_prompt"'),
        ("stage.proto", "uint64 seed = 9;", "sint64 seed = 9;", 'Field "9" with name "seed"'),
        ("stage.proto", "string sampler = 8;", "string sampler_name = 8;", 'Field "8" with name "sampler_name"'),
        (
            "stage.proto",
            "  rpc Decode(DecodeRequest) returns (DecodeResponse);\n",
            "",
            'RPC "Decode" on service "Stage" was deleted',
        ),
        (
            "stage.proto",
            "rpc Denoise(stream DenoiseRequest)",
            "rpc Denoise(DenoiseRequest)",
            'RPC "Denoise" on service "Stage" changed from client streaming to client unary',
        ),
    ],
)
def test_a_change_that_breaks_a_peer_is_found(tree: Path, name: str, old: str, new: str, found: str) -> None:
    change(tree, name, old, new)
    done = run(tree, "check")
    assert done.returncode != 0
    assert found in done.stdout + done.stderr


def test_a_new_field_breaks_no_peer(tree: Path) -> None:
    change(tree, "stage.proto", "  bool strict_prompt = 6;\n", "  bool strict_prompt = 6;\n  string language = 60;\n")
    assert run(tree, "check").returncode == 0


def test_the_release_of_the_highest_version_is_the_one_compared(tree: Path) -> None:
    without, added = "  bool strict_prompt = 6;\n", "  string language = 60;\n"
    assert run(tree, "release", "0.9.0").returncode == 0
    change(tree, "stage.proto", without, without + added)
    assert run(tree, "release", "0.10.0").returncode == 0
    change(tree, "stage.proto", added, "")
    done = run(tree, "check")
    assert done.returncode != 0
    assert 'field "60" with name "language"' in done.stdout


def test_equal_protos_give_equal_descriptors(tree: Path) -> None:
    kept = []
    for version in ("7.0.0", "7.0.1"):
        assert run(tree, "release", version).returncode == 0
        kept.append((tree / f"protos/releases/{version}.binpb").read_bytes())
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("version", "message"), [("1.2", "is not a version"), ("7.0.0", "7.0.0.binpb exists; a release does not change")]
)
def test_a_release_that_cannot_be_kept_is_refused(tree: Path, version: str, message: str) -> None:
    (tree / "protos/releases/7.0.0.binpb").write_bytes(b"")
    done = run(tree, "release", version)
    assert done.returncode != 0
    assert message in done.stderr
