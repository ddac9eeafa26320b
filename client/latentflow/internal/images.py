"""Images on the wire: the media types that requests may use, and what such an image may hold besides its pixels.

Client, gateway and model servers check control images by these functions, so all of them refuse the same images: all but
RGB and greyscale of 8 bits per channel, upright, opaque, of one frame and in sRGB. Nothing that changes how an image looks
is ignored, because readers of images differ in what they apply.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import ExifTags, Image, ImageCms

from latentflow.errors import InvalidRequestError
from latentflow.v1 import images_pb2

PNG = "image/png"
_JPEG = "image/jpeg"
# Pillow's formats by media type.
_FORMATS = {PNG: "PNG", _JPEG: "JPEG"}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# First bytes of the files.
_SIGNATURES = {_PNG_SIGNATURE: PNG, b"\xff\xd8\xff": _JPEG}
_MODES = ("RGB", "L")
_UPRIGHT = 1
# Readers take other values as upright.
_ORIENTATIONS = range(1, 9)
# In Pillow's names of the layouts of more than 8 bits per channel, which it reads as 8.
_DEEP = re.compile(r";16[BLN]")
# PNG's chunks of pixels and frames, and of text.
_PIXELS = (b"IDAT", b"acTL", b"fcTL", b"fdAT")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_XMP = "xml:com.adobe.xmp"
# Names of PNG's texts with EXIF data: the one that Pillow knows, and the one of old ImageMagick.
_RAW_EXIF = "Raw profile type exif"
_RAW_NAMES = (_RAW_EXIF.lower(), "raw profile type app1")
# Of sRGB: gamma, and x and y of white, red, green and blue; and how far writers round them.
_GAMMA, _GAMMA_ROUNDING = 1 / 2.2, 0.005
_CHROMATICITY, _CHROMATICITY_ROUNDING = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06), 0.01
# Of PNG's cICP chunk: primaries and transfer function of sRGB.
_SRGB_CODES = (1, 13)
_ADOBE_RGB = "R03"


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


def of_picture(picture: Image.Image, *, what: str) -> images_pb2.EncodedImage:
    """The message for a Pillow image, as PNG. InvalidRequestError where it is damaged, or refused.

    The bits per channel of its file are known only if its pixels have not been loaded before.

    Args:
        what: The image's name in the error.
    """
    _check_depth(picture, what=what)
    try:
        # Metadata behind the pixels of a file is known only from then on.
        picture.load()
    except Exception as error:
        # Pillow raises exceptions of many classes for damaged files.
        raise InvalidRequestError(f"{what} cannot be read: {error}") from None
    _check(picture, what=what)
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return png(stream.getvalue())


def opened(image: images_pb2.EncodedImage, *, what: str) -> Image.Image:
    """An image of a request, of which only the header is read. InvalidRequestError where it is damaged, or refused.

    Args:
        what: The image's name in the error.
    """
    form = _FORMATS.get(image.media_type)
    if form is None:
        raise InvalidRequestError(f"{what} has the media type {image.media_type!r}; use {' or '.join(_FORMATS)}.")
    try:
        picture = Image.open(io.BytesIO(image.data), formats=(form,))
        if image.media_type == PNG:
            picture.info = _png_info(image.data)
    except Exception as error:
        # As for damaged files above.
        raise InvalidRequestError(f"{what} cannot be read as {form}: {error}") from None
    _check_depth(picture, what=what)
    _check(picture, what=what)
    return picture


def _check_depth(picture: Image.Image, *, what: str) -> None:
    if any(_DEEP.search(str(tile[3])) for tile in getattr(picture, "tile", ())):
        raise InvalidRequestError(f"{what} has 16 bits per channel instead of 8. Convert it to 8 bits.")


def _check(picture: Image.Image, *, what: str) -> None:
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
    try:
        frames = getattr(picture, "n_frames", 1)
        exif = _exif(picture.info)
        orientation = exif.get(ExifTags.Base.Orientation, _UPRIGHT)
        difference = _difference_from_srgb(picture.info, exif)
    except Exception as error:
        # As for damaged files.
        raise InvalidRequestError(
            f"{what} has metadata that cannot be read: {error}. Save it without metadata."
        ) from None
    if frames != 1:
        raise InvalidRequestError(f"{what} has {frames} frames. Save one of them as an image of its own.")
    if orientation in _ORIENTATIONS and orientation != _UPRIGHT:
        raise InvalidRequestError(
            f"{what} is stored rotated or mirrored (EXIF orientation {orientation}). Apply the orientation, for instance "
            "with Pillow's ImageOps.exif_transpose(image)."
        )
    if difference:
        raise InvalidRequestError(
            f"{what} has {difference}. Convert it to sRGB, for instance with Pillow's ImageCms.profileToProfile, or remove "
            "the metadata if it is wrong."
        )


def _exif(info: Mapping[Any, Any]) -> Image.Exif:
    """The EXIF data of an image, with an orientation that is only in its XMP data."""
    # Of the image itself, `getexif` would load the pixels of a PNG.
    bare = Image.Image()
    bare.info = {_RAW_EXIF if str(name).lower() in _RAW_NAMES else name: value for name, value in info.items()}
    return bare.getexif()


def _difference_from_srgb(info: Mapping[Any, Any], exif: Image.Exif) -> str:
    """What makes the colours of an image others than those of sRGB; empty where nothing does."""
    if (codes := info.get("cicp")) is not None:
        return "" if tuple(codes[:2]) == _SRGB_CODES else "another colour space than sRGB (cICP)"
    if "icc_profile" in info:
        name = _profile_name(info["icc_profile"])
        return "" if name.startswith("sRGB") else f"the colour profile {name!r}"
    if "srgb" in info:
        return ""
    if "gamma" in info and abs(info["gamma"] - _GAMMA) > _GAMMA_ROUNDING:
        return "another gamma than sRGB (gAMA)"
    found = zip(info.get("chromaticity", _CHROMATICITY), _CHROMATICITY, strict=True)
    if any(abs(one - other) > _CHROMATICITY_ROUNDING for one, other in found):
        return "other primaries than sRGB (cHRM)"
    is_adobe = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) == _ADOBE_RGB
    return "the colours of Adobe RGB (EXIF)" if is_adobe else ""


def _profile_name(profile: bytes | None) -> str:
    try:
        return str(ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile or b"")))).strip()
    except (ImageCms.PyCMSError, OSError):
        return "unreadable"


def _png_info(data: bytes) -> dict[Any, Any]:
    """What a PNG holds besides its pixels, as Pillow's `Image.info`, also from behind the pixels; of texts only metadata.

    Pillow has one dictionary for all: a text named icc_profile would replace the colour profile. It omits cICP.
    """
    first: dict[bytes, memoryview] = {}
    texts: list[memoryview] = []
    for kind, chunk in _chunks(data):
        if kind not in _TEXTS:
            # Of several, readers other than Pillow use the first.
            first.setdefault(kind, chunk)
        elif _is_metadata(bytes(chunk[8:])):
            texts.append(chunk)
    kept = [chunk for kind, chunk in first.items() if kind not in _PIXELS]
    info = Image.open(io.BytesIO(b"".join((_PNG_SIGNATURE, *kept, *texts, _PNG_END))), formats=("PNG",)).info
    return {**info, "cicp": bytes(first[b"cICP"][8:-4])} if b"cICP" in first else info


def _is_metadata(text: bytes) -> bool:
    return text.partition(b"\0")[0].decode("latin-1").lower() in (_XMP, *_RAW_NAMES)


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The chunks of a PNG before its end, by type, each with its length, type and checksum."""
    position, view = len(_PNG_SIGNATURE), memoryview(data)
    while position + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        end = position + size + 12
        if kind == b"IEND" or end > len(data):
            return
        yield kind, view[position:end]
        position = end
