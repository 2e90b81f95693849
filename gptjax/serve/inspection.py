"""A look inside a model: how it gets from a text to the next token, as numbers.

The forward pass of decoding is run layer by layer, with the model's own functions; attention's weights are what its
heads give for one-hot values. Images in the text are shown as the model has them: a square of its pixels, one cell of
it a token.
"""

import base64
import dataclasses
import functools
import json
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig, VisionConfig
from gptjax.config.section import InputError
from gptjax.data.images import Picture
from gptjax.generation.engine import drawable
from gptjax.generation.image_places import embed_images, image_places, image_spans
from gptjax.generation.image_prompts import ImagePrompt, rendered_prompt, text_prompt, with_pictures
from gptjax.model.block import heads, norm
from gptjax.model.decoder import Params, cap_and_mask, embed_tokens, final_norm, unstacked
from gptjax.ops.reference import cached
from gptjax.parallel.sharding import on_host
from gptjax.runs.load import LoadedModel
from gptjax.tokenizer import Tokenizer
from gptjax.tokenizer.known_templates import template_of

LENS = 3  # tokens a layer and place in the logit lens
NEXT = 50  # likeliest next tokens a place
NEIGHBOURS = 8  # tokens nearest to each token's embedding
MOST_WEIGHTS = 3_000_000  # of attention, over layers, heads and pairs of places: a byte each in the page
TEMPERATURES = tuple(i / 20 for i in range(1, 41))  # at which the page draws what is left to sample from
GRID = 32  # lengths that are computed: one program a multiple of it


class Inspection(NamedTuple):
    """The numbers of one text of L tokens in a model; N layers, H heads. Log-probabilities are in nats."""

    model: dict[str, Any]
    """run, step, layers, heads, kv_heads, width, parameters."""
    ids: list[int]
    """Of each token; -1, -2, ... where one of the first, the second, ... image stands."""
    tokens: list[str]
    loss: list[float | None]
    """-log p of each token given those before it; None for the first, and for an image's, which nothing predicts."""
    rank: list[int | None]
    """Ids that were likelier, of each token."""
    next_ids: list[list[int]]
    """The likeliest ids behind each place, the likeliest first."""
    next_log_p: list[list[float]]
    log_scale: list[list[float]]
    """log of the sum over all ids of p^(1 / T), by place and temperature T of TEMPERATURES: what log p / T is less, to
    be a log-probability at T."""
    lens: list[list[list[tuple[int, float]]]]
    """(id, probability) of the likeliest next tokens by the stream behind each layer, the final norm and the head: by
    layer (0: the embedding), place and rank (nostalgebraist 2020, "interpreting GPT: the logit lens")."""
    rms: list[list[float]]
    """Root mean square of the stream, by layer (0: the embedding) and place."""
    neighbours: dict[int, list[tuple[int, float]]]
    """(id, cosine) of the embeddings nearest to that of each id of the text; an image's tokens have none."""
    texts: dict[int, str]
    """The text of every id that occurs anywhere here."""
    weights: np.ndarray
    """weights_NHLL of attention, float32: row l is the share that place l takes from each place."""
    last: list[int]
    """The last place that each place sees: its own, or that of its image's last token."""
    images: list[dict[str, Any]]
    """start, side (tokens in a row of its square) and picture (a data: URL of what the model has of it) of each."""


def inspection_prompt(model: LoadedModel, text: str, pictures: Sequence[Picture], chat: bool) -> ImagePrompt:
    """A text with pictures in front of it as a model reads it; with `chat` as a user's message, up to the answer.

    Raises InputError for a model that reads no images, or has no chat template, and for pictures that can't be read.
    """
    tokenizer, vision = model.tokenizer, model.decoder.cfg.vision
    if not chat:
        return text_prompt(tokenizer, text, pictures, vision)
    messages = [{"role": "user", "content": with_pictures(text, pictures)}]
    ids, _ = template_of(tokenizer).render(tokenizer, messages, True)
    return rendered_prompt(ids, messages, vision)


