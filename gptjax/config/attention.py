"""Attention kernels and their limits: one table, read by the checks of settings and the selection by device."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

AttentionName = Literal["auto", "plain", "blockwise", "cudnn", "splash"]


@dataclass(frozen=True, kw_only=True)
class AttentionKernel:
    """A kernel for attention. All support packed documents, grouped queries and a sliding window."""

    only_on: str = ""
    """The platform that it runs on; empty: every one."""
    capability: float = 0.0
    """Lowest compute capability of an NVIDIA device."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    dropout: bool = False
    softcap: bool = True
    mixed_windows: bool = True
    """Layers may have different windows, which the compiled loop over layers passes as a number at run time."""
    head_multiple: int = 1
    head_most: tuple[tuple[float, int], ...] = ()
    """(compute capability, the largest head size from there on), in ascending order."""
    split_rows: bool = False
    """Several devices may share a row (mesh.context)."""
    linear: bool = True
    """Memory is linear in the length of a row whose documents are isolated."""


KERNELS = {
    "plain": AttentionKernel(dropout=True, split_rows=True, linear=False),
    "blockwise": AttentionKernel(split_rows=True),
    # The kernel has no segments: an additive mask of 2 L x M bytes a row isolates packed documents.
    "cudnn": AttentionKernel(only_on="gpu", capability=8.0, dtypes=("bfloat16",), softcap=False, head_multiple=8,
                     head_most=((8.0, 128), (9.0, 256)), linear=False),
    "splash": AttentionKernel(only_on="tpu", mixed_windows=False),
}  # fmt: skip

# The kernel of each platform where model.attention is auto and the kernel supports the settings.
PREFERRED = {"gpu": "cudnn", "tpu": "splash"}


class Unsupported(NamedTuple):
    """A setting that a kernel does not support, the supported values in words, and one of them."""

    field: str
    wanted: str
    value: str


def unsupported_setting(
    name: str, dropout: float, softcap: float, dtype: str, windows: int, head_size: int, capability: float | None = None
) -> Unsupported | None:
    """The first setting that a kernel does not support, on a device of this capability or on any; None: all fit.

    `windows` is the number of different windows of the layers.
    """
    kernel = KERNELS[name]
    most = max((size for least, size in kernel.head_most if capability is None or capability >= least), default=0)
    fits = head_size % kernel.head_multiple == 0 and (not most or head_size <= most)
    checks = [
        (kernel.dropout or dropout == 0, "dropout", "0", "0"),
        (kernel.softcap or softcap == 0, "attention_softcap", "0", "0"),
        (dtype in kernel.dtypes, "dtype", " or ".join(kernel.dtypes), kernel.dtypes[0]),
        (kernel.mixed_windows or windows == 1, "global_every", "0, one window for all layers", "0"),
        (fits, "head_dim", f"heads of a multiple of {kernel.head_multiple} and at most {most} numbers", "64"),
    ]
    return next((Unsupported(field, wanted, value) for ok, field, wanted, value in checks if not ok), None)
