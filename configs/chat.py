"""The life of an assistant after pretraining, as InstructGPT has it (Ouyang et al. 2022, appendix C).

gptjax sft chat --init RUN --data.source chats.jsonl
gptjax reward chat --init runs/chat --data.source preferences.jsonl
gptjax dpo chat --init runs/chat --data.source preferences.jsonl
gptjax grpo chat --init RUN --data.source prompts.jsonl --rewards.sources module:function
gptjax ppo chat --init runs/chat --data.source prompts.jsonl --rewards.sources runs/reward --value.init runs/reward

The learning rates are those of models of 1.3B and 6B parameters. Small models want more (2e-5 to 1e-3), and so does an
adaptation: add --lora.rank 16 --optim.learning-rate 2e-4. The checkpoint with the lowest loss on what is held out is
kept, too.
"""

from gptjax.config import (
    CheckpointConfig,
    DataConfig,
    DpoConfig,
    EvaluateConfig,
    GenerateConfig,
    GrpoConfig,
    ModelConfig,
    OptimConfig,
    PpoConfig,
    RewardConfig,
    RewardsConfig,
    RolloutConfig,
    SftConfig,
)


def sft() -> SftConfig:
    """16 epochs, a dropout of 0.2, no warm-up and a cosine to 10 %, Adam with 0.9 and 0.95; 9.65e-6 and 32 rows."""
    return SftConfig(
        run_dir="runs/chat",
        epochs=16,
        model=ModelConfig(dropout=0.2, dtype="auto"),
        data=DataConfig(source="chats.jsonl", batch_size=32, length=1024),
        optim=OptimConfig(learning_rate=9.65e-6, warmup_steps=0, final_fraction=0.1, weight_decay=0.0),
        checkpoint=CheckpointConfig(every=100, keep_best=1),
        evaluate=EvaluateConfig(every=100),
        generate=GenerateConfig(prompt=("Who are you?",), max_new_tokens=100),
    )


def reward() -> RewardConfig:
    """One epoch, 64 prompts with all their answers a step, 9e-6 with a cosine to 10 %."""
    return RewardConfig(
        run_dir="runs/reward",
        model=ModelConfig(dtype="auto"),
        data=DataConfig(source="preferences.jsonl", batch_size=64, length=1024),
        optim=OptimConfig(learning_rate=9e-6, warmup_steps=0, final_fraction=0.1, weight_decay=0.0),
        checkpoint=CheckpointConfig(every=100, keep_best=1),
        evaluate=EvaluateConfig(every=100),
    )


def dpo() -> DpoConfig:
    """beta 0.1, one epoch, 32 prompts a step, 5e-7 that falls straight to 0 (Tunstall et al. 2023, Zephyr)."""
    return DpoConfig(
        run_dir="runs/preferred",
        model=ModelConfig(dtype="auto"),
        data=DataConfig(source="preferences.jsonl", batch_size=32, length=1024),
        optim=OptimConfig(
            learning_rate=5e-7, schedule="linear", warmup_steps=10, final_fraction=0.0, beta2=0.999, weight_decay=0.0
        ),
        checkpoint=CheckpointConfig(every=100, keep_best=1),
        evaluate=EvaluateConfig(every=100),
        generate=GenerateConfig(prompt=("Who are you?",), max_new_tokens=100),
    )


def grpo() -> GrpoConfig:
    return GrpoConfig(
        run_dir="runs/rewarded",
        beta=0.05,
        model=ModelConfig(dtype="auto"),
        data=DataConfig(source="prompts.jsonl", batch_size=128, length=512),
        optim=OptimConfig(learning_rate=1e-6, schedule="constant", warmup_steps=10, weight_decay=0.0),
        rollout=RolloutConfig(answers=8, max_new_tokens=256),
        rewards=RewardsConfig(sources=("rewards:reward",)),
        checkpoint=CheckpointConfig(every=50, keep_best=1),
        evaluate=EvaluateConfig(every=50, max_rows=256),
    )


def ppo() -> PpoConfig:
    """beta 0.02, four minibatches a step, a rate that stays at 9e-6 after ten updates, averages of the weights."""
    return PpoConfig(
        run_dir="runs/ppo",
        beta=0.02,
        model=ModelConfig(dtype="auto"),
        data=DataConfig(source="prompts.jsonl", batch_size=64, length=1024),
        rollout=RolloutConfig(answers=1, minibatches=4),
        optim=OptimConfig(
            learning_rate=9e-6,
            schedule="constant",
            warmup_steps=10,
            weight_decay=0.0,
            epsilon=1e-5,
            ema=0.992,
        ),
        checkpoint=CheckpointConfig(every=50, keep_best=1),
        evaluate=EvaluateConfig(every=50, max_rows=128),
    )
