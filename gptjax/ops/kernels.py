"""Attention on what each device holds: the kernels of cuDNN and splash, and the plain product of shared rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.ops.blockwise import divisible
from gptjax.ops.reference import AttentionMask, attend, dense_mask
from gptjax.parallel import context
from gptjax.parallel.sharding import axes_of, on_each_device


def attend_shared(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    mask: AttentionMask,
    *,
    window: jax.typing.ArrayLike | None = None,
    key: jax.Array | None = None,
    **options: float,
) -> jax.Array:
    """out_BLHK of attention.attend for rows in zigzag order: each device holds L x M / n scores.

    Keys and values are gathered whole by each of the n devices that share a row; the gradients of their parts are
    summed back to where they lie.
    """
    k_BLGK, v_BLGK = divisible(q_BLHK, k_BLGK, v_BLGK)
    axes = axes_of({**dict(zip("BLH", q_BLHK.shape)), "G": k_BLGK.shape[2]})

    def on_device(q_BLHK, k_BLGK, v_BLGK, query_BL, segments, known):
        k_BMGK, v_BMGK, *key_segments = (
            context.gather_length(x, axes["L"], mask.shards) for x in (k_BLGK, v_BLGK, *segments)
        )
        window, key = known
        if key is not None:  # each device drops elements of its own
            key = jax.random.fold_in(key, jax.lax.axis_index(tuple(dict.fromkeys(sum(axes.values(), ())))))
        return attend(
            q_BLHK, k_BMGK, v_BMGK, AttentionMask(query_BL, *segments, *key_segments), window=window, key=key, **options
        )

    segments = () if mask.query_segments_BL is None else (mask.query_segments_BL,)
    call = on_each_device(on_device, axes, ("BLHK", "BLGK", "BLGK", "BL", "BL", ""), "BLHK")
    return call(q_BLHK, k_BLGK, v_BLGK, mask.query_BL, segments, (window, key))


def attend_cudnn(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    window: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """out_BLHK of attention.attend for an aligned mask by cuDNN's fused kernel, on a GPU.

    The kernel knows no segments. Where there are any, or where the window is known only at run time, what a query may
    not see is masked by an additive array of B x L x L bfloat16 numbers, the same for all heads: 2 MiB a row of 1,024,
    32 MiB a row of 4,096. Where a row is one document there is no such array, and memory is linear in length.
    """
    L, even = q_BLHK.shape[1], q_BLHK.shape[1] + q_BLHK.shape[1] % 2
    static = window if isinstance(window, int) else None
    # Its backward pass wants even lengths. No query sees the place that is added, which lies in the future of all.
    q_BLHK, k_BLGK, v_BLGK = (_lengthened(x, even) for x in (q_BLHK, k_BLGK, v_BLGK))
    masks = ()
    if mask.query_segments_BL is not None or (window is not None and static is None):
        seen_BLM = jnp.pad(dense_mask(mask, L, window), ((0, 0), (0, even - L), (0, even - L)))
        masks = ((seen_BLM | jnp.eye(even, dtype=bool))[:, None],)  # the added place sees itself: no empty softmax

    def on_device(q_BLHK, k_BLGK, v_BLGK, *masks):
        return jax.nn.dot_product_attention(
            q_BLHK, k_BLGK, v_BLGK, mask=masks[0] if masks else None, scale=scale, is_causal=True,
            local_window_size=None if static is None else (static - 1, 0), implementation="cudnn",
        )  # fmt: skip

    out_BLHK = _whole_rows(on_device, q_BLHK, k_BLGK, v_BLGK, masks, ("B1LM",) * len(masks))
    return checkpoint_name(out_BLHK[:, :L], "attention")


def attend_splash(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """out_BLHK of attention.attend for an aligned mask by JAX's splash kernel, on a TPU; it takes segments too.

    Lengths that are no multiple of 128 are padded: the places that are added lie in every query's future. `interpret`
    runs the kernel's definition on any device, slowly.
    """
    assert window is None or isinstance(window, int), "the kernel's mask is made before anything runs"
    L = q_BLHK.shape[1]
    length = L + -L % 128
    q_BLHK, k_BLGK, v_BLGK = (_lengthened(x, length) for x in (q_BLHK * scale, k_BLGK, v_BLGK))
    segments = () if mask.query_segments_BL is None else (_lengthened(mask.query_segments_BL, length),)
    on_device = functools.partial(_splash, window, softcap, interpret)
    return _whole_rows(on_device, q_BLHK, k_BLGK, v_BLGK, segments, ("BL",) * len(segments))[:, :L]


def _splash(window, softcap, interpret, q_BLHK, k_BLGK, v_BLGK, *segments):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    L, H = q_BLHK.shape[1:3]
    size = next(size for size in (512, 384, 256, 128) if L % size == 0)
    one = masks.CausalMask((L, L)) if window is None else masks.LocalMask((L, L), (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([one] * H),
        block_sizes=splash.BlockSizes(
            block_q=size, block_kv=size, block_kv_compute=size, block_q_dkv=size, block_kv_dkv=size,
            block_kv_dkv_compute=size, block_q_dq=size, block_kv_dq=size,
        ),
        head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name="attention", interpret=interpret,
    )  # fmt: skip
    heads_first = [jnp.moveaxis(x, 1, 2) for x in (q_BLHK, k_BLGK, v_BLGK)]
    if segments:
        ids = splash.SegmentIds(segments[0], segments[0])
        out_BHLK: Any = jax.vmap(kernel)(*heads_first, ids)
    else:
        out_BHLK = jax.vmap(kernel)(*heads_first)
    return jnp.moveaxis(out_BHLK, 2, 1)


def _lengthened(x: jax.Array, length: int) -> jax.Array:
    """x with zeros after its places, which are dimension 1, up to this length."""
    return jnp.pad(x, [(0, length - x.shape[1]) if i == 1 else (0, 0) for i in range(x.ndim)])


def _whole_rows(on_device, q_BLHK, k_BLGK, v_BLGK, more, words) -> jax.Array:
    """on_device(q_BLHK, k_BLGK, v_BLGK, *more) on each device's rows and heads; `words` are the letters of `more`."""
    k_BLGK, v_BLGK = divisible(q_BLHK, k_BLGK, v_BLGK)
    axes = axes_of({"B": q_BLHK.shape[0], "H": q_BLHK.shape[2], "G": k_BLGK.shape[2]})
    inputs = ("BLHK", "BLGK", "BLGK", *words)
    return on_each_device(on_device, axes, inputs, "BLHK")(q_BLHK, k_BLGK, v_BLGK, *more)
