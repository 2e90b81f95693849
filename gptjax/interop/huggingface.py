"""Import of GPT-2, Llama, Mistral and Qwen3 weights in Hugging Face's safetensors layout.

Settings that change the logits and have no counterpart in ModelConfig are refused by name, as are tensors that are
missing, left over, or of another shape. Only numbers are read: no pickle, no code that comes with a model.
"""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.config.section import InputError
from gptjax.model.decoder import Decoder
from gptjax.parallel.sharding import suffix
from gptjax.tokenizer import Tokenizer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

# The source of each leaf: outside the layers by name; in layer n by the stem of the name ("q" of q_NDHK and of
# q_bias_NHK), with .weight or .bias added. Files of a bare model without a head have no prefix.
LLAMA_LAYER = {
    "q": "layers.{n}.self_attn.q_proj", "k": "layers.{n}.self_attn.k_proj", "v": "layers.{n}.self_attn.v_proj",
    "o": "layers.{n}.self_attn.o_proj", "w_in": "layers.{n}.mlp.up_proj", "w_gate": "layers.{n}.mlp.gate_proj",
    "w_out": "layers.{n}.mlp.down_proj",
    "norm_attn": "layers.{n}.input_layernorm", "norm_mlp": "layers.{n}.post_attention_layernorm",
    "norm_q": "layers.{n}.self_attn.q_norm", "norm_k": "layers.{n}.self_attn.k_norm",
}  # fmt: skip
LLAMA_TOP = {"embed_VD": "embed_tokens.weight", "norm_final_D": "norm.weight"}
LLAMAS = ("llama", "mistral", "qwen3")
PREFIX = {"gpt2": "transformer.", **dict.fromkeys(LLAMAS, "model.")}
TOP = {
    "gpt2": {"embed_VD": "wte.weight", "position_TD": "wpe.weight",
             "norm_final_D": "ln_f.weight", "norm_final_bias_D": "ln_f.bias"},
    **dict.fromkeys(LLAMAS, LLAMA_TOP),
}  # fmt: skip
LAYER = {
    "gpt2": {"q": "h.{n}.attn.c_attn", "k": "h.{n}.attn.c_attn", "v": "h.{n}.attn.c_attn", "o": "h.{n}.attn.c_proj",
             "w_in": "h.{n}.mlp.c_fc", "w_out": "h.{n}.mlp.c_proj",
             "norm_attn": "h.{n}.ln_1", "norm_mlp": "h.{n}.ln_2"},
    **dict.fromkeys(LLAMAS, LLAMA_LAYER),
}  # fmt: skip
HEAD = "lm_head.weight"

# Constants that older versions of transformers saved beside the weights.
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def import_huggingface(source: Path) -> tuple[ModelConfig, int, int, dict[str, Any]]:
    """The model's shape, vocabulary size, context and parameters: float32 NumPy, the vocabulary padded with zeros.

    `source` is a folder with config.json and model.safetensors, or shards with model.safetensors.index.json. The model
    computes in bfloat16 where config.json names that type, else in float32. Its dropout, which belongs to training and
    not to the weights, is 0. Raises InputError where anything is missing, left over, or can't be expressed.
    """
    source = Path(source)
    if not (source / CONFIG).is_file():
        get = "" if source.exists() else f"; download one with: hf download {source} --local-dir {source.name}"
        raise InputError(f"{source} holds no {CONFIG}; wanted a Hugging Face folder with {CONFIG} and {WEIGHTS}{get}")
    settings = ForeignConfig(source / CONFIG, _read_json(source / CONFIG))
    with contextlib.ExitStack() as stack:
        return assemble(settings, functools.partial(Tensors, source, stack))


