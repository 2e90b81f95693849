"""One layer of the decoder as a pure function of its parameters: norms, attention, MLP.

Parameters go by their names without N; every option of ModelConfig that lies inside a layer is read here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import ModelConfig
from gptjax.model.cache import Cache, go_on, keys_and_values, write
from gptjax.model.mup import attention_scale
from gptjax.model.rope import rope, rotate
from gptjax.ops.attention import attention
from gptjax.ops.linear import linear
from gptjax.ops.reference import AttentionMask, dropout
from gptjax.parallel.sharding import suffix

Params = dict[str, Any]


# A layer that attends to everything, in an array of windows: more places than any text has.
NO_WINDOW = 2**31 - 1


# How the weight of a norm starts, by model.norm_weights.
NORM_STARTS = {"scale": "ones", "offset": "zeros"}


def layer_params(cfg: ModelConfig) -> dict[str, str]:
    """Every parameter of the stacked layers and how it starts: 'normal', 'residual', 'ones' or 'zeros'."""
    names = {"q_NDHK": "normal", "k_NDGK": "normal", "v_NDGK": "normal", "o_NHKD": "residual"}
    names |= {"w_in_NDF": "normal", "w_out_NFD": "residual"}
    if cfg.gated:
        names["w_gate_NDF"] = "normal"
    norms = ["norm_attn", *([] if cfg.parallel else ["norm_mlp"])]
    norms += ["norm_attn_out", "norm_mlp_out"] if cfg.post_norms else []
    start = NORM_STARTS.get(cfg.norm_weights)
    # A bias is named after its weight and has the weight's output dimensions.
    outputs = {"q": "NHK", "k": "NGK", "v": "NGK"} if cfg.biases or cfg.qkv_biases else {}
    if cfg.biases:
        outputs |= {"o": "ND", "w_in": "NF", "w_out": "ND"} | ({"w_gate": "NF"} if cfg.gated else {})
        outputs |= dict.fromkeys(norms, "ND") if cfg.norm == "layernorm" else {}
    names |= {f"{stem}_ND": start for stem in norms if start}
    names |= {f"{stem}_bias_{letters}": "zeros" for stem, letters in outputs.items()}
    return names | ({"norm_q_NK": start, "norm_k_NK": start} if cfg.qk_norm and start else {})


def norm(
    x_BLD: jax.Array, weight_D: jax.Array | None, bias_D: jax.Array | None, cfg: ModelConfig, kind: str = ""
) -> jax.Array:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last dimension, in float32.

    `kind` is in place of cfg.norm: queries and keys have RMSNorm over the K numbers of each head, with one weight for
    all heads (Henry et al. 2020, as in Qwen3).
    """
    x = x_BLD.astype(jnp.float32)
    if (kind or cfg.norm) == "layernorm":
        x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + cfg.norm_epsilon)
    if weight_D is not None:
        x = x * (1 + weight_D if cfg.norm_weights == "offset" else weight_D)
    return (x if bias_D is None else x + bias_D).astype(x_BLD.dtype)


