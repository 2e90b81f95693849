"""Activations stay sharded: the memory of a device does not grow when devices and rows double together.

And attention by blocks is linear in length, where the plain one is quadratic.
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from unoptimised import UNOPTIMISED

from gptjax.config import DataConfig, MeshConfig, ModelConfig, TokenizerConfig, TrainConfig
from gptjax.data.packing import example_batch
from gptjax.ops.blockwise import attend_blockwise
from gptjax.ops.reference import attend, causal
from gptjax.parallel.sharding import abstract, make_mesh
from gptjax.training.build import build_components
from gptjax.training.step import compile_step

MODEL = ModelConfig(num_layers=4, width=64, num_heads=4, dtype="float32")
LONG = dataclasses.replace(MODEL, queries_per_kv=2, window=9, global_every=2, attention="blockwise", unroll=1)


def step_bytes(model: ModelConfig, rows: int, length: int, devices: int, **mesh: int) -> int:
    """What a compiled training step needs on each of the first so many devices beside its arguments."""
    config = TrainConfig(model=model, tokenizer=TokenizerConfig(kind="bytes", vocab_size=258),
                         data=DataConfig(batch_size=rows, length=length))  # fmt: skip
    over = make_mesh(MeshConfig(**mesh), jax.devices()[:devices])
    parts, batch = build_components(config), example_batch(rows, length)
    with jax.set_mesh(over):
        state = abstract(jax.eval_shape(parts.init, 0), over)
        step = compile_step(parts.step, over, state, {}, batch)
        return step.lower(state, {}, batch).compile(UNOPTIMISED).memory_analysis().temp_size_in_bytes


def shared_row_bytes(context: int, length: int, **model) -> int:
    """Of two rows, each on `context` devices."""
    cfg = dataclasses.replace(LONG, attention_block=length // 32, **model)
    return step_bytes(cfg, 2, length, 2 * context, data=2, context=context)


@pytest.mark.parametrize(
    ("length", "remat"),
    [pytest.param(1024, "none", marks=pytest.mark.slow)]
    + [pytest.param(4096, remat, marks=pytest.mark.exhaustive) for remat in ("none", "names")],
)
def test_the_memory_of_a_device_falls_with_the_devices_that_share_a_row(length, remat):
    assert shared_row_bytes(1, length, remat=remat) > 3 * shared_row_bytes(4, length, remat=remat)


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
    # Plain attention is what this is there to catch.
    assert attention_bytes(attend, 4096) > 12 * attention_bytes(attend, 1024)


if __name__ == "__main__":
    print(json.dumps([step_bytes(MODEL, 4 * n, 128, n, data=1, fsdp=n) for n in (8, 16)]))
