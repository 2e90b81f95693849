"""Pictures: from the bytes of a file, or a data: URL, to pixels and patches. What can't be read safely is one line.

Needs Pillow, `pip install 'gptjax[images]'`; imports no jax.
"""

import base64
import binascii
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import VisionConfig
from gptjax.config.section import InputError, one_line
from gptjax.data.image_headers import MEGAPIXELS, MOST_BYTES, check_image, check_size

TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif")  # of a data: URL
_STRIP = 1 << 20  # pixels converted at a time
_ORIENTATION = 0x0112  # the tag of EXIF


class Picture(NamedTuple):
    """A picture as a message carries it: the original bytes, their SHA-256 in hex, and where they come from."""

    content: bytes
    key: str
    origin: str

    @classmethod
    def of(cls, content: bytes, origin: str) -> "Picture":
        """The picture of a file's bytes, which are not looked at."""
        return cls(content, hashlib.sha256(content).hexdigest(), origin)


def image_patches(content: bytes, origin: str, vision: VisionConfig) -> np.ndarray:
    """The patches of a picture's file: uint8 (P, Y), those of its pixels bit for bit, without holding all of these."""
    return _read(content, origin, lambda strips, height, width: _patches(strips, height, width, vision))


def read_image(content: bytes, origin: str) -> np.ndarray:
    """The pixels of a PNG, JPEG, WebP or GIF: uint8 (height, width, 3), red, green and blue.

    Turned as EXIF says; transparent places over white; of 16 bits the upper 8; of an animation the first frame. Raises
    InputError, naming the origin, for other files, damaged ones, and those beyond the limits of `image_headers`.
    """

    def whole(strips: Iterator[np.ndarray], height: int, width: int) -> np.ndarray:
        pixels_HWC, top = np.empty((height, width, 3), np.uint8), 0
        for strip_HWC in strips:
            pixels_HWC[top : top + len(strip_HWC)] = strip_HWC
            top += len(strip_HWC)
        return pixels_HWC

    return _read(content, origin, whole)


