"""Losses on hidden states and a head: cross-entropy in chunks, so that the logits of a whole batch never exist."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.model.decoder import Decoder, cap_and_mask, head, hidden_states, logits
from gptjax.ops.linear import loss_chunks, transpose
from gptjax.training.step import LossFn


def language_model_loss(decoder: Decoder, z_loss: float = 0.0, norms: bool = False) -> LossFn:
    """Mean over weighted tokens of -log p(next token) + z_loss log(Z)^2, in nats.

    With `norms` the metrics hold activation_rms_N, the root mean square of the stream after each layer.
    """

    def loss_fn(params: Any, frozen: Any, batch: dict[str, jax.Array], key: jax.Array):
        del frozen  # pretraining trains everything
        more: dict[str, Any] = {}
        if norms:
            x_BLD, more["activation_rms_N"] = hidden_states(decoder, params, batch, key=key, method="with_norms")
        else:
            x_BLD, _ = hidden_states(decoder, params, batch, key=key)
        targets = (batch["targets_BL"], batch["weights_BL"], decoder.vocab_size)
        total = cross_entropy(x_BLD, head(params), *targets, z_loss=z_loss, softcap=decoder.cfg.logit_softcap)
        weight = batch["weights_BL"].sum()
        loss = total / jnp.maximum(weight, 1.0)
        return loss, {"loss": loss, "weight": weight} | more

    return loss_fn


def token_log_probs(
    x_BLD: jax.Array,
    head_VD: jax.Array,
    targets_BL: jax.Array,
    vocab_size: int,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """(log p(target), entropy of p) at every position, both of shape BL and in nats, p = softmax(logits / temperature).

    The length is cut into chunks, and each chunk's logits are computed again for its gradient: only one chunk of them
    is ever held. temperature > 0; `softcap` as in `logits`.
    """
    chunks = loss_chunks(targets_BL.shape, head_VD.shape)

    # Gradients of the head are added up over the chunks in its own type, float32: the chunk casts it.
    @jax.checkpoint
    def one(chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x_BCD, targets_BC = chunk
        log_p_BCV = jax.nn.log_softmax(logits(x_BCD, head_VD, vocab_size, softcap) / temperature)
        picked_BC = jnp.take_along_axis(log_p_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return picked_BC, -(jnp.exp(log_p_BCV) * log_p_BCV).sum(axis=-1)

    log_p, entropy = jax.lax.map(one, _split(chunks, x_BLD, targets_BL))
    return _join(chunks, log_p), _join(chunks, entropy)


def likeliest(x_BLD: jax.Array, head_VD: jax.Array, vocab_size: int) -> jax.Array:
    """The id with the highest logit at every position, of shape BL, by chunks of the length."""
    chunks = loss_chunks(x_BLD.shape[:2], head_VD.shape)
    ids = jax.lax.map(lambda x_BCD: logits(x_BCD, head_VD, vocab_size).argmax(axis=-1), *_split(chunks, x_BLD))
    return _join(chunks, ids)


def cross_entropy(
    x_BLD: jax.Array,
    head_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    vocab_size: int,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> jax.Array:
    """Sum over positions of weight x (-log p(target) + z_loss log(Z)^2), in nats; Z is the softmax's normaliser.

    The length is cut into chunks whose gradient is computed while their logits exist: nothing is computed twice and
    only one chunk of logits is ever held. z-loss: PaLM (Chowdhery et al. 2022), section 5; `softcap` as in `logits`.
    """
    chunks = loss_chunks(targets_BL.shape, head_VD.shape)
    return _cross_entropy(x_BLD, head_VD, targets_BL, weights_BL, vocab_size, (z_loss, softcap), chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(x_BLD, head_VD, targets_BL, weights_BL, vocab_size, extras, chunks):
    head_DV = transpose(head_VD.astype(x_BLD.dtype), (1, 0))

    def add(total, chunk):
        x_BCD, targets_BC, weights_BC = chunk
        return total + _chunk_loss(x_BCD, targets_BC, weights_BC, head_DV, vocab_size, extras)[0], None

    return jax.lax.scan(add, jnp.zeros(()), _split(chunks, x_BLD, targets_BL, weights_BL))[0]


def _split(chunks: tuple[int, int], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cuts dimension L of each array into chunks and puts them first: BL... to (chunks) BC..."""
    count, shards = chunks
    cut = (jnp.moveaxis(a.reshape(a.shape[0], shards, count, -1, *a.shape[2:]), 2, 0) for a in arrays)
    return tuple(a.reshape(count, a.shape[1], -1, *a.shape[4:]) for a in cut)


