"""One layer of the decoder as a pure function of its parameters: norms, attention, MLP, and the key-value cache's rows.

Parameters go by their names without N; every option of ModelConfig that lies inside a layer is read here.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax import fewrows
from gptjax.attention import Sight, attend, dropout
from gptjax.blockwise import attend_blockwise
from gptjax.config import ModelConfig
from gptjax.mup import attention_scale
from gptjax.rope import rope, rotate

Params = dict[str, Any]
Cache = dict[str, jax.Array]


def norm(x_BLD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, cfg: ModelConfig) -> jax.Array:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over D, in float32."""
    x = x_BLD.astype(jnp.float32)
    if cfg.norm == "layernorm":
        x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + cfg.norm_epsilon) * scale_D
    return (x if bias_D is None else x + bias_D).astype(x_BLD.dtype)


def norm_heads(x_BLHK: jax.Array, scale_K: jax.Array, epsilon: float) -> jax.Array:
    """RMSNorm of each head's K numbers with one scale for all heads, in float32 (Henry et al. 2020, as in Qwen3)."""
    x = x_BLHK.astype(jnp.float32)
    x = x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * scale_K
    return x.astype(x_BLHK.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """einsum(equation, x, w), whose weight gradient is x^T g where jax's own is (g^T x)^T.

    The two are equal, but for the second XLA on a CPU writes g out transposed, by a loop over single numbers that
    takes longer than the product: an MLP's forward and backward pass in half the time.
    """
    return fewrows.product(equation, x, w)


def _product_forward(equation, x, w):
    return jnp.einsum(equation, x, w), (x, w)


def _product_backward(equation, kept, g):
    (x, w), (inputs, out) = kept, equation.split("->")
    x_letters, w_letters = inputs.split(",")
    dx = jnp.einsum(f"{out},{w_letters}->{x_letters}", g, w)
    return dx, jnp.einsum(f"{x_letters},{out}->{w_letters}", x, g)


product.defvjp(_product_forward, _product_backward)


def project(x: jax.Array, p: Params, stem: str, equation: str) -> jax.Array:
    """x times the weight `stem_...`, plus its bias where it has one; the equation's letters name the weight."""
    letters = equation.split("->")[0].split(",")[1]
    y: jax.Array = product(equation, x, p[f"{stem}_{letters}"].astype(x.dtype))
    out = equation.split("->")[1].removeprefix("BL")
    return y + p[f"{stem}_bias_{out}"].astype(x.dtype) if f"{stem}_bias_{out}" in p else y


def block(
    cfg: ModelConfig,
    p: Params,
    x_BLD: jax.Array,
    positions_BL: jax.Array,
    sight: Sight,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    window: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)). `p` is one layer: names without N.

    In parallel (GPT-J, Wang & Komatsuzaki 2021; PaLM, Chowdhery et al. 2022): x + attention(norm(x)) + mlp(norm(x)),
    with one norm. With a cache (k_BGMK, v_BGMK), the new keys and values are written at their positions and attended
    with the rest. A window lets a position see that many places, its own included.
    """
    keys = (None, None, None) if key is None else jax.random.split(key, 3)
    h_BLD = norm(x_BLD, p["norm_attn_D"], p.get("norm_attn_bias_D"), cfg)
    a_BLHK, cache = heads(cfg, p, h_BLD, positions_BL, sight, cache, keys[0], window)
    x_BLD = x_BLD + dropout(project(a_BLHK, p, "o", "BLHK,HKD->BLD"), cfg.dropout, keys[1])
    if not cfg.parallel:
        h_BLD = norm(x_BLD, p["norm_mlp_D"], p.get("norm_mlp_bias_D"), cfg)
    h_BLF = hidden(cfg, p, h_BLD)
    return x_BLD + dropout(project(h_BLF, p, "w_out", "BLF,FD->BLD"), cfg.dropout, keys[2]), cache


def heads(
    cfg: ModelConfig,
    p: Params,
    h_BLD: jax.Array,
    positions_BL: jax.Array,
    sight: Sight,
    cache: Cache | None,
    key: jax.Array | None,
    window: jax.typing.ArrayLike | None,
) -> tuple[jax.Array, Cache | None]:
    """What each head gathers, a_BLHK, before it is projected back into the stream; and the cache with the new rows."""
    # The names are for remat: a product that is kept is never computed twice, what follows it is cheap.
    q_BLHK = checkpoint_name(project(h_BLD, p, "q", "BLD,DHK->BLHK"), "query")
    k_BLGK = checkpoint_name(project(h_BLD, p, "k", "BLD,DGK->BLGK"), "key")
    v_BLGK = checkpoint_name(project(h_BLD, p, "v", "BLD,DGK->BLGK"), "value")
    if cfg.qk_norm:
        q_BLHK = norm_heads(q_BLHK, p["norm_q_K"], cfg.norm_epsilon)
        k_BLGK = norm_heads(k_BLGK, p["norm_k_K"], cfg.norm_epsilon)
    if cfg.positions == "rope":
        frequency, temperature = rope(cfg)
        q_BLHK, k_BLGK = (rotate(t, positions_BL, frequency, temperature) for t in (q_BLHK, k_BLGK))
    if cache is not None:
        cache = {
            "k_BGMK": write_rows(cache["k_BGMK"], k_BLGK, positions_BL[:, 0]),
            "v_BGMK": write_rows(cache["v_BGMK"], v_BLGK, positions_BL[:, 0]),
        }
        k_BMGK, v_BMGK = (jnp.moveaxis(cache[name], 1, 2).astype(h_BLD.dtype) for name in ("k_BGMK", "v_BGMK"))
    else:
        k_BMGK, v_BMGK = k_BLGK, v_BLGK
    seen = {"scale": attention_scale(cfg), "window": window, "softcap": cfg.attention_softcap}
    # One query's scores are M numbers a head: for it the plain product already is linear in memory.
    if cfg.attention == "blockwise" and q_BLHK.shape[1] > 1:
        # It names its output itself: named a second time, it would be kept twice.
        return attend_blockwise(q_BLHK, k_BMGK, v_BMGK, sight, block=cfg.attention_block, **seen), cache
    a_BLHK = attend(q_BLHK, k_BMGK, v_BMGK, sight, dropout_rate=cfg.dropout, key=key, **seen)
    return checkpoint_name(a_BLHK, "attention"), cache


def hidden(cfg: ModelConfig, p: Params, h_BLD: jax.Array) -> jax.Array:
    """The MLP's hidden layer h_BLF: GELU, a SiLU gate (Shazeer 2020), or ReLU squared (So et al. 2021, Primer)."""
    h_BLF = checkpoint_name(project(h_BLD, p, "w_in", "BLD,DF->BLF"), "mlp")
    if cfg.activation == "swiglu":
        return jax.nn.silu(checkpoint_name(project(h_BLD, p, "w_gate", "BLD,DF->BLF"), "mlp")) * h_BLF
    if cfg.activation == "relu2":
        return jnp.square(jax.nn.relu(h_BLF))
    # In float32 inside: on a CPU the bfloat16 form takes three times as long, elsewhere it is fused and free.
    return jax.nn.gelu(h_BLF.astype(jnp.float32), approximate=True).astype(h_BLF.dtype)


def write_rows(cache_BGMK: jax.Array, new_BLGK: jax.Array, start_B: jax.Array) -> jax.Array:
    """Writes each row's new entries into its slots start .. start + L - 1."""

    def row(cache_GMK, new_GLK, start):
        return jax.lax.dynamic_update_slice(cache_GMK, new_GLK, (0, start, 0))

    new_BGLK = jnp.moveaxis(new_BLGK, 1, 2).astype(cache_BGMK.dtype)
    if len(start_B) > 1:
        return jax.vmap(row)(cache_BGMK, new_BGLK, start_B)
    start = start_B[0]

    def write(_, cache_BGMK):
        return jax.lax.dynamic_update_slice(cache_BGMK, new_BGLK, (0, 0, start, 0))

    if jax.default_backend() != "cpu":
        return write(0, cache_BGMK)
    # XLA on a CPU fuses the write of one row into every reader and then copies the whole cache to keep the old one for
    # them; a loop that runs once, as the compiler can't know, is what it does not look through.
    return jax.lax.fori_loop(0, (start >= 0).astype(jnp.int32), write, cache_BGMK)
