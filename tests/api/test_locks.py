"""What the images install is what the tests ran with."""

from __future__ import annotations

import pytest
from support.paths import ROOT


@pytest.mark.parametrize("image", ["control", "node"])
def test_an_image_s_lock_names_the_versions_that_are_tested(image: str) -> None:
    tested = set((ROOT / "requirements.lock").read_text().splitlines())
    installed = (ROOT / f"requirements-{image}.lock").read_text().splitlines()
    assert len(installed) > 20
    assert set(installed) <= tested


def test_the_control_image_has_no_torch() -> None:
    assert not [line for line in (ROOT / "requirements-control.lock").read_text().splitlines() if "torch" in line]
