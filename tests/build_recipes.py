"""Traces the initial state and a training step of each named recipe on its own mesh of fake devices.

Prints a JSON object a recipe: parameters, bytes of the state in all and on a device. Nothing is allocated or compiled.
"""

import json
import math
import sys

import jax
from shipped import recipe

from gptjax.config import check_divisible
from gptjax.data.packing import example_batch
from gptjax.parallel.sharding import make_mesh, shardings
from gptjax.training.build import build_components


def size(tree, shape=lambda x: x.shape) -> int:
    return sum(math.prod(shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


for name in sys.argv[1:]:
    config = recipe(name)
    count = math.prod(max(n, 1) for n in vars(config.mesh).values())
    mesh = make_mesh(config.mesh, jax.devices()[:count])
    check_divisible(config, mesh.shape)
    parts = build_components(config)
    state = jax.eval_shape(parts.init, 0)
    where = shardings(state, mesh)
    batch = example_batch(config.data.batch_size, config.data.length)
    with jax.set_mesh(mesh):
        after, _ = jax.eval_shape(parts.step, state, {}, batch)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype), state, where)
    print(
        json.dumps(
            {
                "recipe": name,
                "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
                "state_bytes": size(state),
                "state_bytes_a_device": size(placed),
                "step_keeps_the_state": jax.tree.map(lambda x: (x.shape, x.dtype), state)
                == jax.tree.map(lambda x: (x.shape, x.dtype), after),
            }
        ),
        flush=True,
    )
