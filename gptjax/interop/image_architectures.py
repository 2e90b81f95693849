"""The config.json of architectures that read images: an encoder of SigLIP's or CLIP's shape in front of a decoder.

Read and written by pairs of functions around those of the text. A value that changes the logits and has no counterpart
is refused by name; a missing one is what transformers takes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from gptjax.config import ModelConfig, VisionConfig
from gptjax.interop.architectures import Sizes
from gptjax.interop.foreign import ForeignConfig

# What a nested config leaves out where it is its class's own value.
TEXT = {"llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "vocab_size": 32000, "max_position_embeddings": 2048}}  # fmt: skip
_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "image_size": 224, "num_channels": 3}  # fmt: skip
SIGLIP = _BASE | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
CLIP = _BASE | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
IDEFICS3 = SIGLIP | {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}
OWN = "gptjax_images"  # of exports: how an image becomes a square, and the ids around it, which no key of theirs says
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu", "quick_gelu": "quick_gelu"}
# Patches on a side at which transformers' float32 fractions, by which Idefics3 finds the row of its position table,
# give each place its own. At others (19, 25, 29, 31, 38, ...) two places have one row, and one has none.
EXACT_GRIDS = (*range(1, 19), *range(20, 25), 26, 27, 28, 30, *range(32, 38), 39, 42, 44, 45, 46, 48, 51, 52, 53, 56,
               57, 60, 63, 64)  # fmt: skip


def ids_with_image(cfg: ModelConfig, vocab_size: int) -> int:
    """The size of the vocabulary in files of transformers, in which an id stands for the places of images."""
    return vocab_size + (cfg.vision.patch > 0 and cfg.vision.image_id < 0)


def image_id(cfg: ModelConfig, vocab_size: int) -> int:
    """The id that stands for the places of images in files of transformers: the model's, or the first that is free."""
    return vocab_size if cfg.vision.image_id < 0 else cfg.vision.image_id


def read_idefics3(text: Callable[[ForeignConfig], Sizes], s: ForeignConfig) -> Sizes:
    """SigLIP with a norm at its end, squares of patches merged, one matrix; tokens of images are causal as text is."""
    cfg, vocab_size, context = _read_text(text, s)
    encoder = s.inner("vision_config", IDEFICS3)
    encoder.only("model_type", "idefics3_vision", "smolvlm_vision", "idefics3", "smolvlm", "siglip_vision_model", None)
    grid = encoder.size("image_size") // encoder.size("patch_size")
    if grid not in EXACT_GRIDS:
        wanted = "a number of patches on a side for which transformers gives each its own position, such as 16, 27, 32"
        raise encoder.error("image_size", encoder.values["image_size"], wanted)
    more = {"merge": s.size("scale_factor", 2), "projector": "linear", "final_norm": True}
    return _with_images(s, cfg, vocab_size, encoder, "image_token_id", 128257, more), vocab_size, context


def write_idefics3(
    text: Callable, model_type: str, architecture: str, cfg: ModelConfig, vocab_size: int, context: int
) -> dict[str, Any]:
    return _written_text(text, model_type, architecture, cfg, vocab_size, context) | {
        "image_token_id": image_id(cfg, vocab_size), "scale_factor": cfg.vision.merge,
        "vision_config": {"model_type": "idefics3_vision"} | _written_encoder(cfg),
    }  # fmt: skip


def read_llava(text: Callable[[ForeignConfig], Sizes], s: ForeignConfig) -> Sizes:
    """SigLIP, or CLIP with its class token dropped, up to a layer and without a norm behind it; two matrices."""
    cfg, vocab_size, context = _read_text(text, s)
    kind = s.inner("vision_config").only("model_type", "clip_vision_model", "siglip_vision_model")
    clip = kind == "clip_vision_model"
    defaults = CLIP | {"hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14, "image_size": 336,
                       "num_hidden_layers": 24, "num_attention_heads": 16}  # fmt: skip
    missing = s.values.get("vision_config") is None  # then LLaVA's own, not CLIP's
    encoder = s.inner("vision_config", SIGLIP if not clip else defaults if missing else CLIP)
    s.only("vision_feature_select_strategy", *(["default"] if clip else ["full"]))
    s.only("projector_hidden_act", "gelu")
    s.only("multimodal_projector_bias", True)
    count, last = encoder.size("num_hidden_layers"), s.values.get("vision_feature_layer", -2)
    layers = count + 1 + last if type(last) is int and last < 0 else last
    if type(layers) is not int or not 1 <= layers <= count:
        raise s.error("vision_feature_layer", last, f"one layer of {count}, from 1 or from -1 on")
    encoder.values["num_hidden_layers"] = layers
    more = {"projector": "mlp", "class_token": clip, "final_norm": False}
    name = "image_token_id" if "image_token_id" in s.values else "image_token_index"
    return _with_images(s, cfg, vocab_size, encoder, name, 32000, more), vocab_size, context


