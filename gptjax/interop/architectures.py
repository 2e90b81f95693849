"""The config.json of each architecture: read as settings of the decoder, and written from them, by pairs of functions.

A value that changes the logits and has no counterpart is refused by name; a missing one is what transformers takes.
"""

from typing import Any

from gptjax.config import ModelConfig
from gptjax.interop.foreign import ForeignConfig
from gptjax.interop.rotary import read_rope, read_ropes, write_rope, write_ropes
from gptjax.model.mup import logits_factor

Sizes = tuple[ModelConfig, int, int]  # with the vocabulary's size and the context


# GPT-2


def read_gpt2(s: ForeignConfig) -> Sizes:
    s.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    s.only("scale_attn_weights", True)
    s.only("scale_attn_by_inverse_layer_idx", False)
    s.only("add_cross_attention", False)
    width = s.size("n_embd")
    cfg = ModelConfig(
        num_layers=s.size("n_layer"),
        width=width,
        num_heads=s.size("n_head"),
        mlp_ratio=s.size("n_inner", 4 * width) / width,
        tied=s.only("tie_word_embeddings", True, False),
        norm_epsilon=s.number("layer_norm_epsilon", 1e-5),
        init_std=s.number("initializer_range", 0.02),
        dtype=s.dtype(),
    )
    return cfg, s.size("vocab_size"), s.size("n_positions")


