"""What throughput.py lets compete: shapes of models, their recipes, the rows to train on, their matrix products."""

import collections
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from report import ROOT

from gptjax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TokenizerConfig, TrainConfig
from gptjax.config.command_line import parse
from gptjax.config.section import leaves
from gptjax.data.packing import Batch, MemorySplit, Spans, cut
from gptjax.model.counts import padded_vocab

TEXT = ROOT / "gptjax" / "data" / "corpora" / "shakespeare.txt"
# The lengths of documents, log-uniform, in rows: some fill several rows, others share one.
DOCUMENT_ROWS = (0.25, 4.0)
MOST_BATCHES = 16

Family = Literal["gpt2", "llama"]
Documents = Literal["crossing", "isolated"]


class Contest(NamedTuple):
    """Competitors that run the same recipe in the same type at the same time, each in turn."""

    shape: str
    family: Family
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.shape}_{self.family}_{self.dtype}"


class Shape(NamedTuple):
    """Sizes of a benchmark's models: `mlp_width` by family, and settings of the model that suit its memory."""

    layers: int
    width: int
    heads: int
    queries_per_kv: int
    mlp_width: dict[Family, int]
    vocab_size: int
    length: int
    batch_size: int
    settings: dict[str, Any]


# Vocabularies are multiples of 64, as those who look for speed pad them (GPT-2's 50,257 to 50,304): the same for all.
SHAPES = {
    "tiny": Shape(2, 64, 2, 1, {"gpt2": 256, "llama": 176}, 512, 32, 4, {}),
    "small": Shape(6, 384, 6, 1, {"gpt2": 1536, "llama": 1024}, 8192, 256, 16, {"unroll": 0}),
    "gpt2_124m": Shape(12, 768, 12, 1, {"gpt2": 3072}, 50_304, 1024, 16, {"unroll": 0, "attention": "auto"}),
    "llama_1b": Shape(16, 2048, 32, 4, {"llama": 8192}, 128_256, 2048, 8, {"remat": "dots", "attention": "auto"}),
}
SUITES = {
    "cpu": [Contest("small", family, dtype) for family in ("gpt2", "llama") for dtype in ("float32", "bfloat16")],
    "h100": [Contest("gpt2_124m", "gpt2", "bfloat16"), Contest("llama_1b", "llama", "bfloat16")],
}


def recipe(contest: Contest, batch_size: int = 0, overrides: tuple[str, ...] = ()) -> TrainConfig:
    """Our settings for a contest; `overrides` are NAME=VALUE, as on the command line of gptjax.

    Raises InputError for a setting that does not exist.
    """
    s = SHAPES[contest.shape]
    llama: dict[str, Any] = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "biases": False}
    # Wider than a recipe's start: with weights of 0.02 the layers say so little that the loss would hardly tell a wrong
    # one; so each gives about what it gets, and a fault of planted_faults.py is seen in the first steps.
    model = ModelConfig(
        init_std=0.8 / s.width**0.5,
        num_layers=s.layers, width=s.width, num_heads=s.heads, queries_per_kv=s.queries_per_kv,
        mlp_ratio=s.mlp_width[contest.family] / s.width, dtype=contest.dtype,  # pyright: ignore[reportArgumentType]
        **s.settings, **(llama if contest.family == "llama" else {}),
    )  # fmt: skip
    config = TrainConfig(
        model=model,
        tokenizer=TokenizerConfig(vocab_size=s.vocab_size),
        data=DataConfig(batch_size=batch_size or s.batch_size, length=s.length),
        # Constant from the first step, so that a competitor needs no schedule; weights as at the start of a run.
        optim=OptimConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0),
        mesh=MeshConfig(data=1),
    )
    settings = [word for setting in overrides for word in (f"--{setting}".split("=", 1))]
    return parse(config, settings, prog="throughput") if settings else config


def reference(config: TrainConfig) -> TrainConfig:
    """The recipe whose numbers are right: float32, the plain attention, the built-in block and loss."""
    remat = "none" if config.model.remat == "none" else "full"
    model = dataclasses.replace(config.model, dtype="float32", attention="plain", block="", remat=remat)
    return dataclasses.replace(config, model=model, loss="", compile_cache=False)


@functools.cache
def words(vocab_size: int) -> np.ndarray:
    """The built-in Shakespeare as ids of its words, marks and line ends by rank; the rarest share the last id."""
    text = re.findall(r"\w+|[^\w\s]|\n", TEXT.read_text(encoding="utf-8"))
    ranks = {word: i for i, (word, _) in enumerate(collections.Counter(text).most_common())}
    return np.minimum(np.array([ranks[word] for word in text], np.int32), vocab_size - 1)


def batches(config: TrainConfig, documents: Documents, count: int) -> list[Batch]:
    """`count` packed batches of real text, by the code that cuts the rows of every run; the same in each process.

    The text is cut into documents of DOCUMENT_ROWS times the length, log-uniform, and into rows end to end. Isolated,
    a row's documents are told apart; crossing, each row is one segment.
    """
    ids = words(config.tokenizer.vocab_size)
    rows, length = config.data.batch_size, config.data.length
    ids = np.resize(ids, max(len(ids), count * rows * length + 1))
    rng = np.random.default_rng(config.seed)
    low, high = (length * share for share in DOCUMENT_ROWS)
    sizes = np.exp(rng.uniform(np.log(low), np.log(high), int(len(ids) / low))).astype(np.int64)
    ends = np.cumsum(sizes)
    stream = MemorySplit.of(np.split(ids, ends[ends < len(ids)]))
    row = np.arange(rows)
    made = []
    for i in range(count):
        starts = (i * rows + row) * length
        spans = Spans(row, np.zeros_like(row), starts, np.full_like(row, length))
        made.append(cut(stream, spans, rows, length, cross_documents=documents == "crossing"))
    return made


def write_batches(path: Path, made: list[Batch]) -> None:
    stacked = {name: np.stack([batch[name] for batch in made]) for name in made[0]}
    np.savez(path, **stacked, count=np.int64(len(made)))  # pyright: ignore[reportArgumentType]


def products(config: TrainConfig) -> list[tuple[int, int, int]]:
    """(m, k, n) of every matrix product of a step that has a weight in it, forward and backward, each shape once."""
    cfg, tokens = config.model, config.data.batch_size * config.data.length
    heads, kv_heads = cfg.num_heads * cfg.head_size, cfg.num_kv_heads * cfg.head_size
    inner = [(cfg.width, heads), (cfg.width, kv_heads), (heads, cfg.width), (cfg.width, cfg.mlp_width)]
    inner += [(cfg.mlp_width, cfg.width), (cfg.width, padded_vocab(config.tokenizer.vocab_size))]
    shapes = [s for k, n in inner for s in ((tokens, k, n), (tokens, n, k), (k, tokens, n))]
    return list(dict.fromkeys(shapes))


def flat(config: TrainConfig) -> dict[str, Any]:
    """A config by dotted names, as JSON can hold it and gptjax.config.section.build reads it."""
    return dict(leaves(config))
