"""One layer of the decoder as a pure function of its parameters: norms, attention, MLP.

Parameters go by their names without N; every option of ModelConfig that lies inside a layer is read here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import ModelConfig
from gptjax.model.cache import Cache, keys_and_values, write
from gptjax.model.mup import attention_scale
from gptjax.model.rope import rope, rotate
from gptjax.ops.attention import attention
from gptjax.ops.linear import linear
from gptjax.ops.reference import AttentionMask, dropout

Params = dict[str, Any]


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


def block(
    cfg: ModelConfig,
    p: Params,
    x_BLD: jax.Array,
    positions_BL: jax.Array,
    mask: AttentionMask,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    window: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)). `p` is one layer: names without N.

    In parallel (GPT-J, Wang & Komatsuzaki 2021; PaLM, Chowdhery et al. 2022): x + attention(norm(x)) + mlp(norm(x)),
    with one norm. With a cache (see cache.py), the new keys and values are written at their positions and attended
    with the rest. A window lets a position see that many places, its own included.
    """
    keys = (None, None, None) if key is None else jax.random.split(key, 3)
    h_BLD = norm(x_BLD, p["norm_attn_D"], p.get("norm_attn_bias_D"), cfg)
    a_BLHK, cache = heads(cfg, p, h_BLD, positions_BL, mask, cache, keys[0], window)
    x_BLD = x_BLD + dropout(linear(a_BLHK, p, o="BLHK,HKD->BLD"), cfg.dropout, keys[1])
    if not cfg.parallel:
        h_BLD = norm(x_BLD, p["norm_mlp_D"], p.get("norm_mlp_bias_D"), cfg)
    h_BLF = hidden(cfg, p, h_BLD)
    return x_BLD + dropout(linear(h_BLF, p, w_out="BLF,FD->BLD"), cfg.dropout, keys[2]), cache


def heads(
    cfg: ModelConfig,
    p: Params,
    h_BLD: jax.Array,
    positions_BL: jax.Array,
    mask: AttentionMask,
    cache: Cache | None,
    key: jax.Array | None,
    window: jax.typing.ArrayLike | None,
) -> tuple[jax.Array, Cache | None]:
    """Attention outputs of all heads, a_BLHK, before their projection, and the cache with the new rows."""
    qkv = linear(h_BLD, p, q="BLD,DHK->BLHK", k="BLD,DGK->BLGK", v="BLD,DGK->BLGK")
    # The names are for remat: a product that is kept is never computed twice, what follows it is cheap.
    q_BLHK, k_BLGK, v_BLGK = map(checkpoint_name, qkv, ("query", "key", "value"))
    if cfg.qk_norm:
        q_BLHK = norm_heads(q_BLHK, p["norm_q_K"], cfg.norm_epsilon)
        k_BLGK = norm_heads(k_BLGK, p["norm_k_K"], cfg.norm_epsilon)
    if cfg.positions == "rope":
        frequency, temperature = rope(cfg)
        q_BLHK, k_BLGK = (rotate(t, positions_BL, frequency, temperature) for t in (q_BLHK, k_BLGK))
    if cache is not None:
        cache = write(cache, k_BLGK, v_BLGK, positions_BL[:, 0])
        k_BLGK, v_BLGK = keys_and_values(cache, h_BLD.dtype)
    scale = attention_scale(cfg)
    return attention(cfg, q_BLHK, k_BLGK, v_BLGK, mask, scale=scale, window=window, key=key), cache


def hidden(cfg: ModelConfig, p: Params, h_BLD: jax.Array) -> jax.Array:
    """The MLP's hidden layer h_BLF: GELU, a SiLU gate (Shazeer 2020), or ReLU squared (So et al. 2021, Primer)."""
    if cfg.activation == "swiglu":
        both = linear(h_BLD, p, w_in="BLD,DF->BLF", w_gate="BLD,DF->BLF")
        h_BLF, gate_BLF = (checkpoint_name(y, "mlp") for y in both)
        return jax.nn.silu(gate_BLF) * h_BLF
    h_BLF = checkpoint_name(linear(h_BLD, p, w_in="BLD,DF->BLF"), "mlp")
    if cfg.activation == "relu2":
        return jnp.square(jax.nn.relu(h_BLF))
    # In float32 inside: on a CPU the bfloat16 form takes three times as long, elsewhere it is fused and free.
    return jax.nn.gelu(h_BLF.astype(jnp.float32), approximate=True).astype(h_BLF.dtype)
