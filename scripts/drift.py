"""Fails where a generated file differs from its source: gRPC stubs, CustomResourceDefinitions, generated documentation."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from latentflow_operator import crds
from reference import DOCS, PAGES

ROOT = Path(__file__).parents[1]
STUBS = ROOT / "client/latentflow/v1"


def main() -> None:
    stale = [f"docs/{name}: run `make docs`" for name, page in PAGES.items() if _read(DOCS / name) != page()]
    with tempfile.TemporaryDirectory() as folder:
        protos = sorted(str(path) for path in (ROOT / "protos/latentflow/v1").glob("*.proto"))
        outputs = [f"--{kind}={folder}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", *outputs, *protos]
        subprocess.run(command, check=True)
        for stub in sorted(Path(folder, "latentflow/v1").iterdir()):
            if _read(STUBS / stub.name) != stub.read_text():
                stale.append(f"client/latentflow/v1/{stub.name}: run `make proto`")
    with tempfile.TemporaryDirectory() as folder:
        crds.write(Path(folder))
        for definition in sorted(Path(folder).iterdir()):
            for target in ("crds", "charts/latentflow/files/crds"):
                if _read(ROOT / target / definition.name) != definition.read_text():
                    stale.append(f"{target}/{definition.name}: run `make crds`")
    if stale:
        sys.exit("Generated files differ from their sources:\n" + "\n".join(stale))
    print("generated files agree with their sources")


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    main()
