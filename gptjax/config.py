"""Every setting of a run, as frozen dataclasses that are checked when they are made. Nothing here imports jax.

Each fact has one owner: the vocabulary belongs to `tokenizer.vocab_size`, the context to `data.length`, and the
model takes both from there. What can be derived is a property, never a field.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from gptjax.settings import InputError, Section, leaves

SCHEMA = 1  # version of config.json; raise it when a saved file needs translating

# What may change when a run is resumed. Everything else is frozen: changing it would make another run.
FREE = ("run_dir", "log_every", "tensorboard", "profile", "compile_cache", "mesh", "checkpoint", "evaluate", "generate",
        "model.remat", "model.unroll")  # fmt: skip
EXTENDABLE = ("steps",)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Shape of the decoder; GPT-2 and the Llama family are settings of it."""

    section: ClassVar[str] = "model"

    num_layers: int = 12
    """Transformer blocks."""
    width: int = 768
    """Size of the residual stream; a multiple of num_heads."""
    num_heads: int = 12
    """Query heads of each attention."""
    queries_per_kv: int = 1
    """Query heads that share one key-value head (grouped queries); 1 is plain multi-head attention."""
    mlp_ratio: float = 4.0
    """Width of the MLP as a multiple of the model's width."""
    positions: Literal["learned", "rope"] = "learned"
    """A learned position table (GPT-2), or rotary positions (Llama)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """LayerNorm (GPT-2) or RMSNorm (Llama), computed in float32."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """GELU in its tanh form (GPT-2), or a SiLU gate (Llama)."""
    biases: bool = True
    """Biases in every projection and norm (GPT-2)."""
    tied: bool = True
    """The output head is the embedding."""
    rope_theta: float = 10_000.0
    """Base wavelength of rotary positions."""
    norm_epsilon: float = 1e-5
    """Added to the variance under the root in each norm."""
    init_std: float = 0.02
    """Standard deviation of initial weights; divided by sqrt(2 num_layers) where a branch rejoins the stream."""
    dropout: float = 0.0
    """Chance of dropping an element of the embedding, of an attention weight and of each branch."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of activations and products; weights and optimizer stay float32."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass computes again instead of keeping: nothing, each block, or all but its matrix products."""
    unroll: int = 1
    """Layers in one step of the compiled loop over layers; 0 unrolls all (slower to compile, often faster to run)."""

    def __post_init__(self):
        self.require_positive("num_layers", "width", "num_heads", "queries_per_kv", "mlp_ratio", "rope_theta",
                              "norm_epsilon", "init_std")  # fmt: skip
        self.require(
            self.width % self.num_heads == 0,
            "width",
            f"a multiple of model.num_heads={self.num_heads}",
            f"e.g. --model.width {self.num_heads * max(1, self.width // self.num_heads)}",
        )
        grouped = self.num_heads % self.queries_per_kv == 0
        self.require(grouped, "queries_per_kv", f"a divisor of model.num_heads={self.num_heads}")
        even = self.positions != "rope" or self.head_size % 2 == 0
        self.require(even, "width", f"an even width / num_heads for rotary positions; num_heads={self.num_heads}")
        self.require(0 <= self.dropout < 1, "dropout", "a chance from 0 up to, not including, 1")
        self.require(0 <= self.unroll <= self.num_layers, "unroll", f"0 (all) or 1 to num_layers={self.num_layers}")

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads // self.queries_per_kv

    @property
    def mlp_width(self) -> int:
        return round(self.width * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Section):
    """How text becomes token ids."""

    section: ClassVar[str] = "tokenizer"

    kind: Literal["sentencepiece", "bytes"] = "sentencepiece"
    """A SentencePiece model, or the 256 bytes with no training."""
    vocab_size: int = 4096
    """Number of token ids, special tokens included; 258 for bytes."""
    path: str = ""
    """A trained SentencePiece model to use; empty: train one on the training split of data.source."""

    BYTES_VOCAB: ClassVar[int] = 258  # 256 bytes, beginning and end of document

    def __post_init__(self):
        if self.kind == "bytes":
            fits, then = self.vocab_size == self.BYTES_VOCAB, f"add --tokenizer.vocab-size {self.BYTES_VOCAB}"
            self.require(fits, "vocab_size", f"{self.BYTES_VOCAB} when tokenizer.kind is bytes", then)
            self.require(not self.path, "path", "no path when tokenizer.kind is bytes")
        # Byte fallback needs all 256 bytes and 3 special tokens in the vocabulary, and then some pieces.
        self.require(self.kind == "bytes" or self.vocab_size >= 300, "vocab_size", "at least 300 for sentencepiece")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Where the text comes from and how it is cut into rows."""

    section: ClassVar[str] = "data"

    source: str = "builtin:shakespeare"
    """A text file, a folder of texts, a .jsonl(.gz) file, a folder made by `gptjax prepare`, or builtin:shakespeare."""
    batch_size: int = 16
    """Rows a step, over all devices and accumulated micro-batches together."""
    length: int = 256
    """Tokens a row; also the context that the model is built for."""
    validation_fraction: float = 0.05
    """Share held out and never trained on: of the documents, or the tail of a single text by bytes."""
    packing: Literal["packed", "padded"] = "packed"
    """Rows filled with documents end to end, or one document (or a slice of it) a row, padded."""
    cross_documents: bool = False
    """Let attention cross from one packed document into the next."""

    def __post_init__(self):
        self.require(bool(self.source), "source", "a path or a name", "give --data.source FILE")
        self.require_positive("batch_size", "length")
        self.require(0 < self.validation_fraction < 1, "validation_fraction", "a share above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """AdamW and its schedule."""

    section: ClassVar[str] = "optim"

    learning_rate: float = 6e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After warm-up: half a cosine, or constant with a straight decay at the end (warm-up, stable, decay)."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a share of the peak."""
    decay_fraction: float = 0.2
    """Share of the steps in which wsd decays."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and the position table have none."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    accumulate: int = 1
    """Micro-batches that one step runs in turn; data.batch_size is divided by it."""

    def __post_init__(self):
        self.require_positive("learning_rate", "epsilon", "accumulate")
        self.require_numbers(0, math.inf, "warmup_steps", "weight_decay", "clip_norm")
        self.require_numbers(0, 1, "final_fraction", "decay_fraction")
        self.require(0 <= self.beta1 < 1, "beta1", "from 0 up to, not including, 1")
        self.require(0 <= self.beta2 < 1, "beta2", "from 0 up to, not including, 1")


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """How many devices lie along each axis of the mesh; one size may be -1: all that are left."""

    section: ClassVar[str] = "mesh"

    data: int = -1
    """Copies of the model, each with its own rows."""
    fsdp: int = 1
    """Devices that share parameters, optimizer state and rows."""
    tensor: int = 1
    """Devices that share heads, MLP width and vocabulary."""
    context: int = 1
    """Devices that share the length of each row."""

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            self.require(size == -1 or size >= 1, name, "a number of devices, or -1 for all that are left")
        sizes = list(dataclasses.asdict(self).values())
        self.require(sizes.count(-1) <= 1, "data", "at most one mesh size of -1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When to save, and what to keep."""

    section: ClassVar[str] = "checkpoint"

    every: int = 500
    """Steps between saves; the last step is always saved."""
    keep_newest: int = 2
    """Newest checkpoints kept; at least 1."""
    keep_every: int = 0
    """Also keep each checkpoint whose step is a multiple of this; 0: none."""
    keep_best: int = 0
    """Also keep this many of the lowest evaluation loss."""

    def __post_init__(self):
        self.require_positive("every", "keep_newest")
        self.require_numbers(0, math.inf, "keep_every", "keep_best")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Section):
    """When and on how much of the validation split to evaluate."""

    section: ClassVar[str] = "evaluate"

    every: int = 500
    """Steps between evaluations; the last step is always evaluated."""
    max_rows: int = 0
    """Rows of the validation split to use, from its start; 0: all of them."""

    def __post_init__(self):
        self.require_positive("every")
        self.require_numbers(0, math.inf, "max_rows")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Section):
    """How to continue a prompt."""

    section: ClassVar[str] = "generate"

    prompt: tuple[str, ...] = ("",)
    """Text to continue; several are decoded as one batch, and an empty one starts a new document."""
    max_new_tokens: int = 200
    """Tokens to add at the most."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Sample only from this many likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Sample only from the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Sample only from tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes every token that already occurred less likely (CTRL's penalty)."""
    stop: tuple[str, ...] = ()
    """Texts at which to stop; they are not printed."""
    seed: int = 0
    """Same seed, same text, whatever else is in the batch."""

    def __post_init__(self):
        self.require(bool(self.prompt), "prompt", "at least one prompt")
        self.require_positive("max_new_tokens", "repetition_penalty")
        self.require_numbers(0, math.inf, "temperature", "top_k")
        self.require_numbers(0, 2**32 - 1, "seed")  # jax would drop higher bits
        self.require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        self.require_numbers(0, 1, "min_p")
        self.require(all(self.stop), "stop", "texts that are not empty")


