"""`gptjax plan`: memory, estimated speed and price of a recipe on a topology, as one screen and one JSON object."""

import dataclasses
import os
import pprint
import shlex
from collections.abc import Callable
from typing import Any

from gptjax.config import STAGES, TrainConfig
from gptjax.config.section import InputError, leaves
from gptjax.diagnostics.plan.compiled import Compiled, Target, UnknownTopology, compile_for, has_libtpu
from gptjax.diagnostics.plan.prices import Prices, read_prices
from gptjax.diagnostics.plan.search import (
    MOST_COMPILES,
    MOST_SECONDS,
    SAFE,
    Candidate,
    Planner,
    SearchResult,
)
from gptjax.model.counts import parameters
from gptjax.runtime.hardware import Topology, topology
from gptjax.storage import write_file

GIB = 2**30
# The topologies that are compared where none is given.
OFFERS = ("v5e:4x4", "v5e:16x16", "v6e:4x4", "v6e:16x16", "v5p:2x2x4", "v5p:4x4x4", "v5p:8x8x8", "h100:8", "h100:64",
          "h100:512", "h200:8", "a100:8")  # fmt: skip
NO_LIBTPU = "libtpu is not installed, so memory is counted and not compiled; pip install 'gptjax[tpu-plan]'"


def plan(
    config: TrainConfig, name: str, compiles: int, price_file: str, say: Callable[[str], None], images: int = 0
) -> tuple[dict[str, Any], TrainConfig | None]:
    """A JSON object on the settings' needs on a topology, and the best settings for it; None where nothing fits.

    Each line of one screen goes to `say`. A row has so many `images`.
    """
    prices = read_prices(price_file)
    target = topology(name, prices.by_kind)
    planner = Planner(config, target, images)
    report: dict[str, Any] = {"topology": target.name, "devices": target.devices, "hosts": target.hosts}
    say(_headline(config, target, images))
    if target.chip is None:
        return report | _on_cpu(planner, compiles, say), None
    limit = target.chip.memory
    report["memory_a_device"] = limit
    compiler = _compiler(target, images) if compiles > 0 and target.libtpu and has_libtpu() else None
    if target.libtpu and not has_libtpu():
        say(NO_LIBTPU)
    try:
        written = _as_written(planner, compiler, say)
        used = int(written is not None and written.compiled is not None)
        result = planner.search(compiler, compiles - used, MOST_SECONDS)
    except UnknownTopology as e:
        say(f"{e}; memory is counted and not compiled; a newer one may know it: pip install -U libtpu")
        compiler, written, result = None, _as_written(planner, None, say), planner.search(None)
    report["as_written"] = written and as_json(written)
    best = result.best
    report |= {"candidates": result.counted, "compiles": [as_json(c) for c in result.tried]}
    report["found"] = best and as_json(best)
    if best is None:
        say(_nothing(result, limit))
        return report, None
    flags = changes(config, best.config)
    report["flags"] = shlex.join(to_flags(flags))
    kind = f"{len(result.tried)} compiled" if compiler else f"{1 - SAFE:.0%} of the memory kept free"
    say(f"fastest that fits, by estimate, of {result.counted:,} counted ({kind}): {report['flags'] or 'as written'}")
    for c in result.tried[:-1] if best.compiled else result.tried:
        say(f"  did not: {shlex.join(to_flags(changes(config, c.config)))}: {_why(c)}")
    for line in _memory_lines(best, limit, target):
        say(line)
    report["estimate"] = _estimate(config, best, target, prices, say)
    if best.compiled:
        say(f"sharding lint: {'; '.join(best.compiled.findings) or 'nothing'}")
    else:
        say("sharding lint: not run, for nothing was compiled")
    auto = {name: getattr(config.model, name) for name in ("attention", "dtype")}  # stay as written
    return report, dataclasses.replace(best.config, model=dataclasses.replace(best.config.model, **auto))


def compare_topologies(
    config: TrainConfig, price_file: str, say: Callable[[str], None], images: int = 0
) -> dict[str, Any]:
    """Compares OFFERS, a line each: the fastest settings that fit by the count, their time and price."""
    rows, prices = [], read_prices(price_file)
    say("where         GiB of  tokens/s  MFU   days       dollars  settings (counted and estimated; nothing compiled)")
    for name in OFFERS:
        where = topology(name, prices.by_kind)
        assert where.chip is not None
        try:
            best = Planner(config, where, images).search(None).best
        except InputError as e:
            say(f"{name:10} {e}")
            continue
        if best is None or best.speed is None:
            say(f"{name:10} nothing fits")
            rows.append({"topology": name, "found": None})
            continue
        costs = _costs(config, best, where)
        rows.append({"topology": name, "found": as_json(best)} | costs)
        say(
            f"{name:10} {best.memory.total / GIB:5.1f} {where.chip.memory / GIB:5.0f} "
            f"{costs['tokens_per_second']:9,.0f} {best.speed.mfu:4.0%} {costs['days']:6,.1f} "
            f"{_dollars(costs['dollars']):>13}  {shlex.join(to_flags(changes(config, best.config)))}"
        )
    say(prices.sentence)
    return {"offers": rows}


