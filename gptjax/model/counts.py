"""Parameters and FLOPs of the decoder and its encoder of images, counted from settings alone: nothing is built.

XLA's own FLOP count sees the body of a scan over layers once, so it is of no use here.
"""

from gptjax.config import ModelConfig, TrainConfig

VOCAB_MULTIPLE = 64  # the decoder pads its vocabulary up to a multiple of this


def padded_vocab(vocab_size: int) -> int:
    """Rows of the embedding as stored: the vocabulary rounded up to a multiple of 64."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def parameters(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, int]:
    """Parameters of each part of the decoder, for a vocabulary of `vocab_size` and rows of `context` tokens.

    `embed`, `positions`, `attention`, `mlp`, `norms`, `head`, and for images `vision` (the encoder) and
    `image_projector` add up to `total`. `embedding` is what is looked up (tokens and positions), `non_embedding` is the
    rest, and `matrices` are the weights that a token of text is multiplied by: the layers' matrices and the head, which
    for a tied model is the embedding used a second time. The vocabulary is counted as given, not as stored
    (`padded_vocab`).
    """
    d, f, layers = cfg.width, cfg.mlp_width, cfg.num_layers
    heads, kv_heads = cfg.num_heads * cfg.head_size, cfg.num_kv_heads * cfg.head_size

    attention = 2 * d * heads + 2 * d * kv_heads
    mlp = (3 if cfg.gated else 2) * d * f
    matrices = layers * (attention + mlp) + d * vocab_size
    if cfg.biases:
        attention += heads + 2 * kv_heads + d
        mlp += (2 if cfg.gated else 1) * f + d
    elif cfg.qkv_biases:
        attention += heads + 2 * kv_heads
    weights = cfg.norm_weights != "none"
    norm = d * (weights + (cfg.biases and cfg.norm == "layernorm"))
    norms = (1 if cfg.parallel else 2) + (2 if cfg.post_norms else 0)

    parts = {
        "embed": vocab_size * d,
        "positions": context * d if cfg.positions == "learned" else 0,
        "attention": layers * attention,
        "mlp": layers * mlp,
        "norms": (norms * layers + 1) * norm + (2 * layers * cfg.head_size if cfg.qk_norm and weights else 0),
        "head": 0 if cfg.tied else d * vocab_size,
        **_image_parameters(cfg),
    }
    total, embedding = sum(parts.values()), parts["embed"] + parts["positions"]
    return parts | {
        "total": total,
        "embedding": embedding,
        "non_embedding": total - embedding,
        "matrices": matrices,
    }


def _image_parameters(cfg: ModelConfig) -> dict[str, int]:
    """Parameters of the encoder of images (`vision`), and between it and the decoder (`image_projector`)."""
    v, d = cfg.vision, cfg.width
    vision = projector = 0
    if v.patch and v.layers:
        # The norm behind its layers is counted with them; a class token has a norm before them, and no patches' bias.
        outside = v.patch_size + (3 if v.class_token else 1) - (0 if v.final_norm else 2)
        vision = parameters(cfg.encoder, 0, v.num_places)["total"] + outside * v.width
    if v.patch:
        projector = v.merged_size * d + (d + d * d + d if v.projector == "mlp" else 0)
    return {"vision": vision, "image_projector": projector}


def image_flops(cfg: ModelConfig, attention: bool = True) -> float:
    """FLOPs of the forward pass of one image, from its pixels to its tokens, in its matrix products alone.

    2 FLOPs a weight for each patch, or token behind the encoder, that it multiplies; with `attention` also the two
    products of every patch with all patches.
    """
    v, d = cfg.vision, cfg.width
    if not v.patch:
        return 0.0
    weights = v.num_tokens * (v.merged_size * d + (d * d if v.projector == "mlp" else 0))
    keys = 0
    if v.layers:
        weights += v.num_patches * v.patch_size * v.width + v.num_places * parameters(cfg.encoder, 0, 0)["matrices"]
        keys = v.layers * v.num_places if attention else 0
    return 2.0 * weights + 4.0 * v.num_places * v.width * keys


def forward_flops(cfg: ModelConfig, vocab_size: int, keys: float) -> float:
    """FLOPs of the forward pass of one token with `keys` keys before it and at it, in its matrix products alone.

    2 FLOPs a weight, and 2 K a key for each of the two products of each query head; a layer with a window attends to
    the keys within it.
    """
    return _products(
        cfg, vocab_size, sum(keys if window is None else min(window, keys) for window in cfg.layer_windows)
    )


def _products(cfg: ModelConfig, vocab_size: int, keys_of_all_layers: float) -> float:
    return 2.0 * parameters(cfg, vocab_size, 0)["matrices"] + 4 * cfg.num_heads * cfg.head_size * keys_of_all_layers


def _mean_keys(window: int | None, length: int) -> float:
    """Mean over the tokens i = 1 .. length of a row of min(i, window), the keys that token i attends to."""
    seen = length if window is None else min(window, length)
    return seen - seen * (seen - 1) / (2 * length)


def flops_per_token(cfg: ModelConfig, vocab_size: int, length: int, images: float = 0) -> dict[str, float]:
    """FLOPs that training spends on a token of a row of `length` tokens, in three conventions and one of the forward.

    A row has so many `images`, whose FLOPs all of its tokens share; an image's tokens are among these.

    The backward pass costs twice the forward. `6n`: 6 FLOPs a weight, attention left out (Kaplan et al. 2020).
    `causal`: the matrix products that are needed, token i of a row attending to i keys, or to those of its window.
    `palm`: 6n and 12 H K L a layer, attention counted as if every token attended to the whole row, or to a whole window
    (Chowdhery et al. 2022, appendix B). `forward` is the forward share of `causal`.
    """
    encoded = images * image_flops(cfg) / length
    causal = _products(cfg, vocab_size, sum(_mean_keys(window, length) for window in cfg.layer_windows)) + encoded
    return {
        "6n": 3 * (forward_flops(cfg, vocab_size, 0) + images * image_flops(cfg, attention=False) / length),
        "causal": 3 * causal,
        "palm": 3 * (forward_flops(cfg, vocab_size, length) + encoded),
        "forward": causal,
    }


def token_flops(config: TrainConfig, images: float = 0) -> float:
    """FLOPs that training spends on a token of a run of these settings, by the count of what is needed ("causal").

    Its rows have so many `images`.
    """
    return flops_per_token(config.model, config.tokenizer.vocab_size, config.data.length, images)["causal"]
