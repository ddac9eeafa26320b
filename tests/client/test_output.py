"""The files that `latentflow generate` writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from latentflow.cli import output
from latentflow.errors import FailedPreconditionError, InvalidRequestError


def test_several_images_get_numbered_names(tmp_path: Path) -> None:
    assert output.paths(tmp_path / "a.png", images=1) == [tmp_path / "a.png"]
    assert output.paths(tmp_path / "a.png", images=2) == [tmp_path / "a-0.png", tmp_path / "a-1.png"]
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_file_stays_until_the_new_one_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"earlier")
    (path,) = output.paths(tmp_path / "a.png", images=1)
    assert path.read_bytes() == b"earlier"
    output.write(path, b"later")
    assert path.read_bytes() == b"later"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("picture.jpg", "images are written as PNG"),
        ("absent/out.png", "does not exist"),
        ("folder", "is not a file"),
        ("x" * 300 + ".png", "File name too long"),
        ("a\0b.png", "null byte"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidRequestError, match=message):
        output.paths(tmp_path / name, images=1)


@pytest.mark.parametrize("name", ["/dev/full", "/proc/out.png", "/sys/out.png"])
def test_a_device_or_a_system_folder_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(name)):
        output.paths(Path(name), images=1)


def test_an_image_that_cannot_be_written_is_kept_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match=r"The image is in (.*)\.$") as caught:
        output.write(tmp_path / "removed" / "out.png", b"png")
    kept = Path(caught.value.message.rpartition(" in ")[2].removesuffix("."))
    assert kept.read_bytes() == b"png"
    kept.unlink()
