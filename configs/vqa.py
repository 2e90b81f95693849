"""Questions about pictures, answered by a small model that is trained from scratch on two CPU cores.

gptjax sft vqa
gptjax eval runs/vqa --tasks easy_vqa --chat
gptjax generate runs/vqa --chat --image shape.png --prompt "what color is the shape?"

easy-VQA (Zhou 2020; fetched by pip): colors and shapes, 64 x 64 pixels. Charts of bars, drawn here, are the other set:

gptjax sft vqa --size charts
gptjax eval runs/charts --tasks charts --chat

All questions about a picture stand in one row behind it, and each sees the picture and itself. The tokenizer is made
here, of the words of both sets, unless runs/vqa_tokenizer is there. Muon, for with AdamW the shapes are told apart much
later (benchmarks/results/LOG.md).
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

from gptjax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    SftConfig,
    TokenizerConfig,
    VisionConfig,
)
from gptjax.config.section import InputError

FOLDER = Path("runs/vqa_tokenizer")
VOCAB = 512
SHAPES = "circle rectangle triangle shape".split()
COLORS = "red green blue gray teal black yellow brown orange purple pink".split()
FORMS = (
    "is there a {}?", "is there a {} in the image?", "is there not a {}?", "is there not a {} in the image?",
    "does the image contain a {}?", "does the image not contain a {}?", "is a {} present?", "is no {} present?",
    "what is the {}?", "what color is the {}?", "what is the color of the {}?",
)  # fmt: skip
BARS = ("is the {} bar taller than the {} bar?", "is the {} bar shorter than the {} bar?")
OTHERS = (
    "how many bars are there?", "what is the color of the tallest bar?", "what is the color of the shortest bar?",
    "what shape is present?", "what shape does the image contain?", "what shape is in the image?",
)  # fmt: skip


def questions() -> Iterator[str]:
    """Yields texts that hold the words of both sets, as the template writes them."""
    answers = itertools.cycle([*SHAPES, *COLORS, "yes", "no"])
    asked = [form.format(thing) for form in FORMS for thing in [*SHAPES, *(f"{color} shape" for color in COLORS)]]
    asked += [form.format(*pair) for form in BARS for pair in itertools.permutations(COLORS, 2)]
    asked += [f"what is the value of the {color} bar?" for color in COLORS] + [*OTHERS] * 10
    for text in asked:
        yield f"[INST] {text} [/INST]\n{next(answers)}\n"


def tokenizer() -> str:
    """The file of the tokenizer, made unless it is there."""
    path = FOLDER / "tokenizer.model"
    if not path.exists():
        from gptjax.tokenizer import train_sentencepiece

        made = train_sentencepiece(questions(), VOCAB)
        FOLDER.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made.model)
    return str(path)


SETS = {"easy": ("builtin:easy_vqa", "runs/vqa", 64), "charts": ("builtin:charts", "runs/charts", 96)}


def sft(size: str = "easy") -> SftConfig:
    if size not in SETS:
        raise InputError(f"--size {size}: wanted one of {', '.join(SETS)}")
    source, run_dir, side = SETS[size]
    return SftConfig(
        run_dir=run_dir,
        init="scratch",
        steps=1300,
        model=ModelConfig(
            num_layers=4, width=128, num_heads=4, mlp_ratio=8 / 3, positions="rope", norm="rmsnorm",
            activation="swiglu", biases=False, dtype="auto", unroll=0,
            vision=VisionConfig(patch=8, side=side, merge=2, layers=2, width=128, num_heads=4),
        ),
        tokenizer=TokenizerConfig(path=tokenizer(), vocab_size=VOCAB, template="mistral-v0"),
        data=DataConfig(source=source, batch_size=16, length=256, validation_fraction=0.02),
        optim=OptimConfig(kind="muon", learning_rate=5e-3, warmup_steps=50, final_fraction=0.0),
        checkpoint=CheckpointConfig(every=250),
        evaluate=EvaluateConfig(every=250),
    )  # fmt: skip
