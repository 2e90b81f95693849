"""What each way of computing attention can do: the one table that checks of settings and the choice by device read."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

AttentionName = Literal["auto", "plain", "blockwise", "cudnn", "splash"]


@dataclass(frozen=True, kw_only=True)
class AttentionKernel:
    """One way of computing attention. All know packed documents, grouped queries and a sliding window."""

    platform: str = ""
    """The kind of device that it runs on; empty: every kind."""
    capability: float = 0.0
    """Least compute capability of an NVIDIA device."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    dropout: bool = False
    softcap: bool = True
    mixed_windows: bool = True
    """Layers may have different windows; the compiled loop over layers gives them as a number known at run time."""
    head_multiple: int = 1
    head_most: tuple[tuple[float, int], ...] = ()
    """(compute capability, the largest head size from there on), rising."""
    split_rows: bool = False
    """A row may be shared by several devices (mesh.context)."""
    linear: bool = True
    """Memory grows linearly with length, where documents of a row do not see each other."""


KERNELS = {
    "plain": AttentionKernel(dropout=True, split_rows=True, linear=False),
    "blockwise": AttentionKernel(split_rows=True),
    # Its kernel has no segments: packed documents are kept apart by an additive mask of 2 L x M bytes a row.
    "cudnn": AttentionKernel(platform="gpu", capability=8.0, dtypes=("bfloat16",), softcap=False, head_multiple=8,
                     head_most=((8.0, 128), (9.0, 256)), linear=False),
    "splash": AttentionKernel(platform="tpu", mixed_windows=False),
}  # fmt: skip

# What each kind of device tries, in this order, where model.attention is auto.
PREFERRED = {"gpu": "cudnn", "tpu": "splash"}


class Unsupported(NamedTuple):
    """A setting that a backend can't honour, what it would have to be, and a value that would do."""

    field: str
    wanted: str
    value: str


def unsupported_setting(
    name: str, dropout: float, softcap: float, dtype: str, windows: int, head_size: int, capability: float | None = None
) -> Unsupported | None:
    """The first setting that this backend can't honour on a device of this capability, or on any; None: it can all.

    `windows` counts the different windows of the layers.
    """
    backend = KERNELS[name]
    most = max((size for least, size in backend.head_most if capability is None or capability >= least), default=0)
    fits = head_size % backend.head_multiple == 0 and (not most or head_size <= most)
    checks = [
        (backend.dropout or dropout == 0, "dropout", "0", "0"),
        (backend.softcap or softcap == 0, "attention_softcap", "0", "0"),
        (dtype in backend.dtypes, "dtype", " or ".join(backend.dtypes), backend.dtypes[0]),
        (backend.mixed_windows or windows == 1, "global_every", "0, one window for all layers", "0"),
        (fits, "head_dim", f"heads of a multiple of {backend.head_multiple} and at most {most} numbers", "64"),
    ]
    return next((Unsupported(field, wanted, value) for ok, field, wanted, value in checks if not ok), None)
