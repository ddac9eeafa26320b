"""The ranks of a replica fail together: an operation on all of them, or the whole replica."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from latentflow.errors import FailedPreconditionError, InternalError, UnavailableError
from latentflow.reasons import Reason
from latentflow_nodes import settings
from latentflow_nodes.engine import ranks
from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.member import Control
from latentflow_nodes.engine.ranks import Group, Place, Ranks, Ready, Refusal
from latentflow_nodes.engine.tensor_parallel import DividedDenoiser, Process, Weights
from support.packs import MODELS, SHAPES
from support.step_loop import FAMILY, Broken, Edges, alone, engine_of, finish, sample

CPU = torch.device("cpu")
WEIGHTS = Weights(
    family=FAMILY,
    component="unet",
    path=SHAPES / "unet",
    variant=None,
    dtype=torch.float32,
    plan=FAMILY.plan_split(SHAPES / "unet"),
)
SECONDS = 60
LATENTS = 1e-4


def divided_of(count: int) -> DividedDenoiser:
    process = Process(name="base", log_format="console", threads=1)
    return DividedDenoiser(WEIGHTS, process, devices=[CPU] * count, lock=ComputeLock(None))


@pytest.fixture(scope="module")
def divided() -> Iterator[DividedDenoiser]:
    one = divided_of(2)
    yield one
    one.close()


def test_residuals_that_are_late_do_not_put_the_ranks_out_of_step(divided: DividedDenoiser) -> None:
    edges = Edges(hold=True)
    engine = engine_of(divided.runner)
    late, received = sample(1, controls=(Control(source=edges, scale=1.0),))
    other, other_received = sample(2)
    engine.submit(late)
    # Alone, so that the pass has no residuals at all.
    assert engine.step()
    engine.submit(other)
    finish(engine)
    assert other_received.latents is not None
    assert (other_received.latents - alone(2)).abs().max().item() <= LATENTS
    for _ in range(late.total):
        edges.send()
        finish(engine)
    assert received.latents is not None
    expected = alone(1, controls=(Control(source=Edges(), scale=1.0),))
    assert (received.latents - expected).abs().max().item() <= LATENTS


def test_a_controlnet_that_fails_in_mid_pass_fails_its_sample_alone(divided: DividedDenoiser) -> None:
    engine = engine_of(divided.runner)
    broken, failure = sample(1, controls=(Control(source=Broken(), scale=1.0),))
    good, received = sample(2)
    engine.submit(broken)
    engine.submit(good)
    finish(engine)
    assert isinstance(failure.error, UnavailableError)
    assert received.latents is not None
    assert (received.latents - alone(2)).abs().max().item() <= LATENTS


def test_a_pass_that_fails_on_all_ranks_alike_fails_alone(divided: DividedDenoiser) -> None:
    engine = engine_of(divided.runner)
    wrong, failure = sample(1)
    # Cross-attention takes no embeddings of this width.
    wrong.inputs = {"encoder_hidden_states": torch.zeros(2, 8, 5)}
    engine.submit(wrong)
    finish(engine)
    assert isinstance(failure.error, InternalError)
    good, received = sample(2)
    engine.submit(good)
    finish(engine)
    assert received.latents is not None
    assert (received.latents - alone(2)).abs().max().item() <= LATENTS


def test_a_rank_that_does_not_start_in_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = multiprocessing.active_children()
    monkeypatch.setattr(ranks, "START_SECONDS", 0.01)
    with pytest.raises(FailedPreconditionError) as caught:
        divided_of(4)
    assert (caught.value.reason, caught.value.message) == (
        Reason.RANK_FAILED,
        "Rank 1 did not start within 0.01 s.",
    )
    assert multiprocessing.active_children() == before


def ends_at_once(connection: Connection, place: Place, part: Any) -> None:
    raise SystemExit(3)


def refuses(connection: Connection, place: Place, part: Any) -> None:
    connection.send(Ready())
    Group(place)
    connection.send(Refusal("the disk is broken.", Reason.WEIGHTS_UNAVAILABLE))


def test_a_rank_that_ends_before_it_is_ready_is_named() -> None:
    with pytest.raises(FailedPreconditionError, match="Rank 1 ended with exit code 3 before it could start"):
        Ranks(ends_at_once, None, devices=[CPU] * 2)


def test_the_error_of_a_rank_that_cannot_load_reaches_the_server() -> None:
    made = Ranks(refuses, None, devices=[CPU] * 2)
    with pytest.raises(FailedPreconditionError, match=r"Rank 1: the disk is broken\.") as caught, made.loading():
        pass
    assert caught.value.reason == Reason.WEIGHTS_UNAVAILABLE


# Rank 0 fails in the middle of a pass, while rank 1 waits in a sum.
FAILING = """
from support.step_loop import engine_of, sample
from latentflow_nodes.engine import ranks
from test_ranks import divided_of

