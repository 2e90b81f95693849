"""The decoder: GPT-2, Llama, Gemma and others as settings of one model, its key-value cache an argument and a result.

Training scans over the stacked layers (`Decoder`). Decoding takes them one by one (`unstacked`), each with a cache of
its own (`extend`), so that a step reads every weight once, where it lies, and writes its tokens in place.

One declaration (`layer_params`, `Decoder.setup`) gives every parameter's name; the letters of the name give its shape
(`dims`) and, in sharding.py, its place on the mesh. Layers are stored stacked (N) and scanned by a pure function.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig, TrainConfig
from gptjax.config.section import InputError
from gptjax.model.block import NO_WINDOW, NORM_STARTS, Params, block, layer_params, norm, one_layer, remat
from gptjax.model.cache import Cache
from gptjax.model.counts import padded_vocab
from gptjax.model.mup import init_factor, logits_factor
from gptjax.model.vision import (
    Images,
    ImageTokens,
    encoder_params,
    image_sizes,
    image_tokens,
    projector_params,
)
from gptjax.ops.linear import embed
from gptjax.ops.reference import cached, causal, dropout, seen_until, tree
from gptjax.parallel.context import from_zigzag, to_zigzag
from gptjax.parallel.sharding import constrain, num_shards, suffix

# float32's softmax gives exactly 0 here, and a finite number keeps gradients finite.
MASKED = -1e30


def dims(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, int]:
    """The size of every letter that occurs in a parameter's name."""
    return {
        "V": padded_vocab(vocab_size), "T": context, "N": cfg.num_layers,
        "D": cfg.width, "F": cfg.mlp_width, "H": cfg.num_heads, "G": cfg.num_kv_heads, "K": cfg.head_size,
    }  # fmt: skip


def top_params(cfg: ModelConfig) -> dict[str, str]:
    """Every parameter outside the layers and how it starts."""
    start = NORM_STARTS.get(cfg.norm_weights)
    top = {"embed_VD": "normal"} | ({"norm_final_D": start} if start else {})
    top |= {"norm_final_bias_D": "zeros"} if cfg.biases and cfg.norm == "layernorm" else {}
    top |= {"position_TD": "normal"} if cfg.positions == "learned" else {}
    return top | ({} if cfg.tied else {"head_VD": "normal"}) | projector_params(cfg)


def unstacked(params: Params, dtype: str) -> Params:
    """The parameters as decoding reads them: each layer's in arrays of their own, in the type they are used in.

    The head is head_DV, its inputs first as in every other matrix: so a row of the stream meets it where it lies. That
    costs a second copy of the layers' weights, of the head, and of whatever changes its type, made once, never in the
    loop. Norms are computed in float32 and keep it. Parameters that are unstacked already come back as they are.
    """
    if isinstance(params["layers"], list):
        return params

    def cast(path, x):
        return x if path[-1].key.startswith("norm_") else x.astype(dtype)

    params = jax.tree_util.tree_map_with_path(cast, params)
    layers = one_layer(params["layers"])
    top = {name: x for name, x in params.items() if name not in ("layers", "head_VD")} | {"head_DV": head(params).T}
    count = len(next(iter(layers.values())))
    return top | {"layers": [{name: x[n] for name, x in layers.items()} for n in range(count)]}


def extend(
    decoder: "Decoder",
    params: Params,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    cache: list[Cache],
    image: ImageTokens | None = None,
) -> tuple[jax.Array, list[Cache]]:
    """Hidden states x_BLD of tokens that go on the rows of a cache, and the cache with them in it.

    `params` are `unstacked`. The slots of the cache are positions: each row's tokens are written at positions_BL[:, 0]
    onward. Of an image that sees itself whole all tokens come in one call.
    """
    cfg, mask = decoder.cfg, cached(positions_BL if image is None else image.last_BL)
    x_BLD = embed_tokens(cfg, params, tokens_BL, positions_BL, image)
    new: list[Cache] = []
    for p, old, window in zip(params["layers"], cache, cfg.layer_windows, strict=True):
        x_BLD, written = decoder.block(cfg, p, x_BLD, positions_BL, mask, old, None, window)
        assert written is not None, "a block that is given a cache returns one"
        x_BLD = constrain(x_BLD, "BLD")
        new.append(written)
    return final_norm(cfg, params, x_BLD), new


