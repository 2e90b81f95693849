"""The decoder: GPT-2 and the Llama family as settings of one model, its key-value cache an argument and a result.

One declaration (`layer_params`, `Decoder.setup`) gives every parameter's name; the letters of the name give its shape
(`dims`) and, in sharding.py, its place on the mesh. Layers are stored stacked (N) and scanned by a pure function.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.attention import cached, causal, dropout
from gptjax.block import Cache, Params, block, norm
from gptjax.config import ModelConfig, TrainConfig
from gptjax.losses import logits
from gptjax.mup import init_factor, logits_factor
from gptjax.products import lookup
from gptjax.scaling.counts import padded_vocab
from gptjax.sharding import constrain, suffix

# A layer that attends to everything, in the list of windows: more places than any text has.
EVERYTHING = 2**31 - 1


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
    names |= {"norm_attn_ND": "ones"} | ({} if cfg.parallel else {"norm_mlp_ND": "ones"})
    if cfg.biases:
        # A bias is named after its weight and has the weight's output dimensions.
        outputs = {"q": "NHK", "k": "NGK", "v": "NGK", "o": "ND", "w_in": "NF", "w_gate": "NF", "w_out": "ND"}
        if cfg.norm == "layernorm":
            outputs |= {"norm_attn": "ND", "norm_mlp": "ND"}
        stems = [name.rsplit("_", 1)[0] for name in names]
        names |= {f"{stem}_bias_{outputs[stem]}": "zeros" for stem in stems if stem in outputs}
    return names | ({"norm_q_NK": "ones", "norm_k_NK": "ones"} if cfg.qk_norm else {})


def windows(cfg: ModelConfig) -> jax.Array | int | None:
    """window_N where the layers differ, the window that they share, or None where every layer attends to everything."""
    if len(set(cfg.layer_windows)) == 1:
        return cfg.layer_windows[0] or None
    return jnp.array([w or EVERYTHING for w in cfg.layer_windows], jnp.int32)


def empty_cache(cfg: ModelConfig, rows: int, slots: int, dtype: Any) -> Cache:
    """A key-value cache for `rows` sequences of at most `slots` tokens: k_NBMGK and v_NBMGK."""
    shape = (cfg.num_layers, rows, slots, cfg.num_kv_heads, cfg.head_size)
    return {"k_NBMGK": jnp.zeros(shape, dtype), "v_NBMGK": jnp.zeros(shape, dtype)}


def _unstacked(tree: Params) -> Params:
    """The names of stacked leaves as one layer calls them: q_NDHK is q_DHK inside the scan."""
    return {name.replace("_N", "_", 1) if suffix(name).startswith("N") else name: x for name, x in tree.items()}


def remat(cfg: ModelConfig, body: Callable) -> Callable:
    """The scanned body of a layer, with what cfg.remat says computed again in the backward pass."""
    policies = jax.checkpoint_policies
    policy = {
        "none": None,
        "full": None,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "names": policies.save_only_these_names(*cfg.remat_names),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=list(cfg.remat_names),
            offload_src="device", offload_dst="pinned_host",
        ),
    }[cfg.remat]  # fmt: skip
    # The scan already keeps the compiler from merging the recomputation with the forward pass.
    return body if cfg.remat == "none" else jax.checkpoint(body, prevent_cse=False, policy=policy)


class Decoder(nn.Module):
    """A decoder-only transformer: token ids in, hidden states (and the head that turns them into logits) out."""

    cfg: ModelConfig
    vocab_size: int
    context: int
    block: Callable = block  # one layer; another one may declare parameters of its own, see `layer_params`
    packed: bool = True  # rows may hold several documents, kept apart by segments; else these are not looked at

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
            return {
                n: starts[s](k, shapes[n], jnp.float32) * init_factor(cfg, n)
                for (n, s), k in zip(names.items(), keys, strict=True)
            }

        top = {"embed_VD": "normal", "norm_final_D": "ones"}
        top |= {"norm_final_bias_D": "zeros"} if cfg.biases and cfg.norm == "layernorm" else {}
        top |= {"position_TD": "normal"} if cfg.positions == "learned" else {}
        top |= {} if cfg.tied else {"head_VD": "normal"}
        self.top = {name: self.param(name, lambda key, n=name: make(key, {n: top[n]})[n]) for name in top}
        declared = getattr(self.block, "layer_params", layer_params)(cfg)
        self.layers = self.param("layers", lambda key: make(key, declared))

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
        x_BLD, cache, _ = self._run(tokens_BL, positions_BL, segments_BL, cache, key)
        return x_BLD, cache

    def with_norms(
        self, tokens_BL: jax.Array, positions_BL: jax.Array, segments_BL: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden states x_BLD as in training, and rms_N, the root mean square of the stream after each layer."""
        x_BLD, _, rms_N = self._run(tokens_BL, positions_BL, segments_BL, None, key, norms=True)
        return x_BLD, rms_N

    def _run(self, tokens_BL, positions_BL, segments_BL, cache, key, norms=False):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        x_BLD = lookup(self.top["embed_VD"], tokens_BL, dtype)
        if cfg.positions == "learned":
            x_BLD = x_BLD + lookup(self.top["position_TD"], positions_BL, dtype)
        if cache is not None:
            sight = cached(positions_BL)
        else:
            assert segments_BL is not None, "without a cache, segments say which positions see each other"
            sight = causal(segments_BL, self.packed)

        layer_keys = None
        if key is not None and cfg.dropout:
            key_embed, key_layers = jax.random.split(key)
            x_BLD = dropout(x_BLD, cfg.dropout, key_embed)
            layer_keys = jax.random.split(key_layers, cfg.num_layers)

        shared = windows(cfg)
        window_N = shared if isinstance(shared, jax.Array) else None

        def body(x_BLD, layer):
            p, layer_cache, layer_key, layer_window = layer
            window = shared if layer_window is None else layer_window
            x_BLD, layer_cache = self.block(cfg, p, x_BLD, positions_BL, sight, layer_cache, layer_key, window)
            # Without this line FSDP's sharded weights make XLA replicate every activation on every device.
            x_BLD = constrain(x_BLD, "BLD")
            rms = jnp.sqrt(jnp.square(x_BLD.astype(jnp.float32)).mean()) if norms else None
            return x_BLD, (layer_cache, rms)

        layers = (_unstacked(self.layers), cache and _unstacked(cache), layer_keys, window_N)
        x_BLD, (new, rms_N) = jax.lax.scan(remat(cfg, body), x_BLD, layers, unroll=cfg.unroll or cfg.num_layers)
        # muP divides the logits; here, so that every head on these states has it, whoever computes the product.
        x_BLD = logits_factor(cfg) * norm(x_BLD, self.top["norm_final_D"], self.top.get("norm_final_bias_D"), cfg)
        return x_BLD, new and {"k_NBMGK": new["k_BMGK"], "v_NBMGK": new["v_BMGK"]}, rms_N

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """float32 logits_BLV of hidden states; the ids that pad the vocabulary are masked out."""
        head_VD = self.top["embed_VD" if self.cfg.tied else "head_VD"]
        return logits(x_BLD, head_VD, self.vocab_size, self.cfg.logit_softcap)


def head(params: Params) -> jax.Array:
    """head_VD: the output matrix, which is the embedding where the two are tied."""
    return params["head_VD"] if "head_VD" in params else params["embed_VD"]


def make_decoder(config: TrainConfig, block: Callable | None = None) -> Decoder:
    """The decoder of a run: its vocabulary is the tokenizer's and its context the length of the rows.

    `block` is one layer in place of our own: a function, or a class that makes one.
    """
    several = config.data.several_documents
    decoder = Decoder(config.model, vocab_size=config.tokenizer.vocab_size, context=config.data.length, packed=several)
    return decoder if block is None else decoder.clone(block=block() if isinstance(block, type) else block)


def init_params(decoder: Decoder) -> Callable[[jax.Array], Params]:
    """Builds init(key) -> params."""
    one = jnp.zeros((1, 1), jnp.int32)
    return lambda key: dict(decoder.init(key, one, one, one)["params"])
