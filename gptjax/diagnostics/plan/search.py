"""Search for the fastest settings that fit: meshes, remat and micro-batches; counted first, the best compiled.

The batch and all else that changes the losses stay as they are.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax

from gptjax.config import TrainConfig, check_divisible
from gptjax.config.section import InputError
from gptjax.diagnostics.plan.compiled import Compiled, UnknownTopology
from gptjax.diagnostics.plan.roofline import Speed, speed
from gptjax.model.counts import padded_vocab
from gptjax.ops.attention import select_kernel
from gptjax.ops.device import Device
from gptjax.parallel.sharding import AXES
from gptjax.runtime.dtype import preferred_dtype
from gptjax.runtime.hardware import Topology
from gptjax.training.build import build_components
from gptjax.training.memory import BY_CHIP, Memory, Temporaries, state_bytes, step_memory

# The share of memory that a count may reach without a compiler's check: the rest covers its error and other needs.
SAFE = 0.9
MOST_COMPILES, MOST_SECONDS = 6, 600.0
REMATS = ("none", "names", "dots", "full")


@dataclass(kw_only=True)
class Candidate:
    """Settings, on a mesh without -1, with their counted and compiled memory and their estimated speed."""

    config: TrainConfig
    memory: Memory
    speed: Speed | None = None
    compiled: Compiled | None = None
    failure: str = ""
    """The compiler's error where the cause was not memory."""

    @property
    def sizes(self) -> dict[str, int]:
        return self.config.mesh.sizes


@dataclass(kw_only=True)
class SearchResult:
    """The result of a search: the best candidate that fits, or None, and all that were compiled."""

    best: Candidate | None
    smallest: Candidate | None
    """The candidate with the least memory."""
    counted: int
    tried: list[Candidate] = field(default_factory=list)


