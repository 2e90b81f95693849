"""Model families: the config.json and the tensors' names of each, in one table that imports and exports read alike.

A family that reads images is one of text with an encoder beside it: its table has the names of both, those of the
encoder's leaves behind `VISION`.

Nothing says a second time what a family can't express: it can express a decoder if reading what it writes gives that
decoder back (`obstacles`). A few settings may differ then, because they can be put into the tensors: see layout.py.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from gptjax.config import ModelConfig
from gptjax.config.section import InputError
from gptjax.interop import architectures as arch
from gptjax.interop import image_architectures as images
from gptjax.interop.architectures import Sizes
from gptjax.interop.foreign import ForeignConfig
from gptjax.model.mup import attention_scale, logits_factor

HEAD = "lm_head.weight"
VISION = "vision."  # in front of the names of leaves of the encoder, those of params["vision"]
# A family may have these where a decoder has not: tensors are filled with what changes nothing, and model.positions
# says already that there are no rotary ones.
FILLED = ("biases", "qkv_biases", "norm_weights", "rope_theta", "rope_scaling")


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
    pairs: Literal["halves", "neighbours", "swapped"] = "halves"
    """The two numbers that rotary positions turn together: i and i + K/2 as here, 2i and 2i + 1, or i + K/2 and i."""
    head: str = HEAD
    """The head's tensor."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Patterns of names that other versions of transformers give, and what they are here."""
    idle: str = "(?!)"
    """Pattern of tensors that change no logit; where it has a group, that is the number of a layer of the encoder."""
    filled: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Tensors of the encoder's width that transformers looks for and does not use, and the number in them."""

    def name(self, stored: str) -> str:
        """The name that a stored tensor has here."""
        for pattern, to in self.renamed:
            stored = re.sub(pattern, to, stored)
        return stored

    def is_idle(self, name: str, cfg: ModelConfig) -> bool:
        """True for a tensor without which the model computes the same: of layers behind the last that is read."""
        found = re.fullmatch(self.idle, name)
        return found is not None and (not found.groups() or found[1] is None or int(found[1]) >= cfg.vision.layers)

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
        if target.norm_weights == "none" and any(stem.startswith("norm") for stem in folded(cfg, target)):
            differ += ["mup_base_width"] if cfg.mup_base_width else ["attention_divisor", "logit_scale"]
        return [f"model.{name}={attrgetter(name)(cfg)!r}" for name in differ]

    def _values(self, cfg: ModelConfig, vocab_size: int, context: int) -> dict[str, Any]:
        head = {"architectures": [self.architecture], "model_type": self.model_type, "dtype": "float32"}
        return head | self.settings(cfg, vocab_size, context)


def family_of(cfg: ModelConfig, vocab_size: int, context: int) -> ModelFamily:
    """The first family that can express a decoder; raises InputError with what stands in the way of the nearest."""
    seeing = (family for (kind, _), family in IMAGE_FAMILIES.items() if kind != "smolvlm")  # Idefics3's second name
    known = seeing if cfg.vision.patch else FAMILIES.values()
    found = {family: family.obstacles(cfg, vocab_size, context) for family in known}
    for family, obstacles in found.items():
        if not obstacles:
            return family
    nearest = sorted(found, key=lambda family: len(found[family]))
    near = list({family.architecture: family for family in reversed(nearest)}.values())[::-1][:3]
    each = "; ".join(f"{family.architecture} without {' and '.join(found[family])}" for family in near)
    raise InputError(f"no architecture of transformers has all settings of this model; nearest are {each}")


def folded(cfg: ModelConfig, target: ModelConfig) -> dict[str, float]:
    """Factors of leaves, by stem, that make up for a target without this scale of attention's scores, or of logits."""
    scores, logits = attention_scale(cfg) / attention_scale(target), logits_factor(cfg) / logits_factor(target)
    query, last = "norm_q" if cfg.qk_norm else "q", "norm_final" if cfg.tied else "head"
    return {stem: factor for stem, factor in ((query, scores), (last, logits)) if factor != 1}


def _meaning(cfg: ModelConfig) -> dict[str, Any]:
    """The settings that give the logits, under the names by which a user changes them, and what each comes to."""
    scaling = (cfg.rope_scaling, cfg.rope_factor, cfg.rope_original_length)
    rotary, local = cfg.positions == "rope", any(cfg.layer_windows)
    near = cfg.rope_theta_local if local and (cfg.rope_theta_local, "none") != (cfg.rope_theta, cfg.rope_scaling) else 0
    return {
        "num_layers": cfg.num_layers, "width": cfg.width, "num_heads": cfg.num_heads,
        "queries_per_kv": cfg.queries_per_kv, "head_dim": cfg.head_size, "mlp_ratio": cfg.mlp_width,
        "embedding": cfg.embedding, "positions": cfg.positions, "norm": cfg.norm, "post_norms": cfg.post_norms,
        "activation": cfg.activation, "tied": cfg.tied, "rope_theta": rotary and cfg.rope_theta,
        "rope_theta_local": rotary and near, "rope_scaling": rotary and scaling, "window": local and cfg.window,
        "global_every": cfg.layer_windows, "qk_norm": cfg.qk_norm, "attention_softcap": cfg.attention_softcap,
        "logit_softcap": cfg.logit_softcap, "parallel": cfg.parallel, "norm_epsilon": cfg.norm_epsilon,
        "biases": cfg.biases, "qkv_biases": cfg.biases or cfg.qkv_biases, "norm_weights": cfg.norm_weights != "none",
    } | _vision_meaning(cfg)  # fmt: skip


