"""Memory of a training step on each device, computed from its settings without compiling.

Arrays are counted by their shapes, sharded by their names and, on a TPU, padded to whole tiles. The number of
temporaries that the compiler keeps at the same time follows from no shape: `Temporaries` holds it, fitted to libtpu's
reports. benchmarks/plan.py measures the error of this model, also on settings that were not used for the fit.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from gptjax.config import ModelConfig, TrainConfig
from gptjax.model.counts import VOCAB_MULTIPLE, padded_vocab
from gptjax.ops.attention import select_kernel
from gptjax.ops.device import Device
from gptjax.ops.linear import count_chunks
from gptjax.parallel.sharding import AXES, shardings


@dataclass(frozen=True, kw_only=True)
class Temporaries:
    """Numbers of arrays of each kind that the compiler keeps at once in a layer's backward pass, and in the loss."""

    scores: float = 9.0
    """Bytes a score (rows x heads x length x keys) in plain attention's gradient: of one float32 array and others."""
    scores_fused: float = 4.0
    """The same for one row, or where the forward pass kept its products of them: then no float32 array is made."""
    stream: float = 3.0
    """Arrays of rows x length x width, in attention's gradient and in the MLP's."""
    waiting: float = 1.0
    """Arrays of rows x length x MLP width that still wait for their weight gradient's product during attention's
    gradient; twice as many with products in pieces."""
    hidden: float = 3.0
    """Arrays of rows x length x MLP width in the MLP's gradient."""
    hidden_pieces: float = 5.0
    """The same where its products are done in pieces, with which nothing fuses (see IN_PIECES)."""
    gated: float = 6.0
    """The same for a gated MLP, in pieces or not. Arrays that the forward pass saved are not among them."""
    block: float = 4.0
    """Bytes a score of one block of queries and keys in blockwise attention's gradient: one float32 array."""
    gathered: float = 1.0
    """Gathered copies of one layer's weights, in the type of products, with fsdp."""
    head: float = 2.0
    """Gathered copies of a sharded head (whole but for its tensor shard, in the type of products) during the loss: one
    is multiplied, one in transit."""
    outside: float = 0.0
    """More of them for each loop that a copy is made before and lives through: over the chunks of the loss where the
    head is a sharded matrix of its own, and over several micro-batches."""
    head_pieces: float = 12.0
    """Pieces of the head, each one device's shard, where it is sent in pieces: in transit in both directions, as
    received and transposed, for the forward product, the stream's gradient and the head's own gradient."""
    muon: float = 10.0
    """float32 arrays of the size of the largest stack of matrices in Muon's update, beside the gradient and update."""
    muon_shared: float = 5.0
    """More of them where devices share the matrices."""


# libtpu multiplies with pieces of a matrix while others are in transit where the fsdp axis alone shards the batch, for
# this range of devices; of the head, where a device's bfloat16 piece has at most PIECE_BYTES.
IN_PIECES, PIECE_BYTES = (4, 32), 32 * 2**20
# Bytes of temporaries that libtpu puts into the chip's fast memory: about half of the 128 MiB of VMEM (CMEM on v4).
FAST = 64 * 2**20
BLOCK = 512  # positions in a block of blockwise attention
MASK = 4  # bytes a score in plain attention more, where the rows hold images: the mask is not made of two comparisons
# libtpu moves loop invariants before the loop on v5e, and keeps them in it on the others. On v4 no whole matrix is in
# transit while the chip computes.
BY_CHIP = {"v5e": Temporaries(outside=1.0), "v4": Temporaries(head=1.0)}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each device, by kind."""

    parameters: int
    optimizer: int
    """Moments, averages of the parameters, counters."""
    gradients: int
    weights: int
    """Copies of the weights in the type of products, of this device and gathered from others."""
    activations: int
    """Arrays that the forward pass saves for the backward pass, and the temporaries of one layer."""
    logits: int
    """A chunk of logits and its gradient; 0 where the peak is in a layer's backward pass instead."""
    batch: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    @property
    def temporaries(self) -> int:
        """Bytes of everything but state and batch."""
        return self.gradients + self.weights + self.activations + self.logits