def block(
    cfg: ModelConfig,
    p: Params,
    x_BLD: jax.Array,
    positions_BL: jax.Array,
    mask: AttentionMask,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    window: int | jax.Array | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)). `p` is one layer: names without N.

    In parallel (GPT-J, Wang & Komatsuzaki 2021; PaLM, Chowdhery et al. 2022): x + attention(norm(x)) + mlp(norm(x)),
    with one norm. With post_norms (Gemma 2) each branch is normed again before it is added. With a cache (see
    cache.py), the new keys and values are written at their positions and attended with the rest. A window lets a
    position see that many places, its own included.
    """
    keys = (None, None, None) if key is None else jax.random.split(key, 3)
    h_BLD = norm(x_BLD, p.get("norm_attn_D"), p.get("norm_attn_bias_D"), cfg)
    a_BLHK, cache = heads(cfg, p, h_BLD, positions_BL, mask, cache, keys[0], window)
    a_BLD = linear(a_BLHK, p, o="BLHK,HKD->BLD")
    if cfg.post_norms:
        a_BLD = norm(a_BLD, p.get("norm_attn_out_D"), p.get("norm_attn_out_bias_D"), cfg)
    x_BLD = x_BLD + dropout(a_BLD, cfg.dropout, keys[1])
    if not cfg.parallel:
        h_BLD = norm(x_BLD, p.get("norm_mlp_D"), p.get("norm_mlp_bias_D"), cfg)
    m_BLD = linear(hidden(cfg, p, h_BLD), p, w_out="BLF,FD->BLD")
    if cfg.post_norms:
        m_BLD = norm(m_BLD, p.get("norm_mlp_out_D"), p.get("norm_mlp_out_bias_D"), cfg)
    return x_BLD + dropout(m_BLD, cfg.dropout, keys[2]), cache


def heads(
    cfg: ModelConfig,
    p: Params,
    h_BLD: jax.Array,
    positions_BL: jax.Array,
    mask: AttentionMask,
    cache: Cache | None,
    key: jax.Array | None,
    window: int | jax.Array | None,
    values: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Attention outputs of all heads, a_BLHK, before their projection, and the cache with the new rows.

    With values_BMGM in place of the layer's own, one-hot by place, they are the weights of attention, a_BLHM.
    """
    qkv = linear(h_BLD, p, q="BLD,DHK->BLHK", k="BLD,DGK->BLGK", v="BLD,DGK->BLGK")
    # The names are for remat: a product that is kept is never computed twice, what follows it is cheap.
    q_BLHK, k_BLGK, v_BLGK = map(checkpoint_name, qkv, ("query", "key", "value"))
    if cfg.qk_norm:
        q_BLHK = norm(q_BLHK, p.get("norm_q_K"), None, cfg, "rmsnorm")
        k_BLGK = norm(k_BLGK, p.get("norm_k_K"), None, cfg, "rmsnorm")
    if cfg.positions == "rope":
        frequency, temperature = rope(cfg, local=window is not None and window < NO_WINDOW)
        q_BLHK, k_BLGK = (rotate(t, positions_BL, frequency, temperature) for t in (q_BLHK, k_BLGK))
    scale = attention_scale(cfg)
    if cache is not None and "first" in cache:
        start_B = positions_BL[:, 0]
        return go_on(cfg, cache, q_BLHK, k_BLGK, v_BLGK, start_B, mask.query_BL, scale=scale, window=window)
    if cache is not None:
        cache = write(cache, k_BLGK, v_BLGK, positions_BL[:, 0])
        k_BLGK, v_BLGK = keys_and_values(cache, h_BLD.dtype)
    v_BLGK = v_BLGK if values is None else values
    return attention(cfg, q_BLHK, k_BLGK, v_BLGK, mask, scale=scale, window=window, key=key), cache


def hidden(cfg: ModelConfig, p: Params, h_BLD: jax.Array) -> jax.Array:
    """The MLP's hidden layer h_BLF: GELU, GELU or SiLU as a gate (Shazeer 2020), or ReLU squared (So et al. 2021)."""
    gated = "w_gate_DF" in p
    if gated:
        both = linear(h_BLD, p, w_in="BLD,DF->BLF", w_gate="BLD,DF->BLF")
        h_BLF, gate_BLF = (checkpoint_name(y, "mlp") for y in both)
    else:
        h_BLF = gate_BLF = checkpoint_name(linear(h_BLD, p, w_in="BLD,DF->BLF"), "mlp")
    if cfg.activation == "relu2":
        return jnp.square(jax.nn.relu(h_BLF))
    if cfg.activation == "quick_gelu":  # Hendrycks & Gimpel 2016
        return h_BLF * jax.nn.sigmoid(1.702 * h_BLF.astype(jnp.float32)).astype(h_BLF.dtype)
    if cfg.activation == "swiglu":
        return jax.nn.silu(gate_BLF) * h_BLF
    # In float32 inside: on a CPU the bfloat16 form takes three times as long, elsewhere it is fused and free.
    gelu_BLF = jax.nn.gelu(gate_BLF.astype(jnp.float32), approximate=True).astype(h_BLF.dtype)
    return gelu_BLF * h_BLF if gated else gelu_BLF


def one_layer(tree: Params) -> Params:
    """The names of stacked leaves as one layer calls them: q_NDHK is q_DHK inside the scan."""
    return {name.replace("_N", "_", 1) if suffix(name).startswith("N") else name: x for name, x in tree.items()}


def remat(cfg: ModelConfig, body: Callable) -> Callable:
    """The scanned body of a layer, with what cfg.remat says computed again in the backward pass."""
    policies = jax.checkpoint_policies
    policy = {
        "full": None,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "names": policies.save_only_these_names(*cfg.remat_names),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=list(cfg.remat_names),
            offload_src="device", offload_dst="pinned_host",
        ),
    }[cfg.remat]  # fmt: skip
    # The scan already keeps the compiler from merging the recomputation with the forward pass.
    return jax.checkpoint(body, prevent_cse=False, policy=policy)
