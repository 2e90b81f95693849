"""A Llama-style model of the shape of Llama 3.2 1B: 16 layers of width 2,048, 32 heads on 8 key-value heads.

gptjax pretrain configs/llama_1b.py --data.source FOLDER --tokenizer.vocab-size N

With its 128,256 token ids it has 1,235,814,400 parameters. FOLDER is a corpus made by `gptjax prepare`. Laid out for
eight 80 GB GPUs or, with another mesh, sixteen TPU v5e chips, where four micro-batches are what fits:

    gptjax plan configs/llama_1b.py --topology h100:8
    gptjax plan configs/llama_1b.py --topology v5e:4x4 --mesh.fsdp 16

Not yet trained to its end by us: no loss is claimed.
"""

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


def pretrain() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/llama_1b",
        steps=50_000,
        model=ModelConfig(
            num_layers=16, width=2048, num_heads=32, queries_per_kv=4, mlp_ratio=4.0, positions="rope", norm="rmsnorm",
            activation="swiglu", biases=False, rope_theta=500_000.0, dtype="bfloat16", remat="dots",
        ),
        tokenizer=TokenizerConfig(vocab_size=128_256),
        data=DataConfig(batch_size=256, length=2048, validation_fraction=0.0005),
        optim=OptimConfig(learning_rate=4e-4, schedule="wsd", warmup_steps=1000, final_fraction=0.0, accumulate=4),
        mesh=MeshConfig(fsdp=8),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000),
        evaluate=EvaluateConfig(every=1000, max_rows=1024),
    )  # fmt: skip
