"""One leaf of a decoder against the tensors of a family, in both directions: names, transposes, what lies side by side.

Where an export's family has no setting for a scale of ours (muP's), the scale is multiplied into a tensor; where it has
a tensor that the decoder has not, that is filled with what changes nothing. All else is moved, bit by bit.

Leaves of the encoder of images are named with `VISION` in front, as vision.q_NDHK for params["vision"]["layers"].
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from gptjax.config import ModelConfig
from gptjax.interop.families import VISION, ModelFamily, folded
from gptjax.interop.image_architectures import ids_with_image
from gptjax.model.block import layer_params
from gptjax.model.decoder import Decoder, dims, top_params
from gptjax.model.vision import encoder_params, image_sizes
from gptjax.parallel.sharding import matrix, suffix


class TensorSource(Protocol):
    """The tensors of a file or folder, read one at a time."""

    @property
    def names(self) -> Collection[str]: ...

    def take(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """The tensor as float32; raises InputError where it is missing, of an unknown type, or of another shape."""
        ...


def top_leaves(cfg: ModelConfig) -> list[str]:
    """Every leaf outside the layers of the decoder and of the encoder."""
    return [*top_params(cfg), *(VISION + leaf for leaf in (encoder_params(cfg)[0] if _encodes(cfg) else ()))]


def stacked_leaves(cfg: ModelConfig) -> dict[str, int]:
    """Every leaf of the layers of the decoder and of the encoder, and how many layers it has."""
    inside = {VISION + leaf: cfg.vision.layers for leaf in encoder_params(cfg)[1]} if _encodes(cfg) else {}
    return dict.fromkeys(layer_params(cfg), cfg.num_layers) | inside


def leaf_sizes(decoder: Decoder, leaf: str) -> dict[str, int]:
    """The size of every letter of a leaf's name."""
    cfg = decoder.cfg
    images = image_sizes(cfg) if cfg.vision.patch else {}
    own = dims(cfg.encoder, 0, 0) if leaf.startswith(VISION) else dims(cfg, decoder.vocab_size, decoder.context)
    return images | own


def read_slice(
    tensors: TensorSource, family: ModelFamily, decoder: Decoder, leaf: str, n: int | None = None
) -> np.ndarray:
    """A leaf of the decoder as float32: outside the layers whole, its vocabulary padded with zeros, or that of layer n.

    `leaf` is its name in the tree of parameters, as q_NDHK, whose slice is q_DHK. Raises InputError as `take` does.
    """
    name, stored = stored_tensor(tensors, family, decoder, leaf, n)
    x, shape = tensors.take(name, stored), _shape(decoder, leaf)
    if n is None:
        x = _turned(leaf, x)
        return x if x.shape == shape else np.pad(x, [(0, shape[0] - stored[0]), *((0, 0) for _ in shape[1:])])
    stem, _ = _parts(leaf)
    side = _beside(family, stem)
    if len(side) > 1:
        x = np.split(x, len(side), axis=-1 if family.inputs_first else 0)[side.index(stem)]
    x = (x if family.inputs_first or x.ndim == 1 else x.T).reshape(shape)
    place_K = _pairs(family, leaf, shape[-1])
    return x if place_K is None else x[..., place_K]


def stored_tensor(
    tensors: TensorSource, family: ModelFamily, decoder: Decoder, leaf: str, n: int | None = None
) -> tuple[str, tuple[int, ...]]:
    """The name and the shape of the tensor that holds a leaf, or a layer of it: those that `read_slice` takes."""
    prefix = family.prefix if any(name.startswith(family.prefix) for name in tensors.names) else ""
    shape = _shape(decoder, leaf)
    if n is None:
        name = family.head if leaf == "head_VD" else prefix + family.top[leaf]
        return name, _stored_whole(decoder.cfg, leaf, shape, decoder.vocab_size)
    stem, part = _parts(leaf)
    return f"{prefix}{family.layer[stem].format(n=n)}.{part}", _stored(family, leaf, shape)


