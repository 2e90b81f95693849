"""Golden losses: ten steps of three tiny shapes in float32 give the losses of tests/fixtures/golden.json on any CPU.

python tests/test_golden.py     writes the file again
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TokenizerConfig, TrainConfig
from gptjax.data.packing import Batch
from gptjax.parallel.sharding import make_mesh
from gptjax.training.build import build_components

GOLDEN = Path(__file__).parent / "fixtures" / "golden.json"
CHANGED = """the losses are not those of tests/fixtures/golden.json. A refactor may not change them: look for what did
(benchmarks/same_numbers.py compares two checkouts). A change that is meant runs `python tests/test_golden.py`, commits
the file with the code, and says in the commit's message why the numbers are others and how they were checked."""
STEPS, ROWS, LENGTH, VOCAB = 10, 16, 32, 300
LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "biases": False, "queries_per_kv": 2}
SHAPES = {
    "gpt2": (ModelConfig(num_layers=2, width=32, num_heads=4, dtype="float32"),
             OptimConfig(learning_rate=1e-2, warmup_steps=2, accumulate=2)),
    "llama": (ModelConfig(num_layers=2, width=32, num_heads=4, dtype="float32", tied=False, **LLAMA),
              OptimConfig(learning_rate=1e-2, warmup_steps=2, schedule="wsd", z_loss=1e-3)),
    "modern": (ModelConfig(num_layers=4, width=32, num_heads=4, dtype="float32", tied=False, qk_norm=True, window=8,
                           global_every=4, logit_softcap=15.0, **{**LLAMA, "activation": "relu2"}),
               OptimConfig(learning_rate=1e-2, warmup_steps=2, kind="muon")),
}  # fmt: skip


def batch(step: int) -> Batch:
    """Rows of two documents each, of ids by a formula: no random generator's version matters."""
    place_BL = np.arange(ROWS * (LENGTH + 1), dtype=np.int64).reshape(ROWS, LENGTH + 1) + 7 * step
    ids_BL = ((place_BL * place_BL + place_BL // 5) % VOCAB).astype(np.int32)
    cut_B1 = 5 + np.arange(ROWS)[:, None]
    first_BL, place_BL = np.arange(LENGTH) < cut_B1, np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH))
    return {
        "inputs_BL": ids_BL[:, :-1],
        "targets_BL": ids_BL[:, 1:],
        "positions_BL": np.where(first_BL, place_BL, place_BL - cut_B1).astype(np.int32),
        "segments_BL": np.where(first_BL, 1, 2).astype(np.int32),
        "weights_BL": (np.arange(LENGTH) != cut_B1 - 1).astype(np.float32),  # no document predicts the next
    }


def losses(name: str) -> list[float]:
    model, optim = SHAPES[name]
    config = TrainConfig(
        steps=STEPS, model=model, optim=optim, tokenizer=TokenizerConfig(vocab_size=VOCAB),
        data=DataConfig(batch_size=ROWS, length=LENGTH), mesh=MeshConfig(data=1),
    )  # fmt: skip
    parts, found = build_components(config), []
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])), jax.default_matmul_precision("highest"):
        state, step = jax.jit(parts.init)(0), jax.jit(parts.step)
        for i in range(STEPS):
            state, metrics = step(state, {}, batch(i))
            found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_ten_losses_are_the_golden_ones(name):
    found, golden = losses(name), json.loads(GOLDEN.read_text())[name]
    assert np.allclose(found, golden, rtol=1e-5, atol=0), f"{name}: {CHANGED}\n{found}\nwanted {golden}"


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: losses(name) for name in SHAPES}, indent=1) + "\n")
    print(f"wrote {GOLDEN}")
