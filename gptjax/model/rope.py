"""Rotary positions, and three ways of stretching them over a longer context than the model was trained for.

Each scaling turns the K/2 frequencies (radians a position, the fastest first) of the trained model into those of the
longer context. YaRN also sharpens attention, by a temperature on the cosines and sines.
"""

import math

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig

# Constants of the published methods: turns over the original context above which a frequency is kept (fast), and
# below which it is interpolated in full (slow).
YARN_FAST, YARN_SLOW = 32.0, 1.0
LLAMA3_FAST, LLAMA3_SLOW = 4.0, 1.0


def rope(cfg: ModelConfig, local: bool | jax.Array = False) -> tuple[jax.Array, float | jax.Array]:
    """The frequencies (K/2 of them) of the model's rotary positions, and the temperature of its cosines and sines.

    `local` is true in a layer with a window, whose positions may be others (cfg.rope_theta_local).
    """
    size, theta, factor, original = cfg.head_size, cfg.rope_theta, cfg.rope_factor, cfg.rope_original_length
    if cfg.rope_theta_local and local is True:
        return frequencies(size, cfg.rope_theta_local), 1.0
    frequency, temperature = frequencies(size, theta), 1.0
    if cfg.rope_scaling == "linear":
        frequency = frequency / factor  # position interpolation (Chen et al. 2023)
    if cfg.rope_scaling == "llama3":
        frequency = llama3(frequency, factor, original)
    if cfg.rope_scaling == "yarn":
        frequency, temperature = yarn(size, theta, factor, original), yarn_temperature(factor)
    if cfg.rope_theta_local and local is not False:
        frequency = jnp.where(local, frequencies(size, cfg.rope_theta_local), frequency)
        temperature = 1.0 if temperature == 1.0 else jnp.where(local, 1.0, temperature)
    return frequency, temperature


def frequencies(size: int, theta: float) -> jax.Array:
    """theta^(-2i/K) for i = 0 .. K/2 - 1, with K = size (Su et al. 2021, RoFormer)."""
    half = size // 2
    return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)


def yarn(size: int, theta: float, factor: float, original: int) -> jax.Array:
    """YaRN's frequencies (Peng et al. 2023, section 3.2, "NTK-by-parts").

    A frequency that turns more than 32 times over the original context is kept, one that turns less than once is
    divided by the factor; between the two a ramp, linear in the frequency's number, goes from one to the other.
    """

    def number(turns: float) -> float:
        """The number i of the frequency that turns so often over the original context."""
        return size * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    first = max(math.floor(number(YARN_FAST)), 0)
    last = min(math.ceil(number(YARN_SLOW)), size - 1)
    width = max(last - first, 0.001)  # as in the paper's code: a ramp of no width is a step
    ramp = jnp.clip((jnp.arange(size // 2, dtype=jnp.float32) - first) / width, 0, 1)
    frequency = frequencies(size, theta)
    return frequency / factor * ramp + frequency * (1 - ramp)


def yarn_temperature(factor: float) -> float:
    """YaRN's 0.1 ln(factor) + 1 on cosines and sines: the scores grow by its square (Peng et al. 2023, section 3.4)."""
    return 0.1 * math.log(factor) + 1


def llama3(frequency: jax.Array, factor: float, original: int) -> jax.Array:
    """Llama 3.1's scaling (Dubey et al. 2024; Meta's reference code).

    A frequency that turns more than 4 times over the original context is kept, one that turns less than once is divided
    by the factor; between the two the share that is kept grows linearly with the turns.
    """
    turns = original * frequency / (2 * math.pi)
    kept = jnp.clip((turns - LLAMA3_SLOW) / (LLAMA3_FAST - LLAMA3_SLOW), 0, 1)
    return (1 - kept) * frequency / factor + kept * frequency


def rotate(
    x_BLHK: jax.Array, positions_BL: jax.Array, frequency: jax.Array, temperature: float | jax.Array = 1.0
) -> jax.Array:
    """Turns the pair (x_i, x_{i + K/2}) by the angle position x frequency_i, in queries and keys alike.

    Su et al. 2021, RoFormer, in the half-split form of the Llama checkpoints. Computed in float32: in bfloat16 the
    angle of position 257 is already that of 256.
    """
    angle = positions_BL[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if not isinstance(temperature, float) or temperature != 1.0:
        cos, sin = cos * temperature, sin * temperature
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLHK.dtype)
