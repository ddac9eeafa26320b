"""What the images install is what the tests ran with."""

from __future__ import annotations

import pytest
from support.paths import ROOT


@pytest.mark.parametrize("image", ["control", "node"])
def test_an_image_s_lock_names_the_versions_that_are_tested(image: str) -> None:
    # Without the platforms, which each resolution adds as it needs them.
    tested, installed = (
        {line.partition(" ;")[0] for line in (ROOT / name).read_text().splitlines()}
        for name in ("requirements.lock", f"requirements-{image}.lock")
    )
    assert len(installed) > 20
    assert installed <= tested


def test_the_control_image_has_no_torch() -> None:
    assert not [line for line in (ROOT / "requirements-control.lock").read_text().splitlines() if "torch" in line]