def as_json(c: Candidate) -> dict[str, Any]:
    """A candidate as JSON."""
    compiled = c.compiled and dataclasses.asdict(c.compiled) | {"total": c.compiled.total}
    fast = c.speed and dataclasses.asdict(c.speed) | {"seconds": c.speed.seconds, "bound": c.speed.bound}
    return {
        "mesh": c.sizes, "remat": c.config.model.remat, "accumulate": c.config.optim.accumulate,
        "attention": c.config.model.attention, "batch_size": c.config.data.batch_size,
        "counted": dataclasses.asdict(c.memory) | {"total": c.memory.total},
        "compiled": compiled, "failure": c.failure, "speed": fast,
    }  # fmt: skip


def changes(before: TrainConfig, after: TrainConfig) -> dict[str, Any]:
    """The settings that differ, by dotted name; what was selected for auto is left out."""
    old = dict(leaves(before))
    return {name: value for name, value in leaves(after) if value != old[name] != "auto"}


def to_flags(settings: dict[str, Any]) -> list[str]:
    """The settings as words of a command line."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def recipe_text(source: str, size: str, settings: dict[str, Any], topology_name: str, stage: str = "pretrain") -> str:
    """The source of a recipe that takes another's settings and changes these."""
    given, kind = f', "{size}"' if size else "", STAGES[stage].__name__
    return f'''"""The settings of {source} for {topology_name}, chosen by gptjax plan, not run."""

from gptjax.config import {kind}
from gptjax.config.command_line import load_recipe
from gptjax.config.section import build, leaves

CHANGED = {pprint.pformat(settings, width=110)}


def {stage}() -> {kind}:
    config = load_recipe({source!r}).config("{stage}"{given})
    return build({kind}, dict(leaves(config)) | CHANGED)
'''


def write_recipe(
    path: str, source: str, size: str, settings: dict[str, Any], place: str, found: bool, stage: str = "pretrain"
) -> None:
    """Writes the recipe of the best settings; raises InputError where none were found."""
    if not found:
        raise InputError(f"{path} is not written, for no settings were found for {place}; try more or larger chips")
    write_file(path, recipe_text(source, size, settings, place, stage).encode())


def _headline(config: TrainConfig, where: Topology, images: int) -> str:
    count = parameters(config.model, config.tokenizer.vocab_size, config.data.length)["total"]
    chip = f" of {where.chip.memory / GIB:.1f} GiB on {where.hosts} host(s)" if where.chip else ""
    rows, length = config.data.batch_size, config.data.length
    seen = f" with {images:,} images each" if images else ""
    return (
        f"{count / 1e9:.3g}B parameters, {rows:,} rows of {length:,} tokens{seen} a step, {config.steps:,} steps; "
        f"{where.name}: {where.devices} device(s){chip}"
    )


def _compiler(where: Topology, images: int) -> Callable[[TrainConfig, float], Compiled]:
    target = Target(devices=where.devices, tpu=where.libtpu, megacore=where.kind == "v4")
    return lambda config, seconds: compile_for(config, target, seconds=seconds, images=images)


def _as_written(planner: Planner, compiler: Any, say: Callable[[str], None]) -> Candidate | None:
    where = planner.topology
    assert where.chip is not None
    try:
        written = planner.as_written()
        if compiler is not None:
            written.compiled = compiler(written.config, MOST_SECONDS / 2)
    except UnknownTopology:
        raise
    except InputError as e:
        say(f"as written: {e}")
        return None
    total = written.compiled.total if written.compiled and written.compiled.fits else written.memory.total
    fits = written.compiled.fits if written.compiled else total <= SAFE * where.chip.memory
    how = f"compiled for {where.name} in {written.compiled.seconds:.0f} s" if written.compiled else "counted"
    if fits:
        say(f"as written: fits, {total / GIB:.1f} GiB of {where.chip.memory / GIB:.1f} ({how})")
    else:
        missing = (written.memory.total - where.chip.memory) / GIB
        more = f"; {written.compiled.error}" if written.compiled else ""
        short = f"about {missing:.1f} GiB a chip are missing" if missing > 0 else "too little is left to be safe"
        say(f"as written: does not fit, {short} (counted {written.memory.total / GIB:.1f}; {how}{more})")
    return written