@dataclass(frozen=True, kw_only=True)
class ContinueConfig(GenerateConfig):
    """Continue prompts with a trained run."""

    section: ClassVar[str] = ""

    step: int = 0
    """Checkpoint to use; 0: the newest."""

    def __post_init__(self):
        super().__post_init__()
        self.require_numbers(0, math.inf, "step")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """Evaluate a run on its validation split."""

    step: int = 0
    """Checkpoint to use; 0: the newest."""
    max_rows: int = 0
    """Rows of the validation split to use, from its start; 0: all of them."""
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        self.require_numbers(0, math.inf, "step", "max_rows")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Section):
    """Tokenise a source into a folder that training reads at random."""

    source: str = "builtin:shakespeare"
    """A text file, a folder of texts, a .jsonl(.gz) file, or builtin:shakespeare."""
    out: str = "corpus"
    """Folder to make."""
    validation_fraction: float = 0.05
    """Share held out: of the documents, or the tail of a single text by bytes."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self):
        self.require(bool(self.source), "source", "a path or a name", "give --source FILE")
        self.require(bool(self.out), "out", "a folder to make", "give --out FOLDER")
        self.require(0 < self.validation_fraction < 1, "validation_fraction", "a share above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(Section):
    """Train a SentencePiece BPE model with byte fallback on the training part of a source."""

    source: str = "builtin:shakespeare"
    """A text file, a folder of texts, a .jsonl(.gz) file, or builtin:shakespeare."""
    out: str = "tokenizer"
    """Folder to make; its tokenizer.model is what --tokenizer.path takes."""
    vocab_size: int = 4096
    """Number of pieces, special tokens and the 256 bytes included."""
    validation_fraction: float = 0.05
    """Share that the tokenizer may not see, as in training."""


@dataclass(frozen=True, kw_only=True)
class ShowConfig(Section):
    """Show exactly what the model saw at a training step."""

    step: int = 1
    """Training step, as metrics.jsonl counts them: the first is 1."""
    rows: int = 2
    """Rows of the batch to print."""

    def __post_init__(self):
        self.require_positive("step", "rows")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Pretraining from start to end."""

    run_dir: str = "runs/unnamed"
    """Folder of the run; the same command on the same folder resumes."""
    steps: int = 1000
    """Training steps; may be raised to go on with a finished run."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and dropout."""
    log_every: int = 10
    """Steps between printed lines where there is no terminal for a progress bar; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard event files under the run folder."""
    profile: str = ""
    """Steps to trace, as FIRST:LAST (10:15); the trace goes to the run folder."""
    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that the next start is faster."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    def __post_init__(self):
        self.require(bool(self.run_dir), "run_dir", "a folder")
        self.require_positive("steps", "log_every")
        self.require_numbers(0, 2**31 - 1, "seed")
        if self.data.batch_size % self.optim.accumulate:
            rows, parts = self.data.batch_size, self.optim.accumulate
            raise InputError(
                f"data.batch_size={rows} is not divisible by optim.accumulate={parts}; "
                f"e.g. --data.batch-size {parts * max(1, rows // parts)}"
            )
        if self.profile:
            self.require(self.profile_steps != (), "profile", "FIRST:LAST with 1 <= FIRST <= LAST, e.g. 10:15")

    @property
    def profile_steps(self) -> tuple[int, int] | tuple[()]:
        """First and last step to trace; empty where `profile` is empty or malformed."""
        first, _, last = self.profile.partition(":")
        if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
            return int(first), int(last)
        return ()


def frozen_changes(old: Any, new: Any) -> list[str]:
    """Names what differs between a run's settings and new ones and may not change on resume."""
    before, may_change = dict(leaves(old)), FREE + EXTENDABLE
    return [
        f"{name} was {before[name]!r}, got {value!r}"
        for name, value in leaves(new)
        if value != before[name] and not any(name == f or name.startswith(f"{f}.") for f in may_change)
    ]
