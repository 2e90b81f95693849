"""Settings of `--init RUN` against those of the run whose weights it takes, or as taken from it. Imports no jax."""

import dataclasses
import operator
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from gptjax.config import ModelConfig, TokenizerConfig, TrainConfig, TuneConfig, VisionConfig
from gptjax.config.section import InputError
from gptjax.runs.manifest import committed_steps
from gptjax.runs.run import Run, load_config

# Settings under which weights of the same shapes mean something else: always, and unless rows become longer, as they
# may with another reach of attention or other rotary positions.
MEANING = ("embedding", "positions", "norm", "norm_weights", "post_norms", "activation", "biases", "qkv_biases",
           "qk_norm", "attention_divisor", "attention_softcap", "logit_scale", "logit_softcap", "parallel", "tied",
           "mup_base_width")  # fmt: skip
REACH = ("rope_theta", "rope_theta_local", "rope_scaling", "rope_factor", "rope_original_length", "window",
         "global_every")  # fmt: skip

# What fine-tuning has of its own; the rest of the model is the base's.
OWN = ("dropout", "dtype", "attention", "attention_block", "remat", "remat_names", "unroll", "block")


def with_init(config: TuneConfig, given: Collection[str] = ()) -> TuneConfig:
    """The settings with the model and tokenizer of the run in config.init, or of config.run_dir once that was begun.

    With init=scratch they are the settings' own, and where that run reads no images so is model.vision. Raises
    InputError where there is no such run, and where a setting of the model or the tokenizer, given by name or other
    than the default, differs from the run's.
    """
    if config.from_scratch:
        return config
    begun = bool(committed_steps(Run.at(config.run_dir).checkpoints))
    if not config.init:
        scratch = " (--init scratch: random weights)" if config.stage == "sft" else ""
        raise InputError(f"init='': wanted the run to fine-tune, pretrained or imported; add --init RUN{scratch}")
    base = load_config(config.run_dir if begun else config.init)
    if base.model.block != config.model.block:
        raise InputError(
            f"init={config.init!r} was trained with the block {base.model.block!r}, code that a run's folder can't "
            f"name; got model.block={config.model.block!r}"
        )
    for name, got, wanted in _taken(config, base, given):
        raise InputError(f"{name}={got!r}: wanted {wanted!r}, as in init={config.init!r}; leave it out")
    tokenizer = TokenizerConfig(
        kind=base.tokenizer.kind,
        vocab_size=base.tokenizer.vocab_size,
        path="" if base.tokenizer.kind == "bytes" else str(Run.at(config.init).tokenizer),
        pattern=base.tokenizer.pattern,
        template=config.tokenizer.template or base.tokenizer.template,
    )
    own = OWN if base.model.vision.patch else (*OWN, "vision")
    if len(own) > len(OWN) and config.model.vision.patch and config.lora.rank:
        raise InputError(
            f"lora.rank={config.lora.rank}: init={config.init!r} reads no images yet, and a new encoder needs all of "
            "its weights; wanted --lora.rank 0"
        )
    model = dataclasses.replace(base.model, **{name: getattr(config.model, name) for name in own})
    return dataclasses.replace(config, init=str(Run.at(config.init).folder), model=model, tokenizer=tokenizer)


def _taken(config: TuneConfig, base: TrainConfig, given: Collection[str]) -> Iterator[tuple[str, object, object]]:
    """Yields (name, value, the base's) of the settings that are taken from the base, and were set to another value."""
    groups: list[tuple[str, tuple[str, ...], Any]] = [
        ("model", (*OWN, "vision"), ModelConfig()),
        ("tokenizer", ("template", "path"), TokenizerConfig()),
    ]
    if base.model.vision.patch:  # else images are read for the first time
        groups.append(("model.vision", (), VisionConfig()))
    for group, own, default in groups:
        for f in dataclasses.fields(default):
            name = f"{group}.{f.name}"
            got, wanted = (operator.attrgetter(name)(c) for c in (config, base))
            set_here = name in given or got != getattr(default, f.name)
            if f.name not in own and set_here and got != wanted:
                yield name, got, wanted


def check_init(config: TrainConfig) -> None:
    """Raises InputError where config.init is no run with a checkpoint, or its weights would mean something else here.

    It reads settings alone, so that a wrong one is refused before a text is prepared and a model made.
    """
    old = load_config(config.init)
    if not committed_steps(Run.at(config.init).checkpoints):
        raise InputError(f"init={config.init!r} has no checkpoint; wanted a run that was trained")
    check_heads(old, config.init)
    _check_settings(old, config)


def check_heads(config: TrainConfig, run_dir: str | Path, asked: Sequence[str] = ()) -> None:
    """Raises InputError where a run lacks a head that is asked for, or is a reward model that is asked for text."""
    if lacking := [name for name in asked if name not in config.heads]:
        wanted = "a run by gptjax reward" if "score_D" in lacking else "a run with a value function"
        raise InputError(f"{run_dir} is a run by gptjax {config.stage}, which has no {lacking[0]}; wanted {wanted}")
    if "score_D" in config.heads and not asked:
        raise InputError(f"{run_dir} is a reward model, whose weights no longer write text; wanted a language model")


def _check_settings(old: TrainConfig, config: TrainConfig) -> None:
    """Raises InputError unless the old weights mean what they meant."""
    names = [
        *MEANING,
        *(("vision",) if old.model.vision.patch else ()),
        *(() if config.data.length > old.data.length else REACH),
    ]
    if config.model.positions != "rope":  # else they say nothing
        names = [name for name in names if not name.startswith("rope_")]
    pairs = {name: (getattr(old.model, name), getattr(config.model, name)) for name in names}
    if other := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
        shown = "; ".join(f"model.{name} was {was!r}, got {got!r}" for name, (was, got) in other.items())
        advice = "; with a longer data.length it may differ" if other.keys() <= set(REACH) else ""
        raise InputError(f"init={config.init!r}: its weights are of another model: {shown}; wanted what was{advice}")
