"""What the SDK exports is public; modules of `latentflow.internal` are not, except for the TLS files of a client."""

from __future__ import annotations

import latentflow


def test_the_sdk_exports_tls_and_nothing_else_of_its_internal_modules() -> None:
    modules = {name: getattr(latentflow, name).__module__ for name in latentflow.__all__}
    assert {name for name, module in modules.items() if module.startswith("latentflow.internal")} == {"Tls"}
