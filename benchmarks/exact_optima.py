"""Alignment on problems whose optimum is known: each method's losses, trained by the real step, against closed forms.

    python benchmarks/exact_optima.py --instances FILE --method grpo --json OUT

FILE holds {"bandits": [{"pi_ref": [...], "reward": [...], "beta": 0.5}, ...]}; more keys are ignored. OUT is the same
list with "policy" (the policy found), "tv" (its total variation from the method's closed form, which is "target"), and
"updates" (optimizer updates made; those of ppo and grpo draw 256 answers each from the policy of that moment).

The policy is a table: one row of logits for each prefix of an answer, which is the head of a model whose hidden states
are one-hot. So the log-probabilities are those of training (chunked, sharded by name), and so are the losses of
gptjax.align, the optimizer, the step and the loop; a bandit is an answer of one token.

    method           what is trained, and on what                                        closed form
    ppo              clipped policy and value, GAE, whitened; the KL in the reward       ref exp(r / beta) / Z
    grpo             groups of 8, leave-one-out, the KL in the reward (the default)      ref exp(r / beta) / Z
    grpo-k3          groups of 8, leave-one-out, k3 in the loss                          beta ref / (lambda - r)
    grpo-k2          groups of 8, own sample in the mean, k2 in the loss                 that with 8 beta / 7 as beta
    grpo-z           groups of 8, z-scores, the KL in the reward                         ref exp(r / beta) / Z
    grpo-published   groups of 8, z-scores, k3 in the loss                               none; tv is from the KL optimum
    dpo              pairs of answers, drawn uniformly, labelled by Bradley-Terry        ref exp(r / beta) / Z
    ipo              the same pairs; h_i = mean over j of (P(i > j) - 1/2) / beta        ref exp(h) / Z
    reward           the same pairs; "reward" is r found, "correlation" its with r,      ref exp(r / beta) / Z
                     policy ref exp(r found / beta) / Z

Sampling is seeded (--seed). On a mesh: JAX_NUM_CPU_DEVICES=8 python benchmarks/exact_optima.py ... --fsdp 4 --tensor 2
"""

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.align.estimators import ActorCritic, GroupEstimator
from gptjax.align.losses import policy_loss, preference_loss, reward_loss
from gptjax.config import MeshConfig, OptimConfig
from gptjax.model.counts import padded_vocab
from gptjax.parallel.sharding import abstract, make_mesh, on_host
from gptjax.training.loop import Hooks, fit
from gptjax.training.losses import token_log_probs
from gptjax.training.optim import make_optimizer, make_schedule
from gptjax.training.step import compile_step, init_state, make_init, make_train_step

ROWS, ANSWERS, PAIRS = 256, 8, 1024
GROUPS = {
    "grpo": GroupEstimator(),
    "grpo-k3": GroupEstimator(kl="k3"),
    "grpo-k2": GroupEstimator(baseline="group_mean", kl="k2"),
    "grpo-z": GroupEstimator(baseline="z_score"),
    "grpo-published": GroupEstimator(baseline="z_score", kl="k3", aggregate="row_mean"),
}
METHODS = ("ppo", *GROUPS, "dpo", "ipo", "reward")
UPDATES = {"ppo": 100, "grpo": 100, "grpo-z": 100}  # 400 for the others, whose noise does not end at the optimum
EPOCHS = {"ppo": 2}  # updates on one rollout


