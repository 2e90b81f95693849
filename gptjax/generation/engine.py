"""Continues prompts: one compiled prefill, and one compiled decode loop with the key-value cache in it.

The cache's slots are positions. Prompts of different lengths are padded on the right; a row's own tokens overwrite
the padding before it is ever seen. The loop runs at most n tokens a call, n an argument: a stream calls the very
program that an unstreamed text runs, only more often. A step reads every slot, so there are not many more of them than
tokens: a cache that is full grows, and what reads it is compiled again.

Random numbers belong to a row, never to a batch: the token at position p is drawn with
fold_in(fold_in(key(seed), copy), p), where `copy` counts the earlier rows of the batch with the same prompt. So a seed
gives a prompt the same text whatever else is in the batch and wherever it stands in it (as far as rounding does not
depend on the batch's shape), and a prompt that is given several times gets different samples. Rows with different
prompts share random numbers; a caller that needs them independent numbers the rows itself (`copies`).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import GenerateConfig
from gptjax.config.section import InputError
from gptjax.generation.sampling import SamplingParams, active, draw_ids, sample
from gptjax.generation.text_stream import TextStream
from gptjax.model.cache import empty_cache, grow, headroom, round_up_length
from gptjax.model.decoder import MASKED, Decoder, Params, cap_and_mask, extend, unstacked
from gptjax.model.vision import ImageTokens
from gptjax.ops.decoding import decode_dtype
from gptjax.ops.linear import linear
from gptjax.parallel.sharding import constrain_tree, on_host, require_mesh
from gptjax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gptjax.data.images import Picture
    from gptjax.generation.constraint import Constraint
    from gptjax.generation.image_places import Pictures

DecodeState = dict[str, Any]

CHUNK = 16  # tokens a call of the loop while text is streamed or searched for a stop text


def drawable(decoder: Decoder, tokenizer: Tokenizer) -> int:
    """The number of ids that are drawn: published models have rows of the embedding that no token has."""
    return min(decoder.vocab_size, tokenizer.vocab_size)


def generate(
    decoder: Decoder, params: Params, tokenizer: Tokenizer, cfg: GenerateConfig, images: "Sequence[Picture]" = ()
) -> list[str]:
    """The text that continues each prompt: what `stream` yields, joined."""
    texts, chunk = [""] * len(cfg.prompt), CHUNK if cfg.stop else cfg.max_new_tokens
    for row, piece in stream(decoder, params, tokenizer, cfg, chunk=chunk, images=images):
        texts[row] += piece
    return texts


def stream(
    decoder: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    cfg: GenerateConfig,
    *,
    chunk: int = CHUNK,
    constraint: "Constraint | None" = None,
    images: "Sequence[Picture]" = (),
) -> Iterator[tuple[int, str]]:
    """Yields (row, piece of its text) as the tokens come, at most `chunk` of them at a time.

    The images stand before each prompt, in their order. No piece splits a character, shows a stop text or anything
    behind it; joined, the pieces of a row are its text whatever `chunk` is. A character that the last token leaves
    incomplete comes out as U+FFFD. Parameters that lie sharded on a mesh need that mesh set (jax.set_mesh). Raises
    InputError where a prompt does not fit, or an image can't be read.
    """
    if not images:
        prompts, pictures = [tokenizer.prompt_ids(prompt) for prompt in cfg.prompt], None
    else:
        from gptjax.generation.image_prompts import reading_once, text_prompt

        read = reading_once()
        made = [text_prompt(tokenizer, prompt, images, decoder.cfg.vision, read) for prompt in cfg.prompt]
        prompts, pictures = [prompt.ids for prompt in made], made[0].pictures  # the same of all
    spaced = tokenizer.opens_with_space
    texts = [TextStream(tokenizer, cfg.stop, drops_space=spaced and not prompt) for prompt in cfg.prompt]
    more: Any = {"stop_ids": tokenizer.end_ids, "chunk": chunk, "constraint": constraint, "pictures": pictures}
    return stream_text(decoder, params, prompts, texts, cfg, **more)


def stream_text(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[TextStream],
    cfg: GenerateConfig,
    *,
    stop_ids: Sequence[int],
    chunk: int = CHUNK,
    constraint: "Constraint | None" = None,
    pictures: "Pictures | None" = None,
) -> Iterator[tuple[int, str]]:
    """Yields what `stream` does for prompts of ids, each with the TextStream that makes text of what continues it.

    `pictures` are the images whose ids stand in the prompts, as in `stream_ids`.
    """
    # Published models have rows of the embedding that no token of their tokenizer has: these are never drawn.
    decoder = decoder.clone(vocab_size=min([decoder.vocab_size, *(text.vocab_size for text in texts)]))
    finished: set[int] = set()
    left = [cfg.max_new_tokens] * len(prompts)
    more: Any = {"stop_ids": stop_ids, "chunk": chunk, "finished": finished, "constraint": constraint}
    more["pictures"] = pictures
    for news in stream_ids(decoder, params, prompts, cfg, **more):
        for row, ids in enumerate(news):
            if row in finished:
                continue
            left[row] -= len(ids)
            ended = left[row] == 0 or (len(ids) > 0 and ids[-1] in stop_ids)
            piece = texts[row].push(ids, final=ended)
            if piece:
                yield row, piece
            if ended or texts[row].stopped:
                finished.add(row)


def generate_ids(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    cfg: GenerateConfig,
    *,
    stop_ids: Sequence[int] = (),
    copies: Sequence[int] = (),
    pictures: "Pictures | None" = None,
) -> list[list[int]]:
    """The ids that continue each prompt's ids; the last one is in stop_ids where the row ended by itself.

    Of cfg, the texts (`prompt`, `stop`) are not read. Raises InputError as `stream_ids` does.
    """
    result: list[list[int]] = [[] for _ in prompts]
    chunk = cfg.max_new_tokens
    more: Any = {"stop_ids": stop_ids, "copies": copies, "chunk": chunk, "pictures": pictures}
    for news in stream_ids(decoder, params, prompts, cfg, **more):
        for row, ids in zip(result, news, strict=True):
            row += ids
    return result


def stream_ids(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    cfg: GenerateConfig,
    *,
    stop_ids: Sequence[int] = (),
    copies: Sequence[int] = (),
    chunk: int = CHUNK,
    finished: set[int] | frozenset[int] = frozenset(),
    constraint: "Constraint | None" = None,
    pictures: "Pictures | None" = None,
) -> Iterator[list[list[int]]]:
    """Yields each row's new ids, at most `chunk` at a time, until every row has met a stop id or max_new_tokens.

    The caller may add to `finished`, between two yields, rows that need no more tokens; `copies` tells the random
    numbers of rows apart (see the top of this file) where counting equal prompts will not do. A constraint, whose end
    ids are `stop_ids`, holds for the new ids of each row; tokens come one at a time then. An image in a prompt is its
    id, which is negative, at all of its places; `pictures` has its patches. Raises InputError where a prompt is empty,
    holds an id outside the vocabulary or of no image, or leaves no room for max_new_tokens within the context, where
    these are too few for the constraint, and where params lie on several devices with no mesh set.
    """
    if not prompts:
        return
    _check(decoder, prompts, cfg, pictures or {})
    require_mesh(params)
    if (dtype := decode_dtype(decoder.cfg.dtype)) != decoder.cfg.dtype:
        decoder = decoder.clone(cfg=dataclasses.replace(decoder.cfg.anywhere(), dtype=dtype))
    params = decode_params(params, dtype)
    length_B = np.array([len(ids) for ids in prompts], np.int32)
    prompt_BL = np.zeros((len(prompts), round_up_length(length_B.max(), decoder.context)), np.int32)
    for row, ids in enumerate(prompts):
        prompt_BL[row, : len(ids)] = np.maximum(ids, 0)
    image = None
    if pictures:  # texts alone import nothing of it
        from gptjax.generation.image_places import embed_images

        image = embed_images(decoder, params, prompts, pictures, prompt_BL.shape[1])
    seen = [tuple(ids) for ids in prompts]
    copies = copies or [seen[:row].count(ids) for row, ids in enumerate(seen)]
    rows = {"copy_B": np.array(copies, np.int32), "last_B": length_B + cfg.max_new_tokens - 1}
    settings, seed, stops = active(cfg), np.uint32(cfg.seed), np.array(stop_ids, np.int32)
    most = length_B.max() + cfg.max_new_tokens
    slots = round_up_length(min(length_B.max() + headroom(len(prompts)), most), decoder.context)
    state = prefill(decoder, params, prompt_BL, length_B, slots, "repetition_penalty" in settings, image=image)
    position_B, running_B = length_B - 1, ~np.isin(np.arange(len(prompts)), list(finished))
    states = [constraint.start() for _ in prompts] if constraint else []
    if constraint:
        constraint.check(cfg.max_new_tokens, cfg.dotted("max_new_tokens"))
    while running_B.any():
        filled = position_B[running_B].max() + 1
        if filled == slots:
            slots = round_up_length(min(filled + headroom(len(prompts)), most), decoder.context)
            state = grow(state, slots)
        n = np.int32(1 if constraint else min(chunk, slots - filled))
        if constraint:
            left_B = (rows["last_B"] - position_B).tolist()
            rows["allowed_BV"] = constraint.masks(states, left_B, params["embed_VD"].shape[0])
        state = decode(decoder, params, state, rows, settings, seed, stops, ~running_B, n)
        tokens_BM, new_B, done_B = on_host([state[name] for name in ("tokens_BM", "position_B", "done_B")])
        news = [row[a + 1 : b + 1].tolist() for row, a, b in zip(tokens_BM, position_B, new_B, strict=True)]
        if constraint:
            states = [constraint.advance(s, ids[0]) if ids else s for s, ids in zip(states, news)]
        yield news
        position_B, running_B = new_B, ~(done_B | np.isin(np.arange(len(prompts)), list(finished)))


def _check(decoder: Decoder, prompts: Sequence[Sequence[int]], cfg: GenerateConfig, pictures: "Pictures") -> None:
    context = decoder.context
    for row, ids in enumerate(prompts):
        name = f"{cfg.dotted('prompt')}[{row}]"
        if len(ids) == 0:
            raise InputError(f"{name} has no tokens; wanted at least one, such as the one that begins a document")
        if pictures and min(ids) < 0:
            from gptjax.generation.image_places import check_images

            check_images(ids, pictures, decoder.cfg.vision, name)
        wrong = next((i for i in ids if not (0 <= i < decoder.vocab_size or i in pictures)), None)
        if wrong is not None:
            raise InputError(f"{name} holds token id {wrong}; wanted 0 to {decoder.vocab_size - 1}")
        free = context - len(ids)
        if free < 1:
            raise InputError(
                f"{name} has {len(ids)} tokens; wanted at most {context - 1}, "
                f"since the model was trained with data.length={context}; shorten the prompt"
            )
        if cfg.max_new_tokens > free:
            setting = cfg.dotted("max_new_tokens")
            raise InputError(
                f"{setting}={cfg.max_new_tokens}: wanted at most {free}, since {name} takes {len(ids)} of the model's "
                f"{context} positions; add --{setting.replace('_', '-')} {free} or shorten the prompt"
            )


decode_params = jax.jit(unstacked, static_argnames="dtype")


@functools.partial(jax.jit, static_argnames=("decoder", "slots", "keep_seen", "keep_log_p"))
def prefill(
    decoder: Decoder,
    params: Params,
    prompt_BL: jax.Array,
    length_B: jax.Array,
    slots: int,
    keep_seen: bool,
    keep_log_p: bool = False,
    image: ImageTokens | None = None,
) -> DecodeState:
    """The state of a batch that has read its prompts, padded on the right to L: all that `decode` goes on from.

    At the places of images prompt_BL holds 0, and `image` what is read there.

    tokens_BM holds the ids known so far, position_B the place of each row's last one, done_B the rows that ended, the
    cache the keys and values at every prompt position, seen_BV (for the repetition penalty) the ids that occurred,
    log_p_BM (where it is kept) the log-probability of each id that `decode` drew, in nats, at its one setting, the
    temperature: `sampling.draw_ids`.
    """
    B, L = prompt_BL.shape
    position_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    cache = constrain_tree(empty_cache(decoder.cfg, B, slots, jnp.dtype(decoder.cfg.dtype)))
    _, cache = extend(decoder, params, prompt_BL, position_BL, cache, image)
    state: DecodeState = {
        "cache": cache,
        "tokens_BM": jnp.pad(prompt_BL, ((0, 0), (0, slots - L))),
        "position_B": length_B - 1,
        "done_B": jnp.zeros(B, bool),
    }
    if keep_seen:
        none_BV, text_BL = jnp.zeros((B, params["embed_VD"].shape[0]), bool), position_BL < length_B[:, None]
        text_BL = text_BL if image is None else text_BL & ~image.here_BL
        state["seen_BV"] = none_BV.at[jnp.arange(B)[:, None], prompt_BL].max(text_BL)
    if keep_log_p:
        state["log_p_BM"] = jnp.zeros((B, slots), jnp.float32)
    return constrain_tree(state)


@functools.partial(jax.jit, static_argnames="copies")
def repeat_rows(state: DecodeState, copies: int) -> DecodeState:
    """The state with each row `copies` times, side by side: of a prompt that was read once, several answers."""
    return constrain_tree(jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), state))


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def decode(
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    rows: dict[str, jax.Array],
    settings: SamplingParams,
    seed: jax.Array,
    stop_ids: jax.Array,
    finished_B: jax.Array,
    n: jax.Array,
) -> DecodeState:
    """Adds up to n tokens to every row that is not done; ends early where all are.

    `rows` holds what is constant: copy_B (see the top of this file) and last_B, the position of the last token that a
    row may have; for one step also allowed_BV, the ids that may be drawn. Each step feeds the row's last token (the
    prompt's last one, too: it costs one step and saves the prefill its head), so the cache of the newest token is
    always still to be written.
    """
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows["copy_B"])
    row_B = jnp.arange(len(key_B))

    def unfinished(carry):
        i, state = carry
        return (i < n) & ~jnp.all(state["done_B"])

    def step(carry):
        i, state = carry
        position_B, done_B = state["position_B"], state["done_B"]
        token_B = state["tokens_BM"][row_B, position_B]
        x_BLD, cache = extend(decoder, params, token_B[:, None], position_B[:, None], state["cache"])
        logits_BLV = linear(x_BLD, params, head="BLD,DV->BLV")
        logits_BV = cap_and_mask(logits_BLV, decoder.vocab_size, decoder.cfg.logit_softcap)[:, 0]
        if "allowed_BV" in rows:
            logits_BV = jnp.where(rows["allowed_BV"], logits_BV, MASKED)
        keys = jax.vmap(jax.random.fold_in)(key_B, position_B + 1)
        if "log_p_BM" in state:
            next_B, log_p_B = draw_ids(logits_BV, keys, settings["temperature"])
        else:
            next_B, log_p_B = sample(logits_BV, keys, settings, state.get("seen_BV")), None
        next_B = jnp.where(done_B, token_B, next_B)
        position_B = jnp.where(done_B, position_B, position_B + 1)
        done_B = done_B | (position_B >= rows["last_B"]) | jnp.isin(next_B, stop_ids)
        new: DecodeState = {"cache": cache, "position_B": position_B, "done_B": done_B}
        new["tokens_BM"] = state["tokens_BM"].at[row_B, position_B].set(next_B)
        if log_p_B is not None:
            log_p_B = jnp.where(state["done_B"], state["log_p_BM"][row_B, position_B], log_p_B)
            new["log_p_BM"] = state["log_p_BM"].at[row_B, position_B].set(log_p_B)
        if "seen_BV" in state:
            new["seen_BV"] = state["seen_BV"].at[row_B, next_B].set(True)
        return i + 1, constrain_tree(new)

    state = {**state, "done_B": state["done_B"] | finished_B}
    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]
