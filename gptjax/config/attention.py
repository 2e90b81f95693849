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
    images: bool = False
    """The tokens of an image may see all of it, and several texts behind an image not each other."""
    linear: bool = True
    """Memory is linear in the length of a row whose documents are isolated."""


KERNELS = {
    "plain": AttentionKernel(dropout=True, split_rows=True, images=True, linear=False),
    "blockwise": AttentionKernel(split_rows=True, images=True),
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
