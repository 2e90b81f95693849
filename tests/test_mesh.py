"""Promise 1: the same numbers on every mesh, with accumulation, remat, unrolled layers, packed and padded rows."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import optax
import pytest

from gptjax.assemble import language_model_loss
from gptjax.config import MeshConfig, ModelConfig
from gptjax.data.packing import pack_documents, pad_documents
from gptjax.decoder import Decoder, init_params
from gptjax.sharding import AXES, make_mesh, put
from gptjax.train import compile_step, init_state, make_init, make_train_step

VOCAB, LENGTH, STEPS = 60, 24, 10
GPT2 = ModelConfig(num_layers=2, width=32, num_heads=4, dtype="float32")
FAMILIES = {
    "gpt2": GPT2,
    "llama": dataclasses.replace(
        GPT2, positions="rope", norm="rmsnorm", activation="swiglu", biases=False, tied=False, queries_per_kv=2
    ),
    "modern": dataclasses.replace(
        GPT2, positions="rope", norm="rmsnorm", activation="relu2", biases=False, tied=False, qk_norm=True, window=5,
        global_every=2, attention_softcap=20.0, logit_softcap=15.0, attention="blockwise", attention_block=5,
    ),
}  # fmt: skip
MESHES = {
    "data=8": MeshConfig(),
    "fsdp=8": MeshConfig(data=1, fsdp=8),
    "fsdp=4 tensor=2": MeshConfig(data=1, fsdp=4, tensor=2),
    "data=2 fsdp=2 tensor=2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp=4 context=2": MeshConfig(data=1, fsdp=4, context=2),
    "tensor=2 context=4": MeshConfig(data=1, tensor=2, context=4),
}

# Each value of each setting at least once, and the pairs that share a mechanism: accumulation and remat both rewrite
# the backward pass, accumulation and padding both change what is averaged. The exhaustive test has the full product.
SUBSET = [
    ("data=8", 1, "none", 1, "packed"),
    ("fsdp=8", 4, "full", 0, "padded"),
    ("fsdp=4 tensor=2", 1, "full", 1, "packed"),
    ("fsdp=4 tensor=2", 4, "none", 0, "packed"),
    ("data=2 fsdp=2 tensor=2", 4, "dots", 1, "padded"),
    ("fsdp=4 context=2", 1, "none", 1, "packed"),
]
MODERN = [("tensor=2 context=4", 4, "names", 1, "padded"), ("fsdp=4 tensor=2", 1, "names", 0, "packed")]


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def batch(step: int, packing: str) -> dict[str, np.ndarray]:
    """32 rows of three documents each, or the same 96 documents one a row."""
    rng = np.random.default_rng(step)
    sizes = [(a, b, LENGTH + 3 - a - b) for a, b in rng.integers(4, 10, (32, 2)).tolist()]  # inputs are one shorter
    documents = [rng.integers(0, VOCAB, n).tolist() for n in itertools.chain(*sizes)]
    if packing == "padded":
        return pad_documents(documents, LENGTH)
    packed = pack_documents(documents, LENGTH)
    assert (packed["segments_BL"].max(axis=1) == 3).all()
    return packed


@functools.cache
def run(family: str, mesh_name: str, accumulate: int, remat: str, unroll: int, packing: str):
    """(ten losses, the first step's gradients) of a setting; mesh "one" is a single device."""
    mesh = (
        jax.make_mesh((1,) * 4, AXES, devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,) * 4)
        if mesh_name == "one"
        else make_mesh(MESHES[mesh_name])
    )
    decoder = Decoder(dataclasses.replace(FAMILIES[family], remat=remat, unroll=unroll), VOCAB, LENGTH)
    # trace(0) keeps the gradient as the step averaged it, before the optimizer touches it.
    tx = optax.chain(optax.trace(decay=0.0), optax.adamw(1e-2))
    with jax.set_mesh(mesh):
        state = init_state(make_init(init_params(decoder), tx), 0, mesh)
        step = make_train_step(language_model_loss(decoder), tx, lambda u: 1e-2, accumulate)
        step = compile_step(step, mesh, state, {}, batch(0, packing))
        losses, first = [], None
        for i in range(STEPS):
            state, metrics = step(state, {}, put(batch(i, packing), mesh))
            losses.append(float(metrics["loss"]))
            first = jax.device_get(state.opt_state[0].trace) if first is None else first
    return losses, first


def assert_same(setting, reference):
    (losses, grads), (wanted, wanted_grads) = setting, reference
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(wanted_grads))
    assert largest > 1e-3, "the gradients must be large enough to be compared"
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        want = functools.reduce(lambda tree, key: tree[key.key], path, wanted_grads)
        bound = 1e-4 * max(np.abs(want).max(), 1e-3 * largest)
        assert np.abs(g - want).max() <= bound, jax.tree_util.keystr(path)


def marked(cases: list[tuple]) -> list:
    """Every other case belongs to the fast subset too: compiling is most of the suite's time."""
    return [case if i % 2 else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(cases)]


@pytest.mark.parametrize(
    ("family", "setting"),
    marked([(f, s) for f, settings in (("gpt2", SUBSET), ("llama", SUBSET), ("modern", MODERN)) for s in settings]),
    ids=str,
)
def test_a_mesh_and_its_settings_do_not_change_the_numbers(family, setting):
    assert_same(run(family, *setting), run(family, "one", 1, "none", 1, "packed"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "setting",
    list(itertools.product(MESHES, (1, 4), ("none", "full", "dots"), (1, 0), ("packed", "padded"))),
    ids=str,
)
def test_no_combination_of_settings_changes_the_numbers(family, setting):
    try:
        assert_same(run(family, *setting), run(family, "one", 1, "none", 1, "packed"))
    finally:
        jax.clear_caches()  # hundreds of programs in one process would run into the limit on memory maps
