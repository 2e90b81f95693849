"""The training step of every stage: state, gradients and update, compiled with shardings."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gptjax.parallel.sharding import constrain, shardings, suffix
from gptjax.runtime.process import BACKGROUND

T = TypeVar("T")

# loss_fn(params, frozen, batch, key) -> (loss, metrics). The loss is a weighted mean over the batch, and
# metrics["weight"] is the sum of its weights (tokens, pairs): it is what micro-batches and rows are averaged by.
LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
    """Everything that a run needs to continue, as a plain tree that a checkpoint stores as it is."""

    step: jax.Array  # batches seen
    updates: jax.Array  # updates made; the schedule's clock
    params: Any
    opt_state: Any
    key_W: jax.Array  # raw uint32 words, so that checkpoints and digests need no special case
    ema: Any = flax.struct.field(default_factory=dict)  # float32 averages of params; {} where none are kept
    controls: Any = flax.struct.field(default_factory=dict)  # numbers that a stage changes by what it measures

    @property
    def eval_params(self) -> Any:
        """The weights to evaluate and generate with: the averaged ones where the run keeps them."""
        return self.params if self.ema == {} else self.ema


def make_init(init_params: Callable[[jax.Array], Any], tx: optax.GradientTransformation, ema: float = 0.0) -> Callable:
    """Builds init(seed) -> TrainState, to be traced, so that each device makes its own part only.

    With a decay `ema` above 0 the state also holds averages of the parameters, which begin as the parameters.
    """

    def init(seed: jax.Array) -> TrainState:
        key_params, key_state = jax.random.split(jax.random.key(seed))
        params = init_params(key_params)
        zero = jnp.zeros((), jnp.int32)
        averages = _float32(params) if ema else {}
        return TrainState(zero, zero, params, tx.init(params), jax.random.key_data(key_state), averages)

    return init


def _float32(params: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def init_state(init: Callable, seed: int, mesh: Mesh) -> TrainState:
    """The initial state, sharded from the start; the same numbers on every mesh."""
    return jax.jit(init, out_shardings=shardings(jax.eval_shape(init, 0), mesh))(seed)


class Beside(NamedTuple):
    """A second loss of the same parameters, on arrays of its own: those of the batch whose names begin with NAME_."""

    name: str
    weight: float
    loss_fn: LossFn


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    schedule: Callable[[jax.typing.ArrayLike], jax.Array],
    accumulate: int = 1,
    ema: float = 0.0,
    norms: bool = False,
    beside: Beside | None = None,
) -> Callable:
    """Builds step(state, frozen, batch) -> (state, metrics); with `norms` the metrics hold grad_norm_N too, by layer.

    The gradient of a loss `beside` is added to that of loss_fn.

    With accumulate > 1 the rows are cut into that many micro-batches, run one after the other, and their gradients
    averaged by weight, so that the result is that of the whole batch whatever the padding.

    With a decay `ema` above 0, state.ema becomes ema state.ema + (1 - ema) params after each update: an average over
    about the last 1 / (1 - ema) updates, in which the initial parameters still weigh ema^updates. That is its only
    bias, and it is small once the run is several times longer than the average.
    """
    gradients = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate > 1:
        gradients = _accumulated(gradients, accumulate)
    if beside is not None:
        gradients = _with_beside(gradients, beside, accumulate)

    def train_step(state: TrainState, frozen: Any, batch: dict[str, jax.Array]):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key_W), state.step)
        (_, metrics), grads = gradients(state.params, frozen, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": schedule(state.updates)}
        if norms:
            metrics["grad_norm_N"] = layer_norms(grads)
        averages = state.ema
        if ema:
            averages = jax.tree.map(lambda a, p: ema * a + (1 - ema) * p, state.ema, _float32(params))
        new = TrainState(state.step + 1, state.updates + 1, params, opt_state, state.key_W, averages, state.controls)
        return new, metrics | {"updates": new.updates}

    return train_step


def _with_beside(gradients: Callable, beside: Beside, accumulate: int) -> Callable:
    """The gradients and beside.weight times those of beside.loss_fn, one after the other: metrics hold NAME_loss too.

    Each is a mean by its own weights, however many micro-batches there are.
    """
    others = jax.value_and_grad(beside.loss_fn, has_aux=True)
    if accumulate > 1:
        others = _accumulated(others, accumulate)
    prefix = f"{beside.name}_"

    def both(params, frozen, batch, key):
        own = {name: x for name, x in batch.items() if not name.startswith(prefix)}
        (loss, metrics), grads = gradients(params, frozen, own, key)
        other = {name.removeprefix(prefix): x for name, x in batch.items() if name.startswith(prefix)}
        (_, more), other_grads = others(params, frozen, other, key)
        grads = jax.tree.map(lambda a, b: a + beside.weight * b, grads, other_grads)
        loss = loss + beside.weight * more["loss"]
        return (loss, metrics | {"loss": loss, f"{prefix}loss": more["loss"]}), grads

    return both


def _accumulated(value_and_grad: Callable, parts: int) -> Callable:
    """value_and_grad over micro-batches in turn, their losses, metrics and gradients averaged by weight."""

    def gradients(params, frozen, batch, key):
        micro = {name: micro_batches(x, suffix(name), parts) for name, x in batch.items()}

        def add(total, i_and_part):
            i, part = i_and_part
            part = {name: constrain(x, suffix(name)) for name, x in part.items()}
            (_, metrics), grads = value_and_grad(params, frozen, part, jax.random.fold_in(key, i))
            values = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {**metrics, "weight": 1.0})
            weighted = jax.tree.map(lambda x: x * metrics["weight"], (grads, values))
            return jax.tree.map(jnp.add, total, weighted), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(value_and_grad, params, frozen, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[1])
        zeros = zeros, jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes[0][1])
        (grads, metrics), _ = jax.lax.scan(add, zeros, (jnp.arange(parts), micro))
        weight = metrics["weight"]
        grads, metrics = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-30), (grads, metrics))
        return (metrics["loss"], {**metrics, "weight": weight}), grads

    return gradients


def several_updates(step: Callable, epochs: int, minibatches: int) -> Callable:
    """Builds a step that makes epochs x minibatches updates on one batch, each by `step`, and counts as one.

    In the first epoch row i belongs to minibatch i % minibatches, so that rows side by side, such as the answers of a
    prompt, meet different ones; before each later one the rows are shuffled (`epoch_order`). fresh_B, where the batch
    has it, is 0 after the first update. Metrics are means over the updates, but for the largest ratio_max and the last
    learning_rate and updates.
    """
    if epochs * minibatches == 1:
        return step

    def all_updates(state: TrainState, frozen: Any, batch: dict[str, jax.Array]):
        def one(now: TrainState, i_and_part: tuple[jax.Array, dict[str, jax.Array]]):
            i, part = i_and_part
            part = {name: constrain(x, suffix(name)) for name, x in part.items()}
            if "fresh_B" in part:
                part["fresh_B"] *= i == 0
            return step(now, frozen, part)

        def epoch(now: TrainState, e: jax.Array):
            rows = batch
            if epochs > 1 and minibatches > 1:
                ordered = {name: x[epoch_order(state, e, len(x))] for name, x in batch.items()}
                rows = {name: constrain(x, suffix(name)) for name, x in ordered.items()}
            parts = {name: micro_batches(x, suffix(name), minibatches) for name, x in rows.items()}
            return jax.lax.scan(one, now, (e * minibatches + jnp.arange(minibatches), parts))

        last, metrics = jax.lax.scan(epoch, state, jnp.arange(epochs))
        metrics = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), metrics)
        final = {name: metrics[name][-1] for name in ("learning_rate", "updates")}
        if "ratio_max" in metrics:
            final["ratio_max"] = metrics["ratio_max"].max()
        last = last.replace(step=state.step + 1)  # pyright: ignore[reportAttributeAccessIssue]
        return last, jax.tree.map(lambda x: x.mean(axis=0), metrics) | final

    return all_updates


def epoch_order(state: TrainState, epoch: jax.typing.ArrayLike, rows: int) -> jax.Array:
    """The order of a batch's rows in an epoch of its updates: as they are in epoch 0, later by seed, step and epoch."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key_W), state.step)
    order = jax.random.permutation(jax.random.fold_in(key, epoch), rows)
    return jnp.where(jnp.asarray(epoch) > 0, order, jnp.arange(rows))


