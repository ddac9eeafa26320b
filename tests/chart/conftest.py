from __future__ import annotations

from kube.conftest import api_server

__all__ = ["api_server"]