class Planner:
    """Counts the memory and the time of settings of one model on one topology, with so many images in a row."""

    def __init__(self, config: TrainConfig, topology: Topology, images: int = 0):
        self.topology, self.images = topology, images
        self.config = with_devices(with_mesh(config, topology), topology)
        shapes = jax.eval_shape(build_components(self.config).init, 0)
        self._state = functools.cache(
            lambda *sizes: state_bytes(self.config, shapes, dict(zip(AXES, sizes)), tiles=self.tiles)
        )

    @property
    def tiles(self) -> bool:
        return bool(self.topology.libtpu)

    def candidate(self, config: TrainConfig) -> Candidate:
        """These settings with their memory and speed; raises InputError where a dimension does not divide."""
        sizes = config.mesh.sizes
        check_divisible(config, sizes)
        kept = BY_CHIP.get(self.topology.kind, Temporaries())
        state = self._state(*sizes.values())
        where = device_of(self.topology)
        memory = step_memory(config, state, sizes, device=where, kept=kept, images=self.images)
        chip = self.topology.chip
        fast = speed(config, sizes, self.topology, memory, self.images) if chip and chip.bandwidth else None
        return Candidate(config=config, memory=memory, speed=fast)

    def as_written(self) -> Candidate:
        """The settings as they are; raises InputError where their mesh does not cover the topology."""
        sizes = self.config.mesh.sizes
        shown = ", ".join(f"mesh.{a}={n}" for a, n in sizes.items())
        if math.prod(sizes.values()) != self.topology.devices:
            raise InputError(f"{shown} does not cover the {self.topology.devices} devices of {self.topology.name}")
        return self.candidate(self.config)

    def search(
        self,
        compile_it: Callable[[TrainConfig, float], Compiled] | None,
        compiles: int = MOST_COMPILES,
        seconds: float = MOST_SECONDS,
    ) -> SearchResult:
        """The fastest candidate that fits.

        Without a compiler the count decides, with a margin (SAFE). With one, candidates that may fit are compiled in
        order of speed, those that need more memory than one that did not fit are skipped, and the last compile is of
        one within the margin.
        """
        chip = self.topology.chip
        assert chip is not None, "fake CPU devices have no speed to search by"
        every = list(self.candidates())
        fitting = [c for c in every if c.memory.total <= SAFE * chip.memory]
        smallest = min(every, key=lambda c: c.memory.total, default=None)
        result = SearchResult(best=None, smallest=smallest, counted=len(every))
        if compile_it is None:
            result.best = max(fitting, key=_rank, default=None)
            return result
        possible = [c for c in every if c.memory.total <= (2 - SAFE) * chip.memory]
        ceiling, start = math.inf, time.perf_counter()
        for c in sorted(possible, key=_rank, reverse=True):
            left = seconds - (time.perf_counter() - start)
            if len(result.tried) >= compiles or left <= 0:
                break
            last = len(result.tried) == compiles - 1
            if c.memory.total > (SAFE * chip.memory if last else ceiling):
                continue
            result.tried.append(c)
            try:
                c.compiled = compile_it(c.config, left)
            except UnknownTopology:
                raise
            except InputError as e:
                c.failure = str(e)
                continue
            if c.compiled.fits and c.compiled.total <= chip.memory:
                result.best = c
                break
            ceiling = 0.97 * c.memory.total
        return result

    def candidates(self) -> Iterator[Candidate]:
        """Every mesh, remat and number of micro-batches that divides, on all devices of the topology."""
        config = self.config
        for sizes in self._meshes():
            rows, rest = divmod(config.data.batch_size, sizes["data"] * sizes["fsdp"])
            for accumulate in (n for n in range(1, rows + 1) if rest == 0 and rows % n == 0):
                for remat in dict.fromkeys((*REMATS, config.model.remat)):
                    changes = {"mesh": sizes, "model": {"remat": remat}, "optim": {"accumulate": accumulate}}
                    new = {name: dataclasses.replace(getattr(config, name), **to) for name, to in changes.items()}
                    with contextlib.suppress(InputError):  # a dimension that does not divide
                        yield self.candidate(dataclasses.replace(config, **new))

    def _meshes(self) -> Iterator[dict[str, int]]:
        """Meshes of all devices over which the model's dimensions divide, with the context axis as it is set.

        Meshes that split a dimension of a torus for two axes are left out: `roofline` does not hold for them.
        """
        cfg, devices = self.config.model, self.topology.devices
        context = self.config.mesh.context
        if devices % context:
            return
        vocab = padded_vocab(self.config.tokenizer.vocab_size)
        for tensor in _divisors(devices // context):
            uneven = any(n % tensor for n in (cfg.num_heads, cfg.num_kv_heads, cfg.mlp_width, vocab))
            if uneven or tensor * context > 16:
                continue
            for fsdp in _divisors(devices // context // tensor):
                sizes = {"data": devices // context // tensor // fsdp, "fsdp": fsdp, "tensor": tensor,
                         "context": context}  # fmt: skip
                if cfg.width % fsdp == 0 and self._fits_torus(list(sizes.values())):
                    yield sizes

    def _fits_torus(self, sizes: list[int]) -> bool:
        """True where each axis can take whole dimensions of the torus."""
        where = self.topology
        shape = [*where.shape, where.chip.devices] if where.chip and where.chip.torus else []
        return not shape or _assigned([n for n in sizes if n > 1], [n for n in shape if n > 1])


def with_mesh(config: TrainConfig, topology: Topology) -> TrainConfig:
    """The settings with a mesh size of -1 filled in; the mesh may still not cover the topology."""
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **config.mesh.filled(topology.devices)))


def with_devices(config: TrainConfig, topology: Topology) -> TrainConfig:
    """The settings with the dtype and kernel that the topology's devices select; raises InputError where none fits."""
    if config.model.dtype == "auto":
        config = config.with_dtype("bfloat16" if topology.chip else preferred_dtype()[0])
    device = device_of(topology)._replace(shares_rows=config.mesh.context > 1)
    kernel = select_kernel(config.model, config.data.length, device)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention=kernel))


def device_of(topology: Topology) -> Device:
    """The device that a topology consists of."""
    if topology.chip is None:
        return Device("cpu")
    if topology.libtpu:
        return Device("tpu", memory=topology.chip.memory)
    return Device("gpu", capability=9.0 if topology.chip.cuda else 0.0, memory=topology.chip.memory)


def _rank(c: Candidate) -> tuple[float, int]:
    """Sorts by speed, then by less memory."""
    return (round(c.speed.tokens_per_second, -1) if c.speed else 0.0), -c.memory.total


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _assigned(axes: list[int], dimensions: list[int]) -> bool:
    """True where each axis is the product of some of the dimensions, each used once."""
    if not axes:
        return not dimensions
    first, rest = axes[0], axes[1:]
    for mask in range(1, 1 << len(dimensions)):
        chosen = [d for i, d in enumerate(dimensions) if mask >> i & 1]
        left = [d for i, d in enumerate(dimensions) if not mask >> i & 1]
        if math.prod(chosen) == first and _assigned(rest, left):
            return True
    return False
