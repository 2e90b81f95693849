"""The decoder: GPT-2 and the Llama family as settings of one model, its key-value cache an argument and a result.

One declaration (`layer_params`, `Decoder.setup`) gives every parameter's name; the letters of the name give its shape
(`dims`) and, in sharding.py, its place on the mesh. Layers are stored stacked (N) and scanned by a pure function.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.attention import Sight, attend, cached, causal, dropout, rotate
from gptjax.config import ModelConfig, TrainConfig
from gptjax.losses import logits
from gptjax.scaling.counts import padded_vocab
from gptjax.sharding import constrain, suffix

Params = dict[str, Any]
Cache = dict[str, jax.Array]


def dims(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, int]:
    """The size of every letter that occurs in a parameter's name."""
    return {
        "V": padded_vocab(vocab_size), "T": context, "N": cfg.num_layers,
        "D": cfg.width, "F": cfg.mlp_width, "H": cfg.num_heads, "G": cfg.num_kv_heads, "K": cfg.head_size,
    }  # fmt: skip


def layer_params(cfg: ModelConfig) -> dict[str, str]:
    """Every parameter of the stacked layers and how it starts: 'normal', 'residual', 'ones' or 'zeros'."""
    names = {"q_NDHK": "normal", "k_NDGK": "normal", "v_NDGK": "normal", "o_NHKD": "residual"}
    names |= {"w_in_NDF": "normal", "w_out_NFD": "residual"}
    if cfg.activation == "swiglu":
        names["w_gate_NDF"] = "normal"
    names |= {"norm_attn_ND": "ones", "norm_mlp_ND": "ones"}
    if cfg.biases:
        # A bias is named after its weight and has the weight's output dimensions.
        outputs = {"q": "NHK", "k": "NGK", "v": "NGK", "o": "ND", "w_in": "NF", "w_gate": "NF", "w_out": "ND"}
        if cfg.norm == "layernorm":
            outputs |= {"norm_attn": "ND", "norm_mlp": "ND"}
        stems = [name.rsplit("_", 1)[0] for name in names]
        names |= {f"{stem}_bias_{outputs[stem]}": "zeros" for stem in stems if stem in outputs}
    return names


def norm(x_BLD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, cfg: ModelConfig) -> jax.Array:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over D, in float32."""
    x = x_BLD.astype(jnp.float32)
    if cfg.norm == "layernorm":
        x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + cfg.norm_epsilon) * scale_D
    return (x if bias_D is None else x + bias_D).astype(x_BLD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """einsum(equation, x, w), whose weight gradient is x^T g where jax's own is (g^T x)^T.

    The two are equal, but for the second XLA on a CPU writes g out transposed, by a loop over single numbers that
    takes longer than the product: an MLP's forward and backward pass in half the time.
    """
    return jnp.einsum(equation, x, w)


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
) -> tuple[jax.Array, Cache | None]:
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)). `p` is one layer: names without N.

    With a cache (k_BMGK, v_BMGK), the new keys and values are written at their positions and attended with the rest.
    """
    keys = (None, None, None) if key is None else jax.random.split(key, 3)
    h_BLD = norm(x_BLD, p["norm_attn_D"], p.get("norm_attn_bias_D"), cfg)
    q_BLHK = project(h_BLD, p, "q", "BLD,DHK->BLHK")
    k_BLGK = project(h_BLD, p, "k", "BLD,DGK->BLGK")
    v_BLGK = project(h_BLD, p, "v", "BLD,DGK->BLGK")
    if cfg.positions == "rope":
        q_BLHK, k_BLGK = (rotate(t, positions_BL, cfg.rope_theta) for t in (q_BLHK, k_BLGK))
    if cache is not None:
        cache = {
            "k_BMGK": write_rows(cache["k_BMGK"], k_BLGK, positions_BL[:, 0]),
            "v_BMGK": write_rows(cache["v_BMGK"], v_BLGK, positions_BL[:, 0]),
        }
        k_BMGK, v_BMGK = (c.astype(x_BLD.dtype) for c in cache.values())
    else:
        k_BMGK, v_BMGK = k_BLGK, v_BLGK
    a_BLHK = attend(q_BLHK, k_BMGK, v_BMGK, sight, scale=cfg.head_size**-0.5, dropout_rate=cfg.dropout, key=keys[0])
    x_BLD = x_BLD + dropout(project(a_BLHK, p, "o", "BLHK,HKD->BLD"), cfg.dropout, keys[1])

    h_BLD = norm(x_BLD, p["norm_mlp_D"], p.get("norm_mlp_bias_D"), cfg)
    h_BLF = project(h_BLD, p, "w_in", "BLD,DF->BLF")
    if cfg.activation == "swiglu":
        h_BLF = jax.nn.silu(project(h_BLD, p, "w_gate", "BLD,DF->BLF")) * h_BLF
    else:
        # In float32 inside: on a CPU the bfloat16 form takes three times as long, elsewhere it is fused and free.
        h_BLF = jax.nn.gelu(h_BLF.astype(jnp.float32), approximate=True).astype(h_BLF.dtype)
    x_BLD = x_BLD + dropout(project(h_BLF, p, "w_out", "BLF,FD->BLD"), cfg.dropout, keys[2])
    # Without this line FSDP's sharded weights make XLA replicate every activation on every device.
    return constrain(x_BLD, "BLD"), cache


