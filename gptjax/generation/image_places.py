"""Images in prompts: ids, negative where an image's token stands, and each image's patches under its id.

An image's id is made of its content (see data.image_rows.place_id), so equal ids are equal prompts, images and all. On
the device these places hold id 0, and what the encoder made of the patches stands in place of its embedding.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import VisionConfig
from gptjax.config.section import InputError
from gptjax.model.decoder import Decoder, Params
from gptjax.model.vision import ImageTokens, encode_images
from gptjax.parallel.sharding import constrain

Pictures = Mapping[int, np.ndarray]
"""patches_PY of images, uint8, by the id that stands at their places."""

NO_PICTURES: Pictures = {}


def image_spans(ids: Sequence[int], num_tokens: int) -> list[tuple[int, int]]:
    """(start, end) of each image in a prompt, one after the other; equal images may stand side by side."""
    negative = np.flatnonzero(np.asarray(ids) < 0)
    starts, end = [], 0
    for place in negative.tolist():
        if place >= end:
            starts.append(place)
            end = place + num_tokens
    return [(start, start + num_tokens) for start in starts]


def require_vision(vision: VisionConfig) -> None:
    """Raises InputError for a model that reads no images."""
    if not vision.patch:
        raise InputError("this model reads no images (model.vision.patch=0); leave them out, or take one that does")


def check_images(ids: Sequence[int], pictures: Pictures, vision: VisionConfig, name: str) -> None:
    """Raises InputError where a negative id has no image, an image is not whole, or nothing stands behind the last."""
    require_vision(vision)
    for start, end in image_spans(ids, vision.num_tokens):
        if ids[start] in pictures and (end > len(ids) or any(i != ids[start] for i in ids[start:end])):
            raise InputError(f"{name} holds a part of an image; wanted all of its {vision.num_tokens} tokens")
    if (wrong := next((i for i in ids if i < 0 and i not in pictures), None)) is not None:
        raise InputError(f"{name} holds token id {wrong}; wanted 0 or more, or the id of an image that is given")
    if len(ids) and ids[-1] < 0:
        raise InputError(f"{name} ends with an image; wanted a text behind it")


def device_ids(ids: Sequence[int]) -> np.ndarray:
    """The ids as int32, with 0 at the places of images."""
    return np.maximum(np.asarray(ids, np.int64), 0).astype(np.int32)


@functools.partial(jax.jit, static_argnames="decoder")
def encode_picture(decoder: Decoder, params: Params, patches_PY: jax.Array) -> jax.Array:
    """tokens_TD of one image: always one, so that its numbers depend on no other, and one program does for all."""
    return encode_images(decoder.cfg, params, patches_PY[None])[0]


def image_places(ids: Sequence[int], vision: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """(offset_L, last_L) of a prompt: each place's token in its image, -1 for text, and the last place that it sees."""
    offset_L, last_L = np.full(len(ids), -1, np.int32), np.arange(len(ids), dtype=np.int32)
    for start, end in image_spans(ids, vision.num_tokens):
        offset_L[start:end] = np.arange(end - start)
        if vision.sees_all:
            last_L[start:end] = end - 1
    return offset_L, last_L


def embed_images(
    decoder: Decoder, params: Params, prompts: Sequence[Sequence[int]], pictures: Pictures, length: int
) -> ImageTokens | None:
    """The images of a batch of prompts, each encoded once, at their places in rows of `length`; None without any."""
    vision, shape = decoder.cfg.vision, (len(prompts), length)
    used = list(dict.fromkeys(i for ids in prompts for i in ids if i < 0))
    if not used:
        return None
    index_BL = np.full(shape, -1, np.int32)
    last_BL = np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy()
    first = {place: n * vision.num_tokens for n, place in enumerate(used)}
    for row, ids in enumerate(prompts):
        offset_L, last_L = image_places(ids, vision)
        begun_L = np.array([first.get(i, 0) for i in ids], np.int32)
        index_BL[row, : len(ids)] = np.where(offset_L < 0, -1, begun_L + offset_L)
        last_BL[row, : len(ids)] = last_L
    return _placed([encode_picture(decoder, params, pictures[i]) for i in used], index_BL, last_BL)


@jax.jit
def _placed(images: list[jax.Array], index_BL: jax.Array, last_BL: jax.Array) -> ImageTokens:
    x_BLD = jnp.concatenate(images)[jnp.maximum(index_BL, 0)]
    return ImageTokens(constrain(x_BLD, "BLD"), index_BL >= 0, last_BL)