def layer_norms(tree: Any) -> jax.Array:
    """norm_N of the leaves that are stacks of layers (N first in their names): one Euclidean norm for each layer."""
    leaves = [x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0] if suffix(path[-1].key).startswith("N")]
    return jnp.sqrt(sum(jnp.square(x.astype(jnp.float32)).reshape(len(x), -1).sum(axis=1) for x in leaves))


def micro_batches(x: jax.Array, letters: str, parts: int) -> jax.Array:
    """Cuts B into (parts) B, row i going to part i % parts: each device splits its own rows and sends none away."""
    assert letters.startswith("B"), "a batch's arrays begin with B"
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def compile_step(step: Callable, mesh: Mesh, state: Any, frozen: Any, batch: Any) -> Callable:
    """jit ("pjit") with the shardings that the names say, in and out; the old state is donated, `frozen` is not."""
    state_s, frozen_s, batch_s = (shardings(tree, mesh) for tree in (state, frozen, batch))
    return jax.jit(step, in_shardings=(state_s, frozen_s, batch_s), out_shardings=(state_s, None), donate_argnums=0)


def run_in_background(make: Callable[[], T], mesh: Mesh) -> Future[T]:
    """Calls make() in a thread under the mesh, e.g. to compile while text is prepared: XLA works without Python's lock.

    The process does not end before the thread does, unless its verb failed (__main__.console).
    """

    def under_mesh() -> T:
        with jax.set_mesh(mesh):
            return make()

    executor = ThreadPoolExecutor(1, BACKGROUND)
    future = executor.submit(under_mesh)
    executor.shutdown(wait=False)
    return future