def assemble(settings: "ForeignConfig", tensors: Callable[[], Any]) -> tuple[ModelConfig, int, int, dict[str, Any]]:
    """A model of these settings and of the tensors, opened once the settings are known to be supported."""
    kind = settings.values.get("model_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise settings.error("model_type", kind, " or ".join(map(repr, READERS)))
    for name in ("quantization_config", "auto_map"):
        settings.only(name, None)
    cfg, vocab_size, context = READERS[kind](settings)
    return cfg, vocab_size, context, _params(tensors(), kind, Decoder(cfg, vocab_size, context))


def set_conventions(tokenizer: Tokenizer, source: Path) -> None:
    """Sets if prompts begin with the tokenizer's first token, and the ids beside its last one that end a text.

    From add_bos_token of tokenizer_config.json and eos_token_id of generation_config.json, where these are.
    """
    named, ends = (
        _read_json(source / name) if (source / name).is_file() else {}
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    tokenizer.begins = named.get("add_bos_token") is not False
    ids = ends.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    tokenizer.stop_ids = tuple(
        i for i in dict.fromkeys(ids) if type(i) is int and 0 <= i < tokenizer.vocab_size and i != tokenizer.eos_id
    )


class ForeignConfig:
    """A config.json whose values are checked as they are read; a missing value is its default."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = ""):
        self.path, self.values, self.prefix = path, values, prefix

    def error(self, name: str, value: Any, wanted: str) -> InputError:
        return InputError(f"{self.path}: {self.prefix}{name}={value!r} is not supported; wanted {wanted}")

    def stated(self, name: str) -> Any:
        """The value, which may be null but not missing."""
        if name not in self.values:
            raise InputError(f"{self.path}: {self.prefix}{name} is missing; wanted its value, or null")
        return self.values[name]

    def only(self, name: str, *allowed: Any) -> Any:
        """The value, which is one of those allowed; the first of them where it is missing."""
        value = self.values.get(name, allowed[0])
        if not any(value == a and type(value) is type(a) for a in allowed):
            raise self.error(name, value, " or ".join(map(repr, allowed)))
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise self.error(name, value, "a whole number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number above 0."""
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(name, value, "a number above 0")
        return float(value)


def _gpt2(s: ForeignConfig) -> tuple[ModelConfig, int, int]:
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
        dtype=_dtype(s),
    )
    return cfg, s.size("vocab_size"), s.size("n_positions")


def _llama(s: ForeignConfig) -> tuple[ModelConfig, int, int]:
    biases = s.only("attention_bias", False, True)
    if s.only("mlp_bias", False, True) != biases:
        raise s.error("mlp_bias", not biases, f"the same as attention_bias={biases}")
    return _llama_like(s, s.size("num_key_value_heads", s.size("num_attention_heads")), biases=biases)


def _mistral(s: ForeignConfig) -> tuple[ModelConfig, int, int]:
    """Llama with a sliding window in every layer; a missing key is not null in transformers, but 4096."""
    s.only("layer_types", None)
    window = 0 if s.stated("sliding_window") is None else s.size("sliding_window")
    return _llama_like(s, s.size("num_key_value_heads"), biases=False, window=window)


def _qwen3(s: ForeignConfig) -> tuple[ModelConfig, int, int]:
    """Llama with queries and keys normalised, and heads whose size is stated."""
    s.only("attention_bias", False)
    s.only("use_sliding_window", False)
    full = ["full_attention"] * s.size("num_hidden_layers")
    s.only("layer_types", None, full)
    s.size("head_dim")
    return _llama_like(s, s.size("num_key_value_heads"), biases=False, qk_norm=True)


def _llama_like(s: ForeignConfig, kv_heads: int, **more: Any) -> tuple[ModelConfig, int, int]:
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
        dtype=_dtype(s),
        **_rope(s),
        **more,
    )
    return cfg, s.size("vocab_size"), s.size("max_position_embeddings")


READERS = {"gpt2": _gpt2, "llama": _llama, "mistral": _mistral, "qwen3": _qwen3}

