"""A Llama-style model of the shape of Llama 3 8B: 32 layers of width 4,096, 32 heads on 8 key-value heads.

gptjax pretrain configs/llama_8b.py --data.source FOLDER --tokenizer.vocab-size N

With its 128,256 token ids it has 8,030,261,248 parameters. FOLDER is a corpus made by `gptjax prepare`. Laid out for 32
devices, 80 GB GPUs or TPU v5p chips:

    gptjax plan configs/llama_8b.py --topology h100:32
    gptjax plan configs/llama_8b.py --topology v5p:2x4x4

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
        run_dir="runs/llama_8b",
        steps=250_000,
        model=ModelConfig(
            num_layers=32, width=4096, num_heads=32, queries_per_kv=4, mlp_ratio=3.5, positions="rope", norm="rmsnorm",
            activation="swiglu", biases=False, tied=False, rope_theta=500_000.0, dtype="bfloat16", remat="full",
        ),
        tokenizer=TokenizerConfig(vocab_size=128_256),
        data=DataConfig(batch_size=512, length=8192, validation_fraction=0.0005),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000, final_fraction=0.1, accumulate=4),
        mesh=MeshConfig(fsdp=32),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000),
        evaluate=EvaluateConfig(every=1000, max_rows=1024),
    )  # fmt: skip
