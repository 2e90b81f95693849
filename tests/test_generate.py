"""Laws of decoding: the cache changes nothing, a row never depends on its batch, and text comes out whole."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GenerateConfig, MeshConfig, ModelConfig
from gptjax.config.section import InputError
from gptjax.generation import engine
from gptjax.generation.engine import decode, decode_params, generate, generate_ids, prefill, stream, stream_ids
from gptjax.generation.sampling import filter_logits, greedy, sample
from gptjax.generation.text_stream import TextStream
from gptjax.model.block import block, layer_params
from gptjax.model.cache import empty_cache, grow
from gptjax.model.decoder import Decoder, extend, init_params, unstacked
from gptjax.ops.decoding import MANY_ROWS
from gptjax.parallel.sharding import make_mesh, to_global
from gptjax.tokenizer import BytesTokenizer

GPT2 = ModelConfig(num_layers=2, width=32, num_heads=4, dtype="float32")
LLAMA = dataclasses.replace(
    GPT2, queries_per_kv=2, positions="rope", norm="rmsnorm", activation="swiglu", biases=False, tied=False
)
TOKENIZER = BytesTokenizer()
CONTEXT = 18
# With 11 new tokens the longest prompt fills the context, and each alone needs as many slots of the cache as all
# together, so that most tests run one and the same compiled program.
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5, 4], [100, 200, 50, 0, 0, 1], [9, 8, 7, 6, 5, 4]]
NEW = 11

Model = tuple[Decoder, dict]


def model(cfg: ModelConfig) -> Model:
    """A decoder with random weights, drawn by NumPy: cheaper than compiling an initialisation."""
    decoder = Decoder(cfg, TOKENIZER.vocab_size, CONTEXT)
    ids_BL = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), ids_BL, ids_BL, ids_BL)["params"]
    random = np.random.default_rng(3)
    return decoder, jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.5, x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def gpt2():
    return model(GPT2)


@pytest.fixture(scope="module")
def llama():
    return model(LLAMA)


@pytest.fixture(params=["gpt2", "llama"])
def lm(request):
    return request.getfixturevalue(request.param)


@functools.partial(jax.jit, static_argnums=0)
def forward(decoder, params, ids_BL):
    """Logits of whole rows in one pass without a cache."""
    position_BL = jnp.broadcast_to(jnp.arange(ids_BL.shape[1]), ids_BL.shape)
    x_BLD, _ = decoder.apply({"params": params}, ids_BL, position_BL, jnp.ones_like(ids_BL))
    return decoder.apply({"params": params}, x_BLD, method="logits")


def full_logits(lm: Model, rows: list[list[int]]) -> np.ndarray:
    """logits_BLV of rows of ids, padded on the right, where padding can't be seen."""
    ids_BL = np.zeros((len(rows), CONTEXT), np.int32)
    for row, ids in zip(ids_BL, rows, strict=True):
        row[: len(ids)] = ids
    return np.asarray(forward(*lm, ids_BL))


def sampled(**settings) -> GenerateConfig:
    return GenerateConfig(**{"max_new_tokens": NEW, "temperature": 1.0, "repetition_penalty": 1.2, **settings})


GREEDY = GenerateConfig(max_new_tokens=NEW, temperature=0.0)
NEVER = (-1, -1)  # stop ids that no row meets


# The cache


def test_greedy_text_is_the_argmax_of_the_full_forward_pass_to_the_end_of_the_context(lm: Model):
    got = generate_ids(*lm, PROMPTS, GREEDY)
    logits_BLV = full_logits(lm, [prompt + new for prompt, new in zip(PROMPTS, got, strict=True)])
    for prompt, new, logits_LV in zip(PROMPTS, got, logits_BLV, strict=True):
        assert len(new) == NEW
        assert new == logits_LV[len(prompt) - 1 :][:NEW].argmax(axis=-1).tolist()


