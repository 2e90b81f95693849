"""A small Llama-style model on the built-in Shakespeare, in two to five minutes on two CPU cores.

gptjax pretrain configs/quickstart.py

Its policy is then trained on a reward that a program checks: the lines of 40 tokens behind the beginning of a speech
end sentences, and none stands twice (`gptjax.align.checkable`).

gptjax grpo configs/quickstart.py
gptjax ppo configs/quickstart.py
"""

from gptjax.config import (
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    GrpoConfig,
    ModelConfig,
    OptimConfig,
    PpoConfig,
    RewardsConfig,
    RolloutConfig,
    TokenizerConfig,
    TrainConfig,
    ValueConfig,
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


def grpo() -> GrpoConfig:
    return GrpoConfig(
        run_dir="runs/quickstart_grpo",
        init="runs/quickstart",
        steps=40,
        beta=0.1,
        model=ModelConfig(dtype="auto", unroll=0),
        data=DataConfig(source="builtin:shakespeare_prompts", batch_size=128, length=64, validation_fraction=0.2),
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=5, final_fraction=0.0, weight_decay=0.0),
        rollout=RolloutConfig(answers=16, max_new_tokens=40),
        rewards=RewardsConfig(sources=("gptjax.align.checkable:closes_sentences",), unfinished="scored"),
        evaluate=EvaluateConfig(every=10),
    )


def ppo() -> PpoConfig:
    return PpoConfig(
        run_dir="runs/quickstart_ppo",
        init="runs/quickstart",
        steps=24,
        beta=0.1,
        lam=1.0,
        model=ModelConfig(dtype="auto", unroll=0),
        data=DataConfig(source="builtin:shakespeare_prompts", batch_size=128, length=64, validation_fraction=0.2),
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=5, final_fraction=0.0, weight_decay=0.0),
        rollout=RolloutConfig(answers=1, minibatches=2, max_new_tokens=40),
        value=ValueConfig(rank=0),
        rewards=RewardsConfig(sources=("gptjax.align.checkable:closes_sentences",), unfinished="scored"),
        evaluate=EvaluateConfig(every=8),
    )
