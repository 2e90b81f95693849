"""Likelihoods of texts under a model: the one function behind every task, and what others' harnesses call.

Only the outputs that predict something meet the head, some at a time, so that no array of a whole row's logits exists.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import VisionConfig
from gptjax.config.section import InputError
from gptjax.evals.trees import Path, Row, lay_out
from gptjax.generation.image_places import NO_PICTURES, Pictures, check_images, image_places
from gptjax.model.block import block
from gptjax.model.cache import round_up_length
from gptjax.model.decoder import Decoder, cap_and_mask, head
from gptjax.model.vision import Images
from gptjax.ops.linear import loss_chunks
from gptjax.parallel.sharding import on_host, to_global

# Of a row of several texts, unless one is longer: with longer rows more scores are computed in vain, with shorter ones
# more room is left at their ends.
ROW = 512
# Texts of more tokens are not laid out as trees, whose attention holds all scores of a row.
MOST_SHARED = 2048

Ids = Sequence[int]


class Likelihood(NamedTuple):
    """The log-probability of a continuation, in nats."""

    total: float
    """Their sum over its tokens."""
    greedy: bool
    """No other token is likelier than its own, at any place."""
    log_probs: np.ndarray
    """One a token, float32."""
    truncated: int
    """Tokens of the context that were cut off on its left, for the model's context is shorter."""


