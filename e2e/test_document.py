"""Every command of docs/kubernetes.md, in order, on a real cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import images
import pytest
from PIL import Image
from support.apiserver import ApiServer, search_path
from support.documents import blocks
from support.paths import ROOT

DOCUMENT = "docs/kubernetes.md"


def ours(text: str) -> str:
    """The text with the names of the images in the cluster's store."""
    for image in (images.CONTROL, images.NODE):
        name = image.partition("/")[2].partition(":")[0]
        text = text.replace(f"registry.example/{name}:0.1.0", image)
        text = text.replace(f"registry.example/{name}, tag: 0.1.0", f"{image.partition(':')[0]}, tag: {images.TAG}")
    assert "registry.example" not in text
    return text


@pytest.mark.timeout(1200)
def test_every_command_of_the_kubernetes_page_works_in_order(cluster: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "models-volume").mkdir(mode=0o777)
    (tmp_path / "models-volume").chmod(0o777)
    cluster.apply(
        [
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": "models"},
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "capacity": {"storage": "1Gi"},
                    "hostPath": {"path": str(tmp_path / "models-volume")},
                },
            }
        ]
    )
    for name in ("charts", "examples", "models", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    for block in blocks(DOCUMENT, "yaml"):
        (tmp_path / block.split()[1]).write_text(ours(block))
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(cluster.kubeconfig.read_text())
    environment = os.environ | {"KUBECONFIG": str(kubeconfig), "PATH": search_path()}
    shown = [line for block in blocks(DOCUMENT, "bash") for line in block.splitlines()]
    assert len(shown) > 25
    for line in shown:
        done = subprocess.run(
            ["bash", "-ec", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        state = "" if done.returncode == 0 else cluster.kubectl("describe", "dwf,dm,pods", "--all-namespaces")
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}\n{state}"
    with Image.open(tmp_path / "circle.png") as image:
        assert image.size == (64, 64)
