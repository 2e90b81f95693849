"""A family of modern small models with one dial, the depth: width 64 x depth, heads of 128, 20 tokens a parameter.

gptjax pretrain configs/modern.py --size 12 --data.source FOLDER --tokenizer.vocab-size 32768

In the manner of nanochat (Karpathy 2025), and as transformers' NanoChat has it: rotary positions, RMSNorm without
weights, of the embedding too, queries and keys normalised, ReLU squared, a head of its own with a soft cap; Muon, and a
trapezoid schedule. Learning rate and initial scale are those of size 4, which muP carries over to the width of every
other. FOLDER is a corpus made by `gptjax prepare`. Sizes: even numbers from 4 (a laptop) to 32, the large ones laid out
for eight 80 GB GPUs:

    gptjax plan configs/modern.py --size 12 --topology h100:8
    gptjax plan configs/modern.py --size 32 --topology h100:8

Not yet trained to its end by us: no loss is claimed.
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
from gptjax.model.counts import parameters

VOCAB, LENGTH = 32_768, 2048
TOKENS_A_PARAMETER = 20  # Hoffmann et al. 2022, Chinchilla


def pretrain(size: int = 12) -> TrainConfig:
    if size % 2 or not 4 <= size <= 32:
        raise InputError(f"--size {size}: wanted an even depth from 4 to 32")
    model = ModelConfig(
        num_layers=size, width=64 * size, num_heads=size // 2, head_dim=128, embedding="normed", positions="rope",
        norm="rmsnorm", norm_weights="none", activation="relu2", biases=False, tied=False, qk_norm=True,
        logit_softcap=15.0, rope_theta=100_000.0, mup_base_width=256, dtype="bfloat16" if size > 8 else "auto",
        remat="names", remat_names=("attention", "mlp"),
    )  # fmt: skip
    rows = 256 if size > 8 else 64
    tokens = TOKENS_A_PARAMETER * parameters(model, VOCAB, LENGTH)["total"]
    return TrainConfig(
        run_dir=f"runs/modern_{size}",
        steps=round(tokens / (rows * LENGTH)),
        model=model,
        tokenizer=TokenizerConfig(vocab_size=VOCAB),
        data=DataConfig(batch_size=rows, length=LENGTH, validation_fraction=0.001),
        optim=OptimConfig(
            kind="muon", learning_rate=2e-3, schedule="wsd", warmup_steps=100, final_fraction=0.0, decay_fraction=0.4,
            z_loss=1e-4, accumulate=2 if size > 28 else 1,
        ),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000),
        evaluate=EvaluateConfig(every=500, max_rows=512),
        log_norms_every=100,
    )  # fmt: skip
