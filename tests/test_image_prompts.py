"""Laws of prompts with images: the cache changes nothing, each row sees its own images, and a server says the same."""

import dataclasses
import functools
import random
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_scheduler import Asked, ask

from gptjax.config import GenerateConfig, MeshConfig, ModelConfig, VisionConfig
from gptjax.config.section import InputError
from gptjax.generation.engine import generate_ids, prefill
from gptjax.generation.image_places import device_ids, embed_images, image_spans
from gptjax.model.decoder import Decoder, init_params, unstacked
from gptjax.model.vision import Images
from gptjax.parallel.sharding import make_mesh
from gptjax.serve.engine import prefill_row
from gptjax.serve.scheduler import Scheduler
from gptjax.serve.slots import chunk_ends, shared_prefix
from gptjax.tokenizer import BytesTokenizer

VISION = VisionConfig(patch=2, side=8, merge=2, layers=1, width=16, num_heads=2)
T, CONTEXT = VISION.num_tokens, 64
TOKENIZER = BytesTokenizer()
A, B, C = -11, -22, -(1 << 59)
PIXELS = np.random.default_rng(0).integers(0, 256, (VISION.num_patches, VISION.patch_size), np.uint8)
PICTURES = {A: PIXELS, B: np.where(np.arange(12) % 3, 0, 255) + 0 * PIXELS, C: 255 - PIXELS // 9}
# An image first, in the middle, two side by side, one twice, and none.
PROMPTS = [[*[A] * T, 1, 2], [5, 6, *[B] * T, 7], [9, *[A] * T, *[C] * T, 8, 8, 3], [*[B] * 2 * T, 4], [1, 2, 3]]
LONG = [3, 1, *[A] * T, *range(20), *[C] * T, 2, *[B] * T, 6, 7]
GREEDY = GenerateConfig(max_new_tokens=8, temperature=0.0)


def opened(**settings: Any) -> Any:
    """A model of bytes that reads images, its weights drawn by NumPy: cheaper than compiling an initialisation."""
    vision = dataclasses.replace(VISION, **settings)
    cfg = ModelConfig(num_layers=2, width=16, num_heads=2, positions="rope", dtype="float32", tied=False,
                      vision=vision)  # fmt: skip
    decoder, rng = Decoder(cfg, TOKENIZER.vocab_size, CONTEXT), np.random.default_rng(3)
    shapes = jax.eval_shape(init_params(decoder), jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 1.0, x.shape), x.dtype), shapes)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return SimpleNamespace(decoder=decoder, params=params, mesh=mesh, tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def model() -> Any:
    return opened()


@functools.partial(jax.jit, static_argnums=0)
def full_pass(decoder, params, ids_BL, images):
    positions_BL = jnp.broadcast_to(jnp.arange(ids_BL.shape[1]), ids_BL.shape)
    x_BLD, _ = decoder.apply({"params": params}, ids_BL, positions_BL, jnp.ones_like(ids_BL), images=images)
    return decoder.apply({"params": params}, x_BLD, method="logits")


def full_logits(model: Any, rows: list[list[int]]) -> np.ndarray:
    """logits_BLV of whole rows in one pass without a cache, as training reads them."""
    vision, shape, used = model.decoder.cfg.vision, (len(rows), CONTEXT), list(PICTURES)
    ids_BL, index_BL = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    last_BL = np.broadcast_to(np.arange(CONTEXT, dtype=np.int32), shape).copy()
    for row, ids in enumerate(rows):
        ids_BL[row, : len(ids)] = np.maximum(ids, 0)
        begun = 0
        for place, i in enumerate(ids):
            begun = place if i != ids[max(place - 1, 0)] else begun
            token = (place - begun) % T
            if i < 0:
                index_BL[row, place] = used.index(i) * T + token
                last_BL[row, place] += T - 1 - token if vision.sees_all else 0
    patches_BIPY = np.broadcast_to(np.stack([PICTURES[place] for place in used]), (len(rows), 3, 16, 12))
    images: Any = (patches_BIPY, index_BL, last_BL)
    return np.asarray(full_pass(model.decoder, model.params, ids_BL, Images(*images)))


def answers(model: Any, prompts: list[list[int]], pictures=PICTURES, **settings: Any) -> list[list[int]]:
    """The answers of some prompts, among others of which one is the longest: so most tests run one program."""
    cfg, rows = dataclasses.replace(GREEDY, **settings), [*prompts, *([[1, 2, 3]] * (4 - len(prompts))), PROMPTS[2]]
    return generate_ids(model.decoder, model.params, rows, cfg, pictures=pictures)[: len(prompts)]


@pytest.mark.parametrize("sees_all", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_cached_decoding_is_the_argmax_of_the_full_pass_with_images(model, sees_all):
    model = model if sees_all else opened(sees_all=False)
    found = generate_ids(model.decoder, model.params, PROMPTS, GREEDY, pictures=PICTURES)
    rows = [[*ids, *new] for ids, new in zip(PROMPTS, found, strict=True)]
    for ids, new, logits_LV in zip(PROMPTS, found, full_logits(model, rows), strict=True):
        assert new == logits_LV[len(ids) - 1 : len(ids) + len(new) - 1].argmax(axis=-1).tolist()


def test_a_row_depends_on_its_own_images_alone(model):
    together = answers(model, PROMPTS)
    alone = generate_ids(model.decoder, model.params, PROMPTS[2:3], GREEDY, pictures=PICTURES)
    assert together == [answers(model, [ids])[0] for ids in PROMPTS] and alone == together[2:3]
    others = [[C if i == A else A if i == C else i for i in ids] for ids in PROMPTS]
    changed = answers(model, [*PROMPTS[:1], *others[1:]])
    assert changed[0] == together[0] and changed[2] != together[2]


def test_two_images_exchanged_exchange_the_answers(model):
    a, b = [*[A] * T, 1, 2, 3], [*[B] * T, 1, 2, 3]
    both = [*[A] * T, 4, *[B] * T, 5], [*[B] * T, 4, *[A] * T, 5]
    exchanged = {**PICTURES, A: PICTURES[B], B: PICTURES[A]}
    found, other = answers(model, [a, b, *both]), answers(model, [a, b, *both], exchanged)
    assert found == [other[1], other[0], other[3], other[2]] and found[0] != found[1] and found[2] != found[3]


def test_equal_prompts_have_equal_images_and_draw_different_samples(model):
    a, b = [*[A] * T, 1], [*[B] * T, 1]
    one, other, again = answers(model, [a, b, a], temperature=1.0, seed=3)
    assert answers(model, [b], temperature=1.0, seed=3) == [other], "its first copy in both batches"
    assert one != again and answers(model, [a], temperature=1.0, seed=3) == [one]


def test_the_places_of_images_are_no_ids_that_occurred(model):
    decoder, params = model.decoder, unstacked(model.params, "float32")
    ids_BL = np.stack([device_ids([*[A] * T, 5, 6])])
    image = embed_images(decoder, params, [[*[A] * T, 5, 6]], PICTURES, T + 2)
    for given, seen in ((image, [5, 6]), (None, [0, 5, 6])):
        state = prefill(decoder, params, ids_BL, np.array([T + 2]), 16, True, image=given)
        assert np.flatnonzero(state["seen_BV"][0]).tolist() == seen


@pytest.mark.parametrize(
    "ids, says",
    [
        ([1, -5, 2], "prompt[0] holds token id -5; wanted 0 or more, or the id of an image that is given"),
        ([1, *[A] * (T - 1), 2], "prompt[0] holds a part of an image; wanted all of its 4 tokens"),
        ([1, *[A] * (T + 1), 2], "prompt[0] holds a part of an image"),
        ([*[A] * (T - 1), *[B] * (T + 1), 2], "prompt[0] holds a part of an image"),
        ([1, *[A] * T], "prompt[0] ends with an image; wanted a text behind it"),
        ([*[A] * 14 * T, 1, 2], "prompt[0] takes 58 of the model's 64 positions"),
        ([*[A] * 16 * T, 1], "prompt[0] has 65 tokens; wanted at most 63"),
        ([1, 300], "prompt[0] holds token id 300; wanted 0 to 257"),
    ],
)
def test_what_is_no_prompt_is_refused_in_a_line(model, ids, says):
    with pytest.raises(InputError) as e:
        answers(model, [ids])
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_model_of_text_alone_refuses_images(model):
    blind = SimpleNamespace(decoder=opened(patch=0).decoder, params=model.params)
    with pytest.raises(InputError, match="this model reads no images"):
        answers(blind, [[*[A] * T, 1]])
    with pytest.raises(InputError, match="holds token id -11; wanted 0 to 257"):
        answers(model, [[A, 1]], {})


# The server


def test_chunks_split_no_image_and_what_is_shared_was_read_in_the_same_chunks():
    rng, chunk = random.Random(0), 9

    def prompt() -> list[int]:
        parts = [[rng.choice((A, B))] * T if rng.random() < 0.5 else [rng.randrange(2)] for _ in range(12)]
        return [i for part in parts for i in part]

    shared = 0
    for _ in range(300):
        one, other = prompt(), prompt()
        cut = rng.choice([0, *(i for i, id in enumerate(one) if id >= 0), len(one)])
        other = [*one[:cut], *other]
        ends, others = (chunk_ends(len(ids), chunk, image_spans(ids, T)) for ids in (one, other))
        assert not ends or ends[-1] == len(one)
        for start, end in zip([0, *ends], ends):
            assert 0 < end - start <= chunk
            assert not any(s < end < e for s, e in image_spans(one, T))
        same = shared_prefix(one, other, ends, others)
        assert one[:same] == other[:same] and (same == 0 or (same in ends and same in others))
        shared += 0 < same < len(other)
    assert shared > 10
    assert chunk_ends(40, 16) == [16, 32, 40] and chunk_ends(20, 16, [(10, 20)]) == [10, 20]
    assert shared_prefix([1] * 20, [1] * 18, [16, 20], [16, 18]) == 16 and shared_prefix([1], [1], [1], [1]) == 1


@pytest.fixture(scope="module")
def scheduler(model):
    scheduler = Scheduler(model, slots=4, prefill_chunk=7, batch_invariant=True)
    scheduler.start()
    yield scheduler
    scheduler.stop()


def programs() -> int:
    """Compiled prefills."""
    return prefill_row._cache_size()  # pyright: ignore[reportAttributeAccessIssue]


def forget(scheduler: Scheduler) -> None:
    scheduler.run(lambda: [setattr(slot, "ids", []) for slot in scheduler._slots])


def asked_of(ids: list[int], count: int = 8, **more: Any) -> Asked:
    return Asked(ids, count, pictures=PICTURES, stop_ids=(), **more)


def test_a_server_says_what_generate_says_and_a_request_compiles_nothing(model, scheduler):
    wanted, before = answers(model, [*PROMPTS, LONG]), programs()
    found = ask(scheduler, *(asked_of(ids) for ids in (*PROMPTS, LONG)))
    assert [one.ids for one in found] == wanted and programs() == before
    assert scheduler.engine.undivided(LONG)[1] == (26, 30) and found[-1].sequence.ends[3:5] == [26, 31]
    for one, logits_LV in zip(found, full_logits(model, [[*one.sequence.ids, *one.ids] for one in found])):
        log_p_LV = logits_LV - np.logaddexp.reduce(logits_LV, axis=-1, keepdims=True)
        size = len(one.sequence.ids)
        said = [log_p_LV[size - 1 + n, token.id] for n, token in enumerate(one.tokens)]
        np.testing.assert_allclose([token.log_p for token in one.tokens], said, atol=1e-4)
    full = [*LONG, *range(CONTEXT - len(LONG) - 8)]
    assert ask(scheduler, asked_of(full))[0].ids == answers(model, [full])[0], "up to the end of the context"
    with pytest.raises(InputError, match="the prompt holds a part of an image"):
        scheduler.submit([asked_of([*[A] * 3, 1]).sequence])


def test_an_answer_is_the_same_to_the_bit_whoever_else_brings_images_and_what_was_read_before(scheduler):
    company = [asked_of(ids, top_logprobs=2) for ids in (*PROMPTS, LONG, *PROMPTS)]
    ask(scheduler, *company)
    for one in company:
        forget(scheduler)
        [alone] = ask(scheduler, asked_of(one.sequence.ids, top_logprobs=2))
        assert alone.sequence.reused == 0 and alone.tokens == one.tokens
        [again] = ask(scheduler, asked_of(one.sequence.ids, top_logprobs=2))
        assert again.sequence.reused == len(one.sequence.ids) - 1 and again.tokens == one.tokens


def test_a_prefix_is_reused_with_its_images_and_never_with_another(scheduler):
    forget(scheduler)
    ask(scheduler, asked_of(LONG))
    [longer] = ask(scheduler, asked_of([*LONG, 5, 5, 5], 4))
    assert longer.sequence.reused >= LONG.index(C) + T, "past two images"
    other = [C if i == A else i for i in LONG]
    [changed] = ask(scheduler, asked_of(other))
    assert changed.sequence.reused == 0 and changed.tokens != ask(scheduler, asked_of(LONG))[0].tokens


@pytest.mark.slow
@pytest.mark.parametrize("sees_all", [True, False])
def test_a_chunk_holds_an_image_where_its_tokens_see_each_other(model, sees_all):
    model = model if sees_all else opened(sees_all=False)
    scheduler = Scheduler(model, slots=1, prefill_chunk=3)
    scheduler.start()
    try:
        assert scheduler.engine.chunk == (T if sees_all else 3)
        prompts = [*PROMPTS, LONG, [*LONG, *range(CONTEXT - len(LONG) - 8)]]
        assert [one.ids for one in ask(scheduler, *map(asked_of, prompts))] == answers(model, prompts)
    finally:
        scheduler.stop()
