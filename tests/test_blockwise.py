"""Attention by blocks is the plain attention, in values and gradients, and never touches what nobody sees."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_gradients import assert_close, value_and_grads

from gptjax.config import MeshConfig
from gptjax.ops.blockwise import attend_blockwise
from gptjax.ops.reference import AttentionMask, attend, cached, causal, seen_until, tree
from gptjax.parallel.sharding import make_mesh, to_global

pytestmark = pytest.mark.usefixtures("highest_precision")


@dataclasses.dataclass(frozen=True)
class Case:
    """Two rows of queries, keys and values, what is seen of them, and the size of a block."""

    queries: int = 37
    keys: int = 37
    heads: tuple[int, int] = (4, 2)  # of queries, of keys and values
    block: int = 8
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    documents: str = "packed"

    @property
    def mask(self) -> AttentionMask:
        if self.documents == "cached":  # the second row is far ahead of the first
            start_B1 = jnp.array([[3], [self.keys - self.queries]])
            return cached(start_B1 + jnp.arange(self.queries))
        if self.documents in ("tree", "images"):
            # A beginning of 6 with branches of 9 and 12; another text of 7; padding.
            until = [27] * 6 + [15] * 9 + [27] * 12 + [34] * 7 + [self.keys] * (self.keys - 34)
            last_BL = jnp.arange(self.keys).at[1:5].set(4).at[28:32].set(31)
            until_BM = jnp.array([until, until], jnp.int32)
            mask = tree(until_BM)
            return seen_until(mask, jnp.stack([last_BL, last_BL])) if self.documents == "images" else mask
        lengths = {"one": [[self.keys], [self.keys]], "packed": [[10, 1, 15, 11], [20, 17]]}[self.documents]
        # In packed rows the last stretch is padding: segment 0.
        rows = [np.repeat([*range(1, len(n)), 0 if len(n) > 1 else 1], n) for n in lengths]
        return causal(jnp.array(np.stack(rows), jnp.int32))

    def arrays(self, dtype: Any = jnp.float32) -> list[jax.Array]:
        """q_BLHK, k_BMGK, v_BMGK and a gradient g_BLHK."""
        rng, (H, G) = np.random.default_rng(0), self.heads
        shapes = [(self.queries, H), (self.keys, G), (self.keys, G), (self.queries, H)]
        return [jnp.asarray(rng.normal(size=(2, *shape, 8)), dtype) for shape in shapes]

    def gradients(self, attention, arrays: list[jax.Array] | None = None, **options) -> list[np.ndarray]:
        return value_and_grads(attention, arrays or self.arrays(), self.mask, **self.options, **options)


CASES = {
    "packed documents and padding": Case(),
    "one block": Case(block=64),
    "blocks of one": Case(queries=9, keys=9, block=1, documents="one"),
    "window of one block": Case(options={"window": 8}, documents="one"),
    "traced window": Case(options={"window": np.int32(5)}),
    "traced window that is none": Case(options={"window": np.int32(2**31 - 1)}),
    "soft-cap": Case(options={"softcap": 1.5}),
    "all at once": Case(options={"softcap": 1.5, "window": 11}, heads=(6, 2), block=16),
    "one key head": Case(heads=(4, 1)),
    "cache and window": Case(queries=5, keys=29, documents="cached", options={"window": 6}),
    "a tree of texts": Case(documents="tree"),
    "a tree of texts and a window": Case(documents="tree", options={"window": 7}),
    "images that see themselves whole": Case(documents="images"),
    "images in one block": Case(documents="images", block=64),
    "one query of a cache": Case(queries=1, keys=29, documents="cached"),
}


@pytest.mark.parametrize("name", CASES)
def test_blockwise_is_plain_attention(name):
    case = CASES[name]
    assert_close(case.gradients(attend_blockwise, block=case.block), case.gradients(attend))


def test_in_bfloat16_blockwise_is_no_further_from_float32_than_plain():
    case = Case(queries=64, keys=64, block=16, documents="one")
    exact = case.gradients(attend, [x.astype(jnp.float32) for x in case.arrays(jnp.bfloat16)])
    rounded = [
        case.gradients(attention, case.arrays(jnp.bfloat16), **more)
        for attention, more in ((attend_blockwise, {"block": case.block}), (attend, {}))
    ]
    for wanted, blockwise, plain in zip(exact, *rounded, strict=True):
        assert np.linalg.norm(blockwise - wanted) <= np.linalg.norm(plain - wanted)


blockwise_and_grads = functools.partial(value_and_grads, attend_blockwise, block=8)


def test_keys_that_no_query_sees_are_not_visited():
    """A visited value that is no number would leave its mark: 0 times nan is nan."""
    q_BLHK, k_BMGK, v_BMGK, g_BLHK = Case(queries=8, keys=32, documents="one").arrays()
    mask = cached(jnp.array([[12], [13]]) + jnp.arange(8))  # with a window of 4 the rows see 9..19 and 10..20
    unseen_M = np.isin(np.arange(32) // 8, [0, 3])[:, None, None]
    marked_BMGK = jnp.where(unseen_M, jnp.nan, v_BMGK)
    wanted = blockwise_and_grads([q_BLHK, k_BMGK, v_BMGK, g_BLHK], mask, window=4)
    for got, want in zip(blockwise_and_grads([q_BLHK, k_BMGK, marked_BMGK, g_BLHK], mask, window=4), wanted):
        np.testing.assert_array_equal(got, want)


def test_other_documents_are_not_visited():
    q_BLHK, k_BMGK, v_BMGK, g_BLHK = Case(queries=32, keys=32).arrays()
    mask = causal(jnp.repeat(jnp.array([[1, 2, 3, 0]]), 8, axis=1).repeat(2, axis=0))
    out_BLHK, dq_BLHK, *_ = blockwise_and_grads([q_BLHK, k_BMGK, v_BMGK.at[:, :8].set(jnp.nan), g_BLHK], mask)
    for x in (out_BLHK, dq_BLHK):
        assert np.isnan(x[:, :8]).all() and np.isfinite(x[:, 8:]).all()


def test_a_query_that_sees_nothing_gives_zero_and_finite_gradients():
    mask = AttentionMask(jnp.full((2, 4), 7), jnp.array([[1, 9, 1, 9]] * 2), jnp.ones((2, 8), jnp.int32))
    out_BLHK, dq_BLHK, *others = blockwise_and_grads(Case(queries=4, keys=8).arrays(), mask)
    assert not out_BLHK[:, 1::2].any() and out_BLHK[:, ::2].all()
    assert not dq_BLHK[:, 1::2].any()
    assert all(np.isfinite(x).all() for x in (dq_BLHK, *others))


@pytest.mark.parametrize(
    ("mesh", "heads"),
    [
        (MeshConfig(data=2, tensor=2, context=2), (4, 2)),
        (MeshConfig(data=2, tensor=4), (4, 2)),  # two key-value heads for four devices
        (MeshConfig(data=1, fsdp=2, tensor=4), (3, 3)),  # heads that divide over nothing stay whole
    ],
    ids=["context", "few key heads", "uneven heads"],
)
def test_a_mesh_does_not_change_blockwise_attention(mesh, heads):
    case = Case(queries=32, keys=32, heads=heads, documents="one", options={"window": 13})
    wanted = case.gradients(attend)
    names = ["q_BLHK", "k_BLGK", "v_BLGK", "g_BLHK"]
    devices = make_mesh(mesh)
    with jax.set_mesh(devices):
        placed = to_global(dict(zip(names, case.arrays(), strict=True)), devices)
        got = case.gradients(attend_blockwise, [placed[n] for n in names], block=case.block)
    assert_close(got, wanted)
