"""Rows that several devices share: a balanced order inside, the row as it was written outside, the same numbers."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_gradients import assert_close

from gptjax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig, check_divisible
from gptjax.config.section import InputError
from gptjax.model.decoder import Decoder, init_params
from gptjax.ops.attention import attention
from gptjax.ops.blockwise import _Span, visits
from gptjax.ops.kernels import attend_shared
from gptjax.ops.reference import AttentionMask, attend, cached, causal
from gptjax.parallel import context
from gptjax.parallel.sharding import make_mesh, num_shards, to_global

LENGTH = 64
pytestmark = pytest.mark.usefixtures("highest_precision")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_each_shard_holds_an_early_chunk_and_its_late_counterpart(n):
    place_SC = np.asarray(context.places(24, n)).reshape(n, 2, -1)
    if n == 1:
        assert place_SC.reshape(-1).tolist() == list(range(24))
        return
    size = 24 // (2 * n)
    assert (place_SC[:, :, 0] == [[i * size, (2 * n - 1 - i) * size] for i in range(n)]).all()
    assert (np.diff(place_SC, axis=2) == 1).all()


@pytest.mark.parametrize("n", [2, 4])
def test_rows_go_into_the_order_and_come_back_and_so_do_their_gradients(n):
    mesh = make_mesh(MeshConfig(context=n))
    x_BLD = np.random.default_rng(0).normal(size=(8, 16, 3)).astype(np.float32)
    order_L = np.asarray(context.places(16, n))
    with jax.set_mesh(mesh):
        x = to_global({"x_BLD": x_BLD}, mesh)["x_BLD"]
        assert num_shards(16) == n and num_shards(15) == num_shards(n) == 1
        there, turn = jax.jit(lambda x: jax.vjp(lambda x: context.to_zigzag(x, n), x))(x)
        np.testing.assert_array_equal(there, x_BLD[:, order_L])
        back, turn_back = jax.jit(lambda x: jax.vjp(lambda x: context.from_zigzag(x, n), x))(there)
        np.testing.assert_array_equal(back, x_BLD)
        np.testing.assert_array_equal(jax.jit(turn_back)(x)[0], x_BLD[:, order_L])
        np.testing.assert_array_equal(jax.jit(turn)(there)[0], x_BLD)
        text = jax.jit(lambda x: context.to_zigzag(x, n)).lower(x).compile().as_text()
    assert "collective-permute" in text and "all-gather" not in text
    assert num_shards(16) == 1  # no mesh, one device has all of a row


@pytest.mark.parametrize("block", [4, 5, 16])
@pytest.mark.parametrize("window", [None, 7])
def test_each_device_visits_as_many_blocks_as_any_other(block, window):
    """Without a window as few as half of all, to a block or two at the ends of its chunks."""
    n = 4
    counts = []
    for place_L in np.asarray(context.places(LENGTH, n)).reshape(n, 1, -1):
        first_L = np.zeros_like(place_L) if window is None else np.maximum(place_L - window + 1, 0)
        span = _Span(jnp.array(first_L), jnp.array(place_L), None)
        *_, from_Q, until_Q = visits(span, n, LENGTH, min(block, LENGTH // n // 2), block)
        counts.append(int((until_Q - from_Q).sum()))
    queries = -(-(LENGTH // n // 2) // min(block, LENGTH // n // 2)) * 2
    assert max(counts) - min(counts) <= (queries if LENGTH % block or window else 0)
    if window is None:
        assert max(counts) <= queries * (-(-LENGTH // block) + 2) // 2


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows, heads of queries and of keys, the mesh that shares them, and what attention is asked for."""

    mesh: MeshConfig = MeshConfig(data=2, context=4)
    heads: tuple[int, int] = (4, 2)
    packed: bool = True
    block: int = 8
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    window: Any = None


CASES = {
    "packed": Case(),
    "one document, blocks that divide nothing": Case(packed=False, block=6),
    "window": Case(window=11),
    "window of the layer, soft-cap": Case(window=np.int32(9), settings={"attention_softcap": 1.5}),
    "too few key heads": Case(mesh=MeshConfig(data=1, tensor=4, context=2)),
    "heads that do not divide": Case(mesh=MeshConfig(data=1, fsdp=2, tensor=2, context=2), heads=(3, 3), block=64),
}


