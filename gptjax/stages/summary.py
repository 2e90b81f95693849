"""The first lines of a run: what is trained, from what, and where it goes. What needs no jax is printed without it."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from gptjax.config import OptimConfig, TrainConfig, TuneConfig
from gptjax.model.counts import parameters
from gptjax.parallel.cluster import given_rank
from gptjax.runtime.status import entry, write_line
from gptjax.runtime.versions import __version__

GIB = 2**30
SAFE = 0.9  # the share of the memory that a count may reach: the rest covers its error
REMATS = ("none", "dots", "full")  # by how much is computed again


def print_summary(config: TrainConfig, origins: Mapping[str, str]) -> None:
    """Prints the lines of `summarize`, in the first process of a job alone."""
    for line in summarize(config, origins) if not given_rank() else ():
        write_line(line)


def summarize(config: TrainConfig, origins: Mapping[str, str]) -> Iterator[str]:
    """Lines that settings alone give; `origins` names the source of each setting as `runs.run.Provenance` does."""
    model, data, steps = config.model, config.data, config.steps
    count = parameters(model, config.tokenizer.vocab_size, data.length)["total"]
    groups = f" ({model.num_kv_heads} of keys)" if model.num_kv_heads != model.num_heads else ""
    parts = f", in {config.optim.accumulate} parts" if config.optim.accumulate > 1 else ""
    yield f"gptjax {__version__} trains {config.run_dir}"
    yield entry("model", f"{short(count)} parameters: {model.num_layers} layers x {model.width}, {model.num_heads} "
                f"heads{groups}, context {data.length:,}, {config.tokenizer.vocab_size:,} token ids")  # fmt: skip
    passes = f"{config.epochs:g} epochs" if isinstance(config, TuneConfig) and not steps else f"{steps:,} steps"
    yield entry("batch", f"{data.batch_size:,} rows of {data.length:,} = {data.batch_size * data.length:,} "
                f"tokens{parts}; {passes}")  # fmt: skip
    yield entry("optimizer", describe_optimizer(config.optim, steps))
    if model.dtype != "auto":  # else it is said once the device is known
        yield entry("dtype", f"{model.dtype}, {dtype_reason(origins)}")
    sinks = f", and by {', '.join(config.sinks)}" if config.sinks else ""
    yield entry("curves", f"{config.run_dir}/report.html{sinks}")


def dtype_reason(origins: Mapping[str, str]) -> str:
    """The reason for a model.dtype that the settings name."""
    return {"command line": "as the command line says", "recipe": "as the recipe says"}.get(
        origins.get("model.dtype", ""), "the default"
    )


def describe_optimizer(cfg: OptimConfig, steps: int) -> str:
    """The optimizer and its schedule in a line."""
    last = f"{cfg.learning_rate * cfg.final_fraction:.3g}"
    shape = {
        "cosine": f"then a cosine to {last}",
        "linear": f"then straight to {last}",
        "wsd": f"then constant, in the last {cfg.decay_steps(steps):,.0f} steps straight to {last}",
        "constant": "then constant",
        "rsqrt": "then as 1 / sqrt(step)",
    }[cfg.schedule]
    clip = f"gradients clipped to {cfg.clip_norm:g}" if cfg.clip_norm else "gradients not clipped"
    return (
        f"{cfg.kind}, learning rate {cfg.learning_rate:g} after {cfg.warmup_steps:,} steps, {shape}; weight decay "
        f"{cfg.weight_decay:g}; {clip}"
    )


def describe_memory(
    config: TrainConfig,
    shapes: Any,
    sizes: Mapping[str, int],
    frozen: Mapping[str, Any] | None = None,
    images: int = 0,
) -> str:
    """The memory that a step is counted to take beside what a device has; where that is less, settings that fit.

    `shapes` are those of the state, `frozen` those of weights that stay as they are, `sizes` those of the mesh; a row
    has so many `images`. A count is an estimate, so nothing is refused.
    """
    from gptjax.ops.device import device
    from gptjax.runtime.hardware import device_memory
    from gptjax.training.memory import count_memory

    there, counted = device_memory(), count_memory(config, shapes, sizes, device(), frozen, images)
    text = f"about {_size(counted)} on each device, which has {_size(there)}"
    if counted <= there:
        return text
    for changed in _smaller(config, sizes):
        if count_memory(changed, shapes, sizes, device(), frozen, images) <= SAFE * there:
            flags = f"--model.remat {changed.model.remat} --optim.accumulate {changed.optim.accumulate}"
            return f"WARNING: {text}; this would fit: {flags}"
    return f"WARNING: {text}; no --model.remat and --optim.accumulate make it fit, see gptjax plan"


def _smaller(config: TrainConfig, sizes: Mapping[str, int]) -> Iterator[TrainConfig]:
    """The settings with more computed again and more micro-batches, those that cost least first."""
    rows = config.data.batch_size // (sizes["data"] * sizes["fsdp"])
    own = config.model.remat
    remats = [own, *(REMATS[REMATS.index(own) + 1 :] if own in REMATS else ("full",))]
    parts = [n for n in range(config.optim.accumulate, rows + 1) if rows % n == 0]
    for accumulate, remat in ((n, remat) for n in parts for remat in remats):
        model, optim = config.model, config.optim
        yield dataclasses.replace(
            config,
            model=dataclasses.replace(model, remat=remat),
            optim=dataclasses.replace(optim, accumulate=accumulate),
        )


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def short(count: int) -> str:
    """'124M', '2.36M' or '8.03B'."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
