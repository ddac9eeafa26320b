"""A denoiser's step loop in this process, without servers: samples, ControlNets and an engine that a test steps."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from latentflow.errors import LatentflowError, UnavailableError
from latentflow.internal import weight_files
from latentflow.internal.guidance import Guidance
from latentflow.internal.metrics import NODE, Instruments
from latentflow.reasons import Reason
from latentflow_nodes import families
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.engine import Engine
from latentflow_nodes.engine.load import Load
from latentflow_nodes.engine.member import Control, Member
from latentflow_nodes.engine.runner import EagerRunner, Prediction, Runner
from latentflow_nodes.engine.sample import Assignment, Sample, Settings, initial_noise
from latentflow_nodes.engine.samplers import Sampler
from latentflow_nodes.families.base import Residuals

from support.packs import SHAPES

FAMILY = families.of_pipeline(SHAPES)
NETWORK = UNet2DConditionModel.from_pretrained(SHAPES / "unet").eval()
EDGES = FAMILY.load_control_net(SHAPES / "controlnet-edges", dtype=torch.float32, variant=None).eval()
IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
SCHEDULER = weight_files.config(SHAPES / "scheduler", "scheduler_config.json")


class Listener:
    """Records the progress of a sample."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.latents: torch.Tensor | None = None
        self.error: LatentflowError | None = None
        self.done = threading.Event()

    def stepped(self, sample: Sample) -> None:
        self.steps.append(sample.index)

    def finished(self, sample: Sample) -> None:
        self.latents = sample.latents
        self.done.set()

    def failed(self, sample: Sample, error: LatentflowError) -> None:
        self.error = error


class Broken:
    """A ControlNet whose server has died."""

    def request(self, **_: Any) -> Future[Residuals]:
        future: Future[Residuals] = Future()
        future.set_exception(UnavailableError("gone", reason=Reason.PEER_UNAVAILABLE))
        return future


class Edges:
    """The edges ControlNet in this process.

    Args:
        hold: Keeps the answers back until `send`.
        negative: The conditioning of samples of one row is that of the negative half.
    """

    def __init__(self, *, hold: bool = False, negative: bool = False) -> None:
        self._hold = hold
        self._negative = negative
        self._held: list[tuple[Future[Residuals], Residuals]] = []

    @torch.inference_mode()
    def request(self, *, step: int, timestep: float, sample: torch.Tensor, scale: float) -> Future[Residuals]:
        rows = len(sample)
        conditioning = inputs(rows)
        if self._negative:
            conditioning = {name: both[:1] for name, both in inputs(2).items()}
        image = FAMILY.embed_control_image(EDGES, IMAGE).expand(rows, -1, -1, -1)
        residuals = FAMILY.residuals(EDGES, sample, torch.tensor([timestep] * rows), image=image, inputs=conditioning)
        future: Future[Residuals] = Future()
        if self._hold:
            self._held.append((future, residuals))
        else:
            future.set_result(residuals)
        return future

    def send(self) -> None:
        for future, residuals in self._held:
            future.set_result(residuals)
        self._held.clear()


def inputs(rows: int) -> dict[str, Any]:
    """A conditioning of 8 tokens."""
    embeds = torch.randn(2, 8, NETWORK.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    return {"encoder_hidden_states": embeds[-rows:]}


def sample(
    key: int,
    *,
    steps: int = 3,
    controls: tuple[Control, ...] = (),
    guidance: float = 3.0,
    sampler: str = "ddim",
    deterministic: bool = False,
    assignment: Assignment | None = None,
    side: int = 8,
) -> tuple[Sample, Listener]:
    listener = Listener()
    settings = Settings(
        seed=key,
        steps=steps,
        shape=(1, 4, side, side),
        guidance=Guidance(scale=guidance, is_embedded=False),
        sampler=sampler,
    )
    generator = torch.Generator().manual_seed(key)
    made = Sample(
        key=key,
        request_id=str(key),
        settings=settings,
        inputs=inputs(settings.guidance.rows),
        sampler=Sampler(name=sampler, config=SCHEDULER, steps=steps, device=torch.device("cpu")),
        generator=generator,
        latents=initial_noise(settings.shape, generator=generator, dtype=torch.float32, device=torch.device("cpu")),
        listener=listener,
        controls=controls,
        is_deterministic=deterministic,
        guidance=assignment or Assignment(),
    )
    return made, listener


class Recording(EagerRunner):
    """Records the requests of each pass, and runs out of memory where a pass has more than `room` of them."""

    def __init__(self, *, room: int = 64, network: torch.nn.Module = NETWORK) -> None:
        super().__init__(network=network, family=FAMILY, device=torch.device("cpu"), lock=ComputeLock(None))
        self.room = room
        self.passes: list[list[int]] = []

    def run(self, batch: Sequence[Member], *, patience: float) -> Prediction:
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.passes.append([one.key for one in batch])
        # Nothing arrives during a pass of these tests.
        return super().run(batch, patience=0.0)


def engine_of(
    runner: Runner,
    *,
    network: torch.nn.Module = NETWORK,
    max_running: int = 2,
    max_waiting: int = 1,
    load: Load | None = None,
    metrics: Instruments | None = None,
) -> Engine:
    """An engine that steps when the test calls it.

    Args:
        network: That of the runner, into which adapters are merged.
    """
    torch.set_num_threads(1)
    metrics = metrics or Instruments(NODE, model="m", role="Denoiser")
    return Engine(
        runner=runner,
        merger=Merger(network, names=FAMILY.layer_names("unet", network), what="denoiser"),
        max_running=max_running,
        max_waiting=max_waiting,
        threads=1,
        load=load or Load(metrics),
        metrics=metrics,
    )


def finish(engine: Engine) -> None:
    """Steps until no sample can take part in a pass."""
    while engine.step():
        pass


def alone(key: int, **arguments: Any) -> torch.Tensor:
    """The latents of a sample that shares no pass."""
    engine = engine_of(Recording())
    one, received = sample(key, **arguments)
    engine.submit(one)
    finish(engine)
    assert received.latents is not None
    return received.latents