def test_casting_the_weights_early_changes_no_bit():
    decoder, params = model(dataclasses.replace(GPT2, dtype="bfloat16"))
    cast = decode_params(params, "bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(cast)} == {"bfloat16", "float32"}
    ids_BL = np.array(PROMPTS[1:], np.int32)
    position_BL = np.broadcast_to(np.arange(6), ids_BL.shape)
    cache = empty_cache(decoder.cfg, 3, 8, "bfloat16")
    got = jax.jit(extend, static_argnums=0)(decoder, cast, ids_BL, position_BL, cache)
    want = jax.jit(decoder.apply)({"params": params}, ids_BL, position_BL, cache=cache)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_compiled_loop_copies_neither_the_cache_nor_a_weight(rows: int):
    decoder, slots = Decoder(GPT2, TOKENIZER.vocab_size, 1024), 1024
    shapes = jax.eval_shape(lambda: unstacked(init_params(decoder)(jax.random.key(0)), "float32"))
    prompt_BL, row_B = np.zeros((rows, 16), np.int32), np.zeros(rows, np.int32)
    state = jax.eval_shape(lambda p: prefill(decoder, p, prompt_BL, row_B, slots, False), shapes)
    rest = ({"copy_B": row_B, "last_B": row_B}, {}, np.uint32(0), np.array(NEVER), row_B > 0, np.int32(1))
    loop = decode.lower(decoder, shapes, state, *rest).compile()  # pyright: ignore[reportFunctionMemberAccess]
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state["cache"]))
    # A step holds one layer's scores and, for one row, its keys turned: less than two of the cache's four arrays.
    assert loop.memory_analysis().temp_size_in_bytes < kept * 0.65
    for shape in {x.shape for x in jax.tree.leaves((shapes["layers"], state["cache"])) if x.ndim > 1}:
        assert not re.search(rf"= f32\[{','.join(map(str, shape))}\]\S* copy\(", loop.as_text())


def test_a_cache_grows_when_it_is_full_and_changes_no_text(gpt2: Model, monkeypatch):
    want = generate_ids(*gpt2, PROMPTS, sampled(), stop_ids=NEVER)
    sizes = []
    monkeypatch.setattr(engine, "headroom", lambda rows: 4)
    monkeypatch.setattr(engine, "grow", lambda state, slots: (sizes.append(slots), grow(state, slots))[1])
    assert generate_ids(*gpt2, PROMPTS, sampled(), stop_ids=NEVER) == want
    assert sizes == [CONTEXT]
    news = list(stream_ids(*gpt2, PROMPTS, sampled(), stop_ids=NEVER, chunk=5))
    assert [[len(ids) for ids in new] for new in news] == [[5] * 4, [4] * 4, [2] * 4]
    assert [sum(row, []) for row in zip(*news, strict=True)] == want


@pytest.mark.parametrize("rows, slots", [(1, 1000), (32, 384)])
def test_a_cache_begins_with_few_free_slots_where_many_rows_read_them(gpt2: Model, monkeypatch, rows, slots):
    def no_prefill(decoder, params, prompt_BL, length_B, slots, keep_seen, image):
        raise RuntimeError(slots)

    monkeypatch.setattr(engine, "prefill", no_prefill)
    long = gpt2[0].clone(context=1000)
    with pytest.raises(RuntimeError, match=str(slots)):
        next(stream_ids(long, gpt2[1], [[1]] * rows, GenerateConfig(max_new_tokens=900)))


@pytest.mark.slow
def test_a_sharded_model_writes_the_same_text(gpt2: Model, monkeypatch):
    decoder, params = gpt2
    want = generate_ids(decoder, params, PROMPTS, sampled(), stop_ids=NEVER)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, context=2))
    sharded = to_global(jax.tree.map(np.asarray, params), mesh)
    with jax.set_mesh(mesh):
        assert generate_ids(decoder, sharded, PROMPTS, sampled(), stop_ids=NEVER) == want
        monkeypatch.setattr(engine, "headroom", lambda rows: 4)
        assert generate_ids(decoder, sharded, PROMPTS, sampled(), stop_ids=NEVER) == want
    with pytest.raises(InputError, match="no mesh is set"):
        generate_ids(decoder, sharded, PROMPTS, sampled(), stop_ids=NEVER)


# Rows and their batch


def test_a_row_does_not_depend_on_its_batch(gpt2: Model):
    together = generate_ids(*gpt2, PROMPTS, sampled(), stop_ids=NEVER)
    turned = [PROMPTS[i] for i in (2, 1, 3, 0)]
    assert generate_ids(*gpt2, turned, sampled(), stop_ids=NEVER) == [together[i] for i in (2, 1, 3, 0)]
    for prompt, new in list(zip(PROMPTS, together, strict=True))[:3]:
        assert generate_ids(*gpt2, [prompt], sampled(), stop_ids=NEVER) == [new]


def test_the_likeliest_token_is_the_first_of_equals():
    logits_BV = np.random.default_rng(2).integers(-3, 3, (5, 40)).astype(np.float32)
    np.testing.assert_array_equal(greedy(logits_BV), logits_BV.argmax(-1))
    assert 0 <= int(greedy(np.full((1, 40), np.nan, np.float32))[0]) < 40