def _why(c: Candidate) -> str:
    if c.failure:
        return c.failure
    assert c.compiled is not None
    return c.compiled.error or f"{c.compiled.total / GIB:.1f} GiB"


def _memory_lines(c: Candidate, limit: float, where: Topology) -> list[str]:
    kinds = dataclasses.asdict(c.memory)
    line = ", ".join(f"{name} {value / GIB:.2f}" for name, value in kinds.items())
    share = c.memory.total / limit
    lines = [f"  GiB a chip, counted: {line}; in all {c.memory.total / GIB:.2f} of {limit / GIB:.1f} ({share:.0%})"]
    if c.compiled:
        x = c.compiled
        off = c.memory.total / x.total - 1
        lines.append(
            f"  compiled for {where.name} in {x.seconds:.0f} s: arguments {x.arguments / GIB:.2f}, temporaries "
            f"{x.temporaries / GIB:.2f}, in all {x.total / GIB:.2f} GiB (the count is {off:+.1%} off)"
        )
    return lines


def _costs(config: TrainConfig, c: Candidate, where: Topology) -> dict[str, float]:
    assert c.speed is not None and where.chip is not None
    seconds = config.steps * c.speed.seconds
    return {
        "tokens_per_second": c.speed.tokens_per_second, "mfu": c.speed.mfu, "days": seconds / 86400,
        "dollars": seconds / 3600 * where.chips * where.chip.price,
    }  # fmt: skip


def _estimate(
    config: TrainConfig, c: Candidate, where: Topology, prices: Prices, say: Callable[[str], None]
) -> dict[str, Any]:
    costs, fast = _costs(config, c, where), c.speed
    assert fast is not None
    say(
        f"estimate, by a roofline, not measured: {costs['tokens_per_second']:,.0f} tokens/s, MFU {fast.mfu:.0%}, "
        f"{fast.seconds:.3g} s a step (compute {fast.compute:.3g}, memory {fast.memory:.3g}, network "
        f"{fast.network:.3g}, tensor {fast.tensor:.3g})"
    )
    say(f"{config.steps:,} steps: {costs['days']:,.1f} days, {_dollars(costs['dollars'])}. {prices.sentence}")
    return costs | {"price_date": prices.date, "price_sources": prices.source}


def _dollars(amount: float) -> str:
    return f"${amount:,.0f}" if amount else "no price"


def _nothing(result: SearchResult, limit: float) -> str:
    small = result.smallest
    if small is None:
        return "nothing fits: no mesh of these devices divides the model's dimensions and the batch"
    missing = (small.memory.total / SAFE - limit) / GIB
    flags = f"mesh {small.sizes}, remat={small.config.model.remat}, accumulate={small.config.optim.accumulate}"
    short = f"about {missing:.1f} GiB a chip are missing" if missing > 0 else "the compiler needs more than was counted"
    return f"nothing fits: the least is {small.memory.total / GIB:.1f} GiB a chip ({flags}); {short}"


def _on_cpu(planner: Planner, compiles: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Reports memory alone: fake CPU devices have no speed and no price."""
    written = planner.as_written()
    kinds = ", ".join(f"{name} {value / GIB:.3f}" for name, value in dataclasses.asdict(written.memory).items())
    say(f"  GiB a device, counted: {kinds}; in all {written.memory.total / GIB:.3f}")
    if compiles > 0:
        compiled = written.compiled = compile_for(
            written.config, Target(devices=planner.topology.devices), images=planner.images
        )
        local = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / planner.topology.devices
        say(
            f"  compiled for {planner.topology.devices} fake CPU devices in {compiled.seconds:.0f} s: "
            f"{compiled.total / GIB:.3f} GiB; this machine has {local / GIB:.1f} for each"
        )
        say(f"sharding lint: {'; '.join(compiled.findings) or 'nothing'}")
    return {"as_written": as_json(written)}


def check_compiles(text: str) -> int:
    """The number of compiles that --compiles allows; raises InputError for another text."""
    if not text:
        return MOST_COMPILES
    if not text.isdecimal() or int(text) > MOST_COMPILES:
        raise InputError(f"--compiles {text}: wanted 0 to {MOST_COMPILES}")
    return int(text)
