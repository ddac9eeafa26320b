"""What of a remote source a role needs, and how far its download is: pure choice of files, and progress for all to see.

`hub` and `bucket` fetch; both fetch only what the role reads, and never a file that could run code.
"""

from __future__ import annotations

import glob
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import structlog
from latentflow.internal import sizes
from latentflow.internal.metrics import Instruments

_log = structlog.get_logger()
_SAY_SECONDS = 10.0
_SUFFIXES = (".safetensors", ".json", ".txt")
# Of each role, what it reads of a pipeline folder.
_PARTS: dict[str, tuple[str, ...]] = {
    "TextEncoder": ("text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*"),
    "Denoiser": ("unet/*", "scheduler/*"),
    # A ControlNet's repository often is the component folder itself.
    "ControlNet": ("controlnet/*", "config", "diffusion_pytorch_model*"),
    "LoRAStore": ("*",),
    "VAE": ("vae/*",),
}
# And what it reads beside the one component that a subfolder names.
_BESIDE = {"TextEncoder": _PARTS["TextEncoder"], "Denoiser": ("scheduler/*",)}
_INDEX = "model_index.json"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Files of a source, as patterns over paths in it: those that match one of `allow` and none of `ignore`."""

    allow: tuple[str, ...]
    ignore: tuple[str, ...]

    def of(self, paths: Iterable[str]) -> list[str]:
        """Those of some paths that are wanted, in their order."""
        return [
            path
            for path in paths
            if any(fnmatchcase(path, one) for one in self.allow)
            and not any(fnmatchcase(path, one) for one in self.ignore)
        ]


def wanted(role: str, subfolder: str | None) -> Wanted:
    """What a role reads of a source: weights, configuration and vocabularies; of several precisions the whole one."""
    parts = (f"{glob.escape(subfolder)}/*", *_BESIDE.get(role, ())) if subfolder else _PARTS[role]
    # In a store, every file with a name of its own is an adapter of its own.
    variants = () if role == "LoRAStore" else ("*.fp16.*", "*.fp16-*", "*.non_ema.*", "*.non_ema-*")
    allow = (_INDEX, *(f"{part}{suffix}" for part in parts for suffix in _SUFFIXES))
    return Wanted(allow=allow, ignore=variants)


class Progress:
    """How far a download is: in metrics at once, in the log every ten seconds. May be told from any thread.

    Args:
        source: Its name in the log.
        clock: Seconds, never going back.
    """

    def __init__(self, metrics: Instruments, *, source: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._done = metrics.of("latentflow_download_bytes")
        self._total = metrics.of("latentflow_download_total_bytes")
        self._source = source
        self._clock = clock
        self._lock = threading.Lock()
        self._said = clock()

    def at(self, done: int, total: int) -> None:
        """So many bytes of so many are here."""
        self._done.set(min(done, total))
        self._total.set(total)
        with self._lock:
            now = self._clock()
            if now - self._said < _SAY_SECONDS:
                return
            self._said = now
        _log.info("downloading", source=self._source, progress=sizes.progress(done, total))

    def waiting(self) -> None:
        """Another server of this cache downloads the same, and this one waits for it."""
        _log.info("another server downloads the same; waiting for it", source=self._source)
