"""A family of tiny models with one dial, for scaling laws on a CPU: sizes 1 (79k parameters) to 16 (1.0M).

gptjax sweep configs/ladder.py --out runs/ladder --set data.source=FOLDER --grid 1e13:5,6,7 2e13:7,8,9

The models of Llama's kind: rotary positions, RMSNorm, SwiGLU, queries and keys normalised, a tied head. The schedule is
warm-up, stable, decay, so that one long run serves every shorter horizon (Hagele et al. 2024). Batch and learning rate
do not depend on the horizon: 1,024 tokens a step, and a peak that falls with the root of the width from 5e-3 at 48.
Muon, for with it seeds differ by 0.1 % where AdamW's differ by 1 %, and the loss is 2.6 % lower (width 48, 1.1M tokens;
2e-2 and 1e-2 were 1.6 and 0.4 % above 5e-3, 2.5e-3 was 1.3 % above).
FOLDER is a corpus made by `gptjax prepare` with a vocabulary of 1,024.
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
from gptjax.config.section import InputError

SHAPES = {  # layers and width
    1: (2, 36), 2: (2, 42), 3: (2, 48), 4: (3, 48), 5: (3, 54), 6: (3, 60), 7: (3, 66), 8: (3, 72), 9: (3, 78),
    10: (3, 84), 11: (4, 84), 12: (4, 90), 13: (4, 96), 14: (4, 102), 15: (4, 108), 16: (5, 108),
}  # fmt: skip


def pretrain(size: int = 6) -> TrainConfig:
    if size not in SHAPES:
        raise InputError(f"--size {size}: wanted 1 to {max(SHAPES)}")
    layers, width = SHAPES[size]
    return TrainConfig(
        run_dir=f"runs/ladder_{size}",
        steps=2000,
        model=ModelConfig(
            num_layers=layers, width=width, num_heads=3, positions="rope", norm="rmsnorm",
            activation="swiglu", biases=False, qk_norm=True, dtype="auto",
        ),
        tokenizer=TokenizerConfig(vocab_size=1024),
        data=DataConfig(batch_size=8, length=128, validation_fraction=0.02),
        optim=OptimConfig(
            kind="muon", learning_rate=5e-3 * (48 / width) ** 0.5, schedule="wsd", warmup_steps=50, final_fraction=0.0,
            decay_fraction=0.2,
        ),
        checkpoint=CheckpointConfig(every=500),
        evaluate=EvaluateConfig(every=500, max_rows=512),
    )  # fmt: skip