def write_llava(
    text: Callable, model_type: str, architecture: str, cfg: ModelConfig, vocab_size: int, context: int
) -> dict[str, Any]:
    clip = cfg.vision.class_token
    siglip = {"model_type": "siglip_vision_model", "vision_use_head": False}
    tower = {"model_type": "clip_vision_model"} if clip else siglip
    return _written_text(text, model_type, architecture, cfg, vocab_size, context) | {
        "image_token_index": image_id(cfg, vocab_size), "image_seq_length": cfg.vision.num_tokens,
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if clip else "full",
        "vision_config": tower | _written_encoder(cfg),
    }  # fmt: skip


def _read_text(text: Callable[[ForeignConfig], Sizes], s: ForeignConfig) -> Sizes:
    """The text's settings. The type is that of the whole; the head is tied where the whole or the text says so."""
    inner = s.inner("text_config", TEXT.get(s.inner("text_config").values.get("model_type", "llama"), {}))
    tied = s.only("tie_word_embeddings", False, True) or inner.only("tie_word_embeddings", False, True)
    inner.values |= {"dtype": s.dtype(), "tie_word_embeddings": tied}
    return text(inner)


def _written_text(
    text: Callable, model_type: str, architecture: str, cfg: ModelConfig, vocab_size: int, context: int
) -> dict[str, Any]:
    values = text(cfg, ids_with_image(cfg, vocab_size), context)
    head = {"model_type": model_type, "architectures": [architecture]}
    own = {"fit": cfg.vision.fit, "begin": list(cfg.vision.begin), "end": list(cfg.vision.end)}
    return {"text_config": head | values, "tie_word_embeddings": cfg.tied, OWN: own}


def _with_images(
    s: ForeignConfig, cfg: ModelConfig, vocab_size: int, encoder: ForeignConfig, id_name: str, id_default: int,
    more: dict[str, Any],
) -> ModelConfig:  # fmt: skip
    """The text's settings with those of an encoder; `more` are those that the architecture has."""
    encoder.only("num_channels", 3)
    width, patch, size = encoder.size("hidden_size"), encoder.size("patch_size"), encoder.size("image_size")
    number = s.whole(id_name, id_default)
    if number >= vocab_size:
        raise s.error(id_name, number, f"an id below text_config.vocab_size={vocab_size}")
    if patch > size:
        raise encoder.error("patch_size", patch, f"at most image_size={size}")
    own = s.inner(OWN, {"fit": "stretch", "begin": [], "end": []})
    for name in ("begin", "end"):
        if not isinstance(own.values[name], list) or any(type(i) is not int for i in own.values[name]):
            raise own.error(name, own.values[name], "a list of ids")
    vision = VisionConfig(
        patch=patch,
        side=size // patch * patch,
        margin=size % patch,
        layers=encoder.size("num_hidden_layers"),
        width=width,
        num_heads=encoder.size("num_attention_heads"),
        mlp_ratio=encoder.size("intermediate_size") / width,
        norm_epsilon=encoder.number("layer_norm_eps", 1e-6),
        activation=ACTIVATIONS[encoder.only("hidden_act", *ACTIVATIONS)],  # pyright: ignore[reportArgumentType]
        sees_all=False,
        fit=own.only("fit", "stretch", "pad", "crop"),
        begin=tuple(own.values["begin"]),
        end=tuple(own.values["end"]),
        image_id=number,
        **more,
    )
    return dataclasses.replace(cfg, vision=vision)


def _written_encoder(cfg: ModelConfig) -> dict[str, Any]:
    v = cfg.vision
    # A model without an encoder is refused, by the number of its layers.
    layers, hidden = max(1, v.layers), cfg.encoder.mlp_width if v.layers else v.width
    act = next(name for name, ours in ACTIVATIONS.items() if ours == v.activation)
    return {
        "hidden_size": v.width, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": v.num_heads, "num_channels": 3, "image_size": v.side + v.margin, "patch_size": v.patch,
        "hidden_act": act, "layer_norm_eps": v.norm_epsilon, "attention_dropout": 0.0,
    }  # fmt: skip
