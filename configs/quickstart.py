"""A small Llama-style model on the built-in Shakespeare, in two to five minutes on two CPU cores.

gptjax pretrain configs/quickstart.py
"""

from gptjax.config import (
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
)


def pretrain() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/quickstart",
        steps=1600,
        model=ModelConfig(
            num_layers=4, width=192, num_heads=4, mlp_ratio=8 / 3, positions="rope", norm="rmsnorm",
            activation="swiglu", biases=False, dtype="auto", unroll=0,
        ),
        tokenizer=TokenizerConfig(vocab_size=4096),
        data=DataConfig(source="builtin:shakespeare", batch_size=8, length=128, validation_fraction=0.05),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=50, final_fraction=0.0),
        evaluate=EvaluateConfig(every=400),
        generate=GenerateConfig(prompt=("ROMEO.\n",), max_new_tokens=100),
    )  # fmt: skip
