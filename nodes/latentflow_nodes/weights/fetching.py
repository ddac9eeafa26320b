"""Which files of a remote source a role needs, as a pure choice, and the progress of their download.

`hub` and `bucket` fetch; both fetch only what the role reads, and never a file that could run code.
"""

from __future__ import annotations

import glob
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import structlog
from latentflow.internal import sizes
from latentflow.internal.metrics import Instruments
from latentflow.internal.weight_names import SUFFIX

_log = structlog.get_logger()
_LOG_SECONDS = 10.0
_DESCRIPTIONS = (".json", ".txt")
# What a role reads of a source that is the component folder itself.
_NETWORK = ("config", "diffusion_pytorch_model*")
_COMPONENT = {
    "ControlNet": _NETWORK,
    "VAE": _NETWORK,
    "Denoiser": (*_NETWORK, "scheduler_config"),
    "TextEncoder": ("config", "model*", "vocab", "merges", "tokenizer*", "special_tokens_map", "added_tokens"),
}
# What a role reads beside the one component that a subfolder names.
_BESIDE = {"Denoiser": ("scheduler",)}
_INDEX = "model_index.json"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The wanted files of a source, as patterns over its paths: those that match one of `allow` and none of `ignore`."""

    allow: tuple[str, ...]
    ignore: tuple[str, ...]

    def of(self, paths: Iterable[str]) -> list[str]:
        """The wanted ones of these paths, in their order."""
        return [
            path
            for path in paths
            if any(fnmatchcase(path, one) for one in self.allow)
            and not any(fnmatchcase(path, one) for one in self.ignore)
        ]


def wanted(role: str, subfolder: str | None, *, parts: Sequence[str], variant: str | None = None) -> Wanted:
    """The files of a source that a role reads: configuration, vocabularies, and the weights of one variant.

    Args:
        role: Name of the role.
        subfolder: The one component that is served, if the source names one.
        parts: The folders of a pipeline that the role may read.
        variant: The variant of the weights; None: the files without a variant in their names.
    """
    if role == "LoRAStore":
        # Every file of a store is an adapter of its own, whatever its name.
        folders = f"{glob.escape(subfolder)}/*" if subfolder else "*"
        return Wanted(
            allow=(_INDEX, *(folders + suffix for suffix in (*_DESCRIPTIONS, SUFFIX, SUFFIX.upper()))), ignore=()
        )
    if subfolder:
        # A text encoder reads all its parts, whichever of them the source names.
        beside = parts if role == "TextEncoder" else _BESIDE.get(role, ())
        patterns = [f"{glob.escape(subfolder)}/*", *(f"{part}/*" for part in beside)]
    else:
        patterns = [*(f"{part}/*" for part in parts), *_COMPONENT.get(role, ())]
    described = [pattern + suffix for pattern in patterns for suffix in _DESCRIPTIONS]
    weights = [pattern for pattern in patterns if pattern.endswith("*")]
    if variant:
        # Of one file, of the parts of an index, and of such parts as earlier versions of diffusers named them.
        of_variant = [pattern + f".{variant}{end}{SUFFIX}" for pattern in weights for end in ("", "-*-of-*")]
        return Wanted(allow=(_INDEX, *described, *of_variant), ignore=())
    return Wanted(
        allow=(_INDEX, *described, *(pattern + SUFFIX for pattern in weights)),
        ignore=tuple(f"{pattern}.*{SUFFIX}" for pattern in weights),
    )


def wanted_beside(file: str, *, parts: Sequence[str]) -> Wanted:
    """A single file, and the configurations and vocabularies beside it that a role reads.

    Args:
        file: Its path in the source.
        parts: The folders of a pipeline that the role may read.
    """
    folder = glob.escape(file.rpartition("/")[0] + "/") if "/" in file else ""
    # Every role reads the denoiser's configuration, by which the family is known.
    folders = [f"{folder}{part}/*{suffix}" for part in (*parts, "unet") for suffix in _DESCRIPTIONS]
    alone = [folder + name for name in ("config.json", "scheduler_config.json")]
    return Wanted(allow=(glob.escape(file), *alone, *folders), ignore=())


class Progress:
    """Reports the progress of a download: in metrics at once, in the log every ten seconds. Thread-safe.

    Args:
        source: Its name in the log.
        clock: Monotonic seconds.
    """

    def __init__(self, metrics: Instruments, *, source: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._done = metrics.of("latentflow_download_bytes")
        self._total = metrics.of("latentflow_download_total_bytes")
        self._source = source
        self._clock = clock
        self._lock = threading.Lock()
        self._logged_at = clock()

    def at(self, done: int, total: int) -> None:
        """Records that `done` of `total` bytes are here."""
        self._done.set(min(done, total))
        self._total.set(total)
        with self._lock:
            now = self._clock()
            if now - self._logged_at < _LOG_SECONDS:
                return
            self._logged_at = now
        _log.info("downloading", source=self._source, progress=sizes.progress(done, total))

    def waiting(self) -> None:
        """Logs that another server downloads the same files into the cache and this one waits for it."""
        _log.info("waiting for another server to download the same files", source=self._source)