def fails(*_):
    raise MemoryError("none left")

if __name__ == "__main__":
    ranks.FAILURE_SECONDS = 0.5
    divided = divided_of(2)
    divided.network.mid_block.attentions[0].register_forward_hook(fails)
    engine = engine_of(divided.runner)
    engine.submit(sample(1)[0])
    engine.step()
    print("still there")
"""


def test_a_pass_that_fails_on_one_rank_alone_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    path = os.pathsep.join(str(Path(__file__).parents[up]) for up in (0, 1))
    ended = subprocess.run(
        [sys.executable, tmp_path / "failing.py"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=4 * SECONDS,
        check=False,
    )
    assert (ended.returncode, ended.stdout.splitlines()[1:]) == (1, [])
    assert "an operation failed on rank 0 and not on rank 1" in ended.stdout
    assert "none left" in ended.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--role=VAE", "--tensor=2"], "--tensor is an option of Denoiser, not of VAE"),
        (["--role=Denoiser", "--tensor=17"], "--tensor must be from 1 to 16, not 17"),
        (["--role=Denoiser", "--tensor=0"], "--tensor must be from 1 to 16, not 0"),
    ],
)
def test_a_server_refuses_a_number_of_ranks_that_its_role_cannot_have(
    capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    with pytest.raises(SystemExit):
        settings.parse(["--uri=shapes", *options])
    assert words in capsys.readouterr().err


@contextlib.contextmanager
def server() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A denoiser of two ranks that is ready, and the process of its other rank."""
    options = ["--role=Denoiser", "--uri=shapes", f"--model-root={MODELS}", "--tensor=2", '--engine={"threads": 2}']
    command = [sys.executable, "-m", "latentflow_nodes.server", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert any(" ready " in line for line in process.stderr)
            (rank,) = ranks_of(process.pid)
            yield process, rank
        finally:
            process.kill()


def ranks_of(pid: int) -> list[int]:
    """The processes that a server has started for its ranks."""
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [child for child in children if "--multiprocessing-fork" in Path(f"/proc/{child}/cmdline").read_text()]


def has_ended(pid: int) -> bool:
    """Waits until a process that is not a child of this one has ended."""
    try:
        file = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([file], [], [], SECONDS)[0])
    finally:
        os.close(file)


def test_a_server_ends_with_a_line_in_its_log_when_a_rank_is_killed() -> None:
    with server() as (process, rank):
        os.kill(rank, signal.SIGKILL)
        _, log = process.communicate(timeout=SECONDS)
        assert process.returncode == 1
        (line,) = (one for one in log.splitlines() if "the server ends because a rank failed" in one)
        assert "rank 1 ended" in line


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)])
def test_ranks_end_with_their_server(signum: signal.Signals, code: int) -> None:
    with server() as (process, rank):
        process.send_signal(signum)
        assert process.wait(SECONDS) == code
        assert has_ended(rank)