@pytest.mark.parametrize("rows", [MANY_ROWS, 21])
def test_many_rows_write_the_text_of_each(lm: Model, rows):
    one_by_one = [generate_ids(*lm, [prompt], GREEDY)[0] for prompt in PROMPTS]
    together = generate_ids(*lm, [PROMPTS[i % len(PROMPTS)] for i in range(rows)], GREEDY)
    assert together == [one_by_one[i % len(PROMPTS)] for i in range(rows)]


def test_a_block_with_a_matrix_of_its_own_meets_it_under_its_own_name_in_any_batch():
    class Mixed:
        @staticmethod
        def layer_params(cfg):
            return layer_params(cfg) | {"mix_NDK": "normal"}

        def __call__(self, cfg, p, x_BLD, *rest):
            y_BLD, cache = block(cfg, p, x_BLD, *rest)
            return y_BLD + y_BLD @ p["mix_DK"] @ p["mix_DK"].T, cache

    decoder = model(GPT2)[0].clone(block=Mixed())
    params = init_params(decoder)(jax.random.key(0))
    many = [PROMPTS[i % 4] for i in range(MANY_ROWS)]
    assert generate_ids(decoder, params, many, GREEDY)[:4] == generate_ids(decoder, params, PROMPTS, GREEDY)


def test_the_seed_decides_the_sample_and_copies_of_a_prompt_differ(gpt2: Model):
    one, again, other = (generate_ids(*gpt2, PROMPTS, sampled(seed=s), stop_ids=NEVER) for s in (0, 0, 1))
    assert one == again
    assert all(a != b for a, b in zip(one, other, strict=True))
    assert one[1] != one[3]
    given = generate_ids(*gpt2, PROMPTS, sampled(), stop_ids=NEVER, copies=(0, 1, 0, 7))
    assert given[1] == one[3] and given[3] not in one


def programs() -> list[int]:
    return [f._cache_size() for f in (prefill, decode)]  # pyright: ignore[reportAttributeAccessIssue]


def test_other_settings_and_chunks_need_no_new_program(gpt2: Model):
    list(stream_ids(*gpt2, PROMPTS, sampled(), chunk=5, stop_ids=NEVER))
    before = programs()
    other = sampled(temperature=0.5, repetition_penalty=1.5, seed=9, max_new_tokens=10)
    list(stream_ids(*gpt2, PROMPTS, other, chunk=3, stop_ids=NEVER))
    assert programs() == before


def test_a_stop_id_ends_its_row_alone_and_is_the_last_id(gpt2: Model):
    free = generate_ids(*gpt2, PROMPTS, sampled(), stop_ids=NEVER)
    stop = next(i for i in free[0][2:] if i not in free[1])
    want = [new[: new.index(stop) + 1] if stop in new else new for new in free]
    assert len(want[0]) < NEW and want[1] == free[1]
    assert generate_ids(*gpt2, PROMPTS, sampled(), stop_ids=(257, stop)) == want


def test_finished_rows_get_no_more_tokens(gpt2: Model):
    finished: set[int] = set()
    counts = []
    for news in stream_ids(*gpt2, PROMPTS, sampled(), chunk=4, stop_ids=NEVER, finished=finished):
        counts.append([len(ids) for ids in news])
        finished.add(1)
    assert counts == [[4, 4, 4, 4], [4, 0, 4, 4], [3, 0, 3, 3]]
    finished, calls = set(), 0
    for _ in stream_ids(*gpt2, PROMPTS, sampled(), chunk=4, stop_ids=NEVER, finished=finished):
        finished.update(range(4))
        calls += 1
    assert calls == 1  # once all rows are finished nothing more is computed


# Samplers, against NumPy