def write_gpt2(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
    return {
        "activation_function": "gelu_new", "n_embd": cfg.width, "n_layer": cfg.num_layers, "n_head": cfg.num_heads,
        "n_inner": cfg.mlp_width, "n_positions": context, "vocab_size": vocab_size, "tie_word_embeddings": cfg.tied,
        "layer_norm_epsilon": cfg.norm_epsilon, "initializer_range": cfg.init_std,
        "resid_pdrop": cfg.dropout, "embd_pdrop": cfg.dropout, "attn_pdrop": cfg.dropout,
    }  # fmt: skip


# Llama and those that followed it


def _read_like_llama(s: ForeignConfig, **more: Any) -> Sizes:
    """The settings that all of these have in common; `more` are the settings of one, in place of Llama's."""
    width, heads = s.size("hidden_size"), s.size("num_attention_heads")
    kv_heads = s.size("num_key_value_heads")
    if heads % kv_heads:
        raise s.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    head_dim = s.size("head_dim", width // heads)
    settings: dict[str, Any] = {
        "num_layers": s.size("num_hidden_layers"),
        "width": width,
        "num_heads": heads,
        "queries_per_kv": heads // kv_heads,
        "head_dim": 0 if width == heads * head_dim else head_dim,
        "mlp_ratio": s.size("intermediate_size") / width,
        "positions": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "biases": False,
        "init_std": s.number("initializer_range", 0.02),
        "dtype": s.dtype(),
    }
    if "activation" not in more:
        s.only("hidden_act", "silu", "swish")
    if "tied" not in more:
        settings["tied"] = s.only("tie_word_embeddings", False, True)
    if "norm_epsilon" not in more:
        settings["norm_epsilon"] = s.number("rms_norm_eps", 1e-6)
    if "rope_theta" not in more:
        settings |= read_rope(s)
    return ModelConfig(**settings | more), s.size("vocab_size"), s.size("max_position_embeddings")


def _write_like_llama(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
    return {
        "hidden_size": cfg.width, "num_hidden_layers": cfg.num_layers, "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads, "head_dim": cfg.head_size, "intermediate_size": cfg.mlp_width,
        "hidden_act": "silu", "max_position_embeddings": context, "vocab_size": vocab_size,
        "tie_word_embeddings": cfg.tied, "rms_norm_eps": cfg.norm_epsilon, "initializer_range": cfg.init_std,
    } | write_rope(cfg)  # fmt: skip


def read_llama(s: ForeignConfig) -> Sizes:
    s.default("num_key_value_heads", s.size("num_attention_heads"))
    biases = s.only("attention_bias", False, True)
    if s.only("mlp_bias", False, True) != biases:
        raise s.error("mlp_bias", not biases, f"the same as attention_bias={biases}")
    return _read_like_llama(s, biases=biases)


def write_llama(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
    biases = {"attention_bias": cfg.biases, "mlp_bias": cfg.biases}
    return _write_like_llama(cfg, vocab_size, context) | biases


def read_mistral(s: ForeignConfig) -> Sizes:
    """Llama with a sliding window in every layer; a missing key is not null in transformers, but 4096."""
    s.only("layer_types", None)
    return _read_like_llama(s, window=0 if s.stated("sliding_window") is None else s.size("sliding_window"))


def write_mistral(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
    return _write_like_llama(cfg, vocab_size, context) | {"sliding_window": cfg.window or None}


def read_qwen2(s: ForeignConfig) -> Sizes:
    """Llama with biases of queries, keys and values, and windows from a layer on, or where layer_types has them."""
    return _read_like_llama(s, qkv_biases=True, **_read_qwen_windows(s))


def read_qwen3(s: ForeignConfig) -> Sizes:
    """Qwen 2 with queries and keys normalised in place of the biases, and heads whose size is stated."""
    s.only("attention_bias", False)
    s.size("head_dim")
    return _read_like_llama(s, qk_norm=True, **_read_qwen_windows(s))


def _read_qwen_windows(s: ForeignConfig) -> dict[str, Any]:
    if not s.only("use_sliding_window", False, True):
        s.only("layer_types", None, [FULL] * s.size("num_hidden_layers"))
        return {}
    first, layers = s.whole("max_window_layers", 28), s.size("num_hidden_layers")
    return _read_windows(s, [SLIDING if n >= first else FULL for n in range(layers)])


def write_qwen(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
    local = any(cfg.layer_windows)
    windows = {"use_sliding_window": local, "max_window_layers": 0 if local else cfg.num_layers}
    return _write_like_llama(cfg, vocab_size, context) | _write_windows(cfg) | windows


FULL, SLIDING = "full_attention", "sliding_attention"


def _read_windows(s: ForeignConfig, types: list[str]) -> dict[str, Any]:
    """Settings of sliding windows: layer_types, or these types where it is missing."""
    layers = s.size("num_hidden_layers")
    types = types if s.values.get("layer_types") is None else s.values["layer_types"]
    if types == [FULL] * layers:
        return {}
    for every in range(layers + 1):
        if types == [FULL if every and n % every == 0 else SLIDING for n in range(1, layers + 1)]:
            return {"window": s.size("sliding_window"), "global_every": every}
    raise s.error("layer_types", types, f"for each layer {FULL!r} or {SLIDING!r}, {FULL!r} in every k-th one")


def _write_windows(cfg: ModelConfig) -> dict[str, Any]:
    types = [FULL if window is None else SLIDING for window in cfg.layer_windows]
    return {"layer_types": types, "sliding_window": cfg.window if SLIDING in types else None}


def read_nanochat(s: ForeignConfig) -> Sizes:
    """Norms without weights, of the embedding too, queries and keys normalised (behind the rotation), ReLU squared."""
    s.only("hidden_act", "relu2")
    s.only("attention_bias", False)
    s.default("num_key_value_heads", s.size("num_attention_heads"))
    rope = read_rope(s)
    if rope.get("rope_scaling") == "yarn":  # its temperature has no effect before a norm
        raise s.error("rope_parameters", s.values.get("rope_parameters"), "no yarn")
    softcap = s.softcap("final_logit_softcapping", 15.0)
    return _read_like_llama(
        s, embedding="normed", norm_weights="none", activation="relu2", qk_norm=True, logit_softcap=softcap, **rope
    )


def write_nanochat(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
    more = {"hidden_act": "relu2", "attention_bias": False, "final_logit_softcapping": cfg.logit_softcap or None}
    return _write_like_llama(cfg, vocab_size, context) | more


def read_cohere(s: ForeignConfig) -> Sizes:
    """Attention and MLP in parallel behind one LayerNorm without a bias, and a factor of the logits."""
    s.only("attention_bias", False)
    s.only("use_qk_norm", False)
    s.default("num_key_value_heads", s.size("num_attention_heads"))
    return _read_like_llama(
        s, parallel=True, norm="layernorm", norm_epsilon=s.number("layer_norm_eps", 1e-5),
        tied=s.only("tie_word_embeddings", True, False), logit_scale=s.number("logit_scale", 0.0625),
        **read_rope(s, 500_000.0),
    )  # fmt: skip


def write_cohere(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
    more = {"layer_norm_eps": cfg.norm_epsilon, "logit_scale": logits_factor(cfg)}
    return _write_like_llama(cfg, vocab_size, context) | more


# Gemma


def _read_gemma(s: ForeignConfig, types: list[str], **more: Any) -> Sizes:
    """Norms before and behind each branch whose weights are differences from 1, a scaled embedding, a GELU gate."""
    s.only("hidden_activation", "gelu_pytorch_tanh")
    s.only("attention_bias", False)
    s.only("use_bidirectional_attention", False, None)
    s.default("head_dim", 256)
    divisor, tied = s.number("query_pre_attn_scalar", 256), s.only("tie_word_embeddings", True, False)
    return _read_like_llama(
        s, embedding="scaled", norm_weights="offset", post_norms=True, activation="geglu", tied=tied,
        attention_divisor=0.0 if divisor == s.size("head_dim") else divisor, **_read_windows(s, types), **more,
    )  # fmt: skip


def read_gemma2(s: ForeignConfig) -> Sizes:
    types = [FULL if n % 2 else SLIDING for n in range(s.size("num_hidden_layers"))]
    attention, logits = s.softcap("attn_logit_softcapping", 50.0), s.softcap("final_logit_softcapping", 30.0)
    s.default("sliding_window", 4096)
    return _read_gemma(s, types, attention_softcap=attention, logit_softcap=logits)


def read_gemma3(s: ForeignConfig) -> Sizes:
    """Gemma 2 with queries and keys normalised and rotary positions of their own in layers with a window."""
    s.only("attn_logit_softcapping", None)  # which transformers does not apply
    every = s.size("sliding_window_pattern", 6)
    types = [SLIDING if n % every else FULL for n in range(1, s.size("num_hidden_layers") + 1)]
    s.default("sliding_window", 4096)
    rope = read_ropes(s, local=SLIDING in (s.values.get("layer_types") or types))
    return _read_gemma(s, types, qk_norm=True, logit_softcap=s.softcap("final_logit_softcapping", None), **rope)


def write_gemma2(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
    return _write_like_llama(cfg, vocab_size, context) | _write_windows(cfg) | {
        "sliding_window": cfg.window or context,  # transformers makes a mask of it even where no layer has one
        "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh", "attention_bias": False,
        "query_pre_attn_scalar": round(cfg.attention_divisor) or cfg.head_size,
        "attn_logit_softcapping": cfg.attention_softcap or None, "final_logit_softcapping": cfg.logit_softcap or None,
    }  # fmt: skip


def write_gemma3(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
    return write_gemma2(cfg, vocab_size, context) | write_ropes(cfg) | {"attn_logit_softcapping": None}
