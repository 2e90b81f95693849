"""The keys of a GGUF file that hold a tokenizer, for export; gguf_tokenizer.py reads them."""

import json
from pathlib import Path
from typing import Any

from gptjax.config.section import InputError
from gptjax.interop.gguf_tokenizer import CONTROL, ENDS, NO_MERGES, SPLITS, USER_DEFINED
from gptjax.tokenizer import SentencePieceTokenizer, Tokenizer
from gptjax.tokenizer.export import CONFIG_FILE
from gptjax.tokenizer.interface import JSON_FILE
from gptjax.tokenizer.known_templates import template_of
from gptjax.tokenizer.splitting import PATTERNS

NORMAL, UNUSED = 1, 5  # tokenizer.ggml.token_type, which has SentencePiece's numbers


def answer_ends(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text, or an answer where there is a chat template, eos_id first."""
    answers = template_of(tokenizer).stop_ids(tokenizer) if tokenizer.template else ()
    return list(dict.fromkeys([*tokenizer.end_ids, *answers]))


def tokenizer_keys(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> dict[str, Any]:
    """The keys, by their names behind "tokenizer.", of a tokenizer whose files for transformers lie in the folder.

    Ids up to the model's vocab_size that the tokenizer does not have become unused tokens. Raises InputError for a
    tokenizer that llama.cpp has no kind for.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        table, values = _pieces(tokenizer, vocab_size)
    else:
        table, values = _pairs(json.loads((folder / JSON_FILE).read_bytes()))
    rows = [table.get(i, (f"[PAD{i}]", UNUSED)) for i in range(vocab_size)]
    values |= {
        "tokens": [text for text, _ in rows], "token_type": [kind for _, kind in rows],
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "add_bos_token": tokenizer.begins,
        "add_eos_token": False,
    }  # fmt: skip
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    template = {name: config[name] for name in ("chat_template",) if name in config}
    ends = [i for i in answer_ends(tokenizer) if i != tokenizer.eos_id]
    unnamed = [i for i in ends if rows[i][0] not in ENDS or rows[i][1] != CONTROL]
    named = [i for i in ends if i not in unnamed]
    if len(unnamed) > 2:
        raise InputError(f"{1 + len(unnamed)} ids end a text, but a GGUF file has room for 3")
    values |= {f"{end}_token_id": i for end, i in zip(("eot", "eom"), [*unnamed, *named])}
    return {f"ggml.{key}": value for key, value in values.items()} | template


def _pieces(tokenizer: SentencePieceTokenizer, vocab_size: int) -> tuple[dict[int, tuple[str, int]], dict[str, Any]]:
    """Text and type of each id, and the other keys, of SentencePiece's byte pairs."""
    proto = tokenizer.proto()
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise InputError("as GGUF there is no SentencePiece tokenizer but of byte pairs; this one is a unigram model")
    scores = [piece.score for piece in proto.pieces] + [0.0] * (vocab_size - len(proto.pieces))
    table = {i: (piece.piece, piece.type) for i, piece in enumerate(proto.pieces)}
    return table, {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": tokenizer.adds_space}


def _pairs(spec: dict[str, Any]) -> tuple[dict[int, tuple[str, int]], dict[str, Any]]:
    """Text and type of each id, and the other keys, of a byte-level tokenizer.json."""
    model, split = spec["model"], spec.get("pre_tokenizer") or {}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())]
    cuts = _cuts(split.get("pretokenizers", [split]))
    pre = next((name for name, steps in SPLITS.items() if cuts == _cuts(steps) or not merges), None)
    if model.get("type") != "BPE" or model.get("byte_fallback") or spec.get("normalizer") or pre is None:
        raise InputError(
            f"as GGUF there is no tokenizer that cuts text as this one does; wanted one of {', '.join(SPLITS)}"
        )
    table = {i: (text, NORMAL) for text, i in model["vocab"].items()}
    for token in spec.get("added_tokens", []):
        table[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    return table, {"model": "gpt2", "pre": pre, "merges": merges or NO_MERGES}


def _cuts(steps: list[Any]) -> list[str]:
    """The expression, or else the whole step as JSON, by which each step cuts text, if it does."""
    cuts = []
    for step in steps:
        if isinstance(step, str):
            cuts.append(step)
        elif step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
            cuts += [PATTERNS["gpt2"]] if step.get("use_regex", True) else []
        elif step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            cuts.append(step["pattern"].get("Regex", "") or json.dumps(step))
        else:
            cuts.append(json.dumps(step, sort_keys=True))
    return cuts