def write_rows(cache_BMGK: jax.Array, new_BLGK: jax.Array, start_B: jax.Array) -> jax.Array:
    """Writes each row's new entries into its slots start .. start + L - 1."""

    def row(cache_MGK, new_LGK, start):
        return jax.lax.dynamic_update_slice(cache_MGK, new_LGK.astype(cache_MGK.dtype), (start, 0, 0))

    return jax.vmap(row)(cache_BMGK, new_BLGK, start_B)


def empty_cache(cfg: ModelConfig, rows: int, slots: int, dtype: Any) -> Cache:
    """A key-value cache for `rows` sequences of at most `slots` tokens: k_NBMGK and v_NBMGK."""
    shape = (cfg.num_layers, rows, slots, cfg.num_kv_heads, cfg.head_size)
    return {"k_NBMGK": jnp.zeros(shape, dtype), "v_NBMGK": jnp.zeros(shape, dtype)}


def _unstacked(tree: Params) -> Params:
    """The names of stacked leaves as one layer calls them: q_NDHK is q_DHK inside the scan."""
    return {name.replace("_N", "_", 1) if suffix(name).startswith("N") else name: x for name, x in tree.items()}


REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda f: f,
    # The scan already keeps the compiler from merging the recomputation with the forward pass.
    "full": functools.partial(jax.checkpoint, prevent_cse=False),
    "dots": functools.partial(
        jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


class Decoder(nn.Module):
    """A decoder-only transformer: token ids in, hidden states (and the head that turns them into logits) out."""

    cfg: ModelConfig
    vocab_size: int
    context: int

    def setup(self):
        cfg, size = self.cfg, dims(self.cfg, self.vocab_size, self.context)
        normal = nn.initializers.normal(cfg.init_std)
        starts = {
            "normal": normal,
            # GPT-2: the 2 N branches that add to the residual stream keep its variance at that of one.
            "residual": nn.initializers.normal(cfg.init_std / (2 * cfg.num_layers) ** 0.5),
            "ones": nn.initializers.ones,
            "zeros": nn.initializers.zeros,
        }

        def make(key: jax.Array, names: dict[str, str]) -> Params:
            keys = jax.random.split(key, len(names))
            shapes = {name: tuple(size[letter] for letter in suffix(name)) for name in names}
            return {n: starts[s](k, shapes[n], jnp.float32) for (n, s), k in zip(names.items(), keys, strict=True)}

        top = {"embed_VD": "normal", "norm_final_D": "ones"}
        top |= {"norm_final_bias_D": "zeros"} if cfg.biases and cfg.norm == "layernorm" else {}
        top |= {"position_TD": "normal"} if cfg.positions == "learned" else {}
        top |= {} if cfg.tied else {"head_VD": "normal"}
        self.top = {name: self.param(name, lambda key, n=name: make(key, {n: top[n]})[n]) for name in top}
        self.layers = self.param("layers", lambda key: make(key, layer_params(cfg)))

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array | None = None,
        *,
        cache: Cache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states x_BLD after the final norm, and the cache with the new tokens in it.

        Training gives segments_BL (documents of a packed row; 0 is padding), decoding a cache from `empty_cache`, whose
        slots are positions: each row's tokens are written at positions_BL[:, 0] onward. A key turns dropout on.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        x_BLD = self.top["embed_VD"].astype(dtype)[tokens_BL]
        if cfg.positions == "learned":
            x_BLD = x_BLD + self.top["position_TD"].astype(dtype)[positions_BL]
        if cache is not None:
            sight = cached(positions_BL)
        else:
            assert segments_BL is not None, "without a cache, segments say which positions see each other"
            sight = causal(segments_BL)

        layer_keys = None
        if key is not None and cfg.dropout:
            key_embed, key_layers = jax.random.split(key)
            x_BLD = dropout(x_BLD, cfg.dropout, key_embed)
            layer_keys = jax.random.split(key_layers, cfg.num_layers)

        def body(x_BLD, layer):
            p, layer_cache, layer_key = layer
            return block(cfg, p, x_BLD, positions_BL, sight, layer_cache, layer_key)

        layers = (_unstacked(self.layers), cache and _unstacked(cache), layer_keys)
        x_BLD, new = jax.lax.scan(REMAT[cfg.remat](body), x_BLD, layers, unroll=cfg.unroll or cfg.num_layers)
        x_BLD = norm(x_BLD, self.top["norm_final_D"], self.top.get("norm_final_bias_D"), cfg)
        return x_BLD, new and {"k_NBMGK": new["k_BMGK"], "v_NBMGK": new["v_BMGK"]}

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """float32 logits_BLV of hidden states; the ids that pad the vocabulary are masked out."""
        return logits(x_BLD, self.top["embed_VD" if self.cfg.tied else "head_VD"], self.vocab_size)


def head(params: Params) -> jax.Array:
    """head_VD: the output matrix, which is the embedding where the two are tied."""
    return params["head_VD"] if "head_VD" in params else params["embed_VD"]


def make_decoder(config: TrainConfig) -> Decoder:
    """The decoder of a run: its vocabulary is the tokenizer's and its context the length of the rows."""
    return Decoder(config.model, vocab_size=config.tokenizer.vocab_size, context=config.data.length)


def init_params(decoder: Decoder) -> Callable[[jax.Array], Params]:
    """Builds init(key) -> params."""
    one = jnp.zeros((1, 1), jnp.int32)
    return lambda key: dict(decoder.init(key, one, one, one)["params"])