def segments() -> np.ndarray:
    """Two rows of documents and padding, whose ends lie in different chunks."""
    return np.stack([np.repeat([1, 2, 3, 0], n) for n in ([10, 23, 20, 11], [1, 40, 20, 3])]).astype(np.int32)


def arrays(case: Case) -> dict[str, np.ndarray]:
    rng, (H, G) = np.random.default_rng(0), case.heads
    shapes = {"q_BLHK": H, "k_BLGK": G, "v_BLGK": G, "g_BLHK": H}
    made = {name: rng.normal(size=(2, LENGTH, heads, 8)).astype(np.float32) for name, heads in shapes.items()}
    return made | {"segments_BL": segments()}


def value_and_grads(case: Case, name: str, given: dict[str, Any]) -> list[np.ndarray]:
    """Output and gradients of attention over rows as they were written, whatever order it is computed in."""
    H, G = case.heads
    cfg = ModelConfig(width=8 * H, num_heads=H, queries_per_kv=H // G, attention=name, attention_block=case.block,
                      **({"dtype": "float32"} | case.settings))  # fmt: skip
    given = {n: x if n == "segments_BL" else x.astype(cfg.dtype) for n, x in given.items()}

    def run(given, window):
        n = num_shards(LENGTH)
        there, back_again = (
            functools.partial(move, n=n) if n > 1 else lambda x: x for move in (context.to_zigzag, context.from_zigzag)
        )
        mask = causal(there(given["segments_BL"]), case.packed, n)

        def attended(*qkv):
            window_now = case.window if isinstance(case.window, int) else window
            return back_again(attention(cfg, *map(there, qkv), mask, scale=0.4, window=window_now))

        out_BLHK, back = jax.vjp(attended, given["q_BLHK"], given["k_BLGK"], given["v_BLGK"])
        return out_BLHK, *back(given["g_BLHK"])

    traced = case.window if isinstance(case.window, np.generic) else None
    return [np.asarray(x, np.float32) for x in jax.jit(run)(given, traced)]


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, "blockwise") for case in CASES]
    + [(case, "plain") for case in ("packed", "window of the layer, soft-cap", "too few key heads")],
)
def test_devices_that_share_rows_attend_as_one_does(case, name):
    case = CASES[case]
    given = arrays(case)
    wanted = value_and_grads(case, "plain", given)
    mesh = make_mesh(case.mesh)
    with jax.set_mesh(mesh):
        got = value_and_grads(case, name, to_global(given, mesh))
    assert_close(got, wanted)


@pytest.mark.parametrize("name", ["blockwise", "plain"])
@pytest.mark.parametrize("case", ["packed", "heads that do not divide"])
def test_devices_that_share_rows_add_up_bfloat16(case, name):
    """XLA on a CPU has ended whole processes over sums of bfloat16 in a shard_map."""
    case = CASES[case]
    wanted = value_and_grads(case, "plain", arrays(case))
    mesh = make_mesh(case.mesh)
    with jax.set_mesh(mesh):
        rounded = dataclasses.replace(case, settings=case.settings | {"dtype": "bfloat16"})
        got = value_and_grads(rounded, name, to_global(arrays(case), mesh))
    for g, want in zip(got, wanted, strict=True):
        assert np.linalg.norm(g - want) <= 2e-2 * np.linalg.norm(want)


def test_a_mask_of_rows_in_zigzag_order_is_that_of_the_written_rows_in_that_order():
    """For a layer of the user's own, which asks for a mask of its rows as they stand."""
    from gptjax.ops.reference import dense_mask

    order_L = np.asarray(context.places(LENGTH, 4))
    wanted = np.asarray(dense_mask(causal(jnp.array(segments())), LENGTH, 9))
    got = dense_mask(causal(jnp.array(segments()[:, order_L]), shards=4), LENGTH, 9)
    np.testing.assert_array_equal(got, wanted[:, order_L][:, :, order_L])


