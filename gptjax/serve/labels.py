"""Labels that people write in the browser: demonstrations and rankings, a file a labeller, each a line an answer.

A folder of labels holds prompts.jsonl, which its owner writes, and what is written here: demonstrations/NAME.jsonl,
which `gptjax sft` reads, rankings/NAME.jsonl, which `gptjax reward` and `gptjax dpo` read, skipped/NAME.jsonl, and
samples.jsonl, the answers that every labeller ranks. An answer is on the disk before it is acknowledged; the files are
read again for each, so that several servers may share a folder.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config.section import InputError, one_line
from gptjax.data.dialogue import Messages, messages_of
from gptjax.data.formats import read_records
from gptjax.data.image_messages import refuse_images
from gptjax.storage import sync

PROMPTS, SAMPLES = "prompts.jsonl", "samples.jsonl"
KINDS = ("demonstrations", "rankings")
NAME = re.compile(r"[\w-]{1,40}")
MOST_CHARACTERS = 100_000  # of an answer
WANTED = 'wanted {"prompt": a text, or messages of which the last is the user\'s}, and "answers" where they are given'


class LabelPrompt(NamedTuple):
    """A prompt to be answered, or whose answers are ranked."""

    id: str
    """Of what it says, so that the order of the file does not matter."""
    messages: Messages
    answers: list[str]
    """Answers to rank that stand in the file; none: the model's are drawn."""


class Progress(NamedTuple):
    """The answers of one labeller."""

    done: int
    skipped: int
    of: int


class LabelFolder:
    """A folder of labels; raises InputError where its prompts can't be read or it can't be written."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / PROMPTS).is_file():
            raise InputError(f"{self.folder} has no {PROMPTS}; {WANTED} on each line of {self.folder / PROMPTS}")
        self.prompts: dict[str, LabelPrompt] = {}
        for origin, record in read_records(self.folder / PROMPTS):
            prompt = _prompt_of(record, origin)
            if prompt.id in self.prompts:
                raise InputError(f"{origin}: this prompt stands in the file before; give each once")
            self.prompts[prompt.id] = prompt
        try:
            for name in (*KINDS, "skipped"):
                (self.folder / name).mkdir(exist_ok=True)
            with self._locked():
                for path in (self.folder / SAMPLES, *self.folder.glob("*/*.jsonl")):
                    _mend(path)
        except OSError as e:
            raise InputError(f"{self.folder} can't be written ({e.strerror or e}); give another folder") from e

    def path(self, kind: str, name: str) -> Path:
        """The file of one labeller; raises InputError for a kind that there is not, and a name that is no name."""
        if kind not in (*KINDS, "skipped"):
            raise InputError(f"kind={kind!r:.60}; wanted one of {', '.join(KINDS)}")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InputError(f"name={name!r:.60}; wanted 1 to 40 letters, digits, - or _")
        return self.folder / kind / f"{name}.jsonl"

    def progress(self, kind: str, name: str) -> Progress:
        """The numbers of answers, of prompts that were skipped, and of all prompts."""
        done, skipped = self._done(kind, name), self._skipped(kind, name)
        return Progress(len(done), len(skipped - done.keys()), len(self.prompts))

    def next(self, kind: str, name: str, behind: str = "") -> LabelPrompt | None:
        """The first prompt that the labeller neither answered nor skipped, `behind` another one; None: all are done."""
        seen = {*self._done(kind, name), *self._skipped(kind, name), behind}
        return next((prompt for prompt in self.prompts.values() if prompt.id not in seen), None)

    def demonstrate(self, name: str, prompt_id: str, text: str) -> None:
        """Keeps the labeller's answer; the same once more changes nothing.

        Raises InputError where it is empty, too long or no text, or another one is there.
        """
        prompt = self._prompt(prompt_id)
        if not isinstance(text, str) or not text.strip() or len(text) > MOST_CHARACTERS:
            raise InputError(f"the answer is {text!r:.40}; wanted a text of 1 to {MOST_CHARACTERS:,} characters")
        messages = [*prompt.messages, {"role": "assistant", "content": text}]
        self._append("demonstrations", name, prompt_id, {"messages": messages})

    def rank(self, name: str, prompt_id: str, answers: Sequence[str], ranks: Sequence[int]) -> None:
        """Keeps the labeller's ranks, one an answer: 1 for the best, equal ones for ties.

        Raises InputError unless they are those of the prompt's answers, and at least two differ: a tie of all tells
        nothing. The same ranks once more change nothing; others are refused.
        """
        prompt = self._prompt(prompt_id)
        if sorted(answers) != sorted(self.samples(prompt) or []):
            raise InputError("these are not the answers of this prompt; load the page again")
        whole = len(ranks) == len(answers) and all(type(r) is int and 1 <= r <= len(answers) for r in ranks)
        if not whole or len({*ranks}) < 2:
            raise InputError(
                f"ranks={one_line(repr(list(ranks)), 60)}; wanted {len(answers)} numbers from 1, at least two of them "
                "different; skip a prompt whose answers are all as good"
            )
        order = sorted(range(len(ranks)), key=lambda i: ranks[i])
        record = {"answers": [answers[i] for i in order], "ranks": [ranks[i] for i in order]}
        self._append("rankings", name, prompt_id, {"prompt": prompt.messages, **record})

    def skip(self, kind: str, name: str, prompt_id: str) -> None:
        """Keeps that the labeller gives no answer to a prompt."""
        self.path(kind, name)
        self._prompt(prompt_id)
        self._append("skipped", name, f"{kind}:{prompt_id}", {})

    def take_back(self, kind: str, name: str) -> str:
        """Removes the labeller's last answer, and returns the id of its prompt; raises InputError without one."""
        with self._locked():
            lines = _whole_lines(path := self.path(kind, name))
            if not lines:
                raise InputError("there is no answer to take back")
            os.truncate(path, sum(map(len, lines[:-1])))
            sync(path)
        return json.loads(lines[-1])["id"]

    def samples(self, prompt: LabelPrompt) -> list[str] | None:
        """The answers of a prompt that are ranked; None where they have not been drawn yet."""
        return prompt.answers or self._drawn().get(prompt.id)

    def keep_samples(self, prompt: LabelPrompt, answers: Sequence[str], model: str) -> list[str]:
        """Keeps the different ones of the drawn answers, and returns those that are ranked: the first ones kept."""
        with self._locked():
            if (kept := self._drawn().get(prompt.id)) is not None:
                return kept
            different = list(dict.fromkeys(answers))
            record = {"id": prompt.id, "prompt": prompt.messages, "answers": different, "model": model}
            _append_line(self.folder / SAMPLES, record)
            return different

    def shown(self, prompt: LabelPrompt, name: str) -> list[str]:
        """The samples in an order of the labeller's own, so that no place is always the same sample's."""
        answers = list(self.samples(prompt) or [])
        random.Random(f"{name}:{prompt.id}").shuffle(answers)
        return answers

    def _prompt(self, prompt_id: str) -> LabelPrompt:
        if not isinstance(prompt_id, str) or prompt_id not in self.prompts:
            raise InputError(f"id={prompt_id!r:.40} is no prompt of {PROMPTS}; load the page again")
        return self.prompts[prompt_id]

    def _done(self, kind: str, name: str) -> dict[str, Any]:
        """The records of one labeller by the ids of their prompts; of prompts that are still there."""
        records = _records(self.path(kind, name))
        return {record["id"]: record for record in records if kind == "skipped" or record["id"] in self.prompts}

    def _skipped(self, kind: str, name: str) -> set[str]:
        marks = (mark.split(":", 1) for mark in self._done("skipped", name))
        return {prompt_id for of, prompt_id in marks if of == kind and prompt_id in self.prompts}

    def _drawn(self) -> dict[str, list[str]]:
        return {record["id"]: record["answers"] for record in _records(self.folder / SAMPLES)}

    def _append(self, kind: str, name: str, mark: str, record: dict[str, Any]) -> None:
        path = self.path(kind, name)
        with self._locked():
            if (kept := self._done(kind, name).get(mark)) is not None:
                if all(kept[field] == value for field, value in record.items()):
                    return
                raise InputError(f"{name} has answered this prompt already; load the page again")
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            _append_line(path, {"id": mark, "labeller": name, "time": now, **record})

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            yield


