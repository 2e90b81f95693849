"""Laws of what stages share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax.config import DataConfig, MeshConfig, ModelConfig, TokenizerConfig, TrainConfig
from gptjax.model.decoder import init_params, make_decoder
from gptjax.parallel.sharding import make_mesh
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run
from gptjax.stages.runner import load_frozen
from gptjax.training.step import compile_step, init_state, make_init, make_train_step

TINY = TrainConfig(
    model=ModelConfig(num_layers=1, width=16, num_heads=2),
    tokenizer=TokenizerConfig(kind="bytes", vocab_size=258),
    data=DataConfig(length=8, batch_size=2),
)


def test_frozen_weights_come_from_a_run_sharded_and_are_neither_trained_nor_donated_nor_saved(tmp_path):
    run = Run.open(tmp_path / "reference", dataclasses.replace(TINY, run_dir=str(tmp_path / "reference")))
    params = jax.jit(init_params(make_decoder(TINY)))(jax.random.key(0))
    checkpoints = Checkpoints(run.checkpoints, TINY.checkpoint)
    checkpoints.save(3, {"params": params}, {"step": 3}, {})
    checkpoints.wait()

    mesh_cfg = MeshConfig(data=1, fsdp=8)
    mesh, frozen = make_mesh(mesh_cfg), load_frozen({"reference": str(run.folder)}, mesh_cfg)
    jax.tree.map(np.testing.assert_array_equal, frozen["reference"], params)
    embed_VD = frozen["reference"]["embed_VD"]
    assert embed_VD.addressable_shards[0].data.shape == (embed_VD.shape[0], 2), "D is cut over fsdp"

    def loss_fn(params, frozen, batch, key):
        loss = jnp.mean((params["w_D"] - frozen["reference"]["embed_VD"].sum(axis=0)) ** 2) + 0 * batch["x_B"].sum()
        return loss, {"loss": loss, "weight": jnp.float32(1)}

    tx = optax.sgd(8.0)
    batch = {"x_B": np.zeros(8, np.float32)}
    with jax.set_mesh(mesh):
        state = init_state(make_init(lambda key: {"w_D": jnp.zeros(16)}, tx), 0, mesh)
        step = compile_step(make_train_step(loss_fn, tx, lambda updates: 8.0), mesh, state, frozen, batch)
        (of_state, of_frozen, _), _ = step.lower(state, frozen, batch).args_info
        for _ in range(2):
            state, metrics = step(state, frozen, batch)
    np.testing.assert_allclose(state.params["w_D"], np.asarray(params["embed_VD"]).sum(axis=0), rtol=1e-5)
    assert float(metrics["loss"]) < 1e-9
    assert all(x.donated for x in jax.tree.leaves(of_state)) and not any(x.donated for x in jax.tree.leaves(of_frozen))
    assert not any("embed_VD" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))