@dataclass(frozen=True)
class Table:
    """Answers of `length` tokens over some symbols: their reference and reward, by the number of the answer.

    An answer's number has its tokens as digits, the first one highest.
    """

    pi_ref: np.ndarray
    reward: np.ndarray
    beta: float
    length: int = 1

    @property
    def symbols(self) -> int:
        return round(len(self.pi_ref) ** (1 / self.length))

    def tokens(self) -> np.ndarray:
        """Every answer's tokens, in the order of their numbers."""
        place_L = self.symbols ** np.arange(self.length)[::-1]
        return (np.arange(len(self.pi_ref))[:, None] // place_L % self.symbols).astype(np.int32)

    def head(self) -> np.ndarray:
        """The head_VD whose policy is the reference: D counts prefixes, V symbols, both padded as a model's are."""
        p = np.asarray(self.pi_ref, np.float64)
        columns = []
        for t in range(self.length):
            mass = p.reshape(self.symbols**t, self.symbols, -1).sum(-1)
            columns += list(np.log(mass / mass.sum(-1, keepdims=True)))
        head_VD = np.zeros((padded_vocab(self.symbols), -(-len(columns) // 8) * 8), np.float32)
        head_VD[: self.symbols, : len(columns)] = np.array(columns).T
        return head_VD


def prefixes(tokens_BL: jax.Array, symbols: int) -> jax.Array:
    """The number of the prefix that each token follows: column of the head."""
    state_B, columns = jnp.zeros(len(tokens_BL), jnp.int32), []
    for t in range(tokens_BL.shape[1]):
        columns.append((symbols**t - 1) // (symbols - 1) + state_B)
        state_B = state_B * symbols + tokens_BL[:, t]
    return jnp.stack(columns, axis=1)


def log_probs(symbols: int, params: dict, frozen: Any, batch: dict) -> tuple[jax.Array, jax.Array]:
    """log_p_BL and entropy_BL of a batch's tokens under the table of a policy."""
    x_BLD = jax.nn.one_hot(prefixes(batch["tokens_BL"], symbols), params["head_VD"].shape[1])
    return token_log_probs(x_BLD, params["head_VD"], batch["tokens_BL"], symbols)


def values(symbols: int, params: dict, frozen: Any, batch: dict) -> jax.Array:
    """value_BL: one number for each prefix."""
    return params["value_D"][prefixes(batch["tokens_BL"], symbols)]


def draw(params: dict, key: jax.Array, symbols: int, length: int) -> jax.Array:
    """tokens_BL of ROWS answers drawn from the policy, each by its row's own key."""
    tokens_BL, key_B = jnp.zeros((ROWS, length), jnp.int32), jax.random.split(key, ROWS)
    for t in range(length):
        logits_BV = params["head_VD"][:symbols, prefixes(tokens_BL, symbols)[:, t]].T
        keys = jax.vmap(jax.random.fold_in, (0, None))(key_B, t)
        tokens_BL = tokens_BL.at[:, t].set(jax.vmap(jax.random.categorical)(keys, logits_BV))
    return tokens_BL


def policy(table: Table, params: dict) -> np.ndarray:
    """The chance of every answer, in float64."""
    logits = np.asarray(params["head_VD"], np.float64)[: table.symbols]
    p_VD = np.exp(logits - logits.max(0))
    p_VD /= p_VD.sum(0)
    tokens = table.tokens()
    return np.prod(p_VD[tokens, np.asarray(prefixes(jnp.asarray(tokens), table.symbols))], axis=1)


def optimum(table: Table, beta: float | None = None) -> np.ndarray:
    """ref exp(r / beta) / Z, where E[r] - beta KL(pi || ref) is highest."""
    logits = np.log(table.pi_ref) + np.asarray(table.reward) / (table.beta if beta is None else beta)
    p = np.exp(logits - logits.max())
    return p / p.sum()


def optimum_k3(table: Table) -> np.ndarray:
    """beta ref / (lambda - r), where E[r] - beta KL(ref || pi) is highest; lambda by bisection."""
    r, ref = np.asarray(table.reward), np.asarray(table.pi_ref)
    low, high = (r + table.beta * ref).max(), r.max() + table.beta
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (table.beta * ref / (middle - r)).sum() > 1 else (low, middle)
    return table.beta * ref / (high - r)


def target(table: Table, method: str) -> np.ndarray:
    """The closed form that a method's policy is compared with."""
    if method == "grpo-k3":
        return optimum_k3(table)
    if method == "grpo-k2":
        return optimum(table, table.beta * ANSWERS / (ANSWERS - 1))
    if method == "ipo":
        wins = 1 / (1 + np.exp(np.subtract.outer(-table.reward, -table.reward)))
        return optimum(Table(table.pi_ref, (wins - 0.5).mean(1), table.beta))
    return optimum(table)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Half the sum of the absolute differences."""
    return float(0.5 * np.abs(p - q).sum())


# -- Batches: rollouts of the policy of the moment, and preferences


@functools.partial(jax.jit, static_argnames=("method", "symbols", "length"))
def rollout(params, reference, reward, beta, key, *, method: str, symbols: int, length: int) -> dict[str, jax.Array]:
    """A batch of ROWS answers from the policy, with what the losses need beside them."""
    tokens_BL = draw(params, key, symbols, length)
    batch = {"tokens_BL": tokens_BL, "mask_BL": jnp.ones(tokens_BL.shape, jnp.float32)}
    batch["old_log_p_BL"], _ = log_probs(symbols, params, {}, batch)
    batch["ref_log_p_BL"], _ = log_probs(symbols, {"head_VD": reference}, {}, batch)
    score_B = reward[(tokens_BL * symbols ** jnp.arange(length)[::-1]).sum(-1)]
    drawn = score_B, batch["old_log_p_BL"] - batch["ref_log_p_BL"]
    if method == "ppo":
        batch["old_value_BL"] = values(symbols, params, {}, batch)
        advantage_BL, batch["return_BL"] = ActorCritic().advantages(
            *drawn, batch["old_value_BL"], batch["mask_BL"], beta
        )
    else:
        advantage_BL = GROUPS[method].advantages(*drawn, batch["mask_BL"], ANSWERS, beta)
    return batch | {"advantage_BL": advantage_BL}


class Rollouts:
    """Batches as a function of the state: a new rollout each EPOCHS updates; `tv` holds each one's distance."""

    def __init__(self, table: Table, method: str, seed: int):
        self.table, self.method, self.seed, self.tv = table, method, seed, []
        self.batch: dict = {}

    def __call__(self, state: Any) -> tuple[dict, dict]:
        table, step = self.table, int(state.step)
        if step % EPOCHS.get(self.method, 1) == 0:
            key = jax.random.fold_in(jax.random.key(self.seed), step)
            given = state.params, table.head(), np.float32(table.reward), np.float32(table.beta), key
            made = rollout(*given, method=self.method, symbols=table.symbols, length=table.length)
            self.batch = on_host(made)
            self.tv.append(total_variation(policy(table, state.params), target(table, self.method)))
        return self.batch, {}


def preferences(table: Table, seed: int):
    """Batches of PAIRS pairs of two answers, the better first: P(i > j) = sigmoid(r_i - r_j) (Bradley-Terry)."""
    rng, n = np.random.default_rng(seed), len(table.pi_ref)
    rank_BS, mask_BS = np.tile(np.arange(2), (PAIRS, 1)), np.ones((PAIRS, 2), np.float32)
    reference_S = np.log(table.pi_ref)
    while True:
        first, other = rng.integers(n, size=PAIRS), rng.integers(1, n, size=PAIRS)
        pair_BS = np.stack([first, (first + other) % n], axis=1)
        wins = rng.random(PAIRS) < 1 / (1 + np.exp(table.reward[pair_BS[:, 1]] - table.reward[pair_BS[:, 0]]))
        pair_BS = np.where(wins[:, None], pair_BS, pair_BS[:, ::-1]).astype(np.int32)
        reference_BS = reference_S[pair_BS].astype(np.float32)
        ranked = {"rank_BS": rank_BS, "mask_BS": mask_BS, "answers_BS": mask_BS}
        yield {"answer_BS": pair_BS, "ref_log_p_BS": reference_BS, **ranked}, {}


# -- Training


def make_loss(table: Table, method: str) -> Callable:
    """The loss function of gptjax.align that a method trains."""
    policy_of = functools.partial(log_probs, table.symbols)
    if method == "ppo":

        def actor_critic(params, frozen, batch):
            return *policy_of(params, frozen, batch), values(table.symbols, params, frozen, batch)

        return policy_loss(actor_critic, aggregation="token", value_weight=0.5)
    if method in GROUPS:
        estimator = GROUPS[method]
        return policy_loss(policy_of, aggregation=estimator.aggregate, beta=table.beta, kl=estimator.kl_in_loss)
    if method == "reward":
        return reward_loss(lambda params, frozen, batch: params["score_D"][batch["answer_BS"]])
    tokens = jnp.asarray(table.tokens())

    def of_answers(params, frozen, batch):
        log_p_BL, _ = policy_of(params, frozen, {"tokens_BL": tokens[batch["answer_BS"].reshape(-1)]})
        return log_p_BL.sum(-1).reshape(-1, 2)

    return preference_loss(
        of_answers, lambda p, f, batch: batch["ref_log_p_BS"], beta=table.beta, kind="dpo" if method == "dpo" else "ipo"
    )


def train(table: Table, method: str, seed: int = 0, updates: int = 0, mesh_config: MeshConfig | None = None) -> dict:
    """The policy after training, its total variation from the closed form, and the updates made.

    "first" counts the updates until a rollout's policy was within 0.02; None where none was, or none is drawn.
    """
    updates = updates or UPDATES.get(method, 400)
    optim = OptimConfig(learning_rate=0.2, warmup_steps=0, final_fraction=0, beta1=0.5, beta2=0.8, weight_decay=0)
    schedule = make_schedule(optim, updates)
    tx = make_optimizer(optim, schedule)
    head_VD = table.head()
    start = {"head_VD": jnp.asarray(head_VD), "value_D": jnp.zeros(head_VD.shape[1])}
    start |= {"score_D": jnp.zeros(-(-len(table.pi_ref) // 8) * 8)}
    init = make_init(lambda key: start, tx)
    mesh = make_mesh(mesh_config or MeshConfig(data=1), jax.devices() if mesh_config else jax.devices()[:1])
    with jax.set_mesh(mesh):
        batches = Rollouts(table, method, seed) if method in ("ppo", *GROUPS) else preferences(table, seed)
        state = init_state(init, 0, mesh)
        example, _ = batches(state) if isinstance(batches, Rollouts) else next(preferences(table, seed))
        step = make_train_step(make_loss(table, method), tx, schedule)
        train_step = compile_step(step, mesh, abstract(state, mesh), {}, abstract(example, mesh))
        state = fit(train_step, state, {}, batches, updates, mesh=mesh, hooks=Hooks())
        params = on_host(state.params)
    found: dict[str, Any] = {"updates": updates}
    if method == "reward":
        score = params["score_D"][: len(table.pi_ref)].astype(np.float64)
        reached = optimum(Table(table.pi_ref, score, table.beta))
        correlation = np.corrcoef(score, table.reward)[0, 1]
        found |= {"reward": (score - score.mean()).tolist(), "correlation": float(correlation)}
    else:
        reached = policy(table, params)
    if isinstance(batches, Rollouts):
        tv = batches.tv[1:]  # the example's was that of the first rollout, too
        found["first"] = next((i * EPOCHS.get(method, 1) for i, x in enumerate(tv) if x < 0.02), None)
    wanted = target(table, method)
    return found | {"policy": reached.tolist(), "target": wanted.tolist(), "tv": total_variation(reached, wanted)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=Path, required=True)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=0, help="0: the method's own number")
    parser.add_argument("--fsdp", type=int, default=0)
    parser.add_argument("--tensor", type=int, default=1)
    args = parser.parse_args()
    mesh = MeshConfig(data=1, fsdp=args.fsdp, tensor=args.tensor) if args.fsdp else None
    rows = json.loads(args.instances.read_text())["bandits"]
    for i, row in enumerate(rows):
        pi_ref, reward = (np.asarray(row[name], np.float64) for name in ("pi_ref", "reward"))
        if pi_ref.shape != reward.shape or pi_ref.ndim != 1 or len(pi_ref) < 2 or not row["beta"] > 0:
            parser.error(f"bandits[{i}]: wanted as many rewards as probabilities, two or more, and a beta above 0")
        if pi_ref.min() <= 0 or abs(pi_ref.sum() - 1) > 1e-6:
            parser.error(f"bandits[{i}]: wanted a pi_ref of probabilities above 0 whose sum is 1, got {pi_ref.sum():g}")
        row |= train(
            Table(pi_ref / pi_ref.sum(), reward, float(row["beta"])), args.method, args.seed, args.updates, mesh
        )
        print(f"{args.method} {i}: tv {row['tv']:.4f} after {row['updates']} updates", flush=True)
    args.json.write_text(json.dumps({"method": args.method, "bandits": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
