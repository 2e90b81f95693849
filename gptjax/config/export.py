"""Settings of `gptjax export`."""

import math
from dataclasses import dataclass
from typing import Literal

from gptjax.config.section import Section

GGUF_FILE = "model.gguf"


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Section):
    """Write a run's model as a folder that transformers opens, or as a GGUF file for llama.cpp."""

    step: int = 0
    """Checkpoint to use; 0: the newest."""
    format: Literal["huggingface", "gguf"] = "huggingface"
    """Safetensors, config.json and the tokenizer's files, or one model.gguf; either with a model card."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights. auto: float32, in which they were trained, and float16 in a GGUF file."""

    def __post_init__(self):
        self.require_numbers(0, math.inf, "step")

    @property
    def weights_dtype(self) -> str:
        """`dtype` with auto replaced."""
        return {"huggingface": "float32", "gguf": "float16"}[self.format] if self.dtype == "auto" else self.dtype
