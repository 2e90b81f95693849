"""The device side of serving: fixed rows of one key-value cache, filled a chunk of a prompt at a time.

There are few programs, all compiled when the server starts: a prefill for each of two lengths, which fills a part of
one row, and a decode loop for each number of rows, which adds tokens to rows that lie side by side. What differs
between requests (their settings, how long they are) are arrays, never shapes.

So a row's numbers don't depend on what else is served: products are row by row, attention leaves out what a row does
not see to the bit, and random numbers belong to the row (see generation/engine.py). What may differ in the last bits is
the number of rows that a step computes: few requests take fewer rows than many. `batch_invariant` always computes all
of them, and then an answer is the same to the bit, alone or in company.

Beside the alphabet of sharding.py: I stop ids of a row, P tokens of a call of the decode loop, Q likeliest ids.
"""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.generation.engine import decode_params, drawable
from gptjax.generation.image_places import Pictures, device_ids, encode_picture, image_places, image_spans
from gptjax.generation.sampling import apply_repetition_penalty, filter_logits, greedy
from gptjax.model.cache import SERVED_BLOCK, served, served_cache
from gptjax.model.decoder import MASKED, Decoder, Params, cap_and_mask, extend
from gptjax.model.vision import ImageTokens
from gptjax.ops.decoding import decode_dtype
from gptjax.ops.linear import linear
from gptjax.parallel.sharding import constrain, constrain_tree, on_host, require_mesh
from gptjax.runs.load import LoadedModel
from gptjax.runtime.hardware import host_memory

PIECE = 4  # tokens of a row between two looks at who came and who went
TOP = 20  # likeliest ids that are told with a token at the most, as the OpenAI API has it
IMAGES = 64  # images whose tokens are kept for prompts that hold them again
STOPS = 8  # ids that end a row at the most
ROWS = (1, 4, 8)  # numbers of rows a step computes where fewer than all are taken

SETTINGS = {
    "temperature": np.float32, "top_k": np.float32, "top_p": np.float32, "min_p": np.float32,
    "repetition_penalty": np.float32, "presence_penalty": np.float32, "frequency_penalty": np.float32,
    "seed": np.uint32, "copy": np.int32,
}  # fmt: skip
"""Settings of a row, and their types: arrays over the rows."""


Scores = tuple[jax.Array, jax.Array, jax.Array]
"""log_p_B of ids, top_ids_BQ of the likeliest, and top_log_p_BQ; nats."""


class Drawn(NamedTuple):
    """Tokens that a call of the decode loop added: host arrays, a row for each that was computed."""

    count_R: np.ndarray
    """Tokens of each row."""
    ids_RP: np.ndarray
    log_p_RP: np.ndarray
    """Of the model itself: nats, at temperature 1, without a filter."""
    top_ids_RPQ: np.ndarray
    top_log_p_RPQ: np.ndarray
    """The likeliest ids, zeros where no row asked for them."""


