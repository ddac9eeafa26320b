"""The images that the one-node cluster runs: built by `tools/images` and `tools/build`, put into containerd's store.

A layer that is there already is not unpacked again, so after a change of our own code this takes seconds.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from node import CACHE, ctr
from support.paths import ROOT

TAG = "e2e"
CONTROL, NODE = f"localhost/latentflow-control:{TAG}", f"localhost/latentflow-node:{TAG}"
PAUSE, DNS = "localhost/latentflow-pause:e2e", "localhost/latentflow-coredns:e2e"
_STORE = CACHE / "images"


def provide(socket: Path) -> str:
    """Builds what is not built, and brings it into the store; the name of the image that holds pods' namespaces."""
    programs = Path(_output(str(ROOT / "tools/build"), "pause", "coredns"))
    _wrap(programs / "pause", PAUSE)
    _wrap(programs / "coredns", DNS)
    subprocess.run([str(ROOT / "tools/images"), TAG], check=True, env={"BASE": "debootstrap"} | os.environ)
    for image in (PAUSE, DNS, CONTROL, NODE):
        _import(socket, image)
    return PAUSE


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _wrap(program: Path, image: str) -> None:
    """An image with one static program in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "program").write_bytes(program.read_bytes())
        (folder / "program").chmod(0o755)
        (folder / "Dockerfile").write_text('FROM scratch\nCOPY program /program\nENTRYPOINT ["/program"]\n')
        build = ["buildah", "bud", "--layers", "--quiet", "--isolation=chroot", f"--tag={image}", name]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)


def _import(socket: Path, image: str) -> None:
    # Uncompressed, so that what has not changed is recognised without being read.
    folder = _STORE / image.rpartition("/")[2].partition(":")[0]
    folder.parent.mkdir(parents=True, exist_ok=True)
    push = ["buildah", "push", "--quiet", "--disable-compression", image, f"oci:{folder}:{image}"]
    subprocess.run(push, check=True)
    with subprocess.Popen(["tar", "-C", str(folder), "-c", "."], stdout=subprocess.PIPE) as archive:
        ctr(socket, "images", "import", f"--index-name={image}", "-", stdin=archive.stdout)
