"""Servers on GPUs, as far as a machine without one shows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from latentflow.api import load_workflows
from latentflow.errors import InvalidRequestError
from latentflow_local import addresses, processes
from latentflow_local.planning import ProcessSpec, models_of, plan_models
from latentflow_local.runtime import run
from latentflow_nodes import settings
from support.packs import MODELS
from support.paths import EXAMPLES


def text_encoder(device: str) -> ProcessSpec:
    workflows = load_workflows(EXAMPLES / "shapes-minimal.yaml")
    free = addresses.free(2)
    return plan_models(
        workflows,
        model_root=MODELS,
        addresses=dict.fromkeys(models_of(workflows), (free[0], free[1])),
        threads=1,
        device=device,
        cores=1,
        gpus=1,
        turn_file=MODELS / "none",
        shared_memory=None,
        log_format="console",
    )[0]


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="here the server would find its GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_server_on_a_gpu_is_no_fork_of_a_process_that_touched_cuda(
    device: str, capfd: pytest.CaptureFixture[str]
) -> None:
    processes.prepare()
    process = processes.start(replace(text_encoder("cuda"), device=device), environment={})
    process.join(120)
    said = capfd.readouterr().err
    assert process.exitcode == 2
    assert f"cannot use {device}" in said
    assert "forked subprocess" not in said


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:0", "cuda:1;"])
def test_what_is_no_device_is_refused(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings.parse(["--role=VAE", "--uri=shapes", f"--device={device}"])
    assert "is no device" in capsys.readouterr().err


async def test_the_runtime_refuses_what_is_no_device_before_it_starts_anything() -> None:
    with pytest.raises(InvalidRequestError, match="is no device"):
        async with run(load_workflows(EXAMPLES / "shapes-minimal.yaml"), model_root=MODELS, device="gpu"):
            pytest.fail("it started")
