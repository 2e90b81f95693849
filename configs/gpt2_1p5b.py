"""GPT-2 1.5B (XL; Radford et al. 2019): 48 layers of width 1,600, 1,557,611,200 parameters.

gptjax pretrain configs/gpt2_1p5b.py --data.source FOLDER

FOLDER is a corpus made by `gptjax prepare` with 50,257 pieces. Parameters and optimizer state are sharded over eight
devices. Not yet trained to its end by us: no loss is claimed.
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
        run_dir="runs/gpt2_1p5b",
        steps=600_000,
        model=ModelConfig(num_layers=48, width=1600, num_heads=25, dtype="bfloat16", remat="full"),
        tokenizer=TokenizerConfig(vocab_size=50_257),
        data=DataConfig(batch_size=512, length=1024, validation_fraction=0.0005, cross_documents=True),
        optim=OptimConfig(learning_rate=2e-4, warmup_steps=2000, final_fraction=0.1, accumulate=4),
        mesh=MeshConfig(fsdp=8),
        checkpoint=CheckpointConfig(every=1000, keep_every=50_000),
        evaluate=EvaluateConfig(every=1000, max_rows=1024),
    )
