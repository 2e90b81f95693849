"""Laws of likelihoods: those of the full forward pass, whatever is shared, batched or sharded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import CONTEXT, GPT2, LLAMA, TOKENIZER, Model, full_logits, model

from gptjax.config import MeshConfig
from gptjax.config.section import InputError
from gptjax.evals.requests import encode_pairs
from gptjax.evals.score import Scorer, rolling_windows
from gptjax.evals.trees import Path, lay_out
from gptjax.model.block import block
from gptjax.parallel.sharding import make_mesh, to_global

WINDOW = dataclasses.replace(LLAMA, window=4)
CAPPED = dataclasses.replace(LLAMA, logit_softcap=3.0, attention_softcap=5.0)
Requests = list[tuple[list[int], list[int]]]


def drawn(items: int = 30) -> Requests:
    """Four continuations for each of some contexts; all of them begin alike, some continuations are equal."""
    random = np.random.default_rng(0)
    ids = lambda low, high: random.integers(0, 200, random.integers(low, high)).tolist()  # noqa: E731
    contexts = [[7, 7, *ids(0, 11)] for _ in range(items)]
    return [(context, ids(1, 5) if n else [3]) for context in contexts for n in range(4)]


def expected(lm: Model, requests: Requests) -> list[np.ndarray]:
    """log p of each continuation's tokens from the logits of one full forward pass, in float64."""
    found = []
    logits = full_logits(lm, [(context + continuation)[:-1] for context, continuation in requests]).astype(np.float64)
    for (context, continuation), logits_LV in zip(requests, logits, strict=True):
        log_p_LV = logits_LV - np.logaddexp.reduce(logits_LV, axis=-1, keepdims=True)
        found.append(log_p_LV[np.arange(len(continuation)) + len(context) - 1, continuation])
    return found


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def assert_same(got, want) -> None:
    for one, log_probs in zip(got, want, strict=True):
        np.testing.assert_allclose(one.log_probs, log_probs, atol=1e-5)
        assert one.total == pytest.approx(log_probs.sum(), abs=1e-5)


@pytest.mark.parametrize("cfg", [GPT2, CAPPED, WINDOW], ids=["gpt2", "capped", "window"])
def test_a_likelihood_is_the_log_softmax_of_the_full_forward_pass(cfg):
    lm, requests = model(cfg), drawn()
    want = expected(lm, requests)
    shared, apart = (Scorer(*lm, one_device(), share=share) for share in (True, False))
    assert_same(shared.loglikelihoods(requests), want)
    assert_same(apart.loglikelihoods(requests), want)
    assert apart.tokens == sum(len(a) + len(b) - 1 for a, b in requests)
    assert (shared.tokens < 0.6 * apart.tokens) == (cfg is not WINDOW)


def test_order_and_batch_change_a_likelihood_by_rounding_only():
    lm, requests = model(LLAMA), drawn(12)
    whole = Scorer(*lm, one_device()).loglikelihoods(requests)
    order = np.random.default_rng(1).permutation(len(requests))
    small = Scorer(*lm, one_device(), batch_tokens=1).loglikelihoods([requests[i] for i in order])
    assert_same(small, [whole[i].log_probs for i in order])
    again = Scorer(*lm, one_device()).loglikelihoods(requests)
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_array_equal(a.log_probs, b.log_probs)
    alone = [Scorer(*lm, one_device()).loglikelihoods([request])[0] for request in requests[:3]]
    assert_same(alone, [one.log_probs for one in whole[:3]])


