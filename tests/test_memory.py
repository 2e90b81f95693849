"""Activations stay sharded: the memory of a device does not grow when devices and rows double together.

And attention by blocks is linear in length, where the plain one is quadratic.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from unoptimised import UNOPTIMISED

from gptjax.config import ModelConfig, OptimConfig
from gptjax.model.decoder import Decoder, init_params
from gptjax.ops.blockwise import attend_blockwise
from gptjax.ops.reference import attend, causal
from gptjax.parallel.sharding import AXES
from gptjax.training.losses import language_model_loss
from gptjax.training.optim import make_optimizer, make_schedule
from gptjax.training.step import compile_step, make_init, make_train_step

CFG = ModelConfig(num_layers=4, width=64, num_heads=4, dtype="float32")
LENGTH, ROWS_A_DEVICE = 128, 4


def temporary_bytes(devices: int) -> int:
    """What the compiled train step needs on each device beside its arguments, on an fsdp mesh of so many devices."""
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    mesh = jax.make_mesh((1, devices, 1, 1), AXES, devices=jax.devices()[:devices], axis_types=auto)
    decoder = Decoder(CFG, 256, LENGTH)
    schedule = make_schedule(OptimConfig(), 10)
    tx = make_optimizer(OptimConfig(), schedule)
    state = jax.eval_shape(make_init(init_params(decoder), tx), 0)
    ids = jax.ShapeDtypeStruct((devices * ROWS_A_DEVICE, LENGTH), jnp.int32)
    names = ("inputs_BL", "targets_BL", "positions_BL", "segments_BL")
    batch = dict.fromkeys(names, ids) | {"weights_BL": jax.ShapeDtypeStruct(ids.shape, jnp.float32)}
    with jax.set_mesh(mesh):
        step = make_train_step(language_model_loss(decoder), tx, schedule)
        compiled = compile_step(step, mesh, state, {}, batch).lower(state, {}, batch).compile(UNOPTIMISED)
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_activation_memory_a_device_is_flat_when_devices_and_rows_double():
    """16 devices need a process of their own. Without the constraint in the block it grows by more than half."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=16", "JAX_PLATFORMS": "cpu"}
    out = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=True).stdout
    small, large = json.loads(out.splitlines()[-1])
    assert large < 1.1 * small


def attention_bytes(attention, length: int, **options) -> int:
    """What a loss of two rows of attention and its gradients need beside their arguments and results."""
    x = jax.ShapeDtypeStruct((2, length, 2, 8), jnp.float32)
    segments_BL = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def loss(q_BLHK, k_BMGK, v_BMGK, segments_BL, window):
        mask = causal(segments_BL)
        return attention(q_BLHK, k_BMGK, v_BMGK, mask, scale=0.4, window=window, softcap=9.0, **options).sum()

    traced = jax.ShapeDtypeStruct((), jnp.int32)
    grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return grads.lower(x, x, x, segments_BL, traced).compile(UNOPTIMISED).memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_blockwise_attention_needs_memory_linear_in_length():
    """Packed rows, windows and the soft-cap included: no mask or score of L x M is ever there."""
    small, middle, large = (attention_bytes(attend_blockwise, n, block=64) for n in (1024, 2048, 4096))
    assert large <= 4.3 * small and large - middle <= 2.2 * (middle - small)


def test_plain_attention_needs_memory_quadratic_in_length():
    """The test above can fail: this is what it is there to catch."""
    assert attention_bytes(attend, 4096) > 12 * attention_bytes(attend, 1024)


if __name__ == "__main__":
    print(json.dumps([temporary_bytes(n) for n in (8, 16)]))
