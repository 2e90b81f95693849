"""Conventions that a tokenizer's files state beside it: how a prompt begins, what ends a text, its chat template."""

import json
from pathlib import Path
from typing import Any

from gptjax.config.section import InputError
from gptjax.tokenizer.files import set_template
from gptjax.tokenizer.interface import JSON_FILE, Tokenizer
from gptjax.tokenizer.jinja import jinja_for
from gptjax.tokenizer.known_templates import KNOWN, TEMPLATES, jinja_sha256


def set_conventions(tokenizer: Tokenizer, folder: Path) -> None:
    """Sets `begins`, `stop_ids` and `template` of a tokenizer from the Hugging Face folder that it was read from.

    A prompt begins with bos_id as tokenizer_config.json's add_bos_token says, else where tokenizer.json adds that token
    itself (its post_processor), else as transformers has it: with SentencePiece, not with byte pairs. A text ends with
    the ids of eos_token_id in generation_config.json, else in config.json. The template is looked up by its Jinja text,
    in chat_template.jinja or tokenizer_config.json. Raises InputError for a file that is no JSON object.
    """
    named, ends, config = (
        _read(folder / name) for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    added, made = named.get("add_bos_token"), _read(folder / JSON_FILE)
    if isinstance(added, bool):
        tokenizer.begins = added
    elif made:
        tokenizer.begins = tokenizer.bos_id in _added_first(made.get("post_processor"))
    else:
        tokenizer.begins = tokenizer.kind == "sentencepiece"
    stops = ends.get("eos_token_id", config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id")))
    tokenizer.stop_ids = tuple(
        i
        for i in dict.fromkeys(stops if isinstance(stops, list) else [stops])
        if type(i) is int and 0 <= i < tokenizer.vocab_size and i != tokenizer.eos_id
    )
    beside = folder / "chat_template.jinja"
    set_known_template(tokenizer, beside.read_text("utf-8") if beside.is_file() else named.get("chat_template"))


def set_known_template(tokenizer: Tokenizer, jinja: Any) -> None:
    """Sets the template of a Jinja text, or of the one called default of several; none where it is not known.

    Known are the texts of KNOWN, and those that an export writes.
    """
    if isinstance(jinja, list):
        jinja = next((t.get("template") for t in jinja if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(jinja, str):
        return
    sha256 = jinja_sha256(jinja)
    written = (name for name, t in TEMPLATES.items() if jinja_sha256(jinja_for(tokenizer, t)) == sha256)
    if name := KNOWN.get(sha256) or next(written, None):
        try:
            set_template(tokenizer, name)
        except InputError:  # it lacks a token of it: no template of this model
            tokenizer.template = ""


def _added_first(processor: Any) -> list[int]:
    """The ids that a tokenizer.json's post_processor puts in front of a text."""
    if not isinstance(processor, dict):
        return []
    if processor.get("type") == "Sequence":
        return [i for step in processor.get("processors", ()) for i in _added_first(step)]
    if processor.get("type") != "TemplateProcessing":
        return []
    first, ids = (processor.get("single") or [{}])[0], processor.get("special_tokens") or {}
    token = first.get("SpecialToken", {}).get("id") if isinstance(first, dict) else None
    return list(ids.get(token, {}).get("ids", ()))


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: wanted a JSON object, got a {type(values).__name__}")
    return values
