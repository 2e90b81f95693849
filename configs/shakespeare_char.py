"""nanoGPT's character-level Shakespeare at its CPU size, on bytes: GPT-2 without biases, 0.8M parameters.

gptjax pretrain configs/shakespeare_char.py

benchmarks/shakespeare_char_torch.py trains the same recipe in torch; benchmarks/results has both losses.
"""

from gptjax.config import (
    CheckpointConfig,
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
        run_dir="runs/shakespeare_char",
        steps=2000,
        model=ModelConfig(num_layers=4, width=128, num_heads=4, biases=False, dtype="auto", unroll=0),
        tokenizer=TokenizerConfig(kind="bytes", vocab_size=258),
        data=DataConfig(source="builtin:shakespeare", batch_size=12, length=64, validation_fraction=0.1),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=100, final_fraction=0.1, beta2=0.99),
        checkpoint=CheckpointConfig(every=500),
        evaluate=EvaluateConfig(every=2000),
        generate=GenerateConfig(prompt=("ROMEO.\n",), max_new_tokens=50),
    )