LOGITS_BV = np.random.default_rng(0).normal(0, 2, (3, 40)).astype(np.float32)
SEEN_BV = np.random.default_rng(1).random((3, 40)) < 0.3


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def keep(x: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    return np.where(allowed, x, -np.inf)


def reference_top_k(x, k):
    return keep(x, x >= np.sort(x, axis=-1)[:, -k][:, None])


def reference_top_p(x, p):
    order = np.argsort(-x, axis=-1)
    before = np.cumsum(np.take_along_axis(softmax(x), order, -1), -1) - np.take_along_axis(softmax(x), order, -1)
    allowed = np.zeros(x.shape, bool)
    np.put_along_axis(allowed, order, before < p, -1)
    return keep(x, allowed)


def reference_min_p(x, p):
    return keep(x, softmax(x) >= p * softmax(x).max(axis=-1, keepdims=True))


def reference_penalty(x, penalty):
    return np.where(SEEN_BV, np.where(x > 0, x / penalty, x * penalty), x)


FILTERS = {
    "repetition_penalty": (1.7, reference_penalty),
    "temperature": (0.6, lambda x, t: x / t),
    "top_k": (7, reference_top_k),
    "top_p": (0.8, reference_top_p),
    "min_p": (0.07, reference_min_p),
}


@pytest.mark.parametrize(
    "names", [*([n] for n in FILTERS), list(FILTERS), ["top_k", "top_p"], ["temperature", "min_p"]]
)
def test_filters_give_the_reference_distribution(names):
    want_BV = LOGITS_BV.astype(np.float64)
    for name in names:
        value, reference = FILTERS[name]
        want_BV = reference(want_BV, value)
    got_BV = filter_logits(jnp.asarray(LOGITS_BV), {name: FILTERS[name][0] for name in names}, jnp.asarray(SEEN_BV))
    got_BV = np.asarray(jax.nn.softmax(got_BV))
    np.testing.assert_array_equal(got_BV > 0, softmax(want_BV) > 0)
    np.testing.assert_allclose(got_BV, softmax(want_BV), rtol=1e-5)
    assert not np.allclose(got_BV, softmax(LOGITS_BV), rtol=1e-3)  # and each filter does something


def test_a_filter_that_asks_for_everything_changes_nothing():
    for settings in ({"top_k": 40}, {"top_k": 1000}, {"top_p": 0.9999999}, {"min_p": 1e-30}):
        np.testing.assert_array_equal(filter_logits(jnp.asarray(LOGITS_BV), settings), LOGITS_BV)


def test_samples_are_drawn_with_the_filtered_probabilities():
    settings = {"temperature": 0.7, "top_k": 5}
    draws = 8000
    key_B = jax.random.split(jax.random.key(0), draws)
    ids_B = np.asarray(sample(jnp.tile(LOGITS_BV[:1], (draws, 1)), key_B, settings))
    want_V = softmax(reference_top_k(LOGITS_BV[:1].astype(np.float64) / 0.7, 5))[0]
    share_V = np.bincount(ids_B, minlength=40) / draws
    # Five standard errors of a share.
    assert (np.abs(share_V - want_V) <= 5 * np.sqrt(want_V * (1 - want_V) / draws)).all()


def test_samples_are_drawn_from_the_capped_logits(gpt2: Model):
    # Under a cap of 0.01 no token is less than e^-0.02 as likely as another, so min_p=0.9 leaves all of them.
    capped = Decoder(dataclasses.replace(GPT2, logit_softcap=0.01), TOKENIZER.vocab_size, CONTEXT), gpt2[1]
    settings = [sampled(repetition_penalty=1.0, min_p=min_p) for min_p in (1e-9, 0.9)]
    every, likely = (generate_ids(*capped, PROMPTS[:1], cfg, stop_ids=NEVER) for cfg in settings)
    assert every == likely


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-300])
def test_a_vanishing_temperature_is_greedy(temperature):
    key_B = jax.random.split(jax.random.key(0), 3)
    ids_B = sample(jnp.asarray(10 * LOGITS_BV), key_B, {"temperature": temperature})
    np.testing.assert_array_equal(ids_B, LOGITS_BV.argmax(axis=-1))


def test_the_penalty_counts_prompt_and_new_tokens(gpt2: Model):
    def greedy(penalty):
        return generate_ids(
            *gpt2, PROMPTS, sampled(temperature=1e-30, repetition_penalty=penalty, seed=1), stop_ids=NEVER
        )

    news = greedy(3.0)
    logits_BLV = full_logits(gpt2, [prompt + new for prompt, new in zip(PROMPTS, news, strict=True)])
    for prompt, new, logits_LV in zip(PROMPTS, news, logits_BLV, strict=True):
        for i, token in enumerate(new):
            seen = prompt + new[:i]
            logits_V = logits_LV[len(seen) - 1].copy()
            logits_V[seen] = np.where(logits_V[seen] > 0, logits_V[seen] / 3, logits_V[seen] * 3)
            assert token == logits_V.argmax()
    assert news != greedy(1.0001)


# Text

TALK = "Gr\u00fc\u00dfe \u4f60\u597d, \U0001f469\u200d\U0001f680 end. STOP it"


