"""Writes docs/settings.md from the docstrings of the settings' fields: python docs/make_settings.py"""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax import config
from gptjax.config.checks import DoctorConfig, VerifyConfig
from gptjax.config.export import ExportConfig
from gptjax.config.scaling import FitConfig, PredictConfig
from gptjax.config.section import leaves
from gptjax.config.serving import ServeConfig
from gptjax.config.sweep import SweepConfig
from gptjax.config.tasks import TaskConfig
from gptjax.config.training import BY_CONTENT, CHANGEABLE, frozen_settings

PAGE = Path(__file__).parent / "settings.md"
# The settings of each verb; a verb that is not here has none. `plan` takes those of the recipe, as `pretrain` does.
VERBS: dict[str, Any] = {
    "pretrain": config.TrainConfig,
    "sft": config.SftConfig,
    "reward": config.RewardConfig,
    "dpo": config.DpoConfig,
    "grpo": config.GrpoConfig,
    "ppo": config.PpoConfig,
    "prepare": config.PrepareConfig,
    "tokenizer train": config.TrainTokenizerConfig,
    "data show": config.ShowConfig,
    "eval": config.EvalConfig,
    "generate": config.ContinueConfig,
    "chat": config.ChatConfig,
    "serve": ServeConfig,
    "inspect": config.InspectConfig,
    "export": ExportConfig,
    "sweep": SweepConfig,
    "fit": FitConfig,
    "predict": PredictConfig,
    "import": config.ImportConfig,
    "verify": VerifyConfig,
    "doctor": DoctorConfig,
}
FIRST = [field.name for field in dataclasses.fields(config.TrainConfig)]  # the groups that have a table under pretrain
HEAD = """<!-- Made by `python docs/make_settings.py` from the docstrings in gptjax/config; do not edit. -->

# Settings

Every setting by its dotted name. In a recipe it is a field of a dataclass (`ModelConfig(num_layers=4)`), from Python a
key (`{"model.num_layers": 4}`), and on the command line a flag (`--model.num-layers 4`; a switch is turned off by
`--no-sample`). An unknown name is refused with the nearest known one. `gptjax VERB --help` prints the same text
with the values of the recipe at hand.

The column "resume" says what may change when a run is continued: *free* settings change none of its numbers but for
rounding, *changeable* ones change the curve from there on, what is compared *by content* may be spelt otherwise (a
corpus that was moved), and a change of any other is refused, since it would make another run (start one with `--init`).
"""


def page() -> str:
    """The text of docs/settings.md."""
    parts = [HEAD]
    for verb, cls in VERBS.items():
        frozen = set(frozen_settings(cls())) if verb in config.STAGES else None
        parts.append(f"\n## gptjax {verb}\n\n{_sentence(cls.__doc__)}\n")
        names = [field.name for field in dataclasses.fields(cls)]
        for group in ["", *(name for name in names if dataclasses.is_dataclass(_kind(cls, name)))]:
            of = _kind(cls, group) if group else cls
            if group in FIRST and verb != "pretrain":
                parts.append(f"\n`{group}.*`: as [above](#{group}).\n")
                continue
            if group:
                parts.append(f"\n### {group}\n\n{_sentence(of.__doc__)}\n")
            if all("." in name for name, _ in leaves(of())):
                continue
            parts += _table(of, group, frozen)
            for inner in [
                f.name for f in dataclasses.fields(of) if group and dataclasses.is_dataclass(_kind(of, f.name))
            ]:
                parts.append(f"\n### {group}.{inner}\n\n{_sentence(_kind(of, inner).__doc__)}\n")
                parts += _table(_kind(of, inner), f"{group}.{inner}", frozen)
        if verb == "eval":
            parts.append(f"\n### The head of a task's file\n\n{_sentence(TaskConfig.__doc__)}\n")
            parts += _table(TaskConfig)
    return "".join(parts)


def _table(of: Any, group: str = "", frozen: set[str] | None = None) -> Iterator[str]:
    """Yields the lines of a table of settings; `frozen` names those that may not change on resume."""
    yield "\n| setting | values | default | meaning |" + ("" if frozen is None else " resume |")
    yield "\n|---|---|---|---|" + ("" if frozen is None else "---|") + "\n"
    docs = field_docs(of)
    for name, default in leaves(of()):
        if "." in name:
            continue  # a group of its own
        dotted = f"{group}.{name}" if group else name
        row = [f"`{dotted}`", _values(_kind(of, name)), _show(default), docs[name]]
        if frozen is not None:
            fixed = "by content" if dotted in BY_CONTENT else ""
            row.append(fixed if dotted in frozen else "changeable" if dotted in CHANGEABLE else "free")
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n"


def field_docs(cls: Any) -> dict[str, str]:
    """The docstring of each field of a dataclass and of those that it inherits from."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:]):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                    docs[name] = " ".join(said.split()).replace("[", "\\[")  # no link
    return docs


def _kind(cls: Any, name: str) -> Any:
    return typing.get_type_hints(cls)[name]


def _values(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{value or repr(value)}`" for value in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"{_values(typing.get_args(kind)[0])}, several"
    return {str: "text", int: "integer", float: "number", bool: "switch"}[kind]


def _show(default: Any) -> str:
    if default in ("", ()):
        return "empty"
    shown = " ".join(map(str, default)) or repr("") if isinstance(default, tuple) else str(default)
    return f"`{shown if shown.strip() else repr(shown)}`"


def _sentence(doc: str | None) -> str:
    return " ".join((doc or "").split())


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