# The kinds of rotary positions: their required keys, and the keys that may only have one value (or be missing).
ORIGINAL = "original_max_position_embeddings"
ROPE_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", ORIGINAL),
}
ROPE_FIXED = {
    "default": {},
    "linear": {},
    "llama3": {"low_freq_factor": 1, "high_freq_factor": 4},
    "yarn": {"beta_fast": 32, "beta_slow": 1, "truncate": True,
             "attention_factor": None, "mscale": None, "mscale_all_dim": None},
}  # fmt: skip


def _rope(s: ForeignConfig) -> dict[str, Any]:
    """Settings of rotary positions: the base, which newer files hold in rope_parameters, and its scaling."""
    theta = s.number("rope_theta", 10_000.0)
    s.only("partial_rotary_factor", 1.0, 1, None)
    s.only(ORIGINAL, None)
    name = "rope_parameters" if s.values.get("rope_scaling") is None else "rope_scaling"
    rope = s.values.get(name)
    if rope is None:
        return {"rope_theta": theta}
    if name == "rope_scaling" and s.values.get("rope_parameters") not in (None, rope):
        raise s.error(name, rope, "null, or the same as rope_parameters")
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    if not isinstance(kind, str) or kind not in ROPE_NEEDED:
        raise s.error(name, rope, f"null, or rope_type {' or '.join(map(repr, ROPE_NEEDED))}")
    fixed = {"type": kind, "rope_type": kind, "partial_rotary_factor": 1} | ROPE_FIXED[kind]
    for key in ROPE_NEEDED[kind]:
        if rope.get(key) is None:
            raise s.error(name, rope, f"{key} in it")
    for key, value in rope.items():
        same = key in fixed and value == fixed[key] and isinstance(value, bool) == isinstance(fixed[key], bool)
        if value is not None and not same and key not in ("rope_theta", "factor", ORIGINAL):
            raise s.error(f"{name}.{key}", value, f"{fixed[key]!r}" if key in fixed else f"no such key for {kind!r}")
    inner = ForeignConfig(s.path, rope, f"{name}.")
    settings: dict[str, Any] = {"rope_theta": inner.number("rope_theta", theta)}
    if kind != "default":
        settings |= {"rope_scaling": kind, "rope_factor": inner.number("factor", 1.0)}
        if settings["rope_factor"] < 1:
            raise inner.error("factor", rope["factor"], "at least 1")
    if ORIGINAL in ROPE_NEEDED[kind]:
        settings["rope_original_length"] = inner.size(ORIGINAL)
    elif rope.get(ORIGINAL) is not None:
        raise inner.error(ORIGINAL, rope[ORIGINAL], f"no such key for {kind!r}")
    return settings


def _dtype(s: ForeignConfig) -> Any:
    name = "dtype" if "dtype" in s.values else "torch_dtype"
    value = s.only(name, "float32", "float16", "bfloat16", None)
    return "bfloat16" if value == "bfloat16" else "float32"


def _params(tensors: "Tensors", kind: str, decoder: Decoder) -> dict[str, Any]:
    """Every parameter that the decoder declares, read from the files; raises InputError for tensors left over."""
    ids_BL = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), ids_BL, ids_BL, ids_BL)["params"]
    prefix = PREFIX[kind] if any(name.startswith(PREFIX[kind]) for name in tensors.files) else ""
    params: dict[str, Any] = {}
    for name, leaf in shapes.items():
        if name == "layers":
            params[name] = {inner: _layers(tensors, kind, prefix, inner, x.shape, decoder) for inner, x in leaf.items()}
            continue
        rows = decoder.vocab_size if suffix(name).startswith("V") else leaf.shape[0]
        source = HEAD if name == "head_VD" else prefix + TOP[kind][name]
        params[name] = np.zeros(leaf.shape, np.float32)
        params[name][:rows] = tensors.take(source, (rows, *leaf.shape[1:]))
    if decoder.cfg.tied and HEAD in tensors.files:
        embed_VD = params["embed_VD"][: decoder.vocab_size]
        if not np.array_equal(tensors.take(HEAD, embed_VD.shape), embed_VD):
            raise InputError(f"{tensors.folder}: tie_word_embeddings is true, but {HEAD} differs from the embedding")
    left = sorted(n for n in tensors.files if n not in tensors.taken and not n.endswith(CONSTANTS))
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise InputError(
            f"{tensors.folder}: no place for tensor {', '.join(left[:3])}{more}; wanted a plain {kind} model"
        )
    return params


