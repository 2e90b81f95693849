"""A plain JAX decoder as a baseline: GPT-2's function written the way small JAX code bases (nanodo) write it.

Projections are einsums 'BLD,DHK->BLHK', attention works on B L H K, layers are a Python loop, the stream and the logits
of the whole batch are float32, and the step is optax's softmax cross-entropy and AdamW after a clip by global norm,
jitted with its state donated. Nothing is tuned for a device, no documents are told apart.

Letters as in gptjax/sharding.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = dict[str, Any]


def from_stacked(params: Params) -> Params:
    """This decoder's parameters from ours: the stacked layers as a list, names without the letter N."""
    layers = params["layers"]
    count = len(next(iter(layers.values())))
    per_layer = [{name.replace("_N", "_", 1): jnp.array(x[n]) for name, x in layers.items()} for n in range(count)]
    return {name: jnp.array(x) for name, x in params.items() if name != "layers"} | {"layers": per_layer}


def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float, dtype: Any) -> jax.Array:
    x = x.astype(jnp.float32)
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + epsilon)
    return (x * scale_D + bias_D).astype(dtype)


def attention(p: Params, x_BLD: jax.Array, dtype: Any) -> jax.Array:
    q_BLHK, k_BLHK, v_BLHK = (
        jnp.einsum("BLD,DHK->BLHK", x_BLD, p[name].astype(dtype)) + p[bias].astype(dtype)
        for name, bias in (("q_DHK", "q_bias_HK"), ("k_DGK", "k_bias_GK"), ("v_DGK", "v_bias_GK"))
    )
    L, K = q_BLHK.shape[1], q_BLHK.shape[3]
    s_BHLM = jnp.einsum("BLHK,BMHK->BHLM", q_BLHK / K**0.5, k_BLHK).astype(jnp.float32)
    s_BHLM = jnp.where(jnp.tril(jnp.ones((L, L), jnp.bool_)), s_BHLM, jnp.finfo(jnp.float32).min)
    a_BHLM = jax.nn.softmax(s_BHLM, axis=-1).astype(dtype)
    out_BLHK = jnp.einsum("BHLM,BMHK->BLHK", a_BHLM, v_BLHK)
    return jnp.einsum("BLHK,HKD->BLD", out_BLHK, p["o_HKD"].astype(dtype)) + p["o_bias_D"].astype(dtype)


def mlp(p: Params, x_BLD: jax.Array, dtype: Any) -> jax.Array:
    h_BLF = jnp.einsum("BLD,DF->BLF", x_BLD, p["w_in_DF"].astype(dtype)) + p["w_in_bias_F"].astype(dtype)
    h_BLF = jax.nn.gelu(h_BLF)
    return jnp.einsum("BLF,FD->BLD", h_BLF, p["w_out_FD"].astype(dtype)) + p["w_out_bias_D"].astype(dtype)


def logits(params: Params, tokens_BL: jax.Array, epsilon: float, dtype: Any) -> jax.Array:
    """float32 logits_BLV of the whole batch."""
    x_BLD = params["embed_VD"][tokens_BL] + params["position_TD"][: tokens_BL.shape[1]]
    for p in params["layers"]:
        x_BLD += attention(p, layer_norm(x_BLD, p["norm_attn_D"], p["norm_attn_bias_D"], epsilon, dtype), dtype)
        x_BLD += mlp(p, layer_norm(x_BLD, p["norm_mlp_D"], p["norm_mlp_bias_D"], epsilon, dtype), dtype)
    x_BLD = layer_norm(x_BLD, params["norm_final_D"], params["norm_final_bias_D"], epsilon, dtype)
    return jnp.einsum("BLD,VD->BLV", x_BLD.astype(jnp.float32), params["embed_VD"])


class PlainDecoder:
    """The training step and its state; `optim` holds the fields of OptimConfig that are used."""

    def __init__(self, params: Params, epsilon: float, dtype: str, optim: dict[str, Any]):
        def decays(path, _):
            return not any(word in path[-1].key for word in ("norm", "bias", "position"))

        self.tx = optax.chain(
            optax.clip_by_global_norm(optim["clip_norm"]),
            optax.adamw(
                optim["learning_rate"], optim["beta1"], optim["beta2"], optim["epsilon"],
                weight_decay=optim["weight_decay"], mask=lambda p: jax.tree_util.tree_map_with_path(decays, p),
            ),
        )  # fmt: skip

        def step(state, tokens_BL, targets_BL):
            def loss_fn(params):
                losses_BL = optax.softmax_cross_entropy_with_integer_labels(
                    logits(params, tokens_BL, epsilon, jnp.dtype(dtype)), targets_BL
                )
                return losses_BL.mean()

            params, opt_state = state
            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, opt_state = self.tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), (loss, optax.tree.norm(grads))

        self.step = jax.jit(step, donate_argnums=0)
        self.state = params, self.tx.init(params)

    def run(self, batches: list[dict[str, np.ndarray]]) -> list[dict[str, float]]:
        """Trains on each batch once and returns its loss and the norm of its gradient."""
        results = []
        for batch in batches:
            self.state, result = self.step(self.state, batch["inputs_BL"], batch["targets_BL"])
            results.append(result)
        jax.block_until_ready(self.state)
        return [{"loss": float(loss), "grad_norm": float(norm)} for loss, norm in results]
