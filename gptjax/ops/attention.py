"""Attention by name: which of the ways to compute it a model takes on a device, and the call of each.

`select_kernel` is the one place that decides, from settings, length and device alone: never from data. A kernel that
was named and can't honour the case is refused; only `auto` picks another.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import ModelConfig
from gptjax.config.attention import KERNELS, PREFERRED
from gptjax.config.section import InputError
from gptjax.ops.blockwise import attend_blockwise, divisible
from gptjax.ops.cpu_attention import attend_causal_chunked
from gptjax.ops.reference import AttentionMask, attend, mask
from gptjax.parallel import context as zigzag
from gptjax.parallel.sharding import axes_of, on_each_device

# Keys from which on auto takes blocks where no kernel of the device serves: scores of more would crowd the memory.
LONG = 1024


class Device(NamedTuple):
    """What a choice needs to know of the devices that a computation is for."""

    platform: str
    capability: float = 0.0  # of an NVIDIA device
    shares_rows: bool = False  # mesh.context is above 1


def current_device() -> Device:
    """The devices of the mesh that is set, or else of this process."""
    mesh = jax.sharding.get_abstract_mesh()
    shares_rows = not mesh.empty and dict(mesh.shape).get("context", 1) > 1
    abstract = None if mesh.empty else mesh.abstract_device
    platform = abstract.platform if abstract is not None else jax.default_backend()
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    if platform != "gpu":
        return Device(platform, shares_rows=shares_rows)
    try:
        capability = float(jax.local_devices(backend="gpu")[0].compute_capability)
    except (AttributeError, RuntimeError, ValueError):  # no NVIDIA device
        capability = 0.0
    return Device(platform, capability, shares_rows)


def unsupported_reason(name: str, cfg: ModelConfig, device: Device) -> str:
    """What keeps attention by this name from the case, with what it needs; empty: nothing."""
    backend = KERNELS[name]
    if backend.platform not in ("", device.platform):
        return f"it runs on a {backend.platform}, and this is a {device.platform}"
    if device.capability < backend.capability:
        return f"it needs compute capability {backend.capability:g}, and this device has {device.capability:g}"
    found = cfg.attention_refusal(name, device.capability if backend.capability else None)
    if found:
        return f"it needs model.{found.field} to be {found.wanted}"
    if device.shares_rows and not backend.split_rows:
        return "it needs whole rows: set --mesh.context 1"
    return ""


def select_kernel(cfg: ModelConfig, length: int, device: Device) -> str:
    """The name of the attention that rows of this length take: the one that is set or, for auto, the first that can.

    Raises InputError where the one that is set can't honour the case on this device.
    """
    if cfg.attention != "auto":
        found = unsupported_reason(cfg.attention, cfg, device)
        if found:
            raise InputError(
                f"model.attention={cfg.attention!r} can't be used: {found}; set --model.attention auto or blockwise"
            )
        return cfg.attention
    preferred = PREFERRED.get(device.platform)
    if preferred and not unsupported_reason(preferred, cfg, device):
        return preferred
    return "plain" if length <= LONG or unsupported_reason("blockwise", cfg, device) else "blockwise"


def describe(cfg: ModelConfig, length: int, packed: bool) -> str:
    """One line on the attention that rows of this length take on these devices; raises what `select_kernel` raises."""
    name = select_kernel(cfg, length, current_device())
    chosen = f"attention: {name}" + (" (chosen by model.attention=auto)" if cfg.attention == "auto" else "")
    if (shards := zigzag.num_shards(length)) > 1:
        chosen += f", each row over {shards} devices in zigzag order"
    if not packed:
        return f"{chosen}, each row one document"
    cost = f"a mask of {2 * length * length / 2**20:,.1f} MiB a row" if name == "cudnn" else "segments"
    return f"{chosen}, documents of a row kept apart by {cost}"


def attention(
    cfg: ModelConfig,
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    sight: AttentionMask,
    *,
    scale: float,
    window: jax.typing.ArrayLike | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """out_BLHK of attention.attend, computed as cfg.attention says; a key turns dropout on.

    The output bears the name "attention" for remat. A cache's queries, which are no rows of their own, take the plain
    product or, several of them on many keys, blocks.
    """
    L, M, device = q_BLHK.shape[1], k_BMGK.shape[1], current_device()
    seen = {"scale": scale, "window": window, "softcap": cfg.attention_softcap}
    if L == 1:
        # One query's scores are M numbers a head: for it the plain product already is linear in memory.
        name = "plain"
    elif sight.of_rows:
        name = select_kernel(cfg, L, device)
    else:
        blocks = cfg.attention == "blockwise" or (cfg.attention != "plain" and M > LONG)
        name = "blockwise" if blocks and not unsupported_reason("blockwise", cfg, device) else "plain"
    if name == "blockwise":
        return attend_blockwise(q_BLHK, k_BMGK, v_BMGK, sight, block=cfg.attention_block, **seen)
    if name == "cudnn":
        return attend_cudnn(q_BLHK, k_BMGK, v_BMGK, sight, scale=scale, window=window)
    if name == "splash":
        return attend_splash(q_BLHK, k_BMGK, v_BMGK, sight, **seen)
    drops = key is not None and cfg.dropout > 0
    if sight.aligned and L > 1 and not drops and device.platform == "cpu" and not device.shares_rows:
        return attend_causal_chunked(q_BLHK, k_BMGK, v_BMGK, sight, **seen)
    plain = attend if sight.shards == 1 else attend_shared
    out_BLHK = plain(q_BLHK, k_BMGK, v_BMGK, sight, dropout_rate=cfg.dropout, key=key if drops else None, **seen)
    return checkpoint_name(out_BLHK, "attention")


def attend_shared(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    sight: AttentionMask,
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
            zigzag.gather_length(x, axes["L"], sight.shards) for x in (k_BLGK, v_BLGK, *segments)
        )
        window, key = known
        if key is not None:  # each device drops elements of its own
            key = jax.random.fold_in(key, jax.lax.axis_index(tuple(dict.fromkeys(sum(axes.values(), ())))))
        return attend(
            q_BLHK, k_BMGK, v_BMGK, AttentionMask(query_BL, *segments, *key_segments), window=window, key=key, **options
        )

    segments = () if sight.query_segments_BL is None else (sight.query_segments_BL,)
    call = on_each_device(on_device, axes, ("BLHK", "BLGK", "BLGK", "BL", "BL", ""), "BLHK")
    return call(q_BLHK, k_BLGK, v_BLGK, sight.query_BL, segments, (window, key))


def attend_cudnn(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    sight: AttentionMask,
    *,
    scale: float,
    window: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """out_BLHK of attention.attend for an aligned sight by cuDNN's fused kernel, on a GPU.

    The kernel knows no segments. Where there are any, or where the window is known only at run time, what a query may
    not see is masked by an additive array of B x L x L bfloat16 numbers, the same for all heads: 2 MiB a row of 1,024,
    32 MiB a row of 4,096. Where a row is one document there is no such array, and memory is linear in length.
    """
    L, even = q_BLHK.shape[1], q_BLHK.shape[1] + q_BLHK.shape[1] % 2
    static = window if isinstance(window, int) else None
    # Its backward pass wants even lengths. No query sees the place that is added, which lies in the future of all.
    q_BLHK, k_BLGK, v_BLGK = (_lengthened(x, even) for x in (q_BLHK, k_BLGK, v_BLGK))
    masks = ()
    if sight.query_segments_BL is not None or (window is not None and static is None):
        seen_BLM = jnp.pad(mask(sight, L, window), ((0, 0), (0, even - L), (0, even - L)))
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
    sight: AttentionMask,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """out_BLHK of attention.attend for an aligned sight by JAX's splash kernel, on a TPU; it takes segments too.

    Lengths that are no multiple of 128 are padded: the places that are added lie in every query's future. `interpret`
    runs the kernel's definition on any device, slowly.
    """
    assert window is None or isinstance(window, int), "the kernel's mask is made before anything runs"
    L = q_BLHK.shape[1]
    length = L + -L % 128
    q_BLHK, k_BLGK, v_BLGK = (_lengthened(x, length) for x in (q_BLHK * scale, k_BLGK, v_BLGK))
    segments = () if sight.query_segments_BL is None else (_lengthened(sight.query_segments_BL, length),)
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
