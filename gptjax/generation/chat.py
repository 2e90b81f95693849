"""Answers to messages, through the tokenizer's chat template."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gptjax.config import GenerateConfig
from gptjax.config.section import InputError
from gptjax.generation.engine import CHUNK, stream_text
from gptjax.generation.image_places import NO_PICTURES, Pictures
from gptjax.generation.image_prompts import reading_once, rendered_prompt
from gptjax.generation.text_stream import TextStream
from gptjax.model.decoder import Decoder, Params
from gptjax.tokenizer import Tokenizer
from gptjax.tokenizer.known_templates import template_of
from gptjax.tokenizer.templates import Message

if TYPE_CHECKING:
    from gptjax.generation.constraint import Constraint


def stream_answers(
    decoder: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    cfg: GenerateConfig,
    *,
    chunk: int = CHUNK,
    constraint: "Constraint | None" = None,
) -> Iterator[tuple[int, str]]:
    """Yields (conversation, piece of its answer) as `stream` does; an answer ends at the template's end of a turn too.

    Messages may hold pictures, as `dialogue.messages_of` reads them. Of cfg, `prompt` is not read. Raises InputError
    where the tokenizer has no template, a conversation is none that the template has, or does not fit, and for pictures
    that can't be read, or that the model does not read.
    """
    template, read = template_of(tokenizer), reading_once()
    prompts = [
        rendered_prompt(template.render(tokenizer, messages, True)[0], messages, decoder.cfg.vision, read)
        for messages in conversations
    ]
    pictures = {place: patches_PY for prompt in prompts for place, patches_PY in prompt.pictures.items()}
    more: Any = {"chunk": chunk, "constraint": constraint, "pictures": pictures}
    return _stream(decoder, params, tokenizer, [prompt.ids for prompt in prompts], cfg, chat=True, **more)


def continue_ids(
    decoder: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    cfg: GenerateConfig,
    *,
    chat: bool,
    pictures: Pictures = NO_PICTURES,
) -> list[str]:
    """The text that continues each prompt of ids, or with `chat` answers it, where a template has made the prompts.

    Of a prompt that leaves no room for cfg.max_new_tokens in the context the beginning is not read; cfg.prompt is read
    by nobody. `pictures` are the images whose ids stand in the prompts; none of these is cut. Raises InputError where
    max_new_tokens alone fills the context, and where a prompt with images does not fit.
    """
    most = decoder.context - cfg.max_new_tokens
    if most < 1:
        raise InputError(
            f"max_new_tokens={cfg.max_new_tokens}: wanted less than the model's context of {decoder.context}"
        )
    texts = [""] * len(prompts)
    cut = [ids if min(ids) < 0 else ids[-most:] for ids in prompts]
    for row, piece in _stream(decoder, params, tokenizer, cut, cfg, chat=chat, chunk=CHUNK, pictures=pictures):
        texts[row] += piece
    return texts


def _stream(
    decoder: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    cfg: GenerateConfig,
    *,
    chat: bool,
    chunk: int,
    constraint: "Constraint | None" = None,
    pictures: Pictures = NO_PICTURES,
) -> Iterator[tuple[int, str]]:
    stops, spaced = tokenizer.end_ids, False
    if chat:  # the space with which answers begin is the template's, or the tokenizer's
        template = template_of(tokenizer)
        stops, spaced = template.stop_ids(tokenizer), template.spaced(tokenizer)
    texts = [TextStream(tokenizer, cfg.stop, drops_space=spaced) for _ in prompts]
    more: Any = {"stop_ids": stops, "chunk": chunk, "constraint": constraint, "pictures": pictures}
    return stream_text(decoder, params, prompts, texts, cfg, **more)
