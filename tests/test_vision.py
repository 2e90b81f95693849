"""Images in the decoder: an image sees itself whole, nobody sees another's, and a cache changes no number."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ModelConfig, VisionConfig
from gptjax.config.section import InputError
from gptjax.model.cache import empty_cache
from gptjax.model.decoder import Decoder, extend, hidden_states, init_params, unstacked
from gptjax.model.vision import ImageTokens, encode_images

read, go_on, encode = (jax.jit(function, static_argnums=0) for function in (hidden_states, extend, encode_images))

VISION = VisionConfig(patch=4, side=16, merge=2, layers=2, width=16, num_heads=2)
CFG = ModelConfig(num_layers=2, width=32, num_heads=2, dtype="float32", vision=VISION)
T = VISION.num_tokens
LENGTH = 24


@functools.cache
def decoder_of(cfg: ModelConfig = CFG) -> tuple[Decoder, dict]:
    decoder = Decoder(cfg, vocab_size=40, context=LENGTH)
    params = jax.jit(init_params(decoder))(jax.random.key(0))
    # Weights that tell one patch from another from the start.
    return decoder, jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, params)


def rows_of(*rows: list[tuple[str, int]], sees_all: bool = True) -> dict[str, jax.Array]:
    """A batch of rows of ("text", tokens), ("image", its number) and ("new", 0), where another document begins."""
    pictures = np.random.default_rng(1).integers(0, 256, (8, 16, 48), np.uint8)
    words = np.random.default_rng(2).integers(0, 40, 999)
    batch = {n: np.zeros((len(rows), LENGTH), np.int32) for n in ("inputs_BL", "positions_BL", "targets_BL")}
    batch |= {
        "index_BL": np.full((len(rows), LENGTH), -1, np.int32),
        "until_BL": np.zeros((len(rows), LENGTH), np.int32),
    }
    batch["last_BL"] = np.tile(np.arange(LENGTH, dtype=np.int32), (len(rows), 1))
    batch["segments_BL"] = batch["until_BL"].copy()
    patches = np.zeros((len(rows), 2, 16, 48), np.uint8)
    for b, row in enumerate(rows):
        place = start = images = 0
        for kind, n in [*row, ("new", 0)]:
            if kind == "new":
                batch["until_BL"][b, start:place] = place
                batch["segments_BL"][b, start:place] = batch["segments_BL"][b].max() + 1
                batch["positions_BL"][b, start:place] = np.arange(place - start)
                start = place
                continue
            size = T if kind == "image" else n
            span = slice(place, place + size)
            if kind == "image":
                batch["inputs_BL"][b, span] = -1 - n
                batch["index_BL"][b, span] = images * T + np.arange(T)
                batch["last_BL"][b, span] = place + T - 1 if sees_all else np.arange(place, place + T)
                patches[b, images], images = pictures[n], images + 1
            else:
                batch["inputs_BL"][b, span] = words[n * 10 : n * 10 + n]
            place += size
        batch["until_BL"][b, place:] = LENGTH
    return {n: jnp.asarray(x) for n, x in (batch | {"patches_BIPY": patches}).items()}


def places(row: list[tuple[str, int]]) -> int:
    return sum(T if kind == "image" else n for kind, n in row)


@pytest.mark.parametrize("layers", [0, 2])
def test_the_numbers_of_a_document_are_those_that_it_has_alone(layers):
    decoder, params = decoder_of(dataclasses.replace(CFG, vision=dataclasses.replace(VISION, layers=layers)))
    first, second = [("text", 3), ("image", 1), ("text", 4)], [("image", 2), ("text", 5)]
    both, _ = read(decoder, params, rows_of([*first, ("new", 0), *second]))
    n = places(first)
    for row, found in ((first, both[0, :n]), (second, both[0, n : n + places(second)])):
        alone, _ = read(decoder, params, rows_of(row))
        np.testing.assert_allclose(found, alone[0, : places(row)], atol=2e-5)
    other, _ = read(decoder, params, rows_of([*first[:1], ("image", 3), *first[2:]]))
    assert np.abs(np.asarray(other - both)[0, 3 + T : n]).min(axis=-1).max() > 1e-4, "the text reads its picture"
    np.testing.assert_array_equal(other[0, :3], both[0, :3])


@pytest.mark.parametrize("sees_all", [True, False])
def test_an_image_sees_itself_whole_or_what_lies_before(sees_all):
    decoder, params = decoder_of(dataclasses.replace(CFG, vision=dataclasses.replace(VISION, layers=0)))
    batch = rows_of([("text", 2), ("image", 1), ("text", 3)], sees_all=sees_all)
    before, _ = read(decoder, params, batch)
    # Of the image's T tokens the last one changes: without an encoder only attention can tell the others.
    changed = np.array(batch["patches_BIPY"])
    changed[0, 0, -1] ^= 255
    after, _ = read(decoder, params, batch | {"patches_BIPY": jnp.asarray(changed)})
    moved = np.abs(np.asarray(after - before))[0].max(axis=-1) > 1e-6
    assert moved[2 + T - 1 : 5 + T].all() and not moved[:2].any()
    assert moved[2 : 2 + T - 1].all() if sees_all else not moved[2 : 2 + T - 1].any()


def test_a_row_does_not_depend_on_the_images_of_its_neighbours():
    decoder, params = decoder_of()
    row, other = [("image", 1), ("text", 4)], [("image", 2), ("text", 6)]
    several, _ = read(decoder, params, rows_of(row, other, [("text", 7)]))
    exchanged, _ = read(decoder, params, rows_of(row, [("image", 5), ("text", 6)], [("text", 7)]))
    np.testing.assert_array_equal(several[0], exchanged[0])
    np.testing.assert_array_equal(several[2], exchanged[2])
    assert np.abs(np.asarray(several[1] - exchanged[1])).max() > 1e-3


def test_a_cache_filled_in_pieces_gives_the_numbers_of_the_whole_row():
    decoder, params = decoder_of()
    row = [("text", 3), ("image", 1), ("text", 4), ("image", 2), ("text", 5)]
    batch, n = rows_of(row), places(row)
    whole, _ = read(decoder, params, batch)
    served = unstacked(params, "float32")
    tokens_ITD = encode(decoder.cfg, served, batch["patches_BIPY"][0])
    index_BL = np.asarray(batch["index_BL"])
    x_BLD = tokens_ITD.reshape(-1, 32)[np.maximum(index_BL, 0)]
    cache, found, cuts = empty_cache(decoder.cfg, 1, LENGTH, jnp.float32), [], [0, 3 + T, 5 + T, n - 1, n]
    for a, b in zip(cuts, cuts[1:]):
        image = ImageTokens(x_BLD[:, a:b], jnp.asarray(index_BL[:, a:b] >= 0), batch["last_BL"][:, a:b])
        x, cache = go_on(decoder, served, batch["inputs_BL"][:, a:b], batch["positions_BL"][:, a:b], cache, image)
        found.append(x)
    np.testing.assert_allclose(np.concatenate(found, axis=1)[0], whole[0, :n], atol=2e-5)


def test_merged_patches_are_squares_of_neighbours():
    cfg = dataclasses.replace(CFG, vision=dataclasses.replace(VISION, layers=0, mean=(0.0,) * 3, std=(1.0,) * 3))
    patches_PY = np.repeat(np.arange(16, dtype=np.uint8)[:, None], 48, axis=1)
    one_hot_UD = np.zeros((cfg.vision.merged_size, 32), np.float32)
    one_hot_UD[np.arange(4) * 48, np.arange(4)] = 255  # the first number of each of the four patches of a token
    tokens_ITD = encode_images(cfg, {"image_UD": jnp.asarray(one_hot_UD)}, jnp.asarray(patches_PY)[None])
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_allclose(tokens_ITD[0, :, :4], expected, atol=1e-5)


def test_settings_that_do_not_fit_are_refused_by_name():
    for settings, message in (
        ({"attention": "cudnn", "dtype": "bfloat16", "head_dim": 64}, "model.vision.patch=4"),
        ({"mup_base_width": 32}, "model.mup_base_width=32"),
        ({"block": "m:f"}, "model.block='m:f'"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(CFG, **settings)
    for settings, message in (
        ({"side": 20}, "model.vision.side=20: wanted a multiple of patch x merge = 8"),
        ({"width": 15}, "model.vision.width=15"),
        ({"std": (1.0, 0.0, 1.0)}, "model.vision.std"),
        ({"begin": (-1,)}, "model.vision.begin"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(VISION, **settings)
