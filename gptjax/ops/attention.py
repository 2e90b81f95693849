"""Attention by name: which of the ways to compute it a model takes on a device, and the call of each.

`select_kernel` is the one place that decides, from settings, length and device alone: never from data. A kernel that
was named and can't honour the case is refused; only `auto` picks another.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import ModelConfig
from gptjax.config.attention import KERNELS, PREFERRED
from gptjax.config.section import InputError
from gptjax.ops.blockwise import attend_blockwise
from gptjax.ops.cpu_attention import attend_causal_chunked
from gptjax.ops.device import Device, device
from gptjax.ops.kernels import attend_cudnn, attend_shared, attend_splash
from gptjax.ops.reference import AttentionMask, attend
from gptjax.parallel.sharding import num_shards

# Keys from which on auto takes blocks where no kernel of the device serves: scores of more would crowd the memory.
LONG = 1024


def unsupported_reason(name: str, cfg: ModelConfig, on: Device) -> str:
    """The reason why a kernel does not support the case, with its requirement; empty where it does."""
    kernel = KERNELS[name]
    if kernel.only_on not in ("", on.platform):
        return f"it runs on a {kernel.only_on}, and this is a {on.platform}"
    if on.capability < kernel.capability:
        return f"it needs compute capability {kernel.capability:g}, and this device has {on.capability:g}"
    found = cfg.attention_refusal(name, on.capability if kernel.capability else None)
    if found:
        return f"it needs model.{found.field} to be {found.wanted}"
    if on.shares_rows and not kernel.split_rows:
        return "it needs whole rows: set --mesh.context 1"
    return ""


def select_kernel(cfg: ModelConfig, length: int, on: Device) -> str:
    """The name of the attention that rows of this length take: the one that is set or, for auto, the first that can.

    Raises InputError where the one that is set can't honour the case on this device.
    """
    if cfg.attention != "auto":
        found = unsupported_reason(cfg.attention, cfg, on)
        if found:
            raise InputError(
                f"model.attention={cfg.attention!r} can't be used: {found}; set --model.attention auto or blockwise"
            )
        return cfg.attention
    preferred = PREFERRED.get(on.platform)
    if preferred and not unsupported_reason(preferred, cfg, on):
        return preferred
    return "plain" if length <= LONG or unsupported_reason("blockwise", cfg, on) else "blockwise"


def describe(cfg: ModelConfig, length: int, packed: bool) -> str:
    """One line on the attention that rows of this length take on these devices; raises what `select_kernel` raises."""
    name = select_kernel(cfg, length, device())
    chosen = f"{name}, the best for this device" if cfg.attention == "auto" else name
    if (shards := num_shards(length)) > 1:
        chosen += f"; each row over {shards} devices"
    if not packed:
        return chosen
    cost = f", by a mask of {2 * length * length / 2**20:,.1f} MiB a row" if name == "cudnn" else ""
    return f"{chosen}; documents in one row do not see each other{cost}"


def attention(
    cfg: ModelConfig,
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    window: jax.typing.ArrayLike | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """out_BLHK of attention.attend, computed as cfg.attention says; a key turns dropout on.

    The output bears the name "attention" for remat. Queries of a cache, a tree of texts, and rows with images take the
    plain product or, on many keys, blocks.
    """
    L, M, on = q_BLHK.shape[1], k_BMGK.shape[1], device()
    seen = {"scale": scale, "window": window, "softcap": cfg.attention_softcap}
    if mask.of_rows and mask.until_BM is None and L > 1:
        name = select_kernel(cfg, L, on)
    else:
        # One query's scores are M numbers a head: for it the plain product already is linear in memory.
        blocks = L > 1 and (cfg.attention == "blockwise" or (cfg.attention != "plain" and M > LONG))
        name = "blockwise" if blocks and not unsupported_reason("blockwise", cfg, on) else "plain"
    if name == "blockwise":
        return attend_blockwise(q_BLHK, k_BMGK, v_BMGK, mask, block=cfg.attention_block, **seen)
    if name == "cudnn":
        return attend_cudnn(q_BLHK, k_BMGK, v_BMGK, mask, scale=scale, window=window)
    if name == "splash":
        return attend_splash(q_BLHK, k_BMGK, v_BMGK, mask, **seen)
    drops = key is not None and cfg.dropout > 0
    if mask.aligned and L > 1 and not drops and on.platform == "cpu" and not on.shares_rows:
        return attend_causal_chunked(q_BLHK, k_BMGK, v_BMGK, mask, **seen)
    plain = attend if mask.shards == 1 else attend_shared
    out_BLHK = plain(q_BLHK, k_BMGK, v_BMGK, mask, dropout_rate=cfg.dropout, key=key if drops else None, **seen)
    return checkpoint_name(out_BLHK, "attention")
