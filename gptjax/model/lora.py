"""Low-rank adaptation: the trained leaves beside a matrix, joined with a frozen base inside the loss, and merged.

A matrix q_NDHK gets `q_a_NDR` (inputs to rank) and `q_b_NRHK` (rank to outputs); `ops.linear` adds (x a) b where it
finds them. b begins as 0, so that the first step's model is the base, bit for bit; the base gets no gradient, and with
the leaves left out it is the reference policy that alignment compares with.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import LoraConfig, ModelConfig
from gptjax.config.section import InputError
from gptjax.model.block import Params, layer_params
from gptjax.model.decoder import dims
from gptjax.parallel.sharding import matrix, suffix


def lora_names(name: str) -> tuple[str, str]:
    """The names of a matrix's two leaves: ("q_a_NDR", "q_b_NRHK") for "q_NDHK"."""
    sides = matrix(name)
    assert sides is not None, f"{name} is no matrix"
    letters, (inputs, outputs) = suffix(name), sides
    stem, stack = name.removesuffix(letters), letters[: len(letters) - len(inputs + outputs)]
    return f"{stem}a_{stack}{inputs}R", f"{stem}b_{stack}R{outputs}"


def init_lora(cfg: LoraConfig, model: ModelConfig) -> Callable[[jax.Array], Params]:
    """Builds init(key) -> {"layers": {a's and b's}}: a is normal with variance 1 / fan-in, b is 0, both in float32.

    Raises InputError where the model has none of cfg.targets.
    """
    size = dims(model, 0, 0) | {"R": cfg.rank}
    targets = [n for n in layer_params(model) if n.removesuffix(f"_{suffix(n)}") in cfg.targets and matrix(n)]
    if not targets:
        raise InputError(f"lora.targets={cfg.targets}: the model has none of these matrices")

    def init(key: jax.Array) -> Params:
        layers: Params = {}
        for name, k in zip(targets, jax.random.split(key, len(targets)), strict=True):
            a, b = lora_names(name)
            shape = [size[letter] for letter in suffix(a)]
            fan_in = jnp.prod(jnp.array([size[letter] for letter in suffix(a)[1:-1]]))
            layers[a] = jax.random.normal(k, shape) / jnp.sqrt(fan_in)
            layers[b] = jnp.zeros([size[letter] for letter in suffix(b)])
        return {"layers": layers}

    return init


def join_lora(base: Params, lora: Params, scale: float) -> Params:
    """The parameters with the leaves among them, b times `scale`, as the decoder and `linear` read them.

    `lora` may have leaves of its own outside of the layers, such as a head; so may it in `merge_lora`.
    """
    layers = {name: x * scale if "_b_" in name else x for name, x in lora["layers"].items()}
    return base | lora | {"layers": base["layers"] | layers}


def merge_lora(base: Params, lora: Params, scale: float) -> Params:
    """The parameters with scale x a b added to their matrices, in the base's names and types: to export and decode."""
    layers = dict(base["layers"])
    for name, w in base["layers"].items():
        if matrix(name) is None or lora_names(name)[0] not in lora["layers"]:
            continue
        a, b = lora_names(name)
        product = jnp.einsum(
            f"{suffix(a)},{suffix(b)}->{suffix(name)}", lora["layers"][a], lora["layers"][b], precision="highest"
        )
        layers[name] = (w + scale * product).astype(w.dtype)
    return base | lora | {"layers": layers}


def adapted(loss_fn: Callable, scale: float, base: str = "base") -> Callable:
    """The loss function of the leaves alone, whose frozen[base] holds the model's parameters."""

    def of_lora(params: Params, frozen: Any, batch: dict[str, jax.Array], key: jax.Array):
        return loss_fn(join_lora(frozen[base], params, scale), frozen, batch, key)

    return of_lora
