"""`gptjax chat`: a conversation in a terminal, with commands; in a pipe each line of the input is a message."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from gptjax.config import ChatConfig, GenerateConfig
from gptjax.config.generation import SAMPLING
from gptjax.config.section import InputError, build, leaves, one_line, unknown_name
from gptjax.data.dialogue import read_conversations
from gptjax.generation.image_prompts import open_picture
from gptjax.parallel.processes import working
from gptjax.runs.load import load_model
from gptjax.serve.session import Session
from gptjax.serve.tools import open_tools
from gptjax.tokenizer import set_template
from gptjax.tokenizer.tool_calls import ToolCall

HELP = """/system TEXT        set the system message; without a text show it
/image FILE         put a picture before the next message
/params NAME=VALUE  change temperature, top_p, max_new_tokens, ...; without any show them
/retry              answer the last message once more
/undo               take back the last message and its answer
/reset              forget the conversation
/tokens             how much of the context is filled
/save FILE          add the conversation to a file that gptjax sft reads
/load FILE          go on with the first conversation of a file
/exit               end (or Ctrl-D); Ctrl-C stops an answer"""


def open_session(run_dir: str, cfg: ChatConfig) -> Session:
    """A conversation with a run; raises InputError where the run can't be read or lacks the template's tokens, and for
    tools or pictures that can't be opened."""
    toolbox = open_tools(cfg.tools) if cfg.tools else None
    with working("reading the model"):
        model = load_model(run_dir, None, cfg.step)
    tokenizer = model.tokenizer
    set_template(tokenizer, cfg.template)
    settings = GenerateConfig(**{n: getattr(cfg, n) for n in SAMPLING})
    session = Session(model, tokenizer, settings, cfg.system, toolbox, cfg.max_calls)
    for path in cfg.image:
        session.add_picture(open_picture(path))
    return session


def talk(session: Session, source: TextIO, out: TextIO) -> int:
    """Reads messages and commands and writes answers until the source ends; returns the exit code.

    On a terminal bad input is told and the conversation goes on; in a pipe it ends it, with 2.
    """
    if source.isatty() and out.isatty():
        return _Terminal(session).run()
    for line in source:
        text = line.strip()
        if not text:
            continue
        if (ended := _command(session, text, lambda line: print(line, file=out), _plain(out))) is None:
            _plain(out)(session.ask(text))
        elif ended:
            break
    return 0


def _plain(out: TextIO) -> Callable[[Iterable[str]], None]:
    def write(pieces: Iterable[str]) -> None:
        for piece in pieces:
            print(piece, end="", file=out, flush=True)
        print(file=out, flush=True)

    return write


class _Terminal:
    """The conversation on a terminal: a prompt with history, answers as markdown that grows as they come."""

    def __init__(self, session: Session):
        from rich.console import Console

        self.session, self.console = session, Console(highlight=False)
        session.noted = self._called

    def run(self) -> int:
        """Reads and answers until the end; returns 0."""
        import readline  # noqa: F401  (gives `input` a history and keys to edit with)

        session = self.session
        named = session.tokenizer.template or "none: the model goes on with a transcript"
        self._note(f"{session.model.run.folder}, step {session.model.step:,}; template {named}; /help lists commands")
        while True:
            try:
                text = input("\001\033[1m\002> \001\033[0m\002").strip()
                if not text:
                    continue
                if (ended := _command(session, text, self._note, self._show)) is None:
                    self._show(session.ask(text))
                elif ended:
                    return 0
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:  # at the prompt, or in what is done around an answer
                print()
                self._note("Ctrl-D or /exit ends")
            except InputError as e:
                self._note(str(e))

    def _note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False)

    def _called(self, call: ToolCall, result: str) -> None:
        self._note(f"{call.name} {call.arguments}\n  {one_line(result, 200)}")

    def _show(self, pieces: Iterable[str]) -> None:
        """Writes an answer as it comes: paragraphs that are complete stay, the last one is drawn again as it grows."""
        from rich.live import Live
        from rich.markdown import Markdown
        from rich.text import Text

        if left := self.session.left_out:
            self._note(f"the first {left} messages do not fit into the context any more, and are not read")
        text, shown = "", 0
        try:
            with Live(console=self.console, auto_refresh=False, vertical_overflow="crop", transient=True) as live:
                live.update(Text("...", style="dim"), refresh=True)
                for piece in pieces:
                    text += piece
                    if (end := finished(text)) > shown:
                        live.update("", refresh=True)
                        self.console.print(Markdown(text[shown:end]))
                        shown = end
                    live.update(Markdown(text[shown:]), refresh=True)
        except KeyboardInterrupt:
            self.console.print(Markdown(text[shown:]))
            self._note("stopped")
            return
        self.console.print(Markdown(text[shown:]))


def finished(text: str) -> int:
    """Characters up to the last blank line that stands outside of a fenced block: what comes can't change these."""
    end, at, fenced = 0, 0, False
    for line in text.splitlines(keepends=True):
        at += len(line)
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.strip() and line.endswith("\n"):
            end = at
    return end


def _command(
    session: Session, text: str, note: Callable[[str], None], answer: Callable[[Iterable[str]], None]
) -> bool | None:
    """Does what a line that begins with a slash says: True where that ends the conversation; None for a message."""
    if not text.startswith("/"):
        return None
    name, _, rest = text[1:].partition(" ")
    rest = rest.strip()
    if name in ("exit", "quit"):
        return True
    if name == "help":
        note(HELP)
    elif name == "system":
        session.system = rest or session.system
        note(f"system: {session.system or 'none'}")
    elif name == "image" and rest:
        note(f"{rest}: {session.add_picture(open_picture(rest)):,} tokens, before the next message")
    elif name == "params":
        _set(session, rest)
        note(", ".join(f"{n}={getattr(session.settings, n)}" for n in SAMPLING))
    elif name == "retry":
        answer(session.retry())
    elif name == "undo":
        note("taken back" if session.undo() else "there is nothing to take back")
    elif name == "reset":
        session.reset()
        note("forgotten")
    elif name == "tokens":
        note(session.describe())
    elif name in ("save", "load") and rest:
        _file(session, name, rest)
        note(f"{name}d {len(session.messages)} messages" if name == "save" else f"{len(session.messages)} messages")
    elif name in ("save", "load", "image"):
        raise InputError(f"/{name}: a file is missing; wanted /{name} FILE")
    else:
        raise InputError(unknown_name(f"/{name}", [line.split()[0] for line in HELP.splitlines()]))
    return False


def _set(session: Session, text: str) -> None:
    """Changes settings of sampling by NAME=VALUE words; raises InputError, with all as they were, for a bad one."""
    new: dict[str, Any] = {}
    for word in text.replace(",", " ").split():
        name, _, value = word.partition("=")
        if name not in SAMPLING:
            raise InputError(unknown_name(name, list(SAMPLING)))
        kind = type(getattr(session.settings, name))
        try:
            new[name] = kind(value)
        except ValueError as e:
            number = "a whole number" if kind is int else "a number"
            raise InputError(f"{name}: got {value!r}, wanted {number}") from e
    session.settings = build(GenerateConfig, dict(leaves(session.settings)) | new)


def _file(session: Session, name: str, path: str) -> None:
    if name == "save":
        session.save(path)
        return
    messages = next(iter(read_conversations(Path(path))), None)
    if messages is None:
        raise InputError(f"{path} has no conversation")
    session.load(messages)