def embed_tokens(
    cfg: ModelConfig, top: Params, tokens_BL: jax.Array, positions_BL: jax.Array, image: ImageTokens | None = None
) -> jax.Array:
    """The stream x_BLD that the first layer reads; `top` holds the parameters outside the layers."""
    if image is not None:  # whose places hold ids below 0
        tokens_BL = jnp.where(image.here_BL, 0, tokens_BL)
    x_BLD: jax.Array = embed(top["embed_VD"], tokens_BL, cfg.dtype)
    if cfg.embedding == "scaled":
        x_BLD = x_BLD * jnp.asarray(cfg.width**0.5, x_BLD.dtype)
    elif cfg.embedding == "normed":
        x_BLD = norm(x_BLD, None, None, cfg)
    if image is not None:
        x_BLD = jnp.where(image.here_BL[..., None], image.x_BLD, x_BLD)
    if cfg.positions == "rope":
        return x_BLD
    learned_BLD: jax.Array = embed(top["position_TD"], positions_BL, cfg.dtype)
    return x_BLD + learned_BLD


def final_norm(cfg: ModelConfig, top: Params, x_BLD: jax.Array) -> jax.Array:
    """The stream behind the last layer as every head reads it: normed, and divided where muP divides the logits."""
    return logits_factor(cfg) * norm(x_BLD, top.get("norm_final_D"), top.get("norm_final_bias_D"), cfg)


