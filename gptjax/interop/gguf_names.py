"""The names of llama.cpp's format: keys and tensors of each architecture, against those of transformers' families."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gptjax.interop.families import FAMILIES, HEAD

# Leaves of the decoder outside the layers, and the head's: the tensor.
TOP = {
    "embed_VD": "token_embd.weight", "position_TD": "position_embd.weight", "norm_final_D": "output_norm.weight",
    "norm_final_bias_D": "output_norm.bias",
}  # fmt: skip
OUTPUT = "output.weight"
# Stems of a layer's leaves: the name behind blk.N, without .weight and .bias.
LAYER = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "w_in": "ffn_up", "w_gate": "ffn_gate",
    "w_out": "ffn_down", "norm_attn": "attn_norm", "norm_mlp": "ffn_norm", "norm_q": "attn_q_norm",
    "norm_k": "attn_k_norm", "norm_attn_out": "post_attention_norm", "norm_mlp_out": "post_ffw_norm",
}  # fmt: skip
# Keys of an architecture: the name of their value in a config.json.
LLAMA_KEYS = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta", "context_length": "max_position_embeddings",
}  # fmt: skip
GPT2_KEYS = {
    "block_count": "n_layer", "embedding_length": "n_embd", "feed_forward_length": "n_inner",
    "attention.head_count": "n_head", "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "context_length": "n_positions",
}  # fmt: skip
GEMMA_KEYS = LLAMA_KEYS | {
    "rope.freq_base_swa": "rope_local_base_freq", "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures, by its name there, and the model_type of the family whose models it holds."""

    name: str
    family: str
    keys: Mapping[str, str]
    permuted: bool = False
    """Rows of queries and keys are ordered for rotary positions that turn neighbouring rows, not two halves of them."""
    gemma_27b: int = 0
    """Of Gemma, which is not exported: the layers of the size whose scores are divided by the root of the width over
    the heads, not of a head's size, which no key says. The weights of its norms are 1 more than the family's."""

    def stored(self, name: str) -> str:
        """The name here of a tensor of the family; its own where it has none."""
        family = FAMILIES[self.family]
        top = {family.prefix + foreign: TOP[leaf] for leaf, foreign in family.top.items()} | {HEAD: OUTPUT}
        stems = {foreign: self._layer(stem) for stem, foreign in family.layer.items()}
        inner = re.fullmatch(r"(\w+)\.(\d+)\.(.+)\.(weight|bias)", name.removeprefix(family.prefix))
        if inner and (stem := stems.get(f"{inner[1]}.{{n}}.{inner[3]}")):
            return f"blk.{int(inner[2])}.{stem}.{inner[4]}"
        return top.get(name, name)

    def foreign(self, name: str) -> str:
        """The name of a tensor in the family's files; its own where it has none."""
        family = FAMILIES[self.family]
        top = {TOP[leaf]: family.prefix + foreign for leaf, foreign in family.top.items()} | {OUTPUT: HEAD}
        stems = {self._layer(stem): foreign for stem, foreign in family.layer.items()}
        inner = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)", name)
        if inner and inner[2] in stems:
            return f"{family.prefix}{stems[inner[2]].format(n=int(inner[1]))}.{inner[3]}"
        return top.get(name, name)

    def transposed(self, name: str) -> bool:
        """True for the tensors, by their names here, whose rows are columns in the family's files."""
        matrix = name.startswith("blk.") and name.endswith(".weight") and "_norm." not in name
        return FAMILIES[self.family].inputs_first and matrix

    def offset(self, name: str) -> bool:
        """True for the tensors, by their names here, that are 1 more than in the family's files."""
        return self.gemma_27b > 0 and name.endswith("_norm.weight")

    def heads(self, name: str) -> str:
        """The key with the number of heads in whose order a tensor's rows are, where they have one of their own."""
        part = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name) if self.permuted else None
        return "" if part is None else "attention.head_count" + ("_kv" if part[1] == "k" else "")

    def _layer(self, stem: str) -> str:
        side_by_side = self.name == "gpt2" and stem in ("q", "k", "v")
        return "attn_qkv" if side_by_side else LAYER[stem]


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", "llama", LLAMA_KEYS, permuted=True),
        Architecture("qwen3", "qwen3", LLAMA_KEYS),
        Architecture("qwen2", "qwen2", LLAMA_KEYS),
        Architecture("gpt2", "gpt2", GPT2_KEYS),
        Architecture("gemma2", "gemma2", GEMMA_KEYS, gemma_27b=46),
        Architecture("gemma3", "gemma3_text", GEMMA_KEYS, gemma_27b=62),
    )
}
WRITTEN = {one.family: one for one in ARCHITECTURES.values() if not one.gemma_27b}
