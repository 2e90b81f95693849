"""Settings of `--init RUN` against those of the run whose weights it takes. Imports no jax."""

from gptjax.config import TrainConfig
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


def check_init(config: TrainConfig) -> None:
    """Raises InputError where config.init is no run with a checkpoint, or its weights would mean something else here.

    It reads settings alone, so that a wrong one is refused before a text is prepared and a model made.
    """
    old = load_config(config.init)
    if not committed_steps(Run.at(config.init).checkpoints):
        raise InputError(f"init={config.init!r} has no checkpoint; wanted a run that was trained")
    _check_settings(old, config)


def _check_settings(old: TrainConfig, config: TrainConfig) -> None:
    """Raises InputError unless the old weights mean what they meant."""
    names = [*MEANING, *(() if config.data.length > old.data.length else REACH)]
    if config.model.positions != "rope":  # else they say nothing
        names = [name for name in names if not name.startswith("rope_")]
    pairs = {name: (getattr(old.model, name), getattr(config.model, name)) for name in names}
    if other := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
        shown = "; ".join(f"model.{name} was {was!r}, got {got!r}" for name, (was, got) in other.items())
        advice = "; with a longer data.length it may differ" if other.keys() <= set(REACH) else ""
        raise InputError(f"init={config.init!r}: its weights are of another model: {shown}; wanted what was{advice}")
