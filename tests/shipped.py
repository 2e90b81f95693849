"""Shipped recipes by the words of a command line, for tests that ask many of them."""

from pathlib import Path

from gptjax.config import TrainConfig
from gptjax.config.command_line import load_recipe, parse, take

FOLDER = Path(__file__).parent.parent / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if "def pretrain(" in path.read_text())
SIZES = {"gpt2": "124m 355m 774m 1.5b", "gpt3": "125m 350m 760m 1.3b 2.7b 6.7b 13b 175b"}
EVERY = [f"{name} --size {size}" for name in SIZES for size in SIZES[name].split()]
EVERY += [name for name in NAMES if name not in SIZES]


def recipe(words: str, *flags: str) -> TrainConfig:
    """The config of "NAME [--size SIZE] [FLAGS]", e.g. "gpt3 --size 175b --optim.accumulate 1"."""
    name, *rest = [*words.split(), *flags]
    size, rest = take(rest, "size")
    config = load_recipe(name).config("pretrain", size)
    return parse(config, rest, "test") if rest else config