def _vision_meaning(cfg: ModelConfig) -> dict[str, Any]:
    v = cfg.vision
    values = {"patch": v.patch, "side": v.side, "margin": v.margin, "merge": v.merge, "layers": v.layers,
              "width": v.width, "num_heads": v.num_heads, "mlp_ratio": cfg.encoder.mlp_width if v.layers else 0,
              "norm_epsilon": v.norm_epsilon, "activation": v.activation, "class_token": v.class_token,
              "final_norm": v.final_norm, "projector": v.projector, "sees_all": v.sees_all}  # fmt: skip
    return {f"vision.{name}": v.patch and value for name, value in values.items()}


# The names of tensors

LLAMA_TOP = {"embed_VD": "embed_tokens.weight", "norm_final_D": "norm.weight"}
LLAMA_LAYER = {
    "q": "layers.{n}.self_attn.q_proj", "k": "layers.{n}.self_attn.k_proj", "v": "layers.{n}.self_attn.v_proj",
    "o": "layers.{n}.self_attn.o_proj", "w_in": "layers.{n}.mlp.up_proj", "w_gate": "layers.{n}.mlp.gate_proj",
    "w_out": "layers.{n}.mlp.down_proj",
    "norm_attn": "layers.{n}.input_layernorm", "norm_mlp": "layers.{n}.post_attention_layernorm",
    "norm_q": "layers.{n}.self_attn.q_norm", "norm_k": "layers.{n}.self_attn.k_norm",
}  # fmt: skip
GEMMA_LAYER = LLAMA_LAYER | {
    "norm_attn_out": "layers.{n}.post_attention_layernorm", "norm_mlp": "layers.{n}.pre_feedforward_layernorm",
    "norm_mlp_out": "layers.{n}.post_feedforward_layernorm",
}  # fmt: skip
NANOCHAT_LAYER = LLAMA_LAYER | {"w_in": "layers.{n}.mlp.fc1", "w_out": "layers.{n}.mlp.fc2"}
GPT2_TOP = {
    "embed_VD": "wte.weight", "position_TD": "wpe.weight", "norm_final_D": "ln_f.weight",
    "norm_final_bias_D": "ln_f.bias",
}  # fmt: skip
GPT2_LAYER = {
    "q": "h.{n}.attn.c_attn", "k": "h.{n}.attn.c_attn", "v": "h.{n}.attn.c_attn", "o": "h.{n}.attn.c_proj",
    "w_in": "h.{n}.mlp.c_fc", "w_out": "h.{n}.mlp.c_proj", "norm_attn": "h.{n}.ln_1", "norm_mlp": "h.{n}.ln_2",
}  # fmt: skip


def _llama(model_type: str, architecture: str, read: Callable, settings: Callable, **more: Any) -> ModelFamily:
    names = {"prefix": "model.", "top": LLAMA_TOP, "layer": LLAMA_LAYER} | more
    return ModelFamily(model_type=model_type, architecture=architecture, read=read, settings=settings, **names)


# In the order in which an export tries them.
FAMILIES: dict[str, ModelFamily] = {
    family.model_type: family
    for family in (
        ModelFamily(model_type="gpt2", architecture="GPT2LMHeadModel", read=arch.read_gpt2, settings=arch.write_gpt2,
                    prefix="transformer.", top=GPT2_TOP, layer=GPT2_LAYER, inputs_first=True),
        _llama("llama", "LlamaForCausalLM", arch.read_llama, arch.write_llama),
        _llama("mistral", "MistralForCausalLM", arch.read_mistral, arch.write_mistral),
        _llama("qwen3", "Qwen3ForCausalLM", arch.read_qwen3, arch.write_qwen),
        _llama("qwen2", "Qwen2ForCausalLM", arch.read_qwen2, arch.write_qwen),
        _llama("nanochat", "NanoChatForCausalLM", arch.read_nanochat, arch.write_nanochat, layer=NANOCHAT_LAYER,
               pairs="swapped"),
        _llama("cohere", "CohereForCausalLM", arch.read_cohere, arch.write_cohere, pairs="neighbours"),
        _llama("gemma2", "Gemma2ForCausalLM", arch.read_gemma2, arch.write_gemma2, layer=GEMMA_LAYER),
        _llama("gemma3_text", "Gemma3ForCausalLM", arch.read_gemma3, arch.write_gemma3, layer=GEMMA_LAYER),
    )
}  # fmt: skip


