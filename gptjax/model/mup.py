"""muP: one learning rate and one initial scale for every width, decided by the letters of a parameter's name.

Yang & Hu et al. 2022, Tensor Programs V, table 8. With r = model.width / model.mup_base_width:

    hidden matrices (of D, F or heads, into the same)    initial std / sqrt(r)    learning rate / r
    embedding, head, positions, norms, biases            as they are              as it is
    logits                                               divided by r
    attention scores                                     q k sqrt(base head size) / head size

So the head may be the embedding (tied). The base model has this one's depth and ratios. With model.head_dim=0 it has
as many heads, and their size grows with the width; with model.head_dim set, heads keep that size, their number grows
with the width, and the scores stay at q k / sqrt(head size). A width equal to the base changes no bit.

The rate is that of an update whose elements have a size of their own, whatever the gradient's: Adam, Lion, and
Adafactor without relative steps. Muon's update, scaled by sqrt(max(fan in, fan out)), has a spectral norm that grows
as sqrt(r) and must have one that grows as sqrt(fan out / fan in) (Yang, Simon & Bernstein 2023), so its rate is
divided by sqrt(r). Weight decay is not scaled: learning rate x decay stays that of the base. Nor is optim.epsilon,
which must stay small beside gradients that shrink as 1 / r.
"""

from gptjax.config import ModelConfig

# Dimensions that grow with the width. (V, T, L, and LoRA's R do not.)
GROWING = ("D", "F", "HK", "GK")


def _ratio(cfg: ModelConfig) -> float:
    return cfg.width / cfg.mup_base_width if cfg.mup_base_width else 1.0


def _grows(name: str) -> tuple[bool, bool]:
    """(fan-in grows with the width, fan-out does) for a matrix; (False, False) for other parameters."""
    from gptjax.parallel.sharding import matrix  # imports jax, which checks of an export do without

    inputs, outputs = matrix(name) or ("", "")
    return inputs in GROWING, outputs in GROWING


def init_factor(cfg: ModelConfig, name: str) -> float:
    """Factor of the initial standard deviation of a parameter."""
    return _ratio(cfg) ** -0.5 if _grows(name)[0] else 1.0


def rate_factor(cfg: ModelConfig, name: str, spectral: bool = False) -> float:
    """Factor of the learning rate of a parameter; `spectral` where its update is Muon's."""
    inputs, outputs = _grows(name)
    if not inputs:
        return 1.0
    return _ratio(cfg) ** (-0.5 if spectral and outputs else -1.0)


def logits_factor(cfg: ModelConfig) -> float:
    """Factor of the logits, or of the hidden states that they are computed from."""
    return cfg.logit_scale / _ratio(cfg)


def attention_scale(cfg: ModelConfig) -> float:
    """The scale of attention scores: 1 / sqrt(head size), and muP's own where the head size grows with the width.

    cfg.attention_divisor is in place of the head size where it is set.
    """
    return (cfg.attention_divisor or cfg.head_size) ** -0.5 * (1.0 if cfg.head_dim else _ratio(cfg) ** -0.5)
