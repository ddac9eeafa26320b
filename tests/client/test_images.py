"""What an image file holds besides pixels is refused alike by client, gateway and model servers, never ignored."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from latentflow.errors import InvalidRequestError
from latentflow.internal import images
from latentflow.requests import build
from PIL import ExifTags, Image, ImageCms, ImageOps

RED = Image.new("RGB", (8, 8), "red")


def saved(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format=form, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes, *, then: bytes = b"", at_end: bool = False) -> bytes:
    """A PNG with one more chunk: behind its header, or behind its pixels."""
    png = saved(RED)
    position = png.index(b"IEND") - 4 if at_end else 33
    return png[:position] + chunk(kind, data) + then + png[position:]


def rotated(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def raw(data: bytes) -> bytes:
    """A PNG's text for a profile, as ImageMagick writes it."""
    return f"\nexif\n{len(data):8}\n{data.hex()}\n".encode()


def of_adobe() -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Interop)[ExifTags.Interop.InteropIndex] = "R03"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = exif.get_ifd(ExifTags.IFD.Interop)
    return exif


def deep() -> bytes:
    """An RGB PNG of 16 bits per channel, which Pillow reads as 8."""
    rows = b"".join(b"\0" + bytes(6 * 8) for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def profile(name: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()  # type: ignore[arg-type]


TIFF = rotated().tobytes()[6:]
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
XMP_TEXT = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP
RAW_TEXT = b"Raw profile type exif\0" + raw(TIFF)
HEADER = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
# x and y of white, red, green and blue, in hundred-thousandths.
SRGB_PRIMARIES = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
ADOBE_PRIMARIES = struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "rotated jpeg": (lambda: saved(RED, "JPEG", exif=rotated()), "EXIF orientation 6"),
    "rotated png": (lambda: saved(RED, exif=rotated()), "EXIF orientation 6"),
    "rotated png, behind the pixels": (lambda: with_chunk(b"eXIf", TIFF, at_end=True), "EXIF orientation 6"),
    "rotated jpeg, by xmp": (lambda: saved(RED, "JPEG", xmp=XMP), "EXIF orientation 6"),
    "rotated png, by xmp": (lambda: with_chunk(b"iTXt", XMP_TEXT), "EXIF orientation 6"),
    "rotated png, by xmp behind the pixels": (lambda: with_chunk(b"iTXt", XMP_TEXT, at_end=True), "EXIF orientation 6"),
    "rotated png, by a text": (lambda: with_chunk(b"tEXt", RAW_TEXT), "EXIF orientation 6"),
    "rotated png, by a text in small letters": (lambda: with_chunk(b"tEXt", RAW_TEXT.lower()), "EXIF orientation 6"),
    "rotated png, by a text behind the pixels": (
        lambda: with_chunk(b"tEXt", RAW_TEXT, at_end=True),
        "EXIF orientation 6",
    ),
    "rotated png, by a compressed text": (
        lambda: with_chunk(b"zTXt", b"Raw profile type APP1\0\0" + zlib.compress(raw(b"Exif\0\0" + TIFF))),
        "EXIF orientation 6",
    ),
    "damaged exif": (lambda: with_chunk(b"eXIf", b"nonsense"), "has metadata that cannot be read"),
    "damaged text with exif": (
        lambda: with_chunk(b"tEXt", b"Raw profile type exif\0\n\n\nno"),
        "has metadata that cannot be read",
    ),
    "16 bits, grey": (lambda: saved(Image.new("I;16", (8, 8))), "has 16 bits per channel instead of 8"),
    "16 bits, rgb": (deep, "has 16 bits per channel instead of 8"),
    "16 bits, rgb, and another header behind the pixels": (
        lambda: deep().replace(chunk(b"IEND", b""), chunk(b"IHDR", HEADER) + chunk(b"IEND", b"")),
        "has 16 bits per channel instead of 8",
    ),
    "palette": (lambda: saved(RED.convert("P")), "has the mode P"),
    "one bit": (lambda: saved(RED.convert("1")), "has the mode 1"),
    "alpha": (lambda: saved(RED.convert("RGBA")), "has the mode RGBA"),
    "grey with alpha": (lambda: saved(RED.convert("LA")), "has the mode LA"),
    "transparent colour": (lambda: saved(RED, transparency=(255, 0, 0)), "has a transparent colour"),
    "cmyk": (lambda: saved(RED.convert("CMYK"), "JPEG"), "has the mode CMYK"),
    "lab profile": (lambda: saved(RED, icc_profile=profile("LAB")), "has the colour profile 'Lab identity"),
    "damaged profile": (lambda: saved(RED, "JPEG", icc_profile=b"x" * 200), "has the colour profile 'unreadable'"),
    "damaged profile in a png": (lambda: with_chunk(b"iCCP", b"a\0\0no"), "has the colour profile 'unreadable'"),
    "adobe's primaries": (lambda: with_chunk(b"cHRM", ADOBE_PRIMARIES), "other primaries than sRGB"),
    "adobe rgb by exif": (lambda: saved(RED, "JPEG", exif=of_adobe()), "has the colours of Adobe RGB"),
    "gamma": (lambda: with_chunk(b"gAMA", struct.pack(">I", 100000)), "another gamma than sRGB"),
    "hdr": (lambda: with_chunk(b"cICP", bytes([9, 16, 0, 1])), "another colour space than sRGB"),
    "animated": (lambda: saved(RED, save_all=True, append_images=[Image.new("RGB", (8, 8))]), "has 2 frames"),
    "two pictures in a jpeg": (lambda: saved(RED, "MPO", save_all=True, append_images=[RED]), "has 2 frames"),
    "gif": (lambda: saved(RED, "GIF"), "is neither PNG nor JPEG"),
    "webp": (lambda: saved(RED, "WEBP"), "is neither PNG nor JPEG"),
    "tiff": (lambda: saved(RED, "TIFF"), "is neither PNG nor JPEG"),
    "cut off": (lambda: saved(RED)[:20], "cannot be read as PNG"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_changes_how_an_image_looks_is_refused(name: str, tmp_path: Path) -> None:
    made, words = FILES[name]
    (tmp_path / "image").write_bytes(made())
    for given in (made(), tmp_path / "image"):
        with pytest.raises(InvalidRequestError) as caught:
            build("a", control_images={"edges": given})
        assert caught.value.message.startswith("The control image 'edges' ")
        assert words in caught.value.message


PLAIN: dict[str, Callable[[], bytes]] = {
    "png": lambda: saved(RED),
    "jpeg": lambda: saved(RED, "JPEG"),
    "progressive jpeg": lambda: saved(RED, "JPEG", progressive=True),
    "grey png": lambda: saved(RED.convert("L")),
    "grey jpeg": lambda: saved(RED.convert("L"), "JPEG"),
    "srgb profile": lambda: saved(RED, icc_profile=profile("sRGB")),
    "srgb chunk": lambda: with_chunk(b"sRGB", b"\0"),
    "srgb chunk and its gamma": lambda: with_chunk(b"gAMA", struct.pack(">I", 45455)),
    "srgb codes": lambda: with_chunk(b"cICP", bytes([1, 13, 0, 1])),
    "exif without a rotation": lambda: saved(RED, "JPEG", exif=Image.Exif()),
    "srgb primaries": lambda: with_chunk(b"cHRM", SRGB_PRIMARIES),
    "srgb chunk and other primaries": lambda: with_chunk(b"sRGB", b"\0", then=chunk(b"cHRM", ADOBE_PRIMARIES)),
    "upright by exif, rotated by xmp": lambda: saved(RED, "JPEG", exif=rotated(1), xmp=XMP),
    "a header of 16 bits behind the pixels": lambda: with_chunk(
        b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0), at_end=True
    ),
    "a gamma behind the end": lambda: saved(RED) + chunk(b"gAMA", struct.pack(">I", 100000)),
    "resolution and text": lambda: saved(RED, dpi=(300, 300)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_changes_nothing_is_accepted(name: str) -> None:
    data = PLAIN[name]()
    request = build("a", control_images={"edges": data})
    assert request.control_images[0].image.data == data
    assert images.opened(request.control_images[0].image, what="It").size == (8, 8)


# Pillow does not report these of an open image, or reads such files.
UNSEEN = {"hdr", "cut off", "webp", "tiff"}
OTHER_WORDS = {"gif": "has the mode P"}


@pytest.mark.parametrize("name", sorted(FILES.keys() - UNSEEN))
def test_an_open_image_is_refused_as_its_file_is(name: str) -> None:
    made, words = FILES[name]
    with pytest.raises(InvalidRequestError) as caught:
        build("a", control_images={"edges": Image.open(io.BytesIO(made()))})
    assert OTHER_WORDS.get(name, words) in caught.value.message


# Pillow keeps the texts of a PNG beside its own data, under these names.
NAMES = ["icc_profile", "gamma", "chromaticity", "srgb", "transparency", "exif", "xmp"]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_text_in_a_png_has_no_effect(name: str) -> None:
    text = chunk(b"tEXt", name.encode() + b"\0text")
    assert build("a", control_images={"edges": with_chunk(b"pHYs", bytes(9), then=text)})
    with pytest.raises(InvalidRequestError, match="other primaries than sRGB"):
        build("a", control_images={"edges": with_chunk(b"cHRM", ADOBE_PRIMARIES, then=text)})


@pytest.mark.parametrize("name", NAMES)
def test_a_text_that_replaces_data_of_an_open_image_is_refused_or_has_no_effect(name: str) -> None:
    picture = Image.open(io.BytesIO(with_chunk(b"tEXt", name.encode() + b"\0text")))
    if name == "srgb":
        assert build("a", control_images={"edges": picture})
    else:
        with pytest.raises(InvalidRequestError, match=r"has (metadata that cannot be read|a transparent colour)"):
            build("a", control_images={"edges": picture})


@pytest.mark.parametrize("given", ["jpeg", "png", "png, by xmp", "png, by a text"])
def test_the_named_remedy_makes_a_rotated_image_upright(given: str) -> None:
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(FILES[f"rotated {given}"][0]())))
    assert build("a", control_images={"edges": picture})


def test_an_open_image_whose_second_frame_is_damaged_is_refused() -> None:
    data = saved(RED, "TIFF", save_all=True, append_images=[RED])
    width = struct.pack("<HHII", 256, 4, 1, 8)
    position = data.rindex(width)
    picture = Image.open(io.BytesIO(data[:position] + bytes(len(width)) + data[position + len(width) :]))
    with pytest.raises(InvalidRequestError, match="has metadata that cannot be read"):
        build("a", control_images={"edges": picture})


def test_an_open_image_whose_file_is_cut_off_is_refused() -> None:
    picture = Image.open(io.BytesIO(saved(Image.effect_noise((64, 64), 50))[:2000]))
    with pytest.raises(InvalidRequestError, match="The control image 'edges' cannot be read"):
        build("a", control_images={"edges": picture})


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "F", "I"])
def test_an_image_whose_conversion_loses_colours_is_left_to_the_caller(mode: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"has the mode {mode} instead of RGB or L"):
        build("a", control_images={"edges": Image.new(mode, (8, 8))})
