"""Servers on a GPU, on a machine without one."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from latentflow.api import load_workflows
from latentflow_local import processes
from latentflow_local.addresses import Addresses
from latentflow_local.planning import ProcessSpec, models_of, plan_models
from support.packs import MODELS
from support.paths import EXAMPLES


def text_encoder(device: str) -> ProcessSpec:
    workflows = load_workflows(EXAMPLES / "shapes-minimal.yaml")
    with Addresses() as addresses:
        address, metrics = addresses.free(2)
    return plan_models(
        workflows,
        model_root=MODELS,
        addresses=dict.fromkeys(models_of(workflows), (address, metrics)),
        threads=1,
        device=device,
        cores=1,
        gpus=1,
        compute_lock=Path("/lock"),
        shared_memory=None,
        log_format="console",
    )[0]


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="the server would find its GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_server_on_a_gpu_is_not_forked_from_a_process_that_used_cuda(
    device: str, capfd: pytest.CaptureFixture[str]
) -> None:
    processes.prepare()
    failure, sent = multiprocessing.Pipe(duplex=False)
    process = processes.start(text_encoder(device), environment={}, failure=sent)
    process.join(120)
    printed = capfd.readouterr().err
    assert process.exitcode == 2
    assert f"cannot use the device {device}" in printed
    assert f"cannot use the device {device}" in (processes.message(failure) or "")
    assert "forked subprocess" not in printed