def count_memory(
    config: TrainConfig,
    shapes: Any,
    sizes: Mapping[str, int],
    device: Device,
    frozen: Mapping[str, Any] | None = None,
    images: int = 0,
) -> int:
    """Bytes on each device of a mesh of these sizes during a step; `shapes` is jax.eval_shape of the state's init.

    `frozen` are the shapes of weights that are not trained, each model's by a name; `images` are those of a row.
    """
    kernel = select_kernel(config.model, config.data.length, device)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=kernel))
    state = state_bytes(config, shapes, sizes, tiles=device.tiled)
    held = sum(frozen_bytes(config, weights, sizes, tiles=device.tiled) for weights in (frozen or {}).values())
    return step_memory(config, state, sizes, device=device, images=images).total + held


def frozen_bytes(config: TrainConfig, weights: Any, sizes: Mapping[str, int], *, tiles: bool) -> int:
    """Bytes on each device of a model's weights that are not trained, and of their layers in the type of products."""
    mesh = jax.sharding.AbstractMesh(tuple(sizes[a] for a in AXES), AXES)
    layers = _bytes(weights["layers"], mesh, tiles)
    return _bytes(weights, mesh, tiles) + (layers // 2 if item_size(config.model) == 2 else 0)


class StateBytes(NamedTuple):
    """Bytes of a run's state on each device."""

    parameters: int
    layers: int
    """Bytes of the parameters in the stacked layers."""
    optimizer: int
    layer: int
    """Bytes of one layer's float32 weights, whole but for the tensor shard."""
    largest: int
    """Bytes of the largest stack of the layers."""
    vision: int = 0
    """Bytes of the parameters in the encoder of images."""


def state_bytes(config: TrainConfig, shapes: Any, sizes: Mapping[str, int], *, tiles: bool) -> StateBytes:
    """Bytes of the state on a mesh of these sizes; `shapes` is jax.eval_shape of its init.

    With `tiles` arrays are padded as a TPU lays them out. Raises InputError where a parameter does not divide.
    """
    mesh = jax.sharding.AbstractMesh(tuple(sizes[a] for a in AXES), AXES)
    whole = jax.sharding.AbstractMesh(tuple(sizes["tensor"] if a == "tensor" else 1 for a in AXES), AXES)
    stacks = {name: _bytes({name: x}, mesh, tiles) for name, x in shapes.params["layers"].items()}
    parameters = sum(stacks.values()) + _bytes({n: x for n, x in shapes.params.items() if n != "layers"}, mesh, tiles)
    counters = {"key_W": shapes.key_W, "step": shapes.step, "updates": shapes.updates}
    optimizer = _bytes((shapes.opt_state, shapes.ema, counters), mesh, tiles)
    layer = _bytes(shapes.params["layers"], whole, False) // config.model.num_layers
    vision = _bytes({"vision": shapes.params.get("vision", {})}, mesh, tiles)
    return StateBytes(parameters, sum(stacks.values()), optimizer, layer, max(stacks.values()), vision)


def step_memory(
    config: TrainConfig,
    state: StateBytes,
    sizes: Mapping[str, int],
    *,
    device: Device,
    kept: Temporaries = Temporaries(),
    images: int = 0,
) -> Memory:
    """Memory of a step of these settings, model.attention chosen (not auto), on a mesh of these sizes.

    `device` is the kind of device that the step is for, `images` how many each row has.
    """
    cfg, size, tiles = config.model, local_sizes(config, sizes), device.tiled
    item, fast = item_size(cfg), FAST if tiles else 0
    rows, V, D, layers = size["B"], size["V"], cfg.width, state.layers
    stream = item * rows * size["L"] * D
    masks = MASK * score_count(config, size) if images else 0
    saved = cfg.num_layers * (saved_by_layer(config, size, item, tiles) + (masks if cfg.remat == "none" else 0))
    of_images, encoder = _image_memory(config, sizes, images, tiles, kept) if images else (0, 0.0)
    several, shared = config.optim.accumulate > 1, sizes["fsdp"] > 1

    # Alive through the whole backward pass: copies of this device's weights, the float32 gradient of the head
    # (by then also the embedding's), and the sums of all gradients over several micro-batches.
    head_gradient = 4 * V * D // sizes["fsdp"]
    summed = state.parameters if several else state.vision
    copies = layers // 2
    if several:
        # Made once for all micro-batches: the transposed head, and the embedding table in float32.
        copies += (4 if item == 2 else 2) * V * D // sizes["fsdp"]
        # A scan that saves all of a layer for its gradient saves these copies a second time.
        copies += layers // 2 if cfg.remat == "none" else 0
    gathered = kept.gathered * state.layer // 4 * item if shared else 0
    inner = max(0, _layer_gradient(config, size, sizes, tiles, kept) + masks - fast)
    inner = max(inner, encoder - saved)  # the encoder's gradient is the last one, when the decoder's arrays are free
    saved += of_images
    backward = inner + gathered + layers
    chunks = count_chunks(device, size["L"], 4 * rows * V, 4 * V * D / (math.prod(sizes.values()) / sizes["tensor"]))
    # The gradient of the logits is an array of its own where the head's product waits for other devices, and in
    # bfloat16 also where the ids that pad the vocabulary are masked.
    chunk, masked = 4 * rows * V * size["L"] // chunks, config.tokenizer.vocab_size % VOCAB_MULTIPLE > 0
    logits = (1.5 if shared else 1) * chunk + (max(0, chunk // 2 - fast) if masked and item == 2 else 0)
    # One chunk is no loop: nothing is in transit for the next turn.
    held = kept.head if chunks > 1 else 1
    whole = held + kept.outside * ((not cfg.tied) + several) if shared else 0 if several else 2
    pieces = kept.head_pieces / sizes["fsdp"] if _head_in_pieces(item * V * D, item, sizes, tiles) else whole
    # A float32 matrix is gathered as it is and multiplied as bfloat16, as a TPU does by default.
    heads = max(0, pieces * (item / 2 + 1 if shared else 2) * V * D - fast)
    loss = logits + heads + 2 * stream
    alive = summed + head_gradient
    muon = kept.muon + (kept.muon_shared if sizes["fsdp"] > 1 else 0)
    update = layers + muon * state.largest - saved - copies if config.optim.kind == "muon" else 0
    if update > max(loss, backward):
        gradients, weights, temporary, logits = alive + layers + update, 0, -saved, 0
    elif loss > backward:
        gradients, weights, temporary = alive, copies + heads, 2 * stream
    else:
        gradients, weights, temporary, logits = alive + layers, copies + gathered, inner, 0
    return Memory(
        parameters=state.parameters, optimizer=state.optimizer, gradients=round(gradients), weights=round(weights),
        activations=round(saved + temporary), logits=round(logits),
        batch=_batch_bytes(config, size, images, tiles),
    )  # fmt: skip


def local_sizes(config: TrainConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of one device's shard of a micro-batch, by letter; heads that do not divide stay whole."""
    cfg, tensor = config.model, sizes["tensor"]
    rows = config.data.batch_size // (sizes["data"] * sizes["fsdp"] * config.optim.accumulate)
    heads, groups = (n // tensor if n % tensor == 0 else n for n in (cfg.num_heads, cfg.num_kv_heads))
    return {
        "B": rows, "L": config.data.length // sizes["context"], "M": config.data.length, "H": heads, "G": groups,
        "K": cfg.head_size, "F": cfg.mlp_width // tensor, "V": padded_vocab(config.tokenizer.vocab_size) // tensor,
    }  # fmt: skip


def saved_by_layer(config: TrainConfig, size: Mapping[str, int], item: int, tiles: bool) -> int:
    """Bytes that the forward pass of one layer saves for its gradient, by model.remat."""
    cfg = config.model
    tokens, head = size["B"] * size["L"], _head(config, size, tiles)
    stream, gated = tokens * cfg.width, cfg.gated
    products = tokens * size["F"] * (2 if gated else 1)
    query, key = tokens * size["H"] * head, tokens * size["G"] * head
    named = {"query": query, "key": key, "value": key, "attention": query, "mlp": products}
    if cfg.remat == "full" or cfg.remat == "offload":
        return item * stream
    if cfg.remat == "names":
        # Only a product reads the outputs of plain attention, and a TPU multiplies bfloat16.
        outputs = "attention" in cfg.remat_names and cfg.attention == "plain" and tiles
        return item * (stream + sum(named[n] for n in cfg.remat_names)) - (item - 2) * query * outputs
    if cfg.remat == "dots":
        return item * (2 * stream + query + 2 * key + products)
    # Each norm saves two float32 arrays; GELU, computed in float32, four and the input of the next product. With
    # products in float32 the stream is among these. The products of a TPU read bfloat16 in either case.
    count = (1 if cfg.parallel else 2) + (2 if cfg.post_norms else 0)
    norms, also = 4 * stream * 2 * count, 0 if item == 4 else 1
    read = 2 if tiles else item
    gelu = 16 + (2 if tiles else item * also)
    each = {"swiglu": 6 * item, "geglu": gelu + 3 * item, "relu2": 3 * item}.get(cfg.activation, gelu)
    inside = each * tokens * size["F"]
    kernel = item * stream if cfg.attention == "splash" else 0
    kept = norms + 2 * item * also * stream + inside + 2 * item * (query + key) + kernel
    return kept + (4 + read) * score_count(config, size)


def _batch_bytes(config: TrainConfig, size: Mapping[str, int], images: int, tiles: bool) -> int:
    """Bytes of a batch: five arrays of rows, three more with images, and their patches."""
    rows, vision = size["B"] * config.optim.accumulate, config.model.vision
    count = (8 if images else 5) * padded((rows, size["L"]), 4, tiles)
    return count + (padded((rows, images, vision.num_patches, vision.patch_size), 1, tiles) if images else 0)


def _image_memory(
    config: TrainConfig, sizes: Mapping[str, int], images: int, tiles: bool, kept: Temporaries
) -> tuple[int, float]:
    """Bytes that the encoder and the projector save for their gradient, and those of a layer's temporaries.

    Each layer saves what one of the decoder's does, and each product outside of them its input. Every device of the
    context axis has all of it.
    """
    vision, item = config.model.vision, item_size(config.model)
    count = local_sizes(config, sizes)["B"] * images
    outside = vision.num_patches * vision.patch_size + vision.num_tokens * vision.merged_size
    outside += 3 * vision.num_tokens * config.model.width if vision.projector == "mlp" else 0
    if not vision.layers:
        return item * count * outside, 0.0
    own = dataclasses.replace(config, model=config.model.encoder)
    size = local_sizes(own, sizes) | {"B": count, "L": vision.num_places, "M": vision.num_places}
    saved = item * count * outside + vision.layers * saved_by_layer(own, size, item, tiles)
    return saved, _layer_gradient(own, size, {**sizes, "context": 1}, tiles, kept)


def _layer_gradient(
    config: TrainConfig, size: Mapping[str, int], sizes: Mapping[str, int], tiles: bool, kept: Temporaries
) -> float:
    """Bytes of the temporaries of a layer's gradient: the larger of the MLP's, which comes first, and attention's.

    The inputs of attention's gradient, recomputed by the forward pass unless it saved them, are alive during both.
    """
    cfg, item, rows = config.model, item_size(config.model), size["B"]
    tokens, width, none = rows * size["L"], _head(config, size, tiles), cfg.remat == "none"
    stream, hidden = item * tokens * cfg.width, item * tokens * size["F"]
    # A TPU multiplies bfloat16: of float32 temporaries, the half that products read are stored as that.
    hidden *= (item + 2) / (2 * item) if tiles else 1
    in_pieces = _in_pieces(sizes, tiles)

    scores = score_count(config, size)
    query, key = item * tokens * size["H"] * width, item * tokens * size["G"] * width
    # Each of splash's sums of exponentials is padded to a row of 128.
    sums = 512 * tokens * size["H"] if cfg.attention == "splash" and tiles else 0
    # Queries, keys, values, outputs and plain attention's weights; splash's sums only with products in pieces.
    weights = 0 if none else 2 * scores
    read = 0 if none else 2 * query + 2 * key + weights + (sums if in_pieces else 0)
    # Elements of the gradients of queries, keys and values; a shard of a row has those of all of its keys.
    gradients = (tokens * size["H"] + 2 * rows * size["M"] * size["G"]) * width
    if scores:
        own = (kept.scores_fused if rows == 1 or none else kept.scores) * scores - weights
    elif cfg.attention == "blockwise":
        own = query + 4 * gradients + kept.block * rows * size["H"] * min(BLOCK, size["L"]) * min(BLOCK, size["M"])
    else:
        own = query + max(item * gradients, sums)
    if sizes["context"] > 1:
        own += 2 * item * rows * size["M"] * size["G"] * width  # keys and values of the whole row
    if cfg.attention == "cudnn" and config.data.several_documents:
        own += 2 * rows * size["L"] * size["M"]  # its mask
    gated = cfg.gated
    arrays = kept.gated if gated else kept.hidden_pieces if in_pieces else kept.hidden
    if cfg.remat in ("none", "dots") or (cfg.remat == "names" and "mlp" in cfg.remat_names):
        arrays -= 2 if gated else 1
    return read + kept.stream * stream + max(own + kept.waiting * (2 if in_pieces else 1) * hidden, arrays * hidden)


def _in_pieces(sizes: Mapping[str, int], tiles: bool) -> bool:
    """True where products with sharded weights are done in pieces."""
    low, high = IN_PIECES
    return tiles and sizes["data"] == sizes["context"] == 1 and low <= sizes["fsdp"] <= high


def _head_in_pieces(head: int, item: int, sizes: Mapping[str, int], tiles: bool) -> bool:
    """True where products with a head of `head` bytes are done in pieces; its float32 gradient never is."""
    return item == 2 and _in_pieces(sizes, tiles) and head <= PIECE_BYTES * sizes["fsdp"]


def _head(config: TrainConfig, size: Mapping[str, int], tiles: bool) -> int:
    """Elements of one head of one token: splash's arrays end in heads, which a TPU pads to 128."""
    return -(-size["K"] // 128) * 128 if config.model.attention == "splash" and tiles else size["K"]


def score_count(config: TrainConfig, size: Mapping[str, int]) -> int:
    """Scores of one layer on a device with plain attention; 0 with other kernels."""
    return size["B"] * size["H"] * size["L"] * size["M"] if config.model.attention == "plain" else 0


def item_size(cfg: ModelConfig) -> int:
    """Bytes of an element in the type of products."""
    return 2 if cfg.dtype == "bfloat16" else 4


def _bytes(tree: Any, mesh: Any, tiles: bool) -> int:
    """Bytes on each device of a tree of shapes, sharded by their names."""

    def local(x: Any, sharding: Any) -> int:
        return padded(sharding.shard_shape(x.shape), x.dtype.itemsize, tiles)

    return sum(jax.tree.leaves(jax.tree.map(local, tree, shardings(tree, mesh))))


@functools.cache
def padded(shape: tuple[int, ...], item: int, tiles: bool) -> int:
    """Bytes of an array; on a TPU its two minor dimensions are padded to tiles of 8 x 128.

    XLA chooses the two dimensions, as is done here, so that the padding is smallest.
    """
    if not tiles:
        return math.prod(shape) * item
    if len(shape) < 2:
        tile = 128 if math.prod(shape) <= 1024 else 1024
        return max(512, -(-math.prod(shape) // tile) * tile * item)
    best = math.inf
    for minor in range(len(shape)):
        for second in range(len(shape)):
            if minor != second:
                rows = min(8, 1 << (shape[second] - 1).bit_length())
                filled = -(-shape[minor] // 128) * 128 * -(-shape[second] // rows) * rows
                best = min(best, math.prod(shape) // (shape[minor] * shape[second]) * filled)
    return int(best) * item
