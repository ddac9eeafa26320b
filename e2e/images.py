"""The images of the test cluster: built by `tools/images` and `tools/build` and imported into the cluster's image store.

An image that the store already has is not imported again: importing that of the model servers takes a minute or two.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from node import CACHE, PAUSE, ctr
from support.paths import ROOT

# NEXT_TAG names the same images; tests upgrade a release to it.
TAG, NEXT_TAG = "e2e", "e2e-next"
CONTROL, NODE = f"localhost/latentflow-control:{TAG}", f"localhost/latentflow-node:{TAG}"
DNS = f"localhost/latentflow-coredns:{TAG}"
PROMETHEUS = f"localhost/latentflow-prometheus:{TAG}"
_PUBLISHED_PROMETHEUS = "prom/prometheus:v2.55.1"


def provide(socket: Path) -> None:
    """Builds the images that are not built yet and imports them into the store of a node made by `node.py`."""
    programs = Path(_output(str(ROOT / "tools/build"), "pause", "coredns"))
    _wrap(programs / "pause", PAUSE)
    _wrap(programs / "coredns", DNS)
    _wrap(Path(shutil.which("prometheus") or "prometheus"), PROMETHEUS)
    subprocess.run([str(ROOT / "tools/images"), TAG], check=True, env={"BASE": "debootstrap"} | os.environ)
    for image in (PAUSE, DNS, PROMETHEUS, CONTROL, NODE):
        _import(socket, image)
    for image in (CONTROL, NODE):
        ctr(socket, "images", "tag", "--force", image, _next(image))


def load(cluster: str) -> None:
    """Builds our images with docker and loads them into a cluster of kind."""
    subprocess.run([str(ROOT / "tools/images"), TAG], check=True)
    subprocess.run(["docker", "pull", "--quiet", _PUBLISHED_PROMETHEUS], check=True)
    built = {image: image.removeprefix("localhost/") for image in (CONTROL, NODE)}
    names = built | {_next(image): name for image, name in built.items()} | {PROMETHEUS: _PUBLISHED_PROMETHEUS}
    for image, name in names.items():
        subprocess.run(["docker", "tag", name, image], check=True)
        subprocess.run(["kind", "load", "docker-image", f"--name={cluster}", image], check=True)


def _next(image: str) -> str:
    return f"{image.removesuffix(TAG)}{NEXT_TAG}"


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _wrap(program: Path, image: str) -> None:
    """Builds an image of one program and the libraries that it is linked to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "program").write_bytes(program.read_bytes())
        (folder / "program").chmod(0o755)
        for library in _libraries(program):
            (folder / f"root{library}").parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, folder / f"root{library}")
        copied = "COPY root /\n" if (folder / "root").exists() else ""
        (folder / "Dockerfile").write_text(f'FROM scratch\n{copied}COPY program /program\nENTRYPOINT ["/program"]\n')
        build = ["buildah", "bud", "--layers", "--quiet", "--isolation=chroot", f"--tag={image}", name]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)


def _libraries(program: Path) -> list[str]:
    # For a static program ldd fails and prints no library.
    output = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
    return re.findall(r"(/\S+) \(0x", output)


def _import(socket: Path, image: str) -> None:
    built = _output("buildah", "inspect", "--type=image", "--format={{.FromImageID}}", image)
    # The store keeps a build under this name too, so that it is recognised.
    known = f"{image.rpartition(':')[0]}:{built[:12]}"
    if known in ctr(socket, "images", "list", "--quiet").split():
        return
    # buildah compresses all layers again; of these only those that the store does not have are imported.
    layout = CACHE / "layouts" / image.rpartition("/")[2].partition(":")[0]
    layout.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["buildah", "push", "--quiet", image, f"oci:{layout}:{image}"], check=True)
    _prune(layout)
    present = set(ctr(socket, "content", "list", "--quiet").split())
    with tempfile.TemporaryDirectory() as name:
        archive = Path(name) / "image.tar"
        with tarfile.open(archive, "w") as tar:
            for path in sorted(layout.rglob("*")):
                if path.is_file() and f"sha256:{path.name}" not in present:
                    tar.add(path, path.relative_to(layout))
        ctr(socket, "images", "import", str(archive))
    # Removes earlier builds and their layers, which may be gigabytes.
    for name in ctr(socket, "images", "list", "--quiet").split():
        if name.rpartition(":")[0] == image.rpartition(":")[0] and name != image:
            ctr(socket, "images", "remove", name)
    ctr(socket, "images", "tag", "--force", image, known)


def _prune(layout: Path) -> None:
    """Removes the layers of earlier builds."""
    blobs = layout / "blobs/sha256"
    needed = set()
    for manifest in json.loads((layout / "index.json").read_text())["manifests"]:
        digest = manifest["digest"]
        body = json.loads((blobs / digest.removeprefix("sha256:")).read_text())
        needed |= {digest, *(part["digest"] for part in (body["config"], *body["layers"]))}
    for blob in blobs.iterdir():
        if f"sha256:{blob.name}" not in needed:
            blob.unlink()