def patches_of(pixels_HWC: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """The patches of a picture that is fitted to vision.side x vision.side pixels: uint8 (P, Y).

    Bicubic; with vision.fit="pad" in its proportions, in the middle of a white square; with "crop" the square in its
    middle; vision.margin more pixels on the right and below are cut off. Patches and the pixels in each
    are in raster order, and a pixel is its red, green and blue: Y = patch x patch x 3.
    """
    height, width, _ = pixels_HWC.shape
    return _patches(iter([pixels_HWC]), height, width, vision)


def from_data_url(url: str, origin: str) -> bytes:
    """The bytes of a picture in a data: URL in base64; raises InputError for every other URL. Nothing is fetched."""
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*):", url[:64])
    if not scheme or scheme[1].lower() != "data":
        got = f"a URL of {scheme[1].lower()}:, which is never fetched" if scheme else f"{one_line(url, 40)!r}"
        raise InputError(f"{origin}: {got}; wanted data:image/png;base64,...")
    start = url[:128].find(",")
    kind, encoding, *more = [*url[scheme.end() : max(start, 0)].strip().lower().split(";"), ""]
    if kind not in TYPES or encoding != "base64" or more != [""]:
        got = one_line(url[: start if start > 0 else 40], 60)
        raise InputError(f"{origin}: {got!r}; wanted {', '.join(TYPES)} and ;base64")
    if len(url) > 2 * MOST_BYTES:
        raise InputError(
            f"{origin}: a URL of {len(url):,} characters; wanted a picture of at most {MOST_BYTES:,} bytes"
        )
    text = "".join(url[start + 1 :].split())
    if len(text) > 4 * -(-MOST_BYTES // 3):
        raise InputError(f"{origin}: about {len(text) * 3 // 4:,} bytes; wanted a picture of at most {MOST_BYTES:,}")
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{origin}: broken base64 ({one_line(error, 60)}); encode the file again") from None
    if not content:
        raise InputError(f"{origin}: an empty data: URL; wanted a picture")
    return content


def decoder_versions() -> dict[str, str]:
    """The versions of Pillow and its decoders, by which a file's pixels may differ; empty for one that is not there."""
    image_module = load_decoders()
    from PIL import features

    names = {"libjpeg-turbo": "libjpeg_turbo", "zlib": "zlib", "libwebp": "webp"}
    return {"Pillow": image_module.__version__, **{n: features.version(of) or "" for n, of in names.items()}}


def load_decoders() -> Any:
    """Pillow's module Image, with the four decoders; raises InputError, in one line, where Pillow is not installed."""
    try:
        from PIL import GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
    except ImportError:
        raise InputError("reading pictures needs a package more: pip install 'gptjax[images]'") from None
    del GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # they are known to Image now
    return Image


def _read(content: bytes, origin: str, use: Callable[[Iterator[np.ndarray], int, int], np.ndarray]) -> np.ndarray:
    """The result of use(strips, height, width) of a picture's pixels; see `read_image`."""
    image_module = load_decoders()
    kind, needed = check_image(content, origin)
    try:
        with image_module.open(io.BytesIO(needed), formats=(kind.upper(),)) as image:
            width, height = image.size
            check_size(width, height, MEGAPIXELS[kind], f"{origin}: a {kind} of")
            image.load()
            orientation = _orientation(image)
            rows, columns = (width, height) if orientation >= 5 else (height, width)
            return use(_strips(image, orientation), rows, columns)
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{origin}: a {kind} that needs more memory than there is; save it smaller") from None
    except Exception as error:  # of a decoder that was given damaged bytes: of many types
        raise InputError(f"{origin}: a {kind} that can't be decoded ({one_line(error, 100)}); copy it again") from None


def _orientation(image: Any) -> int:
    """The orientation of a picture, 1 to 8, as EXIF 2.3 counts them; 1 where it has none or it can't be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF: the pixels are whole
        return 1
    return value if value in range(1, 9) else 1


def _strips(image: Any, orientation: int) -> Iterator[np.ndarray]:
    """Yields the turned pixels, some rows at a time from the top: a large image is held once, in the decoder's form."""
    width, height = image.size
    quarter = orientation >= 5  # rows are columns of the file
    rows, columns = (width, height) if quarter else (height, width)
    step = max(1, _STRIP // columns)
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        upward = orientation in (3, 4, 7, 8)  # the first row is the file's last
        low, high = (rows - bottom, rows - top) if upward else (top, bottom)
        strip_HWC = _converted(image.crop((low, 0, high, height) if quarter else (0, low, width, high)))
        strip_HWC = strip_HWC.swapaxes(0, 1) if quarter else strip_HWC
        yield strip_HWC[:: -1 if upward else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def _patches(strips: Iterator[np.ndarray], height: int, width: int, vision: VisionConfig) -> np.ndarray:
    """The patches of a picture that comes in strips; see `patches_of`."""
    side, patch = vision.side + vision.margin, vision.patch
    if vision.fit == "crop":
        strips = _middle(strips, height, width)
        height = width = min(height, width)
    scale = side / max(height, width)
    pad = vision.fit == "pad"
    wide, high = (max(1, round(width * scale)), max(1, round(height * scale))) if pad else (side, side)
    # Pillow resizes each row, then each column: so the rows of each strip, and then the columns, are the same.
    narrow_HWC = np.concatenate([_resized(strip_HWC, wide, len(strip_HWC)) for strip_HWC in strips])
    left, top = (side - wide) // 2, (side - high) // 2
    square_SSC = np.full((side, side, 3), 255, np.uint8)
    square_SSC[top : top + high, left : left + wide] = _resized(narrow_HWC, wide, high)
    rows = vision.side // patch
    cut = square_SSC[: vision.side, : vision.side].reshape(rows, patch, rows, patch, 3).swapaxes(1, 2)
    return cut.reshape(rows * rows, patch * patch * 3)


def _middle(strips: Iterator[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
    """Yields the square in the middle of a picture that comes in strips."""
    least = min(height, width)
    top, left = (height - least) // 2, (width - least) // 2
    for strip_HWC in strips:
        inside_HWC = strip_HWC[max(0, top) : max(0, top + least), left : left + least]
        if len(inside_HWC):
            yield inside_HWC
        top -= len(strip_HWC)


def _resized(pixels_HWC: np.ndarray, width: int, height: int) -> np.ndarray:
    if pixels_HWC.shape[:2] == (height, width):
        return pixels_HWC
    image_module = load_decoders()
    image = image_module.fromarray(np.ascontiguousarray(pixels_HWC))
    return np.asarray(image.resize((width, height), image_module.Resampling.BICUBIC))


def _converted(image: Any) -> np.ndarray:
    """The red, green and blue of an image of any mode, over white."""
    key = image.info.get("transparency")
    if image.mode.startswith("I"):  # 16 bits of grey
        grey_HW = np.asarray(image)
        shown_HW = (grey_HW >> 8).clip(0, 255).astype(np.uint8)
        if isinstance(key, int):
            shown_HW = np.where(grey_HW == key, np.uint8(255), shown_HW)
        return np.repeat(shown_HW[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or key is not None:
        rgba_HWC = np.asarray(image.convert("RGBA"))
        alpha_HWC = rgba_HWC[:, :, 3:].astype(np.uint16)
        over_HWC = rgba_HWC[:, :, :3] * alpha_HWC + 255 * (255 - alpha_HWC)
        return ((over_HWC + 127) // 255).astype(np.uint8)
    return np.asarray(image.convert("RGB"))
