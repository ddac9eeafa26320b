"""The weights of networks leave their memory and return to the same tensors, with the same values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason
from latentflow_nodes.engine.device_memory import measure
from latentflow_nodes.engine.module_weights import ModuleWeights
from latentflow_nodes.weights.files import LoadedFiles
from support.packs import SHAPES

CPU = torch.device("cpu")


def network() -> torch.nn.Sequential:
    """With a buffer, and two layers that share their weights."""
    torch.manual_seed(1)
    tied = torch.nn.Linear(8, 8)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), tied, tied).eval()


def test_released_weights_return_to_the_same_tensors_with_the_same_values() -> None:
    used, inputs = network(), torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    references, expected = list(used.parameters()), used(inputs)
    weights = ModuleWeights({"a": used}, device=CPU, load=lambda: {"a": network()}, keeps_copies=False)
    for _ in range(2):
        weights.release()
        assert sum(one.untyped_storage().nbytes() for one in used.state_dict().values()) == 0
        weights.restore()
        assert torch.equal(used(inputs), expected)
    assert all(a is b for a, b in zip(used.parameters(), references, strict=True))


def test_repeated_releases_and_restores_have_no_effect() -> None:
    loads = []

    def load() -> dict[str, torch.nn.Module]:
        loads.append(1)
        return {"a": network()}

    used = network()
    expected = {name: value.clone() for name, value in used.state_dict().items()}
    weights = ModuleWeights({"a": used}, device=CPU, load=load, keeps_copies=False)
    weights.restore()
    for step in (weights.release, weights.release, weights.restore, weights.restore):
        step()
    assert len(loads) == 1
    assert all(torch.equal(value, expected[name]) for name, value in used.state_dict().items())


def test_weights_whose_load_fails_stay_released_until_it_succeeds() -> None:
    failures = [OSError("away")]

    def load() -> dict[str, torch.nn.Module]:
        if failures:
            raise failures.pop()
        return {"a": network()}

    used = network()
    expected = {name: value.clone() for name, value in used.state_dict().items()}
    weights = ModuleWeights({"a": used}, device=CPU, load=load, keeps_copies=False)
    weights.release()
    with pytest.raises(OSError, match="away"):
        weights.restore()
    assert all(one.numel() == 0 for one in used.parameters())
    weights.restore()
    assert all(torch.equal(value, expected[name]) for name, value in used.state_dict().items())


def test_weights_with_copies_in_host_memory_return_without_their_files() -> None:
    def load() -> dict[str, torch.nn.Module]:
        raise AssertionError("loads again")

    used = network()
    expected = {name: value.clone() for name, value in used.state_dict().items()}
    weights = ModuleWeights({"a": used}, device=CPU, load=load, keeps_copies=True)
    for _ in range(2):
        weights.release()
        assert all(one.numel() == 0 for one in used.parameters())
        weights.restore()
        assert all(torch.equal(value, expected[name]) for name, value in used.state_dict().items())


# Its address space has no room for the weights at first, as a device that is full.
_FULL_DEVICE = """
import resource, torch
from latentflow_nodes.engine.memory import device_full, is_out_of_memory
from latentflow_nodes.engine.module_weights import ModuleWeights

def network():
    torch.manual_seed(1)
    return {"a": torch.nn.Linear(4096, 4096)}

torch.set_num_threads(1)
used = network()
expected = used["a"].weight.detach().clone()
weights = ModuleWeights(used, device=torch.device("cpu"), load=network, keeps_copies=False)
weights.release()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20), resource.RLIM_INFINITY))
try:
    weights.restore()
except Exception as error:
    print(is_out_of_memory(error), device_full(error).reason, used["a"].weight.numel())
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
weights.restore()
print(torch.equal(used["a"].weight, expected))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_a_full_device_is_recognised_and_the_weights_return_once_it_has_room() -> None:
    ended = subprocess.run([sys.executable, "-c", _FULL_DEVICE], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == ["True DEVICE_FULL 0", "True"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the files of Linux's kernel")
def test_the_memory_that_a_process_uses_is_measured() -> None:
    before = measure(CPU)
    block = torch.ones(64 << 20, dtype=torch.uint8)
    after = measure(CPU)
    assert after.used - before.used > 0.9 * block.nbytes
    assert after.used <= after.peak
    assert 0 < after.free < after.total


def files_in(folder: Path) -> LoadedFiles:
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (folder / name).write_bytes((SHAPES / "vae" / name).read_bytes())
    return LoadedFiles([folder / "diffusion_pytorch_model.safetensors"])


def test_files_that_were_written_again_with_the_same_contents_are_unchanged(tmp_path: Path) -> None:
    loaded = files_in(tmp_path)
    loaded.check_unchanged()
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
    loaded.check_unchanged()


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_file_that_has_changed_or_is_missing_is_named(tmp_path: Path, name: str) -> None:
    loaded = files_in(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(FailedPreconditionError, match=f"{name} has changed since") as changed:
        loaded.check_unchanged()
    path.unlink()
    with pytest.raises(FailedPreconditionError, match=f"{name} cannot be read any more") as missing:
        loaded.check_unchanged()
    assert (changed.value.reason, missing.value.reason) == (Reason.WEIGHTS_MISMATCH, Reason.WEIGHTS_UNAVAILABLE)
