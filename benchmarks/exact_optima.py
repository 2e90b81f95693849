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
    grpo-k2          groups of 8, own sample in the mean, k2 in the loss                 ref exp(r / b) / Z, b = 8 beta / 7
    grpo-z           groups of 8, z-scores, the KL in the reward                         ref exp(r / beta) / Z
    grpo-published   groups of 8, z-scores, k3 in the loss                               none; tv is from the KL optimum
    dpo, ipo         pairs drawn uniformly, labelled by Bradley-Terry (ipo: see its docstring)
    reward           the same pairs; "reward" is r found, "correlation" that with r, policy ref exp(r found / beta) / Z
"""

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
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

ROWS, ANSWERS, PAIRS = 256, 8, 65_536
GROUPS = {
    "grpo": GroupEstimator(),
    "grpo-k3": GroupEstimator(kl="k3"),
    "grpo-k2": GroupEstimator(baseline="group_mean", kl="k2"),
    "grpo-z": GroupEstimator(baseline="z_score"),
    "grpo-published": GroupEstimator(baseline="z_score", kl="k3", aggregate="row_mean"),
}
METHODS = ("ppo", *GROUPS, "dpo", "ipo", "reward")
UPDATES = {"ppo": 100, "grpo": 100, "grpo-z": 100}  # 400 for the others
EPOCHS = {"ppo": 2}


@dataclass(frozen=True)
class Table:
    """Answers of `length` tokens over `symbols` symbols: their reference and reward, by the number of the answer.

    An answer's number has its tokens as digits, the first one highest.
    """

    pi_ref: np.ndarray
    reward: np.ndarray
    beta: float
    length: int = 1
    symbols: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "symbols", round(len(self.pi_ref) ** (1 / self.length)))
        assert self.symbols**self.length == len(self.pi_ref) == len(self.reward), "one number for each answer"

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


def draw(table: Table, params: dict, key: jax.Array, rows: int) -> jax.Array:
    """tokens_BL of answers drawn from the policy, each by its row's own key."""
    tokens_BL, key_B = jnp.zeros((rows, table.length), jnp.int32), jax.random.split(key, rows)
    for t in range(table.length):
        logits_BV = params["head_VD"][: table.symbols, prefixes(tokens_BL, table.symbols)[:, t]].T
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
    return optimum(table)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Half the sum of the absolute differences."""
    return float(0.5 * np.abs(p - q).sum())


def rollout(table: Table, method: str, params: dict, key: jax.Array) -> dict[str, jax.Array]:
    """A batch of ROWS answers from the policy, with what the losses need beside them."""
    tokens_BL = draw(table, params, key, ROWS)
    batch = {"tokens_BL": tokens_BL, "mask_BL": jnp.ones(tokens_BL.shape, jnp.float32)}
    old_BL, _ = log_probs(table.symbols, params, {}, batch)
    ref_BL, _ = log_probs(table.symbols, {"head_VD": jnp.asarray(table.head())}, {}, batch)
    number_B = (tokens_BL * table.symbols ** jnp.arange(table.length)[::-1]).sum(-1)
    given = jnp.asarray(table.reward, jnp.float32)[number_B], old_BL - ref_BL
    batch |= {"old_log_p_BL": old_BL, "ref_log_p_BL": ref_BL}
    if method == "ppo":
        batch["old_value_BL"] = values(table.symbols, params, {}, batch)
        made = ActorCritic().advantages(*given, batch["old_value_BL"], batch["mask_BL"], table.beta)
        return batch | dict(zip(("advantage_BL", "return_BL"), made, strict=True))
    advantage_BL = GROUPS[method].advantages(*given, batch["mask_BL"], ANSWERS, table.beta)
    return batch | {"advantage_BL": advantage_BL}