def inspect(model: LoadedModel, text: str | ImagePrompt, tokenizer: Tokenizer | None = None) -> Inspection:
    """Runs a model on a text, or on ids with images; raises InputError where there is none, or too much of it.

    Too much is what the model can't read, or a page can't hold. `tokenizer` is the model's, where it has been opened
    already.
    """
    cfg, tokenizer = model.decoder.cfg, tokenizer or model.tokenizer
    prompt = ImagePrompt(tokenizer.prompt_ids(text), {}) if isinstance(text, str) else text
    ids, vision = prompt.ids, cfg.vision
    last = image_places(ids, vision)[1].tolist() if prompt.pictures else [*range(len(ids))]
    most = longest(cfg, model.decoder.context)
    pairs = cfg.num_layers * cfg.num_heads * (sum(last) + len(last))
    if not text or len(ids) > model.decoder.context or pairs > MOST_WEIGHTS:
        many = f", {sum(i < 0 for i in ids):,} of them an image's" if prompt.pictures else ""
        got = f"the text has {len(ids):,} tokens{many}" if text else "the text is empty"
        raise InputError(f"{got}; wanted 1 to {most:,}, which the page can show of {cfg.num_layers} layers")
    plain = dataclasses.replace(cfg.anywhere(), attention="plain", dtype="float32")
    vocab_size = drawable(model.decoder, tokenizer)
    with jax.set_mesh(model.mesh):
        params = unstacked(model.params, "float32")
        # No place sees a later one, so what stands behind the text changes nothing.
        length = min(model.decoder.context, -(-len(ids) // GRID) * GRID)
        tokens_BL = jnp.array([[*(max(i, 0) for i in ids), *[0] * (length - len(ids))]])
        positions_BL = jnp.arange(length)[None]
        image = embed_images(model.decoder.clone(cfg=plain), params, [ids], prompt.pictures, length)
        mask = cached(positions_BL if image is None else image.last_BL)
        x_BLD = embed_tokens(plain, params, tokens_BL, positions_BL, image)
        streams, weights = [x_BLD], []
        for p, window in zip(params["layers"], plain.layer_windows, strict=True):
            weights_LHL = _weights(plain, p, x_BLD, positions_BL, mask.query_BL, window)
            x_BLD, _ = model.decoder.block(plain, p, x_BLD, positions_BL, mask, None, None, window)
            streams.append(x_BLD)
            weights.append(on_host([weights_LHL])[0].transpose(1, 0, 2)[:, : len(ids), : len(ids)])
        read = functools.partial(_read, plain, vocab_size)
        lens = [on_host(list(read(params, x)[1:])) for x in streams]
        last_LV = read(params, streams[-1])[0]
        log_p_LV, *best = (x[: len(ids)] for x in on_host([last_LV, *jax.lax.top_k(last_LV, min(NEXT, vocab_size))]))
        log_scale_LT = on_host([_log_scale(last_LV)])[0][: len(ids)]
        neighbours = _neighbours(params["embed_VD"], vocab_size, sorted({i for i in ids if i >= 0}))
    at, is_text = np.arange(len(ids) - 1), np.array(ids[1:]) >= 0
    own_L = log_p_LV[at, np.maximum(ids[1:], 0)]
    rank = (log_p_LV[at] > own_L[:, None]).sum(axis=-1)
    spans = image_spans(ids, vision.num_tokens) if prompt.pictures else []
    number = {place: n for n, span in enumerate(spans, 1) for place in range(*span)}  # of the image at a place
    next_log_p, next_ids = (x.tolist() for x in best)
    lens_by_layer = [
        [list(zip(*row)) for row in zip(ids_LK[: len(ids)].tolist(), np.exp(log_p_LK[: len(ids)]).tolist())]
        for log_p_LK, ids_LK, _ in lens
    ]
    shown = {
        *(i for i in ids if i >= 0),
        *sum(next_ids, []),
        *(i for layer in lens_by_layer for row in layer for i, _ in row),
    }
    shown |= {other for near in neighbours.values() for other, _ in near}
    return Inspection(
        model={
            "run": str(model.run.folder), "step": model.step, "layers": cfg.num_layers, "heads": cfg.num_heads,
            "kv_heads": cfg.num_kv_heads, "width": cfg.width,
            "parameters": sum(x.size for x in jax.tree.leaves(model.params)),
        },
        ids=[-number[place] if place in number else i for place, i in enumerate(ids)],
        tokens=[
            f"image {number[place]}" if place in number else tokenizer.decode_bytes([i]).decode("utf-8", "replace")
            for place, i in enumerate(ids)
        ],
        loss=[None, *(-own if has else None for own, has in zip(own_L.tolist(), is_text))],
        rank=[None, *(r if has else None for r, has in zip(rank.tolist(), is_text))],
        next_ids=next_ids,
        next_log_p=next_log_p,
        log_scale=log_scale_LT.tolist(),
        lens=lens_by_layer,
        rms=[rms_L[: len(ids)].tolist() for *_, rms_L in lens],
        neighbours=neighbours,
        texts={i: tokenizer.decode_bytes([i]).decode("utf-8", "replace") for i in sorted(shown)},
        weights=np.stack(weights),
        last=last,
        images=[
            {"start": start, "side": vision.side // vision.patch // vision.merge,
             "picture": _picture_url(prompt.pictures[ids[start]], vision)}
            for start, _ in spans
        ],
    )  # fmt: skip


def longest(cfg: ModelConfig, context: int) -> int:
    """Tokens of the longest text whose weights of attention a page holds, and the model reads."""
    pairs = MOST_WEIGHTS // (cfg.num_layers * cfg.num_heads)
    return min(context, int((2 * pairs + 0.25) ** 0.5 - 0.5))


@functools.partial(jax.jit, static_argnames=("cfg", "window"))
def _weights(
    cfg: ModelConfig,
    p: Params,
    x_BLD: jax.Array,
    positions_BL: jax.Array,
    last_BL: jax.Array,
    window: int | None,
) -> jax.Array:
    """weights_LHL of one layer's attention, in which each place sees those up to last_BL."""
    h_BLD = norm(x_BLD, p.get("norm_attn_D"), p.get("norm_attn_bias_D"), cfg)
    L = x_BLD.shape[1]
    one_hot = jnp.broadcast_to(jnp.eye(L)[None, :, None], (1, L, cfg.num_kv_heads, L))
    return heads(cfg, p, h_BLD, positions_BL, cached(last_BL), None, None, window, values=one_hot)[0][0]


@functools.partial(jax.jit, static_argnames=("cfg", "vocab_size"))
def _read(cfg: ModelConfig, vocab_size: int, params: Params, x_BLD: jax.Array) -> tuple[jax.Array, ...]:
    """log_p_LV of the next token by a stream, as the last layer's is read, the likeliest (log p, id) and its rms_L."""
    logits_BLV = jnp.einsum("BLD,DV->BLV", final_norm(cfg, params, x_BLD), params["head_DV"], precision="highest")
    log_p_LV = jax.nn.log_softmax(cap_and_mask(logits_BLV, vocab_size, cfg.logit_softcap))[0, :, :vocab_size]
    return log_p_LV, *jax.lax.top_k(log_p_LV, min(LENS, vocab_size)), jnp.sqrt(jnp.square(x_BLD[0]).mean(axis=-1))


@jax.jit
def _log_scale(log_p_LV: jax.Array) -> jax.Array:
    """log_scale_LT, see Inspection; a temperature at a time, since each takes as much room as log_p_LV."""
    return jax.lax.map(lambda T: jax.nn.logsumexp(log_p_LV / T, axis=-1), jnp.array(TEMPERATURES)).T


def _neighbours(embed_VD: jax.Array, vocab_size: int, ids: list[int]) -> dict[int, list[tuple[int, float]]]:
    """The nearest other ids of each id by the cosine of their embeddings."""
    unit_VD = np.array(on_host([embed_VD])[0][:vocab_size], np.float32)
    unit_VD /= np.maximum(np.linalg.norm(unit_VD, axis=-1, keepdims=True), 1e-12)
    cosine_IV = unit_VD[ids] @ unit_VD.T
    cosine_IV[np.arange(len(ids)), ids] = -2
    cosine_IK, near_IK = (x.tolist() for x in on_host(list(jax.lax.top_k(cosine_IV, min(NEIGHBOURS, vocab_size)))))
    return {i: list(zip(near_IK[row], cosine_IK[row])) for row, i in enumerate(ids)}


def _picture_url(patches_PY: np.ndarray, vision: VisionConfig) -> str:
    """The square of a picture's pixels as a PNG (ISO/IEC 15948) in a data: URL."""
    rows, patch = vision.side // vision.patch, vision.patch
    cut = patches_PY.reshape(rows, rows, patch, patch, 3).swapaxes(1, 2)
    lines = cut.reshape(vision.side, -1)
    data = zlib.compress(np.pad(lines, ((0, 0), (1, 0))).tobytes(), 9)  # filter 0 in front of each line
    header = struct.pack(">IIBBBBB", vision.side, vision.side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        png += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def inspection_json(found: Inspection) -> dict[str, Any]:
    """Everything as JSON; the weights of attention are bytes (255 times the weight, by layer, head, and place: those
    that it sees alone, up to `last`), in base64."""
    seen_LL = np.arange(len(found.ids)) <= np.array(found.last)[:, None]
    weights_NHS = np.round(255 * found.weights[:, :, seen_LL]).astype(np.uint8)
    log_scale = [[round(x, 6) for x in row] for row in found.log_scale]
    weights = base64.b64encode(weights_NHS.tobytes()).decode()
    return found._asdict() | {"log_scale": log_scale, "weights": weights}


def inspection_page(found: Inspection) -> str:
    """One HTML file that shows it all, and loads nothing: the server's page with its files and the numbers in it."""
    web = Path(__file__).parent / "web"
    data = json.dumps(inspection_json(found), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    html = (web / "inspect.html").read_text(encoding="utf-8")
    html = re.sub(r"(?s)<!-- server -->.*?<!-- end -->\n", "", html)  # what asks a server, and where it is

    def inlined(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        text = (web / name).read_text(encoding="utf-8")
        return f"<style>\n{text}</style>" if name.endswith(".css") else f"<script>\n{text}</script>"

    html = re.sub(
        r'<link rel="stylesheet" href="/web/(\w+\.css)">|<script src="/web/(\w+\.js)"></script>', inlined, html
    )
    return html.replace("__DATA__", data)


def inspection_table(found: Inspection) -> list[str]:
    """Lines for a terminal: each token with its loss, its rank, and the likeliest token in its place."""
    lines = [f"{'token':<16}{'loss':>8}{'likelier':>10}  likeliest there"]
    for i, token in enumerate(found.tokens):
        if found.ids[i] < 0:
            if found.ids[i - 1] != found.ids[i] or i == 0:
                lines.append(f"<{token}: {found.ids.count(found.ids[i])} tokens>")
            continue
        loss, rank = found.loss[i], found.rank[i]
        guess = "" if i == 0 else f"{found.texts[found.next_ids[i - 1][0]]!r}"
        share = "" if i == 0 else f" {np.exp(found.next_log_p[i - 1][0]):.1%}"
        numbers = f"{'':>18}" if loss is None else f"{loss:>8.3f}{rank:>10,}"
        lines.append(f"{token!r:<16.16}{numbers}  {guess}{share}")
    after = ", ".join(
        f"{found.texts[i]!r} {np.exp(p):.1%}" for i, p in zip(found.next_ids[-1][:5], found.next_log_p[-1])
    )
    known = [x for x in found.loss if x is not None]
    mean = f"; mean loss {np.mean(known):.4f} nats a token" if known else ""
    return [*lines, f"next: {after}{mean}"]
