"""Products and their gradients: on a CPU in bfloat16 they are computed another way, with the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax.ops.linear
from gptjax.ops.device import Device
from gptjax.ops.linear import add_bias, embed, linear, one_hot_gradient, products, transpose

CASES = {
    "one weight": ("BLD,DF->BLF",),
    "heads in": ("BLHK,HKD->BLD",),
    "queries, keys and values": ("BLD,DHK->BLHK", "BLD,DGK->BLGK", "BLD,DGK->BLGK"),
}
SIZES = {"B": 2, "L": 24, "D": 32, "F": 48, "H": 4, "G": 2, "K": 8}


def arrays(equations, dtype):
    def make(seed, letters):
        return jax.random.normal(jax.random.key(seed), [SIZES[n] for n in letters]).astype(dtype)

    x_letters = equations[0].split(",")[0]
    letters = [e.split(",")[1].split("->") for e in equations]
    weights = tuple(make(i + 1, w) for i, (w, _) in enumerate(letters))
    return make(0, x_letters), weights, tuple(make(i + 9, y) for i, (_, y) in enumerate(letters))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_products_and_their_gradients_are_those_of_einsum(case, dtype):
    equations = CASES[case]
    x, weights, gs = arrays(equations, jnp.dtype(dtype))

    def plain(x, weights):
        return tuple(jnp.einsum(e, x, w) for e, w in zip(equations, weights, strict=True))

    ours, ours_vjp = jax.vjp(lambda x, w: products(equations, x, w), x, weights)
    # The reference is float32 throughout: bfloat16 then may differ by its own rounding.
    as32 = jax.tree.map(lambda a: a.astype(jnp.float32), (x, weights, gs))
    want, want_vjp = jax.vjp(plain, *as32[:2])
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    for a, b in zip(jax.tree.leaves((ours, ours_vjp(gs))), jax.tree.leaves((want, want_vjp(as32[2]))), strict=True):
        assert a.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=tolerance, atol=tolerance * float(jnp.abs(b).max()))


def test_a_transposed_copy_is_a_transpose():
    for shape, order in (((4, 6), (1, 0)), ((5, 6), (1, 0)), ((2, 4, 6), (2, 0, 1))):
        x = jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16)
        np.testing.assert_array_equal(transpose(x, order), jnp.transpose(x, order))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU's compiler folds transposes into products")
@pytest.mark.parametrize("case", CASES)
def test_no_transpose_is_folded_into_a_product_in_bfloat16(case):
    x, weights, gs = arrays(CASES[case], jnp.bfloat16)

    def gradients(x, weights, gs):
        def cast(x, weights):
            return products(CASES[case], x, tuple(w.astype(x.dtype) for w in weights))

        return jax.vjp(cast, x, tuple(w.astype(jnp.float32) for w in weights))[1](gs)

    compiled = jax.jit(gradients).lower(x, weights, gs).compile().as_text()
    dots = [line for line in compiled.splitlines() if " dot(" in line]
    assert len(dots) == 2 * len(weights)
    # Row-major: the last dimension of the first operand meets the first of the second.
    assert all("lhs_contracting_dims={1}, rhs_contracting_dims={0}" in dot for dot in dots), dots


def test_a_biass_gradient_is_added_up_in_float32():
    y, bias = jnp.zeros((64, 64, 3), jnp.bfloat16), jnp.zeros(3)
    g = jnp.ones_like(y)  # in bfloat16 the sum of ones ends at 256
    dy, db = jax.vjp(add_bias, y, bias)[1](g)
    np.testing.assert_array_equal(db, [4096.0] * 3)
    np.testing.assert_array_equal(dy, g)


def test_a_tables_gradient_counts_every_use_of_a_row():
    table, ids = jnp.zeros((5, 2)), jnp.array([[1] * 1000 + [3]])
    dtable = jax.grad(lambda t: embed(t, ids, jnp.bfloat16).astype(jnp.float32).sum())(table)
    np.testing.assert_array_equal(dtable, [[0, 0], [1000, 1000], [0, 0], [1, 1], [0, 0]])


def test_the_one_hot_gradient_is_the_scattered_one(monkeypatch):
    ids, g = jax.random.randint(jax.random.key(0), (3, 5), 0, 7), jax.random.normal(jax.random.key(1), (3, 5, 4))
    want = jnp.zeros((7, 4)).at[ids].add(g)
    for rows in (4, 15, 1024):  # with a last part that is filled up, exactly one part, and less than one
        monkeypatch.setattr(gptjax.ops.linear, "ONE_HOT_ROWS", rows)
        np.testing.assert_allclose(one_hot_gradient(7, ids, g), want, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(gptjax.ops.linear, "device", lambda: Device("gpu"))
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    ours = jax.vjp(lambda t: embed(t, ids, jnp.float32), jnp.zeros((7, 4)))[1](g)[0]
    np.testing.assert_allclose(ours, want, rtol=1e-6, atol=1e-6)


def test_linear_takes_weights_and_biases_by_their_names():
    p = {"q_DHK": jnp.ones((32, 4, 8)), "k_DGK": 2 * jnp.ones((32, 2, 8)), "k_bias_GK": jnp.full((2, 8), 5.0)}
    x_BLD = jnp.full((2, 3, 32), 0.5, jnp.bfloat16)
    q_BLHK, k_BLGK = linear(x_BLD, p, q="BLD,DHK->BLHK", k="BLD,DGK->BLGK")
    assert q_BLHK.dtype == k_BLGK.dtype == jnp.bfloat16  # the type is that of x
    np.testing.assert_array_equal(q_BLHK, np.full((2, 3, 4, 8), 16.0))
    np.testing.assert_array_equal(k_BLGK, np.full((2, 3, 2, 8), 37.0))
    np.testing.assert_array_equal(linear(x_BLD, p, q="BLD,DHK->BLHK"), q_BLHK)  # one alone is no tuple
