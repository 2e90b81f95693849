"""Promise 1: the same numbers on every mesh, with accumulation, remat, unrolled layers, packed and padded rows.

`gptjax verify` proves it on the user's devices; these are its settings, and its functions, on eight fake ones.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from test_verify import look_ahead

from gptjax.config import MeshConfig
from gptjax.diagnostics.verify import numbers
from gptjax.diagnostics.verify.settings import Setting
from gptjax.model import block
from gptjax.ops.device import device

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
IMAGES = [
    ("fsdp=4 tensor=2", 4, "none", 0, "packed"),
    ("fsdp=4 context=2", 1, "full", 1, "padded"),
    ("data=8", 1, "names", 1, "packed"),
]
MODERN = [("tensor=2 context=4", 4, "names", 1, "padded"), ("fsdp=4 tensor=2", 1, "names", 0, "packed")]


run = functools.cache(numbers.run)


def setting(family: str, mesh: str, accumulate: int, remat: str, unroll: int, packing: str) -> Setting:
    attention = "blockwise" if family == "modern" else "plain"
    return Setting(family=family, mesh=MESHES[mesh], accumulate=accumulate, remat=remat, unroll=unroll, packing=packing,
                   attention=attention)  # fmt: skip


def assert_same(tried: Setting) -> None:
    found = numbers.difference(numbers.run(tried), run(tried.reference))
    assert found.loss <= 1e-5 and found.gradient <= 1e-4, found


def marked(cases: list[tuple]) -> list:
    """Every other case belongs to the fast subset too: compiling is most of the suite's time."""
    return [case if i % 2 else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(cases)]


@pytest.mark.parametrize(
    ("family", "options"),
    marked(
        [
            (family, options)
            for family, tried in (("gpt2", SUBSET), ("llama", SUBSET), ("modern", MODERN), ("images", IMAGES))
            for options in tried
        ]
    ),
    ids=str,
)
def test_a_mesh_and_its_settings_do_not_change_the_numbers(family, options):
    assert_same(setting(family, *options))


@pytest.mark.parametrize("mesh", ["fsdp=4 tensor=2", pytest.param("fsdp=8", marks=pytest.mark.exhaustive)])
def test_a_mesh_does_not_change_the_initial_weights(mesh):
    one, there = (numbers.first_state("llama", over).params for over in (None, MESHES[mesh]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), there, one)


def test_attention_that_sees_a_token_of_the_future_under_one_mesh_is_found(monkeypatch):
    right = block.attention
    wrong = lambda *given, **more: (look_ahead if device().shares_rows else right)(*given, **more)  # noqa: E731
    monkeypatch.setattr(block, "attention", wrong)
    broken = Setting(family="gpt2", mesh=MESHES["fsdp=4 context=2"])
    found = numbers.difference(numbers.run(broken), run(broken.reference))
    assert found.loss > 1e-5 and found.gradient > 1e-4


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["gpt2", "llama", "modern", "images"])
@pytest.mark.parametrize(
    "options",
    list(itertools.product(MESHES, (1, 4), ("none", "full", "dots"), (1, 0), ("packed", "padded"))),
    ids=str,
)
def test_no_combination_of_settings_changes_the_numbers(family, options):
    try:
        assert_same(setting(family, *options))
    finally:
        jax.clear_caches()  # hundreds of programs in one process would run into the limit on memory maps