@pytest.mark.parametrize(
    ("sizes", "share"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, True),
        ({"fsdp": 4, "context": 2}, False),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, False, marks=pytest.mark.slow),
        pytest.param({"fsdp": 4, "context": 2}, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_gives_the_likelihoods_of_one_device(sizes, share):
    (decoder, params), requests = model(LLAMA), drawn(12)
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    placed = to_global(jax.tree.map(np.asarray, params), mesh)
    got = Scorer(decoder, placed, mesh, share=share, batch_tokens=64).loglikelihoods(requests)
    assert_same(got, expected((decoder, params), requests))


def test_greedy_is_true_where_every_token_is_the_likeliest():
    lm, context = model(GPT2), [1, 2, 3]
    best: list[int] = []
    for _ in range(3):
        best.append(int(full_logits(lm, [context + best])[0, len(context) + len(best) - 1].argmax()))
    requests = [(context, best), (context, [*best[:2], (best[2] + 1) % 200]), (context, [(best[0] + 1) % 200])]
    assert [one.greedy for one in Scorer(*lm, one_device()).loglikelihoods(requests)] == [True, False, False]


def test_what_does_not_fit_the_context_loses_its_left_and_is_counted():
    lm = model(GPT2)
    scorer, context, continuation = Scorer(*lm, one_device()), [*range(30)], [5, 6, 7]
    whole = [*context, *continuation]
    (got, fits) = scorer.loglikelihoods([(context, continuation), (context[:3], continuation)])
    (want,) = scorer.loglikelihoods([(whole[-CONTEXT - 1 : -3], continuation)])
    assert got.truncated == len(whole) - CONTEXT - 1 and fits.truncated == 0 and scorer.truncated == 1
    assert_same([got], [want.log_probs])


def test_rolling_windows_predict_every_token_once_and_read_what_fits():
    for size in range(30):
        ids = [*range(100, 100 + size)]
        windows = [*rolling_windows(ids, 1, 7)]
        assert [i for _, continuation in windows for i in continuation] == ids
        for n, (context, continuation) in enumerate(windows):
            assert len(context) + len(continuation) - 1 <= 7
            assert len(context) == 1 or (n == len(windows) - 1 and len(context) + len(continuation) == 8)
    lm, first = model(GPT2), 9
    document = [*range(2 * CONTEXT + 5)]
    got, empty = Scorer(*lm, one_device()).rolling([document, []], first)
    whole = [first, *document]
    pieces = [([whole[0]], whole[1 : CONTEXT + 1]), ([whole[CONTEXT]], whole[CONTEXT + 1 : 2 * CONTEXT + 1]),
              (whole[-CONTEXT - 1 : -5], whole[-5:])]  # fmt: skip
    assert_same([got], [np.concatenate(expected(lm, [([*a], [*b]) for a, b in pieces]))])
    assert len(got.log_probs) == len(document) and (empty.total, len(empty.log_probs)) == (0, 0)


def test_a_block_of_the_users_own_gets_one_text_a_row():
    def looks_back(cfg, p, x_BLD, *rest):
        x_BLD, cache = block(cfg, p, x_BLD, *rest)
        return x_BLD + jnp.pad(x_BLD[:, :-1], ((0, 0), (1, 0), (0, 0))), cache

    decoder, params = model(GPT2)
    own = decoder.clone(block=looks_back)
    requests = drawn(3)
    scorer = Scorer(own, params, one_device())
    assert_same(scorer.loglikelihoods(requests), expected((own, params), requests))
    assert scorer.tokens == sum(len(a) + len(b) - 1 for a, b in requests)


def test_rows_hold_every_text_once_and_share_what_they_begin_with():
    paths = [Path(n, (*context, *continuation), len(context)) for n, (context, continuation) in enumerate(drawn())]
    groups = [paths[i : i + 4] for i in range(0, len(paths), 4)]
    for share in (True, False):
        rows = lay_out(groups, 64, share)
        assert sorted(path.owner for row in rows for path in row.paths) == [*range(len(paths))]
        for row in rows:
            assert len(row.tokens) <= 64 and len(row.targets) == sum(path.num_scored for path in row.paths) <= 64
    rows = lay_out(groups, 64, True)
    assert all({0, 4} >= {sum(p in row.paths for p in group)} for row in rows for group in groups)
    assert len(rows) < len(lay_out(groups, 64, False)) / 2
    # Longer than a row together: the context is read once a row.
    (first, second) = lay_out([[Path(n, (*range(6), 100 + n, 9), 6) for n in range(5)]], 10, True)
    assert (len(first.tokens), len(second.tokens)) == (10, 7)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (([], [1]), "its context has no tokens"),
        (([1], []), "its continuation has no tokens"),
        (([1], [9999]), "token id 9999"),
        (([1], [1] * (CONTEXT + 1)), f"at most {CONTEXT}"),
    ],
)
def test_a_request_that_can_not_be_scored_is_refused(request_, said):
    with pytest.raises(InputError, match=said):
        Scorer(*model(GPT2), one_device()).loglikelihoods([([1], [2]), request_])


def test_pairs_are_cut_where_lm_eval_cuts_them():
    (pair,) = encode_pairs(TOKENIZER, [("ab  ", "cd")])
    assert pair == ([TOKENIZER.bos_id, *TOKENIZER.encode("ab")], TOKENIZER.encode("  cd"))
    (alone,) = encode_pairs(TOKENIZER, [("", "x")])
    assert alone == ([TOKENIZER.bos_id], TOKENIZER.encode("x"))
    with pytest.raises(InputError, match="adds no token"):
        encode_pairs(TOKENIZER, [("ab", "")])
