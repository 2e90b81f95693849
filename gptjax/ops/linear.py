"""Products with parameters (weights, biases, tables), whose gradients are fast on every platform and version of JAX.

The gradient of y = x w is dx = g w^T and dw = x^T g. XLA on a CPU folds each transpose into the product that reads it
and so leaves its fast path: in bfloat16, on cores with matrix units, such a product takes 3 to 7 times as long.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.ops.decoding import MANY_ROWS, few_rows_einsum
from gptjax.ops.device import Device, device
from gptjax.parallel.sharding import RULES, axes_of


def linear(x: jax.Array, p: Mapping[str, jax.Array], **equations: str) -> Any:
    """x times the weight of each name, as linear(x_BLD, p, q="BLD,DHK->BLHK") with p["q_DHK"], plus its bias if any.

    The letters of an equation end the weight's name in p, and the output's letters but B and L that of its bias
    (`q_bias_HK`). One name gives an array, several a tuple in their order, whose gradients share what they need of x.
    Where p has `q_a_DR` and `q_b_RHK` (LoRA), (x a) b is added to q's.
    """
    letters = {name: e.split(",")[1].split("->") for name, e in equations.items()}
    weights = tuple(p[f"{name}_{w}"].astype(x.dtype) for name, (w, _) in letters.items())
    ys: tuple[jax.Array, ...] = products(tuple(equations.values()), x, weights)
    for i, (name, equation) in enumerate(equations.items()):
        x_letters, w, y = re.split(",|->", equation)
        inputs = x_letters.removeprefix("BL")
        if (a := p.get(f"{name}_a_{inputs}R")) is not None:
            b = p[f"{name}_b_R{w.removeprefix(inputs)}"]
            low: tuple[jax.Array, ...] = products((f"{x_letters},{inputs}R->BLR",), x, (a.astype(x.dtype),))
            low = products((f"BLR,R{w.removeprefix(inputs)}->{y}",), low[0], (b.astype(x.dtype),))
            ys = (*ys[:i], ys[i] + low[0], *ys[i + 1 :])
    biases = [f"{name}_bias_{y.removeprefix('BL')}" for name, (_, y) in letters.items()]
    ys = tuple(add_bias(y, p[bias]) if bias in p else y for y, bias in zip(ys, biases, strict=True))
    return ys[0] if len(equations) == 1 else ys


def transpose(x: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """jnp.transpose(x, order); on a CPU, in bfloat16, as an array of its own that no product can fold away.

    The compiler looks through a transposed matrix, also behind an optimization barrier, but not through a reshaped one.
    """
    if x.ndim > 2 or x.shape[0] % 2 or x.dtype != jnp.bfloat16 or device().platform != "cpu":
        return jnp.transpose(x, order)
    rows, columns = x.shape
    return jnp.transpose(x.reshape(2, rows // 2, columns), (2, 0, 1)).reshape(columns, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def products(equations: tuple[str, ...], x: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """(einsum(equation, x, w), ...) for several weights of one input, whose gradients share what they need of x.

    Each equation is "batch input, input output -> batch output", as in BLD,DHK->BLHK.
    """
    einsum = few_rows_einsum if math.prod(x.shape[:2]) < MANY_ROWS else jnp.einsum
    return tuple(einsum(e, x, w) for e, w in zip(equations, weights, strict=True))


def _forward(equations, x, weights):
    # Spelled out: remat's policies see the products of a forward pass, not those inside of a call.
    return tuple(jnp.einsum(e, x, w) for e, w in zip(equations, weights, strict=True)), (x, weights)


def _backward(equations, kept, gs):
    x, weights = kept
    x_letters = equations[0].split(",")[0]
    # Input before batch: then dw is a plain product of rows and columns, and one copy of x serves every weight.
    inputs = [n for n in x_letters if n in equations[0].split(",")[1].split("->")[0]]
    turned = "".join(inputs + [n for n in x_letters if n not in inputs])
    x_turned = transpose(x, tuple(x_letters.index(n) for n in turned))
    dx, dws = None, []
    for equation, w, g in zip(equations, weights, gs, strict=True):
        w_letters, y_letters = equation.split(",")[1].split("->")
        out = [n for n in w_letters if n not in inputs]
        w_turned = transpose(w, tuple(w_letters.index(n) for n in out + inputs))
        part = jnp.einsum(f"{y_letters},{''.join(out + inputs)}->{x_letters}", g, w_turned)
        dx = part if dx is None else dx + part
        dws.append(jnp.einsum(f"{turned},{y_letters}->{w_letters}", x_turned, g))
    return dx, tuple(dws)


products.defvjp(_forward, _backward)


@jax.custom_vjp
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y + bias over y's last dimensions. The bias's gradient, a sum over all others, is added up in float32.

    jax's own sums in y's type, which XLA on a CPU does on one core and 30 times slower.
    """
    return y + bias.astype(y.dtype)