ENCODER_TOP = {
    "patch_YD": "embeddings.patch_embedding.weight", "patch_bias_D": "embeddings.patch_embedding.bias",
    "place_PD": "embeddings.position_embedding.weight", "class_D": "embeddings.class_embedding",
    "norm_in_D": "pre_layrnorm.weight", "norm_in_bias_D": "pre_layrnorm.bias",
    "norm_final_D": "post_layernorm.weight", "norm_final_bias_D": "post_layernorm.bias",
}  # fmt: skip
ENCODER_LAYER = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj",
    "w_in": "mlp.fc1", "w_out": "mlp.fc2", "norm_attn": "layer_norm1", "norm_mlp": "layer_norm2",
}  # fmt: skip


def _seeing(
    text: ModelFamily, read: Callable, settings: Callable, prefix: str, encoder: str, projector: dict[str, str],
    **more: Any,
) -> ModelFamily:  # fmt: skip
    """A family of text with an encoder of images in front of it; `prefix` and `encoder` begin the names of each."""
    top = {leaf: prefix + name for leaf, name in text.top.items()} | projector
    layer = {stem: prefix + name for stem, name in text.layer.items()}
    return dataclasses.replace(
        text,
        read=functools.partial(read, text.read),
        settings=functools.partial(settings, text.settings, text.model_type, text.architecture),
        prefix="",
        top=top | {VISION + leaf: encoder + name for leaf, name in ENCODER_TOP.items()},
        layer=layer | {VISION + stem: f"{encoder}encoder.layers.{{n}}.{name}" for stem, name in ENCODER_LAYER.items()},
        **more,
    )


def _idefics3(text: ModelFamily, model_type: str, architecture: str) -> ModelFamily:
    projector = {"image_UD": "model.connector.modality_projection.proj.weight"}
    return _seeing(text, images.read_idefics3, images.write_idefics3, "model.text_model.", "model.vision_model.",
                   projector, model_type=model_type, architecture=architecture)  # fmt: skip


def _llava(text: ModelFamily) -> ModelFamily:
    """Names as the files of the hub have them; transformers 4.52 and later save them under others."""
    stem, tower = "multi_modal_projector.linear_", "vision_tower.vision_model."
    projector = {"image_in_UX": f"{stem}1.weight", "image_in_bias_X": f"{stem}1.bias",
                 "image_out_XD": f"{stem}2.weight", "image_out_bias_D": f"{stem}2.bias"}  # fmt: skip
    unused = rf"{re.escape(tower)}(?:post_layernorm\..*|head\..*|encoder\.layers\.(\d+)\..*)"
    return _seeing(
        text, images.read_llava, images.write_llava, "language_model.model.", tower, projector, model_type="llava",
        architecture="LlavaForConditionalGeneration", head=f"language_model.{HEAD}", idle=unused,
        filled={f"{tower}post_layernorm.weight": 1.0, f"{tower}post_layernorm.bias": 0.0},
        renamed=((r"^model\.language_model\.", "language_model.model."), (r"^lm_head\.", "language_model.lm_head."),
                 (r"^model\.(?=vision_tower\.|multi_modal_projector\.)", ""),
                 (r"^vision_tower\.(?!vision_model\.)", tower)),
    )  # fmt: skip


# By model_type and that of the text; in the order in which an export tries them.
IMAGE_FAMILIES: dict[tuple[str, str], ModelFamily] = {
    (family.model_type, text): family
    for text in ("llama", "mistral", "qwen3", "qwen2")
    for family in (
        _idefics3(FAMILIES[text], "idefics3", "Idefics3ForConditionalGeneration"),
        _idefics3(FAMILIES[text], "smolvlm", "SmolVLMForConditionalGeneration"),
        _llava(FAMILIES[text]),
    )
}


def read_model(s: ForeignConfig) -> tuple[ModelFamily, ModelConfig, int, int]:
    """The family of a config.json and the settings, vocabulary size and context that it names.

    Raises InputError for an unknown model_type and for values that have no counterpart here.
    """
    kind, seeing = s.values.get("model_type"), dict.fromkeys(kind for kind, _ in IMAGE_FAMILIES)
    if not isinstance(kind, str) or kind not in {*FAMILIES, *seeing}:
        raise s.error("model_type", kind, " or ".join(map(repr, (*FAMILIES, *seeing))))
    for name in ("quantization_config", "auto_map"):
        s.only(name, None)
    if kind in FAMILIES:
        return FAMILIES[kind], *FAMILIES[kind].read(s)
    text = s.inner("text_config").values.get("model_type", "llama")
    if (kind, text) not in IMAGE_FAMILIES:
        raise s.error("text_config.model_type", text, " or ".join(repr(t) for k, t in IMAGE_FAMILIES if k == kind))
    family = IMAGE_FAMILIES[kind, text]
    return family, *family.read(s)
