"""Prompts with pictures: from texts and conversations to ids in which the pictures have their places."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.config import VisionConfig
from gptjax.config.section import InputError
from gptjax.data.image_headers import MOST_BYTES
from gptjax.data.image_messages import pictures_of
from gptjax.data.image_rows import place_id, place_images
from gptjax.data.images import Picture, image_patches
from gptjax.generation.image_places import require_vision
from gptjax.tokenizer import Tokenizer
from gptjax.tokenizer.templates import Message


class ImagePrompt(NamedTuple):
    """Ids that a model goes on from, and the images whose ids are among them."""

    ids: list[int]
    pictures: dict[int, np.ndarray]


PatchReader = Callable[[Picture, VisionConfig], np.ndarray]
"""Makes patches_PY of a picture; raises InputError, which names its origin, for one that can't be read."""


def read_patches(picture: Picture, vision: VisionConfig) -> np.ndarray:
    """patches_PY of a picture, decoded in this process."""
    return image_patches(picture.content, picture.origin, vision)


def reading_once() -> PatchReader:
    """`read_patches` that decodes each picture once, and keeps its patches."""
    known: dict[str, np.ndarray] = {}

    def read(picture: Picture, vision: VisionConfig) -> np.ndarray:
        if picture.key not in known:
            known[picture.key] = read_patches(picture, vision)
        return known[picture.key]

    return read


def open_picture(image: "str | Path | bytes | Picture", origin: str = "image") -> Picture:
    """A picture of the user's: a file by its path, or its bytes. Raises InputError where a file can't be read."""
    if isinstance(image, Picture):
        return image
    if isinstance(image, bytes):
        return Picture.of(image, origin)
    try:
        path = Path(image)
        if path.exists() and not path.is_file():
            raise InputError(f"image {str(image)!r} is no file; wanted a picture")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise InputError(f"image {str(image)!r} has {size:,} bytes; wanted at most {MOST_BYTES:,}")
        return Picture.of(path.read_bytes(), str(image))
    except (OSError, ValueError) as e:
        raise InputError(f"image {str(image)!r} can't be read ({getattr(e, 'strerror', None) or e})") from e


def place_pictures(
    ids: list[int], pictures: Sequence[Picture], vision: VisionConfig, read: PatchReader = read_patches
) -> ImagePrompt:
    """The prompt of ids that hold -1 at the first picture's place, -2 at the second's, and so on.

    Raises InputError for a model that reads no images, and for a picture that can't be read.
    """
    if not pictures:
        return ImagePrompt(ids, {})
    require_vision(vision)
    placed, _ = place_images(ids, [0] * len(ids), [picture.key for picture in pictures], vision)
    different = {place_id(picture.key): picture for picture in pictures}
    return ImagePrompt(placed, {place: read(picture, vision) for place, picture in different.items()})


def rendered_prompt(
    ids: list[int], messages: Sequence[Message], vision: VisionConfig, read: PatchReader = read_patches
) -> ImagePrompt:
    """The prompt of a conversation whose ids a template made: see `place_pictures`."""
    return place_pictures(ids, pictures_of(messages), vision, read)


def text_prompt(
    tokenizer: Tokenizer,
    text: str,
    pictures: Sequence[Picture],
    vision: VisionConfig,
    read: PatchReader = read_patches,
) -> ImagePrompt:
    """The prompt of a text with pictures before it; where the prompt begins with an id of its own, they follow that."""
    ids = behind_pictures(tokenizer, tokenizer.prompt_ids(text), pictures)
    return place_pictures(ids, pictures, vision, read)


def behind_pictures(tokenizer: Tokenizer, ids: Sequence[int], pictures: Sequence[Picture]) -> list[int]:
    """The ids of a text with -1, -2, ... for pictures before it, or behind the id that begins a document."""
    begun = int(list(ids[:1]) == [tokenizer.bos_id])
    return [*ids[:begun], *(-1 - n for n in range(len(pictures))), *ids[begun:]]


def with_pictures(text: str, pictures: Sequence[Picture]) -> str | list[dict[str, object]]:
    """The content of a message: the pictures, and the text behind them."""
    images = [{"type": "image", "image": picture} for picture in pictures]
    return [*images, {"type": "text", "text": text}] if images else text
