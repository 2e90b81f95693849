"""GPT-3 (Brown et al. 2020, table 2.1) in its eight sizes: 125m, 350m, 760m, 1.3b, 2.7b, 6.7b, 13b and 175b.

gptjax pretrain configs/gpt3.py --size 125m --data.source FOLDER

FOLDER is a corpus made by `gptjax prepare` with 50,257 token ids. Each size is laid out for so many 80 GB GPUs, for
which its step is counted to fit and to be bound by arithmetic:

    gptjax plan configs/gpt3.py --size 125m --topology h100:8
    gptjax plan configs/gpt3.py --size 350m --topology h100:8
    gptjax plan configs/gpt3.py --size 760m --topology h100:8
    gptjax plan configs/gpt3.py --size 1.3b --topology h100:8
    gptjax plan configs/gpt3.py --size 2.7b --topology h100:16
    gptjax plan configs/gpt3.py --size 6.7b --topology h100:32
    gptjax plan configs/gpt3.py --size 13b --topology h100:32
    gptjax plan configs/gpt3.py --size 175b --topology h100:512

The paper's cosine ends after 260 billion tokens and its batch grows at the start; here the cosine spans the run and the
batch is constant. Its alternating banded attention is dense here, for it gives no band width. Not yet trained to its
end by us: no loss is claimed.
"""

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
from gptjax.config.section import InputError

VOCAB, LENGTH = 50_257, 2048
TOKENS, WARMUP_TOKENS = 300e9, 375e6  # appendix B


class Size(NamedTuple):
    """A row of the paper's table, its batch in rows of LENGTH, and a layout in memory, which it does not give."""

    layers: int
    width: int
    heads: int
    head_size: int
    batch_rows: int
    learning_rate: float
    mesh: MeshConfig
    remat: Literal["none", "full", "dots"]
    accumulate: int


# Two rows contradict themselves in the paper. 1.3B lists 24 heads of 128, which together are wider than its width of
# 2,048 and would make 1.5B parameters: here they are 16. 13B lists a width of 5,140, which 40 heads of 128 do not fill:
# here it is 5,120. So every size is a GPT-2 to the programs that open what is exported.
SIZES = {
    "125m": Size(12, 768, 12, 64, 256, 6.0e-4, MeshConfig(), "none", 1),
    "350m": Size(24, 1024, 16, 64, 256, 3.0e-4, MeshConfig(), "none", 4),
    "760m": Size(24, 1536, 16, 96, 256, 2.5e-4, MeshConfig(fsdp=8), "dots", 4),
    "1.3b": Size(24, 2048, 16, 128, 512, 2.0e-4, MeshConfig(fsdp=8), "dots", 8),
    "2.7b": Size(32, 2560, 32, 80, 512, 1.6e-4, MeshConfig(fsdp=16), "dots", 2),
    "6.7b": Size(32, 4096, 32, 128, 1024, 1.2e-4, MeshConfig(fsdp=32), "dots", 4),
    "13b": Size(40, 5120, 40, 128, 1024, 1.0e-4, MeshConfig(fsdp=4, tensor=8), "full", 8),
    "175b": Size(96, 12288, 96, 128, 1536, 0.6e-4, MeshConfig(fsdp=64, tensor=8), "full", 3),
}


def pretrain(size: str = "125m") -> TrainConfig:
    if size not in SIZES:
        raise InputError(f"--size {size}: wanted one of {', '.join(SIZES)}")
    row = SIZES[size]
    tokens = row.batch_rows * LENGTH
    return TrainConfig(
        run_dir=f"runs/gpt3_{size}",
        steps=round(TOKENS / tokens),
        model=ModelConfig(
            num_layers=row.layers, width=row.width, num_heads=row.heads, head_dim=row.head_size, dtype="bfloat16",
            remat=row.remat,
        ),
        tokenizer=TokenizerConfig(vocab_size=VOCAB),
        data=DataConfig(batch_size=row.batch_rows, length=LENGTH, validation_fraction=0.0005, cross_documents=True),
        optim=OptimConfig(
            learning_rate=row.learning_rate, warmup_steps=round(WARMUP_TOKENS / tokens), final_fraction=0.1,
            accumulate=row.accumulate,
        ),
        mesh=row.mesh,
        checkpoint=CheckpointConfig(every=2000, keep_every=100_000),
        evaluate=EvaluateConfig(every=2000, max_rows=2400),
    )  # fmt: skip
