"""Families whose sizes a paper lists: GPT-2 and GPT-3, as settings of a run."""

from typing import Literal, NamedTuple

from gptjax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)

GPT2_VOCAB = 50_257  # GPT-2's byte-level BPE, which GPT-3 uses too


class Size(NamedTuple):
    """A row of a paper's table, with the memory settings that we give it; `head_size` 0 is width / heads."""

    layers: int
    width: int
    heads: int
    head_size: int
    batch_rows: int
    learning_rate: float
    mesh: MeshConfig
    remat: Literal["none", "full", "dots"]
    accumulate: int


# Radford et al. 2019, table 2. The paper gives neither batch size nor learning rate: half a million tokens a step as in
# nanoGPT, and learning rates that fall with size as in GPT-3's table.
GPT2 = {
    "124m": Size(12, 768, 12, 0, 480, 6.0e-4, MeshConfig(), "none", 5),
    "355m": Size(24, 1024, 16, 0, 512, 3.0e-4, MeshConfig(), "none", 8),
    "774m": Size(36, 1280, 20, 0, 512, 2.5e-4, MeshConfig(fsdp=8), "dots", 4),
    "1p5b": Size(48, 1600, 25, 0, 512, 2.0e-4, MeshConfig(fsdp=8), "full", 4),
}

# Brown et al. 2020, table 2.1: layers, width, heads, head size, batch (0.5M to 3.2M tokens in rows of 2,048) and
# learning rate. Two rows contradict themselves there. 1.3B lists 24 heads of 128, which together are wider than its
# width of 2,048 and would make 1.5B parameters: the heads stay 24, of size 80. 13B lists a width of 5,140, which
# 40 heads of 128 do not fill (5,120): both are kept.
GPT3 = {
    "125m": Size(12, 768, 12, 64, 256, 6.0e-4, MeshConfig(), "none", 1),
    "350m": Size(24, 1024, 16, 64, 256, 3.0e-4, MeshConfig(), "none", 2),
    "760m": Size(24, 1536, 16, 96, 256, 2.5e-4, MeshConfig(fsdp=8), "dots", 4),
    "1p3b": Size(24, 2048, 24, 80, 512, 2.0e-4, MeshConfig(fsdp=8), "dots", 8),
    "2p7b": Size(32, 2560, 32, 80, 512, 1.6e-4, MeshConfig(fsdp=16), "dots", 8),
    "6p7b": Size(32, 4096, 32, 128, 1024, 1.2e-4, MeshConfig(fsdp=32), "dots", 8),
    "13b": Size(40, 5140, 40, 128, 1024, 1.0e-4, MeshConfig(fsdp=4, tensor=8), "full", 16),
    "175b": Size(96, 12288, 96, 128, 1600, 0.6e-4, MeshConfig(fsdp=64, tensor=8), "full", 25),
}


def gpt2(size: str) -> TrainConfig:
    """GPT-2 of a size of GPT2: rows of 1,024 tokens, 300 billion tokens, nanoGPT's schedule."""
    row = GPT2[size]
    steps = round(300e9 / (row.batch_rows * 1024), -3)
    return _train(f"gpt2_{size}", row, 1024, int(steps), warmup_steps=2000)


def gpt3(size: str) -> TrainConfig:
    """GPT-3 of a size of GPT3: rows of 2,048 tokens, 300 billion tokens, warm-up over 375 million (appendix B).

    The paper's cosine ends after 260 billion tokens and its batch grows at the start; here the cosine spans the run
    and the batch is constant. Its alternating banded attention is dense here, for it gives no band width.
    """
    row = GPT3[size]
    tokens = row.batch_rows * 2048
    return _train(f"gpt3_{size}", row, 2048, round(300e9 / tokens), warmup_steps=round(375e6 / tokens))


def _train(name: str, row: Size, length: int, steps: int, warmup_steps: int) -> TrainConfig:
    return TrainConfig(
        run_dir=f"runs/{name}",
        steps=steps,
        model=ModelConfig(
            num_layers=row.layers, width=row.width, num_heads=row.heads, head_dim=row.head_size, dtype="bfloat16",
            remat=row.remat,
        ),
        tokenizer=TokenizerConfig(vocab_size=GPT2_VOCAB),
        data=DataConfig(batch_size=row.batch_rows, length=length, validation_fraction=0.0005, cross_documents=True),
        optim=OptimConfig(learning_rate=row.learning_rate, warmup_steps=warmup_steps, final_fraction=0.1,
                          accumulate=row.accumulate),
        mesh=row.mesh,
        checkpoint=CheckpointConfig(every=2000, keep_every=100_000),
        evaluate=EvaluateConfig(every=2000, max_rows=2400),
    )  # fmt: skip