class Engine:
    """A model laid out for serving, and the cache of its rows.

    `length` is how many tokens a row may hold, `chunk` how many of a prompt a call of the long prefill reads, at least
    all of an image where its tokens see each other. Its methods take turns on one thread: each takes the place of the
    arrays that it was given. Parameters on a mesh need that mesh set (jax.set_mesh); the cache's heads lie over its
    tensor axis, its rows on every device.
    """

    def __init__(self, model: LoadedModel, *, slots: int, length: int, chunk: int, batch_invariant: bool = False):
        cfg = model.decoder.cfg.anywhere()
        cfg = dataclasses.replace(cfg, dtype=decode_dtype(cfg.dtype), dropout=0.0)
        self.decoder = model.decoder.clone(cfg=cfg, vocab_size=drawable(model.decoder, model.tokenizer))
        require_mesh(model.params)
        self.params = decode_params(model.params, cfg.dtype)
        vision = cfg.vision
        self._whole = vision.num_tokens if vision.patch and vision.sees_all else 0
        self._images: OrderedDict[int, np.ndarray] = OrderedDict()
        chunk = max(chunk, self._whole)
        self.slots, self.length, self.chunk = slots, length, chunk
        self.tails = (min(chunk, max(8, chunk // 4)), chunk)
        self.sizes = (slots,) if batch_invariant else (*(r for r in ROWS if r < slots), slots)
        self.reset()

    def reset(self) -> None:
        """Forgets all rows: an empty cache."""
        # A chunk's padding is written, too: where chunks begin anywhere there is one more behind the last.
        unit = SERVED_BLOCK if self._whole else int(np.lcm(self.chunk, SERVED_BLOCK))
        most = self.length + (self.chunk if self._whole else 0)
        self.state = empty_state(self.decoder, self.params, self.slots, -(-most // unit) * unit)

    def warm_up(self) -> None:
        """Compiles every program, so that no request waits for it."""
        vision = self.decoder.cfg.vision
        for tail in self.tails:
            ids = [0] * min(tail, self.length)
            hidden_CD = self.prefill(0, ids, 0)
            self.score(hidden_CD, [0])
            if vision.patch:
                blank = {-1: np.zeros((vision.num_patches, vision.patch_size), np.uint8)}
                image = self.image_tokens([-1] * vision.num_tokens + ids, blank, 0, len(ids))
                self.prefill(0, ids, 0, image)
        self._images.clear()
        self.begin(0, [0], {})
        self.restrict(0, np.ones(1, bool), {})
        self.copy(0, 0)
        for size in self.sizes:
            rows = {name: np.zeros(size, dtype) for name, dtype in SETTINGS.items()}
            ends = {"last_R": np.zeros(size, np.int32), "stop_RI": np.full((size, STOPS), -1, np.int32)}
            self.decode(
                0, np.zeros(size, np.int32), np.zeros(size, np.int32), np.ones(size, bool), rows, ends, 0, False
            )

    def tail(self, count: int) -> int:
        """Length of the prefill that reads `count` tokens, of those that are compiled."""
        return next(size for size in self.tails if size >= count)

    def undivided(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """The places (start, end) of a prompt that must be read at once: of images whose tokens see each other."""
        return image_spans(ids, self._whole) if self._whole else []

    def image_tokens(self, ids: Sequence[int], pictures: Pictures, start: int, end: int) -> ImageTokens | None:
        """The images at the places start .. end of a prompt, padded as its prefill is; None where there are none."""
        if not pictures or all(i >= 0 for i in ids[start:end]):
            return None
        size = self.tail(end - start)
        x_CD = np.zeros((size, self.decoder.cfg.width), jnp.dtype(self.decoder.cfg.dtype))
        here_C, last_C = np.zeros(size, bool), np.arange(start, start + size, dtype=np.int32)
        offset_L, last_L = image_places(ids, self.decoder.cfg.vision)
        last_C[: end - start] = last_L[start:end]
        for n, (i, offset) in enumerate(zip(ids[start:end], offset_L[start:end].tolist())):
            if offset >= 0:
                here_C[n], x_CD[n] = True, self._encoded(i, pictures)[offset]
        return ImageTokens(x_CD[None], here_C[None], last_C[None])  # pyright: ignore

    def _encoded(self, place: int, pictures: Pictures) -> np.ndarray:
        """tokens_TD of an image."""
        if place not in self._images:
            self._images[place] = np.asarray(encode_picture(self.decoder, self.params, pictures[place]))
            if len(self._images) > IMAGES:
                self._images.popitem(last=False)
        self._images.move_to_end(place)
        return self._images[place]

    def prefill(self, slot: int, ids: Sequence[int], start: int, image: ImageTokens | None = None) -> jax.Array:
        """Reads at most a chunk of ids into the places start .. of a row; returns their final hidden states, padded.

        Where chunks start depends on the prompt alone, and so do a place's keys and values.
        """
        ids_C = np.zeros(self.tail(len(ids)), np.int32)
        ids_C[: len(ids)] = device_ids(ids)
        cache = self.state.pop("cache")
        x_CD, self.state["cache"] = prefill_row(
            self.decoder, self.params, cache, np.int32(slot), ids_C, np.int32(start), image
        )
        return x_CD

    def score(self, hidden_CD: jax.Array, next_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(log_p_C, top_ids_CQ, top_log_p_CQ): each next id's log-probability behind its hidden state, in nats."""
        ids_C = np.zeros(len(hidden_CD), np.int32)
        ids_C[: len(next_ids)] = next_ids
        found = on_host(list(score_next(self.decoder, self.params, hidden_CD, ids_C)))
        return tuple(x[: len(next_ids)] for x in found)  # type: ignore[return-value]

    def copy(self, source: int, slot: int) -> None:
        """Gives a row the cache of another."""
        self.state["cache"] = copy_row(self.state.pop("cache"), np.int32(source), np.int32(slot))

    def begin(self, slot: int, ids: Sequence[int], bias: dict[int, float]) -> None:
        """Makes a row ready for a new request: the ids that occurred, and what is added to logits."""
        seen_V, bias_V = (np.zeros(self.state["seen_SV"].shape[1], t) for t in (bool, np.float32))
        seen_V[[i for i in ids if i >= 0]] = True
        bias_V[list(bias)] = list(bias.values())
        state = {name: self.state.pop(name) for name in ("seen_SV", "count_SV", "bias_SV")}
        self.state |= begin_row(state, np.int32(slot), seen_V, bias_V)

    def restrict(self, slot: int, allowed_V: np.ndarray, bias: dict[int, float]) -> None:
        """Lets a row draw only the ids that are allowed."""
        bias_V = np.full(self.state["bias_SV"].shape[1], MASKED, np.float32)
        bias_V[: len(allowed_V)][allowed_V] = 0
        bias_V[list(bias)] += list(bias.values())
        self.state["bias_SV"] = set_row(self.state.pop("bias_SV"), np.int32(slot), bias_V)

    def decode(
        self,
        first: int,
        token_R: np.ndarray,
        position_R: np.ndarray,
        idle_R: np.ndarray,
        settings: dict[str, np.ndarray],
        ends: dict[str, np.ndarray],
        n: int,
        top: bool,
    ) -> Drawn:
        """Adds up to n tokens to each of the rows from `first` on that is not idle.

        token_R is each row's newest id, position_R its place, `settings` the arrays of SETTINGS, `ends` last_R, the
        place of the last token that a row may have, and stop_RI, the ids that end it, -1 where there are fewer.
        """
        state, out = decode_rows(
            self.decoder, self.params, self.state, np.int32(first), token_R, position_R, idle_R, settings, ends,
            np.int32(n), np.bool_(top),
        )  # fmt: skip
        self.state = state
        return Drawn(*on_host([out[name] for name in Drawn._fields]))


def most_length(decoder: Decoder, slots: int) -> int:
    """Tokens that each of so many rows can hold where all keys and values take half of the memory that is free."""
    cfg, device = decoder.cfg, jax.local_devices()[0]
    stats = device.memory_stats() or {}
    free = stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else host_memory()[1]
    token = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_size * jnp.dtype(decode_dtype(cfg.dtype)).itemsize
    return free // 2 // (token * slots)


def empty_state(decoder: Decoder, params: Params, slots: int, length: int) -> dict[str, Any]:
    """The cache of all rows; ids that occurred in each, how often in its answer, and what is added to its logits."""

    @jax.jit
    def make():
        V = params["embed_VD"].shape[0]
        rows = {"seen_SV": bool, "count_SV": jnp.int32, "bias_SV": jnp.float32}
        cache = served_cache(decoder.cfg, slots, length, jnp.dtype(decoder.cfg.dtype))
        return constrain_tree({name: jnp.zeros((slots, V), t) for name, t in rows.items()} | {"cache": cache})

    return make()


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="cache")
def prefill_row(
    decoder: Decoder, params: Params, cache: list[dict[str, jax.Array]], slot: jax.Array, ids_C: jax.Array,
    start: jax.Array, image: ImageTokens | None = None,
) -> tuple[jax.Array, list[dict[str, jax.Array]]]:  # fmt: skip
    """The final hidden states x_CD of a part of a prompt, and the cache with it from the row's place `start` on.

    Where `image`, whose rows are one, has a token, it is read in place of the id.
    """
    # Padding may lie behind the last position; its place in the cache is not seen before a token takes it.
    position_1C = jnp.minimum(start + jnp.arange(len(ids_C)), decoder.context - 1)[None]
    rows = served(cache, slot, (start + len(ids_C) - 1) // SERVED_BLOCK + 1)
    x_1CD, cache = extend(decoder, params, ids_C[None], position_1C, rows, image)
    return x_1CD[0], constrain_tree(cache)


@functools.partial(jax.jit, static_argnames="decoder")
def score_next(decoder: Decoder, params: Params, x_CD: jax.Array, next_C: jax.Array) -> Scores:
    """(log_p_C, top_ids_CQ, top_log_p_CQ) of the ids behind hidden states."""
    logits_CV = cap_and_mask(linear(x_CD[None], params, head="BLD,DV->BLV"), decoder.vocab_size,
                             decoder.cfg.logit_softcap)[0]  # fmt: skip
    return _scores(logits_CV, next_C)


def _scores(logits_BV: jax.Array, ids_B: jax.Array, top: jax.Array | bool = True) -> Scores:
    """log_p_B, and top_ids_BQ with top_log_p_BQ, zeros unless `top`."""
    total_B, Q = jax.nn.logsumexp(logits_BV, axis=-1), min(TOP, logits_BV.shape[-1])

    def likeliest(z_BV):
        top_BQ, ids_BQ = jax.lax.top_k(z_BV, Q)
        return ids_BQ, top_BQ - total_B[:, None]

    def none(z_BV):
        return jnp.zeros((len(z_BV), Q), jnp.int32), jnp.zeros((len(z_BV), Q))

    log_p_B = jnp.take_along_axis(logits_BV, ids_B[:, None], axis=-1)[:, 0] - total_B
    top_ids_BQ, top_log_p_BQ = jax.lax.cond(top, likeliest, none, logits_BV)
    return log_p_B, top_ids_BQ, top_log_p_BQ


@functools.partial(jax.jit, donate_argnames="cache")
def copy_row(cache: list[dict[str, jax.Array]], source: jax.Array, slot: jax.Array) -> list[dict[str, jax.Array]]:
    """The cache with one row's keys and values in another's place."""
    take, put = jax.lax.dynamic_index_in_dim, jax.lax.dynamic_update_index_in_dim
    return constrain_tree(jax.tree.map(lambda x: put(x, take(x, source, keepdims=False), slot, 0), cache))


@functools.partial(jax.jit, donate_argnames="state")
def begin_row(state: dict[str, jax.Array], slot: jax.Array, seen_V: jax.Array, bias_V: jax.Array) -> dict[str, Any]:
    """The state with a row as a new request finds it."""
    new = {"seen_SV": seen_V, "bias_SV": bias_V, "count_SV": jnp.zeros_like(state["count_SV"][0])}
    return constrain_tree({name: x.at[slot].set(new[name]) for name, x in state.items()})


@functools.partial(jax.jit, donate_argnames="x_SV")
def set_row(x_SV: jax.Array, slot: jax.Array, x_V: jax.Array) -> jax.Array:
    """x_SV with one row replaced."""
    return constrain(x_SV.at[slot].set(x_V), "SV")


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def decode_rows(
    decoder: Decoder,
    params: Params,
    state: dict[str, Any],
    first: jax.Array,
    token_R: jax.Array,
    position_R: jax.Array,
    idle_R: jax.Array,
    settings: dict[str, jax.Array],
    ends: dict[str, jax.Array],
    n: jax.Array,
    top: jax.Array,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """The state, and what `Drawn` holds, after up to n tokens of the rows from `first` on; see `Engine.decode`.

    An idle row computes what nobody reads, and writes it behind its prompt: what others may reuse of it stays.
    """
    R = len(token_R)
    row_R = jnp.arange(R)
    key_R = jax.vmap(lambda seed, copy: jax.random.fold_in(jax.random.key(seed), copy))(
        settings["seed"], settings["copy"]
    )
    zeros = {"ids_RP": jnp.int32, "log_p_RP": jnp.float32}
    Q = min(TOP, state["bias_SV"].shape[1])
    out = {name: jnp.zeros((R, PIECE), t) for name, t in zeros.items()}
    out |= {"top_ids_RPQ": jnp.zeros((R, PIECE, Q), jnp.int32), "top_log_p_RPQ": jnp.zeros((R, PIECE, Q))}

    def unfinished(carry):
        i, *_, done_R, _ = carry
        return (i < n) & ~jnp.all(done_R)

    def step(carry):
        i, state, token_R, position_R, count_R, done_R, out = carry
        blocks = jnp.where(done_R, 0, position_R).max() // SERVED_BLOCK + 1
        rows = served(state["cache"], first, blocks)
        x_RLD, cache = extend(decoder, params, token_R[:, None], position_R[:, None], rows)
        logits_RLV = linear(x_RLD, params, head="BLD,DV->BLV")
        logits_RV = cap_and_mask(logits_RLV, decoder.vocab_size, decoder.cfg.logit_softcap)[:, 0]
        keys = jax.vmap(jax.random.fold_in)(key_R, position_R + 1)
        part = {
            name: jax.lax.dynamic_slice_in_dim(state[name], first, R) for name in ("seen_SV", "count_SV", "bias_SV")
        }
        next_R = draw_rows(logits_RV, keys, settings, part["seen_SV"], part["count_SV"], part["bias_SV"])
        next_R = jnp.where(done_R, token_R, next_R)
        log_p_R, top_ids_RQ, top_log_p_RQ = _scores(logits_RV, next_R, top)
        added = {"ids_RP": next_R, "log_p_RP": log_p_R, "top_ids_RPQ": top_ids_RQ, "top_log_p_RPQ": top_log_p_RQ}
        out = {name: x.at[:, i].set(added[name]) for name, x in out.items()}
        position_R, count_R = (jnp.where(done_R, x_R, x_R + 1) for x_R in (position_R, count_R))
        counted = state["count_SV"].at[first + row_R, next_R].add(jnp.where(done_R, 0, 1))
        seen = state["seen_SV"].at[first + row_R, next_R].max(~done_R)
        stops_R = (next_R[:, None] == ends["stop_RI"]).any(axis=1)
        done_R = done_R | (position_R >= ends["last_R"]) | stops_R
        state = constrain_tree({"cache": cache, "seen_SV": seen, "count_SV": counted, "bias_SV": state["bias_SV"]})
        return i + 1, state, next_R, position_R, count_R, done_R, out

    start = (jnp.int32(0), state, token_R, position_R, jnp.zeros(R, jnp.int32), idle_R, out)
    _, state, _, _, count_R, _, out = jax.lax.while_loop(unfinished, step, start)
    return state, out | {"count_R": count_R}


def draw_rows(
    logits_RV: jax.Array, key_R: jax.Array, settings: dict[str, jax.Array], seen_RV: jax.Array, count_RV: jax.Array,
    bias_RV: jax.Array,
) -> jax.Array:  # fmt: skip
    """One id a row, by settings of its own: ids_R. Temperature 0 takes the likeliest.

    To the logits is added what the request says of single ids; presence and frequency penalties are the OpenAI API's:
    z - presence (count > 0) - frequency count, of the ids in the answer. The rest is `sampling.filter_logits`.
    """
    each = {name: x_R[:, None] for name, x_R in settings.items()}

    def penalised(z_RV):
        z_RV = apply_repetition_penalty(z_RV, seen_RV, each["repetition_penalty"])
        return z_RV - each["presence_penalty"] * (count_RV > 0) - each["frequency_penalty"] * count_RV

    def drawn(z_RV):
        z_RV = filter_logits(z_RV, {"temperature": each["temperature"]})
        for name, cuts_R in (("top_k", settings["top_k"] > 0), ("top_p", settings["top_p"] < 1)):
            wanted_R = jnp.where(cuts_R, settings[name], jnp.inf)  # which no sum reaches: all are kept
            cut = functools.partial(filter_logits, settings={name: wanted_R})
            z_RV = jax.lax.cond(cuts_R.any(), cut, lambda z: z, z_RV)
        z_RV = filter_logits(z_RV, {"min_p": each["min_p"]})
        return jax.vmap(jax.random.categorical)(key_R, z_RV).astype(jnp.int32)

    penalty_R = (settings["repetition_penalty"] != 1) | (settings["presence_penalty"] != 0)
    penalty_R |= settings["frequency_penalty"] != 0
    z_RV = jax.lax.cond(penalty_R.any(), penalised, lambda z: z, logits_RV) + bias_RV
    likeliest_R = greedy(z_RV)
    hot_R = settings["temperature"] > 0
    return jax.lax.cond(hot_R.any(), lambda z: jnp.where(hot_R, drawn(z), likeliest_R), lambda z: likeliest_R, z_RV)
