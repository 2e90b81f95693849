"""Roofline estimate of a training step: the longest of compute, memory traffic and network, from data sheets.

It compares settings and is never a measurement. Products reach EFFICIENCY of the data sheet's FLOP/s, memory and
network their full speed; overlapping parts count once, and the sums of tensor parallelism do not overlap.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gptjax.config import TrainConfig
from gptjax.model.counts import image_flops, parameters, token_flops
from gptjax.runtime.hardware import Topology
from gptjax.training.memory import Memory, item_size, local_sizes, saved_by_layer, score_count

# An assumption, not measured by us: well-shaped products of good programs reach 0.5 to 0.8 of the data sheet.
EFFICIENCY = 0.6


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Lower bound of a step's time and its parts, in seconds."""

    compute: float
    memory: float
    network: float
    """Gathering weights and summing gradients, which overlaps with computing."""
    tensor: float
    """Sums over the tensor axis, and keys and values over the context axis, which do not overlap."""
    tokens: int
    """Tokens in a step."""
    mfu: float
    """The model's FLOPs (`causal` of model.counts) a second, as a share of the data sheet's."""

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.network) + self.tensor

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        times = {"compute": self.compute, "memory": self.memory, "network": self.network, "tensor": self.tensor}
        return max(times, key=lambda name: times[name])


def speed(config: TrainConfig, sizes: Mapping[str, int], topology: Topology, memory: Memory, images: int = 0) -> Speed:
    """The time of a step of these settings on a mesh of these sizes, on a chip of known speed; a row has `images`."""
    chip = topology.chip
    assert chip is not None and chip.bandwidth, "callers check for a chip of known speed"
    devices, tokens = topology.devices, config.data.batch_size * config.data.length
    peak = chip.flops(config.model.dtype)
    needed = token_flops(config, images) * tokens
    compute = executed_flops(config, sizes, images) / (peak * EFFICIENCY)
    shared, alone = network_seconds(config, sizes, topology)
    estimate = Speed(
        compute=compute, memory=memory_traffic(config, sizes, memory) / chip.bandwidth, network=shared, tensor=alone,
        tokens=tokens, mfu=0.0,
    )  # fmt: skip
    return replace(estimate, mfu=needed / (estimate.seconds * devices * peak))


def executed_flops(config: TrainConfig, sizes: Mapping[str, int], images: int = 0) -> float:
    """FLOPs that one device runs in a step, with recomputation and masked scores.

    Every device of the context axis encodes the `images` of its rows.
    """
    cfg, length = config.model, config.data.length
    count = parameters(cfg, config.tokenizer.vocab_size, length)
    head = 2.0 * cfg.width * config.tokenizer.vocab_size
    layers = 2.0 * count["matrices"] - head
    seen = 1.0 if score_count(config, {"B": 1, "H": 1, "L": 1, "M": 1}) else 0.5
    heads = local_sizes(config, sizes)["H"] * sizes["tensor"]  # every device computes those that do not divide
    keys = sum(length if w is None else min(w, length) for w in cfg.layer_windows)
    attention = 4.0 * heads * cfg.head_size * keys * seen
    again = {
        "none": 0.0, "full": layers + attention, "dots": attention, "offload": layers,
        "names": layers + (0.0 if "attention" in cfg.remat_names else attention),
    }[cfg.remat]  # fmt: skip
    tokens = config.data.batch_size * length / math.prod(sizes.values())
    encoded = image_flops(cfg) * images / length * sizes["context"]
    more = (3.0 if cfg.remat == "none" else 4.0) * encoded
    return tokens * (3 * (layers + head + attention) + again + more)


def memory_traffic(config: TrainConfig, sizes: Mapping[str, int], memory: Memory) -> float:
    """Approximate bytes that a step moves to and from a device's memory, by reads and writes of each array."""
    cfg, size, item = config.model, local_sizes(config, sizes), item_size(config.model)
    tokens, N = size["B"] * size["L"], cfg.num_layers
    layer = parameters(cfg, config.tokenizer.vocab_size, 0)["matrices"] * item / sizes["tensor"]
    forward = item * tokens * (10 * cfg.width + (6 if cfg.gated else 4) * size["F"]) * N
    again = 0.0 if cfg.remat == "none" else 1.0
    # Scores, float32 and in the type of products: the softmax and its product, and as much twice in the backward pass.
    scores = (2 * 4 + 2 * item) * score_count(config, size) * N * (3 + again)
    saved = 2 * saved_by_layer(config, size, item, True) * N
    micro = 3 * layer + forward * (3 + again) + scores + saved
    return config.optim.accumulate * micro + 2 * (memory.parameters + memory.optimizer) + memory.gradients


def network_seconds(config: TrainConfig, sizes: Mapping[str, int], topology: Topology) -> tuple[float, float]:
    """Seconds of the collectives of one step that overlap with compute, and of those that do not.

    fsdp all-gathers the weights for the forward and the backward pass and reduce-scatters their float32 gradients; data
    all-reduces gradients; tensor all-reduces the stream twice a layer in each pass; context all-gathers keys and values
    and reduce-scatters their gradients. A ring sends (n - 1) / n of the bytes, twice in an all-reduce.
    """
    cfg, size, item = config.model, local_sizes(config, sizes), item_size(config.model)
    data, fsdp, tensor, context = (sizes[a] for a in ("data", "fsdp", "tensor", "context"))
    count = parameters(cfg, config.tokenizer.vocab_size, config.data.length)["total"] / tensor

    def seconds(sent: float, devices: int, inner: int) -> float:
        return sent * (devices - 1) / devices / topology.bandwidth(devices, inner) if devices > 1 else 0.0

    inner = tensor * context
    overlapping = seconds((2 * item + 4) * count, fsdp, inner) + seconds(2 * 4 * count / fsdp, data, fsdp * inner)
    stream = item * size["B"] * size["L"] * cfg.width
    passes = 2 if cfg.remat == "none" else 3
    alone = seconds(2 * 2 * passes * stream * cfg.num_layers, tensor, context)
    keys = 2 * item * size["B"] * size["M"] * size["G"] * size["K"]
    alone += seconds((passes + 2) * keys * cfg.num_layers, context, 1)
    return config.optim.accumulate * overlapping, config.optim.accumulate * alone
