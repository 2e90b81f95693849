"""The output head: from hidden states to float32 logits."""

import jax
import jax.numpy as jnp

from gptjax.parallel.sharding import constrain

# float32's softmax gives exactly 0 here, and a finite number keeps gradients finite.
MASKED = -1e30


def logits(x_BLD: jax.Array, head_VD: jax.Array, vocab_size: int, softcap: float = 0.0) -> jax.Array:
    """float32 logits_BLV of hidden states: see `cap_and_mask`."""
    return cap_and_mask(jnp.einsum("BLD,VD->BLV", x_BLD, head_VD.astype(x_BLD.dtype)), vocab_size, softcap)


def cap_and_mask(logits_BLV: jax.Array, vocab_size: int, softcap: float = 0.0) -> jax.Array:
    """float32 logits_BLV of a head's product; the ids that only pad the vocabulary are masked out.

    With a soft-cap c above 0 each logit z becomes c tanh(z / c) (Gemma 2, 2024).
    """
    logits_BLV = constrain(logits_BLV.astype(jnp.float32), "BLV")
    if softcap:
        logits_BLV = softcap * jnp.tanh(logits_BLV / softcap)
    if vocab_size < logits_BLV.shape[-1]:
        logits_BLV = jnp.where(jnp.arange(logits_BLV.shape[-1]) < vocab_size, logits_BLV, MASKED)
    return logits_BLV
