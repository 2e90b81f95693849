"""Fine-tune a pretrained or imported run on conversations, as InstructGPT does (Ouyang et al. 2022, appendix C.1).

gptjax sft chat --init RUN --data.source chats.jsonl

16 epochs, a dropout of 0.2, no warm-up and a cosine to 10 %, Adam with 0.9 and 0.95; 9.65e-6 and 32 rows are those of
the models of 1.3B and 6B parameters. Small models want more (2e-5 to 1e-3), and so does an adaptation: add
--lora.rank 16 --optim.learning-rate 2e-4. The checkpoint with the lowest loss on what is held out is kept, too.
"""

from gptjax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    ModelConfig,
    OptimConfig,
    SftConfig,
)


def sft() -> SftConfig:
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
