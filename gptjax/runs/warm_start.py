"""Starting a run from another run's weights: `--init RUN`, with a schedule, optimizer and data order of its own.

Resuming goes on with a run as it was; this makes a new one. The context may be longer and the vocabulary larger: rows
that the old weights do not have begin as in a new model, and so does an encoder of images that they lack.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gptjax.config import TrainConfig, TuneConfig
from gptjax.config.plugins import optional
from gptjax.config.section import InputError
from gptjax.model.vision import projector_params
from gptjax.parallel.sharding import shardings
from gptjax.runs.digest import named_leaves
from gptjax.runs.load import LoadedModel, load_model
from gptjax.tokenizer import Tokenizer
from gptjax.training.step import TrainState

# Leaves that may have more rows than before, and what their rows are.
GROWING = {"embed_VD": "tokenizer.vocab_size", "head_VD": "tokenizer.vocab_size", "position_TD": "data.length"}


def warm_start(
    config: TrainConfig, tokenizer: Tokenizer, state: TrainState, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """`state`, a new one, with the weights of the run in config.init, and an optimizer that has seen nothing yet.

    Call `init_check.check_init` before. Raises InputError where the run's tokens have other meanings here, and where
    a weight does not fit.
    """
    # The old run's block is not read from its folder: it is the one that this run was given.
    old = load_model(config.init, config.mesh, block=optional(config.model.block, "model.block"))
    _check_tokens(old, tokenizer)
    names = {*config.heads}  # which that run has none of
    if not old.config.model.vision.patch:
        names |= {"vision", *projector_params(config.model)} & state.params.keys()
    new = {name: state.params[name] for name in names}
    _check_shapes(old, {name: x for name, x in state.params.items() if name not in new}, config)
    rows = {
        "tokenizer.vocab_size": old.config.tokenizer.vocab_size,  # what only padded the old vocabulary stays behind
        "data.length": old.config.data.length,
    }

    def merged(path: Any, fresh: jax.Array, kept: jax.Array) -> jax.Array:
        limit = GROWING.get(path[-1].key) if len(path) == 1 else None
        return fresh.at[: rows[limit]].set(kept[: rows[limit]]) if limit else kept

    def merge(fresh: Any, kept: Any) -> tuple[Any, Any, Any]:
        params = jax.tree_util.tree_map_with_path(merged, fresh, kept)
        return params, tx.init(params), params if state.ema else {}

    kept = old.params | new
    shapes = jax.eval_shape(merge, state.params, kept)
    params, opt_state, ema = jax.jit(merge, out_shardings=shardings(shapes, mesh))(state.params, kept)
    return state.replace(params=params, opt_state=opt_state, ema=ema)  # pyright: ignore[reportAttributeAccessIssue]


def load_base(config: TuneConfig, tokenizer: Tokenizer, shapes: Any, step: int = 0) -> LoadedModel:
    """The run in config.init at a step (0: the newest), whose weights stay as they are beside those of config.lora.

    `shapes` are those of the model's parameters. Raises InputError as `warm_start` does, and where a row is missing.
    """
    base = load_model(config.init, config.mesh, step, block=optional(config.model.block, "model.block"))
    _check_tokens(base, tokenizer)
    _check_shapes(base, shapes, config)
    if jax.tree.map(jnp.shape, base.params) != jax.tree.map(jnp.shape, shapes):
        raise InputError(
            f"data.length={config.data.length}: the positions of init={config.init!r} can't become more beside "
            f"lora.rank={config.lora.rank}; wanted --data.length {base.config.data.length}, or --lora.rank 0"
        )
    return base


def _check_tokens(old: LoadedModel, tokenizer: Tokenizer) -> None:
    """Raises InputError unless the old ids mean what they meant."""
    before = old.tokenizer
    if before.sha256 == tokenizer.sha256:
        return
    same = before.vocab_size <= tokenizer.vocab_size and (before.bos_id, before.eos_id) == (
        tokenizer.bos_id, tokenizer.eos_id
    )  # fmt: skip
    if not same or any(before.decode_bytes([i]) != tokenizer.decode_bytes([i]) for i in range(before.vocab_size)):
        raise InputError(
            f"init={str(old.run.folder)!r} has another tokenizer, whose {before.vocab_size} ids mean other tokens; "
            f"wanted the same one, or one that begins with it; e.g. --tokenizer.path {old.run.tokenizer}"
        )


def _check_shapes(old: LoadedModel, params: Any, config: TrainConfig) -> None:
    have, want = named_leaves(old.params), named_leaves(params)
    for name in sorted(have.keys() | want.keys()):
        got, new = (tree[name].shape if name in tree else None for tree in (have, want))
        limit = GROWING.get(name)
        grown, resized = bool(limit and got and new and got < new), bool(limit and got and new and got[1:] == new[1:])
        if got != new and not (resized and grown):
            advice = f"{limit} may grow, not shrink" if resized else "the model's settings must be those of that run"
            raise InputError(f"init={config.init!r}: its {name} has shape {got}, this model's {new}; {advice}")