def pieces(text: str, sizes: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """What a TextStream makes of the text's bytes, pushed in runs of the given sizes (the last one repeats)."""
    data, made, texts = list(text.encode()), [], TextStream(TOKENIZER, stop)
    while data:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        made.append(texts.push(data[:size], final=len(data) <= size))
        data = data[size:]
    return made


@pytest.mark.parametrize("sizes", [[1], [2], [3], [5], [1, 7, 2, 4], [1000]])
@pytest.mark.parametrize(
    "stop, want",
    [
        ((), TALK),
        (("STOP",), TALK[: TALK.index("STOP")]),
        (("STOP", "end. ST"), TALK[: TALK.index("end")]),
        (("\u597d, ",), TALK[: TALK.index("\u597d")]),
        (("STOPPED", "it!"), TALK),  # beginnings of a stop text that never becomes whole
        # Both match at different places; the one completed first counts.
        (("4f60 end. STOP", "d. S", "end. STOP i"), TALK[: TALK.index("d. S")]),
    ],
)
def test_text_is_whole_and_ends_before_the_first_stop_text_however_it_is_cut(stop, want, sizes):
    made = pieces(TALK, sizes, stop)
    assert "".join(made) == want


def test_what_may_become_a_stop_text_is_held_back_and_no_more():
    texts = TextStream(TOKENIZER, ("</s>",))
    assert [texts.push(list(t.encode())) for t in ("ab<", "/", "x", "<", "/s", ">y", "z")] == [
        "ab", "", "</x", "", "", "", ""
    ]  # fmt: skip
    assert texts.stopped


def test_a_character_the_text_ends_within_becomes_a_replacement():
    texts = TextStream(TOKENIZER)
    assert texts.push([65, 0xE4, 0xBD]) == "A"
    assert texts.push([], final=True) == "\ufffd"


class SpacedTokenizer(BytesTokenizer):
    """Like Llama's: each document begins with a space that its text does not have."""

    def encode(self, text: str) -> list[int]:
        return list((" " + text).encode()) if text else []


@pytest.mark.parametrize("starts, want", [(True, "ab c"), (False, " ab c")])
def test_the_space_before_a_document_is_dropped_and_the_one_after_a_prompt_kept(starts, want):
    texts = TextStream(SpacedTokenizer(), drops_space=starts)
    assert "".join(texts.push([i]) for i in b" ab c") == want


TEXTS = sampled(prompt=("To be", "", "\u4f60", "or not"), max_new_tokens=NEW)


def joined(lm: Model, cfg: GenerateConfig, chunk: int) -> list[str]:
    texts = [""] * len(cfg.prompt)
    for row, piece in stream(*lm, TOKENIZER, cfg, chunk=chunk):
        assert piece
        texts[row] += piece
    return texts


def test_streamed_pieces_join_to_the_generated_text(gpt2: Model):
    want = generate(*gpt2, TOKENIZER, TEXTS)
    ids = generate_ids(*gpt2, [[256, *p.encode()] for p in TEXTS.prompt], TEXTS, stop_ids=(257,))
    assert want == [TOKENIZER.decode(new) for new in ids]
    assert all(joined(gpt2, TEXTS, chunk) == want for chunk in (1, 4, NEW))
    assert len(list(stream(*gpt2, TOKENIZER, TEXTS, chunk=1))) > len(list(stream(*gpt2, TOKENIZER, TEXTS, chunk=NEW)))


def test_ids_that_the_tokenizer_has_not_are_never_drawn(gpt2: Model):
    decoder, params = gpt2
    cfg = sampled(prompt=("a", "bc"), temperature=3.0)
    assert generate(decoder.clone(vocab_size=TOKENIZER.vocab_size + 40), params, TOKENIZER, cfg) == generate(
        decoder, params, TOKENIZER, cfg
    )


def test_a_stop_text_cuts_its_row_in_the_generated_text(gpt2: Model):
    free = generate(*gpt2, TOKENIZER, TEXTS)
    stop = free[0][3:6]
    want = [text.split(stop)[0] for text in free]
    assert want[0] != free[0] and want[3] == free[3]
    cfg = dataclasses.replace(TEXTS, stop=(stop,))
    assert generate(*gpt2, TOKENIZER, cfg) == want
    assert all(joined(gpt2, cfg, chunk) == want for chunk in (1, 4))


# What does not fit


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([[1], [2] * 18], {}, r"generate.prompt\[1\] has 18 tokens; wanted at most 17.*data.length=18"),
        (
            [[1] * 10],
            {"max_new_tokens": 9},
            r"generate.max_new_tokens=9: wanted at most 8.*--generate.max-new-tokens 8",
        ),
        ([[1], []], {}, r"generate.prompt\[1\] has no tokens"),
        ([[3, 258]], {}, r"generate.prompt\[0\] holds token id 258; wanted 0 to 257"),
        ([[3]], {"seed": 2**32}, r"generate.seed=4294967296: wanted a number from 0 to 4,294,967,295"),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(gpt2: Model, prompts, settings, message):
    with pytest.raises(InputError, match=message):
        generate_ids(*gpt2, prompts, sampled(**settings))
