"""GPT-2 124M (Radford et al. 2019) with nanoGPT's schedule: 0.5M tokens a step for 300B tokens.

gptjax pretrain configs/gpt2_124m.py --data.source FOLDER

FOLDER is a corpus made by `gptjax prepare` with 50,257 pieces. Sized for one node of eight 80 GB GPUs; on fewer
devices raise --optim.accumulate. Not yet trained to its end by us: no loss is claimed.
"""

from gptjax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)


def pretrain() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/gpt2_124m",
        steps=600_000,
        model=ModelConfig(num_layers=12, width=768, num_heads=12, dtype="bfloat16"),
        tokenizer=TokenizerConfig(vocab_size=50_257),
        data=DataConfig(batch_size=480, length=1024, validation_fraction=0.0005, cross_documents=True),
        optim=OptimConfig(learning_rate=6e-4, warmup_steps=2000, final_fraction=0.1, accumulate=5),
        checkpoint=CheckpointConfig(every=2000, keep_every=100_000),
        evaluate=EvaluateConfig(every=2000, max_rows=2400),
    )
