"""The PNG files that a command writes: their paths are checked before the work, and no finished image is lost."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from latentflow.errors import FailedPreconditionError, InvalidRequestError

_FORMATS = (".png", "")
# More than the images of any request take.
_FREE_BYTES = 1 << 20


def paths(output: Path, *, images: int) -> list[Path]:
    """The files for so many images, each of which can be written. InvalidRequestError with the reason otherwise."""
    if output.suffix.lower() not in _FORMATS:
        raise InvalidRequestError(
            f"--output {output}: images are written as PNG; use a name that ends in .png, and convert the file afterwards."
        )
    if not output.parent.is_dir():
        raise InvalidRequestError(f"The folder {output.parent} does not exist; create it or choose another --output.")
    found = [output] if images == 1 else [output.with_stem(f"{output.stem}-{index}") for index in range(images)]
    for path in found:
        _check(path)
    if shutil.disk_usage(output.parent).free < _FREE_BYTES:
        raise InvalidRequestError(f"No space is left in {output.parent}; free some or choose another --output.")
    return found


def write(path: Path, data: bytes) -> None:
    """Writes a file. FailedPreconditionError where that fails; it names the temporary file that has the data instead."""
    try:
        path.write_bytes(data)
    except OSError as error:
        with tempfile.NamedTemporaryFile(prefix="latentflow-", suffix=".png", delete=False) as kept:
            kept.write(data)
        raise FailedPreconditionError(
            f"{path} cannot be written: {error.strerror}. The image is in {kept.name}."
        ) from None


def _check(path: Path) -> None:
    try:
        exists = path.exists()
        if exists and not path.is_file():
            raise InvalidRequestError(f"--output {path} is not a file; name the file to write, such as out.png.")
        # Opened for appending, so that the content of an earlier image stays until the new one is finished.
        path.open("ab").close()
        if not exists:
            path.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequestError(f"--output {path} cannot be written: {reason}; choose another file.") from None
