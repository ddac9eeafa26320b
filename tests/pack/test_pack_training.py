"""Training at tiny sizes: interrupted or not, it ends with the same weights, and never draws what is held out."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from latentflow_pack import controlnet, denoiser, drawing, evaluation, export, hints, lora, stages, tokens, vae
from latentflow_pack.grammar import HeldOut, Scene
from latentflow_pack.settings import Settings, Stage
from latentflow_pack.training import Loop


def _same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def _elsewhere(settings: Settings) -> Settings:
    return replace(settings, work=settings.work.with_name("other"))


def _no_inspection(_model: object) -> str:
    return ""


def test_an_interrupted_codec_training_ends_with_the_same_weights(tiny: Settings) -> None:
    whole = vae.train(tiny)
    other = _elsewhere(tiny)
    vae.train(other, stop_at=3)
    assert not _same(vae.train(other, stop_at=2), whole)
    resumed = vae.train(other)
    assert _same(resumed, whole)
    assert resumed.config.scaling_factor == whole.config.scaling_factor


def test_an_interrupted_denoiser_training_ends_with_the_same_weights(tiny: Settings) -> None:
    codec = vae.build(tiny)
    whole = denoiser.train(tiny, codec, inspect=_no_inspection)
    other = _elsewhere(tiny)
    denoiser.train(other, codec, inspect=_no_inspection, stop_at=3)
    assert _same(denoiser.train(other, codec, inspect=_no_inspection), whole)


def test_an_interrupted_controlnet_training_ends_with_the_same_weights(tiny: Settings) -> None:
    codec, base = vae.build(tiny), denoiser.build(tiny, tokens.build())
    whole = controlnet.train(tiny, codec, base, kind="edges", inspect=_no_inspection)
    other = _elsewhere(tiny)
    controlnet.train(other, codec, base, kind="edges", inspect=_no_inspection, stop_at=2)
    assert _same(controlnet.train(other, codec, base, kind="edges", inspect=_no_inspection), whole)


def test_an_untrained_controlnet_changes_nothing(tiny: Settings) -> None:
    base = denoiser.build(tiny, tokens.build())
    control = controlnet.build(tiny, base)
    down, middle = control(
        torch.randn(1, 4, 8, 8),
        torch.tensor([10]),
        torch.randn(1, 32, tiny.text_width),
        controlnet_cond=torch.rand(1, 3, 64, 64),
        return_dict=False,
    )
    assert not any(bool(part.any()) for part in [*down, middle])


def test_training_a_lora_changes_only_its_own_weights(tiny: Settings) -> None:
    codec, base = vae.build(tiny), denoiser.build(tiny, tokens.build())
    before = {name: value.clone() for name, value in base.state_dict().items()}
    trained = lora.train(tiny, codec, base, adapter=tiny.adapters[0])
    after = {name.replace(".base_layer", ""): value for name, value in trained.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(bool(value.any()) for name, value in after.items() if "lora_B" in name)


def test_a_whole_training_leaves_a_folder_that_diffusers_loads(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "text_only", lambda *_a, **_k: evaluation.Result(figures={}))
    monkeypatch.setattr(evaluation, "control", lambda *_a, **_k: evaluation.Result(figures={}))
    stages.Training(tiny).run(stages.names(tiny))
    pipe = StableDiffusionPipeline.from_pretrained(tiny.out, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(["a red circle"], num_inference_steps=2).images[0].size == (64, 64)
    ControlNetModel.from_pretrained(tiny.out / "controlnet-layout", local_files_only=True)
    pipe.load_lora_weights(tiny.out / "loras" / "neon", adapter_name="neon")
    scales = {m.scaling["neon"] for m in pipe.unet.modules() if hasattr(m, "scaling")}
    assert scales == {2.0}
    assert set(export.stages_of(tiny)) == set(stages.names(tiny))


def test_no_stage_draws_what_is_held_out(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Scene] = []

    def arrange(scene: Scene, rng: random.Random) -> drawing.Layout:
        drawn.append(scene)
        return _arrange(scene, rng)

    _arrange = drawing.arrange
    monkeypatch.setattr(drawing, "arrange", arrange)
    monkeypatch.setattr(vae, "reconstruction_scores", lambda _model: {})
    many = replace(tiny, pictures=300, hinted=300, styled=300)
    codec, base = vae.train(many), denoiser.build(many, tokens.build())
    denoiser.train(many, codec, inspect=_no_inspection)
    for kind in hints.KINDS:
        controlnet.train(many, codec, base, kind=kind, inspect=_no_inspection)
    lora.train(many, codec, base, adapter=many.adapters[0])
    held_out = HeldOut.load()
    assert len(drawn) >= 1200
    assert all(held_out.allows(scene) for scene in drawn)


def test_a_finished_training_is_not_done_again(tiny: Settings, tmp_path: Path) -> None:
    vae.train(tiny)
    checkpoint = tiny.work / "vae.pt"
    written = checkpoint.stat().st_mtime_ns
    vae.train(tiny)
    assert checkpoint.stat().st_mtime_ns == written
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_rate_falls_rises_once_and_falls_to_almost_nothing(tmp_path: Path) -> None:
    stage = Stage(steps=100, batch=1, rate=1.0, warmup=10, first_fall=80, restart_at=50, restart_rate=0.5)
    loop = Loop(name="x", model=torch.nn.Linear(1, 1), stage=stage, work=tmp_path, seed=1)
    rates = []
    for loop.step in range(100):
        rates.append(loop.rate())
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:50] == sorted(rates[10:50], reverse=True)
    assert rates[49] < rates[50] == pytest.approx(0.5)
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[-1] < 0.02
