"""A tiny model that calls a calculator, trained from scratch in a few minutes on two CPU cores.

gptjax pretrain calculator
gptjax sft calculator
gptjax chat runs/calculator --tools calculator --temperature 0

Questions are sums and products of numbers of three and four digits. Pretraining reads questions, calls, results and
answers as short texts; fine-tuning has conversations, nine of ten with the calculator (the call is learned, its result
is not), the others without it, answered at once. Both are made here, into runs/calculator_data, unless they are there.
"""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path

from gptjax.config import (
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    ModelConfig,
    OptimConfig,
    SftConfig,
    TokenizerConfig,
    TrainConfig,
)

FOLDER = Path("runs/calculator_data")
FORMS = ("What is {}?", "How much is {}?", "Compute {}.", "{} =")


def question(rng: random.Random) -> tuple[str, str, str]:
    """A question, the expression that it asks for, and the value."""
    a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for digits in (rng.choice((3, 4)), rng.choice((3, 4))))
    operator = rng.choice("+*")
    value = a + b if operator == "+" else a * b
    expression = f"{a} {operator} {b}"
    return rng.choice(FORMS).format(expression), expression, str(value)


def call(expression: str) -> dict:
    function = {"name": "calculator", "arguments": json.dumps({"expression": expression})}
    return {"id": "call_0", "type": "function", "function": function}


def conversation(rng: random.Random) -> dict:
    """A record for fine-tuning, with the calculator or without."""
    from gptjax.serve.tools import open_tools

    asked, expression, value = question(rng)
    user, answer = {"role": "user", "content": asked}, {"role": "assistant", "content": f"It is {value}."}
    if rng.random() < 0.1:
        return {"messages": [user, answer]}
    called = {"role": "assistant", "content": "", "tool_calls": [call(expression)]}
    result = {"role": "tool", "tool_call_id": "call_0", "content": value}
    return {"messages": [user, called, result, answer], "tools": open_tools("calculator").specs}


def text(rng: random.Random) -> dict:
    """A record for pretraining, as the template writes it: question, call, result and answer, or results alone.

    Those have several results, each with its answer, so that most of what can be learned is to copy the digits of the
    last one (the induction of Olsson et al. 2022, among other numbers). One of 30 has the description of the
    calculator, whose words the tokenizer learns from it.
    """
    asked, expression, value = question(rng)
    if rng.random() < 0.5:
        values = [str(rng.randrange(10 ** rng.randint(2, 7), 10**8))[: rng.randint(3, 8)] for _ in range(5)]
        return {"text": "".join(_answered(value) for value in values)}
    arguments = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
    told = f"<<SYS>>\n{_description()}\n<</SYS>>\n\n" if rng.random() < 1 / 15 else ""
    return {"text": f"[INST] {told}{asked} [/INST] <tool_call>\n{arguments}\n</tool_call> {_answered(value)}"}


def _answered(value: str) -> str:
    return f"[INST] <tool_response>\n{value}\n</tool_response> [/INST] It is {value}. "


@functools.cache
def _description() -> str:
    from gptjax.serve.tools import open_tools
    from gptjax.tokenizer.tool_calls import HERMES

    return "".join(part for part, _ in HERMES.described(open_tools("calculator").specs))


def _made(name: str, make: Callable[[random.Random], dict], count: int) -> str:
    path = FOLDER / name
    if not path.exists():
        rng = random.Random(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(make(rng)) + "\n" for _ in range(count)), encoding="utf-8")
    return str(path)


MODEL = ModelConfig(
    num_layers=3, width=128, num_heads=4, mlp_ratio=8 / 3, positions="rope", norm="rmsnorm", activation="swiglu",
    biases=False, dtype="auto", unroll=0,
)  # fmt: skip


def pretrain() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/calculator_base",
        steps=2000,
        model=MODEL,
        tokenizer=TokenizerConfig(vocab_size=640, template="llama2"),
        data=DataConfig(source=_made("texts.jsonl", text, 60_000), batch_size=4, length=384),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=50, final_fraction=0.1),
        evaluate=EvaluateConfig(every=500, max_rows=32),
        generate=GenerateConfig(prompt=("[INST] What is 1234 + 567? [/INST]",), max_new_tokens=60, temperature=0.0),
    )


def sft() -> SftConfig:
    return SftConfig(
        run_dir="runs/calculator",
        init="runs/calculator_base",
        steps=1000,
        model=ModelConfig(dtype="auto", unroll=0),
        data=DataConfig(source=_made("chats.jsonl", conversation, 6_000), batch_size=4, length=384),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=20, final_fraction=0.0, weight_decay=0.0),
        evaluate=EvaluateConfig(every=400, max_rows=32),
        generate=GenerateConfig(prompt=("What is 1234 + 567?",), max_new_tokens=60, temperature=0.0),
    )