def _prompt_of(record: Any, origin: str) -> LabelPrompt:
    given, answers = record.get("prompt"), record.get("answers", [])
    asked = [{"role": "user", "content": given}] if isinstance(given, str) else None
    if isinstance(given, list):
        asked = messages_of({"messages": given}, origin)
        refuse_images(record, asked, origin)
    if not asked or asked[-1]["role"] != "user":
        raise InputError(f"{origin} has {one_line(json.dumps(record), 80)}; {WANTED}")
    texts = isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
    if not texts or len({*answers}) != len(answers) or len(answers) == 1:
        raise InputError(
            f"{origin}: answers={one_line(repr(answers), 60)}; wanted a list of two or more different texts"
        )
    digest = hashlib.sha256(json.dumps([[m["role"], m["content"]] for m in asked]).encode())
    return LabelPrompt(digest.hexdigest()[:16], asked, answers)


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, without what a writer that was killed left behind the last one."""
    try:
        return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    except FileNotFoundError:
        return []


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_whole_lines(path), 1):
        if (record := _record(line)) is None:
            raise InputError(f"{path}:{number} is no line that was written here; wanted a JSON object with an id")
        yield record


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("id"), str) else None


def _mend(path: Path) -> None:
    """Ends the last line of a file, or cuts it off where it is only half of one."""
    if not path.exists():
        return
    size = sum(map(len, _whole_lines(path)))
    with open(path, "rb+") as file:
        file.seek(size)
        if tail := file.read():
            whole = _record(tail) is not None  # an editor leaves the last line without an end
            file.write(b"\n") if whole else file.truncate(size)
            file.flush()
            os.fsync(file.fileno())


def _append_line(path: Path, record: dict[str, Any]) -> None:
    """Adds a line, and returns once it is on the disk; nothing is kept of half a line."""
    try:
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        raise InputError("the text has half a surrogate pair, which is no character; write it again") from None
    _mend(path)
    is_new = not path.exists()
    with open(path, "ab") as file:
        size = file.tell()
        try:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError as e:
            file.truncate(size)
            raise InputError(f"{path} can't be written ({e.strerror or e}): make room, and save again") from e
    if is_new:
        sync(path.parent)
