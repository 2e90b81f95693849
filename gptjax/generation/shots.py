"""Few-shot prompts, as GPT-3 was asked (Brown et al. 2020): an instruction, examples, and the input that is asked."""

import json
from pathlib import Path
from typing import NamedTuple

from gptjax.config.section import InputError, one_line

SHIPPED = [folder / "configs" / "shots" for folder in Path(__file__).parents[1:3]]


class Shots(NamedTuple):
    """Examples of a task, their labels and an instruction before them."""

    instruction: str
    labels: tuple[str, str]
    """Of an input and of an output."""
    examples: tuple[tuple[str, str], ...]

    def prompt(self, text: str) -> str:
        """The examples, and behind them the text as one more input, up to where its output begins."""
        asked, answered = self.labels
        shots = [f"{asked}: {given}\n{answered}: {said}" for given, said in self.examples]
        opening = [self.instruction] if self.instruction else []
        return "\n\n".join([*opening, *shots, f"{asked}: {text.strip()}\n{answered}:"])

    @property
    def stop(self) -> str:
        """The text at which the next example would begin."""
        return f"\n\n{self.labels[0]}:"


def read_shots(name: str) -> Shots:
    """The examples of a JSONL file, or of a shipped one by its name.

    The first line is {"instruction": ..., "labels": [of an input, of an output]}, each other one {"input": ...,
    "output": ...}, all texts. Raises InputError, which names the line, for others.
    """
    places = [Path(name), *(folder / f"{name}.jsonl" for folder in SHIPPED)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        known = sorted({p.stem for folder in SHIPPED for p in folder.glob("*.jsonl")})
        raise InputError(f"shots={name!r}: there is no such file; wanted one, or one of {', '.join(known)}")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError) as e:
        raise InputError(f"{path} can't be read as JSONL ({one_line(e)})") from e
    header = records[0] if records and isinstance(records[0], dict) else {}
    labels, instruction = header.get("labels"), header.get("instruction", "")
    labels = [x for x in labels if isinstance(x, str) and x] if isinstance(labels, list) else []
    if len(labels) != 2 or len(header["labels"]) != 2 or not isinstance(instruction, str):
        raise InputError(
            f'{path}:1: wanted {{"instruction": a text, "labels": [of an input, of an output]}}, such as '
            '["English", "French"]'
        )
    examples = []
    for number, record in enumerate(records[1:], 2):
        pair = [record.get(key) if isinstance(record, dict) else None for key in ("input", "output")]
        texts = [part.strip() for part in pair if isinstance(part, str) and part.strip()]
        if len(texts) < 2:
            raise InputError(f'{path}:{number}: wanted {{"input": a text, "output": a text}}')
        examples.append((texts[0], texts[1]))
    return Shots(instruction.strip(), (labels[0], labels[1]), tuple(examples))
