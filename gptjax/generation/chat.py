"""Answers to messages, through the tokenizer's chat template."""

from collections.abc import Iterator, Sequence

from gptjax.config import GenerateConfig
from gptjax.generation.engine import CHUNK, stream_text
from gptjax.generation.text_stream import TextStream
from gptjax.model.decoder import Decoder, Params
from gptjax.tokenizer import Tokenizer
from gptjax.tokenizer.known_templates import template_of
from gptjax.tokenizer.templates import Message


def stream_answers(
    decoder: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    cfg: GenerateConfig,
    *,
    chunk: int = CHUNK,
) -> Iterator[tuple[int, str]]:
    """Yields (conversation, piece of its answer) as `stream` does; an answer ends at the template's end of a turn too.

    Of cfg, `prompt` is not read. Raises InputError where the tokenizer has no template, a conversation is none that the
    template has, or does not fit.
    """
    template = template_of(tokenizer)
    prompts = [template.render(tokenizer, messages, add_generation_prompt=True)[0] for messages in conversations]
    # The space with which answers begin is the template's, or the tokenizer's.
    texts = [TextStream(tokenizer, cfg.stop, drops_space=template.spaced(tokenizer)) for _ in prompts]
    stops = template.stop_ids(tokenizer)
    return stream_text(decoder, params, prompts, texts, cfg, stop_ids=stops, chunk=chunk)