def written_tensors(
    family: ModelFamily, decoder: Decoder, params: dict[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """Every tensor of a family's file: its name, its shape, and a function that makes it, as float32.

    `params` may lie on any mesh: a tensor is fetched when it is made. Raises InputError where a scale of the decoder
    has no place in the family.
    """
    cfg, rows = decoder.cfg, ids_with_image(decoder.cfg, decoder.vocab_size)
    target = decoder.clone(cfg=family.exported(cfg, decoder.vocab_size, decoder.context))
    ours = functools.partial(_ours, decoder, target, params)
    for leaf in top_leaves(target.cfg):
        name = family.head if leaf == "head_VD" else family.prefix + family.top[leaf]
        stored = _stored_whole(cfg, leaf, _shape(target, leaf), rows)
        yield name, stored, functools.partial(_whole, decoder, leaf, rows, functools.partial(ours, leaf))
    leaves_of = stacked_leaves(target.cfg)
    for n in range(max(leaves_of.values())):
        for leaf in (leaf for leaf, count in leaves_of.items() if n < count):
            stem, part = _parts(leaf)
            side = _beside(family, stem)
            if stem == side[0]:
                leaves = [one for one in leaves_of if _parts(one)[1] == part and _parts(one)[0] in side]
                name = f"{family.prefix}{family.layer[stem].format(n=n)}.{part}"
                make = functools.partial(_joined, family, leaves, functools.partial(ours, n=n))
                yield name, _stored(family, leaf, _shape(target, leaf)), make
    for name, value in family.filled.items():
        shape = (cfg.vision.width,)
        yield name, shape, functools.partial(np.full, shape, value, np.float32)


def _encodes(cfg: ModelConfig) -> bool:
    return cfg.vision.patch > 0 and cfg.vision.layers > 0


def _shape(decoder: Decoder, leaf: str) -> tuple[int, ...]:
    """The shape of a leaf, of one layer where it is stacked."""
    size = leaf_sizes(decoder, leaf)
    return tuple(size[letter] for letter in suffix(leaf).removeprefix("N"))


def _stored_whole(cfg: ModelConfig, leaf: str, shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """The shape of the tensor that holds a leaf outside the layers; one of the vocabulary has so many rows."""
    if suffix(leaf).startswith("V"):
        return rows, *shape[1:]
    if suffix(leaf).startswith("Y"):  # a convolution's: (output, color, row, column)
        return shape[1], 3, cfg.vision.patch, cfg.vision.patch
    return shape[::-1] if _is_projection(leaf) else shape


def _is_projection(leaf: str) -> bool:
    """True for a matrix outside the layers that is stored with its outputs first; ours have their inputs first."""
    return suffix(leaf) in ("UD", "UX", "XD")


def _turned(leaf: str, x: np.ndarray) -> np.ndarray:
    """A tensor that holds a leaf outside the layers, as the leaf has it. Pixels of a patch are (row, column, color)."""
    if suffix(leaf).startswith("Y"):
        return x.transpose(2, 3, 1, 0).reshape(-1, len(x))
    return x.T if _is_projection(leaf) else x


def _whole(decoder: Decoder, leaf: str, rows: int, ours: Callable[[], np.ndarray]) -> np.ndarray:
    """The tensor that holds a leaf outside the layers: `_turned` back, the vocabulary with so many rows."""
    x, patch = ours(), decoder.cfg.vision.patch
    if suffix(leaf).startswith("Y"):
        x = x.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)
    elif suffix(leaf).startswith("V"):
        x = x[: decoder.vocab_size]
        x = x if rows == len(x) else np.pad(x, [(0, rows - len(x)), (0, 0)])
    return np.ascontiguousarray(x.T if _is_projection(leaf) else x)


def _parts(leaf: str) -> tuple[str, str]:
    """The stem of a leaf's name, and weight or bias: those of q_bias_NHK are q and bias."""
    stem = leaf.removesuffix(f"_{suffix(leaf)}")
    return stem.removesuffix("_bias"), "bias" if stem.endswith("_bias") else "weight"


def _beside(family: ModelFamily, stem: str) -> list[str]:
    """The stems that lie side by side with this one in a tensor, in order; most lie alone."""
    return [other for other, name in family.layer.items() if name == family.layer[stem]]


def _flat(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a layer's leaf as [in, out], or as [out] for biases and norms."""
    sides = matrix(leaf)
    if sides is None:
        return (math.prod(shape),)
    return math.prod(shape[: len(sides[0])]), math.prod(shape[len(sides[0]) :])


def _stored(family: ModelFamily, leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the tensor that holds a layer's leaf."""
    *inputs, outputs = _flat(leaf, shape)
    whole = (*inputs, outputs * len(_beside(family, _parts(leaf)[0])))
    return whole if family.inputs_first else whole[::-1]


def _joined(family: ModelFamily, leaves: list[str], ours: Callable[[str], np.ndarray]) -> np.ndarray:
    """The tensor that holds a layer's leaves side by side."""
    found = []
    for leaf in leaves:
        x = ours(leaf)
        place_K = _pairs(family, leaf, x.shape[-1])
        x = x if place_K is None else x[..., np.argsort(place_K)]
        x = x.reshape(_flat(leaf, x.shape))
        found.append(x if family.inputs_first else x.T)
    if len(found) == 1:
        return np.ascontiguousarray(found[0])
    return np.concatenate(found, axis=-1 if family.inputs_first else 0)


def _ours(decoder: Decoder, target: Decoder, params: dict[str, Any], leaf: str, n: int | None = None) -> np.ndarray:
    """The leaf, of layer n or outside the layers, as the target decoder has it for the same logits."""
    (stem, part), one = _parts(leaf), np.float32(1)
    tree = params["vision"] if leaf.startswith(VISION) else params
    tree, own = tree if n is None else tree["layers"], leaf.removeprefix(VISION)
    factor = folded(decoder.cfg, target.cfg).get(stem, 1.0)
    ours, theirs = (d.cfg.norm_weights == "offset" and stem.startswith("norm") and part == "weight"
                    for d in (decoder, target))  # fmt: skip
    if own in tree:
        x = np.asarray(tree[own] if n is None else tree[own][n], np.float32)
    else:
        x = np.full(_shape(target, leaf), part == "weight" and not ours, np.float32)
    if factor == 1 and ours == theirs:
        return x
    return (x + one * ours) * np.float32(factor) - one * theirs


def _pairs(family: ModelFamily, leaf: str, size: int) -> np.ndarray | None:
    """The places, in a head of the family's, of the numbers of ours; None where they are the same."""
    if family.pairs == "halves" or _parts(leaf)[0] not in ("q", "k"):
        return None
    place_K = np.arange(size)
    return np.roll(place_K, size // 2) if family.pairs == "swapped" else place_K.reshape(-1, 2).T.reshape(-1)
