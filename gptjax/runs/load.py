"""A run opened for reading: its settings, weights and tokenizer, without its optimizer, its recipe or its data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from gptjax.config import MeshConfig, TrainConfig, TuneConfig
from gptjax.config.section import InputError
from gptjax.model.decoder import Decoder, init_params, make_decoder
from gptjax.parallel.sharding import abstract, make_mesh, num_slices, shardings
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.digest import tree_sha256
from gptjax.runs.run import Run, load_config
from gptjax.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model that has been trained (or imported), its parameters on the mesh."""

    run: Run
    config: TrainConfig
    decoder: Decoder
    params: Any
    mesh: jax.sharding.Mesh
    step: int
    data_state: dict[str, Any]
    """The state of the data after that step, as `data.pipeline` describes it."""

    @property
    def tokenizer(self) -> Tokenizer:
        self.run.pull(self.run.tokenizer)
        return load_tokenizer(self.run.tokenizer)


def load_model(
    run_dir: str | Path,
    mesh_cfg: MeshConfig | None,
    step: int = 0,
    block: Callable[..., Any] | None = None,
    heads: Sequence[str] = (),
) -> LoadedModel:
    """The model of a run at a checkpoint (0: the newest), on a mesh that need not be the one it was trained on.

    None is a mesh of all devices, whose data axis is cut over the slices that they form.

    Its weights are the averaged ones where the run keeps those (optim.ema), and with its base's added where it trained
    an adaptation of one (lora.rank). Of the heads beside the language model's it has those that are asked for. Raises
    InputError where the folder is no run, has no sound checkpoint, lacks a head or is a reward model whose head is not
    asked for, its base is not what it was, or it was trained with a block of the user's own and `block` is not given:
    neither the recipe nor what config.json names is ever executed.
    """
    run, config = Run.existing(run_dir), load_config(run_dir)
    if config.model.block and block is None:
        raise InputError(
            f"{run_dir} was trained with the block {config.model.block!r}, which is code and not in the run; open it "
            f"from Python: gptjax.load({str(run_dir)!r}, block=...)"
        )
    if heads or config.heads:  # which most runs have not
        from gptjax.runs.init_check import check_heads

        check_heads(config, run_dir, heads)
    mesh = make_mesh(mesh_cfg or MeshConfig(slices=num_slices(jax.devices())))
    decoder = make_decoder(config, block)
    # It is read on devices, and given rows, that its training may not have known.
    decoder = decoder.clone(cfg=decoder.cfg.anywhere(), packed=True)
    adapts = config if isinstance(config, TuneConfig) and config.lora.rank else None
    if adapts:
        from gptjax.model.lora import init_lora, merge_lora  # which most runs have no use for

        init = init_lora(adapts.lora, config.model)
    else:
        init = init_params(decoder)
    if heads:
        from gptjax.model.heads import add_heads

        init = add_heads(init, heads, config)
    item = "ema" if config.optim.ema else "params"
    wanted = {item: abstract(jax.eval_shape(init, jax.random.key(0)), mesh)}
    restored, state, data_state, _ = open_checkpoints(run_dir).restore(wanted, step or None, partial=True)
    params = state[item]
    if adapts:
        base = _base(adapts, data_state["base"], mesh_cfg, block)
        with jax.set_mesh(mesh):
            whole = shardings(base | {name: params[name] for name in heads}, mesh)
            params = jax.jit(merge_lora, out_shardings=whole)(base, params, adapts.lora.scale)
    return LoadedModel(run, config, decoder, params, mesh, restored, data_state)


def _base(
    config: TuneConfig, mark: dict[str, Any], mesh_cfg: MeshConfig | None, block: Callable[..., Any] | None
) -> Any:
    """The weights beside which a run trained its adaptation; raises InputError where they are not those of `mark`."""
    try:
        base = load_model(config.init, mesh_cfg, mark["step"], block).params
    except InputError as e:
        raise InputError(f"{config.run_dir} adapts step {mark['step']} of {config.init}, its base: {e}") from e
    check_base(config, base, mark)
    return base


def check_base(config: TuneConfig, params: Any, mark: dict[str, Any]) -> None:
    """Raises InputError where the weights of config.init at step mark["step"] are not those of mark["sha256"]."""
    if tree_sha256(params) != mark["sha256"]:
        raise InputError(
            f"{config.run_dir} adapts step {mark['step']} of {config.init}, whose weights are not what they were; "
            "restore that run"
        )


def open_checkpoints(run_dir: str | Path) -> Checkpoints:
    """The checkpoints of a run, to read."""
    return Checkpoints(Run.existing(run_dir).checkpoints, load_config(run_dir).checkpoint, readonly=True)
