"""Files that claim to be pictures, and pictures of unusual kinds, made here: what a reader must refuse or read."""

import gzip
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, data: bytes = b"", crc: int | None = None) -> bytes:
    """A chunk of a PNG."""
    return (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) if crc is None else crc)
    )


def png(width: int, height: int, *before: bytes, kind: int = 2, depth: int = 8, data: bytes | None = None) -> bytes:
    """A black PNG of these sizes, with chunks before its pixels; `data` stands for these."""
    if data is None:
        row = 1 + -(-width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(kind, 1) // 8)
        packer, data = zlib.compressobj(9), b""
        for _ in range(height):
            data += packer.compress(bytes(row))
        data += packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return PNG + header + b"".join(before) + chunk(b"IDAT", data) + chunk(b"IEND")


def saved(image: Image.Image, kind: str, **options) -> bytes:
    """A file that Pillow writes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height: int = 24, width: int = 40, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(noise()).convert(mode)


def bomb() -> bytes:
    """50 MB of zeros, packed."""
    return zlib.compress(bytes(50_000_000), 1)


def animation(kind: str, frames: int) -> bytes:
    rest = [Image.new("RGB", (40, 24), (i % 256, i // 256, 0)) for i in range(frames - 1)]
    return saved(picture(), kind, save_all=True, append_images=rest, duration=10)


def changed(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def jpeg_of_size(width: int, height: int) -> bytes:
    """A small JPEG that declares another size."""
    content = saved(picture(), "JPEG")
    return changed(content, content.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))


def jpeg_of_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    content = saved(picture(), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def jpeg_with_exif(data: bytes) -> bytes:
    content = saved(picture(), "JPEG")
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 8) + b"Exif\0\0" + data + content[2:]


# What can't be a picture: the name, the file, and a word of the one line that it gives.
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "one byte": (lambda: b"\x89", "no picture"),
    "text": (lambda: b"a cat on a mat\n" * 9, "no picture"),
    "html": (lambda: b"<!DOCTYPE html><img src='http://169.254.169.254/'>", "HTML"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "SVG"),
    "svg behind xml": (lambda: b"\xef\xbb\xbf<?xml version='1.0'?>\n<svg/>", "SVG"),
    "svg packed": (lambda: gzip.compress(b"<svg/>"), "gzip"),
    "eps": (lambda: saved(picture(), "EPS"), "EPS"),
    "pdf": (lambda: saved(picture(), "PDF"), "PDF"),
    "tiff": (lambda: saved(picture(), "TIFF"), "TIFF"),
    "photoshop": (lambda: b"8BPS\0\1" + bytes(40), "Photoshop"),
    "bmp": (lambda: saved(picture(), "BMP"), "BMP"),
    "icon": (lambda: saved(picture(), "ICO"), "icon"),
    "jpeg 2000": (lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "JPEG 2000"),
    "avif": (lambda: b"\0\0\0\x20ftypavif" + bytes(40), "AVIF"),
    "video": (lambda: b"\0\0\0\x20ftypisom" + bytes(40), "video"),
    "zip": (lambda: b"PK\3\4" + bytes(40), "zip"),
    "pointer of git lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
    "data url": (lambda: b"data:image/png;base64,AAAA", "URL"),
    "more than 20 MB": (lambda: png(1, 1) + bytes(20_000_000), "bytes"),
    "png, signature alone": (lambda: PNG, "header"),
    "png, cut in its header": (lambda: png(9, 9)[:20], "cut short"),
    "png, cut in its pixels": (lambda: saved(picture(), "PNG")[:-900], "cut short"),
    "png without an end": (lambda: png(9, 9)[:-12], "cut short"),
    "png without pixels": (lambda: PNG + png(9, 9)[8:33] + chunk(b"IEND"), "decoded"),
    "png, pixels of noise": (lambda: png(9, 9, data=b"\x78\x9c" + noise().tobytes()), "decoded"),
    "png, wrong sum": (lambda: changed(png(9, 9), 29, bytes(4)), "decoded"),
    "png, 60,000 a side": (lambda: png(60_000, 60_000, data=b""), "60,000"),
    "png, 13,000 a side, whole": (lambda: png(13_000, 13_000, kind=0, depth=1), "13,000"),
    "png, no width": (lambda: png(0, 9, data=b""), "pixels"),
    "png, side of 2 billion": (lambda: png(2**31 - 1, 1, data=b""), "pixels"),
    "png, depth of 7": (lambda: png(9, 9, depth=7, data=b""), "decoded"),
    "png, chunk of 4 GB": (lambda: png(9, 9)[:33] + b"\xff\xff\xff\xffIDAT" + bytes(99), "cut short"),
    "png, header behind": (lambda: PNG + chunk(b"tEXt", b"a\0b") + png(9, 9)[8:], "header"),
    "png, 200,000 chunks": (lambda: png(9, 9, *[chunk(b"prIv")] * 200_000), "chunks"),
    "jpeg, start alone": (lambda: b"\xff\xd8\xff\xd9", "size"),
    "jpeg, cut in its header": (lambda: saved(picture(), "JPEG")[:170], "decoded"),
    "jpeg, cut in its pixels": (lambda: saved(picture(), "JPEG")[:-200], "decoded"),
    "jpeg, 65,500 a side": (lambda: jpeg_of_size(65_500, 65_500), "65,500"),
    "jpeg, no height": (lambda: jpeg_of_size(40, 0), "pixels"),
    "jpeg, 6,000 a side, progressive": (
        lambda: jpeg_of_size(6_000, 6_000).replace(b"\xff\xd9", b"\xff\xda\0\2\xff\xd9"),
        "25 million",
    ),
    "jpeg, 3,000 scans": (lambda: jpeg_of_scans(3_000), "scans"),
    "jpeg, 200,000 segments": (lambda: b"\xff\xd8" + b"\xff\xe0\0\2" * 200_000 + b"\xff\xd9", "segments"),
    "gif, cut in its header": (lambda: saved(picture(), "GIF")[:12], "cut short"),
    "gif, cut in its pixels": (lambda: saved(picture(), "GIF")[:-300], "decoded"),
    "gif without a picture": (lambda: b"GIF89a\1\0\1\0\0\0\0;", "without a picture"),
    "gif, 65,535 a side": (lambda: changed(saved(picture(), "GIF"), 6, b"\xff\xff\xff\xff"), "65,535"),
    "gif, frame beyond its screen": (
        lambda: b"GIF89a\1\0\1\0\0\0\0,\xff\xff\xff\xff\xff\xff\xff\xff\0\2\2L\1\0;",
        "131,070",
    ),
    "gif, 200,000 blocks": (lambda: b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1a" * 200_000 + b"\0;", "blocks"),
    "webp, cut in its header": (lambda: saved(picture(), "WEBP")[:22], "size"),
    "webp, cut in its pixels": (lambda: saved(picture(), "WEBP")[:-100], "decoded"),
    "webp, 16,384 a side": (lambda: b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2, "16,384"),
    "webp of nothing": (lambda: b"RIFF\4\0\0\0WEBP", "size"),
    **{
        f"noise behind the start of a {name}": ((lambda start=start: start + noise(99, 99).tobytes()), "")
        for name, start in {
            "png": PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)),
            "jpeg": b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(9) + b"\xff\xc0\0\x11\x08\0\x09\0\x09\3",
            "gif": b"GIF89a\x09\0\x09\0\0\0\0,\0\0\0\0\x09\0\x09\0\0\x08",
            "webp": b"RIFF\xff\0\0\0WEBPVP8 \xf0\0\0\0\x10\2\0\x9d\1\x2a\x09\0\x09\0",
        }.items()
    },
}

# What is one: the name, the file, and its height and width.
READ: dict[str, tuple[Callable[[], bytes], tuple[int, int]]] = {
    "one pixel": (lambda: png(1, 1), (1, 1)),
    "a long row": (lambda: png(16_384, 1), (1, 16_384)),
    "a high column": (lambda: png(1, 16_384), (16_384, 1)),
    "grey": (lambda: saved(picture("L"), "PNG"), (24, 40)),
    "black and white": (lambda: saved(picture("1"), "PNG"), (24, 40)),
    "grey of 16 bits": (lambda: png(40, 24, kind=0, depth=16), (24, 40)),
    "colours of 16 bits": (lambda: png(40, 24, kind=6, depth=16), (24, 40)),
    "palette": (lambda: saved(picture("P"), "PNG"), (24, 40)),
    "palette, transparent": (lambda: saved(picture("P"), "PNG", transparency=b"\0\x80\xff"), (24, 40)),
    "grey, transparent": (lambda: saved(picture("LA"), "PNG"), (24, 40)),
    "colours, transparent": (lambda: saved(picture("RGBA"), "PNG"), (24, 40)),
    "colour key": (lambda: saved(picture(), "PNG", transparency=(0, 0, 0)), (24, 40)),
    "png, frames": (lambda: animation("PNG", 300), (24, 40)),
    "png, 2 billion frames declared": (lambda: png(9, 9, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))), (9, 9)),
    "png, pixels too many": (lambda: png(9, 9, data=zlib.compress(bytes(10_000_000))), (9, 9)),
    "png, pixels too few": (lambda: png(9, 9, data=zlib.compress(bytes(28 * 5))), (9, 9)),
    "png, zTXt bomb": (lambda: png(9, 9, chunk(b"zTXt", b"a\0\0" + bomb())), (9, 9)),
    "png, iTXt bomb": (lambda: png(9, 9, chunk(b"iTXt", b"a\0\1\0\0\0" + bomb())), (9, 9)),
    "png, iCCP bomb": (lambda: png(9, 9, chunk(b"iCCP", b"a\0\0" + bomb())), (9, 9)),
    "png, 70 texts of 1 MB": (
        lambda: png(9, 9, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))] * 70),
        (9, 9),
    ),
    "png, a zip behind it": (lambda: png(9, 9) + b"PK\3\4" + bytes(99), (9, 9)),
    "jpeg": (lambda: saved(picture(), "JPEG"), (24, 40)),
    "jpeg, grey": (lambda: saved(picture("L"), "JPEG"), (24, 40)),
    "jpeg, CMYK": (lambda: saved(picture("CMYK"), "JPEG"), (24, 40)),
    "jpeg, progressive": (lambda: saved(picture(), "JPEG", progressive=True), (24, 40)),
    "jpeg, turned": (lambda: saved(picture(), "JPEG", exif=exif(6)), (40, 24)),
    "jpeg, orientation 99": (lambda: saved(picture(), "JPEG", exif=exif(99)), (24, 40)),
    "jpeg, EXIF of noise": (lambda: jpeg_with_exif(noise().tobytes()[:900]), (24, 40)),
    "jpeg, EXIF in a circle": (
        lambda: jpeg_with_exif(b"II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0"),
        (24, 40),
    ),
    "jpeg, a film behind it": (lambda: saved(picture(), "JPEG") + b"\xff\xda" * 9_000, (24, 40)),
    "jpeg, two pictures": (lambda: saved(picture(), "MPO", save_all=True, append_images=[picture()]), (24, 40)),
    "gif": (lambda: saved(picture(), "GIF"), (24, 40)),
    "gif, frames": (lambda: animation("GIF", 300), (24, 40)),
    "webp": (lambda: saved(picture(), "WEBP"), (24, 40)),
    "webp, without loss": (lambda: saved(picture("RGBA"), "WEBP", lossless=True), (24, 40)),
    "webp, frames": (lambda: animation("WEBP", 30), (24, 40)),
}  # fmt: skip
