"""Rotary positions in a config.json: their base, their scaling, and the places where these have been written."""

from typing import Any

from gptjax.config import ModelConfig
from gptjax.interop.foreign import ForeignConfig

# The kinds of rotary positions: their required keys, and the keys that may only have one value (or be missing).
ORIGINAL = "original_max_position_embeddings"
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", ORIGINAL),
}
FIXED = {
    "default": {},
    "linear": {},
    "llama3": {"low_freq_factor": 1, "high_freq_factor": 4},
    "yarn": {"beta_fast": 32, "beta_slow": 1, "truncate": True,
             "attention_factor": None, "mscale": None, "mscale_all_dim": None},
}  # fmt: skip


def read_rope(s: ForeignConfig, default: float = 10_000.0) -> dict[str, Any]:
    """Settings of rotary positions: the base, which newer files hold in rope_parameters, and its scaling.

    `default` is the family's base. Raises InputError for kinds and values that have no counterpart.
    """
    theta = s.number("rope_theta", default)
    s.only("partial_rotary_factor", 1.0, 1, None)
    s.only(ORIGINAL, None)
    name = "rope_parameters" if s.values.get("rope_scaling") is None else "rope_scaling"
    rope = s.values.get(name)
    if rope is None:
        return {"rope_theta": theta}
    if name == "rope_scaling" and s.values.get("rope_parameters") not in (None, rope):
        raise s.error(name, rope, "null, or the same as rope_parameters")
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    if not isinstance(kind, str) or kind not in NEEDED:
        raise s.error(name, rope, f"null, or rope_type {' or '.join(map(repr, NEEDED))}")
    fixed = {"type": kind, "rope_type": kind, "partial_rotary_factor": 1} | FIXED[kind]
    for key in NEEDED[kind]:
        if rope.get(key) is None:
            raise s.error(name, rope, f"{key} in it")
    for key, value in rope.items():
        same = key in fixed and value == fixed[key] and isinstance(value, bool) == isinstance(fixed[key], bool)
        if value is not None and not same and key not in ("rope_theta", "factor", ORIGINAL):
            raise s.error(f"{name}.{key}", value, f"{fixed[key]!r}" if key in fixed else f"no such key for {kind!r}")
    inner = ForeignConfig(s.path, rope, f"{s.prefix}{name}.")
    settings: dict[str, Any] = {"rope_theta": inner.number("rope_theta", theta)}
    if kind != "default":
        settings |= {"rope_scaling": kind, "rope_factor": inner.number("factor", 1.0)}
        if settings["rope_factor"] < 1:
            raise inner.error("factor", rope["factor"], "at least 1")
    if ORIGINAL in NEEDED[kind]:
        settings["rope_original_length"] = inner.size(ORIGINAL)
    elif rope.get(ORIGINAL) is not None:
        raise inner.error(ORIGINAL, rope[ORIGINAL], f"no such key for {kind!r}")
    return settings


def read_ropes(s: ForeignConfig, *, local: bool) -> dict[str, Any]:
    """Settings of rotary positions where rope_parameters has those of each kind of layer (Gemma 3).

    `local` says that there are layers with a window; older files hold their base in rope_local_base_freq.
    """
    given = s.values.get("rope_parameters") or {}
    if not isinstance(given, dict) or not given.keys() <= {"full_attention", "sliding_attention"}:
        raise s.error("rope_parameters", given, "null, or those of full_attention and of sliding_attention")
    moved = s.values | {"rope_parameters": given.get("full_attention")}
    settings = read_rope(ForeignConfig(s.path, moved, s.prefix), 1_000_000.0)
    theta, near = s.number("rope_local_base_freq", 10_000.0), given.get("sliding_attention")
    if not local or (near is not None and near == given.get("full_attention")):
        return settings
    found = read_rope(ForeignConfig(s.path, {"rope_theta": theta, "rope_parameters": near}, s.prefix))
    if "rope_scaling" in found:
        raise s.error("rope_parameters", given, "sliding_attention not scaled, or as full_attention is")
    return settings | {"rope_theta_local": found["rope_theta"]}


def write_ropes(cfg: ModelConfig) -> dict[str, Any]:
    """The values that `read_ropes` reads."""
    written = write_rope(cfg)
    full, theta = written["rope_parameters"], cfg.rope_theta_local
    near = {"rope_type": "default", "rope_theta": theta} if theta else full
    more = {"rope_local_base_freq": theta} if theta else {}
    return written | more | {"rope_parameters": {"full_attention": full, "sliding_attention": near}}


def write_rope(cfg: ModelConfig) -> dict[str, Any]:
    """The values that `read_rope` reads, in the newer place and in the one that transformers 4 knows."""
    kind = "default" if cfg.rope_scaling == "none" else cfg.rope_scaling
    more = {"factor": cfg.rope_factor, ORIGINAL: cfg.rope_original_length} | FIXED[kind]
    rope = {"rope_type": kind, "rope_theta": cfg.rope_theta} | {key: float(more[key]) if key != ORIGINAL else more[key]
                                                               for key in NEEDED[kind]}  # fmt: skip
    return {"rope_theta": cfg.rope_theta, "rope_parameters": rope, "rope_scaling": None if kind == "default" else rope}
