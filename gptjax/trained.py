"""A run opened for reading: its settings, weights and tokenizer, without its optimizer, its recipe or its data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from gptjax.checkpoint import Checkpoints
from gptjax.config import MeshConfig, TrainConfig
from gptjax.decoder import Decoder, init_params, make_decoder
from gptjax.run import Run, load_config
from gptjax.sharding import abstract, make_mesh
from gptjax.tokenizer import Tokenizer, load


@dataclass(frozen=True)
class Trained:
    """A model that has been trained (or imported), its parameters on the mesh."""

    run: Run
    config: TrainConfig
    decoder: Decoder
    params: Any
    mesh: jax.sharding.Mesh
    step: int

    @property
    def tokenizer(self) -> Tokenizer:
        return load(self.run.tokenizer)


def open_trained(run_dir: str | Path, mesh_cfg: MeshConfig, step: int = 0) -> Trained:
    """The model of a run at a checkpoint (0: the newest), on a mesh that need not be the one it was trained on.

    Raises InputError where the folder is no run or has no sound checkpoint. The recipe is never executed.
    """
    run, config = Run.existing(run_dir), load_config(run_dir)
    mesh, decoder = make_mesh(mesh_cfg), make_decoder(config)
    shapes = jax.eval_shape(init_params(decoder), jax.random.key(0))
    wanted = {"params": abstract(shapes, mesh)}
    found, state, _, _ = open_checkpoints(run_dir).restore(wanted, step or None, partial=True)
    return Trained(run, config, decoder, state["params"], mesh, found)


def open_checkpoints(run_dir: str | Path) -> Checkpoints:
    """The checkpoints of a run, to read."""
    return Checkpoints(Run.existing(run_dir).checkpoints, load_config(run_dir).checkpoint, readonly=True)
