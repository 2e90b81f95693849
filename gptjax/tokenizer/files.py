"""Tokenizers as files: opened by kind, made by the settings, and loaded as they were saved.

Each kind is imported where it is needed: a run has one.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from gptjax.config import TokenizerConfig
from gptjax.config.section import InputError
from gptjax.tokenizer.bytes import BytesTokenizer
from gptjax.tokenizer.interface import (
    JSON_FILE,
    MERGES_FILE,
    META_FILE,
    MODEL_FILE,
    RANKS_FILE,
    SCHEMA,
    VOCAB_FILE,
    Tokenizer,
)
from gptjax.tokenizer.sentencepiece import SentencePieceTokenizer, train_sentencepiece

_KINDS = ("bytes", "sentencepiece", "huggingface", "tiktoken")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote into the folder; raises InputError where a file is missing or was changed."""
    folder = Path(folder)
    path = folder / META_FILE
    try:
        meta = json.loads(_read(path))
        kind, wanted = meta["kind"], meta["sha256"]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError):
        raise InputError(f'{path}: wanted a JSON object with "kind" and "sha256"; the file is damaged') from None
    if kind not in _KINDS or meta.get("schema") != SCHEMA:
        raise InputError(f"{path}: kind {kind!r} in schema {meta.get('schema')!r} is unknown; wanted schema {SCHEMA}")
    file = folder / MODEL_FILE
    if kind == "bytes":
        file, tokenizer = path, BytesTokenizer()
    elif kind == "sentencepiece":
        tokenizer = load_sentencepiece(file)
    elif kind == "tiktoken":
        from gptjax.tokenizer.tiktoken import TiktokenTokenizer

        file = folder / RANKS_FILE
        tokenizer = TiktokenTokenizer(_read(file), str(meta.get("pattern", "")), str(file))
    else:
        from gptjax.tokenizer.huggingface import HuggingFaceTokenizer

        file = folder / (JSON_FILE if (folder / JSON_FILE).exists() else VOCAB_FILE)
        names = (JSON_FILE,) if file.name == JSON_FILE else (VOCAB_FILE, MERGES_FILE)
        content = {name: _read(folder / name) for name in names}
        tokenizer = HuggingFaceTokenizer(content, str(meta.get("bos", "")), str(meta.get("eos", "")), str(file))
    if tokenizer.sha256 != wanted:
        raise InputError(f"{file}: sha256 is {tokenizer.sha256[:12]}, wanted {wanted[:12]}; the file was changed")
    tokenizer.begins = meta.get("begins") is not False
    stops = meta.get("stop_ids", [])
    if not isinstance(stops, list) or not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in stops):
        raise InputError(f"{path}: stop_ids={stops!r}; wanted ids below {tokenizer.vocab_size}; the file was changed")
    tokenizer.stop_ids = tuple(stops)
    set_template(tokenizer, str(meta.get("template", "")))
    return tokenizer


def set_template(tokenizer: Tokenizer, name: str) -> None:
    """Gives the tokenizer the chat template of that name, if one is given; InputError where it lacks a token of it."""
    if not name:
        return
    from gptjax.tokenizer.known_templates import named_template

    named_template(name).check(tokenizer)
    tokenizer.template = name


def load_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """Reads a SentencePiece .model file; raises InputError where there is none or it would lose text."""
    return SentencePieceTokenizer(_read(Path(path)), name=str(path))


