"""Attention by blocks is the plain attention, in values and gradients, and never touches what nobody sees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig, ModelConfig
from gptjax.model.decoder import Decoder, init_params
from gptjax.ops.blockwise import attend_blockwise
from gptjax.ops.reference import AttentionMask, attend, cached, causal
from gptjax.parallel.sharding import make_mesh, to_global
from gptjax.training.losses import language_model_loss


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


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
        lengths = {"one": [[self.keys], [self.keys]], "packed": [[10, 1, 15, 11], [20, 17]]}[self.documents]
        # In packed rows the last stretch is padding: segment 0.
        rows = [np.repeat([*range(1, len(n)), 0 if len(n) > 1 else 1], n) for n in lengths]
        return causal(jnp.array(np.stack(rows), jnp.int32))

    def arrays(self, dtype: Any = jnp.float32) -> list[jax.Array]:
        """q_BLHK, k_BMGK, v_BMGK and a gradient g_BLHK."""
        rng, (H, G) = np.random.default_rng(0), self.heads
        shapes = [(self.queries, H), (self.keys, G), (self.keys, G), (self.queries, H)]
        return [jnp.asarray(rng.normal(size=(2, *shape, 8)), dtype) for shape in shapes]


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
    "one query of a cache": Case(queries=1, keys=29, documents="cached"),
}


def value_and_grads(attention, case: Case, arrays: list[jax.Array], **more) -> list[np.ndarray]:
    """Output and gradients by q, k and v."""
    *qkv, g_BLHK = arrays

    traced = {name: x for name, x in case.options.items() if isinstance(x, np.generic)}

    def run(traced, *qkv):
        options = case.options | traced | more
        out_BLHK, back = jax.vjp(lambda *qkv: attention(*qkv, case.mask, scale=0.4, **options), *qkv)
        return out_BLHK, *back(g_BLHK)

    return [np.asarray(x, np.float32) for x in jax.jit(run)(traced, *qkv)]


def assert_close(got: list[np.ndarray], wanted: list[np.ndarray]):
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5, atol=1e-5)
    for g, want in zip(got[1:], wanted[1:], strict=True):
        assert np.abs(g - want).max() <= 1e-4 * np.abs(want).max() > 0


@pytest.mark.parametrize("name", CASES)
def test_blockwise_is_plain_attention(name):
    case = CASES[name]
    arrays = case.arrays()
    assert_close(
        value_and_grads(attend_blockwise, case, arrays, block=case.block), value_and_grads(attend, case, arrays)
    )


def test_in_bfloat16_blockwise_is_no_further_from_float32_than_plain():
    case = Case(queries=64, keys=64, block=16, documents="one")
    exact = value_and_grads(attend, case, [x.astype(jnp.float32) for x in case.arrays(jnp.bfloat16)])
    rounded = [
        value_and_grads(attention, case, case.arrays(jnp.bfloat16), **more)
        for attention, more in ((attend_blockwise, {"block": case.block}), (attend, {}))
    ]
    for wanted, blockwise, plain in zip(exact, *rounded, strict=True):
        assert np.linalg.norm(blockwise - wanted) <= np.linalg.norm(plain - wanted)


def blockwise_and_grads(arrays: list[jax.Array], mask: AttentionMask, **options) -> list[np.ndarray]:
    """Output and gradients by q, k and v, in blocks of 8."""
    *qkv, g_BLHK = arrays

    def run(*qkv):
        out_BLHK, back = jax.vjp(lambda *qkv: attend_blockwise(*qkv, mask, scale=0.4, block=8, **options), *qkv)
        return out_BLHK, *back(g_BLHK)

    return [np.asarray(x) for x in jax.jit(run)(*qkv)]


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
    wanted = value_and_grads(attend, case, case.arrays())
    names = ["q_BLHK", "k_BLGK", "v_BLGK", "g_BLHK"]
    devices = make_mesh(mesh)
    with jax.set_mesh(devices):
        placed = to_global(dict(zip(names, case.arrays(), strict=True)), devices)
        got = value_and_grads(attend_blockwise, case, [placed[n] for n in names], block=case.block)
    assert_close(got, wanted)


MODEL = ModelConfig(num_layers=3, width=32, num_heads=4, queries_per_kv=2, positions="rope", norm="rmsnorm",
                    window=7, global_every=2, attention_softcap=5.0, dtype="float32")  # fmt: skip


def loss_and_grads(**settings) -> tuple[Any, Any]:
    """The function of a small decoder's parameters on a packed batch, jitted, and such parameters."""
    decoder = Decoder(dataclasses.replace(MODEL, **settings), 50, 40)
    loss = language_model_loss(decoder)
    rng = np.random.default_rng(0)
    ids_BL = rng.integers(0, 50, (2, 40))
    segments_BL = np.repeat([[1, 2, 0]], [13, 20, 7], axis=1).repeat(2, axis=0)
    batch = {"inputs_BL": ids_BL, "targets_BL": ids_BL, "positions_BL": np.tile(np.arange(40), (2, 1)),
             "segments_BL": segments_BL, "weights_BL": (segments_BL > 0).astype(np.float32)}  # fmt: skip
    shapes = jax.eval_shape(init_params(decoder), jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(scale=0.2, size=x.shape).astype(np.float32), shapes)
    return jax.jit(jax.value_and_grad(lambda p: loss(p, {}, batch, jax.random.key(1))[0])), params


def test_remat_that_keeps_attention_does_not_compute_it_again():
    def exponentials(remat: str) -> int:
        f, params = loss_and_grads(attention="blockwise", attention_block=16, remat=remat)
        return f.lower(params).as_text().count("stablehlo.exponential")

    assert exponentials("names") == exponentials("none") < exponentials("full")
