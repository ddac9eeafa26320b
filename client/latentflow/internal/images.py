"""Images on the wire: the media types that requests may use, and their file formats."""

from __future__ import annotations

from latentflow.errors import InvalidRequestError
from latentflow.v1 import images_pb2

PNG = "image/png"
_JPEG = "image/jpeg"
# Pillow's formats by media type.
_FORMATS = {PNG: "PNG", _JPEG: "JPEG"}
# First bytes of the files.
_SIGNATURES = {b"\x89PNG\r\n\x1a\n": PNG, b"\xff\xd8\xff": _JPEG}


def png(data: bytes) -> images_pb2.EncodedImage:
    """The message for the bytes of a PNG file."""
    return images_pb2.EncodedImage(data=data, media_type=PNG)


def of_file(data: bytes, *, what: str) -> images_pb2.EncodedImage:
    """The message for the bytes of a PNG or JPEG file, by the file's first bytes. InvalidRequestError for other formats.

    Args:
        what: The image's name in the error.
    """
    for signature, media_type in _SIGNATURES.items():
        if data.startswith(signature):
            return images_pb2.EncodedImage(data=data, media_type=media_type)
    raise InvalidRequestError(f"{what} is neither PNG nor JPEG.")


def file_format(image: images_pb2.EncodedImage, *, what: str) -> str:
    """Pillow's format of a request's image. InvalidRequestError for a media type that requests may not use.

    Args:
        what: The image's name in the error.
    """
    try:
        return _FORMATS[image.media_type]
    except KeyError:
        raise InvalidRequestError(
            f"{what} has the media type {image.media_type!r}; use {' or '.join(_FORMATS)}."
        ) from None
