"""Settings of the optimizer and its schedule."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from gptjax.config.section import Section


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """The optimizer and its schedule."""

    section: ClassVar[str] = "optim"

    kind: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    """AdamW; Lion; Adafactor (factored second moments); Muon for the layers' matrices with AdamW for the rest."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "linear", "constant", "rsqrt"] = "cosine"
    """After warm-up: half a cosine; constant with a straight decay at the end (warm-up, stable, decay); a straight
    decay; constant; or falling as 1 / sqrt(step)."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a share of the peak (cosine, linear, wsd)."""
    decay_fraction: float = 0.2
    """Share of the steps in which wsd decays."""
    beta1: float = 0.9
    """Decay of the first moment; Adafactor with 0 keeps none, and hardly any state."""
    beta2: float = 0.95
    """Decay of the second moment; Adafactor's highest; Lion's for its momentum, which beta1 mixes with the gradient."""
    epsilon: float = 1e-8
    """Added to the root of the second moment, which Lion does not have."""
    momentum: float = 0.95
    """Decay of Muon's momentum."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which evaluation and generation then use; 0: none."""
    z_loss: float = 0.0
    """Weight of log(Z)^2 in the loss, which keeps the softmax's normaliser Z near 1 (PaLM)."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and the position table have none."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    accumulate: int = 1
    """Micro-batches that one step runs in turn; data.batch_size is divided by it."""

    def decay_steps(self, steps: int) -> float:
        """Steps at the end of a run of `steps` over which wsd decays."""
        return max(steps * self.decay_fraction, 1)

    def __post_init__(self):
        self.require_positive("learning_rate", "epsilon", "accumulate")
        self.require_numbers(0, 2**31 - 1, "warmup_steps")
        self.require_numbers(0, math.inf, "weight_decay", "clip_norm", "z_loss")
        self.require_numbers(0, 1, "final_fraction", "decay_fraction")
        for name in ("beta1", "beta2", "momentum", "ema"):
            self.require(0 <= getattr(self, name) < 1, name, "from 0 up to, not including, 1")