def _bias_forward(y, bias):
    return add_bias(y, bias), bias


def _bias_backward(bias, g):
    return g, g.astype(jnp.float32).sum(tuple(range(g.ndim - bias.ndim))).astype(bias.dtype)


add_bias.defvjp(_bias_forward, _bias_backward)


# Tokens in one product of the one-hot form: 1,024 x 50,304 numbers of bfloat16 are 98 MiB.
ONE_HOT_ROWS = 1024


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(table_VD: jax.Array, ids_BL: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows of a table, as `dtype`. The table's gradient is added up in float32, however often a row occurs."""
    return table_VD.astype(dtype)[ids_BL]


def _embed_forward(table_VD, ids_BL, dtype):
    # An array of no elements carries the table's size and type to the backward pass.
    return embed(table_VD, ids_BL, dtype), (ids_BL, jnp.zeros((table_VD.shape[0], 0), table_VD.dtype))


def _embed_backward(dtype, kept, g_BLD):
    ids_BL, like_VD = kept
    # Before jaxlib 0.11.1 a GPU can take 2,000 times as long to add to scattered rows in float32.
    if device().platform == "gpu" and jax.__version_info__ < (0, 11, 1):
        dtable_VD = one_hot_gradient(like_VD.shape[0], ids_BL, g_BLD)
    else:
        zeros = jnp.zeros((like_VD.shape[0], g_BLD.shape[-1]), jnp.float32)
        dtable_VD = zeros.at[ids_BL].add(g_BLD.astype(jnp.float32))
    return dtable_VD.astype(like_VD.dtype), None


embed.defvjp(_embed_forward, _embed_backward)


def one_hot_gradient(rows: int, ids_BL: jax.Array, g_BLD: jax.Array) -> jax.Array:
    """The float32 gradient of a table of `rows` rows as a product with one-hot ids, some tokens at a time."""
    ids, g = ids_BL.reshape(-1), g_BLD.reshape(-1, g_BLD.shape[-1])
    size = min(ONE_HOT_ROWS, len(ids))
    short = -len(ids) % size
    # The id that fills up the last part is no row's, so its one-hot row is 0.
    ids, g = jnp.pad(ids, (0, short), constant_values=rows), jnp.pad(g, ((0, short), (0, 0)))

    def add(total_VD, part):
        ids_C, g_CD = part
        hit_CV = jax.nn.one_hot(ids_C, rows, dtype=g_CD.dtype)
        return total_VD + jnp.einsum("CV,CD->VD", hit_CV, g_CD, preferred_element_type=jnp.float32), None

    parts = ids.reshape(-1, size), g.reshape(-1, size, g.shape[-1])
    return jax.lax.scan(add, jnp.zeros((rows, g.shape[-1]), jnp.float32), parts)[0]


# Share of a GPU's or TPU's memory that one chunk's float32 logits may take. A chunk reads and writes the gradient of
# the whole head and, where devices share the head, sends it: so few chunks, of thousands of tokens.
LOGITS_SHARE = 1 / 16
# On a CPU the fastest of 4 to 128 MiB, or half of the head's gradient where that is more.
CPU_LOGITS, CPU_HEAD_SHARE = 1 << 24, 0.5


def loss_chunks(shape: tuple[int, ...], head: tuple[int, ...]) -> tuple[int, int]:
    """(chunks of the logits of targets_BL, devices that share a row): each chunk has a part of every device's places.

    `shape` is that of the targets, B L, and `head` that of the output matrix, V D, both of all devices.
    """
    (B, L), (V, D) = shape, head
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape[a] for a in axes_of({"L": L}).get("L", ()))
    parts = shards * (1 if mesh.empty else math.prod(mesh.shape[a] for a in RULES["B"] + RULES["V"]))
    return count_chunks(device(), L // shards, 4 * B * V * shards / parts, 4 * V * D / parts), shards


def count_chunks(on: Device, places: int, each: float, head: float) -> int:
    """The fewest chunks, dividing a device's places of each row, whose float32 logits keep within what may be held.

    `each` is the bytes of a device's logits at one place of its rows, `head` the head's float32 bytes a device.
    """
    limit = max(CPU_LOGITS, CPU_HEAD_SHARE * head) if on.platform == "cpu" else LOGITS_SHARE * on.memory
    return next((n for n in range(1, places + 1) if places % n == 0 and each * (places // n) <= limit), places)
