"""Pictures: from the bytes of a file, or a data: URL, to pixels and patches. What can't be read safely is one line.

Needs Pillow, `pip install 'gptjax[images]'`; imports no jax.
"""

import base64
import binascii
import hashlib
import io
import re
from typing import Any, NamedTuple

import numpy as np

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


def image_patches(content: bytes, origin: str, vision: Any) -> np.ndarray:
    """The patches of a picture's file: uint8 (P, Y), as `read_image` and `patches_of` make them."""
    return patches_of(read_image(content, origin), vision)


def read_image(content: bytes, origin: str) -> np.ndarray:
    """The pixels of a PNG, JPEG, WebP or GIF: uint8 (height, width, 3), red, green and blue.

    Turned as EXIF says; transparent places over white; of 16 bits the upper 8; of an animation the first frame. Raises
    InputError, naming the origin, for other files, damaged ones, and those beyond the limits of `image_headers`.
    """
    image_module = _pillow()
    kind, needed = check_image(content, origin)
    try:
        with image_module.open(io.BytesIO(needed), formats=(kind.upper(),)) as image:
            check_size(*image.size, MEGAPIXELS[kind], f"{origin}: a {kind} of")
            image.load()
            return _rgb(image, _orientation(image))
    except (InputError, KeyboardInterrupt):
        raise
    except Exception as error:  # of a decoder that was given damaged bytes: of many types
        raise InputError(f"{origin}: a {kind} that can't be decoded ({one_line(error, 100)}); copy it again") from None


def patches_of(pixels_HWC: np.ndarray, vision: Any) -> np.ndarray:
    """The patches of a picture that is fitted to vision.side x vision.side pixels: uint8 (P, Y).

    Bicubic; with vision.fit="pad" in its proportions, in the middle of a white square. Patches and the pixels in each
    are in raster order, and a pixel is its red, green and blue: Y = patch x patch x 3.
    """
    side, patch = vision.side, vision.patch
    height, width, _ = pixels_HWC.shape
    scale = side / max(height, width)
    fitted = (max(1, round(width * scale)), max(1, round(height * scale))) if vision.fit == "pad" else (side, side)
    if fitted != (width, height):
        image_module = _pillow()
        image = image_module.fromarray(pixels_HWC)
        pixels_HWC = np.asarray(image.resize(fitted, image_module.Resampling.BICUBIC))
    left, top = (side - fitted[0]) // 2, (side - fitted[1]) // 2
    square_SSC = np.full((side, side, 3), 255, np.uint8)
    square_SSC[top : top + fitted[1], left : left + fitted[0]] = pixels_HWC
    rows = side // patch
    cut = square_SSC.reshape(rows, patch, rows, patch, 3).swapaxes(1, 2)
    return cut.reshape(rows * rows, patch * patch * 3)


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
    image_module = _pillow()
    from PIL import features

    names = {"libjpeg-turbo": "libjpeg_turbo", "zlib": "zlib", "libwebp": "webp"}
    return {"Pillow": image_module.__version__, **{n: features.version(of) or "" for n, of in names.items()}}


def _pillow() -> Any:
    """Pillow's module Image; raises InputError, in one line, where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError("reading pictures needs a package more: pip install 'gptjax[images]'") from None
    return Image


def _orientation(image: Any) -> int:
    """The orientation of a picture, 1 to 8; 1 where its EXIF has none or can't be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF: the pixels are whole
        return 1
    return value if value in range(1, 9) else 1


def _rgb(image: Any, orientation: int) -> np.ndarray:
    """The turned pixels of an image, converted in strips: so the image and its pixels are all that is held."""
    width, height = image.size
    turned = orientation >= 5  # by a quarter: the sides change places
    pixels_HWC = np.empty((width, height, 3) if turned else (height, width, 3), np.uint8)
    stored = _as_stored(pixels_HWC, orientation)
    step = max(1, _STRIP // width)
    for top in range(0, height, step):
        stored[top : top + step] = _converted(image.crop((0, top, width, min(top + step, height))))
    return pixels_HWC


def _as_stored(pixels_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """A view of turned pixels with the rows and columns that the file has, by the tag Orientation of EXIF 2.3."""
    view = pixels_HWC.swapaxes(0, 1) if orientation >= 5 else pixels_HWC
    down = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    right = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    if orientation >= 5:
        down, right = right, down
    return view[down, right]


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
