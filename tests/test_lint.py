"""The sharding lint is silent on our decoder and names each fault that is planted."""

import dataclasses
import math

import jax
import pytest
from jax.sharding import NamedSharding
from shipped import EVERY, recipe
from unoptimised import UNOPTIMISED

from gptjax.config import MeshConfig, TrainConfig
from gptjax.config.command_line import parse
from gptjax.data.packing import example_batch
from gptjax.diagnostics.plan.compiled import Target, compile_for
from gptjax.model import decoder as decoder_module
from gptjax.ops.attention import Device, select_kernel
from gptjax.parallel.sharding import AXES, abstract, make_mesh
from gptjax.parallel.sharding_lint import findings, replicated_parameters, unused_axes, whole_heads
from gptjax.training.build import build_components
from gptjax.training.step import compile_step

P = jax.P
# Sizes that no two dimensions share: the lint goes by sizes.
SMALL = """--model.num-layers 2 --model.width 48 --model.num-heads 4 --model.head-dim 20 --data.length 40
--model.mlp-ratio 3.0 --tokenizer.vocab-size 300""".split()
# One of each structure that the recipes have: mesh, remat, attention, family. The first three differ most; of a
# constraint that the stream lost only GPT-2's program tells.
STRUCTURES = ("gpt3 --size 175b", "llama_8b", "gpt2 --size 1.5b")
STRUCTURES += ("gpt2 --size 124m", "gpt3 --size 2.7b", "llama_1b", "modern")
LATER = [pytest.param(name, marks=pytest.mark.exhaustive) for name in STRUCTURES[3:]]


def small(name: str) -> TrainConfig:
    """A recipe with its mesh on eight devices and its structure, but few and narrow layers."""
    written = recipe(name)
    tensor = min(2, written.mesh.tensor)
    fsdp = min(8 // tensor, written.mesh.fsdp)
    mesh = MeshConfig(data=8 // tensor // fsdp, fsdp=fsdp, tensor=tensor)
    kernel = select_kernel(written.model, written.data.length, Device("cpu"))  # not that of these short rows
    accumulate = 2 if name == "gpt3 --size 175b" else 1
    config = parse(dataclasses.replace(
        written,
        model=dataclasses.replace(written.model, queries_per_kv=min(2, written.model.queries_per_kv), window=0,
                                  global_every=0, unroll=1, attention=kernel),
        data=dataclasses.replace(written.data, batch_size=24 * accumulate),
        optim=dataclasses.replace(written.optim, accumulate=accumulate),
        mesh=mesh,
    ), [] if written.tokenizer.kind == "bytes" else SMALL, "test")  # fmt: skip
    return config if written.tokenizer.kind != "bytes" else parse(config, SMALL[:-2], "test")


def linted(config: TrainConfig) -> list[str]:
    mesh, parts = make_mesh(config.mesh), build_components(config)
    with jax.set_mesh(mesh):
        state = abstract(jax.eval_shape(parts.init, 0), mesh)
        batch = abstract(example_batch(config.data.batch_size, config.data.length), mesh)
        step = compile_step(parts.step, mesh, state, {}, batch)
        program = step.lower(state, {}, batch).compile(UNOPTIMISED).as_text()
    return findings(config, dict(mesh.shape), state, batch, program)


@pytest.mark.parametrize("name", [*STRUCTURES[:3], *LATER])
def test_the_structure_of_every_recipe_is_clean(name):
    assert linted(small(name)) == []


def test_a_decoder_without_activation_constraints_is_told_by_name(monkeypatch):
    monkeypatch.setattr(decoder_module, "constrain", lambda x, letters: x)
    found = linted(small("gpt2 --size 1.5b"))
    assert found and all("holds all 24 rows on every device, not 3" in line for line in found)
    assert any("BLD,DF->BLF" in line for line in found)


def test_every_recipe_has_one_of_these_structures():
    def structure(name):
        config = recipe(name)
        used = tuple(axis for axis in AXES if getattr(config.mesh, axis) > 1)
        return used, config.model.remat, config.model.positions, config.model.attention

    told = {structure(name) for name in (*STRUCTURES, "quickstart", "shakespeare_char")}
    assert {structure(name) for name in EVERY} <= told


def test_parameters_that_are_whole_and_axes_that_are_unused_are_told():
    config = small("gpt3 --size 175b")
    mesh = make_mesh(config.mesh)
    tree = abstract(jax.eval_shape(build_components(config).init, 0), mesh).params
    assert not list(replicated_parameters(tree, mesh.shape)) and not list(unused_axes(tree, mesh.shape))
    x = tree["layers"]["w_in_NDF"]
    w_in_NDF = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))
    (line,) = replicated_parameters(dict(tree, layers=tree["layers"] | {"w_in_NDF": w_in_NDF}), mesh.shape)
    assert line.startswith("parameter w_in_NDF") and "each of the 8 devices" in line
    (line,) = unused_axes(tree, dict(mesh.shape) | {"context": 2})
    assert line.startswith("mesh.context=2 is not used")
    lines = list(whole_heads(tree, {"data": 1, "fsdp": 1, "tensor": 3, "context": 1}))
    assert len(lines) == 2 and any("4 query heads do not divide over mesh.tensor=3" in line for line in lines)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", EVERY)
def test_every_recipe_is_clean_at_its_true_width_and_mesh(name):
    config = recipe(name)
    sizes = {axis: max(1, getattr(config.mesh, axis)) for axis in AXES}
    devices = math.prod(sizes.values())
    if devices == 1:
        sizes["data"] = devices = math.gcd(config.data.batch_size, 8)  # of 12 rows, 4 devices have as many each
    config = dataclasses.replace(config, mesh=MeshConfig(**sizes))
    assert compile_for(config, Target(devices=devices)).findings == ()
