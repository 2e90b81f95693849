"""GPT-2 (Radford et al. 2019) in its four sizes: 124m, 355m, 774m and 1.5b (XL).

gptjax pretrain configs/gpt2.py --size 124m --data.source FOLDER

FOLDER is a corpus made by `gptjax prepare` with 50,257 token ids. Each size is laid out for one node of eight 80 GB
GPUs, for which its step is counted to fit and to be bound by arithmetic; on fewer devices raise --optim.accumulate:

    gptjax plan configs/gpt2.py --size 124m --topology h100:8
    gptjax plan configs/gpt2.py --size 355m --topology h100:8
    gptjax plan configs/gpt2.py --size 774m --topology h100:8
    gptjax plan configs/gpt2.py --size 1.5b --topology h100:8

Not yet trained to its end by us: no loss is claimed.
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

VOCAB, LENGTH = 50_257, 1024
TOKENS = 300e9


class Size(NamedTuple):
    """A row of the paper's table 2, with a batch, a learning rate and a layout in memory, which it does not give."""

    layers: int
    width: int
    heads: int
    batch_rows: int
    learning_rate: float
    mesh: MeshConfig
    remat: Literal["none", "full", "dots"]
    accumulate: int


# Half a million tokens a step as in nanoGPT, and learning rates that fall with size as in GPT-3's table.
SIZES = {
    "124m": Size(12, 768, 12, 480, 6.0e-4, MeshConfig(), "none", 5),
    "355m": Size(24, 1024, 16, 512, 3.0e-4, MeshConfig(), "none", 8),
    "774m": Size(36, 1280, 20, 512, 2.5e-4, MeshConfig(fsdp=8), "dots", 4),
    "1.5b": Size(48, 1600, 25, 512, 2.0e-4, MeshConfig(fsdp=8), "full", 4),
}


def pretrain(size: str = "124m") -> TrainConfig:
    if size not in SIZES:
        raise InputError(f"--size {size}: wanted one of {', '.join(SIZES)}")
    row = SIZES[size]
    return TrainConfig(
        run_dir=f"runs/gpt2_{size}",
        steps=int(round(TOKENS / (row.batch_rows * LENGTH), -3)),
        model=ModelConfig(
            num_layers=row.layers, width=row.width, num_heads=row.heads, dtype="bfloat16", remat=row.remat,
        ),
        tokenizer=TokenizerConfig(vocab_size=VOCAB),
        data=DataConfig(batch_size=row.batch_rows, length=LENGTH, validation_fraction=0.0005, cross_documents=True),
        optim=OptimConfig(
            learning_rate=row.learning_rate, warmup_steps=2000, final_fraction=0.1, accumulate=row.accumulate
        ),
        mesh=row.mesh,
        checkpoint=CheckpointConfig(every=2000, keep_every=100_000),
        evaluate=EvaluateConfig(every=2000, max_rows=2400),
    )  # fmt: skip