class Scorer:
    """Computes likelihoods with parameters that lie on a mesh, in batches of `batch_tokens` tokens a device.

    Beginnings that several texts have in common are computed once (`share`), unless the model has a block of the
    user's own or a window that is shorter than the texts. A likelihood depends on what else is in its batch by rounding
    only. `tokens` counts what was computed, without filling; `truncated` the texts that were cut off on their left.
    """

    def __init__(self, decoder: Decoder, params: Any, mesh: Mesh, *, batch_tokens: int = 2048, share: bool = True):
        self.decoder, self.params, self.mesh = decoder, params, mesh
        self.batch_tokens = batch_tokens
        self.tokens = self.truncated = 0
        own_block = decoder.block is not block
        windows = [window for window in decoder.cfg.layer_windows if window is not None]
        self._alone = own_block
        # By place two texts of one row are further apart than by position: a window would hide what it should not.
        self._most_shared = min(MOST_SHARED, *windows, math.inf) if share and not own_block else 0

    def loglikelihoods(self, requests: Iterable[tuple[Ids, Ids]], pictures: Pictures = NO_PICTURES) -> list[Likelihood]:
        """The likelihood of each (context, continuation), both ids, in the order given.

        Where both are longer than the model's context, the context loses tokens on its left, as in lm-eval. An image in
        a context is its id, which is negative, at all of its places, and `pictures` has its patches; such a context is
        not cut. Raises InputError where one of them is empty, an id is outside the vocabulary or of no image, a
        continuation alone is too long, or a context with images is.
        """
        paths, cut = [], []
        for number, (context, continuation) in enumerate(requests):
            self._check(number, context, continuation, pictures)
            ids = [*context, *continuation]
            cut.append(max(0, len(ids) - 1 - self.decoder.context))
            if cut[-1] and min(context) < 0:
                raise InputError(
                    f"request {number}: with its images it has {len(ids)} tokens; wanted at most "
                    f"{self.decoder.context + 1}, for what holds images is not cut"
                )
            paths.append(Path(number, ids[cut[-1] :], len(context) - cut[-1]))
        self.truncated += sum(n > 0 for n in cut)
        scored = self._score(paths, pictures)
        return [
            Likelihood(float(log_probs.sum(dtype=np.float64)), bool(greedy.all()), log_probs, n)
            for (log_probs, greedy), n in zip(scored, cut, strict=True)
        ]

    def rolling(self, documents: Iterable[Ids], first: int) -> list[Likelihood]:
        """The likelihood of whole documents, the id `first` in front of each; an empty one has likelihood 1.

        One that is longer than the model's context is cut into windows, of which each predicts what the one before did
        not reach, and the last one reads as much as fits: lm-eval's loglikelihood_rolling.
        """
        windows = [list(rolling_windows(document, first, self.decoder.context)) for document in documents]
        flat = iter(self.loglikelihoods(window for of_document in windows for window in of_document))
        found = []
        for of_document in windows:
            parts = [next(flat) for _ in of_document]
            log_probs = np.concatenate([np.zeros(0, np.float32), *(part.log_probs for part in parts)])
            greedy = all(part.greedy for part in parts)
            found.append(Likelihood(float(log_probs.sum(dtype=np.float64)), greedy, log_probs, 0))
        return found

    def _check(self, number: int, context: Ids, continuation: Ids, pictures: Pictures) -> None:
        size, limit = self.decoder.vocab_size, self.decoder.context
        if pictures and min(context, default=0) < 0:
            check_images(context, pictures, self.decoder.cfg.vision, f"request {number}: its context")
            context = [i for i in context if i not in pictures]
        for name, ids in (("context", context), ("continuation", continuation)):
            if len(ids) == 0:
                raise InputError(f"request {number}: its {name} has no tokens; wanted at least one")
            if not 0 <= min(ids) <= max(ids) < size:
                wrong = next(i for i in ids if not 0 <= i < size)
                raise InputError(f"request {number}: its {name} holds token id {wrong}; wanted 0 to {size - 1}")
        if len(continuation) > limit:
            raise InputError(
                f"request {number}: its continuation has {len(continuation)} tokens; wanted at most {limit}, the "
                "model's context"
            )

    def _score(self, paths: list[Path], pictures: Pictures) -> list[tuple[np.ndarray, np.ndarray]]:
        """log p, and whether no token is likelier, of each target of each path."""
        found: list[Any] = [None] * len(paths)
        for rows, length, share in self._batches(paths):
            log_prob_BC, greedy_BC = self._forward(rows, length, share, pictures)
            for row, log_prob_C, greedy_C in zip(rows, log_prob_BC, greedy_BC):
                at = 0
                for path in row.paths:
                    stop = at + path.num_scored
                    found[path.owner], at = (log_prob_C[at:stop], greedy_C[at:stop]), stop
        return found

    def _batches(self, paths: list[Path]) -> Iterator[tuple[list[Row], int, bool]]:
        """Yields (rows, their length, whether they are trees); there are few lengths, since each is compiled for."""
        groups: dict[tuple[int, ...], list[Path]] = {}
        for path in paths:
            groups.setdefault(tuple(path.ids[: path.given]), []).append(path)
        least = 1 if self._alone else round_up_length(sum(path.num_inputs for path in paths), ROW)
        classes: dict[tuple[int, bool], list[list[Path]]] = {}
        for group in groups.values():
            longest = 1 << (max(path.num_inputs for path in group) - 1).bit_length()
            share = max(least, longest) <= self._most_shared
            length = max(least, longest if share else min(longest, self.decoder.context))
            classes.setdefault((length, share), []).append(group)
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        for (length, share), of_class in sorted(classes.items(), key=lambda item: item[0]):
            rows = lay_out(of_class, length, share, self._alone)
            size = shards * max(1, min(self.batch_tokens // length, -(-len(rows) // shards)))
            rows += [Row() for _ in range(-len(rows) % size)]
            for start in range(0, len(rows), size):
                yield rows[start : start + size], length, share

    def _forward(self, rows: list[Row], length: int, share: bool, pictures: Pictures) -> tuple[np.ndarray, np.ndarray]:
        self.tokens += sum(len(row.tokens) for row in rows)
        filled = [row.filled(length) for row in rows]
        names = ("tokens_BL", "positions_BL", "until_BL" if share else "segments_BL", "places_BC", "targets_BC")
        batch = {name: np.stack([row[name[:-3]] for row in filled]) for name in names}
        if any(min(row.tokens, default=0) < 0 for row in rows):
            batch |= _images(rows, pictures, self.decoder.cfg.vision, length)
        most = max(len(row.targets) for row in rows)
        with jax.set_mesh(self.mesh):
            return on_host(_score(self.decoder, self.params, to_global(batch, self.mesh), np.int32(most)))


def _images(rows: Sequence[Row], pictures: Pictures, vision: VisionConfig, length: int) -> dict[str, np.ndarray]:
    """The arrays of `Images` of rows whose tokens hold ids of images; of a few sizes, for each is compiled for."""
    used = [list(dict.fromkeys(i for i in row.tokens if i < 0)) for row in rows]
    most = 1 << (max(map(len, used)) - 1).bit_length()
    patches_BIPY = np.zeros((len(rows), most, vision.num_patches, vision.patch_size), np.uint8)
    index_BL = np.full((len(rows), length), -1, np.int32)
    last_BL = np.tile(np.arange(length, dtype=np.int32), (len(rows), 1))
    for n, (row, ids) in enumerate(zip(rows, used, strict=True)):
        patches_BIPY[n, : len(ids)] = [pictures[i] for i in ids] or 0
        offset_L, last_BL[n, : len(row.tokens)] = image_places(row.tokens, vision)
        begun_L = np.array([ids.index(i) * vision.num_tokens if i < 0 else 0 for i in row.tokens], np.int32)
        index_BL[n, : len(row.tokens)] = np.where(offset_L < 0, -1, begun_L + offset_L)
    return {"patches_BIPY": patches_BIPY, "index_BL": index_BL, "last_BL": last_BL}


@functools.partial(jax.jit, static_argnames="decoder")
def _score(decoder: Decoder, params: Any, batch: dict[str, jax.Array], most: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p of targets_BC at the outputs places_BC, and True where no token is likelier, for `most` of each row."""
    seen: dict[str, Any] = {name: batch.get(name) for name in ("segments_BL", "until_BL")}
    if "patches_BIPY" in batch:
        seen["images"] = Images(batch["patches_BIPY"], batch["index_BL"], batch["last_BL"])
    x_BLD, _ = decoder.apply({"params": params}, batch["tokens_BL"], batch["positions_BL"], **seen)
    places_BC, targets_BC, head_VD = batch["places_BC"], batch["targets_BC"], head(params)
    chosen_BCD = jnp.take_along_axis(x_BLD, places_BC[..., None], axis=1)
    chunks, _ = loss_chunks(places_BC.shape, head_VD.shape)
    size = places_BC.shape[1] // chunks

    def add(i, found):
        x_BCD, target_BC = (jax.lax.dynamic_slice_in_dim(x, i * size, size, 1) for x in (chosen_BCD, targets_BC))
        product_BCV = jnp.einsum("BCD,VD->BCV", x_BCD, head_VD.astype(x_BCD.dtype))
        logits_BCV = cap_and_mask(product_BCV, decoder.vocab_size, decoder.cfg.logit_softcap)
        picked_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], axis=-1)[..., 0]
        news = picked_BC - jax.nn.logsumexp(logits_BCV, axis=-1), picked_BC >= logits_BCV.max(axis=-1)
        return tuple(jax.lax.dynamic_update_slice_in_dim(x, new, i * size, 1) for x, new in zip(found, news))

    start = jnp.zeros(places_BC.shape, jnp.float32), jnp.zeros(places_BC.shape, bool)
    return jax.lax.fori_loop(0, (most + size - 1) // size, add, start)


def rolling_windows(ids: Ids, first: int, context: int) -> Iterator[tuple[Ids, Ids]]:
    """(context, continuation) windows whose continuations are disjoint and make up the ids, `first` in front of them.

    lm-eval's get_rolling_token_windows with a context of one token, made disjoint.
    """
    ids = [first, *ids]
    for start in range(1, len(ids), context):
        stop = min(start + context, len(ids))
        yield ids[max(0, stop - 1 - context) : start], ids[start:stop]
