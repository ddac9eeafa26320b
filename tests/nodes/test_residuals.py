"""When and how the UNet adds what ControlNets send."""

from __future__ import annotations

import pytest
import torch
from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason
from latentflow_nodes.families.base import Residuals
from support.step_loop import EDGES, FAMILY, IMAGE, NETWORK, inputs

LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TIMESTEP = torch.tensor([7, 7])


class Late:
    """Residuals that are there once they are waited for. Records which blocks have run by then."""

    def __init__(self, residuals: Residuals) -> None:
        self._residuals = residuals
        self._run: list[str] = []
        self.run_before: list[str] = []

    def note(self, block: str) -> None:
        self._run.append(block)

    def wait(self) -> Residuals:
        self.run_before = list(self._run)
        return self._residuals


@torch.inference_mode()
def residuals() -> Residuals:
    image = FAMILY.embed_control_image(EDGES, IMAGE).expand(2, -1, -1, -1)
    return FAMILY.residuals(EDGES, LATENTS, TIMESTEP, image=image, inputs=inputs(2))


@torch.inference_mode()
def predicted(late: Late) -> torch.Tensor:
    hooks = [
        block.register_forward_hook(lambda *_, name=name: late.note(name))
        for name, block in (("down", NETWORK.down_blocks[-1]), ("mid", NETWORK.mid_block), ("up", NETWORK.up_blocks[0]))
    ]
    try:
        return FAMILY.predict(NETWORK, LATENTS, TIMESTEP, inputs=inputs(2), residuals=late)
    finally:
        for hook in hooks:
            hook.remove()


def test_a_controlnet_may_compute_until_the_middle_block_has_ended() -> None:
    late = Late(residuals())
    predicted(late)
    assert late.run_before == ["down", "mid"]


@torch.inference_mode()
def test_late_residuals_give_the_bits_of_those_that_diffusers_adds() -> None:
    sent = residuals()
    added = {"down_block_additional_residuals": sent.down, "mid_block_additional_residual": sent.mid}
    expected = NETWORK(LATENTS, TIMESTEP, **inputs(2), **added, return_dict=False)[0]
    assert torch.equal(predicted(Late(sent)), expected)


def test_residuals_for_another_number_of_skip_connections_are_refused() -> None:
    sent = residuals()
    with pytest.raises(FailedPreconditionError, match="another base model") as refused:
        predicted(Late(Residuals(down=sent.down[:-1], mid=sent.mid)))
    assert refused.value.reason == Reason.CONTROLNET_MISMATCH
