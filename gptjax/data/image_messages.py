"""Images in the messages of records: the forms that OpenAI and Hugging Face have, read as `images.Picture`.

An image is the bytes in a column, a data: URL, or a file beside the records, below their folder. Nothing is fetched.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from gptjax.config.section import InputError, one_line
from gptjax.data.image_headers import MOST_BYTES
from gptjax.data.images import Picture, from_data_url

PLACEHOLDER = "<image>"
WANTED = "wanted a file below the folder of the records, a data: URL, or bytes"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_FIELDS = ("image", "path", "url")  # of a part {"type": "image"}


class RecordImages:
    """The images in the columns of a record, which placeholders in its messages stand for.

    They are "images", a list, "image", or "file_name" of a picture. Where no message has a placeholder they open the
    first one of the user. `folder` is that of the record's file; None: paths are refused.
    """

    def __init__(self, record: Mapping[str, Any], origin: str, folder: Path | None):
        self.origin, self.folder, self._used = origin, folder, 0
        given: Any = record.get("images")
        if given is None:
            named = [record.get("image"), record.get("file_name")]
            is_picture = isinstance(named[1], str) and named[1].lower().endswith(_SUFFIXES)
            given = [x for x in (named if is_picture else named[:1]) if x is not None][:1]
        given = given if isinstance(given, list) else [given]
        self.pictures = [read_picture(x, f"{origin}: image {i}", folder) for i, x in enumerate(given, 1)]

    def content(self, given: Any, role: str, where: str) -> Any:
        """A message's text as it is, or its parts: a text where they hold no image, else text and `Picture`s.

        Raises InputError for parts of another form, and for images in other messages than the user's.
        """
        if isinstance(given, str):
            given = self._placeholders(given) if role == "user" and self.pictures else given
        if not isinstance(given, Sequence) or isinstance(given, str):
            return given
        parts = [self._part(part, f"{where}: part {i}") for i, part in enumerate(given, 1)]
        if all(part["type"] == "text" for part in parts):
            return "".join(part["text"] for part in parts)
        if role != "user":
            raise InputError(f"{where} is of the role {role} and holds an image; wanted images in the user's alone")
        return parts

    def finish(self, messages: list[dict[str, Any]]) -> None:
        """Puts images without placeholders into the first message of the user; raises InputError where some are left"""
        count = len(self.pictures)
        if count and not self._used:
            first = next((m for m in messages if m["role"] == "user"), None)
            if first is not None:
                said = first["content"]
                own = [{"type": "text", "text": said}] if isinstance(said, str) else said
                first["content"] = [*({"type": "image", "image": p} for p in self.pictures), *own]
                return
        if self._used != count:
            raise InputError(
                f"{self.origin} has {count} image{'s' * (count != 1)} and {self._used} places for them, "
                f'{{"type": "image"}} or {PLACEHOLDER} in a message of the user; wanted as many'
            )

    def _placeholders(self, text: str) -> Any:
        """The parts of a text with placeholders; one without is a text."""
        pieces = text.split(PLACEHOLDER)
        parts: list[dict[str, Any]] = [{"type": "text", "text": pieces[0]}]
        for piece in pieces[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": piece}]
        return text if len(parts) == 1 else [part for part in parts if part["type"] == "image" or part["text"]]

    def _part(self, part: Any, where: str) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        if kind == "image_url":
            url = part.get("image_url")
            given = url.get("url") if isinstance(url, Mapping) else url
            return {"type": "image", "image": read_picture(given, where, self.folder)}
        if kind != "image":
            raise InputError(
                f'{where} is {one_line(repr(part), 60)}; wanted {{"type": "text", "text": ...}}, '
                '{"type": "image", ...} or {"type": "image_url", "image_url": {"url": ...}}'
            )
        given = next((part[name] for name in _FIELDS if part.get(name) is not None), None)
        if given is not None:
            return {"type": "image", "image": read_picture(given, where, self.folder)}
        self._used += 1  # a bare part stands for the next image of the columns
        if self._used > len(self.pictures):
            return {"type": "image", "image": None}  # refused by `finish`
        return {"type": "image", "image": self.pictures[self._used - 1]}


def pictures_of(messages: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """The images of messages that `dialogue.messages_of` read, in their order."""
    parts = (part for m in messages if isinstance(m["content"], list) for part in m["content"])
    return [part["image"] for part in parts if part["type"] == "image"]


def refuse_images(record: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], origin: str) -> None:
    """Raises InputError where a record brings images and texts alone are read."""
    if pictures_of(messages) or record.get("images") or isinstance(record.get("image"), str | Mapping):
        raise InputError(f"{origin} holds an image; wanted texts: gptjax sft alone learns from images")


def read_picture(given: Any, where: str, folder: Path | None) -> Picture:
    """The image that a record names: bytes, {"bytes", "path"} as Hugging Face has it, a data: URL, or a path.

    Raises InputError, which names `where`, for a path that leaves `folder`, other URLs, and what can't be read.
    """
    if isinstance(given, Picture):
        return given
    if isinstance(given, Mapping):
        given = given.get("bytes") if given.get("bytes") is not None else given.get("path")
    if isinstance(given, bytes):
        return Picture.of(given, where)
    if not isinstance(given, str):
        raise InputError(f"{where} is {one_line(repr(given), 60)}; {WANTED}")
    if given[:5].lower() == "data:":
        return Picture.of(from_data_url(given, where), where)
    return Picture.of(_file_content(given, where, folder), f"{where} ({one_line(given, 80)})")


def _file_content(name: str, where: str, folder: Path | None) -> bytes:
    shown = one_line(name, 80)
    if "://" in name or name.lower().startswith("file:"):
        raise InputError(f"{where} is at {shown!r}, and nothing is fetched; {WANTED}")
    if folder is None:
        raise InputError(f"{where} is the path {shown!r}; wanted a data: URL here")
    path = PurePath(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where} is the path {shown!r}; wanted one below {folder}, without ..")
    try:
        real = (folder / path).resolve(strict=True)
        if not real.is_relative_to(folder.resolve()):
            raise InputError(f"{where} is {shown!r}, a link that leads out of {folder}; wanted a file below it")
        if not real.is_file():
            raise InputError(f"{where} is {shown!r}, which is no file in {folder}")
        if (size := real.stat().st_size) > MOST_BYTES:
            raise InputError(f"{where} is {shown!r} of {size:,} bytes; wanted at most {MOST_BYTES:,}")
        return real.read_bytes()
    except (OSError, RuntimeError) as e:  # RuntimeError: links in a circle
        raise InputError(f"{where} is {shown!r}, which can't be read ({one_line(e, 120)})") from None
