"""Images on the wire: the media types that requests may use, and what such an image may hold besides its pixels.

Client, gateway and model servers check control images by these functions, so all of them refuse the same images. Nothing
that changes how an image looks is ignored: it is refused, because readers of images differ in what they apply.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

from PIL import Image, ImageCms

from latentflow.errors import InvalidRequestError
from latentflow.v1 import images_pb2

PNG = "image/png"
_JPEG = "image/jpeg"
# Pillow's formats by media type.
_FORMATS = {PNG: "PNG", _JPEG: "JPEG"}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# First bytes of the files.
_SIGNATURES = {_PNG_SIGNATURE: PNG, b"\xff\xd8\xff": _JPEG}
_MODES = ("RGB", "L")
_ORIENTATION = 0x0112
_UPRIGHT = 1
# Readers take other values as upright.
_ORIENTATIONS = range(1, 9)
_DEEP = 16
# Of PNG's gAMA chunk, in hundred-thousandths: the reciprocal of 2.2, and how far writers round it.
_GAMMA, _GAMMA_ROUNDING = 45455, 500
# Of PNG's cICP chunk: primaries and transfer function of sRGB.
_SRGB_CODES = (1, 13)


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
    raise InvalidRequestError(f"{what} is neither PNG nor JPEG. Convert it to PNG.")


def opened(image: images_pb2.EncodedImage, *, what: str) -> Image.Image:
    """An image of a request, of which only the header is read. InvalidRequestError for what `check` refuses.

    Args:
        what: The image's name in the error.
    """
    form = _FORMATS.get(image.media_type)
    if form is None:
        raise InvalidRequestError(f"{what} has the media type {image.media_type!r}; use {' or '.join(_FORMATS)}.")
    try:
        picture = Image.open(io.BytesIO(image.data), formats=(form,))
    except Exception as error:
        # Pillow raises exceptions of many classes for damaged files.
        raise InvalidRequestError(f"{what} cannot be read as {form}: {error}") from None
    if image.media_type == PNG:
        _check_png(image.data, what=what)
    check(picture, what=what)
    return picture


def check(picture: Image.Image, *, what: str) -> None:
    """InvalidRequestError unless an image is RGB or greyscale of 8 bits, upright, opaque, single and in sRGB."""
    if picture.mode not in _MODES:
        raise InvalidRequestError(
            f"{what} has the mode {picture.mode} instead of RGB or L (greyscale). Convert it, for instance with Pillow's "
            "image.convert('RGB')."
        )
    if "transparency" in picture.info:
        raise InvalidRequestError(
            f"{what} has a transparent colour. Remove the transparency, for instance with Pillow's "
            "image.convert('RGBA').convert('RGB')."
        )
    frames = getattr(picture, "n_frames", 1)
    if frames != 1:
        raise InvalidRequestError(f"{what} has {frames} frames. Save one of them as an image of its own.")
    # `getexif` would decode a PNG whole, to find EXIF data behind the pixels; `_check_png` has looked there.
    _check_upright(picture.info.get("exif"), what=what)
    profile = picture.info.get("icc_profile")
    if profile and not (name := _profile_name(profile)).startswith("sRGB"):
        raise InvalidRequestError(
            f"{what} has the colour profile {name!r}. Convert it to sRGB, for instance with Pillow's "
            "ImageCms.profileToProfile, or remove a profile that is wrong."
        )


def _check_upright(data: bytes | None, *, what: str) -> None:
    exif = Image.Exif()
    try:
        exif.load(data or b"")
        orientation = exif.get(_ORIENTATION, _UPRIGHT)
    except Exception as error:
        # As for damaged files.
        raise InvalidRequestError(f"{what} has EXIF data that cannot be read: {error}. Remove them.") from None
    if orientation in _ORIENTATIONS and orientation != _UPRIGHT:
        raise InvalidRequestError(
            f"{what} is stored rotated or mirrored (EXIF orientation {orientation}). Apply the orientation, for instance "
            "with Pillow's ImageOps.exif_transpose(image)."
        )


def _profile_name(profile: bytes) -> str:
    try:
        return str(ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))).strip()
    except (ImageCms.PyCMSError, OSError):
        return "unreadable"


def _check_png(data: bytes, *, what: str) -> None:
    """What Pillow applies by itself or does not report: the bit depth, gamma, and chunks behind the pixels."""
    chunks = dict(_chunks(data))
    header = chunks.get(b"IHDR", b"")
    if len(header) > 8 and header[8] == _DEEP:
        raise InvalidRequestError(f"{what} has 16 bits per channel instead of 8. Convert it to 8 bits.")
    is_named = b"sRGB" in chunks or b"iCCP" in chunks
    gamma = chunks.get(b"gAMA", b"")
    if len(gamma) == 4 and not is_named and abs(struct.unpack(">I", gamma)[0] - _GAMMA) > _GAMMA_ROUNDING:
        raise InvalidRequestError(f"{what} has another gamma than sRGB (gAMA). Convert it to sRGB.")
    if (codes := chunks.get(b"cICP")) is not None and tuple(codes[:2]) != _SRGB_CODES:
        raise InvalidRequestError(f"{what} has another colour space than sRGB (cICP). Convert it to sRGB.")
    _check_upright(chunks.get(b"eXIf"), what=what)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG by type; of the pixels only the type."""
    position = len(_PNG_SIGNATURE)
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        yield kind, b"" if kind == b"IDAT" else data[position + 8 : position + 8 + size]
        position += size + 12
