"""Settings of a task of `gptjax eval --tasks`: the head of its file, and what the command line replaces of it."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from gptjax.config.section import Section

Kind = Literal["text", "multiple_choice", "cloze", "generation"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PROMPTS: dict[Kind, str] = {"multiple_choice": "{query}", "cloze": "{context}", "generation": "{prompt}"}
"""Of each kind, the prompt of an item where the head gives no other."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Section):
    """One task: its items, and how they become texts. A {field} in a text stands for the item's field of that name."""

    section: ClassVar[str] = "task"

    kind: Kind = "text"
    """Likelihood of whole texts (text); the likeliest of several answers (multiple_choice); the likelihood of one
    continuation (cloze); text that the model writes, compared with answers (generation)."""
    name: str = ""
    """Name in the report; empty: that of the file."""
    items: str = ""
    """File of the items, beside this one, where they do not follow the head in the same file."""
    where: tuple[str, ...] = ()
    """Items to use, as FIELD=VALUE, all of which must hold."""
    text: str = "{text}"
    """The text of an item (text)."""
    prompt: str = ""
    """What stands in front of an answer; empty: {query} (multiple_choice), {context} (cloze), {prompt} (generation)."""
    choices: str = "choices"
    """Field that lists the answers to choose from (multiple_choice)."""
    labels: tuple[str, ...] = ()
    """Texts that are scored in place of the first, second, ... choice, such as A B C D (multiple_choice)."""
    gold: str = "gold"
    """Field with the right choice, counted from 0 or spelt out, or with a list of several (multiple_choice)."""
    continuation: str = "{continuation}"
    """What goes on with the prompt (cloze)."""
    answers: str = "answers"
    """Field with the right answer, or with a list of several (generation)."""
    separator: str = " "
    """Text between a prompt and its answer."""
    description: str = ""
    """Text in front of everything."""
    image: str = "image"
    """Field with the picture in front of an item's prompt: a path beside the file of the items, or a data: URL. Items
    without it have none, and texts and examples show none."""
    by: str = ""
    """Field by whose values the metric is given apart, too (generation)."""
    shots: int = 0
    """Solved examples in front of each item, from the other items or from shots_file."""
    shots_file: str = ""
    """File of items to take the examples from, of the same fields."""
    shots_order: Literal["random", "first"] = "random"
    """Draw the examples of each item by the seed and its number, or take the first of shots_file for all items."""
    delimiter: str = "\n\n"
    """Text behind each example."""
    metric: Literal["", "acc", "acc_norm", "acc_token"] = ""
    """Accuracy that enters the summary: by the sum of log-probabilities (acc), divided by the characters of the answer
    (acc_norm, the default) or by its tokens (acc_token)."""
    normalise: Literal["strip", "squad", "last_number"] = "strip"
    """What is compared of a generated text and an answer: all but white space around it; words in lower case without
    punctuation and articles (SQuAD); the last number."""
    stop: tuple[str, ...] = ("\n",)
    """Texts at which generation stops."""
    max_new_tokens: int = 32
    """Tokens to generate at the most."""

    def __post_init__(self):
        self.require_numbers(0, math.inf, "shots")
        self.require_positive("max_new_tokens")
        self.require(all(self.stop), "stop", "texts that are not empty")
        self.require(all("=" in w for w in self.where), "where", "FIELD=VALUE, e.g. task=arithmetic")
        self.require(self.kind != "text" or not self.shots, "shots", "0 for a task of kind text")
        self.require(self.kind == "generation" or not self.by, "by", f"none for a task of kind {self.kind}")
        given = self.shots_order == "random" or bool(self.shots_file)
        self.require(given, "shots_order", "random where there is no shots_file")
        choosing = self.kind == "multiple_choice" or not self.metric
        self.require(choosing, "metric", f"none for a task of kind {self.kind}, which has one metric of its own")
