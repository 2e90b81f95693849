"""Does a learning rate tuned at width 64 hold at width 256? With muP, and for contrast without.

    python benchmarks/mup.py --out benchmarks/results

A GPT-2-like decoder of 2 layers and 4 heads, its head untied, reads the built-in Shakespeare by bytes: 150 steps of 16
windows of 64 bytes, drawn at random with one seed, AdamW with a warm-up of 15 steps and half a cosine to 0. Each of
seven learning rates, a factor of 2 apart, is tried at both widths with model.mup_base_width=64 and with 0, which at
width 64 is the same. A rate's loss is the mean over the last 20 steps, in nats a byte. The rate has carried over where
the best at 256 is at most a factor of 2 from the best at 64. (muP promises that the curve keeps its place, not that it
lies lower: the base's own multipliers, of the logits above all, are as they come and not tuned.)

Writes DATE_mup.json and .png (which takes matplotlib: pip install 'gptjax[plots]').
"""

import argparse
import importlib.metadata
import importlib.resources
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from report import facts, write_report

from gptjax.config import ModelConfig, OptimConfig
from gptjax.model.decoder import Decoder, head, init_params
from gptjax.training.losses import cross_entropy
from gptjax.training.optim import make_optimizer, make_schedule

BASE, WIDTHS = 64, (64, 256)
LEARNING_RATES = tuple(2.0**-n for n in range(12, 5, -1))
ROWS, LENGTH, STEPS, WARMUP, TAIL, SEED = 16, 64, 150, 15, 20, 0
MODEL = ModelConfig(num_layers=2, num_heads=4, width=BASE, dtype="float32", tied=False, unroll=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the dated report")
    args = parser.parse_args()

    device = f"{platform.machine()} {jax.default_backend()}, {jax.device_count()} device(s)"
    setting = {"rows": ROWS, "length": LENGTH, "steps": STEPS, "seed": SEED}
    report, began = facts(device, "jax", "flax", "optax") | setting, time.perf_counter()
    report["losses"] = {}
    for width in WIDTHS:
        for base in (BASE, 0) if width != BASE else (BASE,):
            losses = {f"{rate:g}": train(rate, width, base) for rate in LEARNING_RATES}
            report["losses"][name(width, base)] = losses
            print(f"{name(width, base)}: " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items()), flush=True)
    report["best"] = {which: float(min(losses, key=losses.get)) for which, losses in report["losses"].items()}
    narrow = report["best"][name(BASE, BASE)]
    report["best_at_256_over_best_at_64"] = {
        label: report["best"][name(256, base)] / narrow for label, base in (("muP", BASE), ("no muP", 0))
    }
    report["seconds"] = round(time.perf_counter() - began, 1)

    path = write_report(report, args.out, "mup")
    plot(report, path.with_suffix(".png"))
    print(f"best at 256 over best at 64: {report['best_at_256_over_best_at_64']}")
    print(f"wrote {path} and .png")


def name(width: int, base: int) -> str:
    return f"width {width}" + (", muP" if base and width != base else "")


def windows() -> np.ndarray:
    """The bytes of every step: (STEPS, ROWS, LENGTH + 1)."""
    text = importlib.resources.files("gptjax.data").joinpath("corpora", "shakespeare.txt").read_bytes()
    data, rng = np.frombuffer(text, np.uint8), np.random.default_rng(SEED)
    starts = rng.integers(0, len(data) - LENGTH, (STEPS, ROWS, 1))
    return data[starts + np.arange(LENGTH + 1)].astype(np.int32)


@partial(jax.jit, static_argnums=(1, 2))
def losses_of(rate: jax.Array, width: int, base: int, tokens: jax.Array) -> jax.Array:
    """The loss of every step. The rate is an argument, so that one program serves all of them."""
    cfg = ModelConfig(**{**vars(MODEL), "width": width, "mup_base_width": base})
    decoder = Decoder(cfg, 256, LENGTH)
    optim = OptimConfig(learning_rate=1.0, warmup_steps=WARMUP, final_fraction=0.0)
    shape = make_schedule(optim, STEPS)
    tx = make_optimizer(optim, lambda u: rate * shape(u), cfg)
    places_BL, ones_BL = jnp.tile(jnp.arange(LENGTH), (ROWS, 1)), jnp.ones((ROWS, LENGTH), jnp.int32)

    def loss(params, tokens_BL):
        x_BLD, _ = decoder.apply({"params": params}, tokens_BL[:, :-1], places_BL, ones_BL)
        total = cross_entropy(x_BLD, head(params), tokens_BL[:, 1:], ones_BL.astype(jnp.float32), 256)
        return total / ones_BL.size

    def step(carry, tokens_BL):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, tokens_BL)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    params = init_params(decoder)(jax.random.key(SEED))
    return jax.lax.scan(step, (params, tx.init(params)), tokens)[1]


def train(rate: float, width: int, base: int) -> float:
    """Mean loss of the last TAIL steps."""
    return float(losses_of(jnp.float32(rate), width, base, jnp.asarray(windows()))[-TAIL:].mean())


def plot(report: dict[str, Any], path: Path) -> None:
    """Loss against learning rate, a line for each width and parametrisation, the best marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for which, losses in report["losses"].items():
        rates = [float(rate) for rate in losses]
        (line,) = axes.plot(rates, list(losses.values()), marker=".", label=which)
        best = report["best"][which]
        axes.plot([best], [losses[f"{best:g}"]], marker="*", markersize=14, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"loss after {STEPS} steps, nats a byte")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