def _layers(
    tensors: "Tensors", kind: str, prefix: str, name: str, shape: tuple[int, ...], decoder: Decoder
) -> np.ndarray:
    """One stacked leaf. GPT-2 stores matrices as [in, out] with q, k and v side by side, the others as [out, in]."""
    letters = suffix(name)[1:]
    stem = name.removesuffix(f"_N{letters}")
    part = "bias" if stem.endswith("_bias") else "weight"
    stem = stem.removesuffix("_bias")
    source = f"{prefix}{LAYER[kind][stem]}.{part}"
    if part == "bias" or stem.startswith("norm_"):
        flat = (math.prod(shape[1:]),)
    else:
        # Matrices into the stream end in its D, all others begin with it.
        split = len(shape) - 1 if letters.endswith("D") else 2
        flat = (math.prod(shape[1:split]), math.prod(shape[split:]))
    fused = source.endswith(f"c_attn.{part}")
    stored = (*flat[:-1], 3 * flat[-1]) if fused else flat if kind == "gpt2" else flat[::-1]
    stacked = np.empty(shape, np.float32)
    for n in range(decoder.cfg.num_layers):
        x = tensors.take(source.format(n=n), stored)
        if fused:
            x = np.split(x, 3, axis=-1)["qkv".index(stem)]
        stacked[n] = (x if kind == "gpt2" else x.T).reshape(shape[1:])
    return stacked


class Tensors:
    """The tensors of a folder, read one by one, so that memory never holds a second copy of the model."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise InputError(f"reading {WEIGHTS} needs a package more: pip install 'gptjax[hf]'") from None
        self.folder = folder
        self.taken: set[str] = set()
        self.files: dict[str, Any] = {}
        for name in _weight_files(folder):
            try:
                file = stack.enter_context(safe_open(folder / name, framework="numpy"))
            except (OSError, SafetensorError) as error:
                raise InputError(f"{folder / name} can't be read ({error}); download it again") from None
            for tensor in file.keys():
                if tensor in self.files:
                    raise InputError(f"{folder / name}: tensor {tensor} is also in another file; wanted it once")
                self.files[tensor] = file

    def take(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """The tensor as float32; raises InputError where it is missing, no float, or of another shape."""
        if name not in self.files:
            raise InputError(f"{self.folder}: tensor {name} is missing; wanted it with shape {list(shape)}")
        stored = self.files[name].get_slice(name)
        if stored.get_dtype() not in ("F32", "F16", "BF16"):
            raise InputError(f"{self.folder}: tensor {name} has type {stored.get_dtype()}; wanted F32, F16 or BF16")
        if list(stored.get_shape()) != list(shape):
            raise InputError(f"{self.folder}: tensor {name} has shape {stored.get_shape()}; wanted {list(shape)}")
        self.taken.add(name)
        return self.files[name].get_tensor(name).astype(np.float32)


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or any(not isinstance(name, str) or Path(name).name != name or not name for name in names):
            raise InputError(f"{folder / INDEX}: wanted weight_map with the name of a file beside it for each tensor")
        return sorted(set(names))
    if not (folder / WEIGHTS).is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        advice = "; pickled weights are never read, save the model as safetensors" if pickled else ""
        raise InputError(f"{folder} holds no {WEIGHTS}{advice or f'; wanted it beside {CONFIG}'}")
    return [WEIGHTS]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: wanted a JSON object, got a {type(values).__name__}")
    return values
