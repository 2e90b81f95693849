"""A competitor of throughput.py in JAX: our training step as a run makes it, or the plain decoder.

A child of worker_pool.py. Our own step is made by the functions of gptjax/training (build_components, init_state,
compile_step) and run by the loop of every run (fit), which reads the numbers of a step while the next one runs.
"""

import os
import resource
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from plain_decoder import PlainDecoder, from_stacked
from worker_pool import serve

from gptjax.config import TrainConfig
from gptjax.config.section import build
from gptjax.interop.families import FAMILIES
from gptjax.interop.layout import written_tensors
from gptjax.model.decoder import Decoder
from gptjax.parallel.sharding import make_mesh
from gptjax.runtime.compile_cache import enable_compile_cache
from gptjax.runtime.process import tune_process
from gptjax.training.build import build_components
from gptjax.training.loop import Hooks, fit
from gptjax.training.metrics import peak_memory
from gptjax.training.step import compile_step, init_state

Rows = list[dict[str, float]]


class JaxCompetitor:
    """What every competitor in JAX answers; `run` is its own."""

    def __init__(self, setting: dict[str, Any]):
        self.config = build(TrainConfig, setting["config"])
        if self.config.compile_cache:
            enable_compile_cache()
        if setting["precision"]:
            jax.config.update("jax_default_matmul_precision", setting["precision"])
        stored = np.load(setting["batches"])
        count = int(stored["count"])
        names = [name for name in stored.files if name != "count"]
        arrays = {name: stored[name] for name in names}
        self.batches = [{name: np.ascontiguousarray(arrays[name][i]) for name in names} for i in range(count)]
        self.mesh, self.parts = make_mesh(self.config.mesh, jax.devices()[:1]), build_components(self.config)
        self.done = 0
        self.facts = {
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
            "device": jax.devices()[0].device_kind,
            "platform": jax.default_backend(),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
        }

    def memory(self) -> dict[str, int]:
        """The most that the process has had resident, and that the device held (on a CPU, which does not count: 0)."""
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"resident_bytes": resident, "device_bytes": 0 if jax.default_backend() == "cpu" else peak_memory()}

    def products(self, shapes: list[tuple[int, int, int]], dtype: str, seconds: float) -> list[float]:
        """GFLOP/s of [m, k] @ [k, n] for each shape, both operands in plain row-major order."""
        multiply = jax.jit(jnp.matmul)
        rates = []
        for m, k, n in shapes:
            a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
            multiply(a, b).block_until_ready()
            start = time.perf_counter()
            multiply(a, b).block_until_ready()
            count = max(1, min(50, int(seconds / (time.perf_counter() - start))))
            start = time.perf_counter()
            for _ in range(count):
                product = multiply(a, b)
            product.block_until_ready()
            rates.append(2e-9 * m * k * n * count / (time.perf_counter() - start))
        return rates

    def next_batches(self) -> Iterator[tuple[dict, dict]]:
        """The batches of the steps to come, with no state of the data beside them."""
        for i in range(self.done, self.done + 2**31):
            yield self.batches[i % len(self.batches)], {}


class Ours(JaxCompetitor):
    """Our step; with setting["weights"] the initial weights are written there first, by their Hugging Face names."""

    def __init__(self, setting: dict[str, Any]):
        super().__init__(setting)
        with jax.set_mesh(self.mesh):
            self.state = init_state(self.parts.init, self.config.seed, self.mesh)
            self.step = compile_step(self.parts.step, self.mesh, self.state, {}, self.batches[0])
        if setting.get("weights"):
            params = self.state.params
            decoder = Decoder(self.config.model, len(params["embed_VD"]), self.config.data.length)
            written = written_tensors(FAMILIES[setting["family"]], decoder, params)
            np.savez(setting["weights"], **{name: make() for name, _, make in written})  # pyright: ignore[reportArgumentType]

    def run(self, steps: int) -> Rows:
        """So many steps of the training loop; the loss and the norm of the gradient of each."""
        rows: Rows = []

        def log(_: int, values: dict[str, Any], data_state: dict) -> None:
            rows.append({name: float(values[name]) for name in ("loss", "grad_norm")})

        with jax.set_mesh(self.mesh):
            self.state = fit(
                self.step, self.state, {}, self.next_batches(), self.done + steps,
                mesh=self.mesh, hooks=Hooks(log=log),
            )  # fmt: skip
            jax.block_until_ready(self.state)
        self.done += steps
        return rows


class Plain(JaxCompetitor):
    """The plain decoder with our initial weights and our optimizer's settings."""

    def __init__(self, setting: dict[str, Any]):
        super().__init__(setting)
        model, optim = self.config.model, self.config.optim
        assert model.norm == "layernorm" and model.positions == "learned" and model.tied and model.biases, model
        params = from_stacked(jax.jit(lambda seed: self.parts.init(seed).params)(self.config.seed))
        self.decoder = PlainDecoder(params, model.norm_epsilon, model.dtype, vars(optim))

    def run(self, steps: int) -> Rows:
        given = self.next_batches()
        rows = self.decoder.run([next(given)[0] for _ in range(steps)])
        self.done += steps
        return rows


def competitor(setting: dict[str, Any]) -> JaxCompetitor:
    """The competitor that a setting describes; ours in a process that is tuned as `gptjax pretrain` tunes its own."""
    if setting["kind"] == "plain":
        return Plain(setting)
    tune_process()
    return Ours(setting)


if __name__ == "__main__":
    serve(competitor, ("run", "products", "memory"))