def _join(chunks: tuple[int, int], parts: jax.Array) -> jax.Array:
    """The inverse of _split: (chunks) BC... to BL..."""
    count, B, _, *rest = parts.shape
    return jnp.moveaxis(parts.reshape(count, B, chunks[1], -1, *rest), 0, 2).reshape(B, -1, *rest)


def _chunk_loss(x_BCD, targets_BC, weights_BC, head_DV, vocab_size, extras):
    """The loss of one chunk, its logits, their softmax's numerator and normaliser, and log Z."""
    z_loss, softcap = extras
    logits_BCV = cap_and_mask(jnp.einsum("BLD,DV->BLV", x_BCD, head_DV), vocab_size, softcap)
    highest_BC = logits_BCV.max(axis=-1)
    exp_BCV = jnp.exp(logits_BCV - highest_BC[..., None])
    sum_BC = exp_BCV.sum(axis=-1)
    log_z_BC = jnp.log(sum_BC) + highest_BC
    picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    loss = (weights_BC * (log_z_BC - picked_BC + z_loss * log_z_BC**2)).sum()
    return loss, logits_BCV, exp_BCV, sum_BC, log_z_BC


def _forward(x_BLD, head_VD, targets_BL, weights_BL, vocab_size, extras, chunks):
    z_loss, softcap = extras
    head = head_VD.astype(x_BLD.dtype)
    head_DV = transpose(head, (1, 0))

    def add(carry, chunk):
        total, dhead_DV = carry
        x_BCD, targets_BC, weights_BC = chunk
        loss, *softmax = _chunk_loss(x_BCD, targets_BC, weights_BC, head_DV, vocab_size, extras)
        logits_BCV, exp_BCV, sum_BC, log_z_BC = softmax
        # d loss / d logits = w (softmax (1 + 2 z log Z) - one-hot(target))
        scale_BC = weights_BC * (1 + 2 * z_loss * log_z_BC) / sum_BC
        hit_BCV = jnp.arange(head_VD.shape[0]) == targets_BC[..., None]
        dlogits_BCV = exp_BCV * scale_BC[..., None] - jnp.where(hit_BCV, weights_BC[..., None], 0)
        if softcap:
            # d c tanh(z / c) / dz = 1 - tanh^2; the bound turns the masked ids, which have no gradient, into 0 x 0.
            dlogits_BCV *= 1 - jnp.clip(logits_BCV / softcap, -1, 1) ** 2
        dlogits_BCV = dlogits_BCV.astype(x_BCD.dtype)
        dx_BCD = jnp.einsum("BCV,VD->BCD", dlogits_BCV, head)
        dhead_DV += jnp.einsum("DBC,BCV->DV", transpose(x_BCD, (2, 0, 1)), dlogits_BCV).astype(jnp.float32)
        return (total + loss, dhead_DV), dx_BCD

    start = (jnp.zeros(()), jnp.zeros(head_DV.shape, jnp.float32))
    (total, dhead_DV), dx = jax.lax.scan(add, start, _split(chunks, x_BLD, targets_BL, weights_BL))
    # _join, written out: the path of a training step is as short as can be.
    dx = jnp.moveaxis(dx.reshape(len(dx), dx.shape[1], chunks[1], -1, dx.shape[-1]), 0, 2)
    return total, (dx.reshape(x_BLD.shape), dhead_DV.T.astype(head_VD.dtype))


def _backward(vocab_size, extras, chunks, kept, g):
    dx_BLD, dhead_VD = kept
    return (dx_BLD * g).astype(dx_BLD.dtype), (dhead_VD * g).astype(dhead_VD.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)