def test_devices_that_share_a_row_drop_elements_of_their_own():
    """Keys are counted by values that are one at their own place: what is dropped is 0."""
    mesh, n = make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4]), 4
    eye_BLHK = jnp.eye(32)[None, :, None]
    with jax.set_mesh(mesh):

        @jax.jit
        def run(x_BLHK, key):
            x_BLHK = context.to_zigzag(x_BLHK, n)
            mask = AttentionMask(jnp.full((1, 32), 31), shards=n)  # each query sees all keys
            return attend_shared(0 * x_BLHK, x_BLHK, x_BLHK, mask, scale=1.0, dropout_rate=0.5, key=key)

        dropped_LM = np.asarray(run(eye_BLHK, jax.random.key(0)))[0, :, 0] == 0
    assert 0.4 < dropped_LM.mean() < 0.6
    shards = dropped_LM.reshape(n, -1)
    assert all((shards[i] != shards[j]).any() for i in range(n) for j in range(i))


MODEL = ModelConfig(num_layers=2, width=32, num_heads=4, queries_per_kv=2, dtype="float32", window=9, global_every=2,
                    attention="blockwise", attention_block=8)  # fmt: skip


def test_hidden_states_stand_in_the_order_of_the_tokens():
    decoder = Decoder(MODEL, 50, LENGTH)
    params = jax.jit(init_params(decoder))(jax.random.key(0))
    segment_BL = segments()
    batch = {
        "inputs_BL": np.random.default_rng(0).integers(0, 50, segment_BL.shape).astype(np.int32),
        "positions_BL": np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1)),
        "segments_BL": segment_BL,
    }
    run = lambda params, batch: decoder.apply({"params": params}, *batch.values(), method="with_norms")  # noqa: E731
    wanted, wanted_rms = jax.jit(run)(params, batch)
    mesh = make_mesh(MeshConfig(data=2, context=4))
    with jax.set_mesh(mesh):
        got, rms = jax.jit(run)(to_global(jax.tree.map(np.asarray, params), mesh), to_global(batch, mesh))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rms, wanted_rms, rtol=1e-5)


def test_a_cache_is_attended_over_the_context_axis_too():
    """Queries of a prompt are shared, the cache is whole: nothing stands in zigzag order."""
    rng = np.random.default_rng(0)
    q_BLHK, k_BMGK, v_BMGK = (rng.normal(size=(1, n, 2, 8)).astype(np.float32) for n in (16, 32, 32))
    mask = cached(jnp.arange(5, 21)[None])
    wanted = attend(q_BLHK, k_BMGK, v_BMGK, mask, scale=0.4)
    for name in ("blockwise", "plain"):
        cfg = dataclasses.replace(MODEL, attention=name)
        with jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))):
            got = jax.jit(lambda *qkv, cfg=cfg: attention(cfg, *qkv, mask, scale=0.4))(q_BLHK, k_BMGK, v_BMGK)
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_a_length_that_the_devices_cannot_share_evenly_is_refused():
    mesh = make_mesh(MeshConfig(data=2, context=4))
    check_divisible(TrainConfig(data=DataConfig(batch_size=2, length=24)), mesh.shape)
    with pytest.raises(InputError, match="data.length=20 .*two chunks.*mesh.context=4.*--data.length 16"):
        check_divisible(TrainConfig(data=DataConfig(batch_size=2, length=20)), mesh.shape)


def test_the_benchmark_tells_other_numbers_apart():
    import long_context

    same = long_context.Result({"losses": [1.0, 2.0], "step_temporary_bytes": 8}, {"w_DF": np.ones((2, 2))})
    other = same._replace(gradients={"w_DF": np.array([[1, 1], [1, 1.001]])})
    later = same._replace(numbers=same.numbers | {"losses": [1.0, 2.0001]})
    assert [long_context.compare(x, same)["equal"] for x in (same, other, later)] == [True, False, False]


@pytest.mark.exhaustive
def test_long_rows_that_devices_share_train_as_on_one():
    """The benchmark compares ten losses and the first gradients with those of one device a row."""
    command = [sys.executable, ROOT / "benchmarks" / "long_context.py", "--length", "4096", "--layers", "2"]
    command += "--groups 2 --context 4 --rows 2 --block 64 --against-one".split()
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "losses differ by" in done.stdout