def open_tokenizer(path: str | Path, kind: str = "", pattern: str = "") -> Tokenizer:
    """The tokenizer in a file or folder, one that `save` wrote or one made elsewhere.

    `kind` is one of tokenizer.kind; where empty, it is detected, and of several in a folder a SentencePiece model is
    taken first, but where a tokenizer.json adds tokens to it, then ranks. `pattern` is tokenizer.pattern. Raises
    InputError where there is no tokenizer, one of another kind, or one that would lose text.
    """
    from gptjax.tokenizer.huggingface import PAIRS, read_huggingface
    from gptjax.tokenizer.tiktoken import TiktokenTokenizer

    path = Path(path)
    if path.is_dir() and (path / META_FILE).exists():
        tokenizer = load_tokenizer(path)
        if kind not in ("", tokenizer.kind):
            raise _other_kind(path, tokenizer.kind, kind)
        if isinstance(tokenizer, TiktokenTokenizer) and pattern not in ("", tokenizer.pattern):
            raise InputError(
                f"tokenizer.pattern={pattern!r}, but {path} was saved with {tokenizer.pattern!r}; leave it out"
            )
        return tokenizer
    files = _tokenizers_in(path)
    if not files:
        names = f"{MODEL_FILE}, *.tiktoken, {JSON_FILE} or {' and '.join(PAIRS[0])}"
        raise InputError(f"tokenizer.path={str(path)!r} holds no tokenizer; wanted {names} in it")
    if not kind and {"sentencepiece", "huggingface"} <= files.keys() and _adds_tokens(path, files["sentencepiece"]):
        kind = "huggingface"
    kind = kind or next(iter(files))
    if kind not in files:
        raise _other_kind(path, " or a ".join(files), kind)
    if kind == "huggingface":
        try:
            return read_huggingface(files[kind])
        except OSError as error:
            raise _unreadable(Path(error.filename), error) from None
    if kind == "tiktoken":
        return TiktokenTokenizer(_read(files[kind]), pattern, str(files[kind]))
    return load_sentencepiece(files[kind])


def check_trainable(cfg: TokenizerConfig) -> None:
    """Raises InputError for a kind that is not trained here and has no path."""
    if not cfg.path and cfg.kind not in ("bytes", "sentencepiece"):
        raise InputError(
            f"tokenizer.path is empty, and none is trained of tokenizer.kind={cfg.kind!r}; "
            "add --tokenizer.path with its file or folder, or --tokenizer.kind sentencepiece to train one"
        )


def make_tokenizer(cfg: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    """The tokenizer of the settings: bytes, the one at tokenizer.path, or one trained on the texts.

    The texts are read only for training. Raises InputError where the vocabulary is not tokenizer.vocab_size.
    """
    if cfg.kind == "bytes":
        return BytesTokenizer()
    check_trainable(cfg)
    if not cfg.path:
        return train_sentencepiece(texts, cfg.vocab_size)
    tokenizer = open_tokenizer(cfg.path, cfg.kind, cfg.pattern)
    if tokenizer.vocab_size != cfg.vocab_size:
        raise InputError(
            f"tokenizer.vocab_size={cfg.vocab_size}, but {cfg.path} has {tokenizer.vocab_size} tokens; "
            f"add --tokenizer.vocab-size {tokenizer.vocab_size}"
        )
    return tokenizer


def _adds_tokens(folder: Path, model: Path) -> bool:
    """True where a tokenizer.json has added tokens behind the pieces of the .model file beside it, as of a chat."""
    try:
        added = json.loads(_read(folder / JSON_FILE)).get("added_tokens") or []
        most = max((token["id"] for token in added), default=0)
        return most >= load_sentencepiece(model).vocab_size
    except (InputError, ValueError, KeyError, TypeError, AttributeError):  # said where that file is read
        return False


def _tokenizers_in(path: Path) -> dict[str, Path]:
    """The tokenizers at a path: kind -> file or folder, judged by what the files hold and not by their names."""
    from gptjax.tokenizer.huggingface import PAIRS

    if not path.is_dir():
        return {_kind_of(path): path}
    files: dict[str, Path] = {}
    for file in (path / MODEL_FILE, *sorted(path.glob("*.tiktoken"))):
        if file.is_file():
            files.setdefault(_kind_of(file), file)
    if (path / JSON_FILE).is_file() or any(all((path / name).is_file() for name in pair) for pair in PAIRS):
        files["huggingface"] = path
    return files


def _kind_of(file: Path) -> str:
    from gptjax.tokenizer.huggingface import PAIRS
    from gptjax.tokenizer.tiktoken import looks_like_ranks

    if any(file.name in pair for pair in PAIRS):
        return "huggingface"
    start = _read(file, 4096).lstrip()
    if start.startswith(b"{"):
        return "huggingface"
    return "tiktoken" if looks_like_ranks(start) else "sentencepiece"


def _read(path: Path, size: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> InputError:
    get = f"; download one with: hf download {path} --local-dir {path.name}" if not path.suffix else ""
    return InputError(f"tokenizer file {path} cannot be read ({error.strerror}); wanted the file or its folder{get}")


def _other_kind(path: Path, has: str, wanted: str) -> InputError:
    kind = has.split(" ")[0]
    return InputError(f"tokenizer.path={str(path)!r} holds a {has} tokenizer; wanted {wanted}: "
                      f"add --tokenizer.kind {kind}")  # fmt: skip