class Decoder(nn.Module):
    """A decoder-only transformer: token ids in, hidden states (and the head that turns them into logits) out."""

    cfg: ModelConfig
    vocab_size: int
    context: int
    block: Callable = block  # one layer; another one may declare parameters of its own, see `layer_params`
    packed: bool = True  # rows may hold several documents, kept apart by segments; else these are not looked at

    def setup(self):
        if not self.is_initializing():  # self.param would trace how each parameter starts, to compare the shapes
            params = dict(self.variables["params"])
            self.layers, self.top = params.pop("layers"), params
            return
        cfg, size = self.cfg, dims(self.cfg, self.vocab_size, self.context)
        if cfg.vision.patch:
            size |= image_sizes(cfg)
        normal = nn.initializers.normal(cfg.init_std)
        starts = {
            "normal": normal,
            # GPT-2: the 2 N branches that add to the residual stream keep its variance at that of one.
            "residual": nn.initializers.normal(cfg.init_std / (2 * cfg.num_layers) ** 0.5),
            "ones": nn.initializers.ones,
            "zeros": nn.initializers.zeros,
        }

        def make(key: jax.Array, names: dict[str, str], size: dict[str, int] = size) -> Params:
            keys = jax.random.split(key, len(names))
            shapes = {name: tuple(size[letter] for letter in suffix(name)) for name in names}
            return {
                n: starts[s](k, shapes[n], jnp.float32) * init_factor(cfg, n)
                for (n, s), k in zip(names.items(), keys, strict=True)
            }

        def encoder(key: jax.Array) -> Params:
            keys, (outside, inside) = jax.random.split(key), encoder_params(cfg)
            own = image_sizes(cfg) | dims(cfg.encoder, 0, 0)
            return make(keys[0], outside, own) | {"layers": make(keys[1], inside, own)}

        top = top_params(cfg)
        made = {name: self.param(name, lambda key, n=name: make(key, {n: top[n]})[n]) for name in top}
        self.top = made | ({"vision": self.param("vision", encoder)} if cfg.vision.patch and cfg.vision.layers else {})
        declared = getattr(self.block, "layer_params", layer_params)(cfg)
        for name in declared:
            if not suffix(name).startswith("N") or not set(suffix(name)) <= size.keys():
                known = ", ".join(f"{letter}={n}" for letter, n in size.items())
                raise InputError(
                    f"model.block: its parameter {name!r} ends in the letters {suffix(name)!r}; wanted N first, for "
                    f"the layers, and then one a dimension, of {known}"
                )
        self.layers = self.param("layers", lambda key: make(key, declared))

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array | None = None,
        *,
        until_BL: jax.Array | None = None,
        cache: list[Cache] | None = None,
        key: jax.Array | None = None,
        images: Images | None = None,
    ) -> tuple[jax.Array, list[Cache] | None]:
        """Hidden states x_BLD after the final norm, and the cache with the new tokens in it.

        Training gives segments_BL (documents of a packed row; 0 is padding) and may give a key, which turns dropout on;
        decoding a cache from `empty_cache`: see `extend`, which a loop calls itself, with parameters unstacked once.
        Rows that hold a `tree` of texts have until_BL in place of segments.
        """
        image = None if images is None else image_tokens(self.cfg, self.top, images)
        if cache is not None:
            params = unstacked({**self.top, "layers": self.layers}, self.cfg.dtype)
            return extend(self, params, tokens_BL, positions_BL, cache, image)
        assert (segments_BL is None) != (until_BL is None), "without a cache, one of them says who sees whom"
        return self._run(tokens_BL, positions_BL, segments_BL, key, until_BL=until_BL, image=image)[0], None

    def with_norms(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array | None,
        *,
        until_BL: jax.Array | None = None,
        key: jax.Array | None = None,
        images: Images | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden states x_BLD as in training, and rms_N, the root mean square of the stream after each layer."""
        image = None if images is None else image_tokens(self.cfg, self.top, images)
        return self._run(tokens_BL, positions_BL, segments_BL, key, norms=True, until_BL=until_BL, image=image)

    def _run(self, tokens_BL, positions_BL, segments_BL, key, norms=False, until_BL=None, image=None):
        # A block of the user's own may look at its neighbours, so only ours is given rows in another order.
        own = self.block is block and until_BL is None and image is None
        cfg, shards = self.cfg, num_shards(tokens_BL.shape[1]) if own else 1
        if shards > 1:
            tokens_BL, positions_BL, segments_BL = (
                to_zigzag(x, shards) for x in (tokens_BL, positions_BL, segments_BL)
            )
        mask = causal(segments_BL, self.packed, shards) if until_BL is None else tree(until_BL)
        if image is not None:
            mask = seen_until(mask, image.last_BL)
        x_BLD = embed_tokens(cfg, self.top, tokens_BL, positions_BL, image)
        layer_keys = None
        if key is not None and cfg.dropout:
            key_embed, key_layers = jax.random.split(key)
            x_BLD = dropout(x_BLD, cfg.dropout, key_embed)
            layer_keys = jax.random.split(key_layers, cfg.num_layers)

        # One window that all layers share is known to the compiler; the layers of a scan differ in arrays alone.
        layer_windows = cfg.layer_windows
        differ = len(set(layer_windows)) > 1
        window_N = jnp.array([NO_WINDOW if w is None else w for w in layer_windows], jnp.int32) if differ else None

        def body(x_BLD, layer):
            p, layer_key, layer_window = layer
            window = layer_windows[0] if layer_window is None else layer_window
            x_BLD, _ = self.block(cfg, p, x_BLD, positions_BL, mask, None, layer_key, window)
            # Without this line FSDP's sharded weights make XLA replicate every activation on every device.
            x_BLD = constrain(x_BLD, "BLD")
            rms: Any = jnp.sqrt(jnp.square(x_BLD.astype(jnp.float32)).mean()) if norms else None
            return x_BLD, rms

        layers = (one_layer(self.layers), layer_keys, window_N)
        x_BLD, rms_N = jax.lax.scan(
            body if cfg.remat == "none" else remat(cfg, body), x_BLD, layers, unroll=cfg.unroll or cfg.num_layers
        )
        x_BLD = x_BLD if shards == 1 else from_zigzag(x_BLD, shards)
        return final_norm(cfg, self.top, x_BLD), rms_N

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """float32 logits_BLV of hidden states; the ids that pad the vocabulary are masked out."""
        return logits(x_BLD, head(self.top), self.vocab_size, self.cfg.logit_softcap)


def hidden_states(
    decoder: Decoder, params: Params, batch: dict[str, jax.Array], *, key: jax.Array | None = None, **more: Any
) -> Any:
    """The result of the decoder, or of its `method`, for a batch of training rows.

    inputs_BL and positions_BL hold the tokens; until_BL or else segments_BL say who sees whom (see `ops.reference`);
    `Images` are there where the rows hold any.
    """
    until_BL = batch.get("until_BL")
    segments_BL = batch["segments_BL"] if until_BL is None else None
    tokens = batch["inputs_BL"], batch["positions_BL"], segments_BL
    images = Images(*(batch[name] for name in Images._fields)) if "patches_BIPY" in batch else None
    return decoder.apply({"params": params}, *tokens, until_BL=until_BL, key=key, images=images, **more)


def head(params: Params) -> jax.Array:
    """head_VD: the output matrix, which is the embedding where the two are tied."""
    return params["head_VD"] if "head_VD" in params else params["embed_VD"]


def logits(x_BLD: jax.Array, head_VD: jax.Array, vocab_size: int, softcap: float = 0.0) -> jax.Array:
    """float32 logits_BLV of hidden states: see `cap_and_mask`."""
    return cap_and_mask(jnp.einsum("BLD,VD->BLV", x_BLD, head_VD.astype(x_BLD.dtype)), vocab_size, softcap)


def cap_and_mask(logits_BLV: jax.Array, vocab_size: int, softcap: float = 0.0) -> jax.Array:
    """float32 logits_BLV of a head's product; the ids that only pad the vocabulary are masked out.

    With a soft-cap c above 0 each logit z becomes c tanh(z / c) (Gemma 2, 2024).
    """
    logits_BLV = constrain(logits_BLV.astype(jnp.float32), "BLV")
    if softcap:
        logits_BLV = softcap * jnp.tanh(logits_BLV / softcap)
    if vocab_size < logits_BLV.shape[-1]:
        logits_BLV = jnp.where(jnp.arange(logits_BLV.shape[-1]) < vocab_size, logits_BLV, MASKED)
    return logits_BLV


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
