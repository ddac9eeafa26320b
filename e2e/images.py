"""The images that the cluster of the tests runs: built by `tools/images` and `tools/build`, brought where it finds them.

An image that is there already is not imported again: that of the model servers takes a minute or two.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from node import PAUSE, ctr
from support.paths import ROOT

TAG = "e2e"
CONTROL, NODE = f"localhost/latentflow-control:{TAG}", f"localhost/latentflow-node:{TAG}"
DNS = f"localhost/latentflow-coredns:{TAG}"


def provide(socket: Path) -> None:
    """Builds what is not built, and brings it into the store of a node of ours."""
    programs = Path(_output(str(ROOT / "tools/build"), "pause", "coredns"))
    _wrap(programs / "pause", PAUSE)
    _wrap(programs / "coredns", DNS)
    subprocess.run([str(ROOT / "tools/images"), TAG], check=True, env={"BASE": "debootstrap"} | os.environ)
    for image in (PAUSE, DNS, CONTROL, NODE):
        _import(socket, image)


def load(cluster: str) -> None:
    """Builds our images with docker, and brings them into a cluster of kind."""
    subprocess.run([str(ROOT / "tools/images"), TAG], check=True)
    for image in (CONTROL, NODE):
        subprocess.run(["docker", "tag", image.removeprefix("localhost/"), image], check=True)
        subprocess.run(["kind", "load", "docker-image", f"--name={cluster}", image], check=True)


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
    built = _output("buildah", "inspect", "--type=image", "--format={{.FromImageID}}", image)
    # By this name the store knows which build it has.
    known = f"{image.rpartition(':')[0]}:{built[:12]}"
    if known in ctr(socket, "images", "list", "--quiet").split():
        return
    with tempfile.TemporaryDirectory() as name:
        archive = f"{name}/image.tar"
        subprocess.run(["buildah", "push", "--quiet", image, f"oci-archive:{archive}:{image}"], check=True)
        ctr(socket, "images", "import", archive)
    ctr(socket, "images", "tag", "--force", image, known)
