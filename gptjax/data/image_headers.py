"""Headers of pictures: kind, size and structure of PNG, JPEG, WebP and GIF, read before anything is decoded.

The formats: W3C PNG (third edition), ITU-T T.81 (JPEG), RFC 9649 (WebP), GIF89a. A file that makes a decoder work or
allocate out of proportion to its bytes is refused here: a declared size, endless chunks, thousands of scans.
"""

import re
import struct

from gptjax.config.section import InputError

MOST_BYTES = 20_000_000  # of a file
MOST_SIDE = 16_384  # pixels
# Of so many pixels a decoder makes at most 260 MB: 4 bytes a pixel, and of a WebP four times that; a JPEG of several
# scans keeps 2 bytes a pixel and channel, too, until the last one.
MEGAPIXELS = {
    "PNG": 40,
    "JPEG": 40,
    "JPEG of several scans": 25,
    "CMYK JPEG of several scans": 20,
    "WebP": 14,
    "GIF": 40,
}
MOST_CHUNKS = 16_384  # chunks, segments or blocks of a file: a decoder walks over them one by one
MOST_SCANS = 64  # of a JPEG: each is a pass over all pixels, however short it is

# Other files, by the bytes that they begin with.
_OTHERS = (
    (b"%!PS", "an EPS or PostScript file"), (b"\xc5\xd0\xd3\xc6", "an EPS file"), (b"%PDF", "a PDF"),
    (b"II*\0", "a TIFF"), (b"MM\0*", "a TIFF"), (b"II+\0", "a TIFF"), (b"MM\0+", "a TIFF"), (b"BM", "a BMP"),
    (b"8BPS", "a Photoshop file"), (b"\0\0\1\0", "an icon file"), (b"\0\0\2\0", "a cursor file"), (b"qoif", "a QOI"),
    (b"\xff\x0a", "a JPEG XL"), (b"\0\0\0\x0cJXL ", "a JPEG XL"), (b"\0\0\0\x0cjP  ", "a JPEG 2000"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000"), (b"gimp xcf", "a GIMP file"), (b"PK\3\4", "a zip archive or office file"),
    (b"\x1f\x8b", "a gzip file"), (b"version https://git-lfs", "a Git LFS pointer"), (b"http", "the text of a URL"),
    (b"data:", "the text of a data: URL"),
)  # fmt: skip
_NEEDED = {b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"}  # chunks of a PNG: eXIf has the orientation
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # a JPEG's markers before a size
_ALONE = {0x01, *range(0xD0, 0xD9)}  # a JPEG's markers without a length


def check_image(content: bytes, origin: str) -> tuple[str, bytes]:
    """The kind of a picture's file ("PNG", "JPEG", "WebP" or "GIF"), and the bytes of it that a decoder needs.

    Of a PNG these leave out texts, profiles and frames, which may unpack to a thousand times their size. Raises
    InputError, naming the origin, for other files, for more than MOST_BYTES, for a picture larger than MOST_SIDE and
    MEGAPIXELS allow, and for one of more parts than MOST_CHUNKS and MOST_SCANS.
    """
    if len(content) > MOST_BYTES:
        raise InputError(f"{origin}: {len(content):,} bytes; wanted a picture of at most {MOST_BYTES:,}")
    try:
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            kind = limit = "PNG"
            size, content = _png(content)
        elif content.startswith(b"\xff\xd8\xff"):
            scans, channels, size = _jpeg(content)
            kind = limit = "JPEG"
            if scans > 1:
                limit = "JPEG of several scans" if channels <= 3 else "CMYK JPEG of several scans"
        elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
            kind = limit = "WebP"
            size = _webp(content)
        elif content.startswith((b"GIF87a", b"GIF89a")):
            kind = limit = "GIF"
            size = _gif(content)
        else:
            raise InputError(f"{origin}: {_other(content)}; wanted PNG, JPEG, WebP or GIF, convert it")
    except (struct.error, IndexError):
        raise InputError(f"{origin}: the file is cut short; wanted a whole picture, copy it again") from None
    except _Wrong as wrong:
        raise InputError(f"{origin}: {wrong}") from None
    check_size(*size, MEGAPIXELS[limit], f"{origin}: a {limit} of")
    return kind, content


def check_size(width: int, height: int, megapixels: int, what: str) -> None:
    """Raises InputError, beginning with `what`, for no pixels, or more than the limits."""
    if not 1 <= width <= MOST_SIDE or not 1 <= height <= MOST_SIDE or width * height > megapixels * 1_000_000:
        raise InputError(
            f"{what} {width:,} x {height:,} pixels; wanted 1 to {MOST_SIDE:,} a side and at most {megapixels} million"
        )


class _Wrong(Exception):
    """A file whose structure no honest writer makes; the message has no origin."""


def _png(content: bytes) -> tuple[tuple[int, int], bytes]:
    """Width and height; the file of the chunks that its pixels need, walked to the last, IEND."""
    if content[12:16] != b"IHDR":
        raise _Wrong("a PNG without a header; wanted IHDR as its first chunk")
    at, parts = 8, [content[:8]]
    for _ in range(MOST_CHUNKS):
        (length,) = struct.unpack_from(">I", content, at)
        name, end = content[at + 4 : at + 8], at + 12 + length
        if name in _NEEDED:
            parts.append(content[at:end])
        if name == b"IEND":
            return struct.unpack_from(">II", content, 16), b"".join(parts)
        at = end
    raise _Wrong(f"a PNG of more than {MOST_CHUNKS:,} chunks; save it again")


def _jpeg(content: bytes) -> tuple[int, int, tuple[int, int]]:
    """The numbers of scans and channels; width and height."""
    at, scans, channels, size, parts = 0, 0, 0, None, 0
    while (match := _MARKER.search(content, at)) and (marker := content[match.start() + 1]) != 0xD9:
        at = match.end()
        if marker in _ALONE:
            continue
        parts += 1
        if marker in _FRAMES:
            height, width, channels = struct.unpack_from(">HHB", content, at + 3)
            size = size or (width, height)
        scans += marker == 0xDA
        if parts > MOST_CHUNKS or scans > MOST_SCANS:
            raise _Wrong(f"a JPEG of more than {MOST_CHUNKS:,} segments or {MOST_SCANS} scans; save it again")
        (length,) = struct.unpack_from(">H", content, at)
        at += length
    if size is None:
        raise _Wrong("a JPEG without a size; it is damaged, copy it again")
    return scans, channels, size


def _webp(content: bytes) -> tuple[int, int]:
    """Width and height of the canvas."""
    chunk = content[12:16]
    if chunk == b"VP8 " and content[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L" and content[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", content, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8X" and len(content) >= 30:
        return int.from_bytes(content[24:27], "little") + 1, int.from_bytes(content[27:30], "little") + 1
    raise _Wrong("a WebP without a size; it is damaged, copy it again")


def _gif(content: bytes) -> tuple[int, int]:
    """Width and height that the screen and the first frame need; the blocks before that frame are walked."""
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    blocks = 0
    while blocks <= MOST_CHUNKS:
        blocks += 1
        if content[at] == 0x2C:
            left, top, wide, high = struct.unpack_from("<HHHH", content, at + 1)
            return max(width, left + wide), max(height, top + high)
        if content[at] != 0x21:
            raise _Wrong("a GIF without a picture; it is damaged, copy it again")
        at += 2
        while content[at]:  # blocks of an extension; the length 0 ends them
            at += 1 + content[at]
            blocks += 1
            if blocks > MOST_CHUNKS:
                break
        at += 1
    raise _Wrong(f"a GIF of more than {MOST_CHUNKS:,} blocks before its picture; save it again")


def _other(content: bytes) -> str:
    """The name of a file that is none of the four."""
    for magic, name in _OTHERS:
        if content.startswith(magic):
            return name
    if content[4:8] == b"ftyp":
        return (
            "an AVIF or HEIC" if content[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1") else "a video"
        )
    start = content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<"):
        return "an SVG drawing" if b"<svg" in start else "a page of HTML or XML"
    return "no picture that is known here" if content else "an empty file"
