"""Texts as the ids that are scored, cut where lm-eval cuts them."""

from collections.abc import Sequence

from gptjax.config.section import InputError
from gptjax.data.images import Picture
from gptjax.generation.image_prompts import with_pictures
from gptjax.tokenizer import Tokenizer
from gptjax.tokenizer.known_templates import template_of
from gptjax.tokenizer.templates import Message


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """The ids of each (context, continuation).

    As in lm-eval, white space at the end of the context goes to the continuation, both are encoded as one text, and
    what is behind the context's own ids is the continuation. The id that begins a document stands in front where the
    tokenizer's prompts begin with it, or the context is empty. Raises InputError for a continuation without ids.
    """
    moved = []
    for context, continuation in pairs:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation))
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in moved])
    contexts = tokenizer.encode_batch([context for context, _ in moved])
    encoded = []
    for (context, continuation), whole, ids in zip(moved, wholes, contexts, strict=True):
        if len(whole) <= len(ids):
            raise InputError(
                f"the continuation {continuation[:40]!r} adds no token to {context[-40:]!r}; wanted a text that does"
            )
        front = [tokenizer.bos_id] if tokenizer.begins or not ids else []
        encoded.append(([*front, *ids], whole[len(ids) :]))
    return encoded


def encode_answers(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], pictures: Sequence[Sequence[Picture]] = ()
) -> list[tuple[list[int], list[int]]]:
    """The ids of each (message of a user, answer) through the tokenizer's chat template, without the answer's end.

    The pictures of each stand in front of its message, as -1, -2, ...: see `image_prompts.place_pictures`.
    """
    template = template_of(tokenizer)
    asked = [with_pictures(message, of) for (message, _), of in zip(pairs, pictures or [()] * len(pairs), strict=True)]
    begins: dict[tuple[str, int], list[int]] = {}
    encoded = []
    for (message, answer), content in zip(pairs, asked, strict=True):
        user: Message = {"role": "user", "content": content}
        key = message, len(content) if isinstance(content, list) else 0
        if key not in begins:
            begins[key] = template.render(tokenizer, [user], add_generation_prompt=True)[0]
        begun, messages = begins[key], [user, {"role": "assistant", "content": answer}]
        whole, written = template.render(tokenizer, messages)
        stop = next(i for i, one in reversed([*enumerate(written)]) if one)  # the last that the assistant writes
        if stop <= len(begun):
            raise InputError(f"the answer {answer[:40]!r} has no token behind {message[-40:]!r}; wanted a text")
        encoded.append((begun, whole[len(begun) : stop]))
    return encoded
