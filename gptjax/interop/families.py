"""Model families: the meaning of a config.json and the names of tensors of each, read for import and for export alike.

`read` makes our settings of a config.json, `write` a config.json of our settings. Nothing says a second time what a
family can't express: it can express a decoder if reading what it writes gives that decoder back (`obstacles`). A few
settings may differ then, because they can be put into the tensors: see layout.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.config import ModelConfig
from gptjax.config.section import InputError
from gptjax.interop.foreign import ForeignConfig
from gptjax.interop.rotary import read_rope, write_rope

HEAD = "lm_head.weight"
# A family may have these where a decoder has not: their tensors are filled with what changes nothing.
FILLED = ("biases",)
Sizes = tuple[ModelConfig, int, int]  # with the vocabulary's size and the context


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelFamily:
    """One of transformers' architectures: how its config.json is read and written, and the names of its tensors."""

    model_type: str
    architecture: str
    read: Callable[[ForeignConfig], Sizes]
    """Our settings; raises InputError for a value that changes the logits and has no counterpart."""
    settings: Callable[[ModelConfig, int, int], dict[str, Any]]
    """The values of a config.json that `read` reads."""
    prefix: str
    """Of every tensor but the head's; files of a bare model have none."""
    top: Mapping[str, str]
    """Leaves outside the layers: the name of the tensor."""
    layer: Mapping[str, str]
    """Stems of a layer's leaves ("q" of q_NDHK and of q_bias_NHK): the name of the tensor without .weight and .bias.
    Several stems with one name lie side by side in one tensor."""
    inputs_first: bool = False
    """Matrices are stored as [in, out]; else as [out, in]."""

    def write(self, cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
        """The config.json of a decoder, for tensors of float32; raises InputError for a setting in the way."""
        found = self.obstacles(cfg, vocab_size, context)
        if found:
            raise InputError(f"{', '.join(found)}: not known to {self.architecture} of transformers")
        return self._values(cfg, vocab_size, context)

    def exported(self, cfg: ModelConfig, vocab_size: int, context: int) -> ModelConfig:
        """The settings that the written config.json is read as: those given, but for what the tensors make up for."""
        written = self._values(cfg, vocab_size, context)
        return self.read(ForeignConfig(Path(self.architecture), written))[0]

    def obstacles(self, cfg: ModelConfig, vocab_size: int, context: int) -> list[str]:
        """The settings that this family can't express, as model.name=value; none for a decoder that it can."""
        if cfg.block:
            return [f"model.block={cfg.block!r}"]
        try:
            target = self.exported(cfg, vocab_size, context)
        except InputError as error:
            return [str(error)]
        ours, theirs = _meaning(cfg), _meaning(target)
        differ = [name for name, value in ours.items() if theirs[name] != value and (value or name not in FILLED)]
        return [f"model.{name}={getattr(cfg, name)!r}" for name in differ]

    def _values(self, cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
        head = {"architectures": [self.architecture], "model_type": self.model_type, "dtype": "float32"}
        return head | self.settings(cfg, vocab_size, context)


def family_of(cfg: ModelConfig, vocab_size: int, context: int) -> ModelFamily:
    """The first family that can express a decoder; raises InputError with what stands in the way of the nearest."""
    found = {family: family.obstacles(cfg, vocab_size, context) for family in FAMILIES.values()}
    for family, obstacles in found.items():
        if not obstacles:
            return family
    near = sorted(found, key=lambda family: len(found[family]))[:3]
    each = "; ".join(f"{family.architecture} without {' and '.join(found[family])}" for family in near)
    raise InputError(f"no architecture of transformers has all settings of this model; nearest are {each}")


def _meaning(cfg: ModelConfig) -> dict[str, Any]:
    """The settings that give the logits, under the names by which a user changes them, and what each comes to."""
    rope = [cfg.rope_scaling, cfg.rope_factor, cfg.rope_original_length] if cfg.positions == "rope" else None
    return {
        "num_layers": cfg.num_layers, "width": cfg.width, "num_heads": cfg.num_heads,
        "queries_per_kv": cfg.queries_per_kv, "head_dim": cfg.head_size, "mlp_ratio": cfg.mlp_width,
        "positions": cfg.positions, "norm": cfg.norm, "activation": cfg.activation, "tied": cfg.tied,
        "rope_theta": rope and cfg.rope_theta, "rope_scaling": rope, "window": cfg.window,
        "global_every": cfg.layer_windows, "qk_norm": cfg.qk_norm, "attention_softcap": cfg.attention_softcap,
        "logit_softcap": cfg.logit_softcap, "parallel": cfg.parallel, "norm_epsilon": cfg.norm_epsilon,
        "biases": cfg.biases,
    }  # fmt: skip


# GPT-2


def _read_gpt2(s: ForeignConfig) -> Sizes:
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


def _write_gpt2(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
    return {
        "activation_function": "gelu_new", "n_embd": cfg.width, "n_layer": cfg.num_layers, "n_head": cfg.num_heads,
        "n_inner": cfg.mlp_width, "n_positions": context, "vocab_size": vocab_size, "tie_word_embeddings": cfg.tied,
        "layer_norm_epsilon": cfg.norm_epsilon, "initializer_range": cfg.init_std,
        "resid_pdrop": cfg.dropout, "embd_pdrop": cfg.dropout, "attn_pdrop": cfg.dropout,
    }  # fmt: skip


# Llama and those that followed it


def _read_like_llama(s: ForeignConfig, kv_heads: int, **more: Any) -> Sizes:
    s.only("hidden_act", "silu", "swish")
    width, heads = s.size("hidden_size"), s.size("num_attention_heads")
    if heads % kv_heads:
        raise s.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    head_dim = s.size("head_dim", width // heads)
    cfg = ModelConfig(
        num_layers=s.size("num_hidden_layers"),
        width=width,
        num_heads=heads,
        queries_per_kv=heads // kv_heads,
        head_dim=0 if width == heads * head_dim else head_dim,
        mlp_ratio=s.size("intermediate_size") / width,
        positions="rope",
        norm="rmsnorm",
        activation="swiglu",
        tied=s.only("tie_word_embeddings", False, True),
        norm_epsilon=s.number("rms_norm_eps", 1e-6),
        init_std=s.number("initializer_range", 0.02),
        dtype=s.dtype(),
        **read_rope(s),
        **more,
    )
    return cfg, s.size("vocab_size"), s.size("max_position_embeddings")


def _write_like_llama(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
    return {
        "hidden_size": cfg.width, "num_hidden_layers": cfg.num_layers, "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads, "head_dim": cfg.head_size, "intermediate_size": cfg.mlp_width,
        "hidden_act": "silu", "max_position_embeddings": context, "vocab_size": vocab_size,
        "tie_word_embeddings": cfg.tied, "rms_norm_eps": cfg.norm_epsilon, "initializer_range": cfg.init_std,
    } | write_rope(cfg)  # fmt: skip


def _read_llama(s: ForeignConfig) -> Sizes:
    biases = s.only("attention_bias", False, True)
    if s.only("mlp_bias", False, True) != biases:
        raise s.error("mlp_bias", not biases, f"the same as attention_bias={biases}")
    return _read_like_llama(s, s.size("num_key_value_heads", s.size("num_attention_heads")), biases=biases)


def _write_llama(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
    biases = {"attention_bias": cfg.biases, "mlp_bias": cfg.biases}
    return _write_like_llama(cfg, vocab_size, context) | biases


def _read_mistral(s: ForeignConfig) -> Sizes:
    """Llama with a sliding window in every layer; a missing key is not null in transformers, but 4096."""
    s.only("layer_types", None)
    window = 0 if s.stated("sliding_window") is None else s.size("sliding_window")
    return _read_like_llama(s, s.size("num_key_value_heads"), biases=False, window=window)


def _write_mistral(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
    return _write_like_llama(cfg, vocab_size, context) | {"sliding_window": cfg.window or None}


def _read_qwen3(s: ForeignConfig) -> Sizes:
    """Llama with queries and keys normalised, and heads whose size is stated."""
    s.only("attention_bias", False)
    s.only("use_sliding_window", False)
    full = ["full_attention"] * s.size("num_hidden_layers")
    s.only("layer_types", None, full)
    s.size("head_dim")
    return _read_like_llama(s, s.size("num_key_value_heads"), biases=False, qk_norm=True)


def _write_qwen3(cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
    return _write_like_llama(cfg, vocab_size, context)


LLAMA_TOP = {"embed_VD": "embed_tokens.weight", "norm_final_D": "norm.weight"}
LLAMA_LAYER = {
    "q": "layers.{n}.self_attn.q_proj", "k": "layers.{n}.self_attn.k_proj", "v": "layers.{n}.self_attn.v_proj",
    "o": "layers.{n}.self_attn.o_proj", "w_in": "layers.{n}.mlp.up_proj", "w_gate": "layers.{n}.mlp.gate_proj",
    "w_out": "layers.{n}.mlp.down_proj",
    "norm_attn": "layers.{n}.input_layernorm", "norm_mlp": "layers.{n}.post_attention_layernorm",
    "norm_q": "layers.{n}.self_attn.q_norm", "norm_k": "layers.{n}.self_attn.k_norm",
}  # fmt: skip
GPT2_TOP = {
    "embed_VD": "wte.weight", "position_TD": "wpe.weight", "norm_final_D": "ln_f.weight",
    "norm_final_bias_D": "ln_f.bias",
}  # fmt: skip
GPT2_LAYER = {
    "q": "h.{n}.attn.c_attn", "k": "h.{n}.attn.c_attn", "v": "h.{n}.attn.c_attn", "o": "h.{n}.attn.c_proj",
    "w_in": "h.{n}.mlp.c_fc", "w_out": "h.{n}.mlp.c_proj", "norm_attn": "h.{n}.ln_1", "norm_mlp": "h.{n}.ln_2",
}  # fmt: skip


def _llama(model_type: str, architecture: str, read: Callable, write: Callable, **more: Any) -> ModelFamily:
    names = {"prefix": "model.", "top": LLAMA_TOP, "layer": LLAMA_LAYER} | more
    return ModelFamily(model_type=model_type, architecture=architecture, read=read, settings=write, **names)


# In the order in which an export tries them.
FAMILIES: dict[str, ModelFamily] = {
    family.model_type: family
    for family in (
        ModelFamily(model_type="gpt2", architecture="GPT2LMHeadModel", read=_read_gpt2, settings=_write_gpt2,
               prefix="transformer.", top=GPT2_TOP, layer=GPT2_LAYER, inputs_first=True),
        _llama("llama", "LlamaForCausalLM", _read_llama, _write_llama),
        _llama("mistral", "MistralForCausalLM", _read_mistral, _write_mistral),
        _llama("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3),
    )
}  # fmt: skip


def read_model(s: ForeignConfig) -> tuple[ModelFamily, ModelConfig, int, int]:
    """The family of a config.json and the settings, vocabulary size and context that it names.

    Raises InputError for an unknown model_type and for values that have no counterpart here.
    """
    kind = s.values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise s.error("model_type", kind, " or ".join(map(repr, FAMILIES)))
    for name in ("quantization_config", "auto_map"):
        s.only(name, None)
    return FAMILIES[kind], *FAMILIES[kind].read(s)
