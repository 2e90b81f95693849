"""Numbers of a setting: a tiny model trained for ten steps, and the distance between two trainings.

Two agree where their ten losses do within LOSS_BOUND of their size, and each leaf of the first gradient g within
GRADIENT_BOUND max(max|g of the leaf|, SMALL max|g|): in float32, at the highest matmul precision, without dropout.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gptjax.config import MeshConfig, VisionConfig
from gptjax.data.packing import Batch, pack_documents, pad_documents
from gptjax.diagnostics.verify.settings import Setting
from gptjax.model.decoder import Decoder, init_params
from gptjax.parallel.sharding import make_mesh, on_host, to_global
from gptjax.runs.digest import named_leaves
from gptjax.training.losses import language_model_loss
from gptjax.training.step import compile_step, init_state, make_init, make_train_step

VOCAB, LENGTH, STEPS = 60, 32, 10
LOSS_BOUND, GRADIENT_BOUND, SMALL = 1e-5, 1e-4, 1e-3
# A kernel for bfloat16 alone is compared with plain attention in bfloat16: both round, each in its own order.
LOW_LOSS_BOUND, LOW_GRADIENT_BOUND = 1e-3, 5e-2


class Numbers(NamedTuple):
    """The numbers of a training: ten losses, and the first step's gradients by parameter name."""

    losses: list[float]
    gradients: Any


class Difference(NamedTuple):
    """The distance from a reference: the largest relative loss, and the largest of a gradient leaf in its scale."""

    loss: float
    gradient: float
    leaf: str


def device_mesh(mesh: MeshConfig | None) -> Mesh:
    """The mesh of all devices, or for None of the first device of this process."""
    return make_mesh(MeshConfig(), jax.local_devices()[:1]) if mesh is None else make_mesh(mesh)


def batch(step: int, packing: str, rows: int = 32, vision: VisionConfig | None = None) -> Batch:
    """Rows of three documents each, or the same documents one a row, with images where a model reads them."""
    if vision and vision.patch:
        return with_images(batch(step, packing, rows), vision)
    rng = np.random.default_rng(step)
    sizes = [(a, b, LENGTH + 3 - a - b) for a, b in rng.integers(4, 10, (rows, 2)).tolist()]  # inputs are one shorter
    documents = [rng.integers(0, VOCAB, n).tolist() for n in itertools.chain(*sizes)]
    if packing == "padded":
        return pad_documents(documents, LENGTH)
    packed = pack_documents(documents, LENGTH)
    assert (packed["segments_BL"].max(axis=1) == 3).all()
    return packed


def with_images(rows: Batch, vision: VisionConfig) -> Batch:
    """The rows with an image behind the first token of every document that has room for one and a token more."""
    T, (count, length) = vision.num_tokens, rows["inputs_BL"].shape
    last_BL = np.tile(np.arange(length, dtype=np.int32), (count, 1))
    index_BL, until_BL = np.full_like(last_BL, -1), np.full_like(last_BL, length)
    weights_BL = rows["weights_BL"].copy()
    patches_BIPY = np.zeros((count, 3, vision.num_patches, vision.patch_size), np.uint8)
    for row, segments_L in enumerate(rows["segments_BL"]):
        image = 0
        for number in range(1, segments_L.max() + 1):
            places = np.flatnonzero(segments_L == number)
            until_BL[row, places] = places[-1] + 1
            if len(places) < T + 2:
                continue
            seed, here = rows["inputs_BL"][row, places].tolist(), places[1 : T + 1]
            patches_BIPY[row, image] = np.random.default_rng(seed).integers(0, 256, patches_BIPY.shape[2:])
            index_BL[row, here], last_BL[row, here] = np.arange(T) + image * T, here[-1]
            weights_BL[row, places[: T + 1]] = 0
            image += 1
    images = {"patches_BIPY": patches_BIPY, "index_BL": index_BL, "last_BL": last_BL, "until_BL": until_BL}
    return {**rows, "weights_BL": weights_BL, **images}


def num_rows() -> int:
    """Rows of a packed batch: at least 32, and divisible over any mesh and four micro-batches."""
    parts = 4 * jax.device_count()
    return parts * math.ceil(32 / parts)


# trace(0) keeps the gradient as the step averaged it, before the optimizer touches it.
def optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.trace(decay=0.0), optax.adamw(1e-2))


def decoder_of(setting: Setting) -> Decoder:
    return Decoder(setting.model, VOCAB, LENGTH)


@functools.cache
def first_state(family: str, mesh: MeshConfig | None = None) -> Any:
    """The initial state as host arrays, made on a mesh or on one device."""
    over = device_mesh(mesh)
    with jax.set_mesh(over):
        init = make_init(init_params(decoder_of(Setting(family=family))), optimizer())
        return on_host(init_state(init, 0, over))


def compiled(setting: Setting) -> Callable:
    """Compiles the training step of a setting; safe to call in a thread."""
    mesh, state, rows = device_mesh(setting.mesh), first_state(setting.family), num_rows()
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        step = make_train_step(
            language_model_loss(decoder_of(setting)), optimizer(), lambda _: jnp.float32(1e-2), setting.accumulate
        )
        # Shapes alone: several processes may not give jit arrays of the host.
        given = state, {}, batch(0, setting.packing, rows, setting.model.vision)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
        return compile_step(step, mesh, *shapes).lower(*shapes).compile()


def run(setting: Setting, step: Callable | None = None) -> Numbers:
    """Trains ten steps; `step` is the result of `compiled` for the setting, if it was called before."""
    step = step or compiled(setting)
    mesh, rows = device_mesh(setting.mesh), num_rows()
    losses, gradients = [], None
    with jax.set_mesh(mesh):
        state = to_global(first_state(setting.family), mesh)
        for i in range(STEPS):
            state, metrics = step(state, {}, to_global(batch(i, setting.packing, rows, setting.model.vision), mesh))
            losses.append(float(metrics["loss"]))
            gradients = on_host(state.opt_state[0].trace) if gradients is None else gradients
    return Numbers(losses, gradients)


def difference(numbers: Numbers, reference: Numbers) -> Difference:
    """The distance of numbers from a reference; NaN counts as infinite."""
    far = [abs(a - b) / abs(b) for a, b in zip(numbers.losses, reference.losses, strict=True)]
    wanted = jax.tree.leaves(reference.gradients)
    largest = max(float(np.abs(g).max()) for g in wanted)
    assert largest > 1e-3, "the gradients must be large enough to be compared"
    leaves = {
        name: float(np.abs(g - want).max() / max(np.abs(want).max(), SMALL * largest))
        for name, g, want in zip(named_leaves(reference.gradients), jax.tree.leaves(numbers.gradients), wanted)
    }
    worst = max(leaves, key=lambda name: finite(leaves[name]))
    return Difference(max(map(finite, far)), finite(leaves[worst]), worst)


def bounds(setting: Setting) -> tuple[float, float]:
    """The largest allowed distance of a setting's losses and of its gradients from its reference."""
    low = setting.model.dtype == "bfloat16"
    return (LOW_LOSS_BOUND, LOW_GRADIENT_BOUND) if low else (LOSS_BOUND, GRADIENT_BOUND)


def finite(x: float) -> float:
    """The number, or infinity for NaN."""
    return x if math.isfinite(x) else math.inf
